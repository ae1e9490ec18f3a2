"""`tlcli demo` on the command line: the whole path once, on a few digits, and its messages."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from sklearn.utils import Bunch

from tlcli.commands import demo as library

Run = Callable[..., Any]
NAMES = ["images", "recommend", "extract", "finetune", "evaluate", "predict", "report", "raw pixels"]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scikit-learn have 200 digits, so that the whole demo takes seconds."""
    loaded = sklearn.datasets.load_digits()
    kept = np.r_[0:160, library.NUM_TRAIN : library.NUM_TRAIN + 40]
    few = Bunch(**{name: loaded[name][kept] for name in ("images", "data", "target")})
    few.target_names = loaded.target_names
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    monkeypatch.setattr(library, "NUM_TRAIN", 160)
    shown = tuple(f"{name.split('/')[0]}/{160 + number:04d}.png" for number, name in enumerate(library.SHOWN))
    monkeypatch.setattr(library, "SHOWN", shown)


def test_the_whole_demo_and_its_commands_by_hand(tmp_path: Path, run_cli: Run, few_digits: None) -> None:
    folder = tmp_path / "my demo"
    done = run_cli("demo", "-o", folder, "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "tlcli.demo/1"
    assert document["num_images"] == {"train": 160, "val": 40}
    assert document["features"]["rows_computed"] == 200
    assert document["metrics"]["val"]["num_images"] == document["raw_pixels"]["num_images"] == 40
    assert document["metrics"]["val"]["top1_accuracy"] > 0.6
    assert Path(document["report_path"]).stat().st_size > 10_000
    assert len(document["predictions"]) == 4
    assert list(document["seconds"]) == [name.replace(" ", "_") for name in NAMES] + ["total"]
    for number, name in enumerate(NAMES, start=1):
        assert f"{number}/{len(NAMES)} {name}." in done.stderr

    for line in document["commands"]:
        _, *arguments = shlex.split(line)
        assert f"$ {line}" in done.stderr
        assert run_cli(*arguments).code == 0, line

    refused = run_cli("demo", "-o", folder)
    assert (refused.code, refused.stdout) == (2, "")
    assert "--overwrite" in refused.stderr
    again = run_cli("demo", "-o", folder, "--overwrite", "--quiet")
    assert again.code == 0
    assert "raw pixels" in again.stdout
    assert str(folder / "run" / "report.html") in again.stdout
    assert again.stderr == ""


def test_dry_run_shows_the_commands_and_writes_nothing(tmp_path: Path, run_cli: Run) -> None:
    done = run_cli("demo", "-o", tmp_path / "demo", "--dry-run", "--json")
    assert done.code == 0
    document = json.loads(done.stdout)
    assert document["schema"] == "tlcli.demo.plan/1"
    assert [step["name"] for step in document["steps"]] == NAMES
    assert not (tmp_path / "demo").exists()


def test_tlcli_off_the_path_is_called_by_its_file(
    tmp_path: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = tmp_path / "env" / "bin"
    binaries.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(binaries / "python"))
    monkeypatch.chdir(tmp_path)
    shown = run_cli("demo", "--dry-run").stderr
    assert f"$ {binaries / 'python'} -m tlcli report demo/run" in shown
    (binaries / "tlcli").touch()
    assert "$ env/bin/tlcli report demo/run" in run_cli("demo", "--dry-run").stderr
