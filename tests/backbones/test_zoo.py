"""Loading backbones by every kind of name, without a network."""

import hashlib
import json
import socket
import time

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tlcli.backbones import hub, torchvision_zoo
from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.cut import cut_at
from tlcli.backbones.timm_zoo import build_classifier, classifier_name, timm_config
from tlcli.backbones.units import units
from tlcli.backbones.zoo import load_backbone, load_stored
from tlcli.config.backbone import BackboneOptions, Preprocess
from tlcli.errors import BackboneError, UsageError

SMALL = "mobilenetv3_small_050"
TAGGED = "mobilenetv3_small_050.lamb_in1k"


def load(name, **options):
    return load_backbone(BackboneOptions(backbone=name, **options))


def trained(name=SMALL, **arguments):
    torch.manual_seed(3)
    return timm.create_model(name, **arguments).eval()


def write_folder(folder, model, architecture=SMALL, **config):
    folder.mkdir(parents=True)
    content = {"architecture": architecture, "num_classes": model.num_classes, "pretrained_cfg": {}, **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def write_hub_cache(repository, files):
    """Lay files out as huggingface_hub does: blobs by hash, snapshots of links, refs to the commit."""
    root = hub.hub_cache() / ("models--" + repository.replace("/", "--"))
    commit = "1" * 40
    for part in ("blobs", f"snapshots/{commit}", "refs"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "refs/main").write_text(commit)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (root / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob.name}")
    return root


def packed(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    return (tmp_path / "packed.safetensors").read_bytes()


def test_random_init_is_reproducible_headless_and_leaves_the_random_state_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, other = load(SMALL, random_init=True), load(SMALL, random_init=True)
    assert torch.equal(torch.rand(3), expected)
    assert state_sha256(one.model) == state_sha256(other.model)
    assert not one.model.training
    assert one.model(torch.zeros(2, 3, 64, 64)).shape == (2, one.num_features)
    assert (one.architecture, one.origin, one.pretrained) == (SMALL, "timm", False)


def test_the_hash_follows_every_weight_and_buffer():
    model = load(SMALL, random_init=True).model
    before = state_sha256(model)
    model.bn1.running_mean[0] += 1
    middle = state_sha256(model)
    model.conv_stem.weight.data[0, 0, 0, 0] += 1e-6
    assert len({before, middle, state_sha256(model)}) == 3


def test_a_timm_name_from_the_cache_alone(tmp_path):
    source = trained()
    write_hub_cache(f"timm/{TAGGED}", {"model.safetensors": packed(source, tmp_path)})
    backbone = load(TAGGED)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.classifier(backbone.model(images)), source(images))
    assert backbone.license == "apache-2.0"
    assert backbone.pretrained


def test_hf_hub_from_the_cache_alone(tmp_path):
    source = trained(num_classes=5, act_layer="relu")
    config = {
        "architecture": SMALL,
        "num_classes": 5,
        "model_args": {"act_layer": "relu"},
        "pretrained_cfg": {"license": "mit", "input_size": [3, 96, 96]},
    }
    write_hub_cache(
        "someone/birds",
        {"model.safetensors": packed(source, tmp_path), "config.json": json.dumps(config).encode()},
    )
    backbone = load("hf-hub:someone/birds")
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(source.classifier(backbone.model(images)), source(images))
    assert (backbone.license, backbone.preprocess.image_size, backbone.origin) == ("mit", (96, 96), "hf-hub")
    assert backbone.arguments == {"act_layer": "relu"}


@pytest.mark.parametrize("damage", ["incomplete", "truncated", "empty", "flipped", "no link"])
def test_a_partial_download_is_never_used(tmp_path, damage):
    root = write_hub_cache(f"timm/{TAGGED}", {"model.safetensors": packed(trained(), tmp_path)})
    blob = next((root / "blobs").iterdir())
    data = blob.read_bytes()
    if damage == "incomplete":
        blob.rename(blob.with_name(blob.name + ".incomplete"))
    elif damage == "no link":
        next(root.glob("snapshots/*/*")).unlink()
    else:
        blob.write_bytes(
            {"truncated": data[: len(data) // 2], "empty": b"", "flipped": data[:-9] + b"\x55" * 9}[damage]
        )
    with pytest.raises(BackboneError, match="not on this machine"):
        load(TAGGED)


@pytest.mark.parametrize("name", [TAGGED, "hf-hub:timm/nothing", "torchvision/resnet18"])
def test_offline_without_weights_says_what_to_do_at_once(name):
    start = time.perf_counter()
    with pytest.raises(BackboneError, match="offline") as caught:
        load(name)
    assert time.perf_counter() - start < 5
    for word in ("bundled", "--weights", "local-dir:"):
        assert word in caught.value.hint
    assert str(hub.checkpoints_dir() if "torchvision" in name else hub.hub_cache()) in caught.value.hint


@pytest.mark.parametrize("name", [TAGGED, "torchvision/resnet18"])
def test_a_network_that_never_answers_is_given_up(name, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "DEADLINE_SECONDS", 0.2)
    listener = socket.create_server(("127.0.0.1", 0))  # accepts and stays silent
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname())],
    )
    start = time.perf_counter()
    with listener, pytest.raises(BackboneError, match="cannot be reached"):
        load(name)
    assert time.perf_counter() - start < 5


