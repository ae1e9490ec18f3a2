"""What messages about weights say to type is typed here, on the files that lead to it."""

import io
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
import tarfile
from collections import OrderedDict, UserDict
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.bad_inputs.bad_input_cases import rarely
from tlcli.backbones.weights import load_weights
from tlcli.backbones.weights_file import read_checkpoint
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions
from tlcli.errors import BackboneError, UsageError

NAME = "test_resnet"


def network(seed=1, num_classes=3):
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes)


def in_the_tar_format(state):
    """Return a state dict as PyTorch before 0.1.10 wrote it."""
    storages, tensors, listing = io.BytesIO(), io.BytesIO(), OrderedDict()
    pickle.dump(len(state), storages, protocol=2)
    pickle.dump(len(state), tensors, protocol=2)
    for number, (name, tensor) in enumerate(state.items()):
        kind = torch.LongStorage if tensor.dtype == torch.int64 else torch.FloatStorage
        pickle.dump((number, "cpu", kind), storages, protocol=2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.contiguous().numpy().tobytes())
        pickle.dump((number, number, kind), tensors, protocol=2)
        shape, stride = tensor.shape, tensor.contiguous().stride()
        tensors.write(struct.pack(f"<ii{2 * tensor.ndim}qq", tensor.ndim, 0, *shape, *stride, 0))
        listing[name] = number
    pickle.dump([], storages, protocol=2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return str(value.number) if isinstance(value, Place) else None

    objects = io.BytesIO()
    Pickler(objects, protocol=2).dump(OrderedDict((name, Place(number)) for name, number in listing.items()))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        parts = {"sys_info": pickle.dumps({}), "pickle": objects.getvalue(),
                 "storages": storages.getvalue(), "tensors": tensors.getvalue()}  # fmt: skip
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


class Place:
    """Stands for a tensor that another part of the file holds."""

    def __init__(self, number):
        self.number = number


def write(path, kind):
    """Write a file that is refused, of the given kind."""
    model = network()
    state = model.state_dict()
    other = UserDict(lr=0.1)  # a class that is not plain data
    contents = {
        "module": model,
        "module in a row": nn.Sequential(model, nn.Flatten()),
        "model and epoch": {"model": state, "epoch": 3, "config": other},
        "epoch, module and ema": {"epoch": 3, "model": model, "ema": None, "updates": 7, "opt": other},
        "net, acc and epoch": {"net": state, "acc": other, "epoch": 3},
        "bare": {**state, "config": other},
        "deep": {"a": [({"b": state}, other)]},
        "optimizer": {"model": model, "optimizer": torch.optim.Adam(model.parameters())},
    }
    if kind == "TorchScript":
        torch.jit.trace(model.eval(), torch.zeros(1, 3, 32, 32)).save(path)
    elif kind == "tar":
        path.write_bytes(in_the_tar_format(state))
    elif kind == "before zip":
        torch.save(contents["model and epoch"], path, _use_new_zipfile_serialization=False)
    else:
        torch.save(contents[kind], path)


KINDS = (
    "module", "module in a row", "model and epoch", "epoch, module and ema", "net, acc and epoch", "bare",
    "deep", "optimizer", "TorchScript", "tar", "before zip",
)  # fmt: skip


def refused(path, kind):
    """Write a file and return the command that the message about it prints."""
    write(path, kind)
    with pytest.raises(BackboneError, match=r"TorchScript program|run code") as caught:
        read_checkpoint(path)
    assert caught.value.hint.endswith(f"use {str(path) + '.safetensors'!r}.")
    return caught.value.hint.partition("convert it once: ")[2].partition(" (this runs")[0]


def assert_converted(path):
    found = network(seed=2, num_classes=0)
    load_weights(found, f"{path}.safetensors", NAME)
    expected = network().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("kind", ["net, acc and epoch", "tar", *rarely(*(KINDS[:4] + KINDS[5:9]))])
def test_the_command_that_converts_a_file_is_run_on_it(tmp_path, kind):
    path = tmp_path / "my run's weights.pth"
    command = refused(path, kind)
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": places}, capture_output=True)
    assert_converted(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_that_converts_a_file_is_run_on_it(tmp_path, monkeypatch, kind):
    path = tmp_path / "my run's weights.pth"
    python, option, program, argument = shlex.split(refused(path, kind))  # as a shell takes it apart
    assert (python, option, argument) == ("python", "-c", str(path))
    monkeypatch.setattr(sys, "argv", ["-c", argument])
    exec(program, {"__name__": "__main__"})
    assert_converted(path)


# ---- a weights file where a backbone's name is expected ---------------------------------------------------


@pytest.mark.parametrize("name", ["r18.pth", "x/r18.safetensors", "weights.ckpt", "a/b.npz", "m.pth.tar"])
def test_a_name_that_ends_like_a_weights_file(name):
    with pytest.raises(UsageError, match="weights file") as caught:
        load_backbone(BackboneOptions(backbone=name))
    assert f"--backbone ARCH --weights {name}" in caught.value.hint


def test_the_command_line_guesses_the_architecture_of_a_weights_file(tmp_path, run_cli, make_images):
    torch.save({"net": timm.create_model("resnet10t").state_dict()}, tmp_path / "mine.pth")
    images = make_images(tmp_path / "images", {"a": 3, "b": 3})
    result = run_cli("extract", images, "--backbone", tmp_path / "mine.pth", "--image-size", "32")
    assert result.code == 2
    written = f"--backbone resnet10t --weights {tmp_path}/mine.pth"
    assert written in result.stderr
    assert run_cli("extract", images, *written.split(), "--image-size", "32").code == 0
    (tmp_path / "odd").write_text("no weights")
    result = run_cli("backbones", "show", tmp_path / "odd")
    assert result.code == 2
    assert "--backbone ARCH --weights" in result.stderr


def test_the_command_for_a_deeper_network_is_run(tmp_path, run_cli):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "mine.pth")
    small = ("--weights", tmp_path / "mine.pth", "--image-size", "32")
    result = run_cli("backbones", "show", "resnet10t", *small)
    assert result.code == 4
    assert "These look like the weights of resnet18" in result.stderr
    assert f"--backbone resnet18 --weights {tmp_path}/mine.pth" in result.stderr
    assert run_cli("backbones", "show", "resnet18", *small).code == 0


def test_a_key_without_a_file():
    with pytest.raises(UsageError, match="--weights-key"):
        BackboneOptions(backbone="resnet18", weights_key="model")


def test_the_key_that_a_message_prints_is_run_and_kept_by_the_run(tmp_path, run_cli, make_images):
    images = make_images(tmp_path / "images", {"a": 6, "b": 6})
    content = {"two words": {f"m.{key}": value for key, value in network(1).state_dict().items()},
               "teacher": network(2).state_dict()}  # fmt: skip
    torch.save(content, tmp_path / "both.pth")
    words = ("finetune", images, "--backbone", NAME, "--weights", tmp_path / "both.pth", "--image-size", "32")
    result = run_cli(*words)
    assert result.code == 4
    chosen = re.findall(r"--weights-key (?:'[^']*'|\S+)", result.stderr)
    assert chosen == ["--weights-key 'two words.m'", "--weights-key teacher."]
    run = tmp_path / "run"
    done = run_cli(*words, *shlex.split(chosen[0]), "-o", run)
    assert done.code == 0, done.stderr
    assert "licence of the weights" in done.stderr
    again = run_cli("finetune", "--config", run / "config.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.stderr
    found = load_backbone(BackboneOptions(backbone=f"local-dir:{run}")).model.state_dict()
    assert all(
        torch.equal(value, found[key])
        for key, value in network(1).state_dict().items()
        if not key.startswith("fc.")
    )
