"""Planning, computing and exporting the features of a data set; killed and run again."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.tiny import tiny
from tlcli.cache.store import Store
from tlcli.commands.extract import extract, plan_extract
from tlcli.config.commands import ExtractConfig
from tlcli.errors import CheckFailed, DataError, ResourceError, StorageError, UsageError
from tlcli.features.export import export
from tlcli.features.plan import TRIAL_ROWS, compute_features, read_rows
from tlcli.machine import paths
from tlcli.progress import Silent

IMAGES = {"a": 10, "b": 10}


def config(folder, **options):
    return tiny(ExtractConfig, folder, **options)


def run(folder, **options):
    chosen = config(folder, **options)
    plan = plan_extract(chosen, Silent())
    return plan, extract(chosen, plan, Silent())


# ---- the plan --------------------------------------------------------------------------------------------


def test_the_plan_counts_what_is_to_do_and_touches_nothing(folder):
    before = sorted(folder.rglob("*"))
    plan = plan_extract(config(folder), Silent())
    assert (plan.rows_to_compute, plan.rows_to_reuse) == (20, 0)
    assert plan.new_bytes == 20 * plan.store.extractor.row_bytes
    document = plan.document()
    assert document["rows_to_compute"] == 20
    assert sum(document["num_images"].values()) == 20
    assert document["num_classes"] == 2
    assert len(document["cache_key"]) == 64
    assert not paths.home().exists()
    assert sorted(folder.rglob("*")) == before
    assert "20 to compute" in plan.summary()["features"]
    json.dumps(document, allow_nan=False)


def test_the_plan_after_the_work_reuses_everything(folder):
    run(folder)
    plan = plan_extract(config(folder), Silent())
    assert (plan.rows_to_compute, plan.rows_to_reuse, plan.new_bytes, plan.predicted_seconds) == (0, 20, 0, 0)


def test_a_large_plan_is_predicted_by_a_trial(tmp_path, make_images):
    folder = make_images(tmp_path / "many", {"a": TRIAL_ROWS, "b": 2})
    assert plan_extract(config(folder, cache="never"), Silent()).predicted_seconds > 0
    assert not paths.home().exists()


def test_the_cache_key_does_not_depend_on_the_data_but_on_the_backbone(folder, tmp_path, make_images):
    other = make_images(tmp_path / "other", {"x": 2, "y": 2})
    key = plan_extract(config(folder), Silent()).document()["cache_key"]
    assert plan_extract(config(other, workers=1), Silent()).document()["cache_key"] == key
    assert plan_extract(config(folder, freeze="2"), Silent()).document()["cache_key"] != key
    assert plan_extract(config(folder, cache="never"), Silent()).document()["cache_key"] is None


@pytest.mark.parametrize("name", ["there.npz", "nofolder/features.npz", "folder.npz"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, name):
    (tmp_path / "there.npz").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    overwrite = name != "there.npz"
    with pytest.raises(UsageError, match="Output"):
        plan_extract(config(folder, output=str(tmp_path / name), overwrite=overwrite), Silent())
    assert (tmp_path / "there.npz").read_text() == "mine"


def test_too_little_space_is_told_in_the_plan(folder, monkeypatch):
    monkeypatch.setattr("tlcli.cache.store.MIN_FREE_BYTES", 1 << 60)
    monkeypatch.setattr(Store.__init__, "__kwdefaults__", {"min_free_bytes": 1 << 60, "max_bytes": None})
    with pytest.raises(StorageError, match="reserve"):
        plan_extract(config(folder), Silent())


# ---- views -----------------------------------------------------------------------------------------------


def views_config(folder, views, **options):
    return config(folder, freeze="2", views=views, augment="light", **options)


def test_training_images_have_all_views_and_the_others_one(folder):
    plan = plan_extract(views_config(folder, 3), Silent())
    num_train, num_val, _ = plan.document()["num_images"].values()
    assert num_val > 0
    expected = 3 * num_train + num_val
    assert (plan.rows_to_compute, plan.rows_to_reuse) == (expected, 0)
    assert plan.new_bytes == expected * plan.store.extractor.row_bytes
    assert plan.document()["num_views"] == 3
    assert plan.document()["views_cache_key"] != plan.document()["cache_key"]
    assert plan.summary()["views"].startswith("3 of each training image (light: crop")
    found = extract(views_config(folder, 3), plan, Silent())
    assert (found.rows_reused, found.rows_computed) == (0, expected)
    more = plan_extract(views_config(folder, 5), Silent())
    assert (more.rows_to_compute, more.rows_to_reuse) == (2 * num_train, expected)
    assert plan_extract(config(folder, freeze="2"), Silent()).rows_to_compute == 0


def test_one_view_needs_no_augmentation(folder):
    plan = plan_extract(config(folder, augment="none"), Silent())
    assert (plan.num_views, plan.store.views_entry) == (1, None)
    assert "views" not in plan.summary()
    with pytest.raises(UsageError, match="--augment none"):
        plan_extract(config(folder, augment="none", views=2), Silent())


def test_an_export_is_of_view_0_whatever_was_cached(folder, tmp_path):
    run(folder, freeze="2", output=str(tmp_path / "plain.npz"))
    chosen = views_config(folder, 3, output=str(tmp_path / "views.npz"))
    extract(chosen, plan_extract(chosen, Silent()), Silent())
    with np.load(tmp_path / "plain.npz") as plain, np.load(tmp_path / "views.npz") as views:
        assert all(np.array_equal(plain[name], views[name]) for name in plain)


def test_rows_of_views_that_vanish_are_computed_again(folder):
    plan = plan_extract(views_config(folder, 3), Silent())
    compute_features(plan, Silent())
    train = plan.collection.select([i for i, split in enumerate(plan.collection.splits) if split == "train"])
    views = [place % 3 for place in range(len(train.samples))]
    expected = read_rows(plan, train, views)
    shutil.rmtree(plan.store.views_entry.shards_dir)
    plan.store.views_entry.rows()
    assert torch.equal(read_rows(plan, train, views), expected)
    assert len(plan.store.views_entry.rows()) == sum(view > 0 for view in views)


def test_rows_kept_in_memory_must_fit(folder, monkeypatch):
    monkeypatch.setattr("tlcli.machine.memory.available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="--cache never"):
        plan_extract(views_config(folder, 3, cache="never"), Silent())


# ---- counts ----------------------------------------------------------------------------------------------


def test_counts_for_people_and_machines(folder):
    _, found = run(folder)
    document = found.document()
    assert (document["rows_reused"], document["rows_computed"], document["images_skipped"]) == (0, 20, 0)
    assert found.summary().startswith("reused 0, computed 20 at ")
    _, again = run(folder)
    assert again.summary() == "reused 20, computed 0, skipped 0"


def test_an_odd_format_is_named(tmp_path, make_images, caplog):
    folder = make_images(tmp_path / "images", {"a": 21, "b": 21})
    (folder / "a/000.png").rename(folder / "a/imageNotFound.gif")
    run(folder)
    assert "imageNotFound.gif" in caplog.text


# ---- bad images ------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    path.write_bytes(b"no image: " + str(path).encode())


def test_bad_images_are_listed_and_counted(folder, tmp_path, caplog):
    spoil(folder / "a/003.png")
    (folder / "b/004.png").write_bytes(b"")
    output = tmp_path / "features.npz"
    _, found = run(folder, max_bad=0.1, output=str(output))
    assert len(found.bad_images) == 2
    with (tmp_path / "bad_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {"a/003.png", "b/004.png"}
    assert all(row["reason"] for row in rows)
    exported = np.load(output)
    assert len(exported["features"]) == 18
    assert not {"a/003.png", "b/004.png"} & set(exported["files"])
    assert "2 of 20 images" in caplog.text


def test_more_bad_images_than_allowed_end_the_run(folder):
    spoil(folder / "a/003.png")
    with pytest.raises(DataError, match="cannot be used") as caught:
        run(folder)  # 5 % are more than the default 1 %
    assert "--max-bad" in caught.value.hint
    assert "a/003.png" in caught.value.message
    run(folder, max_bad=0.05)


def test_a_class_that_loses_everything_ends_the_run(folder):
    for path in (folder / "b").iterdir():
        spoil(path)
    with pytest.raises(DataError, match="'b'"):
        run(folder, max_bad=1.0)


# ---- verify ----------------------------------------------------------------------------------------------


def test_verify_finds_a_row_that_its_checksum_agrees_with(folder):
    plan, _ = run(folder)
    run(folder, cache="verify")
    entry = Store(paths.features_dir()).entry(plan.store.extractor.spec)
    keys = sorted(entry.rows())
    rows, _ = entry.read(keys)
    shutil.rmtree(entry.shards_dir)
    with Store(paths.features_dir()).entry(plan.store.extractor.spec).writer({}) as writer:
        for place, key in enumerate(keys):  # every row is the next image's
            writer.add(key, rows[(place + 1) % len(rows)])
    with pytest.raises(CheckFailed, match="20 of 20 stored rows") as caught:
        run(folder, cache="verify")
    assert caught.value.document["features"]["rows_computed"] == 20
    assert len(caught.value.document["differing"]) == 20
    assert caught.value.document["largest_difference"] > 0.02


# ---- exports ---------------------------------------------------------------------------------------------


def read(path: Path):
    """Return features, labels, files, splits and class names of an export."""
    if path.suffix == ".npz":
        found = np.load(path)
        return (found["features"], found["labels"].tolist(), found["files"].tolist(),
                found["splits"].tolist(), found["class_names"].tolist())  # fmt: skip
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            return (file.get_tensor("features"), file.get_tensor("labels").tolist(), about["files"],
                    about["splits"], about["class_names"])  # fmt: skip
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["file", "label", "split"]
    names = sorted({row[1] for row in rows})
    features = np.array([[float(value) for value in row[3:]] for row in rows], np.float32)
    labels = [names.index(row[1]) for row in rows]
    return features, labels, [row[0] for row in rows], [row[2] for row in rows], names


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".csv"])
def test_exports_carry_rows_names_labels_and_splits_in_order(folder, tmp_path, suffix):
    (folder / "a/000.png").rename(folder / "a/we,ird\n[red]\udcff.png")
    output = tmp_path / f"features{suffix}"
    plan, _ = run(folder, output=str(output))
    features, labels, files, splits, class_names = read(output)
    collection = plan.collection
    expected, missing = plan.store.read([found.sha256 for found in collection.fingerprints])
    assert not missing
    assert files == [sample.name for sample in collection.samples]
    assert files == sorted(files)
    assert labels == [sample.label for sample in collection.samples]
    assert splits == collection.splits
    assert class_names == ["a", "b"]
    assert features.dtype == np.float32
    assert np.array_equal(features, expected.numpy())  # 9 digits are enough for float32, also in CSV
    assert oct(output.stat().st_mode & 0o777) == oct(0o666 & ~umask())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_export_of_maps_keeps_their_shape(folder, tmp_path):
    plan, _ = run(folder, output=str(tmp_path / "maps.safetensors"), freeze="2")
    with safe_open(tmp_path / "maps.safetensors", "pt") as file:
        features = file.get_tensor("features")
    assert features.dtype == torch.bfloat16
    assert features.shape == (20, *plan.store.extractor.cut.row_shape)


def test_an_export_without_a_cache_is_the_same(folder, tmp_path):
    run(folder, output=str(tmp_path / "one.npz"))
    run(folder, output=str(tmp_path / "two.npz"), cache="never")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["features"], two["features"])


def test_rows_that_vanish_before_the_export_are_computed_again(folder, tmp_path):
    chosen = config(folder, output=str(tmp_path / "features.npz"))
    plan = plan_extract(chosen, Silent())
    outcome = compute_features(plan, Silent())
    export(plan, outcome, tmp_path / "before.npz")
    shutil.rmtree(paths.features_dir() / "v1")
    plan.store.entry.rows()
    export(plan, outcome, tmp_path / "after.npz")
    with np.load(tmp_path / "before.npz") as before, np.load(tmp_path / "after.npz") as after:
        assert np.array_equal(before["features"], after["features"])


def test_rows_that_vanish_with_their_images_are_an_error(folder, tmp_path):
    plan = plan_extract(config(folder), Silent())
    outcome = compute_features(plan, Silent())
    shutil.rmtree(paths.features_dir() / "v1")
    plan.store.entry.rows()
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match="changes"):
        export(plan, outcome, tmp_path / "features.npz")
    assert not (tmp_path / "features.npz").exists()


# ---- kill -9 ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tlcli.cache.entry import Entry
from tlcli.cache.writer import Writer
from tlcli.cli.app import main

make, flush = Entry.writer, Writer.flush
Entry.writer = lambda self, env, **more: make(self, env, **more, flush_bytes=7 * self.row_format.row_bytes)

def flush_twice_then_die(self):
    if len(self.published) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(self)

Writer.flush = flush_twice_then_die
main(sys.argv[1:])
"""


def test_kill_9_and_run_again_gives_the_rows_of_an_undisturbed_run(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / "images", {"a": 20, "b": 20})
    arguments = ["extract", folder, "--backbone", "test_resnet", "--random-init", "--image-size", "32"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, "--dtype", "fp32", "-j", "2"], env=environment, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    plan, found = run(folder)
    assert (found.rows_reused, found.rows_computed) == (14, 26)  # both published shards, and the rest
    keys = [item.sha256 for item in plan.collection.fingerprints]
    resumed, missing = plan.store.read(keys)
    assert not missing
    monkeypatch.setenv("TLCLI_HOME", str(tmp_path / "undisturbed"))
    plan, found = run(folder)
    assert found.rows_computed == 40
    assert torch.equal(plan.store.read(keys)[0], resumed)