def test_a_local_folder_with_arguments(tmp_path):
    source = trained(num_classes=4, act_layer="relu")
    folder = write_folder(tmp_path / "birds", source, model_args={"act_layer": "relu"})
    backbone = load(f"local-dir:{folder}")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.classifier(backbone.model(images)), source(images))


def test_a_headless_local_folder(tmp_path):
    source = trained(num_classes=0)
    backbone = load(f"local-dir:{write_folder(tmp_path / 'x', source)}")
    assert state_sha256(backbone.model) == state_sha256(source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON"),
        ("[]", "names no architecture"),
        ('{"architectures": ["ResNet"]}', "names no architecture"),
        ('{"architecture": "resnet1000"}', "unknown to timm"),
        ('{"architecture": "resnet18", "model_args": 3}', "mappings"),
        ('{"architecture": "resnet18", "model_args": {"no_such_thing": 1}}', "no_such_thing"),
        ('{"architecture": "resnet18", "pretrained_cfg": {"input_size": [1, 28, 28]}}', "1 channels"),
    ],
)
def test_a_bad_config_is_named(tmp_path, text, words):
    folder = write_folder(tmp_path / "x", trained())
    (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=words):
        load(f"local-dir:{folder}")


def test_a_folder_whose_weights_are_another_networks(tmp_path):
    folder = write_folder(tmp_path / "x", trained(), architecture="resnet10t")
    with pytest.raises(BackboneError, match="fit only 0%"):
        load(f"local-dir:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="has no weights"):
        load(f"local-dir:{folder}")
    with pytest.raises(BackboneError, match="no such folder"):
        load(f"local-dir:{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", "resnet18"),
        ("ResNet-18", "resnet18"),
        ("resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("someone/birds", "hf-hub:someone/birds"),
        ("hf-hub:birds", "ORG/NAME"),
        ("torchvision/resnet19", "resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "classifies"),
        ("timm/resnet18", "bare name"),
        ("googlenet", "torchvision/googlenet"),
        ("AlexNet", "torchvision/alexnet"),
        ("lenet5", "classic/lenet5"),
        ("classic/lenet6", "classic/lenet5"),
        (None, "bundled"),
    ],
)
def test_an_unknown_name_is_a_usage_error_with_close_matches(name, words):
    with pytest.raises(UsageError) as caught:
        load(name)
    assert words in caught.value.hint


def test_arguments_of_timm_networks_reach_them_and_the_run(tmp_path):
    backbone = load(
        "resnet18", random_init=True, model_kwargs="layers=[1,1,1,1],channels=[8,8,16,16],act_layer=elu"
    )
    assert backbone.arguments == {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "act_layer": "elu"}
    assert backbone.num_features == 16
    assert isinstance(backbone.model.act1, torch.nn.ELU)
    (tmp_path / "config.json").write_text(json.dumps(timm_config(backbone, 0, [])))
    save_file(backbone.model.state_dict(), tmp_path / "model.safetensors")
    again = load(f"local-dir:{tmp_path}")
    assert again.arguments == backbone.arguments
    assert state_sha256(again.model) == state_sha256(backbone.model)
    changed = load(f"local-dir:{tmp_path}", model_kwargs="act_layer=relu")
    assert changed.arguments["act_layer"] == "relu"
    with pytest.raises(BackboneError, match="another shape"):
        load(f"local-dir:{tmp_path}", model_kwargs="channels=[8,8,16,24]")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("resnet10t", "act_layr=elu", "Did you mean act_layer"),
        (SMALL, "no_such_thing=1", "act_layer"),
        ("resnet10t", "layers=3", "timm"),
        ("resnet10t", "act_layer=nonsense", "timm"),
        ("bundled", "act_layer=nonsense", "timm"),
        ("torchvision/resnet18", "width_per_group=32", "timm"),
    ],
)
def test_wrong_arguments_are_usage_errors(name, text, words):
    with pytest.raises(UsageError) as caught:
        load(name, random_init=name != "bundled", model_kwargs=text)
    assert words in caught.value.hint


