"""Hashing of image files, and the split that depends on content alone.

An image is val iff a hash of its content (or of its group) with the split seed falls below the val fraction.
So the split does not depend on file names, on order or on what else is in the folder: adding files never
moves old ones, and copies of an image are always on the same side. The exceptions, all of them:

- A class with two or more different images but none in val gives the one with the lowest hash.
- A class whose images all fell in val gets the one with the highest hash back, since train owns the classes.
- Groups that share an image count as one group.

With a test fraction the images with the highest hashes are test, by the same rules.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tlcli.data.dataset import Dataset, Sample
from tlcli.data.image_files import DecodeError, read_bytes
from tlcli.data.listing import Row, spreadsheet_cell
from tlcli.errors import DataError, UsageError
from tlcli.progress import Progress

T = TypeVar("T")

# Files handed to the threads at once: bounds the memory of waiting results, long enough not to starve them.
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies an image's content.

    Attributes:
        sha256: Hex digest of the file's bytes, or None when they could not be read.
        num_bytes: Size of the file; 0 when it could not be read.
        reason: Why it could not be read, or None.
    """

    sha256: str | None
    num_bytes: int
    reason: str | None


def fingerprint(samples: Sequence[Sample], workers: int, progress: Progress) -> list[Fingerprint]:
    """Return the fingerprint of every sample, in order; each file is read once.

    Args:
        samples: What to read.
        workers: Number of threads.
        progress: Told of every file.
    """
    return list(map_threads(lambda sample: _fingerprint(sample.path), samples, workers, "hashing", progress))


def map_threads(
    function: Callable[[Sample], T], samples: Sequence[Sample], workers: int, stage: str, progress: Progress
) -> Iterator[T]:
    """Yield `function(sample)` for every sample, in order, computed by `workers` threads.

    Only about two thousand results wait at a time. Ctrl-C stops after the files in work.
    """
    progress.start(stage, len(samples))
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tlcli-data")
    try:
        for start in range(0, len(samples), _CHUNK):
            for result in pool.map(function, samples[start : start + _CHUNK]):
                progress.advance()
                yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.finish()


def digest(data: bytes) -> Fingerprint:
    """Return the fingerprint of bytes already read."""
    return Fingerprint(hashlib.sha256(data).hexdigest(), len(data), None)


def assign_splits(
    samples: Sequence[Sample],
    fingerprints: Sequence[Fingerprint],
    *,
    val_fraction: float,
    split_seed: int,
    test_fraction: float = 0.0,
) -> list[str]:
    """Return "train", "val" or "test" for every sample, unreadable ones included.

    Splits that the data names are kept. Where it names no val image, the train pool (blank or train) is
    divided by the rule at the top of this module. A test split is held out only when asked for: of what then
    is train, the images with the highest hashes, so that val stays what it is. Unreadable images have no
    content to hash and stay in train unless their group goes elsewhere.

    Args:
        samples: All of the data set.
        fingerprints: One a sample, in the same order.
        val_fraction: Share of the pool to hold out, in [0, 1].
        split_seed: Changes which images are held out.
        test_fraction: Share of the pool to hold out as test, in [0, 1 - val_fraction).

    Raises:
        DataError: A test split is asked for, and the data names one.
        UsageError: The fractions leave nothing to train on.
    """
    splits = [sample.split or "train" for sample in samples]
    if test_fraction and "test" in splits:
        raise DataError(
            f"--test-fraction {test_fraction:g} would hold out a test split, and the data has one.",
            hint="Leave --test-fraction out.",
        )
    if "val" not in splits and val_fraction + test_fraction >= 1:
        raise UsageError(
            f"--val-fraction {val_fraction:g} and --test-fraction {test_fraction:g} leave nothing to train "
            "on.",
            hint="Let their sum be below 1.",
        )
    wanted = [] if "val" in splits else [("val", val_fraction)]
    wanted += [("test", test_fraction)] if test_fraction else []
    for name, fraction in wanted:
        pool = [index for index, split in enumerate(splits) if split == "train"]
        blocks = _blocks(samples, fingerprints, pool)
        draws = {block: _draw(block, split_seed) for block in blocks}
        if name == "test":
            draws = {block: 1 - draw for block, draw in draws.items()}
        held_out = {block for block, draw in draws.items() if draw < fraction}
        _adjust(_Stock(samples, fingerprints, blocks), draws, held_out)
        for block in held_out:
            for index in blocks[block]:
                splits[index] = name
    return splits


