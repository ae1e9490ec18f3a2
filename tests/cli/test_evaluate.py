"""`tlcli evaluate` as a user types it, and as a script gates on it."""

import json
import shutil

import pytest

from tlcli.machine import paths


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.run, tmp_path / "run")


def test_tables_for_people(run_cli, run):
    result = run_cli("evaluate", run)
    assert result.code == 0
    for part in ("top-1 accuracy", "95 %", "always the most frequent class", "macro F1", "log loss",
                 "expected calibration error", "precision", r"true \ predicted",
                 "worst mistakes"):  # fmt: skip
        assert part in result.stdout
    assert "reused 0, computed" in result.stderr


def test_a_tuned_network_is_not_called_frozen(run_cli, make_tuned):
    result = run_cli("evaluate", make_tuned())
    assert result.code == 0
    assert "test_resnet, as trained in scenario freeze" in result.stderr
    assert "units frozen" not in result.stderr


def test_the_document(run_cli, trained, run):
    document = json.loads(run_cli("evaluate", run, "--json").stdout)
    assert document["schema"] == "tlcli.evaluate/1"
    assert document["run_path"] == str(run)
    assert document["data"] == str(trained.images)
    assert document["gate"] is None
    for name in ("top1_accuracy", "interval", "top5_accuracy", "macro_f1", "per_class", "confusion_matrix",
                 "log_loss", "expected_calibration_error", "majority_baseline", "worst_mistakes",
                 "split"):  # fmt: skip
        assert name in document


@pytest.mark.parametrize(("gate", "code"), [("0", 0), ("1", 6)])
def test_the_gate_fails_with_the_document_still_printed(run_cli, run, gate, code):
    result = run_cli("evaluate", run, "--min-accuracy", gate, "--json")
    assert result.code == code
    document = json.loads(result.stdout)
    assert document["gate"] == {"min_accuracy": float(gate), "passed": code == 0}
    assert ("is below --min-accuracy 1" in result.stderr) == (code == 6)
    people = run_cli("evaluate", run, "--min-accuracy", gate)
    assert people.code == code
    assert "top-1 accuracy" in people.stdout


def test_the_gate_is_passed_by_the_exact_value(run_cli, run):
    found = json.loads(run_cli("evaluate", run, "--json").stdout)["top1_accuracy"]
    assert run_cli("evaluate", run, "--min-accuracy", repr(found)).code == 0
    assert run_cli("evaluate", run, "--min-accuracy", repr(found + 1e-6)).code == 6


def test_a_dry_run_does_nothing(run_cli, run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = run_cli("evaluate", run, "--dry-run", "--min-accuracy", "1", "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["schema"] == "tlcli.evaluate.plan/1"
    assert not paths.home().exists()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_splits_and_other_data(run_cli, run, tmp_path, make_images):
    for split in ("train", "test"):
        make_images(tmp_path / "tree" / split, {"a": 3, "b": 3, "c": 3}, seed=len(split))
    result = run_cli("evaluate", run, tmp_path / "tree", "--split", "test", "--json")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["split"], document["num_images"]) == ("test", 9)
    assert document["data"] == str(tmp_path / "tree")
    missing = run_cli("evaluate", run, "--split", "test", "--json")
    assert (missing.code, missing.stdout) == (3, "")
    unknown = make_images(tmp_path / "other", {"a": 2, "zebra": 2})
    refused = run_cli("evaluate", run, unknown, "--json")
    assert (refused.code, refused.stdout) == (3, "")
    assert "zebra" in refused.stderr


def test_data_that_is_gone(run_cli, run, tmp_path):
    facts = json.loads((run / "run.json").read_text())
    facts["data"]["path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(facts))
    result = run_cli("evaluate", run, "--json")
    assert (result.code, result.stdout) == (3, "")
    assert "gone" in result.stderr
    assert "DATA" in result.stderr


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", "config.json"])
def test_a_damaged_run(run_cli, run, name):
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for command in (("evaluate", run), ("predict", run, run)):
        result = run_cli(*command, "--json")
        assert result.code in {3, 4}, result.stderr
        assert result.stdout == ""
        assert "error:" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("gate", ["1.5", "-0.1", "high"])
def test_a_gate_that_is_no_share(run_cli, run, gate):
    assert run_cli("evaluate", run, "--min-accuracy", gate).code == 2