def rates(backbone):
    kinds = {"DropPath": "drop_prob", "StochasticDepth": "p"}
    found = [module for module in backbone.model.modules() if type(module).__name__ in kinds]
    return [getattr(module, kinds[type(module).__name__]) for module in found]


@pytest.mark.parametrize("name", ["resnet18", SMALL, "torchvision/efficientnet_b0"])
def test_drop_path_changes_training_alone(name):
    options = BackboneOptions(backbone=name, random_init=True, image_size=32)
    plain, dropping = load_backbone(options), load_backbone(options, drop_path=0.2)
    assert not any(rates(plain))
    assert max(rates(dropping)) == pytest.approx(0.2, rel=0.2)
    assert sorted(rates(dropping)) == rates(dropping)
    assert dropping.arguments == plain.arguments
    assert state_sha256(dropping.model) == state_sha256(plain.model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(dropping.model(images), plain.model(images))


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "torchvision/resnet18", "classic/lenet5"])
def test_networks_without_drop_path_are_named(name):
    with pytest.raises(UsageError, match=f"{name} has no drop-path"):
        load_backbone(BackboneOptions(backbone=name, random_init=True, image_size=32), drop_path=0.1)


def test_an_architecture_s_own_drop_path_is_off_unless_asked_for():
    own = load("tiny_vit_11m_224", random_init=True)
    assert rates(own)
    assert not any(rates(own))


@pytest.mark.slow
def test_a_stored_torchvision_network_keeps_its_image_size(tmp_path):
    """A vision transformer's position embeddings must not be resized to the default size."""
    backbone = load("torchvision/vit_b_32", random_init=True, image_size=64)
    save_file(backbone.model.state_dict(), tmp_path / "model.safetensors")
    again = load_stored(backbone.architecture, backbone.arguments, str(tmp_path / "model.safetensors"))
    assert state_sha256(again.model) == state_sha256(backbone.model)


def test_contradictions_are_usage_errors(tmp_path):
    with pytest.raises(UsageError):
        load(SMALL, random_init=True, weights="x.pth")


def test_weights_for_a_named_architecture(tmp_path):
    source = trained(num_classes=9)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}},
        tmp_path / "x.pth",
    )
    backbone = load(SMALL, weights=str(tmp_path / "x.pth"))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.classifier(backbone.model(images)), source(images))


