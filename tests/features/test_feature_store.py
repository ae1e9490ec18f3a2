"""Views: cached beside the plain rows, computed once each, the same however they came about."""

import hashlib
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.features.filling import fill
from tlcli.backbones.zoo import load_backbone
from tlcli.cache.store import Store
from tlcli.config.backbone import BackboneOptions
from tlcli.data.augment import AugmentPolicy
from tlcli.data.decode import decode
from tlcli.data.folders import find_images
from tlcli.errors import ResourceError
from tlcli.features import extractor as extracting
from tlcli.features.batch import to_numpy
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.views import Views
from tlcli.machine import memory, paths

POLICY = AugmentPolicy(name="test", mirror=0.5, crop_scale=0.5, rotate=20.0, brightness=0.3)


def extractor(policy=POLICY, seed=0, **options):
    backbone = load_backbone(BackboneOptions(backbone="test_resnet", random_init=True, image_size=32))
    views = Views(policy, seed) if policy is not None else None
    return Extractor(backbone, device="cpu", dtype="fp32", freeze="2", views=views, **options)


@pytest.fixture(scope="module")
def made():
    return extractor()


def counts(found):
    return found.rows_reused, found.rows_computed, len(found.bad_images)


def view_of(made, sample, view):
    data = Path(sample.path).read_bytes()
    return made.view(decode(data), hashlib.sha256(data).hexdigest(), view)


def direct(made, sample, view):
    """The row computed alone, without a store."""
    return made.rows(view_of(made, sample, view)[None])[0]


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_each_row_is_that_of_its_image_and_view(made, samples, mode):
    store = FeatureStore(made, mode)
    found, keys = fill(store, samples, range(3))
    assert counts(found) == (0, 39, 0)
    order = [(place, view) for view in (2, 0, 1) for place in range(len(samples))]
    rows, missing = store.read([keys[place] for place, _ in order], [view for _, view in order])
    assert not missing
    for row, (place, view) in zip(rows, order, strict=True):
        assert torch.equal(row, direct(made, samples[place], view))
    plain, augmented = rows[13:26], rows[26:]
    assert not torch.equal(plain, augmented)
    assert torch.equal(store.read(keys)[0], plain)


@pytest.mark.parametrize("views", [2, 3, 5, 7, 100])
def test_rows_do_not_depend_on_how_views_are_grouped(made, samples, views):
    batches = list(made.compute_items([(sample, range(views)) for sample in samples[:3]], 2))
    found = {(name, key[1]): row for batch in batches for key, name, row in batch.items()}
    assert len(found) == 3 * views
    assert sum(batch.num_items for batch in batches) == 3 * views
    for sample in samples[:3]:
        for view in (0, views - 1):
            expected = to_numpy(direct(made, sample, view))
            assert (found[sample.name, view] == expected).all()


def test_more_views_cost_their_own_rows_alone_and_one_decoding(made, samples, monkeypatch):
    decoded = Counter()
    monkeypatch.setattr(extracting, "decode", lambda data: decoded.update([data]) or decode(data))
    assert counts(fill(FeatureStore(made), samples, range(1))[0]) == (0, 13, 0)
    shards = {path: path.stat().st_mtime_ns for path in paths.home().rglob("*.safetensors")}
    assert counts(fill(FeatureStore(made), samples, range(4))[0]) == (13, 39, 0)
    assert set(decoded.values()) == {2}  # once for view 0, once for the three that came later
    assert counts(fill(FeatureStore(made), samples, range(4))[0]) == (52, 0, 0)
    assert counts(fill(FeatureStore(made), samples, range(6))[0]) == (52, 26, 0)
    assert set(decoded.values()) == {3}
    for path, changed in shards.items():
        assert path.stat().st_mtime_ns == changed


def test_views_from_the_beginning_equal_views_added_later(made, samples, tmp_path, monkeypatch):
    for views in (range(2), range(5)):
        fill(FeatureStore(made), samples, views)
    _, keys = fill(FeatureStore(made), samples, range(5))
    wanted = [(key, view) for key in keys for view in range(5)]
    later, _ = FeatureStore(made).read(*zip(*wanted, strict=True))
    monkeypatch.setenv("TLCLI_HOME", str(tmp_path / "other"))
    fill(FeatureStore(made), samples, range(5))
    assert torch.equal(FeatureStore(made).read(*zip(*wanted, strict=True))[0], later)


