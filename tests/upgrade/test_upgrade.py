"""Files and documents of earlier releases still work; make_fixtures.py wrote them with their own code."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.upgrade.upgrade_commands import COMMANDS

HERE = Path(__file__).parent
RELEASES = sorted(path.name for path in HERE.glob("v[0-9]*"))
ROOT_NAME = "@ROOT@"
RUNS = ("feature-extraction", "timm", "freeze", "full", "scratch")
# What depends on the machine, the clock or the version; of these only presence and type are compared.
VOLATILE = {
    *(
        "seconds",
        "created",
        "tlcli_version",
        "versions",
        "reason",
        "norm_reason",
        "predicted_seconds",
        "free_bytes",
        "licenses",
    ),
    *(
        "last_used",
        "report_path",
        "num_bytes",
        "sha256",
        "digest",
        "total",
        "backbones",
        "commands",
        "command",
    ),
    *("plan", "features_seconds", "environments", "cached"),
    "method",  # of an interval: that of macro F1 is another one since
}
# Intervals of a method that held less often than it said.
REPLACED = frozenset({"macro_f1_interval"})
# What heads trained anew on few images are worth: 0.2.0's stopped short of the penalty that they named.
RETRAINED = REPLACED | {"cv", "log_loss", "expected_calibration_error"}


@pytest.fixture(params=RELEASES)
def release(request, tmp_path, monkeypatch):
    """Return a copy of a release's files as the working folder, with TLCLI_HOME in it."""
    folder = tmp_path / "fixture"
    shutil.copytree(HERE / request.param, folder)
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".yaml", ".md", ".csv", ".jsonl"}:
            text = path.read_text(encoding="utf-8")
            if ROOT_NAME in text:
                path.write_text(text.replace(ROOT_NAME, str(folder)), encoding="utf-8")
    used_in_order(folder)
    monkeypatch.setenv("TLCLI_HOME", str(folder / "home"))
    monkeypatch.setenv("TLCLI_OFFLINE", "1")
    monkeypatch.chdir(folder)
    return folder


def used_in_order(folder: Path) -> None:
    """Give cache entries the times of use that the release saw: a clone's files have those of the clone."""
    used = {entry["key"]: number for number, entry in enumerate(document(folder, "cache-list")["entries"])}
    now = time.time()
    for path in (folder / "home").rglob("*"):
        for part in set(path.parts) & used.keys():
            os.utime(path, (now - used[part], now - used[part]))


def document(folder: Path, name: str) -> dict:
    """Return the JSON document that the release printed."""
    return json.loads((folder / "json" / f"{name}.json").read_text(encoding="utf-8"))


def now(run_cli, *arguments: object) -> dict:
    """Return the JSON document that this version prints."""
    done = run_cli(*arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def pinned(run_cli, name: str) -> dict:
    """Return the document of one of the pinned command lines."""
    return now(run_cli, *(word.format(runs="again") for word in COMMANDS[name]))


def missing(
    old: object, new: object, where: str = "", *, values: bool = True, replaced: frozenset[str] = REPLACED
) -> list[str]:
    """Return what of an old document a new one lacks or says otherwise; more fields are fine.

    Without `values` only the presence and the types of fields are compared; what was null may be something.
    """
    if isinstance(old, dict):
        if not isinstance(new, dict):
            return [f"{where}: was an object, now {new!r}"]
        found = [f"{where}.{key} is gone" for key in old.keys() - new.keys()]
        for key in old.keys() & new.keys():
            plain = not isinstance(old[key], dict | list)
            if key in replaced:
                found += missing(old[key], new[key], f"{where}.{key}", values=False)
            elif key in VOLATILE or key.endswith(("_seconds", "_path")) or (plain and not values):
                if kind(old[key]) != kind(new[key]) and (values or old[key] is not None):
                    found.append(f"{where}.{key}: was {old[key]!r}, now {new[key]!r}")
            else:
                found += missing(old[key], new[key], f"{where}.{key}", values=values, replaced=replaced)
        return found
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{where}: had {len(old)} entries, now {len(new)}"]
        found = []
        for number, pair in enumerate(zip(old, new, strict=True)):
            found += missing(*pair, f"{where}[{number}]", values=values, replaced=replaced)
        return found
    if not values:
        same = kind(old) == kind(new)
    elif isinstance(old, float) and isinstance(new, float):
        same = math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-3)
    else:
        same = old == new
    return [] if same else [f"{where}: was {old!r}, now {new!r}"]