def test_a_fixed_size_transformer_is_built_for_the_size_asked_for(tmp_path):
    source = trained("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2)
    folder = write_folder(
        tmp_path / "x", source, "vit_tiny_patch16_224",
        model_args={"img_size": 64, "depth": 2},
        pretrained_cfg={"fixed_input_size": True, "input_size": [3, 64, 64], "classifier": "head"},
    )  # fmt: skip
    name = f"local-dir:{folder}"
    assert load(name).preprocess.image_size == (64, 64)
    assert state_sha256(load(name).model) == state_sha256(load(name, image_size=64).model)
    larger = load(name, image_size=96)
    assert larger.model(torch.zeros(1, 3, 96, 96)).shape == (1, 192)
    assert torch.equal(larger.model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    with pytest.raises(BackboneError, match="8 pixels"):
        load("vit_tiny_patch16_224", random_init=True, image_size=8)


def test_overrides_reach_the_transform():
    backbone = load(SMALL, random_init=True, image_size=96, crop_pct=0.9, interpolation="bilinear")
    assert backbone.preprocess.image_size == (96, 96)
    assert (backbone.preprocess.crop_pct, backbone.preprocess.interpolation) == (0.9, "bilinear")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (SMALL, {}),
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": [32, 32], "depth": 2}),
        ("convnext_atto", {}),
        ("vgg11", {"mlp_ratio": 0.02}),
    ],
)
def test_a_linear_classifier_is_found_and_holds_a_head_exactly(name, arguments):
    model = build_classifier(name, arguments, 7)
    found = classifier_name(model)
    classifier = model.get_submodule(found)
    assert classifier.out_features == 7
    assert not model.training


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "squeezenet1_0"])
def test_other_classifiers_are_not_taken_for_one(name):
    if name not in timm.list_models():
        pytest.skip("not in this timm")
    assert classifier_name(build_classifier(name, {}, 7)) is None