def connected(samples: Sequence[Sample], fingerprints: Sequence[Fingerprint]) -> list[str | None]:
    """Return a key for every sample: equal for what must stay together, copies of an image and groups.

    Groups that share an image are one. The key is the content hash, or the first of the groups' names; None
    where there is neither content nor group.
    """
    parents: dict[str, str] = {}

    def find(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    keys = []
    for sample, found in zip(samples, fingerprints, strict=True):
        own = [f"group {sample.group}"] if sample.group is not None else []
        own += [f"image {found.sha256}"] if found.sha256 is not None else []
        if own:
            # "group ..." sorts before "image ...", and the smaller key becomes the root: the block's key.
            first, second = sorted((find(own[0]), find(own[-1])))
            parents[second] = first
        keys.append(own[0] if own else None)
    return [None if key is None else find(key) for key in keys]


def limit_per_class(
    samples: Sequence[Sample], fingerprints: Sequence[Fingerprint], splits: Sequence[str], n: int
) -> list[int]:
    """Return the indices of a few-shot subset, ascending: all of val and test, and `n` a class of train.

    Of train, the images with the lowest content hash are taken, so that subsets of rising size contain each
    other. Copies of an image count once and only the first by name is taken; unreadable images are not.
    """
    chosen: dict[int | None, dict[str, int]] = defaultdict(dict)
    kept = [index for index, split in enumerate(splits) if split != "train"]
    in_train = [index for index, split in enumerate(splits) if split == "train"]
    for index in sorted(in_train, key=lambda index: samples[index].name):
        sha256 = fingerprints[index].sha256
        if sha256 is not None:
            chosen[samples[index].label].setdefault(sha256, index)
    for images in chosen.values():
        kept += [images[sha256] for sha256 in sorted(images)[:n]]
    return sorted(kept)


def listing_rows(dataset: Dataset, splits: Sequence[str], indices: Sequence[int], output: str) -> list[Row]:
    """Return the rows of a CSV file that holds the split of `indices` and can itself be used as data.

    Args:
        dataset: The data set.
        splits: One a sample of the data set.
        indices: Which samples to list.
        output: The file to be written; file names become relative to its folder, and begin with ".." where
            the images lie outside of it.
    """
    folder = os.path.dirname(os.path.abspath(output))
    rows = []
    for index in indices:
        sample = dataset.samples[index]
        filename = os.path.relpath(sample.path, folder)
        # A name such as "data:1.jpg" must not be taken for a URL, nor "=1.jpg" for a spreadsheet's formula.
        odd = ":" in filename.partition("/")[0] or spreadsheet_cell(filename) != filename
        filename = f"./{filename}" if odd else filename
        label = "" if sample.label is None else dataset.class_names[sample.label]
        rows.append(Row(0, filename, label, splits[index], sample.group or ""))
    return rows


def _fingerprint(path: str) -> Fingerprint:
    try:
        return digest(read_bytes(path))
    except DecodeError as error:
        return Fingerprint(None, 0, error.reason)


def _draw(block: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the block's key and the seed alone."""
    hashed = hashlib.sha256(f"tlcli split {seed} {block}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(hashed[:7], "big") / 2**56


def _blocks(
    samples: Sequence[Sample], fingerprints: Sequence[Fingerprint], pool: Sequence[int]
) -> dict[str, list[int]]:
    """Return key -> indices of what must stay together; see `connected`."""
    keys = connected([samples[index] for index in pool], [fingerprints[index] for index in pool])
    blocks: dict[str, list[int]] = defaultdict(list)
    for index, key in zip(pool, keys, strict=True):
        if key is not None:
            blocks[key].append(index)
    return dict(blocks)


class _Stock:
    """Which readable classes each block holds, and which blocks hold each class."""

    def __init__(
        self,
        samples: Sequence[Sample],
        fingerprints: Sequence[Fingerprint],
        blocks: dict[str, list[int]],
    ) -> None:
        self.classes: dict[str, set[int | None]] = {}
        self.blocks: dict[int | None, set[str]] = defaultdict(set)
        for block, indices in blocks.items():
            readable = {samples[index].label for index in indices if fingerprints[index].sha256 is not None}
            self.classes[block] = readable
            for label in readable:
                self.blocks[label].add(block)


def _adjust(stock: _Stock, draws: dict[str, float], held_out: set[str]) -> None:
    """Give every class an image in train, then, where it has two blocks, one in val; changes `held_out`."""

    def in_train(label: int | None) -> set[str]:
        return stock.blocks[label] - held_out

    labels = sorted(stock.blocks, key=lambda label: -1 if label is None else label)
    for label in labels:
        if not in_train(label):
            held_out.remove(max(stock.blocks[label], key=lambda block: (draws[block], block)))
    for label in labels:
        if stock.blocks[label] & held_out:
            continue
        for block in sorted(stock.blocks[label], key=lambda block: (draws[block], block)):
            # Giving it must leave no class without training images.
            if all(in_train(other) - {block} for other in stock.classes[block]):
                held_out.add(block)
                break
