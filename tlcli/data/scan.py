"""From a folder or a CSV file to a Dataset: which images there are, of which class, in which split.

The result depends on names alone, never on the order in which the file system lists them or on the locale:
everything is sorted by code point. Only names and links are looked at here; files are opened later, by
decode.read_bytes. What is left out is counted by reason, so that nothing disappears silently.

In a folder a file is an image iff its name ends in one of IMAGE_EXTENSIONS, in capitals or not; a file that a
CSV names is taken whatever its name. What a file really holds is told by its first bytes when it is decoded.
"""

import difflib
import errno
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlcli.data.listing import DELIMITERS, Problems, Row, not_utf8, read_rows
from tlcli.errors import DataError, StorageError, UsageError
from tlcli.option_groups import DataOptions

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
UNSUPPORTED_EXTENSIONS = frozenset(
    {
        ".heic",
        ".heif",
        ".avif",
        ".svg",
        ".psd",
        ".eps",
        ".jp2",
        ".j2k",
        ".jxl",
        ".ico",
        ".dng",
        ".cr2",
        ".cr3",
    }
    | {".nef", ".arw", ".dcm", ".fits", ".exr", ".hdr", ".tga", ".dds"}
)
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_LITTER = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "__pycache__", "lost+found"}
    | {"$recycle.bin", "system volume information"}
)
_LAYOUT_HINT = (
    "Expected one folder a class with images in it, or train/ and val/ above such folders, or a CSV file "
    "with the columns filename,label."
)
_OUTSIDE = "links that leave the data folder"
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


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
        warnings: What the user should know, a line each.
    """

    root: Path
    kind: Literal["folder", "split-folder", "csv"]
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: Mapping[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """An image with its class still by name."""

    path: str
    name: str
    label: str
    split: str | None
    group: str | None = None


def scan(options: DataOptions, *, class_names: Sequence[str] | None = None) -> Dataset:
    """Return the data set that `options` name.

    Args:
        options: Where the data is, and the CSV columns.
        class_names: Classes of a finished run, to measure it on this data; otherwise train owns the list.

    Raises:
        UsageError: No data was named.
        DataError: The data is missing, empty, of one class, or contradicts itself.
        StorageError: A folder or file cannot be read.
    """
    if not options.data:
        raise UsageError("DATA is missing.", hint=_LAYOUT_HINT)
    path = os.path.abspath(os.path.expanduser(options.data))
    if not os.path.lexists(path):
        raise DataError(f"There is no {options.data!r}.", hint=_nearest(path))
    if os.path.isdir(path):
        return _scan_folder(path, options, class_names)
    if not os.path.isfile(path):
        raise DataError(f"{options.data!r} is neither a folder nor a regular file.", hint=_LAYOUT_HINT)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in DELIMITERS:
        archive = suffix in {".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z", ".rar"}
        raise DataError(
            f"{options.data!r} is a file, expected a folder or a file that ends in .csv or .tsv.",
            hint="Unpack the archive and name its folder." if archive else _LAYOUT_HINT,
        )
    return _scan_csv(path, options, class_names)


def find_images(paths: Iterable[str | Path]) -> list[Sample]:
    """Return the images to predict: files as named, and all images below folders, without labels.

    A named file is taken whatever its extension, also when it is missing: reading it says so. Folders follow
    the rules of `scan`. Each path is listed once, in the order given; within a folder sorted by name.

    Raises:
        StorageError: A folder cannot be listed.
    """
    samples: dict[str, Sample] = {}
    for given in (os.fspath(path) for path in paths):
        if os.path.isdir(given):
            walker = _Walker(given, allow_outside_root=True)
            found = [(path, os.path.join(given, name)) for path, name in walker.files]
        else:
            found = [(os.path.abspath(given), given)]
        for path, name in found:
            samples.setdefault(path, Sample(path=path, name=name))
    return list(samples.values())


# ---- folders ----------------------------------------------------------------------------------------------


class _Walker:
    """Lists the images below a folder, every real directory once.

    Attributes:
        files: (path, name relative to the root) of every image, sorted by name.
        folders: Names of the folders seen, links to folders included.
        ignored: Reason -> count.
    """

    def __init__(self, root: str, *, allow_outside_root: bool) -> None:
        self.root = os.path.abspath(root)
        self.real_root = os.path.realpath(root)
        self.allow_outside_root = allow_outside_root
        self.files: list[tuple[str, str]] = []
        self.folders: set[str] = set()
        self.ignored: Counter[str] = Counter()
        self._visited: set[tuple[int, int]] = set()
        self._folders_ahead = [""]
        # Links come after all real folders, so that a folder is listed under its own name where it has one.
        self._links_ahead: list[str] = []
        while self._folders_ahead or self._links_ahead:
            if self._folders_ahead:
                self._list(self._folders_ahead.pop())
            else:
                self._links_ahead.sort()
                self._list(self._links_ahead.pop(0))
        self.files.sort(key=lambda item: item[1])

    def _list(self, name: str) -> None:
        path = os.path.join(self.root, name) if name else self.root
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in self._visited:
                self.ignored["links to folders already listed"] += 1
                return
            self._visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    self._take(entry, f"{name}/{entry.name}" if name else entry.name)
        except FileNotFoundError:
            self.ignored["folders that vanished during the scan"] += 1
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise DataError(
                    f"A folder below {name[:100]!r} cannot be listed: its path of {len(os.fsencode(path)):,} "
                    "bytes is longer than the system allows.",
                    hint="Move the data up, or give its folders shorter names.",
                ) from error
            raise StorageError(
                f"Folder {path!r} cannot be listed: {error.strerror}.",
                hint="Give yourself permission to read it, or move it out of the data folder.",
            ) from error

    def _take(self, entry: os.DirEntry[str], name: str) -> None:
        if entry.name.startswith("."):
            self.ignored["dot-files and dot-folders"] += 1
        elif entry.name.lower() in _LITTER:
            self.ignored["system litter"] += 1
        elif entry.is_symlink():
            self._take_link(entry, name)
        elif entry.is_dir():
            self.folders.add(name)
            self._folders_ahead.append(name)
        elif entry.is_file():
            self._take_file(entry.path, name)
        else:
            self.ignored["not regular files"] += 1

    def _take_link(self, entry: os.DirEntry[str], name: str) -> None:
        target = os.path.realpath(entry.path)
        if not os.path.exists(target):
            self.ignored["broken links"] += 1
        elif not self.allow_outside_root and not _inside(target, self.real_root):
            self.ignored[_OUTSIDE] += 1
        elif os.path.isdir(target):
            self.folders.add(name)
            self._links_ahead.append(name)
        elif os.path.isfile(target):
            self._take_file(entry.path, name)
        else:
            self.ignored["not regular files"] += 1

    def _take_file(self, path: str, name: str) -> None:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in IMAGE_EXTENSIONS:
            self.files.append((path, name))
        elif suffix in UNSUPPORTED_EXTENSIONS:
            self.ignored[f"image formats that are not supported ({suffix})"] += 1
        else:
            self.ignored["files without an image extension"] += 1


def _scan_folder(path: str, options: DataOptions, class_names: Sequence[str] | None) -> Dataset:
    walker = _Walker(path, allow_outside_root=options.allow_outside_root)
    split_tree = any(name.startswith("train/") and name.count("/") == 1 for name in walker.folders)
    splits: Mapping[str, str | None] = _split_folders(path, walker.folders) if split_tree else {"": None}
    depth = 2 if split_tree else 1  # of class folders
    found: list[_Found] = []
    strays: Counter[str] = Counter()
    for file_path, name in walker.files:
        parts = name.split("/")
        top = parts[0] if split_tree else ""
        if len(parts) <= depth:
            strays["images outside class folders"] += 1
        elif top not in splits:
            strays["images outside train/, val/ and test/"] += 1
        else:
            label = sys.intern(parts[depth - 1])  # one string a class, not one an image
            found.append(_Found(file_path, name, label, split=splits[top]))
    ignored = walker.ignored + strays
    if not found:
        raise DataError(f"No images in {options.data!r}{_counts(ignored)}.", hint=_layout_hint(walker))
    if not split_tree:
        _refuse_misread_splits(options, {item.label for item in found})
    warnings = _walk_warnings(ignored)
    holding = {"/".join(item.name.split("/", depth)[:depth]) for item in found}
    for name in sorted(walker.folders - holding):
        if name.count("/") == depth - 1 and (not split_tree or name.split("/")[0] in splits):
            warnings.append(f"Folder {name!r} holds no images: no class is made of it.")
    kind: Literal["folder", "split-folder"] = "split-folder" if split_tree else "folder"
    names = _own_classes(options, found, class_names, _layout_hint(walker))
    return _dataset(Path(path), kind, names, found, (ignored, warnings))


def _split_folders(path: str, folders: Iterable[str]) -> dict[str, str]:
    """Return top folder -> split for a split tree."""
    found = {name: SPLIT_NAMES[name] for name in folders if name in SPLIT_NAMES}
    several = sorted(name for name, split in found.items() if split == "val")
    if len(several) > 1:
        raise DataError(
            f"{path!r} has several val splits: {', '.join(several)}.", hint="Keep one of these folders."
        )
    return found


def _refuse_misread_splits(options: DataOptions, classes: set[str]) -> None:
    """Refuse a folder whose classes would be called train and test: its layout was misunderstood."""
    words = {*SPLIT_NAMES, "training", "testing", "eval", "dev"}
    if {name.lower() for name in classes} <= words:
        raise DataError(
            f"The folders of {options.data!r} are named like splits, not classes: {_names(sorted(classes))}.",
            hint="In a split tree train/ (small letters) holds one folder a class, val/ and test/ likewise.",
        )


def _layout_hint(walker: _Walker) -> str:
    """Return what to do about a folder in which too little was found."""
    if walker.ignored[_OUTSIDE]:
        return "Links lead out of the data folder; --allow-outside-root follows them."
    tops = sorted(name for name in walker.folders if "/" not in name)
    below = [name for name in walker.folders if name.count("/") == 1]
    if len(tops) == 1 and len(below) > 1:
        return f"Did you mean {os.path.join(walker.root, tops[0])!r}?"
    return _LAYOUT_HINT


def _walk_warnings(ignored: Mapping[str, int]) -> list[str]:
    """Return warnings for what was left out though it looks like an image."""
    hints = {
        _OUTSIDE: " (--allow-outside-root follows them)",
        "image formats": " (convert them to JPEG or PNG)",
        "images outside": "",
        "broken links": "",
        "not regular files": "",
    }
    return [
        f"Ignored {reason}: {count}{hint}."
        for reason, count in sorted(ignored.items())
        for beginning, hint in hints.items()
        if reason.startswith(beginning)
    ]


# ---- CSV --------------------------------------------------------------------------------------------------


def _scan_csv(path: str, options: DataOptions, class_names: Sequence[str] | None) -> Dataset:
    rows = read_rows(path, options)
    root = os.path.dirname(path)
    problems = Problems(path)
    inside = _Containment(root, options.allow_outside_root)
    found: dict[str, tuple[Row, _Found]] = {}
    ignored: Counter[str] = Counter()
    for row in rows:
        complaint = _row_complaint(row) or inside.complaint(row.filename)
        if complaint:
            problems.add(row.line, complaint)
            continue
        name = _existing_form(root, os.path.normpath(row.filename))
        split = SPLIT_NAMES[row.split.strip().lower()] if row.split.strip() else None
        item = _Found(os.path.join(root, name), name, row.label, split, row.group or None)
        before = found.setdefault(item.path, (row, item))
        if before[1] is item:
            continue
        if before[1] == item:
            ignored["repeated rows"] += 1
        else:
            problems.add(row.line, _contradiction(before[0], before[1], item))
    problems.check(_csv_hint(problems))
    if not found:
        raise DataError(f"{path!r} lists no images.", hint="Expected a line an image below the header.")
    items = [item for _, item in found.values()]
    if not any(os.path.lexists(item.path) for item in items):
        raise DataError(
            f"None of the {len(items)} files that {path!r} lists is there, for example {items[0].path!r}.",
            hint="Paths are relative to the folder of the CSV file.",
        )
    warnings = [f"Ignored {ignored['repeated rows']} repeated rows of {path!r}."] if ignored else []
    names = _own_classes(options, items, class_names, "Expected two or more different labels.")
    return _dataset(Path(root), "csv", names, items, (ignored, warnings))


def _row_complaint(row: Row) -> str | None:
    if not row.filename.strip():
        return "no filename"
    if not row.label.strip():
        return f"no label for {row.filename!r}"
    if _URL.match(row.filename):
        return f"{row.filename!r} is a URL; tlcli reads files of this machine only"
    if not_utf8(row.label):
        return f"label {row.label!r} is not UTF-8 text"
    if row.split.strip() and row.split.strip().lower() not in SPLIT_NAMES:
        return f"split {row.split!r}, expected {', '.join(SPLIT_NAMES)} or nothing"
    return None


def _contradiction(row: Row, before: _Found, now: _Found) -> str:
    if before.label != now.label:
        return (
            f"{now.name!r} has label {now.label!r}, on line {row.line} {before.label!r} "
            "(one class an image; several are out of scope)"
        )
    if before.split != now.split:
        return (
            f"{now.name!r} is in split {now.split or 'blank'}, on line {row.line} {before.split or 'blank'}"
        )
    return f"{now.name!r} has group {now.group!r}, on line {row.line} {before.group!r}"


def _csv_hint(problems: Problems) -> str | None:
    text = " ".join(problems.lines)
    if "outside the folder" in text:
        return "--allow-outside-root lets a CSV file name files anywhere on this machine."
    if "is not UTF-8" in text:
        return "Convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD.csv > NEW.csv"
    return None


class _Containment:
    """Tells whether a listed file lies below the root, links resolved; each folder is resolved once."""

    def __init__(self, root: str, allow_outside_root: bool) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.allow_outside_root = allow_outside_root
        self._real_folders: dict[str, str] = {}

    def complaint(self, filename: str) -> str | None:
        """Return why `filename` must not be read, or None."""
        if self.allow_outside_root:
            return None
        normal = os.path.normpath(filename)
        path = os.path.join(self.root, normal)
        folder = os.path.dirname(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], os.path.basename(path))
        if os.path.islink(path):
            real = os.path.realpath(path)
        above = normal.split("/")[0] == ".."
        # An absolute path is refused even below the root: such a list breaks when the folder is moved.
        if os.path.isabs(filename) or above or not _inside(real, self.real_root):
            return f"{filename!r} lies outside the folder of the CSV file"
        return None


def _existing_form(root: str, name: str) -> str:
    """Return `name` in the Unicode form in which the file exists; systems write accents differently."""
    if name.isascii() or os.path.lexists(os.path.join(root, name)):
        return name
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if os.path.lexists(os.path.join(root, other)):
            return other
    return name


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


def _own_classes(
    options: DataOptions, found: Sequence[_Found], class_names: Sequence[str] | None, hint: str
) -> tuple[str, ...]:
    """Return the class list, having checked every image's class against it; `hint` is for a single class."""
    labels = {(item.split, item.label) for item in found}
    if class_names is not None:
        index = _ClassIndex(class_names)
        if unknown := sorted({label for _, label in labels if index.find(label) is None}):
            raise DataError(
                f"{options.data!r} has classes the run does not know: {_names(unknown)}.",
                hint=f"The run's classes are {_names(class_names)}.",
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
                f"The {wanted} split has classes that train does not have: {_names(unknown)}.",
                hint=f"Train has {_names(names)}. Rename them, or add training images.",
            )
    if len(names) == 1:
        raise DataError(
            f"{options.data!r} has one class, {names[0]!r}; a classifier needs two or more.", hint=hint
        )
    return tuple(names)


