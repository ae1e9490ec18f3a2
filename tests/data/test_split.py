"""The split depends on content alone: properties over made-up data sets."""

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcli.config.data import DataOptions
from tlcli.data.dataset import Sample
from tlcli.data.listing import write_listing
from tlcli.data.scan import scan
from tlcli.data.split import (
    Fingerprint,
    assign_splits,
    fingerprint,
    limit_per_class,
    listing_rows,
    map_threads,
)
from tlcli.errors import DataError, UsageError
from tlcli.progress import Silent

Image = tuple[str | None, int, str | None]  # content, class, group


def content(name: object) -> str:
    return f"{name!s:0>64}"


def divided(images: list[Image], fraction: float = 0.2, seed: int = 0, prefix: str = "") -> list[str]:
    """Return the splits of images that are files called `prefix` and a number."""
    samples = [
        Sample(f"/{prefix}{n}", f"{prefix}{n}", label, None, group)
        for n, (_, label, group) in enumerate(images)
    ]
    prints = [Fingerprint(sha256, 1, None if sha256 else "bad") for sha256, _, _ in images]
    return assign_splits(samples, prints, val_fraction=fraction, split_seed=seed)


def with_test(images: list[Image], test: float, seed: int = 0, val: float = 0.2) -> list[str]:
    """Return the splits with a test fraction."""
    samples = [Sample(f"/{n}", str(n), label, None, group) for n, (_, label, group) in enumerate(images)]
    prints = [Fingerprint(sha256, 1, None if sha256 else "bad") for sha256, _, _ in images]
    return assign_splits(samples, prints, val_fraction=val, split_seed=seed, test_fraction=test)


def plain(number: int, classes: int = 3) -> list[Image]:
    return [(content(index), index % classes, None) for index in range(number)]


IMAGES = st.lists(
    st.tuples(
        st.integers(0, 30).map(content) | st.none(),
        st.integers(0, 3),
        st.none() | st.sampled_from(["g1", "g2", "g3", "g4", "\udce9"]),
    ),
    max_size=40,
)


@given(images=IMAGES, seed=st.integers(0, 5), fraction=st.sampled_from([0.01, 0.2, 0.5]))
@settings(max_examples=100, deadline=None)
def test_a_test_fraction_takes_of_train_alone_and_whole_groups(
    images: list[Image], seed: int, fraction: float
) -> None:
    before, splits = divided(images, seed=seed), with_test(images, fraction, seed)
    assert all(new == old or (old, new) == ("train", "test") for old, new in zip(before, splits, strict=True))
    for label in {label for content, label, _ in images if content}:
        mine = [
            split for (found, own, _), split in zip(images, splits, strict=True) if found and own == label
        ]
        assert "train" in mine
    for place in (0, 2):  # of one content, and of one group
        sides: dict[str, set[str]] = {}
        for image, split in zip(images, splits, strict=True):
            if image[place] is not None:
                sides.setdefault(str(image[place]), set()).add(split)
        assert all(len(found) == 1 for found in sides.values())


def test_a_test_fraction_is_its_share_and_adding_files_moves_none() -> None:
    images = plain(3_000)
    splits = with_test(images, 0.3)
    assert 0.27 < splits.count("test") / 3_000 < 0.33
    assert with_test(plain(4_000), 0.3)[:3_000] == splits


