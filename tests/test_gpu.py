"""A GPU gives what a CPU gives, within its arithmetic: `pytest -m gpu` where there is one."""

import json
import os
import signal

import pytest
import torch

from tests.tiny import TINY_FP32
from tlcli.training.checkpoints import Checkpoints

pytestmark = pytest.mark.gpu

TINY = (*TINY_FP32, "--json")


@pytest.fixture(autouse=True)
def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


IMAGES = {"a": 24, "b": 24, "c": 24}


def on(device, run_cli, *words):
    done = run_cli(*words, *TINY, "--device", device)
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("freeze", ["all", "2"])
def test_rows_agree(folder, tmp_path, run_cli, freeze):
    from safetensors.torch import load_file

    rows = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.safetensors"
        on(device, run_cli, "extract", folder, "--freeze", freeze, "--cache", "never", "-o", output)
        rows.append(load_file(output)["features"].float().flatten(1))
    cosine = torch.nn.functional.cosine_similarity(*rows)
    assert float(cosine.min()) > 0.9999


@pytest.mark.parametrize("scenario", [("--freeze", "all"), ("--freeze", "3"), ("--freeze", "none")])
def test_a_run_is_measured_again(folder, tmp_path, run_cli, scenario):
    training = () if "all" in scenario else ("--epochs", "2")
    words = (*TINY_FP32[:-1], "bf16", "--json", "--device", "cuda")
    done = run_cli("finetune", folder, *words, *scenario, *training, "-o", tmp_path / "run")
    assert done.code == 0, done.stderr
    before = json.loads(done.stdout)["metrics"]["val"]
    again = json.loads(run_cli("evaluate", tmp_path / "run", "--json").stdout)
    assert again["top1_accuracy"] == before["top1_accuracy"]
    assert again["log_loss"] == pytest.approx(before["log_loss"], rel=1e-4)
    assert "stored" not in again


@pytest.mark.parametrize(
    "options",
    [
        ("--freeze", "all"),
        ("--freeze", "2", "--cache", "always"),
        ("--freeze", "2", "--cache", "never"),
        ("--freeze", "none"),
        ("--freeze", "none", "--amp", "bf16", "--ema", "0.9", "--mixup", "0.2", "--grad-accum", "2"),
        ("--freeze", "none", "--amp", "fp16"),
        ("--scenario", "scratch", "--opt", "sgd"),
    ],
)
def test_trainings_agree(folder, tmp_path, run_cli, options):
    training = () if "all" in options else ("--epochs", "6", "--batch-size", "16")
    found = [
        on(device, run_cli, "finetune", folder, *training, *options, "-o", tmp_path / device)
        for device in (("cuda",) if "fp16" in options else ("cpu", "cuda"))
    ]
    losses = [document["metrics"]["val"]["log_loss"] for document in found]
    assert losses[-1] == pytest.approx(losses[0], rel=0.15, abs=0.05)
    measured = on_any(run_cli, "evaluate", tmp_path / "cuda", "--device", "cpu", "--json")
    assert measured["log_loss"] == pytest.approx(losses[-1], rel=0.05, abs=0.02)


def on_any(run_cli, *words):
    done = run_cli(*words)
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(folder, tmp_path, run_cli, monkeypatch):
    words = ("finetune", folder, "--freeze", "none", "--epochs", "4", "--batch-size", "16")
    whole = on("cuda", run_cli, *words, "-o", tmp_path / "whole")
    save, saved = Checkpoints.save, []

    def stopping(self, step, *rest):
        save(self, step, *rest)
        saved.append(step)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    words = (*words, *TINY, "--device", "cuda", "-o", tmp_path / "again", "--checkpoint-minutes", "0")
    monkeypatch.setattr(Checkpoints, "save", stopping)
    assert run_cli(*words).code == 143
    assert 7 <= saved[-1] < whole["training"]["steps"]
    monkeypatch.setattr(Checkpoints, "save", save)
    done = run_cli(*words, "--resume")
    assert done.code == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["training"]["steps"] == whole["training"]["steps"]
    losses = [document["metrics"]["val"]["log_loss"] for document in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)
