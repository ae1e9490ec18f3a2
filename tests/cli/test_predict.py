"""`tlcli predict` as a user types it."""

import csv
import io
import json
import os
import shutil
import sys

import pytest


@pytest.fixture
def photos(trained, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("000", "001", "002"):
        shutil.copy(trained.images / f"a/{name}.png", folder / f"{name}.png")
    return folder


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_table_for_people(run_cli, trained, photos):
    result = run_cli("predict", trained.run, photos, "--top", "2")
    assert result.code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["file", "predicted", "probability", "predicted_2", "probability_2", "error"]
    assert len(lines) == 4


def test_the_formats_agree(run_cli, trained, photos):
    document = json.loads(run_cli("predict", trained.run, photos, "--top", "3", "--json").stdout)
    assert document["schema"] == "tlcli.predict/1"
    assert (document["num_images"], document["num_bad"]) == (3, 0)
    lines = run_cli("predict", trained.run, photos, "--top", "3", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == document["predictions"]
    table = rows(run_cli("predict", trained.run, photos, "--top", "3", "--format", "csv").stdout)
    for row, item in zip(table, document["predictions"], strict=True):
        assert row["file"] == item["file"]
        for suffix, found in zip(("", "_2", "_3"), item["predictions"], strict=True):
            assert row[f"predicted{suffix}"] == found["class_name"]
            assert float(row[f"probability{suffix}"]) == pytest.approx(found["probability"], abs=1e-4)


@pytest.mark.parametrize("kind", ["table", "csv", "jsonl"])
def test_one_bad_image_is_reported_and_the_rest_predicted(run_cli, trained, photos, kind):
    (photos / "000.png").write_bytes(b"no image")
    result = run_cli("predict", trained.run, photos, "--format", kind)
    assert result.code == 0
    assert "000.png" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == (3 if kind == "jsonl" else 4)
    if kind == "jsonl":
        found = [json.loads(line) for line in lines]
        assert ["error" in item for item in found] == [True, False, False]
    if kind == "csv":
        assert [bool(row["error"]) for row in rows(result.stdout)] == [True, False, False]


@pytest.mark.parametrize("kind", ["table", "csv", "jsonl"])
def test_an_error_leaves_stdout_empty(run_cli, trained, photos, tmp_path, kind):
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    for run, images in ((trained.run, photos), (tmp_path / "none", photos), (trained.run, tmp_path / "none")):
        result = run_cli("predict", run, images, "--format", kind)
        assert (result.code, result.stdout) == (3, "")
        assert "error:" in result.stderr
    assert run_cli("predict", trained.run, "--format", kind).code == 2


def test_paths_on_standard_input(run_cli, trained, photos, monkeypatch):
    (photos / "002.png").rename(photos / "\udcff[red].png")
    lines = b"".join(os.fsencode(path) + b"\n" for path in sorted(photos.iterdir()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    result = run_cli("predict", trained.run, "-", "--format", "jsonl")
    assert result.code == 0, result.stderr
    files = [json.loads(line)["file"] for line in result.stdout.splitlines()]
    assert files == [str(path) for path in sorted(photos.iterdir())]


@pytest.mark.parametrize("kind", ["table", "csv", "jsonl"])
def test_names_of_any_bytes(run_cli, trained, photos, kind):
    names = ["new\nline.png", "[red]x[bold.png", "\udcff.png"]
    for old, new in zip(sorted(photos.iterdir()), names, strict=True):
        old.rename(photos / new)
    result = run_cli("predict", trained.run, photos, "--format", kind)
    assert result.code == 0, result.stderr
    if kind == "jsonl":
        found = {json.loads(line)["file"] for line in result.stdout.splitlines()}
        assert found == {str(photos / name) for name in names}
    elif kind == "csv":
        found = {row["file"] for row in rows(result.stdout)}
        assert {str(photos / names[0]), str(photos / names[1])} < found
    else:
        assert len(result.stdout.splitlines()) == 4
        assert "[red]x[bold.png" in result.stdout


@pytest.mark.parametrize("arguments", [("--top", "0"), ("--format", "xml"), ("--device", "gpu")])
def test_wrong_options(run_cli, trained, photos, arguments):
    result = run_cli("predict", trained.run, photos, *arguments)
    assert (result.code, result.stdout) == (2, "")
