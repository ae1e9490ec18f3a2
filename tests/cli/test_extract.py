"""`tlcli extract` as a user types it."""

import json
import os
import shlex
import shutil
import signal

import numpy as np
import pytest

from tests.tiny import TINY_FP32 as TINY
from tlcli.cache.store import Store
from tlcli.cache.writer import Writer
from tlcli.machine import paths
from tlcli.machine.interrupts import SIGNALS


@pytest.fixture
def folder(tmp_path, make_images):
    return make_images(tmp_path / "my images", {"a": 12, "b": 12})


def test_it_says_what_it_will_do_and_what_it_did(run_cli, folder):
    result = run_cli("extract", folder, *TINY)
    assert result.code == 0
    assert result.stdout.startswith("reused 0, computed 24")
    for part in ("24 to compute", "test_resnet", "fp32", "2 classes"):
        assert part in result.stderr
    assert run_cli("extract", folder, *TINY, "-q").stdout == "reused 24, computed 0, skipped 0\n"
    assert run_cli("extract", folder, *TINY, "-q").stderr == ""


def test_the_next_command_finds_the_rows(run_cli, folder):
    result = run_cli("extract", folder, *TINY, "--val-fraction", "0.3")
    (hint,) = (line for line in result.stderr.splitlines() if line.startswith("next: "))
    line = shlex.split(hint.removeprefix("next: tlcli "))
    found = json.loads(run_cli(*line, "--l2", "0.1", "--json").stdout)
    assert found["features"]["rows_reused"] == 24
    assert found["features"]["rows_computed"] == 0


def test_views_are_planned_filled_and_found_by_the_next_command(run_cli, folder):
    options = (*TINY, "--freeze", "2", "--views", "3", "--augment", "light", "--view-seed", "5")
    result = run_cli("extract", folder, *options)
    assert result.code == 0, result.stderr
    assert "3 of each training image" in result.stderr
    (hint,) = (line for line in result.stderr.splitlines() if line.startswith("next: "))
    for part in ("--freeze 2", "--views 3", "--augment light", "--view-seed 5"):
        assert part in hint
    document = json.loads(run_cli("extract", folder, *options, "--json").stdout)
    assert document["features"]["rows_computed"] == 0
    train = document["num_images"]["train"]
    assert document["features"]["rows_reused"] == 24 + 2 * train
    assert run_cli("extract", folder, *options, "--cache", "verify").code == 0
    other = json.loads(run_cli("extract", folder, *options, "--view-seed", "6", "--json").stdout)
    assert other["features"]["rows_computed"] == 2 * train


def test_views_without_augmentation_are_a_contradiction(run_cli, folder):
    result = run_cli("extract", folder, *TINY, "--views", "3", "--augment", "none")
    assert (result.code, result.stdout) == (2, "")
    assert "--augment" in result.stderr


