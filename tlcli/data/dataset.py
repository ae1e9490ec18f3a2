"""The images of one data set before any was opened, and how class names become labels."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlcli.config.data import DataOptions
from tlcli.errors import DataError
from tlcli.warned import Warned

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
LAYOUT_HINT = (
    "Expected one folder a class with images in it, or train/ and val/ above such folders, or a CSV file "
    "with the columns filename,label."
)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        path: Absolute path, to open it.
        name: Unique name to show: the path relative to the data folder, with slashes. May hold any character
            but NUL, bytes that are no UTF-8 as surrogate escapes: quote it before printing.
        label: Index into the class names, or None when unknown.
        split: "train", "val" or "test" as the data says; None for the train pool still to be divided.
        group: Images of one group stay in one split; None for an image on its own.
    """

    path: str
    name: str
    label: int | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Dataset:
    """The images of one data set, before any was opened.

    Attributes:
        root: The folder, or the folder of the CSV file.
        kind: How the data is laid out.
        class_names: In code point order; owned by the train split.
        samples: Sorted by name.
        ignored: Reason -> how many files or folders were left out.
        warnings: What the user should know.
    """

    root: Path
    kind: Literal["folder", "split-folder", "csv"]
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: Mapping[str, int]
    warnings: tuple[Warned, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """An image with its class still by name."""

    path: str
    name: str
    label: str
    split: str | None
    group: str | None = None


# ---- both -------------------------------------------------------------------------------------------------


class _ClassIndex:
    """Finds the class of a label, also where the two are written in different Unicode forms."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._exact = {name: number for number, name in enumerate(class_names)}
        self._by_form: dict[str, int] = {}
        for name, number in self._exact.items():
            self._by_form.setdefault(unicodedata.normalize("NFC", name), number)

    def find(self, label: str) -> int | None:
        """Return the index of the class called `label`, or None."""
        number = self._exact.get(label)
        return self._by_form.get(unicodedata.normalize("NFC", label)) if number is None else number


def own_classes(
    options: DataOptions, found: Sequence[Found], class_names: Sequence[str] | None, hint: str
) -> tuple[str, ...]:
    """Return the class list, having checked every image's class against it; `hint` is for a single class."""
    labels = {(item.split, item.label) for item in found}
    if class_names is not None:
        index = _ClassIndex(class_names)
        if unknown := sorted({label for _, label in labels if index.find(label) is None}):
            raise DataError(
                f"{options.data!r} has classes the run does not know: {names_text(unknown)}.",
                hint=f"The run's classes are {names_text(class_names)}.",
            )
        return tuple(class_names)
    names = sorted({label for split, label in labels if split in (None, "train")})
    if not names:
        raise DataError(
            f"{options.data!r} has no training images.",
            hint="Mark some as train, or leave their split blank.",
        )
    index = _ClassIndex(names)
    for wanted in ("val", "test"):
        if unknown := sorted({lb for split, lb in labels if split == wanted and index.find(lb) is None}):
            raise DataError(
                f"The {wanted} split has classes that train does not have: {names_text(unknown)}.",
                hint=f"Train has {names_text(names)}. Rename them, or add training images.",
            )
    if len(names) == 1:
        raise DataError(
            f"{options.data!r} has one class, {names[0]!r}; a classifier needs two or more.", hint=hint
        )
    return tuple(names)


def make_dataset(
    root: Path,
    kind: Literal["folder", "split-folder", "csv"],
    class_names: tuple[str, ...],
    found: Iterable[Found],
    left_out: tuple[Mapping[str, int], Sequence[Warned]],
) -> Dataset:
    """Return the data set of images whose classes are known by name."""
    index = _ClassIndex(class_names)
    samples = [Sample(item.path, item.name, index.find(item.label), item.split, item.group) for item in found]
    ignored, warnings = left_out
    return Dataset(
        root=root,
        kind=kind,
        class_names=class_names,
        samples=tuple(sorted(samples, key=lambda sample: sample.name)),
        ignored=dict(sorted(ignored.items())),
        warnings=(*warnings, *_near_duplicates(class_names)),
    )


def _near_duplicates(class_names: Sequence[str]) -> list[Warned]:
    """Return warnings for classes that differ in case, spaces, leading zeros or Unicode form alone."""
    alike: dict[str, list[str]] = {}
    for name in class_names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        alike.setdefault(_LEADING_ZEROS.sub("", key), []).append(name)
    return [
        Warned(
            "similar_class_names",
            f"Classes {names_text(names)} differ only in case, spaces, leading zeros or Unicode form; "
            "they stay different classes.",
        )
        for names in alike.values()
        if len(names) > 1
    ]


def is_inside(path: str, root: str) -> bool:
    """Return whether a real path lies in a real folder."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def names_text(names: Sequence[str]) -> str:
    """Return a few names as text, quoted."""
    shown = ", ".join(repr(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def counts_text(ignored: Mapping[str, int]) -> str:
    """Return what was left out, by reason, as the end of a sentence."""
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items()))
    return f" (ignored: {listed})" if listed else ""
