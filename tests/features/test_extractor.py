"""Rows of images: computed once, the same however they came about, and never another image's."""

import hashlib
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.features.filling import fill
from tlcli.backbones.zoo import load_backbone
from tlcli.cache.entry import Entry
from tlcli.cache.store import Store
from tlcli.cache.writer import Writer
from tlcli.config.backbone import BackboneOptions
from tlcli.data.decode import decode
from tlcli.data.folders import find_images
from tlcli.data.split import fingerprint
from tlcli.errors import BackboneError, StorageError
from tlcli.features.batch import to_numpy, to_tensor
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.plan import predicted_seconds
from tlcli.features.views import PLAIN_VIEW
from tlcli.machine import paths
from tlcli.progress import Silent


def extractor(name="test_resnet", image_size=32, crop_pct=None, **options):
    backbone = load_backbone(
        BackboneOptions(backbone=name, random_init=True, image_size=image_size, crop_pct=crop_pct)
    )
    return Extractor(backbone, device="cpu", **options)


IMAGES = {"a": 19, "b": 18}  # two full batches and a part of one


@pytest.fixture(scope="module")
def plain():
    return extractor(dtype="fp32")


@pytest.fixture(scope="module")
def reduced():
    return extractor(dtype="bf16")


def rows_of(extractor, samples, workers=2, mode="never"):
    """Return name -> row."""
    store = FeatureStore(extractor, mode)
    _, keys = fill(store, samples, workers=workers)
    rows, missing = store.read(keys)
    assert not missing
    return {sample.name: row for sample, row in zip(samples, rows, strict=True)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- one image, one row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "reduced"])
def test_cached_rows_equal_fresh_ones_bit_for_bit(kind, request, samples):
    made = request.getfixturevalue(kind)
    fresh = rows_of(made, samples)
    assert same(rows_of(made, samples, mode="auto"), fresh)
    assert same(rows_of(made, samples, mode="auto"), fresh)  # now read from the cache
    assert not (paths.features_dir() / "trash").exists()