@pytest.mark.parametrize(("name", "size"), [(SMALL, None), ("vit_tiny_patch16_224", 32)])
def test_timm_builds_a_run_from_its_config(tmp_path, name, size):
    backbone = load(name, random_init=True, image_size=size, crop_pct=0.9)
    model = build_classifier(backbone.architecture, backbone.arguments, 3)
    linear = model.get_submodule(classifier_name(model))
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    config = timm_config(backbone, 3, ["ant", "bee", "wasp"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    side = backbone.preprocess.image_size[0]
    images = torch.randn(2, 3, side, side)
    assert torch.equal(loaded(images), linear(backbone.model(images)))
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (3, side, side)
    assert data["crop_pct"] == 0.9
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "wasp"]
    again = load(f"local-dir:{tmp_path}")
    assert state_sha256(again.model) == state_sha256(backbone.model)
    assert again.preprocess == backbone.preprocess


def test_torchvision_from_its_own_folder_and_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save(source.state_dict(), tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    backbone = load("torchvision/mobilenet_v3_small", weights=str(tmp_path / "x.pth"))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.classifier[3](backbone.model(images)), source(images))
    assert backbone.preprocess.image_size == (224, 224)
    folder = hub.checkpoints_dir()
    folder.mkdir(parents=True)
    url = torchvision_zoo.default_weights("mobilenet_v3_small").url
    (folder / url.rpartition("/")[2]).write_bytes(data)  # its name claims another content
    with pytest.raises(BackboneError, match="not on this machine"):
        load("torchvision/mobilenet_v3_small")
    name = f"mobilenet_v3_small-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(data)
    assert hub.cached_url(f"https://example.org/{name}") == folder / name


def test_torchvision_weights_are_chosen_by_their_tags(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(hub, "url_file", lambda url, name: fetched.append(url) or tmp_path / "none")
    weights = torchvision.models.ResNet50_Weights
    wanted = {
        "resnet50": weights.IMAGENET1K_V2,
        "resnet50.imagenet1k_v1": weights.IMAGENET1K_V1,
        "resnet50.IMAGENET1K_V2": weights.IMAGENET1K_V2,
        "resnet50.V1": weights.IMAGENET1K_V1,
        "resnet50.v2": weights.IMAGENET1K_V2,
    }
    for name in wanted:
        with pytest.raises(BackboneError):
            load(f"torchvision/{name}")
    assert fetched == [one.url for one in wanted.values()]
    one, other = (load(f"torchvision/resnet50.{tag}", random_init=True) for tag in ("v1", "v2"))
    assert one.architecture == other.architecture == "torchvision/resnet50"
    assert one.preprocess.crop_pct < other.preprocess.crop_pct  # 224 of 256, 224 of 232
    for name in ("resnet50.v3", "resnet50.", "vit_b_16.v1x"):
        with pytest.raises(UsageError, match="has no weights") as caught:
            load(f"torchvision/{name}", random_init=True)
        assert f"torchvision/{name.partition('.')[0]}.imagenet1k_v1" in caught.value.hint
    swag = load("torchvision/vit_b_16.imagenet1k_swag_e2e_v1", random_init=True)
    assert swag.preprocess.image_size == (384, 384)


def test_the_transform_can_be_changed_in_every_part():
    changed = load(
        SMALL, random_init=True,
        image_size="40x64", crop_pct=0.5, crop_mode="squash", interpolation="nearest",
        mean="0.1, 0.2,0.3", std="0.25",
    ).preprocess  # fmt: skip
    assert changed == Preprocess(
        image_size=(40, 64), crop_pct=0.5, crop_mode="squash", interpolation="nearest",
        mean=(0.1, 0.2, 0.3), std=(0.25, 0.25, 0.25),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"mean": "0.5,0.5"}, {"mean": "x"}, {"std": "0,1,1"}, {"std": "nan"}, {"std": "-1"}]
)
def test_means_and_deviations_that_cannot_be_meant_are_refused(options):
    with pytest.raises(UsageError, match=f"--{next(iter(options))} "):
        BackboneOptions(**options)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_small",
        "squeezenet1_1",
        "mnasnet0_5",
        "shufflenet_v2_x0_5",
        "regnet_y_400mf",
        "googlenet",
        "efficientnet_b0",
    ],
)
def test_torchvision_families_give_vectors_and_can_be_cut(name):
    backbone = load(f"torchvision/{name}", random_init=True, image_size=64)
    parts = units(backbone.model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.model(images)
        assert expected.shape == (2, backbone.num_features)
        cut = cut_at(backbone.model, len(parts) // 2, (64, 64))
        assert cut.node != "input"
        assert torch.equal(cut.suffix(cut.prefix(images)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "vgg11",
        "densenet121",
        "inception_v3",
        "swin_t",
        "swin_v2_t",
        "vit_b_16",
        "convnext_tiny",
        "maxvit_t",
    ],
)
def test_large_torchvision_families_give_vectors_and_can_be_cut(name):
    backbone = load(f"torchvision/{name}", random_init=True)
    parts = units(backbone.model)
    size = backbone.preprocess.image_size
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = backbone.model(images)
        cut = cut_at(backbone.model, len(parts) // 2, size)
        assert cut.node != "input"
        assert torch.equal(cut.suffix(cut.prefix(images)), expected)


def test_the_bundled_backbone_needs_nothing_else():
    backbone = load("bundled")
    assert backbone.origin == "bundled"
    assert backbone.license


@pytest.mark.real
def test_the_real_backbone_recognises_photographs(real_assets):
    from PIL import Image

    backbone = load(f"local-dir:{real_assets}/mobilenetv2_100.imagenet")
    whole = timm.create_model(f"local-dir:{real_assets}/mobilenetv2_100.imagenet", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(whole), is_training=False)
    files = sorted((real_assets / "imagenet_sample").glob("*.JPEG"))[:64]
    info = timm.data.ImageNetInfo()
    synsets = [info.index_to_label_name(index) for index in range(1000)]
    with torch.inference_mode():
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        scores = whole.classifier(backbone.model(images))
    hits = [
        synsets[index] == file.name.partition("_")[0]
        for index, file in zip(scores.argmax(1).tolist(), files, strict=True)
    ]
    assert sum(hits) / len(hits) > 0.8
