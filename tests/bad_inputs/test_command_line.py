"""Items 119 to 130 of the bad inputs: resuming, options and their values, output folders, odd paths."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.bad_input_cases import rarely
from tests.tiny import TINY_FP32
from tlcli.machine import paths

ROOT = Path(__file__).parent.parent.parent
TINY = (*TINY_FP32, "-j", "1")
HEAD = (*TINY, "--l2", "0.01,1", "--folds", "2")


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "images", {"a": 8, "b": 8})


@pytest.fixture
def run(unfinished, tmp_path):
    """A copy of the unfinished run, to be continued."""
    return shutil.copytree(unfinished.run, tmp_path / "run")


def content_of(folder):
    """Return what every file below a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run_cli, *words, code=2, expected=()):
    """Check that a command ends with a code and message; return the message as one line."""
    result = run_cli(*words, "--json")
    assert (result.code, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    message = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", result.stderr))
    for text in expected:
        assert text in message, message
    return message


def finished(run):
    return json.loads((run / "run.json").read_text())["status"] == "done"


# ---- 119 and 120: resuming something else --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_119_resume_with_another_world_size(unfinished, run, run_cli, tmp_path, count):
    # The order of samples is a function of (seed, epoch) alone, so that the same ones make up each batch
    # whatever the number of processes; sums are rounded otherwise, and results equal in part only.
    facts = json.loads((run / "run.json").read_text())
    launch = [sys.executable, "-m"]
    if count > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    words = [*launch, "tlcli", *unfinished.words, "-o", str(run), "--resume", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    document = json.loads(done.stdout)
    assert document["training"]["steps"] == 2 * (facts["data"]["num_images"]["train"] // 8)
    assert finished(run)
    assert ((run / "model.safetensors").read_bytes() == unfinished.expected) == (count == 1)
    assert run_cli("evaluate", run, "--json").code == 0


def test_120_resume_with_other_options(unfinished, run, run_cli):
    # There is no way to force it: what differs would make a run that no configuration repeats.
    before = content_of(run)
    for changed, said in {
        ("--batch-size", "4"): "--batch-size was 8, now 4",
        ("--seed", "4"): "--seed was 3, now 4",
        ("--lr", "0.1", "--opt", "sgd"): "--opt was adamw, now sgd",
        ("--freeze", "2"): "--freeze was 3, now 2",
        ("--split-seed", "1"): "--split-seed was 0, now 1",
        ("--image-size", "64"): "--image-size was 32, now 64",
        ("--dtype", "bf16"): "--dtype was fp32, now bf16",
    }.items():
        message = refused(run_cli, *unfinished.words, *changed, "-o", run, "--resume", expected=[said])
        assert "--overwrite" in message
        assert f"--config {run / 'config.yaml'}" in message  # the command that does continue it
    assert content_of(run) == before
    resumed = run_cli("finetune", "--config", run / "config.yaml", "-o", run, "--resume", "--json")
    assert resumed.code == 0, resumed.stderr
    assert (run / "model.safetensors").read_bytes() == unfinished.expected


@pytest.mark.parametrize(
    "change", ["image added", "image edited", "class renamed", *rarely("image gone", "class added")]
)
def test_120_resume_with_other_data(unfinished, run, run_cli, tmp_path, change):
    images = shutil.copytree(unfinished.images, tmp_path / "images")
    words = ("finetune", images, *unfinished.words[2:], "-o", run, "--resume")
    first = sorted((images / "a").iterdir())[0]
    if change == "image added":
        (images / "a" / "more.png").write_bytes(make_png(9))
    elif change == "image gone":
        first.unlink()
    elif change == "image edited":
        first.write_bytes(make_png(10))
    elif change == "class renamed":
        (images / "a").rename(images / "d")
    else:
        (images / "d").mkdir()
        for number in range(3):
            (images / "d" / f"{number}.png").write_bytes(make_png(number))
    before = content_of(run)
    message = refused(run_cli, *words, expected=["The data is not what run", "--overwrite"])
    if "renamed" not in change and "edited" not in change:
        assert "train" in message  # the counts before and after
    if "class" in change:
        assert "'d'" in message
    assert content_of(run) == before


def make_png(seed):
    import io
    import random

    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(seed).randbytes(32 * 32 * 3)).save(file, "PNG")
    return file.getvalue()


def test_120_resume_with_data_that_moved(unfinished, run, run_cli, tmp_path):
    moved = shutil.copytree(unfinished.images, tmp_path / "elsewhere")
    resumed = run_cli("finetune", moved, *unfinished.words[2:], "-o", run, "--resume", "--json")
    assert resumed.code == 0, resumed.stderr
    assert (run / "model.safetensors").read_bytes() == unfinished.expected


# ---- 121 and 122: names that do not exist --------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("finetune", "DATA", "--epoch", "3"), "--epochs"),
        (("finetune", "DATA", "--learning-rate", "3"), "--decay-rate"),
        (("extract", "DATA", "--bakbone", "bundled"), "--backbone"),
        (("predict", "RUN", "x.png", "--fromat", "csv"), "--format"),
        (("cache", "prune", "--older", "3d"), "--older-than"),
        (("finetun", "DATA"), "finetune"),
        (("cache", "lst"), "list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_121_unknown_option_or_command(run_cli, words, meant):
    message = refused(run_cli, *words)
    assert "No such" in message
    assert meant in message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet81", "resnet18"),
        ("resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("ResNet50", "resnet50"),
        ("alexnet", "torchvision/alexnet"),
        ("torchvision/resnet81", "resnet18"),
        ("classic/lenet", "lenet5"),
        ("timm/resnet18", "bare name"),
        ("some/folder", "local-dir:some/folder"),
        ("hf-hub:resnet18", "hf-hub:ORG/NAME"),
        ("bundeld", "bundled"),
    ],
)
def test_122_typo_in_a_model_name(run_cli, images, name, meant):
    message = refused(run_cli, "extract", images, "--backbone", name, expected=[meant])
    assert name.rpartition("/")[2].partition(".")[0].lower() in message.lower()
    assert not paths.home().exists()


# ---- 123 and 124: values out of range ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--batch-size", "0", "from 1 to 1000000"),
        ("--batch-size", "-1", "from 1 to 1000000"),
        ("--batch-size", "1.5", "integer"),
        ("--lr", "nan", "1e-08 to 10"),
        ("--lr", "inf", "1e-08 to 10"),
        ("--lr", "1e400", "1e-08 to 10"),
        ("--lr", "-0.1", "1e-08 to 10"),
        ("--lr", "0.1,,0.2", "1e-08 to 10"),
        ("--val-fraction", "1.5", "from 0.01 to 0.9"),
        ("--val-fraction", "nan", "from 0.01 to 0.9"),
        ("--max-bad", "nan", "from 0.0 to 1.0"),
        ("--max-bad", "-inf", "from 0.0 to 1.0"),
        ("--l1", "inf", "from 0.0 to"),
        ("--l2", "nan", "from 0"),
        ("--l2", "inf", "from 0"),
        ("--weight-decay", "nan", "from 0.0 to"),
        ("--clip-grad", "inf", "from 0.0 to"),
        ("--label-smoothing", "nan", "from 0.0 to 0.9"),
        ("--warmup-epochs", "inf", "from 0.0 to"),
        ("--checkpoint-minutes", "nan", "from 0.0 to"),
        ("--dropout", "1", "0 to 0.95"),
        ("--head", "mlp:0", "mlp:512"),
        ("--head", "mlp:1e3", "mlp:512"),
        ("--freeze", "99", "5"),
        ("--freeze", "-2", "none"),
        ("--image-size", "0", "from 8 to 4096"),
        ("--workers", "0", "from 1 to 256"),
        ("--folds", "1", "from 2 to 20"),
        ("--epochs", "0", "from 1 to 100000"),
        ("--seed", "-1", "from 0 to"),
        ("--views", "0", "from 1 to 1000"),
        ("--drop-path", "1.5", "from 0.0 to 0.9"),
    ],
)
def test_123_values_out_of_range(run_cli, images, option, value, allowed):
    scenario = () if option == "--freeze" else ("--scenario", "freeze")
    words = ("finetune", images, *TINY, *scenario, option, value)
    message = refused(run_cli, *words, expected=[allowed, option])
    assert value.partition(",")[0] in message or value == "1.5"
    assert not paths.home().exists()
    assert not Path("runs").exists()