@pytest.mark.parametrize("kind", ["plain", "reduced"])
def test_rows_do_not_depend_on_order_batch_or_workers(kind, request, samples):
    made = request.getfixturevalue(kind)
    expected = rows_of(made, samples, workers=1)
    shuffled = list(samples)
    random.Random(1).shuffle(shuffled)
    assert same(rows_of(made, shuffled, workers=3), expected)
    alone = rows_of(made, samples[:1], workers=4) | rows_of(made, samples[1:], workers=2)
    assert same(alone, expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same(rows_of(made, samples, workers=2), expected)
        assert torch.get_num_threads() == 2  # as it was
    finally:
        torch.set_num_threads(threads)


def test_every_batch_has_one_size_when_it_is_computed(plain):
    """A library may choose another algorithm for another size, so small batches are padded."""
    seen = []
    hook = plain.fast.module.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    try:
        for count in (1, 5, plain.batch_size):
            images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
            assert len(plain.rows(images)) == count
    finally:
        hook.remove()
    assert seen == [plain.batch_size] * 3


def test_an_extractor_made_anew_gives_the_same_key_and_rows(plain, samples):
    again = extractor(dtype="fp32")
    assert again.spec == plain.spec
    assert same(rows_of(again, samples[:5]), rows_of(plain, samples[:5]))


def test_a_row_is_what_the_network_gives_for_the_transformed_image(plain, samples):
    rows = rows_of(plain, samples[:3])
    backbone = load_backbone(BackboneOptions(backbone="test_resnet", random_init=True, image_size=32))
    for sample in samples[:3]:
        with open(sample.path, "rb") as file:
            image = plain.view.transform(decode(file.read())).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (plain.backbone.preprocess.mean,
                                                             plain.backbone.preprocess.std))  # fmt: skip
        with torch.inference_mode():
            expected = backbone.model(((image - mean) / std)[None])[0]
        torch.testing.assert_close(rows[sample.name], expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_an_inner_cut_stores_maps_in_bf16(samples):
    inner = extractor(freeze="2", dtype="fp32")
    assert inner.row_dtype == "bf16"
    assert len(inner.cut.row_shape) == 3
    found = rows_of(inner, samples[:3], mode="auto")
    assert same(rows_of(inner, samples[:3]), found)
    (row, *_) = found.values()
    assert row.dtype == torch.bfloat16
    assert tuple(row.shape) == inner.cut.row_shape
    assert inner.row_bytes == 2 * row.numel()
    exact = rows_of(extractor(freeze="2", dtype="fp32", cache_dtype="fp32"), samples[:3])
    for name, value in exact.items():
        torch.testing.assert_close(found[name].float(), value, rtol=2**-8, atol=1e-6)


def test_facts_that_change_rows_change_the_key(plain):
    others = [
        extractor(dtype="bf16"),
        extractor(dtype="fp32", cache_dtype="bf16"),
        extractor(dtype="fp32", freeze="3"),
        extractor(dtype="fp32", image_size=48),
        extractor(dtype="fp32", crop_pct=0.5),
        extractor("test_resnet", dtype="fp32", freeze="4"),
    ]
    store = Store(paths.features_dir())
    keys = [store.entry(made.spec).key for made in (plain, *others)]
    assert len(set(keys)) == len(keys)
    changed = load_backbone(BackboneOptions(backbone="test_resnet", random_init=True, image_size=32))
    next(changed.model.parameters()).data[0] += 1e-6
    assert store.entry(Extractor(changed, device="cpu", dtype="fp32").spec).key not in keys


# ---- done once -------------------------------------------------------------------------------------------


def counts(found):
    return found.rows_reused, found.rows_computed, len(found.bad_images)


def test_every_change_costs_exactly_its_rows(plain, samples, tmp_path, make_images):
    root = tmp_path / "images"

    def again():
        return counts(fill(FeatureStore(plain), find_images([str(root)]))[0])

    assert again() == (0, 37, 0)
    assert again() == (37, 0, 0)
    make_images(tmp_path / "more", {"a": 1}, seed=5)
    shutil.copy(tmp_path / "more/a/000.png", root / "a/new.png")
    assert again() == (37, 1, 0)
    (root / "a/000.png").rename(root / "b/renamed.png")
    assert again() == (38, 0, 0)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(root / "a/001.png")
    assert again() == (37, 1, 0)
    (root / "a/002.png").unlink()
    assert again() == (37, 0, 0)
    shutil.copy(root / "b/003.png", root / "b/copy.png")
    assert again() == (38, 0, 0)
    os.utime(root / "b/003.png", (1, 1))
    assert again() == (38, 0, 0)


def test_copies_share_a_row(plain, samples, tmp_path):
    shutil.copy(samples[0].path, tmp_path / "images/a/copy.png")
    images = find_images([str(tmp_path / "images")])
    assert len(FeatureStore(plain).missing(images, fingerprint(images, 1, Silent()))) == 37
    found, _ = fill(FeatureStore(plain), images)
    assert counts(found) == (0, 37, 0)
    assert len(Store(paths.features_dir()).entries()[0].shards[0].keys) == 37


def test_a_damaged_shard_costs_its_rows_and_nothing_else(plain, samples):
    before = rows_of(plain, samples, mode="auto")
    (entry,) = (Store(paths.features_dir()).find(item.key) for item in Store(paths.features_dir()).entries())
    (shard,) = entry.shards_dir.iterdir()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # in the data of the last row
    shard.write_bytes(bytes(data))
    store = FeatureStore(plain)
    _, keys = fill(store, samples)
    _, missing = store.read(keys)
    assert len(missing) == 1
    found, _ = fill(FeatureStore(plain), samples)
    assert counts(found) == (36, 1, 0)
    assert same(rows_of(plain, samples, mode="auto"), before)


def test_nothing_is_written_without_a_cache_or_without_work(plain, samples):
    rows_of(plain, samples[:2])
    FeatureStore(plain).missing(samples, fingerprint(samples, 1, Silent()))
    assert not paths.home().exists()


# ---- verify ----------------------------------------------------------------------------------------------


def tamper(made, key, scale):
    """Replace the row of an image by another whose checksum agrees."""
    entry = Store(paths.features_dir()).entry(made.spec)
    rows, _ = entry.read([(key, PLAIN_VIEW)])
    others = sorted(entry.rows() - {(key, PLAIN_VIEW)})
    kept, _ = entry.read(others)
    shutil.rmtree(entry.shards_dir)
    with Store(paths.features_dir()).entry(made.spec).writer({}) as writer:
        for other, row in zip(others, kept, strict=True):
            writer.add(other, row)
        writer.add((key, PLAIN_VIEW), rows[0] * np.float32(scale))


def test_verify_passes_on_a_clean_cache_and_names_a_row_that_is_wrong(plain, samples):
    _, keys = fill(FeatureStore(plain), samples)
    clean, _ = fill(FeatureStore(plain, "verify"), samples)
    assert counts(clean) == (37, 37, 0)
    assert (clean.differing, clean.largest_difference) == ([], 0.0)
    tamper(plain, keys[7], 1.01)
    found, _ = fill(FeatureStore(plain, "verify"), samples)
    assert found.differing == [samples[7].name]
    assert 0.005 < found.largest_difference < 0.02


def test_verify_stores_what_was_not_there(plain, samples):
    fill(FeatureStore(plain), samples[:10])
    store = FeatureStore(plain, "verify")
    found, keys = fill(store, samples)
    assert (found.rows_reused, found.rows_computed, found.differing) == (10, 37, [])
    assert store.read(keys)[1] == []
    assert counts(fill(FeatureStore(plain), samples)[0]) == (37, 0, 0)


# ---- bad images and changing files -----------------------------------------------------------------------


def test_bad_images_are_skipped_listed_and_never_replaced(plain, samples, tmp_path):
    with open(samples[3].path, "wb") as file:
        file.write(b"no image")
    with open(samples[20].path, "r+b") as file:
        file.truncate(60)
    os.unlink(samples[30].path)
    store = FeatureStore(plain)
    found, keys = fill(store, samples)
    assert counts(found) == (0, 34, 3)
    assert {image.name for image in found.bad_images} == {samples[i].name for i in (3, 20, 30)}
    assert all(image.reason for image in found.bad_images)
    assert set(store.read([key or "" for key in keys])[1]) == {3, 20, 30}


def test_a_file_that_changes_between_hashing_and_decoding_is_bad(plain, samples):
    fingerprints = fingerprint(samples, 1, Silent())
    Image.new("RGB", (40, 40), (9, 9, 9)).save(samples[2].path)
    os.unlink(samples[4].path)
    with open(samples[6].path, "wb") as file:
        file.write(b"no image any more")
    store = FeatureStore(plain)
    found = store.fill(samples, fingerprints, workers=2, progress=Silent())
    assert {image.name for image in found.bad_images} == {samples[i].name for i in (2, 4, 6)}
    assert all("changed or vanished" in image.reason for image in found.bad_images)
    # The row under the old content's key is not the new content's.
    assert store.read([fingerprints[i].sha256 for i in (2, 4, 6)])[1] == [0, 1, 2]
    later = fingerprint(samples[2:3], 1, Silent())
    assert counts(store.fill(samples[2:3], later, workers=1, progress=Silent())) == (1, 0, 0)


def test_too_many_bad_images_stop_the_work_early(plain, samples):
    for sample in samples[:3]:
        with open(sample.path, "wb") as file:
            file.write(b"no image " + sample.name.encode())
    found, _ = fill(FeatureStore(plain), samples, workers=1, stop=lambda num_bad: num_bad > 2)
    assert found.rows_computed == plain.batch_size - 3  # nothing after the first batch
    assert {image.name for image in found.bad_images} == {sample.name for sample in samples[:3]}


# ---- interruption and refusal ----------------------------------------------------------------------------


def test_an_interruption_keeps_the_finished_rows(plain, samples, monkeypatch):
    real, calls = Writer.add, []

    def add(self, key, row, name=None):
        calls.append(key)
        if len(calls) == 25:
            raise KeyboardInterrupt
        real(self, key, row, name)

    monkeypatch.setattr(Writer, "add", add)
    with pytest.raises(KeyboardInterrupt):
        fill(FeatureStore(plain), samples)
    monkeypatch.setattr(Writer, "add", real)
    assert counts(fill(FeatureStore(plain), samples)[0]) == (24, 13, 0)
    assert same(rows_of(plain, samples, mode="auto"), rows_of(plain, samples))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tlcli-features")]


def test_rows_are_flushed_while_the_work_goes_on(plain, samples, monkeypatch):
    real = Entry.writer
    monkeypatch.setattr(Entry, "writer", lambda self, env, **more: real(self, env, **more, flush_seconds=0))
    fill(FeatureStore(plain), samples[:5])
    (summary,) = Store(paths.features_dir()).entries()
    assert len(summary.shards) == 5


def test_weights_that_change_meanwhile_refuse_the_rows(samples):
    made = extractor(dtype="fp32")
    next(made.fast.module.parameters()).data[0] += 1.0
    with pytest.raises(BackboneError, match="changed"):
        fill(FeatureStore(made), samples[:3])
    assert FeatureStore(made).known() == set()


def test_rows_that_are_not_finite_are_refused_by_name(samples):
    made = extractor(dtype="fp32")
    for buffer in made.fast.module.parameters():
        buffer.data.fill_(float("nan"))
    made._fast_sha256 = ""
    with pytest.raises(BackboneError, match="not finite"):
        fill(FeatureStore(made), samples[:3])
    assert FeatureStore(made).known() == set()


def test_a_full_disk_is_told_before_the_work(plain, samples):
    store = FeatureStore(plain)
    store.cache.max_bytes = 100
    with pytest.raises(StorageError, match="cap"):
        fill(store, samples)
    assert not paths.home().exists()


# ---- small things ----------------------------------------------------------------------------------------


def test_bf16_survives_the_way_through_numpy():
    rows = torch.randn(3, 5).to(torch.bfloat16)
    assert to_numpy(rows).dtype == np.uint16
    assert torch.equal(to_tensor(to_numpy(rows)), rows)
    exact = torch.randn(3, 5)
    assert torch.equal(to_tensor(to_numpy(exact)), exact)


def test_shards_are_safetensors_keyed_by_content(plain, samples):
    fill(FeatureStore(plain), samples[:2])
    (summary,) = Store(paths.features_dir()).entries()
    tensors = load_file(summary.shards[0].path)
    (rows,) = (tensor for tensor in tensors.values() if tensor.shape[1:] == plain.cut.row_shape)
    expected = rows_of(plain, samples[:2])
    assert sorted(map(tuple, rows.tolist())) == sorted(tuple(row.tolist()) for row in expected.values())
    digests = {hashlib.sha256(Path(sample.path).read_bytes()).hexdigest() for sample in samples[:2]}
    assert FeatureStore(plain).known() == {(digest, PLAIN_VIEW) for digest in digests}


def test_the_prediction_of_time_is_positive_and_keeps_nothing(plain, samples):
    assert predicted_seconds(plain, [(sample, (PLAIN_VIEW,)) for sample in samples], 2) > 0
    assert predicted_seconds(plain, [], 2) == 0
    assert not paths.home().exists()
