"""The run directory: written once, refused when in doubt, readable by timm, movable."""

import dataclasses
import json
import shutil

import pytest
import timm
import torch
import yaml

from tlcli.backbones.initialise import varied
from tlcli.backbones.zoo import load_backbone, load_stored
from tlcli.config.backbone import BackboneOptions
from tlcli.config.commands import FinetuneConfig
from tlcli.errors import BackboneError, DataError, UsageError
from tlcli.heads.linear import LinearHead
from tlcli.heads.mlp import MlpHead
from tlcli.runs import model_files
from tlcli.runs.card import model_card
from tlcli.runs.directory import RunDirectory
from tlcli.runs.model_files import _fill, check_saving, save_model
from tlcli.runs.run import open_run

FILES = {"config.yaml", "run.json", "metrics.jsonl", "model.safetensors", "config.json", "README.md",
         "evaluation-val.json", "predictions-val.csv"}  # fmt: skip


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(trained.run, tmp_path / "run")


def small(name="test_resnet", **options):
    return load_backbone(BackboneOptions(backbone=name, random_init=True, image_size=32, **options))


def head_of(backbone, classes=3, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, backbone.num_features, generator=generator)
    return LinearHead(weight, torch.tensor([0.5, -1.0, 2.0][:classes]), **options)


def write(path, backbone, head, status="done"):
    facts = {
        "backbone": {"name": backbone.name, "architecture": backbone.architecture,
                     "arguments": backbone.arguments, "source": backbone.origin, "license": None},
        "preprocess": dataclasses.asdict(backbone.preprocess), "class_names": ["a", "b", "c"],
        "data": {}, "dtype": {"name": "fp32"}, "options": {}, "trained_on": ["train"],
    }  # fmt: skip
    with RunDirectory(path, FinetuneConfig(), facts) as writer:
        stored = save_model(writer, backbone, head, ("a", "b", "c"))
        if status == "done":
            writer.finish({"head": {"stored": stored}})
    return stored


# ---- what is written -------------------------------------------------------------------------------------


def test_a_run_has_exactly_its_files(trained):
    assert {path.name for path in trained.run.iterdir()} == FILES
    facts = json.loads((trained.run / "run.json").read_text())
    assert facts["schema"] == "tlcli.run/1"
    assert facts["status"] == "done"
    assert facts["class_names"] == ["a", "b", "c"]
    assert facts["head"]["selected_on"] == "train"
    assert facts["trained_on"] == ["train"]
    assert set(facts["versions"]) == {"python", "torch", "torchvision", "timm"}
    assert len(facts["cache_key"]) == 64
    assert len(facts["data"]["digest"]) == 64
    assert facts["device"]["reason"]
    assert not any(path.suffix in {".pt", ".pth", ".pkl", ".ckpt"} for path in trained.run.iterdir())


def test_the_stored_configuration_leaves_out_where_it_was_written(trained):
    stored = yaml.safe_load((trained.run / "config.yaml").read_text())
    assert "output" not in stored
    assert "overwrite" not in stored
    assert stored["backbone"] == "test_resnet"
    assert stored["data"] == str(trained.images)


def test_the_card_says_how_good_it_is_and_how_to_use_it(trained):
    card = (trained.run / "README.md").read_text()
    facts = json.loads((trained.run / "run.json").read_text())
    assert f"top-1 accuracy {facts['metrics']['val']['top1_accuracy']:.3f}" in card
    assert "95 % interval" in card
    assert "most frequent class" in card
    assert "timm.create_model" in card
    assert "licence" in card.lower()


def test_metrics_have_a_line_a_head(trained):
    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "head"]) == 16  # l2 values, one scaling


# ---- timm reads it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
)
def test_timm_gives_the_logits_of_head_and_backbone(tmp_path, name):
    backbone = small(name)
    head = head_of(backbone)
    stored = write(tmp_path / "run", backbone, head)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        rows, logits = backbone.model(images), model(images)
        if stored["classifier"] is None:  # its classifier is more than one linear layer
            assert (tmp_path / "run/head.safetensors").exists()
            logits = open_run(str(tmp_path / "run")).head().logits(logits)
        torch.testing.assert_close(logits, head.logits(rows), rtol=1e-4, atol=1e-4)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, *backbone.preprocess.image_size)
    assert tuple(data["mean"]) == backbone.preprocess.mean
    assert data["interpolation"] == backbone.preprocess.interpolation
    if name in {"test_resnet", "mobilenetv3_small_050"}:
        assert stored["classifier"]
        assert model.num_classes == 3


