"""From a folder to a Dataset: one folder a class, below train/, val/ and test/ or not.

In a folder a file is an image if its name ends in one of IMAGE_EXTENSIONS, in capitals or not. What it
really holds is decided by its first bytes when it is decoded. What is left out is counted by reason.
"""

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tlcli.config.data import DataOptions
from tlcli.data.dataset import (
    LAYOUT_HINT,
    SPLIT_NAMES,
    Dataset,
    Found,
    Sample,
    counts_text,
    is_inside,
    make_dataset,
    names_text,
    own_classes,
)
from tlcli.errors import DataError
from tlcli.machine import files
from tlcli.warned import Warned

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
_LITTER = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "__pycache__", "lost+found"}
    | {"$recycle.bin", "system volume information"}
)
_OUTSIDE = "links that leave the data folder"


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
            hint = "Give yourself permission to read it, or move it out of the data folder."
            raise files.storage_error("list folder", path, error, hint=hint) from error

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
        elif not self.allow_outside_root and not is_inside(target, self.real_root):
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


def scan_folder(path: str, options: DataOptions, class_names: Sequence[str] | None) -> Dataset:
    """Return the data set in a folder.

    Args:
        path: The folder, absolute.
        options: As given.
        class_names: Classes of a finished run, or None.

    Raises:
        DataError: It holds no images, one class, or contradicts itself.
        StorageError: A folder cannot be listed.
    """
    walker = _Walker(path, allow_outside_root=options.allow_outside_root)
    split_tree = any(name.startswith("train/") and name.count("/") == 1 for name in walker.folders)
    splits: Mapping[str, str | None] = _split_folders(path, walker.folders) if split_tree else {"": None}
    depth = 2 if split_tree else 1  # of class folders
    found: list[Found] = []
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
            found.append(Found(file_path, name, label, split=splits[top]))
    ignored = walker.ignored + strays
    if not found:
        raise DataError(f"No images in {options.data!r}{counts_text(ignored)}.", hint=_layout_hint(walker))
    if not split_tree:
        _refuse_misread_splits(options, {item.label for item in found})
    warnings = _walk_warnings(ignored)
    holding = {"/".join(item.name.split("/", depth)[:depth]) for item in found}
    for name in sorted(walker.folders - holding):
        if name.count("/") == depth - 1 and (not split_tree or name.split("/")[0] in splits):
            text = f"Folder {name!r} holds no images: no class is made of it."
            warnings.append(Warned("empty_class_folder", text))
    kind: Literal["folder", "split-folder"] = "split-folder" if split_tree else "folder"
    names = own_classes(options, found, class_names, _layout_hint(walker))
    return make_dataset(Path(path), kind, names, found, (ignored, warnings))


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
            f"The folders of {options.data!r} are named like splits, not classes: "
            f"{names_text(sorted(classes))}.",
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
    return LAYOUT_HINT


def _walk_warnings(ignored: Mapping[str, int]) -> list[Warned]:
    """Return warnings for what was left out though it looks like an image."""
    hints = {
        _OUTSIDE: " (--allow-outside-root follows them)",
        "image formats": " (convert them to JPEG or PNG)",
        "images outside": "",
        "broken links": "",
        "not regular files": "",
    }
    return [
        Warned("ignored_files", f"Ignored {reason}: {count}{hint}.")
        for reason, count in sorted(ignored.items())
        for beginning, hint in hints.items()
        if reason.startswith(beginning)
    ]
