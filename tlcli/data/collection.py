"""A data set with its content hashes and its split: what every command that looks at images begins with."""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.config.data import DataOptions
from tlcli.data.dataset import Dataset, Sample
from tlcli.data.scan import scan
from tlcli.data.split import Fingerprint, assign_splits, connected, fingerprint, limit_per_class
from tlcli.progress import Progress
from tlcli.warned import warn


@dataclass(frozen=True)
class Collection:
    """The images that a command works on.

    Attributes:
        dataset: Only the images in use: with a limit per class, the chosen ones.
        fingerprints: One a sample.
        splits: "train", "val" or "test" for each sample.
        named_splits: Whether the data itself says which images are val or test.
    """

    dataset: Dataset
    fingerprints: list[Fingerprint]
    splits: list[str]
    named_splits: bool

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return the images in use, sorted by name."""
        return self.dataset.samples

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all image files."""
        return sum(found.num_bytes for found in self.fingerprints)

    def num_images(self) -> dict[str, int]:
        """Return the number of images of each split."""
        counts = Counter(self.splits)
        return {name: counts[name] for name in ("train", "val", "test")}

    def digest(self) -> str:
        """Return SHA-256 over name, content, class and split of every image: equal for equal data."""
        lines = (
            f"{sample.name}\0{found.sha256}\0{sample.label}\0{split}\n"
            for sample, found, split in zip(self.samples, self.fingerprints, self.splits, strict=True)
        )
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def select(self, indices: Sequence[int]) -> "Collection":
        """Return the collection of the samples at `indices`."""
        samples = tuple(self.dataset.samples[index] for index in indices)
        return Collection(
            dataclasses.replace(self.dataset, samples=samples),
            [self.fingerprints[index] for index in indices],
            [self.splits[index] for index in indices],
            self.named_splits,
        )


def collect(
    options: DataOptions, workers: int, progress: Progress, *, class_names: Sequence[str] | None = None
) -> Collection:
    """Scan and hash the images that `options` name, and split them.

    Args:
        options: Where the data is and how it is split.
        workers: Threads that read files.
        progress: Told of every file.
        class_names: Classes of a finished run; otherwise the train split owns the list.

    Raises:
        UsageError: No data was named.
        DataError: The data is missing, empty or contradicts itself.
        StorageError: A folder or file cannot be read.
    """
    dataset = scan(options, class_names=class_names)
    for warning in dataset.warnings:
        warn(warning.code, warning.message)
    fingerprints = fingerprint(dataset.samples, workers, progress)
    splits = assign_splits(
        dataset.samples,
        fingerprints,
        val_fraction=options.val_fraction,
        split_seed=options.split_seed,
        test_fraction=options.test_fraction,
    )
    _warn_of_copies(dataset.samples, fingerprints, splits)
    named = any(sample.split in {"val", "test"} for sample in dataset.samples)
    collection = Collection(dataset, fingerprints, splits, named)
    if options.limit_per_class is None:
        return collection
    return collection.select(limit_per_class(dataset.samples, fingerprints, splits, options.limit_per_class))


def _warn_of_copies(
    samples: Sequence[Sample], fingerprints: Sequence[Fingerprint], splits: Sequence[str]
) -> None:
    """Tell of images that contradict each other, or are in the training data and measured on."""
    labels: dict[str, set[int | None]] = defaultdict(set)
    sides: dict[str, set[str]] = defaultdict(set)
    for sample, found, split in zip(samples, fingerprints, splits, strict=True):
        if found.sha256 is not None:
            labels[found.sha256].add(sample.label)
            sides[found.sha256].add(split)
    more = "such; `tlcli data check` names them"
    if count := sum(len(value) > 1 for value in labels.values()):
        text = "conflicting labels: the same image in more than one class"
        warn("conflicting_labels", f"{text} ({count} {more})")
    if count := sum(len(value) > 1 for value in sides.values()):
        text = "leakage: the same image in more than one split, so what is measured on it is memory"
        warn("leakage", f"{text} ({count} {more})")


def labels_of(collection: Collection) -> Tensor:
    """Return the labels of a collection, int64 [N]."""
    return torch.tensor([sample.label for sample in collection.samples], dtype=torch.int64)


def groups_of(part: Collection) -> Tensor:
    """Return a number a sample, int64 [N]: equal for copies of an image and for images of one group.

    Groups that share an image have one number, as the split keeps them together.
    """
    numbers: dict[str, int] = {}
    keys = connected(part.samples, part.fingerprints)
    return torch.tensor(
        [numbers.setdefault(key or f"alone {index}", len(numbers)) for index, key in enumerate(keys)],
        dtype=torch.int64,
    )
