"""Scanning, hashing and splitting together."""

import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlcli.config.data import DataOptions
from tlcli.data.collection import Collection, collect, groups_of
from tlcli.data.dataset import Dataset, Sample
from tlcli.data.split import Fingerprint, assign_splits
from tlcli.errors import DataError, UsageError
from tlcli.progress import Silent


def gather(root, **options):
    classes = options.pop("class_names", None)
    return collect(DataOptions(data=str(root), **options), 2, Silent(), class_names=classes)


def split_of(collection):
    return {s.name: split for s, split in zip(collection.samples, collection.splits, strict=True)}


def test_one_fingerprint_and_one_split_an_image(folder):
    found = gather(folder)
    assert len(found.samples) == len(found.fingerprints) == len(found.splits) == 24
    assert found.num_bytes == sum(path.stat().st_size for path in folder.rglob("*.png"))
    assert sum(found.num_images().values()) == 24
    assert found.num_images()["test"] == 0
    assert found.num_images()["val"] > 0
    assert not found.named_splits


def test_the_digest_changes_with_content_name_class_and_split_and_with_nothing_else(folder, tmp_path):
    first = gather(folder).digest()
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert gather(moved).digest() == first
    digests = {first, gather(folder, split_seed=1).digest(), gather(folder, val_fraction=0.5).digest()}
    (moved / "a/000.png").rename(moved / "a/zzz.png")
    digests.add(gather(moved).digest())
    (moved / "a/zzz.png").rename(moved / "b/zzz.png")
    digests.add(gather(moved).digest())
    (moved / "b/zzz.png").write_bytes(b"other")
    digests.add(gather(moved).digest())
    assert len(digests) == 6


def test_the_digest_survives_a_name_that_is_not_utf8(folder):
    (folder / "a/000.png").rename(folder / "a/\udcff.png")
    assert len(gather(folder).digest()) == 64


def test_adding_an_image_moves_no_other(folder, tmp_path, make_images):
    before = split_of(gather(folder))
    more = make_images(tmp_path / "more", {"a": 6}, seed=3)
    for path in (more / "a").iterdir():
        path.rename(folder / "a" / f"new-{path.name}")
    after = split_of(gather(folder))
    assert {name: after[name] for name in before} == before


def test_select_keeps_everything_aligned(folder):
    found = gather(folder)
    part = found.select([3, 1])
    assert [sample.name for sample in part.samples] == [found.samples[3].name, found.samples[1].name]
    assert part.fingerprints == [found.fingerprints[3], found.fingerprints[1]]
    assert part.splits == [found.splits[3], found.splits[1]]
    assert part.dataset.class_names == found.dataset.class_names


def test_a_limit_takes_from_train_only(folder):
    everything, few = gather(folder), gather(folder, limit_per_class=2)
    assert few.num_images()["train"] == 4
    assert few.num_images()["val"] == everything.num_images()["val"]
    fewer = {s.name for s in gather(folder, limit_per_class=1).samples}
    assert fewer < {s.name for s in few.samples} < {s.name for s in everything.samples}


def test_named_splits_are_kept(tmp_path, make_images):
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        make_images(tmp_path / "tree" / split, {"a": count, "b": count}, seed=count)
    found = gather(tmp_path / "tree")
    assert found.num_images() == {"train": 12, "val": 6, "test": 4}
    assert found.named_splits


def test_classes_of_a_run_are_kept_in_its_order(folder):
    found = gather(folder, class_names=("b", "x", "a"))
    assert found.dataset.class_names == ("b", "x", "a")
    labels = {sample.name.split("/")[0]: sample.label for sample in found.samples}
    assert labels == {"b": 0, "a": 2}


def test_warnings_of_the_scan_reach_the_user(folder, caplog):
    (folder / "empty").mkdir()
    found = gather(folder)
    assert [record.getMessage() for record in caplog.records] == [
        warning.message for warning in found.dataset.warnings
    ]
    assert "empty" in caplog.text


def test_missing_data(tmp_path):
    with pytest.raises(UsageError, match="DATA"):
        collect(DataOptions(), 1, Silent())
    with pytest.raises(DataError, match="none"):
        gather(tmp_path / "none")


SOME = st.one_of(st.none(), st.sampled_from("uvwxyz"))


@given(st.lists(st.tuples(SOME, SOME), min_size=1, max_size=14))
def test_images_have_one_number_if_and_only_if_copies_and_groups_connect_them(drawn):
    samples = tuple(
        Sample(f"/{number}.png", f"{number}.png", number % 2, None, group)
        for number, (group, _) in enumerate(drawn)
    )
    prints = [Fingerprint(content, 1, None) for _, content in drawn]
    dataset = Dataset(Path("/"), "csv", ("a", "b"), samples, {}, ())
    numbers = groups_of(Collection(dataset, prints, ["train"] * len(drawn), False)).tolist()
    near = {
        (one, other)
        for one, other in itertools.product(range(len(drawn)), repeat=2)
        if one == other
        or any(a is not None and a == b for a, b in zip(drawn[one], drawn[other], strict=True))
    }
    for between, one, other in itertools.product(range(len(drawn)), repeat=3):  # Warshall's closure
        if (one, between) in near and (between, other) in near:
            near.add((one, other))
    for one, other in itertools.product(range(len(drawn)), repeat=2):
        assert (numbers[one] == numbers[other]) == ((one, other) in near)
    # The split never divides what has one number.
    splits = assign_splits(samples, prints, val_fraction=0.5, split_seed=0)
    assert len(set(zip(numbers, splits, strict=True))) == len(set(numbers))