@pytest.mark.parametrize("kind", ["normalised", "mlp", "torchvision"])
def test_a_head_that_timm_cannot_hold_stands_beside_the_network(tmp_path, kind):
    backbone = small("torchvision/squeezenet1_1" if kind == "torchvision" else "test_resnet")
    head = head_of(backbone, normalise=kind == "normalised")
    if kind == "mlp":
        head = made_mlp(backbone.num_features)
    stored = write(tmp_path / "run", backbone, head)
    assert stored["file"] == "head.safetensors"
    assert stored["classifier"] is None
    run = open_run(str(tmp_path / "run"))
    again = run.backbone()
    images = torch.randn(2, 3, *backbone.preprocess.image_size)
    with torch.inference_mode():
        expected = head.logits(backbone.model(images))
        torch.testing.assert_close(run.head().logits(again.model(images)), expected, rtol=1e-4, atol=1e-4)
    assert again.preprocess == backbone.preprocess


def made_mlp(width):
    from tlcli.heads.fit import fit_head

    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    config = FinetuneConfig(head="mlp:5", epochs=1, folds=2, lr="0.001", dropout="0")
    head = fit_head(rows, torch.arange(30) % 3, 3, config).head
    assert isinstance(head, MlpHead)
    return head


LATE_NORMS = {  # whose classifier has a batch norm before it
    "shvit_s1": {"image_size": 64},
    "efficientvit_m0": {"image_size": 64},
}


@pytest.mark.parametrize("name", LATE_NORMS)
def test_a_norm_before_the_classifier_does_not_keep_a_trained_network_from_being_saved(tmp_path, name):
    backbone = load_backbone(BackboneOptions(backbone=name, random_init=True, **LATE_NORMS[name]))
    check_saving(backbone, 3, linear=True)
    backbone.model = varied(backbone.model).eval()  # as training leaves it
    head = head_of(backbone)
    assert write(tmp_path / "run", backbone, head)["classifier"]
    images = torch.randn(2, 3, *backbone.preprocess.image_size)
    expected = head.logits(backbone.model(images).detach())
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    torch.testing.assert_close(in_timm(images), expected, rtol=1e-4, atol=1e-4)
    again = open_run(str(tmp_path / "run"))
    features = again.backbone().model(images).detach()
    torch.testing.assert_close(again.head().logits(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision/mnasnet0_5", "classic/lenet5"])
def test_the_check_before_training_passes_and_leaves_the_network_as_it_was(name, linear):
    backbone = small(name)
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    check_saving(backbone, 3, linear=linear)
    assert all(torch.equal(value, before[key]) for key, value in backbone.model.state_dict().items())
    assert not any(module.training for module in backbone.model.modules())


def test_a_network_that_cannot_be_saved_is_refused_before_training():
    backbone = small()
    backbone.model.more = torch.nn.BatchNorm1d(3)  # a tensor that a fresh network does not have
    with pytest.raises(BackboneError, match="could not be saved") as caught:
        check_saving(backbone, 3, linear=True)
    assert "more.weight" in caught.value.message
    assert "tlcli extract" in caught.value.hint


def test_a_network_that_is_not_the_trained_one_is_not_published(tmp_path, monkeypatch):
    backbone = small()
    real = _fill

    def wrong(network, trained, place, head):
        real(network, trained, place, head)
        network.state_dict()[f"{place}.bias"].add_(0.01)

    monkeypatch.setattr(model_files, "_fill", wrong)
    with pytest.raises(BackboneError, match="differs"):
        write(tmp_path / "run", backbone, head_of(backbone))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run/model.safetensors").exists()


# ---- reading back ----------------------------------------------------------------------------------------


def test_class_names_of_a_writer_without_utf_8_are_read_as_folders_are(trained, run):
    facts = json.loads((run / "run.json").read_text())
    count = len(facts["class_names"])
    unknown = "\udcff"  # no text in any process
    names = ["猫", "猫".encode().decode("ascii", "surrogateescape"), unknown, "\ud800"]
    (run / "run.json").write_text(json.dumps(facts | {"class_names": names}))
    assert open_run(str(run)).class_names == ("猫", "猫", unknown, "\ud800")
    assert len(open_run(str(trained.run)).class_names) == count


def test_a_run_can_be_moved(trained, run, tmp_path):
    moved = run.rename(tmp_path / "else where")
    before, after = open_run(str(trained.run)), open_run(str(moved))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        left = before.head().logits(before.backbone().model(images))
        right = after.head().logits(after.backbone().model(images))
    assert torch.equal(left, right)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", None])
def test_a_run_that_is_not_done_is_refused(run, status):
    facts = json.loads((run / "run.json").read_text())
    facts["status"] = status
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not done") as caught:
        open_run(str(run))
    assert "config.yaml" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "schema None"),
        ('{"schema": "tlcli.run/9", "status": "done"}', "tlcli.run/9"),
        ('{"schema": "tlcli.run/1", "status": "done"}', "lacks"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_damaged_description_is_refused(run, text, expected):
    (run / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=expected):
        open_run(str(run))


def test_what_is_no_run_is_told_from_what_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="is no run"):
        open_run(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        open_run(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="RUN"):
        open_run(None)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        open_run(str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["truncated", "gone", "text"])
def test_damaged_files_of_a_run_are_named(run, name, change):
    path = run / name
    if change == "gone":
        path.unlink()
    elif change == "text":
        path.write_text("not this")
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((DataError, BackboneError)) as caught:
        open_run(str(run)).backbone()
    assert name in caught.value.message or str(run) in caught.value.message
    if name == "model.safetensors":
        with pytest.raises(DataError, match=r"model\.safetensors"):
            open_run(str(run)).head()


# ---- the network that was trained ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_vit", "mobilenetv3_small_050", "torchvision/shufflenet_v2_x0_5", "classic/lenet5",
     "classic/small-cnn"],
)  # fmt: skip
def test_a_tuned_network_is_stored_as_it_was_trained(tmp_path, name):
    given = {"classic/small-cnn": "norm=every,activation=tanh"}.get(name)
    backbone = load_backbone(
        BackboneOptions(backbone=name, random_init=True, image_size=32, model_kwargs=given),
        drop_path=0.2 if name == "test_vit" else 0.0,
    )
    model = backbone.model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for seed in range(2):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        model(images).square().mean().backward()
        optimizer.step()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()  # frozen units are in eval mode while the others train
    parameters[0].requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    head = head_of(backbone)
    write(tmp_path / "run", backbone, head)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    run = open_run(str(tmp_path / "run"))
    again, images = run.backbone(), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = head.logits(model.eval()(images))
        torch.testing.assert_close(run.head().logits(again.model(images)), expected, rtol=1e-4, atol=1e-4)
    assert again.arguments == backbone.arguments