def kind(value: object) -> str:
    """Return a value's JSON type."""
    return {bool: "boolean", int: "number", float: "number"}.get(type(value), type(value).__name__)


def test_there_are_fixtures() -> None:
    assert "v0_2_0" in RELEASES
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("name", ["extract-pooled", "extract-cut", "extract-views"])
def test_cached_rows_are_reused(release, run_cli, name):
    found = pinned(run_cli, name)["features"]
    assert found["rows_computed"] == 0
    assert found["rows_reused"] == document(release, name)["features"]["rows_reused"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_runs_evaluate_to_the_same_figures(release, run_cli, name):
    old = document(release, f"evaluate-{name}")
    assert missing(old, pinned(run_cli, f"evaluate-{name}")) == []
    images = now(run_cli, "evaluate", f"runs/{name}", "images/val", "-j", "2")
    assert images["top1_accuracy"] == old["top1_accuracy"]


@pytest.mark.parametrize("name", ["feature-extraction", "freeze"])
def test_unknown_fields_of_a_newer_version_are_tolerated(release, run_cli, name):
    unknown = {"of_a_newer_version": [1, {"a": None}]}
    path = release / "runs" / name / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8")) | unknown
    for field in ("backbone", "data", "head", "device", "dtype", "recipe", "training"):
        if field in facts:  # objects of named fields; others map names to values
            facts[field] |= unknown
    facts["metrics"]["val"] |= unknown
    path.write_text(json.dumps(facts), encoding="utf-8")
    assert missing(document(release, f"evaluate-{name}"), pinned(run_cli, f"evaluate-{name}")) == []
    now(run_cli, "report", f"runs/{name}")


@pytest.mark.parametrize("name", ["feature-extraction", "freeze", "full"])
def test_a_stored_configuration_repeats_the_run(release, run_cli, name):
    config = release / "runs" / name / "config.yaml"
    found = now(run_cli, "finetune", "--config", config, "-o", f"again/{name}")
    old = document(release, f"finetune-{name}")
    assert found["features"]["rows_computed"] == 0
    # The recipe of a short training follows its steps since, so its figures are others.
    values = "training" not in old
    assert missing(old | {"run_path": found["run_path"]}, found, values=values, replaced=RETRAINED) == []


# Fields whose meaning changed since: the schema's number says so.
CHANGED = {
    name: {"schema": f"tlcli.{name.replace('-', '.')}/2", "warnings": []}
    for name in ("data-check", "data-split")
}
OTHERS = sorted(name for name in COMMANDS if not name.startswith(("extract", "evaluate")))


@pytest.mark.parametrize("name", OTHERS)
def test_the_documents_of_every_command_keep_their_fields(release, run_cli, name):
    # The demo's figures are those of the bundled backbone, which a release may train anew.
    old = document(release, name) | CHANGED.get(name, {})
    others = {"demo", "finetune-freeze", "finetune-full"}  # their recipe follows the steps since
    assert missing(old, pinned(run_cli, name), values=name not in others, replaced=RETRAINED) == []


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ({"a": 1, "b": [{"c": 0.5}], "more": 1}, []),
        ({"b": [{"c": 0.5}]}, [".a is gone"]),
        ({"a": 2, "b": [{"c": 0.5}]}, [".a: was 1, now 2"]),
        ({"a": 1, "b": [{"c": None}]}, [".b[0].c: was 0.5, now None"]),
        ({"a": 1, "b": []}, [".b: had 1 entries, now 0"]),
    ],
)
def test_a_lost_field_is_found(new, expected):
    assert missing({"a": 1, "b": [{"c": 0.5}]}, new) == expected
