"""From a folder or a CSV file to a Dataset: which images there are, of which class, in which split.

The result depends on names alone, never on the order in which the file system lists them or on the locale:
everything is sorted by code point. Only names and links are looked at here; files are opened later, by
image_files.read_bytes.
"""

import itertools
import os
from collections.abc import Sequence

from tlcli.config.data import DataOptions
from tlcli.data.dataset import LAYOUT_HINT, Dataset
from tlcli.data.folders import scan_folder
from tlcli.data.listing import DELIMITERS, scan_listing
from tlcli.errors import DataError, UsageError
from tlcli.wording import near_misses


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
        raise UsageError("DATA is missing.", hint=LAYOUT_HINT)
    path = os.path.abspath(os.path.expanduser(options.data))
    if not os.path.lexists(path):
        raise DataError(f"There is no {options.data!r}.", hint=_nearest(path))
    if os.path.isdir(path):
        return scan_folder(path, options, class_names)
    if not os.path.isfile(path):
        raise DataError(f"{options.data!r} is neither a folder nor a regular file.", hint=LAYOUT_HINT)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in DELIMITERS:
        archive = suffix in {".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z", ".rar"}
        raise DataError(
            f"{options.data!r} is a file, expected a folder or a file that ends in .csv or .tsv.",
            hint="Unpack the archive and name its folder." if archive else LAYOUT_HINT,
        )
    return scan_listing(path, options, class_names)


def _nearest(path: str) -> str:
    """Return a hint with the entry most like the missing `path`."""
    parent, name = os.path.split(path)
    while parent != "/" and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        with os.scandir(parent) as entries:  # of a very large folder a part has to do
            near = near_misses(name, (entry.name for entry in itertools.islice(entries, 5000)), most=1)
    except OSError:
        near = []
    if near:
        return f"Did you mean {os.path.join(parent, near[0])!r}?"
    return f"{parent!r} is there, but holds nothing of a name like {name!r}."