def test_every_class_that_can_has_a_test_image() -> None:
    images = [(content(number), number // 3, None) for number in range(60)]
    before, splits = divided(images), with_test(images, 0.2)
    for start in range(0, 60, 3):
        had, has = Counter(before[start : start + 3]), Counter(splits[start : start + 3])
        assert has["val"] == had["val"] >= 1
        assert has["train"] >= 1
        assert has["test"] >= (had["train"] > 1)


def test_a_test_fraction_is_refused_where_there_is_a_test_split_or_no_train_is_left() -> None:
    samples = [Sample(f"/{n}", str(n), 0, "test" if n else "train") for n in range(4)]
    prints = [Fingerprint(content(n), 1, None) for n in range(4)]
    with pytest.raises(DataError, match="has one"):
        assign_splits(samples, prints, val_fraction=0.2, split_seed=0, test_fraction=0.2)
    with pytest.raises(UsageError, match="nothing to train on"):
        with_test(plain(9), 0.6, val=0.4)


@given(images=IMAGES, seed=st.integers(0, 5), fraction=st.sampled_from([0.01, 0.2, 0.5, 0.9]))
@settings(max_examples=200, deadline=None)
def test_what_belongs_together_stays_together(images: list[Image], seed: int, fraction: float) -> None:
    splits = divided(images, fraction, seed)
    assert set(splits) <= {"train", "val"}
    together = defaultdict(set)
    for (sha256, _, group), split in zip(images, splits, strict=True):
        if sha256:
            together[sha256].add(split)
        if group:
            together[group].add(split)
    assert all(len(found) == 1 for found in together.values())


@given(images=IMAGES, seed=st.integers(0, 5), fraction=st.sampled_from([0.01, 0.2, 0.9]))
@settings(max_examples=200, deadline=None)
def test_every_class_is_in_train_and_without_groups_in_val_too(
    images: list[Image], seed: int, fraction: float
) -> None:
    splits = divided(images, fraction, seed)
    in_train = {
        label for (sha256, label, _), split in zip(images, splits, strict=True) if split == "train" and sha256
    }
    assert in_train == {label for sha256, label, _ in images if sha256}
    alone: list[Image] = [(sha256 and f"{label}{sha256}", label, None) for sha256, label, _ in images]
    contents = defaultdict(set)
    for sha256, label, _ in alone:
        contents[label].add(sha256)
    pairs = zip(alone, divided(alone, fraction, seed), strict=True)
    in_val = {label for (_, label, _), split in pairs if split == "val"}
    assert in_val == {label for label, found in contents.items() if len(found - {None}) > 1}


@given(images=IMAGES, order=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_order_and_names_do_not_matter(images: list[Image], order: random.Random) -> None:
    mixed = order.sample(range(len(images)), len(images))
    splits = divided(images)
    assert divided([images[index] for index in mixed], prefix="other/") == [splits[index] for index in mixed]


def test_adding_images_moves_no_old_one() -> None:
    images = plain(2000)
    before = divided(images[:1000])
    assert divided(images)[:1000] == before
    more = [*images[:1000], ("x" * 64, 7, None), ("y" * 64, 7, "group")]
    assert divided(more)[:1000] == before


def test_the_share_is_about_the_fraction_in_every_class() -> None:
    for fraction in (0.1, 0.2, 0.5):
        images = plain(9000)
        pairs = zip(images, divided(images, fraction), strict=True)
        chosen = Counter(label for (_, label, _), split in pairs if split == "val")
        for count in chosen.values():
            assert count / 3000 == pytest.approx(fraction, abs=0.03)


def test_the_seed_changes_the_split() -> None:
    images = plain(300)
    assert divided(images, seed=0) == divided(images, seed=0)
    assert divided(images, seed=0) != divided(images, seed=1)


def test_a_pinned_split() -> None:
    """The rule is a promise to users: this fails when it changes."""
    splits = divided([*plain(20), ("f" * 64, 0, "patient 7"), ("e" * 64, 1, "patient 8")])
    assert [index for index, split in enumerate(splits) if split == "val"] == [7, 15, 17, 18]


def test_a_class_in_one_group_stays_in_train() -> None:
    images: list[Image] = [(content(n), 0, "only") for n in range(5)]
    images += [(content(n), 1, None) for n in range(10, 40)]
    assert divided(images, 0.9)[:5] == ["train"] * 5


def test_groups_that_share_an_image_are_one() -> None:
    images: list[Image] = [(content(n), 0, f"g{n}") for n in range(50)]
    images += [(content("same"), 0, f"g{n}") for n in range(10)]
    splits = divided(images, 0.5)
    assert len({*splits[:10], *splits[50:]}) == 1
    assert len(set(splits[10:50])) == 2


def named(split: str | None, number: int) -> tuple[Sample, Fingerprint]:
    return Sample(f"/{number}", str(number), number % 2, split), Fingerprint(content(number), 1, None)


def test_given_splits_are_kept_and_a_given_val_is_all_of_val() -> None:
    for splits, held_out in ((["train", "val", "test", None], False), (["train", "test", None], True)):
        samples, prints = zip(*[named(splits[n % len(splits)], n) for n in range(200)], strict=True)
        assigned = assign_splits(samples, prints, val_fraction=0.5, split_seed=0)
        for sample, split in zip(samples, assigned, strict=True):
            if sample.split in ("val", "test"):
                assert split == sample.split
            else:
                assert split in (("train", "val") if held_out else ("train",))
        assert Counter(assigned)["val"] > 30


def test_limit_per_class_nests_and_leaves_val_and_test_alone() -> None:
    samples, prints = map(list, zip(*[named(None, n) for n in range(100)], strict=True))
    prints[8] = prints[0]  # a copy
    prints[2] = Fingerprint(None, 0, "bad")
    splits = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    before: set[int] = set()
    for n in (1, 3, 10, 1000):
        kept = limit_per_class(samples, prints, splits, n)
        assert kept == sorted(kept)
        assert set(range(60, 100)) <= set(kept)
        assert before <= set(kept)
        per_class = Counter(samples[index].label for index in kept if index < 60)
        assert all(count == min(n, 28 if label == 0 else 30) for label, count in per_class.items())
        before = set(kept)
    assert 8 not in before
    assert 2 not in before


# ---- files ------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").touch()
    samples = [Sample(str(tmp_path / name), name) for name in ("a", "b", "c", "a")]
    found = fingerprint(samples, 3, Silent())
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found[0] == found[3] == Fingerprint(known, 3, None)
    assert found[1] == Fingerprint(None, 0, "empty file")
    assert found[2] == Fingerprint(None, 0, "file not found")


def test_threads_keep_the_order_tell_the_progress_and_stop_on_an_error() -> None:
    class Counted(Silent):
        total, done, finished = 0, 0, 0

        def start(self, stage: str, total: int | None = None, unit: str = "images") -> None:
            self.total = total or 0

        def advance(self, amount: int = 1) -> None:
            self.done += amount

        def finish(self) -> None:
            self.finished += 1

    samples = [Sample(str(n), str(n)) for n in range(5000)]
    progress = Counted()
    assert list(map_threads(lambda sample: sample.name, samples, 4, "x", progress)) == [
        s.name for s in samples
    ]
    assert (progress.total, progress.done, progress.finished) == (5000, 5000, 1)

    def fail(sample: Sample) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(map_threads(fail, samples, 4, "x", progress))
    assert progress.finished == 2
    assert list(map_threads(fail, [], 4, "x", Silent())) == []


@pytest.mark.parametrize("place", ["data/split.csv", "other/split.tsv", "split.csv"])
def test_a_written_split_is_data_again(tmp_path: Path, place: str) -> None:
    names = ["a/1.jpg", "a/2.jpg", "b/x,y.jpg", 'b/"q".jpg', "b/data:1.jpg", "data:x/1.jpg", "data:x/ .jpg"]
    for number, name in enumerate(names):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    (tmp_path / "other").mkdir()
    dataset = scan(DataOptions(data=str(tmp_path / "data")))
    prints = fingerprint(dataset.samples, 2, Silent())
    splits = assign_splits(dataset.samples, prints, val_fraction=0.3, split_seed=0)
    output = str(tmp_path / place)
    rows = listing_rows(dataset, splits, range(len(splits)), output)
    write_listing(output, rows, overwrite=False)
    again = scan(DataOptions(data=output, allow_outside_root=place.startswith("other")))
    assert again.class_names == dataset.class_names
    assert {sample.path: sample.split for sample in again.samples} == {
        sample.path: split for sample, split in zip(dataset.samples, splits, strict=True)
    } or place.startswith("other")
    assert sorted(Path(sample.path).resolve() for sample in again.samples) == sorted(
        Path(sample.path) for sample in dataset.samples
    )


@pytest.mark.real
def test_flowers_have_a_fifth_held_out(real_assets: Path) -> None:
    dataset = scan(DataOptions(data=str(real_assets / "flowers")))
    prints = fingerprint(dataset.samples, 2, Silent())
    splits = assign_splits(dataset.samples, prints, val_fraction=0.2, split_seed=0)
    assert Counter(splits)["val"] / len(splits) == pytest.approx(0.2, abs=0.02)
