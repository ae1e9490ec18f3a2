"""Rows of other library versions are used when a sample of them is what this one computes, else none."""

import json
import logging
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.features.filling import fill
from tlcli.backbones.zoo import load_backbone
from tlcli.cache.store import Store
from tlcli.config.backbone import BackboneOptions
from tlcli.data.augment import AugmentPolicy
from tlcli.data.dataset import Sample
from tlcli.data.split import fingerprint
from tlcli.features import other_versions
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.other_versions import SAMPLE_ROWS, TOLERANCE
from tlcli.features.views import Views
from tlcli.machine import paths
from tlcli.progress import Silent

POLICY = AugmentPolicy(name="test", mirror=0.5, crop_scale=0.5)
NUM_IMAGES = 13


@pytest.fixture(scope="module")
def made():
    backbone = load_backbone(BackboneOptions(backbone="test_resnet", random_init=True, image_size=32))
    return Extractor(
        backbone, device="cpu", dtype="fp32", cache_dtype="fp32", freeze="2", views=Views(POLICY)
    )


@pytest.fixture
def computed(monkeypatch):
    """Return the list of rows that were computed, which grows."""
    asked = []
    real = Extractor.compute_items

    def compute_items(self, items, workers):
        asked.extend((sample.name, view) for sample, views in items for view in views)
        return real(self, items, workers)

    monkeypatch.setattr(Extractor, "compute_items", compute_items)
    return asked


def counts(found):
    return found.rows_reused, found.rows_computed


def written_elsewhere(spec, change=lambda number, row: row, keep=lambda number: True, **versions):
    """Write an entry's rows again, as other versions would have done it; return all as they are now."""
    entry = Store(paths.features_dir()).entry(spec)
    env = json.loads(entry.rows() and entry.shards()[0].env) | {"torch": "1.0.0", **versions}
    keys = sorted(entry.rows())
    rows = [change(number, row) for number, row in enumerate(entry.read(keys)[0])]
    shutil.rmtree(entry.shards_dir)
    with Store(paths.features_dir()).entry(spec).writer(env) as writer:
        for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
            if keep(number):
                writer.add(key, row.astype(np.float32))
    return dict(zip(keys, rows, strict=True)), env


def off(by):
    """Return a change of a row by `by` times its norm."""
    return lambda number, row: row + by * np.linalg.norm(row) / math.sqrt(row.size)


