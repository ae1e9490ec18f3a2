"""The files of an entry and of the cache's root beside the shards: spec.json, last_used, CACHEDIR.TAG."""

import errno
import json
import math
from pathlib import Path
from typing import Any

from tlcli.cache.errors import cache_error
from tlcli.cache.key import SCHEMA, entry_key
from tlcli.cache.shard import RowFormat
from tlcli.errors import StorageError
from tlcli.machine import files

TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Feature cache of tlcli: rows that can be computed again. Clean it with `tlcli cache prune`.\n"
)
MAX_SPEC_BYTES = 1 << 20


def make_own_folder(path: Path) -> None:
    """Make a folder of an entry; a link that leads elsewhere is refused, so that nothing there is written."""
    files.make_folder(path)
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "It is a link, not a folder", str(path))


def tag_root(root: Path) -> None:
    """Make the cache folder and write its tag, which comes before anything else in it."""
    files.make_folder(root)
    files.publish(root / "CACHEDIR.TAG", [TAG])


def last_used(directory: Path) -> float:
    """Return when an entry was last used, in seconds since 1970; 0 for one that is gone."""
    times = [files.changed(directory / "last_used"), files.changed(directory)]
    return next((seconds for seconds in times if math.isfinite(seconds)), 0.0)


def read_spec(directory: Path) -> dict[str, Any]:
    """Return the facts in an entry's spec.json, after comparing them with the entry's key.

    Raises:
        StorageError: They were edited, are damaged, or come from a newer tlcli.
        FileNotFoundError: There is no spec.json.
    """
    path = directory / "spec.json"
    hint = f"It is left as it is. Delete the folder {str(directory)!r} to have its rows computed again."
    try:
        if directory.is_symlink():
            raise StorageError(
                f"{str(directory)!r} is a link: expected a folder.", hint="Move the folder there."
            )
        with files.opened(path) as fd:
            text = files.read_at(fd, MAX_SPEC_BYTES, 0)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cache_error("read", path, error) from error
    try:
        spec = json.loads(text)
        schema, key = spec["schema"], entry_key(spec)
        if type(schema) is int and schema <= SCHEMA:
            RowFormat.from_spec(spec)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StorageError(
            f"{str(path)!r} is damaged or was edited: these are no facts of an entry.", hint=hint
        ) from error
    if type(schema) is not int or schema > SCHEMA:
        raise StorageError(
            f"{str(path)!r} was written by a newer tlcli (schema {schema!r}; this one knows up to {SCHEMA}).",
            hint="Use the newer tlcli, or another TLCLI_HOME.",
        )
    if key != directory.name:
        raise StorageError(f"{str(path)!r} was edited: its facts do not give the entry's key.", hint=hint)
    return dict(spec)