def test_the_plain_entry_is_shared_and_the_other_one_is_not(made, samples):
    plain = extractor(policy=None)
    assert plain.spec == made.spec
    assert plain.views_spec is None
    store = Store(paths.features_dir())
    keys = {
        store.entry(item.views_spec).key
        for item in (made, extractor(seed=1), extractor(AugmentPolicy(name="test", mirror=0.5)))
    }
    assert len(keys | {store.entry(made.spec).key}) == 4
    fill(FeatureStore(plain), samples, range(1))
    assert counts(fill(FeatureStore(made), samples, range(2))[0]) == (13, 13, 0)
    assert counts(fill(FeatureStore(extractor(seed=1)), samples, range(2))[0]) == (13, 13, 0)


def test_each_image_has_the_views_that_are_asked_for_it(made, samples, tmp_path):
    shutil.copy(samples[0].path, tmp_path / "images/b/copy.png")
    images = find_images([str(tmp_path / "images")])
    (place,) = (place for place, sample in enumerate(images) if sample.path.endswith("copy.png"))
    views = [(0,)] * len(images)
    views[0], views[place] = (0, 1), (0, 2)  # a copy: what either wants is computed once
    store = FeatureStore(made)
    found, keys = fill(store, images, views)
    assert counts(found) == (0, 15, 0)
    assert store.read([keys[0]] * 4, [0, 1, 2, 3])[1] == [3]


def test_without_augmentation_there_is_no_other_view(samples):
    made = extractor(policy=None)
    with pytest.raises(ValueError, match="no augmentation"):
        view_of(made, samples[0], 1)
    with pytest.raises(ValueError, match="no augmentation"):
        FeatureStore(made).read(["0" * 64], [1])


def test_bad_images_count_once_whatever_the_views(made, samples):
    with open(samples[3].path, "wb") as file:
        file.write(b"no image")
    found, _ = fill(FeatureStore(made), samples, range(3))
    assert counts(found) == (0, 36, 1)
    assert [image.name for image in found.bad_images] == [samples[3].name]


def test_verify_covers_views_and_names_the_one_that_is_wrong(made, samples):
    _, keys = fill(FeatureStore(made), samples, range(3))
    clean, _ = fill(FeatureStore(made, "verify"), samples, range(3))
    assert counts(clean) == (39, 39, 0)
    assert (clean.differing, clean.largest_difference) == ([], 0.0)
    entry = Store(paths.features_dir()).entry(made.views_spec)
    rows, _ = entry.read(order := sorted(entry.rows()))
    shutil.rmtree(entry.shards_dir)
    place = order.index((keys[5], 2))
    rows[place] = rows[(place + 1) % len(rows)]
    with Store(paths.features_dir()).entry(made.views_spec).writer({}) as writer:
        for key, row in zip(order, rows, strict=True):
            writer.add(key, row)
    found, _ = fill(FeatureStore(made, "verify"), samples, range(3))
    assert found.differing == [f"{samples[5].name} (view 2)"]


def test_rows_in_memory_are_refused_when_they_would_not_fit(made, samples, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * made.row_bytes)
    store = FeatureStore(made, "never")
    fill(store, samples, range(1))
    with pytest.raises(ResourceError, match="--cache never") as caught:
        fill(store, samples, range(3))
    assert "--cache auto" in caught.value.hint
    assert len(store.known()) == 13
    assert not paths.home().exists()


def test_many_threads_may_read_while_rows_are_added(made, samples):
    store = FeatureStore(made)
    _, keys = fill(store, samples, range(2))
    expected, _ = store.read(keys, [1] * len(keys))
    wrong, done = [], threading.Event()

    def read(number):
        while not done.is_set():
            views = [(place + number) % 2 for place in range(len(keys))]
            rows, missing = store.read(keys, views)
            same = all(torch.equal(rows[i], expected[i]) for i, view in enumerate(views) if view == 1)
            if missing or not same:
                wrong.append(number)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(read, number) for number in range(3)]
        for views in (3, 4, 5):
            fill(store, samples, range(views))
        done.set()
        for future in running:
            future.result()
    assert not wrong


def test_rows_can_be_trained_from(made, samples):
    """Tensors of inference mode cannot be kept for a backward pass."""
    rows = made.rows(torch.stack([view_of(made, sample, 1) for sample in samples[:2]])).float()
    weight = torch.ones(rows.shape[1:], requires_grad=True)
    (rows * weight).sum().backward()
    assert torch.equal(weight.grad, rows.sum(0))