def test_a_network_of_half_precision_is_stored_in_full(tmp_path):
    backbone = small()
    backbone.model.bfloat16()
    write(tmp_path / "run", backbone, head_of(backbone))
    assert next(backbone.model.parameters()).dtype == torch.bfloat16
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    for expected, value in zip(backbone.model.parameters(), model.parameters(), strict=False):
        assert torch.equal(expected.float(), value)


@pytest.mark.parametrize("name", ["classic/lenet5", "torchvision/squeezenet1_1"])
def test_a_headless_network_that_reads_back_otherwise_is_not_published(tmp_path, monkeypatch, name):
    backbone = small(name)
    real = load_stored

    def wrong(*arguments):
        loaded = real(*arguments)
        with torch.no_grad():
            next(loaded.model.parameters()).add_(0.5)
        return loaded

    monkeypatch.setattr(model_files, "load_stored", wrong)
    with pytest.raises(BackboneError, match="differs"):
        write(tmp_path / "run", backbone, head_of(backbone))
    assert not (tmp_path / "run/model.safetensors").exists()


FACTS = {
    "tlcli_version": "0", "created": "2026-01-01", "scenario": "freeze", "class_names": ["a", "b"],
    "backbone": {"name": "x", "architecture": "x", "license": None, "num_frozen_units": 8},
    "data": {"num_images": {"train": 9}}, "metrics": {},
    "head": {"kind": "linear", "chosen": None, "stored": {"classifier": "fc"}},
    "recipe": {"opt": "adamw", "lr": 0.002, "sched": "cosine", "head_init": "probe"},
    "training": {"epochs": 12, "best_epoch": None, "selected_on": None},
}  # fmt: skip


def test_the_card_of_a_trained_run_says_how_it_was_trained():
    card = model_card(FACTS)
    assert "- Head: linear\n" in card
    assert "- Training: freeze, units 1 to 8 frozen, 12 epochs, optimiser adamw, " in card
    assert "learning rate 0.002 (cosine), started from a linear probe\n" in card
    training = {"epochs": 12, "best_epoch": 7, "selected_on": "val", "lr": 0.01}
    backbone = FACTS["backbone"] | {"num_frozen_units": 0}
    recipe = {"opt": "sgd", "lr": None, "sched": "plateau", "augmentation": {"name": "light"}}
    facts = FACTS | {"scenario": "full", "training": training, "backbone": backbone, "recipe": recipe}
    card = model_card(facts)
    assert "full, no unit frozen, 12 epochs of which epoch 7 was kept (chosen on val), optimiser sgd" in card
    assert "learning rate 0.01 (plateau), augmentation light\n" in card


def test_only_one_of_several_processes_stores_the_model(tmp_path):
    backbone = small()
    with RunDirectory(tmp_path / "run", FinetuneConfig(), {}, write=False) as writer:
        stored = save_model(writer, backbone, head_of(backbone), ("a", "b", "c"))
        model_card(FACTS | {"head": FACTS["head"] | {"stored": stored}})  # made by all, written by one
    assert not (tmp_path / "run").exists()
