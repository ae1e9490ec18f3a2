"""The run directory: written once, refused when in doubt, readable by timm, movable."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import yaml

from tlcli import mlp, run_writer, runs
from tlcli.backbones.zoo import load_backbone
from tlcli.cache import files
from tlcli.config import FinetuneConfig
from tlcli.errors import BackboneError, DataError, Interrupted, StorageError, UsageError
from tlcli.linear import LinearHead
from tlcli.option_groups import BackboneOptions
from tlcli.runs import RunWriter, check_output, default_run_dir, open_run

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
                     "arguments": backbone.arguments, "source": backbone.source, "license": None},
        "preprocess": dataclasses.asdict(backbone.preprocess), "class_names": ["a", "b", "c"],
        "data": {}, "dtype": {"name": "fp32"}, "options": {}, "trained_on": ["train"],
    }  # fmt: skip
    with RunWriter(path, FinetuneConfig(), facts) as writer:
        stored = writer.save_model(backbone, head, ("a", "b", "c"))
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
    from tlcli.heads import fit_head

    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    config = FinetuneConfig(head="mlp:5", epochs=1, folds=2, lr="0.001", dropout="0")
    head = fit_head(rows, torch.arange(30) % 3, 3, config).head
    assert isinstance(head, mlp.MlpHead)
    return head


def test_a_network_that_is_not_the_trained_one_is_not_published(tmp_path, monkeypatch):
    backbone = small()
    real = runs._fill

    def wrong(network, trained, place, head):
        real(network, trained, place, head)
        network.state_dict()[f"{place}.bias"].add_(0.01)

    monkeypatch.setattr(runs, "_fill", wrong)
    with pytest.raises(BackboneError, match="differs"):
        write(tmp_path / "run", backbone, head_of(backbone))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run/model.safetensors").exists()


# ---- reading back ----------------------------------------------------------------------------------------


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


# ---- where it is written ---------------------------------------------------------------------------------


def test_default_directories_are_numbered_when_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_run_dir("/data/my photos/", "local-dir:/x/mobilenet", "feature-extraction")
    assert str(first) == "runs/my-photos-mobilenet-feature-extraction"
    first.mkdir(parents=True)
    second = default_run_dir("/data/my photos", "hf-hub:org/mobilenet", "feature-extraction")
    assert second.name == first.name + "-2"
    second.symlink_to("nowhere")
    assert default_run_dir("/data/my photos", "mobilenet", "feature-extraction").name == first.name + "-3"
    assert str(default_run_dir("labels.csv", "a/b", "x")) == "runs/labels-b-x"
    assert str(default_run_dir("..", "...", "x")).startswith("runs/x-x-x")


def refused(path, overwrite=False):
    try:
        check_output(FinetuneConfig(output=str(path), overwrite=overwrite))
    except UsageError as error:
        return error
    return None


def test_an_output_is_refused_unless_it_is_new_or_a_run_to_be_replaced(tmp_path, run):
    (tmp_path / "mine").mkdir()
    assert not refused(tmp_path / "new")
    assert not refused(tmp_path / "new/below")
    assert not refused(tmp_path / "mine")  # empty
    (tmp_path / "mine/photo.jpg").write_text("precious")
    assert "--overwrite" in refused(tmp_path / "mine").hint
    assert "no run" in refused(tmp_path / "mine", overwrite=True).message
    assert "a run already" in refused(run).message
    assert not refused(run, overwrite=True)
    assert "no run" in refused(tmp_path / "mine/photo.jpg", overwrite=True).message
    assert "no folder" in refused(tmp_path / "mine/photo.jpg/run").message
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path / "link")


def test_a_run_is_replaced_only_by_one_that_is_done(run, caplog):
    backbone = small()
    (run / "report.html").write_text("the earlier report")
    before = (run / "run.json").read_text()
    with pytest.raises(ZeroDivisionError), RunWriter(run, FinetuneConfig(), {}):
        _ = 1 / 0
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    kept = run.with_name(".run.replaced-1")
    assert (kept / "run.json").read_text() == before
    assert str(kept) in caplog.text
    with pytest.raises(DataError, match="not done") as caught:
        open_run(str(run))
    assert str(kept) in caught.value.hint
    with RunWriter(run, FinetuneConfig(), {}):
        pass  # ends, and is still not done
    assert {path.name for path in run.parent.glob(".run.replaced-*")} == {kept.name, ".run.replaced-2"}
    write(run, backbone, head_of(backbone))
    assert not (run / "report.html").exists()
    assert {path.name for path in run.parent.iterdir() if path.name.startswith(".")} == set()


def test_an_interrupted_overwrite_is_told_and_gone_on_with(run):
    """Killed between the two steps: the old run is out of the way, the new one has not begun."""
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    kept = run.rename(run.with_name(".run.replaced-1"))
    assert str(kept) in refused(run).message
    with pytest.raises(DataError, match="does not exist") as caught:
        open_run(str(run))
    assert str(kept) in caught.value.hint
    run.mkdir()  # or it had made the folder, and half of a file in it
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (run / f".tmp-{files.HOST}-{process.pid}-{'0' * 32}").write_text("half")
    assert str(kept) in refused(run).message
    given = config(output=str(run), overwrite=True)
    check_output(given)
    with RunWriter(run, given, BEGUN) as writer:
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
        writer.finish({})
    assert {path.name for path in run.parent.iterdir() if path.name.startswith(".")} == set()
    assert {path.name for path in run.iterdir()} == {"run.json", "config.yaml"}


def test_a_default_directory_is_not_that_of_an_interrupted_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_run_dir("photos", "resnet18", "full")
    (first.parent / f".{first.name}.replaced-1").mkdir(parents=True)
    assert default_run_dir("photos", "resnet18", "full").name == f"{first.name}-2"


def test_a_run_that_cannot_be_begun_leaves_the_old_one_in_place(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "publish", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        RunWriter(run, FinetuneConfig(), {}).__enter__()
    assert str(run) in caught.value.message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert [path.name for path in run.parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_is_a_link_is_replaced_and_its_target_kept(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    with RunWriter(link, FinetuneConfig(), {}) as writer:
        writer.finish({})
    assert not link.is_symlink()
    assert json.loads((link / "run.json").read_text())["status"] == "done"
    assert (run / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_replaced_run_that_cannot_be_removed_is_told(run, monkeypatch, caplog):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with RunWriter(run, FinetuneConfig(), {}) as writer:
        writer.finish({})
        monkeypatch.setattr(files, "remove_tree", refuse)
    assert "could not be removed: Permission denied" in caplog.text
    monkeypatch.undo()
    (left,) = [path for path in run.parent.iterdir() if path.name.startswith(".")]
    assert str(left) in caplog.text
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_the_working_directory_can_be_a_run_too(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert not refused(".")
    (tmp_path / ".run.replaced-1").mkdir()
    assert str(tmp_path / ".run.replaced-1") in refused(".").message


def test_a_run_is_running_until_it_is_done(tmp_path):
    with RunWriter(tmp_path / "run", FinetuneConfig(), {"x": 1}) as writer:
        facts = json.loads((tmp_path / "run/run.json").read_text())
        assert (facts["status"], facts["x"]) == ("running", 1)
        with pytest.raises(DataError, match="running"):
            open_run(str(tmp_path / "run"))
        writer.finish({"y": 2})
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "done"


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"), RunWriter(tmp_path / "run", FinetuneConfig(), {}) as writer:
        writer.write_json("x.json", {"x": float("nan")})
    assert not (tmp_path / "run/x.json").exists()


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
    real = runs.load_stored

    def wrong(*arguments):
        loaded = real(*arguments)
        with torch.no_grad():
            next(loaded.model.parameters()).add_(0.5)
        return loaded

    monkeypatch.setattr(runs, "load_stored", wrong)
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
    card = runs.model_card(FACTS)
    assert "- Head: linear\n" in card
    assert "- Training: freeze, units 1 to 8 frozen, 12 epochs, optimiser adamw, " in card
    assert "learning rate 0.002 (cosine), started from a linear probe\n" in card
    training = {"epochs": 12, "best_epoch": 7, "selected_on": "val", "lr": 0.01}
    backbone = FACTS["backbone"] | {"num_frozen_units": 0}
    recipe = {"opt": "sgd", "lr": None, "sched": "plateau", "augmentation": {"name": "light"}}
    facts = FACTS | {"scenario": "full", "training": training, "backbone": backbone, "recipe": recipe}
    card = runs.model_card(facts)
    assert "full, no unit frozen, 12 epochs of which epoch 7 was kept (chosen on val), optimiser sgd" in card
    assert "learning rate 0.01 (plateau), augmentation light\n" in card


# ---- resuming --------------------------------------------------------------------------------------------

BEGUN = {"data": {"digest": "d", "num_images": {"train": 3, "val": 1}}, "device": {"name": "cpu"}}


def config(**options):
    return FinetuneConfig(**{"data": "/photos", "backbone": "test_resnet", "freeze": "2", **options})


def begin(path, error=None, facts=BEGUN, write=True, **options):
    """Begin or continue a run that ends with `error`, or is killed."""
    writer = RunWriter(path, config(**options), facts, resume=True, write=write)
    writer.__enter__()
    if error:
        writer.__exit__(type(error), error, None)
    return writer


def status(path):
    return json.loads((path / "run.json").read_text())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "running"),
        (ValueError("x"), "failed"),
        (Interrupted(15), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_unfinished_run_is_continued_in_place(tmp_path, error, expected):
    path = tmp_path / "my run"
    given = config(output=str(path), resume=True)
    check_output(given)
    assert runs.run_to_continue(given) is None
    begin(path, error)
    first = status(path)
    assert runs.run_to_continue(given) == first
    assert runs.run_to_continue(config(output=str(path))) is None
    assert first["status"] == expected
    assert "resumed" not in first
    (path / "checkpoints/step-0000001").mkdir(parents=True)
    with pytest.raises(DataError, match="not done") as caught:
        open_run(str(path))
    assert caught.value.hint.endswith(f"--config '{path}/config.yaml' -o '{path}' --resume")
    for count in (1, 2):
        check_output(config(output=str(path), resume=True))
        writer = begin(path, workers=count, checkpoint_minutes=9.0, data="/else/where")
        facts = status(path)
        assert (facts["status"], facts["resumed"], facts["created"]) == ("running", count, first["created"])
        assert "error" not in facts
    assert (path / "checkpoints/step-0000001").is_dir()
    assert yaml.safe_load((path / "config.yaml").read_text())["workers"] == 2
    writer.finish({})
    assert status(path)["status"] == "done"
    for again in (check_output, lambda given: begin(path)):
        with pytest.raises(UsageError, match="nothing to resume"):
            again(config(output=str(path), resume=True))


@pytest.mark.parametrize("error", [Interrupted(2), KeyboardInterrupt()])
def test_an_interruption_says_how_to_continue(tmp_path, error):
    begin(tmp_path / "run", error)
    hint = error.hint if isinstance(error, Interrupted) else error.__notes__[0]
    assert hint.endswith(f"tlcli finetune --config {tmp_path}/run/config.yaml -o {tmp_path}/run --resume")
    assert (
        not {"output", "overwrite", "resume"}
        & yaml.safe_load((tmp_path / "run/config.yaml").read_text()).keys()
    )


def test_other_options_are_refused_by_name(tmp_path):
    begin(tmp_path / "run", epochs=10, lr="0.001")
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(UsageError) as caught:
        begin(tmp_path / "run", epochs=20, lr="0.001", weight_decay=0.5)
    assert "--epochs was 10, now 20; --weight-decay was None, now 0.5" in caught.value.message
    assert "--lr" not in caught.value.message
    assert (tmp_path / "run/run.json").read_bytes() == before
    begin(tmp_path / "run", epochs=10, lr="0.001")


@pytest.mark.parametrize("item", dataclasses.fields(FinetuneConfig), ids=lambda item: item.name)
def test_every_option_that_can_change_the_result_is_compared(tmp_path, item):
    """Whatever option is added later counts, unless it is named in MAY_DIFFER."""
    left, right = config(), config()
    object.__setattr__(right, item.name, "another")
    with RunWriter(tmp_path / "run", left, BEGUN) as writer:
        pass
    if item.name in run_writer.MAY_DIFFER:
        run_writer.check_same(tmp_path / "run", right, writer.facts, writer.facts)
    else:
        with pytest.raises(UsageError, match=f"--{item.name.replace('_', '-')} was .*now another"):
            run_writer.check_same(tmp_path / "run", right, writer.facts, writer.facts)


def test_other_data_is_refused(tmp_path):
    begin(tmp_path / "run")
    more = {"digest": "e", "num_images": {"train": 4, "val": 1}}
    with pytest.raises(UsageError, match="3 train, 1 val images, now 4 train, 1 val"):
        begin(tmp_path / "run", facts=BEGUN | {"data": more})
    with pytest.raises(UsageError, match="images, classes or splits changed"):
        begin(tmp_path / "run", facts=BEGUN | {"data": BEGUN["data"] | {"digest": "e"}})


def test_another_device_is_told(tmp_path, caplog):
    begin(tmp_path / "run")
    begin(tmp_path / "run", facts=BEGUN | {"device": {"name": "cuda:0"}})
    assert "device: name was cpu, now cuda:0" in caplog.text


def test_only_runs_are_resumed(tmp_path):
    def refused_resume(path):
        with pytest.raises((UsageError, DataError)) as caught:
            check_output(config(output=str(path), resume=True))
        return caught.value.message

    (tmp_path / "photos").mkdir()
    check_output(config(output=str(tmp_path / "photos"), resume=True))
    (tmp_path / "photos/config.yaml").write_text("epochs: 3")
    assert "is no run" in refused_resume(tmp_path / "photos")
    begin(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{}")
    assert "schema" in refused_resume(tmp_path / "run")
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "run/run.json").unlink()
    check_output(config(output=str(tmp_path / "run"), resume=True))


def test_killed_before_any_operation_while_it_begins(tmp_path, monkeypatch):
    """Whatever is left of a run that was killed as it began, --resume begins or continues it."""

    class Killed(BaseException):
        pass

    for nth in range(1, 100):
        path = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            left = iter(range(1, 1000))

            def wrap(real, left=left, nth=nth):
                def call(*arguments, **options):
                    if next(left) >= nth:  # nothing is cleaned up after a kill
                        raise Killed
                    return real(*arguments, **options)

                return call

            for name in ("open", "write", "fsync", "replace", "mkdir", "unlink"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                begin(path)
                survived = True
            except Killed:
                survived = False
        check_output(config(output=str(path), resume=True))
        begin(path)
        assert status(path)["status"] == "running"
        if survived:
            break
    assert nth > 10


def test_what_killed_writers_left_is_cleaned(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    begin(tmp_path / "run")
    left = tmp_path / f"run/.tmp-{files.HOST}-{process.pid}-{'0' * 32}"
    left.write_text("")
    begin(tmp_path / "run")
    assert not left.exists()


def test_only_one_of_several_processes_writes(tmp_path):
    backbone = small()
    with RunWriter(tmp_path / "run", config(), {}, write=False) as writer:
        stored = writer.save_model(backbone, head_of(backbone), ("a", "b", "c"))
        runs.model_card(FACTS | {"head": FACTS["head"] | {"stored": stored}})  # made by all, written by one
        writer.write_json("x.json", {})
        writer.write_lines("x.jsonl", [{}])
        writer.write_yaml("x.yaml", {})
        writer.finish({"x": 1})
        assert writer.facts["x"] == 1
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    begin(tmp_path / "run", Interrupted(15), write=False)
    with pytest.raises(UsageError, match="other options"):  # so that all processes end, not the writer alone
        begin(tmp_path / "run", epochs=99, write=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_full_disk_does_not_hide_what_happened(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run():
        with RunWriter(tmp_path / "run", config(), {}):
            monkeypatch.setattr(files, "publish", full)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        run()