def test_only_the_first_process_prints(run_cli, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = run_cli("extract", folder, *TINY, "--dry-run", "--json")
    assert (result.code, result.stdout, result.stderr) == (0, "", "")


def test_the_document(run_cli, folder, tmp_path):
    (folder / "a/000.png").write_bytes(b"no image")
    output = tmp_path / "f.npz"
    result = run_cli("extract", folder, *TINY, "--max-bad", "0.1", "-o", output, "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert document["features"]["rows_computed"] == 23
    assert document["features"]["images_skipped"] == 1
    assert [image["file"] for image in document["bad_images"]] == ["a/000.png"]
    assert document["output"] == str(output)
    assert (tmp_path / "bad_images.csv").exists()
    assert "cannot be used" in result.stderr


def test_a_dry_run_does_nothing(run_cli, folder, tmp_path):
    result = run_cli("extract", folder, *TINY, "--dry-run", "-o", tmp_path / "f.npz", "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["rows_to_compute"] == 24
    assert not paths.home().exists()
    assert not (tmp_path / "f.npz").exists()


def test_the_plan_says_how_much_of_the_frozen_work_is_cached(run_cli, folder):
    network = ("--backbone", "hrnet_w18_small", "--random-init", "--image-size", "64", "--dry-run")
    result = run_cli("extract", folder, *network, "--freeze", "4", "--json")
    assert 0.4 < json.loads(result.stdout)["saved_share"] < 0.5
    assert "after unit 1, of 4 frozen units: 45% of the frozen work" in " ".join(result.stderr.split())
    for k in ("1", "all"):
        result = run_cli("extract", folder, *network, "--freeze", k, "--json")
        assert json.loads(result.stdout)["saved_share"] == 1
        assert "frozen work" not in result.stderr


def test_an_existing_output_is_kept(run_cli, folder, tmp_path):
    (tmp_path / "f.npz").write_text("mine")
    result = run_cli("extract", folder, *TINY, "-o", tmp_path / "f.npz")
    assert (result.code, result.stdout) == (2, "")
    assert "--overwrite" in result.stderr
    assert run_cli("extract", folder, *TINY, "-o", tmp_path / "f.npz", "--overwrite").code == 0
    assert len(np.load(tmp_path / "f.npz")["files"]) == 24


@pytest.mark.parametrize("freeze", ["99", "x", "-1"])
def test_units_that_do_not_exist(run_cli, folder, freeze):
    result = run_cli("extract", folder, *TINY, "--freeze", freeze)
    assert (result.code, result.stdout) == (2, "")
    if freeze == "99":
        assert "5" in result.stderr  # how many units there are


def test_verify_prints_its_document_also_when_it_fails(run_cli, folder):
    run_cli("extract", folder, *TINY)
    assert run_cli("extract", folder, *TINY, "--cache", "verify").code == 0
    (summary,) = Store(paths.features_dir()).entries()
    entry = Store(paths.features_dir()).find(summary.key, repair=True)
    keys = sorted(entry.rows())
    rows, _ = entry.read(keys)
    shutil.rmtree(entry.shards_dir)
    rows[3] *= -1
    with Store(paths.features_dir()).find(summary.key, repair=True).writer({}) as writer:
        for key, row in zip(keys, rows, strict=True):
            writer.add(key, row)
    assert run_cli("cache", "verify", "--deep").code == 0  # every checksum agrees
    result = run_cli("extract", folder, *TINY, "--cache", "verify", "--json")
    assert result.code == 6
    document = json.loads(result.stdout)
    assert document["schema"].startswith("tlcli.extract")
    assert len(document["differing"]) == 1
    assert "1 of 24 stored rows" in result.stderr


def test_too_many_bad_images(run_cli, folder):
    for path in list((folder / "a").iterdir())[:3]:
        path.write_bytes(b"no image " + path.name.encode())
    result = run_cli("extract", folder, *TINY, "--json")
    assert (result.code, result.stdout) == (3, "")
    assert "--max-bad" in result.stderr


def test_file_names_of_any_bytes(run_cli, tmp_path, make_images):
    folder = make_images(tmp_path / "images", {"a": 4, "b": 4})
    names = ["new\nline.png", "[red]markup[bold.png", "\udcff.png", "\x1b[31m.png"]
    for number, name in enumerate(names):
        (folder / f"a/00{number}.png").rename(folder / "a" / name)
        if number % 2:
            (folder / "a" / name).write_bytes(b"no image " + name.encode("utf-8", "surrogateescape"))
    result = run_cli("extract", folder, *TINY, "--max-bad", "0.5")
    assert result.code == 0, result.stderr
    refused = run_cli("extract", folder, *TINY, "--max-bad", "0.1")
    assert refused.code == 3
    assert "[red]markup[bold.png" in refused.stderr
    assert "\x1b" not in refused.stderr
    document = json.loads(run_cli("extract", folder, *TINY, "--max-bad", "0.5", "--json").stdout)
    assert {image["file"] for image in document["bad_images"]} == {f"a/{name}" for name in names[1::2]}


@pytest.mark.parametrize(("number", "code"), [(number, 128 + number) for number in SIGNALS])
def test_an_interruption_keeps_the_finished_rows(run_cli, folder, monkeypatch, number, code):
    handlers = {key: signal.getsignal(key) for key in SIGNALS}
    real, calls = Writer.add, []

    def add(self, key, row, name=None):
        real(self, key, row, name)
        calls.append(key)
        if len(calls) == 9:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Writer, "add", add)
    try:
        result = run_cli("extract", folder, *TINY)
    finally:
        for key, handler in handlers.items():
            signal.signal(key, handler)
    monkeypatch.setattr(Writer, "add", real)
    assert (result.code, result.stdout) == (code, "")
    assert "Interrupted" in result.stderr
    again = json.loads(run_cli("extract", folder, *TINY, "--json").stdout)["features"]
    assert again["rows_reused"] >= 9
    assert again["rows_reused"] + again["rows_computed"] == 24