def _dataset(
    root: Path,
    kind: Literal["folder", "split-folder", "csv"],
    class_names: tuple[str, ...],
    found: Iterable[_Found],
    left_out: tuple[Mapping[str, int], Sequence[str]],
) -> Dataset:
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


def _near_duplicates(class_names: Sequence[str]) -> list[str]:
    """Return warnings for classes that differ in case, spaces, leading zeros or Unicode form alone."""
    alike: dict[str, list[str]] = {}
    for name in class_names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        alike.setdefault(_LEADING_ZEROS.sub("", key), []).append(name)
    return [
        f"Classes {_names(names)} differ only in case, spaces, leading zeros or Unicode form; "
        "they stay different classes."
        for names in alike.values()
        if len(names) > 1
    ]


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _counts(ignored: Mapping[str, int]) -> str:
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items()))
    return f" (ignored: {listed})" if listed else ""


def _nearest(path: str) -> str:
    """Return a hint with the entry most like the missing `path`."""
    parent, name = os.path.split(path)
    while parent != "/" and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        with os.scandir(parent) as entries:  # of a very large folder a part has to do
            near = difflib.get_close_matches(name, [e.name for e in itertools.islice(entries, 5000)], n=1)
    except OSError:
        near = []
    if near:
        return f"Did you mean {os.path.join(parent, near[0])!r}?"
    return f"{parent!r} is there, but holds nothing of a name like {name!r}."
