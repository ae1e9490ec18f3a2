"""Weights files that are damaged, hostile or for another network."""

import io
import json
import math
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tlcli.backbones.weights import MATCH_RATE, load_weights, match
from tlcli.backbones.weights_file import read_state_dict
from tlcli.errors import BackboneError

NAME = "mobilenetv3_small_050"


def network(seed=0, num_classes=0):
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes)


def same(one, other):
    return all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("num_classes", [0, 7])
def test_loads_what_was_saved_and_ignores_the_classifier(tmp_path, suffix, num_classes):
    source, path = network(1, num_classes), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    target = network(2)
    load_weights(target, path, NAME)
    source.reset_classifier(0)
    assert same(target, source)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.backbone."]
)
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("checkpoint_of_a_trainer", "ema")])
def test_prefixes_are_stripped_and_nesting_is_unwrapped(tmp_path, prefix, nest, caplog):
    source = network(1)
    content = {prefix + key: value for key, value in source.state_dict().items()}
    if nest == ("checkpoint_of_a_trainer", "ema"):
        content = {
            "epoch": 3,
            "optimizer": {"lr": 0.1},
            "state_dict": network(5).state_dict(),
            "state_dict_ema": content,
        }
    elif nest:
        content = {"epoch": 3, nest[0]: content}
    torch.save(content, tmp_path / "weights.pth")
    target = network(2)
    with caplog.at_level("INFO", logger="tlcli"):
        load_weights(target, tmp_path / "weights.pth", NAME)
    assert same(target, source)
    assert prefix in caplog.text