def content(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


def test_rows_of_this_environment_are_not_computed_again(made, samples, computed):
    fill(FeatureStore(made), samples)
    assert len(computed) == NUM_IMAGES
    assert counts(fill(FeatureStore(made), samples)[0]) == (NUM_IMAGES, 0)
    assert len(computed) == NUM_IMAGES


@pytest.mark.parametrize("by", [0.0, 0.5 * TOLERANCE["fp32"]])
def test_rows_of_other_versions_that_agree_are_used_as_they_are(made, samples, computed, caplog, by):
    fill(FeatureStore(made), samples)
    stored, _ = written_elsewhere(made.spec, off(by))
    before = content(paths.home())
    computed.clear()
    with caplog.at_level(logging.INFO, "tlcli"):
        store = FeatureStore(made)
        found, keys = fill(store, samples)
        fill(store, samples)
    assert counts(found) == (NUM_IMAGES, 0)
    assert len(computed) == SAMPLE_ROWS  # once a store
    rows, missing = store.read(keys)
    assert not missing
    assert all(np.array_equal(row.numpy(), stored[key, 0]) for row, key in zip(rows, keys, strict=True))
    assert content(paths.home()) == before
    (told,) = [record for record in caplog.records if record.name == "tlcli.features.other_versions"]
    assert told.levelname == "INFO"
    assert f"{NUM_IMAGES} rows" in told.message
    assert f'torch: "1.0.0" -> "{torch.__version__}"' in told.message
    assert "timm" not in told.message  # which did not change


@pytest.mark.parametrize(
    "change",
    [
        off(3 * TOLERANCE["fp32"]),
        lambda number, row: row[::-1],
        lambda number, row: np.zeros_like(row),
        lambda number, row: row * 1e6,
    ],
)
def test_rows_of_other_versions_that_differ_are_computed_again(made, samples, computed, caplog, change):
    _, keys = fill(FeatureStore(made), samples)
    right, _ = FeatureStore(made).read(keys)
    wrong, env = written_elsewhere(made.spec, change)
    old = content(paths.home())
    computed.clear()
    store = FeatureStore(made)
    found, _ = fill(store, samples)
    assert counts(found) == (0, NUM_IMAGES)
    assert torch.equal(store.read(keys)[0], right)
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert told.code == "rows_differ"
    assert store.entry.key[:12] in told.message
    assert '"1.0.0"' in told.message
    # What others wrote is left to them: under their versions these rows are right.
    assert old.items() <= content(paths.home()).items()
    theirs = Store(paths.features_dir()).entry(made.spec)
    theirs.trust({json.dumps(env, sort_keys=True, separators=(",", ":"))})
    assert np.array_equal(theirs.read([(keys[0], 0)])[0][0], wrong[keys[0], 0])
    # The next command has rows of its own, and nothing to ask or to say.
    computed.clear()
    caplog.clear()
    again = FeatureStore(made)
    assert counts(fill(again, samples)[0]) == (NUM_IMAGES, 0)
    assert torch.equal(again.read(keys)[0], right)
    assert not computed
    assert not caplog.records


def test_one_wrong_row_in_the_sample_is_enough(made, samples, monkeypatch):
    monkeypatch.setattr(other_versions, "SAMPLE_ROWS", NUM_IMAGES)
    fill(FeatureStore(made), samples)
    written_elsewhere(made.spec, lambda number, row: row * (1.0 if number != 5 else 1.1))
    assert counts(fill(FeatureStore(made), samples)[0]) == (0, NUM_IMAGES)


def test_nothing_is_given_out_before_it_was_compared(made, samples):
    _, keys = fill(FeatureStore(made), samples)
    written_elsewhere(made.spec)
    store = FeatureStore(made)
    rows, missing = store.read(keys)
    assert missing == list(range(NUM_IMAGES))
    assert not rows.any()
    assert len(store.known()) == NUM_IMAGES  # there, for all one knows without the images
    store.missing(samples, fingerprint(samples, 2, Silent()))
    assert store.read(keys)[1] == []


def test_the_plan_knows_what_differs(made, samples):
    fill(FeatureStore(made), samples)
    written_elsewhere(made.spec, off(0.1))
    store = FeatureStore(made)
    fingerprints = fingerprint(samples, 2, Silent())
    assert store.num_new(fingerprints) == 0
    assert len(store.missing(samples, fingerprints)) == NUM_IMAGES
    assert store.num_new(fingerprints) == NUM_IMAGES
    assert store.known() == set()


def test_what_this_environment_has_is_not_asked_of_another(made, samples, computed):
    """Only missing rows are looked for elsewhere, and environments are judged one by one."""
    _, keys = fill(FeatureStore(made), samples)
    right, _ = FeatureStore(made).read(keys)
    written_elsewhere(made.spec, keep=lambda number: number < 4)
    fill(FeatureStore(made), samples[:])  # the other nine
    entry = Store(paths.features_dir()).entry(made.spec)
    rows, order = entry.read(sorted(entry.rows()))[0], sorted(entry.rows())
    with entry.writer({"a": "judged first"}) as writer:
        for key, row in zip(order, rows, strict=True):
            writer.add(key, 2 * row)
    computed.clear()
    store = FeatureStore(made)
    assert counts(fill(store, samples)[0]) == (NUM_IMAGES, 0)
    assert torch.equal(store.read(keys)[0], right)
    assert len(computed) == 8  # the four foreign rows, as the one and as the other wrote them


def test_plain_rows_and_views_are_judged_apart(made, samples):
    fill(FeatureStore(made), samples, range(3))
    written_elsewhere(made.spec)
    written_elsewhere(made.views_spec, off(0.1))
    assert counts(fill(FeatureStore(made), samples, range(3))[0]) == (NUM_IMAGES, 2 * NUM_IMAGES)
    assert counts(fill(FeatureStore(made), samples, range(3))[0]) == (3 * NUM_IMAGES, 0)


def test_without_images_to_compare_with_nothing_is_believed(made, samples):
    _, keys = fill(FeatureStore(made), samples)
    fingerprints = fingerprint(samples, 2, Silent())
    written_elsewhere(made.spec)
    for sample in samples[:7]:
        Path(sample.path).unlink()
    for number, sample in enumerate(samples[7:]):
        Path(sample.path).write_bytes(b"another file %d" % number)
    store = FeatureStore(made)
    found = store.fill(samples, fingerprints, workers=2, progress=Silent())
    assert counts(found) == (0, 0)
    assert len(found.bad_images) == NUM_IMAGES
    assert store.read(keys)[1] == list(range(NUM_IMAGES))


def test_a_damaged_row_in_the_sample_is_left_out(made, samples):
    fill(FeatureStore(made), samples)
    stored, _ = written_elsewhere(made.spec)
    (path,) = content(paths.home())
    first = stored[min(stored)].astype(np.float32).tobytes()
    path.write_bytes(path.read_bytes().replace(first, bytes(len(first))))
    assert counts(fill(FeatureStore(made), samples)[0]) == (NUM_IMAGES - 1, 1)


def test_verify_compares_all_of_them_instead(made, samples, computed):
    fill(FeatureStore(made), samples)
    written_elsewhere(made.spec, lambda number, row: row * (1.0 if number != 12 else 1.1))
    computed.clear()
    store = FeatureStore(made, "verify")
    found, keys = fill(store, samples)
    assert len(computed) == NUM_IMAGES
    assert counts(found) == (NUM_IMAGES, NUM_IMAGES)
    assert len(found.differing) == 1
    assert found.largest_difference == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert store.read(keys)[1] == []


# ---- the sample and the tolerance ------------------------------------------------------------------------


def test_the_sample_has_every_type_of_file():
    suffixes = ["jpg"] * 50 + ["PNG"] * 3 + ["webp"]
    wanted = {
        (f"{number:064x}", 0): Sample(f"/x/{number}.{suffix}", f"{number}.{suffix}")
        for number, suffix in enumerate(suffixes)
    }
    chosen = other_versions.choose_sample(wanted, wanted)
    assert chosen == other_versions.choose_sample(reversed(wanted), wanted)
    assert len(chosen) == SAMPLE_ROWS == len(set(chosen))
    names = [wanted[key].name.rpartition(".")[2] for key in chosen]
    assert {name: names.count(name) for name in set(names)} == {"jpg": 4, "PNG": 3, "webp": 1}


def test_few_rows_are_all_taken():
    wanted = {("0" * 64, view): Sample("/a", "a") for view in range(3)}
    assert other_versions.choose_sample(wanted, wanted) == sorted(wanted)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [0.0, 5.0], math.sqrt(10) / 5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([math.nan, 4.0], [3.0, 4.0], sys.float_info.max),
        ([math.inf, 4.0], [3.0, 4.0], sys.float_info.max),
    ],
)
def test_relative_difference(new, old, expected):
    difference = other_versions.relative_difference(np.array(new, np.float32), np.array(old, np.float32))
    assert difference == pytest.approx(expected)


def test_bf16_rows_are_compared_as_numbers():
    one = torch.tensor([1.0, 2.0]).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    other = torch.tensor([1.0, 2.5]).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert other_versions.relative_difference(one, other) == pytest.approx(0.5 / math.hypot(1, 2.5))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "expected"),
    [("fp32", "fp32", "fp32"), ("fp32", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("bf16", "bf16", "bf16")],
)
def test_the_tolerance_is_that_of_the_least_precise_type(dtype, cache_dtype, expected):
    backbone = load_backbone(BackboneOptions(backbone="resnet18", random_init=True, image_size=32))
    made = Extractor(backbone, device="cpu", dtype=dtype, cache_dtype=cache_dtype)
    assert made.spec["compute"]["dtype"] == dtype
    assert other_versions.tolerance(made) == TOLERANCE[expected]