def test_123_values_out_of_range_in_a_file_and_a_variable(run_cli, images, tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    for text, said in {
        "val-fraction: .nan": "from 0.01 to 0.9",
        "val-fraction: .inf": "0.9",
        "val-fraction: 1.5": "0.9",
        "split-seed: 99999999999999999999": "from 0 to",
        "split-seed: 1e400": "split-seed",
        "split-seed: -1": "from 0 to",
        "label-column: ''": "--label-column is empty",
    }.items():
        file.write_text(text)
        refused(run_cli, "data", "split", images, "--config", file, expected=[said])
    for value, said in {"0": "0", "many": "TLCLI_WORKERS", "1e9": "TLCLI_WORKERS"}.items():
        monkeypatch.setenv("TLCLI_WORKERS", value)
        refused(run_cli, "data", "split", images, expected=["workers", said])


@pytest.mark.parametrize("option", ["--seed", *rarely("--split-seed", "--view-seed", "--limit-per-class")])
def test_124_huge_integers(run_cli, images, option):
    words = ("finetune", images, *TINY, "--scenario", "freeze", "--epochs", "1", "--augment", "light",
             "--cache", "never", "--head-init", "random", "-b", "4")  # fmt: skip
    for value in (2**63, 10**30, 10**400):
        refused(run_cli, *words, option, value, expected=[option, "9223372036854775807"])
    largest = run_cli(*words, option, 2**63 - 1, "--json")
    assert largest.code == 0, largest.stderr
    if option == "--seed":  # also where folds and an MLP head are drawn
        assert run_cli("finetune", images, *HEAD, option, 2**63 - 1, "--json").code == 0
        grid = ("--head", "mlp:4", "--lr", "0.01", "--dropout", "0", "--epochs", "1", "--folds", "2")
        assert run_cli("finetune", images, *TINY, *grid, option, 2**63 - 1, "--json").code == 0


# ---- 125 to 128: output folders ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finished", "partial"])
def test_125_output_exists(run_cli, unfinished, trained, images, tmp_path, kind):
    run = shutil.copytree(trained.run if kind == "finished" else unfinished.run, tmp_path / "run")
    before = content_of(run)
    expected = [f"Output {str(run)!r} is a run already", "-o", "--overwrite", "--resume"]
    refused(run_cli, "finetune", images, *HEAD, "-o", run, expected=expected)
    both = ("--overwrite", "--resume")
    refused(run_cli, "finetune", images, *HEAD, "-o", run, *both, expected=["contradict"])
    if kind == "finished":
        words = ("finetune", trained.images, *HEAD, "-o", run, "--resume")
        refused(run_cli, *words, expected=["other options", "--folds was 5, now 2", "--overwrite"])
    assert content_of(run) == before


def test_126_runs_are_never_mixed(run_cli, unfinished, images, tmp_path):
    run = shutil.copytree(unfinished.run, tmp_path / "run")
    (run / "report.html").write_text("of the earlier run")
    result = run_cli("finetune", images, *HEAD, "-o", run, "--overwrite", "--json")
    assert result.code == 0, result.stderr
    assert finished(run)
    assert not (run / "report.html").exists()
    assert not (run / "checkpoints").exists()
    assert json.loads((run / "run.json").read_text())["class_names"] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir() if "run" in path.name] == ["run"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.jpg").write_text("precious")
    for option in ("--overwrite", "--resume"):
        refused(run_cli, "finetune", images, *HEAD, "-o", mine, option, expected=["is no run"])
    assert (mine / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize("there", ["no checkpoint yet", *rarely("no folder", "empty folder")])
def test_127_resume_without_a_checkpoint(run_cli, unfinished, tmp_path, there):
    # Other than the list has it, this begins the run: a script whose job may be stopped at any moment, also
    # before the first checkpoint, then needs one command line only. It is said that nothing was continued.
    run = tmp_path / "run"
    if there == "empty folder":
        run.mkdir()
    elif there == "no checkpoint yet":
        shutil.copytree(unfinished.run, run)
        shutil.rmtree(run / "checkpoints")
    result = run_cli(*unfinished.words, "-o", run, "--resume", "--json")
    assert result.code == 0, result.stderr
    assert "resumed at step" not in result.stderr
    assert (run / "model.safetensors").read_bytes() == unfinished.expected
    refused(run_cli, *unfinished.words, "--resume", expected=["--resume needs -o"])


def test_128_all_checkpoints_corrupt(run_cli, unfinished, run):
    older, newer = sorted((run / "checkpoints").iterdir())
    (newer / "state.safetensors").write_bytes((newer / "state.safetensors").read_bytes()[:-1])
    (older / "complete.json").write_text("{")
    before = content_of(run / "checkpoints")
    words = (*unfinished.words, "-o", run, "--resume")
    message = refused(
        run_cli, *words, code=4, expected=["None of the checkpoints", f"Remove {run / 'checkpoints'}"]
    )
    assert f"{newer.name}: its state.safetensors ends after" in message
    assert f"{older.name}: its complete.json is not a list of files" in message
    assert content_of(run / "checkpoints") == before
    shutil.rmtree(run / "checkpoints")  # as it says
    assert run_cli(*words, "--json").code == 0
    assert (run / "model.safetensors").read_bytes() == unfinished.expected


# ---- 129 and 130: odd paths ----------------------------------------------------------------------------


ALL_AT_ONCE = "-a $HOME ~ b;c'd\"e [red]猫[/] *?"
ONE_EACH = ("with spaces", "-leading", "--", "$HOME", "a;b'c\"d", "naïve 猫", "[red]x[/red]", "*", "a~")


@pytest.mark.parametrize("name", [ALL_AT_ONCE, *rarely(*ONE_EACH)])
def test_129_odd_paths(run_cli, make_images, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / name, {"a": 8, "b": 8})
    run = f"{name}-run"
    result = run_cli("finetune", *HEAD, f"--output={run}", "--json", "--", name)
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["run_path"] == run
    assert run_cli("evaluate", "--json", "--", run).code == 0
    shown = run_cli("predict", "--format", "jsonl", "--", run, name)
    assert len(shown.stdout.splitlines()) == 16
    again = run_cli("finetune", "--config", Path(run) / "config.yaml", f"--output={run}-2", "--json")
    assert again.code == 0, again.stderr
    if name.startswith("-") and name != "--":
        refused(run_cli, "finetune", name, *HEAD, expected=["No such option"])
    assert run_cli("data", "split", f"--output={name}.csv", "--json", "--", name).code == 0
    assert (tmp_path / f"{name}.csv").exists()


def test_129_home_folders_and_variables(run_cli, make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_images(tmp_path / "images", {"a": 8, "b": 8})
    assert run_cli("data", "check", "~/images", "--json").code == 0
    file = tmp_path / "c.yaml"
    file.write_text("data: ~/images\n")  # where no shell sees it
    assert run_cli("data", "split", "--config", file, "--json").code == 0
    refused(run_cli, "data", "check", "$HOME/images", code=3, expected=["$HOME/images"])  # a shell's affair
    for words in (
        ("extract", "~nobody-9/images", *TINY),
        ("evaluate", "~nobody-9/run"),
        ("extract", "~/images", "--backbone", "local-dir:~nobody-9/x"),
        ("finetune", "~/images", *TINY[:2], "--weights", "~nobody-9/x.pth"),
    ):
        message = refused(run_cli, *words, code=3 if words[0] == "extract" and "~nobody" in words[1] else 2)
        assert "~" in message


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", ""),
        ("finetune", "DATA", "-o", ""),
        ("finetune", "DATA", "--weights", ""),
        ("finetune", "DATA", "--config", ""),
        ("evaluate", "RUN", ""),
        ("predict", "RUN", ""),
        *rarely(
            ("finetune", "DATA", "--backbone", ""),
            ("finetune", "DATA", "--device", ""),
            ("finetune", "DATA", "--lr", ""),
            ("extract", "DATA", "--output", ""),
            ("evaluate", ""),
            ("report", ""),
            ("cache", "show", ""),
            ("cache", "prune", "--max-size", ""),
            ("backbones", "show", ""),
        ),
    ],
    ids=" ".join,
)
def test_130_empty_strings(run_cli, images, trained, words):
    # An unset variable of a script: taken for "not given" it would train with other weights than were meant.
    words = [{"DATA": images, "RUN": trained.run}.get(word, word) for word in words]
    if words[0] == "finetune" and "--backbone" not in words:
        words += ["--backbone", "bundled", "--dry-run"]
    refused(run_cli, *words, expected=["is empty"])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("extract", "LONG"), 3),
        (("evaluate", "LONG"), 3),
        (("extract", "DATA", "-o", "LONG.csv"), 2),
        (("extract", "DATA", "--weights", "LONG"), 4),
        (("extract", "DATA", "--backbone", "local-dir:LONG"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_130_names_that_are_too_long(run_cli, images, words, code):
    backbone = (
        () if words[0] == "evaluate" or "--backbone" in words else TINY[: 2 if "--weights" in words else 7]
    )
    words = [images if word == "DATA" else word.replace("LONG", "x" * 300) for word in words]
    message = refused(run_cli, *words, *backbone, code=code)
    assert "xxx" in message
    assert not paths.home().exists()
