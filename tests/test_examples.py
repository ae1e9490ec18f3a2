"""The examples do what their headers say; the benchmarks are only parsed (they need data and minutes)."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
EXPERIMENTS = EXAMPLES / "experiments"

Images = Callable[..., Path]
Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ci(tmp_path: Path) -> Script:
    """Return `ci(*arguments)`, which runs ci.sh with a tlcli that is not on PATH."""
    folder = tmp_path / "environment"
    folder.mkdir()
    python = shlex.quote(sys.executable)
    for name, words in {"tlcli": f"{python} -m tlcli", "python3": python}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "TLCLI": str(folder / "tlcli"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = ["sh", str(EXAMPLES / "ci.sh"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_ci_passes_and_fails_by_the_gate(tmp_path: Path, make_images: Images, ci: Script) -> None:
    data = make_images(tmp_path / "my data", {"ants": 30, "bees": 30})
    good = ci(data, "0.9")
    assert good.returncode == 0, good.stderr
    assert re.fullmatch(
        r"accuracy=\S+ interval=\S+\.\.\S+ images=\d+ skipped=0 gate=0.9 passed=True\n", good.stdout
    )
    documents = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "ci-output").glob("*.json")}
    assert {name: document["schema"] for name, document in documents.items()} == {
        "check": "tlcli.data.check/2",
        "finetune": "tlcli.finetune/1",
        "evaluation": "tlcli.evaluate/1",
    }

    # Labels that say nothing: no classifier reaches 1.0 on both halves of one class.
    mixed = make_images(tmp_path / "mixed", {"a/x": 20, "b/x": 20}, seed=1)
    for number, path in enumerate(sorted(mixed.rglob("*.png"))):
        if number % 2:
            path.rename(mixed / ("b" if path.parts[-3] == "a" else "a") / f"moved{number}.png")
    bad = ci(mixed, "1", tmp_path / "bad")
    assert bad.returncode == 6, bad.stderr
    assert bad.stdout.endswith("gate=1 passed=False\n")
    assert "below --min-accuracy" in bad.stderr
    assert json.loads((tmp_path / "bad" / "evaluation.json").read_text())["gate"]["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 3, "nowhere"),
        ([], 2, "usage:"),
        (["data", "1.5"], 2, "not a number from 0 to 1"),
        (["data", "0.9x"], 2, "not a number from 0 to 1"),
    ],
)
def test_ci_refuses_what_it_cannot_use(ci: Script, arguments: list[str], code: int, message: str) -> None:
    done = ci(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_parses_and_begins_with_its_command() -> None:
    scripts = sorted(EXAMPLES.rglob("*.py"))
    assert scripts
    for path in scripts:
        if path == EXPERIMENTS / "runs.py":
            continue  # what the experiments share; no script
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert f"python {path.relative_to(ROOT)}" in text, path
    head = (EXAMPLES / "ci.sh").read_text(encoding="utf-8").split("set -eu")[0]
    assert "sh examples/ci.sh DATA" in head


def test_every_name_that_an_example_takes_from_tlcli_is_there() -> None:
    missing = []
    for path in sorted(EXAMPLES.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tlcli":
                if "# type: ignore[no-redef" in lines[node.lineno - 1]:
                    continue  # of 0.2.0, which a benchmark is compared with
                module = importlib.import_module(node.module or "")
                for name in (alias.name for alias in node.names if not hasattr(module, alias.name)):
                    try:
                        importlib.import_module(f"{node.module}.{name}")
                    except ImportError:
                        missing.append(f"{path.relative_to(ROOT)}: from {node.module} import {name}")
    assert not missing


def document(run: Path, accuracy: float, curve: list[float]) -> dict[str, Any]:
    """Return what `tlcli finetune --json` prints of a run, as far as the experiments read it."""
    run.mkdir()
    lines = [{"kind": "epoch", "epoch": n + 1, "val_accuracy": value} for n, value in enumerate(curve)]
    lines.insert(0, {"kind": "epoch", "epoch": 0, "val_accuracy": 0.01})  # what training started from
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "run_path": str(run),
        "metrics": {"val": {"top1_accuracy": accuracy, "num_images": 100}},
        "seconds": {"total": 10 * accuracy},
    }


def test_experiments_tell_mean_lowest_and_highest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    runs = importlib.import_module("runs")
    found = [document(tmp_path / str(n), value, [0.1, value]) for n, value in enumerate((0.7, 0.9, 0.8))]
    assert runs.spread(runs.accuracies(found)) == "0.800 (0.700..0.900)"
    assert runs.spread(runs.seconds(found), 1) == "8.0 (7.0..9.0)"
    assert runs.interval(found) == "0.711 to 0.867"  # Wilson's of 80 in 100
    assert runs.epochs(found, "val_accuracy") == [[0.1, 0.7], [0.1, 0.9], [0.1, 0.8]]
    runs.table(["way", "accuracy"], [("a", 1), ("long name", 0.25)])
    assert capsys.readouterr().out.splitlines() == [
        "| way       | accuracy |",
        "|-----------|----------|",
        "| a         | 1        |",
        "| long name | 0.25     |",
    ]


def test_a_training_that_is_done_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    runs = importlib.import_module("runs")
    asked: list[tuple[object, ...]] = []

    class Told(runs.Experiment):  # type: ignore[misc, name-defined]
        def tlcli(self, *words: object) -> str:
            asked.append(words)
            return json.dumps({"number": len(asked)})

    experiment = Told(tmp_path, (0, 1), False)
    first = experiment.finetune("x", ["data", "--freeze", 8])
    assert first == experiment.finetune("x", ["data", "--freeze", 8]) == [{"number": 1}, {"number": 2}]
    assert asked[1] == (
        *("finetune", "data", "--freeze", 8, "--seed", 1, "-o", tmp_path / "runs" / "x-1", "--overwrite"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_cnn_digits", "initialisation"])
def test_an_experiment_runs_and_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    first, again = run(), run()
    assert "$ tlcli finetune" in first.stderr
    assert "$ tlcli finetune" not in again.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("| ")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", sorted(path.stem for path in EXPERIMENTS.glob("*.py")))
def test_an_experiment_on_real_data_runs(tmp_path: Path, real_assets: Path, name: str) -> None:
    script = EXPERIMENTS / f"{name}.py"
    if "--assets" not in (ast.get_docstring(ast.parse(script.read_text())) or ""):
        pytest.skip("it needs no real data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, "--quick", "--assets", real_assets],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| ")


def test_the_list_of_examples_is_complete() -> None:
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    there = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.suffix in {".py", ".sh"}}
    assert listed == there