def test_the_arguments_of_a_timm_training_checkpoint_are_plain_data(tmp_path):
    import argparse

    torch.save(
        {"state_dict": network(1).state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth.tar"
    )
    assert match(read_state_dict(tmp_path / "x.pth.tar"), network()).rate == 1.0


def test_the_format_before_zip_is_read(tmp_path):
    torch.save(network(1).state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert match(read_state_dict(tmp_path / "old.pth"), network()).rate == 1.0


class Canary:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw", "raw renamed", "tar"])
def test_code_in_a_pickle_is_refused_with_the_way_to_convert_and_never_run(tmp_path, kind):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    content = {"state_dict": network().state_dict(), "extra": Canary(canary)}
    if kind in {"zip", "legacy"}:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "tar":
        data = pickle.dumps(content["extra"])
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        path = path.with_suffix(".safetensors") if kind == "raw renamed" else path
        path.write_bytes(pickle.dumps(content["extra"]))
    with pytest.raises(BackboneError) as caught:
        read_state_dict(path)
    assert not canary.exists()
    assert caught.value.hint
    if kind != "raw" and kind != "raw renamed":
        assert "convert" in caught.value.hint


def test_a_deflated_zip_is_refused_before_it_is_inflated(tmp_path):
    plain, packed = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(1 << 18)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(BackboneError, match="compressed"):
        read_state_dict(packed)


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    content = network().state_dict()
    key = next(iter(content))
    torch.save({**content, key: torch.zeros(1).expand(content[key].shape)}, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match="few are stored"):
        load_weights(network(), tmp_path / "x.pth", NAME)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 3, 9, 600, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(network().state_dict(), path)
    else:
        torch.save(network().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(BackboneError, match=r"weights"):
        read_state_dict(path)


def test_a_huge_safetensors_header_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{" + b" " * 100)
    with pytest.raises(BackboneError, match="header"):
        read_state_dict(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BackboneError, match="safetensors"):
        read_state_dict(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    source = network()
    source.conv_stem.weight.data[0, 0, 0, 0] = bad
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BackboneError, match=r"conv_stem\.weight.*1 values"):
        load_weights(network(), tmp_path / "x.safetensors", NAME)


class Bounded(torch.nn.Module):
    """Clips its input to bounds that begin infinite, as timm's gemma4_vit does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("low", torch.tensor([-math.inf, 0.0]))


def test_values_that_an_architecture_begins_with_may_be_infinite(tmp_path):
    source = Bounded()
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    load_weights(Bounded(), tmp_path / "x.safetensors", "bounded")
    for wrong in ([math.inf, 0.0], [math.nan, 0.0], [-math.inf, math.inf]):
        source.low = torch.tensor(wrong)
        save_file(source.state_dict(), tmp_path / "x.safetensors")
        with pytest.raises(BackboneError, match="'low'"):
            load_weights(Bounded(), tmp_path / "x.safetensors", "bounded")


@pytest.mark.parametrize("kind", ["sparse", "int8", "quantised", "meta"])
def test_tensors_that_are_not_plain_are_refused(tmp_path, kind):
    content = dict(network().state_dict())
    weight = content["conv_stem.weight"]
    content["conv_stem.weight"] = {
        "sparse": lambda: weight.to_sparse(),
        "int8": lambda: weight.to(torch.int8),
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta": lambda: weight.to("meta"),
    }[kind]()
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(BackboneError) as caught:
        load_weights(network(), tmp_path / "x.pth", NAME)
    assert caught.value.hint


def test_weights_of_another_network_are_refused_with_counts_and_examples(tmp_path):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BackboneError, match=r"fit only 0% .* of \d+ .*conv_stem\.weight.*conv1") as caught:
        load_weights(network(), tmp_path / "x.safetensors", NAME)
    assert "architecture" in caught.value.hint


def test_wrong_shapes_are_named(tmp_path):
    save_file(timm.create_model("mobilenetv3_small_100").state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BackboneError, match=r"another shape.*\[\d+.*in the file.*in the network"):
        load_weights(network(), tmp_path / "x.safetensors", NAME)


@pytest.mark.parametrize(("missing", "accepted"), [(1, True), (30, False)])
def test_a_few_tensors_may_be_missing_and_are_named(tmp_path, missing, accepted, caplog):
    content = network(1).state_dict()
    small = sorted((key for key in content if "tracked" not in key), key=lambda key: content[key].numel())[
        :missing
    ]
    for key in small:
        del content[key]
    save_file(content, tmp_path / "x.safetensors")
    if accepted:
        load_weights(network(), tmp_path / "x.safetensors", NAME)
        assert small[0] in caplog.text
    else:
        with pytest.raises(BackboneError, match=f"{MATCH_RATE:.0%}"):
            load_weights(network(), tmp_path / "x.safetensors", NAME)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.zeros(3), "text", {"state_dict": {"a": 1}}])
def test_no_state_dict_inside(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(BackboneError, match="no state dict"):
        read_state_dict(tmp_path / "x.pth")


def test_what_is_no_file_is_named(tmp_path):
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, words in {
        tmp_path / "absent": "cannot be read",
        tmp_path: "folder",
        pointer: "git-lfs",
        fifo: "not a regular file",
        tmp_path / "page.pth": "neither",
    }.items():
        with pytest.raises(BackboneError, match=words):
            read_state_dict(path)


def test_half_precision_becomes_float32(tmp_path):
    save_file(
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in network(1).state_dict().items()
        },
        tmp_path / "x.safetensors",
    )
    target = network(2)
    load_weights(target, tmp_path / "x.safetensors", NAME)
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    assert torch.allclose(target.conv_stem.weight, network(1).conv_stem.weight, atol=1e-3)


# ---- what training loops store beside the tensors ----------------------------------------------------------


@pytest.mark.parametrize("code", [*np.typecodes["AllInteger"], *np.typecodes["Float"], "?"])
def test_a_number_of_numpy_is_plain_data(tmp_path, code):
    path, number = tmp_path / "weights.pth", np.dtype(code).type(1)
    torch.save({"state_dict": {"weight": torch.ones(2)}, "best_accuracy": number}, path)
    assert set(read_state_dict(path)) == {"weight"}


def test_a_number_as_numpy_1_names_it(tmp_path):
    # A protocol-2 pickle names numpy's function by text, so that the name of numpy 1 can be put in its place.
    torch.save({"weight": torch.ones(2), "best": np.float64(1)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for record in new.infolist():
            old.writestr(record.filename, new.read(record).replace(b"numpy._core.", b"numpy.core."))
    assert set(read_state_dict(tmp_path / "old.pth")) == {"weight"}


def test_objects_inside_numpy_numbers_are_refused(tmp_path):
    hidden = np.array([print], dtype=object)
    torch.save({"weight": torch.ones(2), "best": hidden}, tmp_path / "weights.pth")
    with pytest.raises(BackboneError, match="could run code"):
        read_state_dict(tmp_path / "weights.pth")


def test_a_program_of_torchscript_is_named_as_one(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(BackboneError, match="TorchScript program"):
        read_state_dict(tmp_path / "program.pt")
