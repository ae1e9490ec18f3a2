"""`tlcli finetune` as a user types it."""

import json
import shutil

import pytest

from tests import tiny
from tlcli.machine import paths

TINY = (*tiny.TINY, "--l2", "0.01,1", "--folds", "3")


def test_it_prints_the_score_with_its_interval_and_what_comes_next(run_cli, folder):
    result = run_cli("finetune", folder, *TINY)
    assert result.code == 0
    for part in (
        "val accuracy",
        "95 %",
        "always the most frequent class",
        "cross-validation",
        "runs/images-",
    ):
        assert part in result.stdout
    assert "tlcli evaluate runs/images-test_resnet-feature-extraction" in result.stderr
    assert "reused 0, computed 24" in result.stderr


def test_the_document_is_the_library_s_with_a_schema(run_cli, folder, tmp_path):
    result = run_cli("finetune", folder, *TINY, "-o", tmp_path / "run", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "tlcli.finetune/1"
    assert document["run_path"] == str(tmp_path / "run")


def test_a_dry_run_does_nothing(run_cli, folder, tmp_path):
    result = run_cli("finetune", folder, *TINY, "-o", tmp_path / "run", "--dry-run", "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "tlcli.finetune.plan/1"
    assert document["run_path"] == str(tmp_path / "run")
    assert document["rows_to_compute"] == 24
    assert not (tmp_path / "run").exists()
    assert not paths.home().exists()
    assert "next:" not in result.stderr


def test_the_configuration_of_a_run_repeats_it_from_any_folder(run_cli, folder, tmp_path, monkeypatch):
    options = ("--seed", "5", "--val-fraction", "0.4", "--class-weights", "balanced")
    first = json.loads(run_cli("finetune", folder, *TINY, *options, "-o", tmp_path / "a", "--json").stdout)
    monkeypatch.chdir(tmp_path)
    again = run_cli("finetune", "--config", "a/config.yaml", "-o", "b", "--json")
    second = json.loads(again.stdout)
    assert second["metrics"] == first["metrics"]
    assert second["head"] == first["head"]
    assert (tmp_path / "a/config.yaml").read_text() == (tmp_path / "b/config.yaml").read_text()
    changed = run_cli("finetune", "--config", "a/config.yaml", "--seed", "6", "--l2", "3", "--json")
    assert json.loads(changed.stdout)["head"]["chosen"]["l2"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("--scenario", "feature-extraction", "--freeze", "8"),
        ("--freeze", "none"),
        ("--scenario", "full"),
        ("--head", "mlp:x"),
        ("--weights", "w.pth"),  # contradicts --random-init
        ("--l2", "one"),
        ("--folds", "1"),
        ("--backbone", "no-such-net"),
        ("--image-size", "4"),
    ],
    ids=" ".join,
)
def test_contradictions_and_unknown_names_are_usage_errors(run_cli, folder, arguments):
    result = run_cli("finetune", folder, *TINY, *arguments, "--json")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr
    assert not paths.home().exists()


def test_the_output_directory(run_cli, folder, tmp_path):
    def code(*arguments):
        return run_cli("finetune", folder, *TINY, *arguments).code

    run, mine = tmp_path / "run", tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.jpg").write_text("precious")
    assert code("-o", run) == 0
    assert code("-o", run) == 2
    assert code("-o", run, "--overwrite") == 0
    assert code("-o", mine) == 2
    assert code("-o", mine, "--overwrite") == 2
    assert code("-o", mine / "photo.jpg" / "run") == 2
    assert (mine / "photo.jpg").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["missing", "empty", "one class", "broken csv"])
def test_data_that_cannot_be_used(run_cli, tmp_path, make_images, kind):
    data = tmp_path / "data"
    if kind == "empty":
        data.mkdir()
    elif kind == "one class":
        make_images(data, {"a": 5})
    elif kind == "broken csv":
        data = tmp_path / "labels.csv"
        data.write_text("file,class\nx.png,a\n")
    result = run_cli("finetune", data, *TINY, "--json")
    assert (result.code, result.stdout) == (3, "")
    assert "error:" in result.stderr


def test_a_class_that_loses_everything(run_cli, folder):
    for path in (folder / "b").iterdir():
        path.write_bytes(b"no image " + path.name.encode())
    result = run_cli("finetune", folder, *TINY, "--max-bad", "1", "--json")
    assert (result.code, result.stdout) == (3, "")
    assert "'b'" in result.stderr


def test_csv_data_gives_the_run_of_the_folder(run_cli, folder, tmp_path):
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("filename,label\n" + "\n".join(lines) + "\n")
    a = json.loads(run_cli("finetune", folder, *TINY, "--json").stdout)
    b = json.loads(run_cli("finetune", tmp_path / "labels.csv", *TINY, "--json").stdout)
    assert b["metrics"] == a["metrics"]
    assert b["features"]["rows_computed"] == 0


def test_a_refit_reports_the_cross_validation(run_cli, folder, tmp_path):
    result = run_cli("finetune", folder, *TINY, "--refit", "-o", tmp_path / "run")
    assert result.code == 0
    assert "cross validation accuracy" in result.stdout
    assert "val accuracy" not in result.stdout
    gated = run_cli("evaluate", tmp_path / "run", "--min-accuracy", "0.1", "--json")
    assert (gated.code, gated.stdout) == (2, "")
    assert "trained on val" in gated.stderr
    assert run_cli("evaluate", tmp_path / "run").code == 0


def test_class_names_of_any_kind(run_cli, folder, tmp_path):
    (folder / "a").rename(folder / "[red]a[bold")
    (folder / "b").rename(folder / "b 猫 'x'")
    result = run_cli("finetune", folder, *TINY, "-o", tmp_path / "run")
    assert result.code == 0, result.stderr
    measured = run_cli("evaluate", tmp_path / "run")
    assert measured.code == 0
    assert "[red]a[bold" in measured.stdout
    shown = run_cli("predict", tmp_path / "run", folder, "--format", "csv", "--top", "2")
    assert "b 猫 'x'" in shown.stdout
    shutil.rmtree(tmp_path / "run")


def test_warnings_are_in_the_plan_the_result_the_run_its_card_and_its_report(run_cli, folder, tmp_path):
    first, second = sorted((folder / "a").glob("*.png"))[:2]
    shutil.copy(first, folder / "b" / "copy.png")
    second.write_bytes(b"no image")
    run = tmp_path / "run"
    words = ("finetune", folder, *TINY, "--l2", "0.1", "--max-bad", "0.5", "-o", run, "-q")
    plan = json.loads(run_cli(*words, "--dry-run", "--json").stdout)
    assert [warning["code"] for warning in plan["warnings"]] == ["conflicting_labels"]
    result = run_cli(*words, "--json")
    warnings = json.loads(result.stdout)["warnings"]
    assert [warning["code"] for warning in warnings] == ["conflicting_labels", "images_skipped"]
    messages = [warning["message"] for warning in warnings]
    assert [result.stderr.count(f"warning: {message}\n") for message in messages] == [1, 1]
    assert json.loads((run / "run.json").read_text())["warnings"] == warnings
    assert run_cli("report", run).code == 0
    card, page = ((run / name).read_text() for name in ("README.md", "report.html"))
    for message in messages:
        assert f"- {message}\n" in card
    assert "<h2>Warnings</h2>" in page
    assert "conflicting labels: the same image in more than one class" in page
