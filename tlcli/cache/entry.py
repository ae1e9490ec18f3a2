"""One entry: reading its rows, writing new ones, and healing what is damaged.

The index is what the folder's valid shards say. A row is given out only after its checksum was compared; rows
of shards that are gone or damaged are reported as missing, so that the caller computes them again. A damaged
shard goes to quarantine/ with the reason, after its intact rows were published in a new one.
"""

import errno
import functools
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcli.cache.errors import cache_error, cache_errors
from tlcli.cache.key import SCHEMA, RowKey, entry_key
from tlcli.cache.shard import (
    SUFFIX,
    Bytes2D,
    DamagedShard,
    RowFormat,
    Shard,
    environment,
    open_shard,
    write_shard,
)
from tlcli.cache.writer import FLUSH_BYTES, FLUSH_SECONDS, Writer
from tlcli.errors import StorageError
from tlcli.machine import files
from tlcli.progress import Progress, Silent

log = logging.getLogger(__name__)

TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Feature cache of tlcli: rows that can be computed again. Clean it with `tlcli cache prune`.\n"
)
SHARD_NAME = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
TOUCH_SECONDS = 300.0  # how old the mark of last use may get while an entry is used
READ_ATTEMPTS = 4  # shards may be pruned, compacted or healed between two of them
MAX_SPEC_BYTES = 1 << 20
ROW_MASK = (1 << 32) - 1

ShardFile = tuple[str, int]
"""A shard's name and inode: a damaged file that was published again is another one of the same name."""


@dataclass(frozen=True)
class Damage:
    """A damaged shard: its file name, why, and how many of its rows are lost (None: it cannot be told)."""

    shard: str
    reason: str
    rows_lost: int | None


class Entry:
    """The rows of one spec. Made by `Store.entry` or `Store.find`; belongs to one thread.

    Args:
        root: The cache folder.
        directory: The entry's folder, which need not exist.
        spec: Its facts.
        repair: False only looks: nothing is quarantined, healed or marked as used.

    Attributes:
        key: SHA-256 of the spec, 64 hex digits.
        row_format: Type and shape of a row.
        damage: What was found damaged so far.
    """

    def __init__(self, root: Path, directory: Path, spec: Mapping[str, Any], *, repair: bool = True) -> None:
        self.root = root
        self.directory = directory
        self.key = directory.name
        self.spec = dict(spec)
        self.row_format = RowFormat.from_spec(spec)
        self.damage: list[Damage] = []
        self._repair = repair
        self._shards: dict[ShardFile, Shard | None] = {}  # None: damaged, and could not be moved away
        self._order: list[Shard] = []
        self._index: dict[RowKey, int] = {}  # place in _order << 32 | row
        self._stale = False
        self._trusted: Container[str] | None = None  # environment records; None is every one

    @property
    def shards_dir(self) -> Path:
        """Return the folder of the entry's shards."""
        return self.directory / "shards"

    @property
    def quarantine_dir(self) -> Path:
        """Return the folder of the entry's damaged shards and their reasons."""
        return self.directory / "quarantine"

    def rows(self) -> set[RowKey]:
        """Return the keys of all rows that valid shards hold now.

        Raises:
            StorageError: The folder cannot be read.
        """
        with cache_errors("read", self.directory):
            self._scan()
        return set(self._index)

    def shards(self) -> tuple[Shard, ...]:
        """Return the valid shards as of the last look at the folder (`rows`, `read` or `verify`)."""
        return tuple(self._order)

    def trust(self, environments: Container[str]) -> None:
        """From now on give out only rows that these environments wrote; those of others count as missing.

        Args:
            environments: Records as shards hold them; see `environment`.
        """
        self._trusted, self._index, self._stale = environments, {}, True

    def read(self, keys: Sequence[RowKey], out: NDArray[Any] | None = None) -> tuple[NDArray[Any], list[int]]:
        """Return rows, each compared with its checksum.

        Args:
            keys: Rows wanted, in any order, repeats allowed.
            out: Array to fill, C-contiguous, [len(keys), *row_shape], of the entry's numpy type; None: new.

        Returns:
            The rows in the order of `keys`: float32 for "fp32", uint16 bit patterns for "bf16"; and the
            positions, ascending, of the rows the cache does not have, which are zeros.

        Raises:
            StorageError: A shard cannot be opened (permission, too many open files).
            ValueError: `out` does not fit.
        """
        shape = (len(keys), *self.row_format.shape)
        if out is None:
            out = np.empty(shape, self.row_format.numpy_dtype)
        elif out.shape != shape or out.dtype != self.row_format.numpy_dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}: expected {self.row_format.numpy_dtype} {shape}"
            )
        flat = out.reshape(len(keys), math.prod(shape[1:])).view(np.uint8)
        pending = np.arange(len(keys))
        with cache_errors("read", self.directory):
            attempts = 0
            while attempts < READ_ATTEMPTS + len(self._order):  # each shard may have a damaged copy of a row
                pending = self._read_known(keys, pending, flat)
                if not len(pending) or not self._scan():
                    break
                attempts += 1
        flat[pending] = 0
        self._mark_used()
        return out, pending.tolist()

    def _read_known(self, keys: Sequence[RowKey], pending: NDArray[Any], flat: Bytes2D) -> NDArray[Any]:
        """Read the rows at the positions `pending` that the index has; return the positions still missing."""
        wanted = map(keys.__getitem__, pending.tolist())
        locations = np.fromiter(map(self._index.get, wanted, itertools.repeat(-1)), np.int64, len(pending))
        order = np.argsort(locations, kind="stable")
        locations, pending = locations[order], pending[order]
        numbers = locations >> 32  # -1 where the index has no row
        failed = [pending[numbers < 0]]
        for number in np.unique(numbers[numbers >= 0]).tolist():
            part = slice(*np.searchsorted(numbers, [number, number + 1]))
            failed.append(
                self._read_shard(self._order[number], locations[part] & ROW_MASK, pending[part], flat)
            )
        return np.sort(np.concatenate(failed))

    def _read_shard(
        self, shard: Shard, rows: NDArray[Any], positions: NDArray[Any], flat: Bytes2D
    ) -> NDArray[Any]:
        failed = [positions[:0]]
        try:
            for part, data, intact in shard.read(rows):
                if intact.all():
                    flat[positions[part]] = data
                else:
                    flat[positions[part][intact]] = data[intact]
                    failed.append(positions[part][~intact])
        except FileNotFoundError:
            return positions
        if len(failed) > 1:
            self._heal(shard, "rows do not match their checksums")
        return np.concatenate(failed)

    def _scan(self) -> bool:
        """Bring the index up to date with the folder; return whether anything changed."""
        present = {
            (entry.name, entry.inode())
            for entry in files.list_folder(self.shards_dir)
            if SHARD_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        }
        rebuild = self._stale or not self._shards.keys() <= present
        if rebuild:
            kept = {file: shard for file, shard in self._shards.items() if file in present}
            self._shards, self._order, self._index, self._stale = {}, [], {}, False
            for file, shard in kept.items():
                self._add(file, shard)
        new = sorted(present - self._shards.keys())
        for file in new:
            name = file[0]
            try:
                self._add(file, open_shard(self.shards_dir / name, self.key, self.row_format))
            except FileNotFoundError:
                continue
            except DamagedShard as error:
                if not self._quarantine(name, str(error), None):
                    self._add(file, None)
        return rebuild or bool(new)

    def _add(self, file: ShardFile, shard: Shard | None) -> None:
        self._shards[file] = shard
        if shard is None:
            return
        first = len(self._order) << 32
        self._order.append(shard)
        if self._trusted is not None and shard.env not in self._trusted:
            return
        sound = shard.sound.tolist()
        for row, key in enumerate(shard.row_keys()):
            if sound[row]:
                self._index.setdefault(key, first + row)

    def _heal(self, shard: Shard, reason: str) -> None:
        """Publish a damaged shard's intact rows anew, then move it to quarantine.

        What cannot be done (a full disk, a folder that may only be read) stays undone: the damaged rows are
        not in the index and so count as missing.
        """
        name = shard.path.name
        self._stale = True
        if not self._repair:
            self.damage.append(Damage(name, reason, shard.num_damaged))
            return
        try:
            # As the file is now: another process may have published its rows again under this name.
            shard = open_shard(shard.path, self.key, self.row_format)
            kept_keys, kept_rows = [shard.keys[:0]], [np.empty((0, shard.row_bytes), np.uint8)]
            for part, data, intact in shard.read(np.arange(len(shard.keys))):
                kept_keys.append(shard.keys[part][intact])
                kept_rows.append(data[intact])
            if shard.sound.any():
                keys, rows = np.concatenate(kept_keys), np.concatenate(kept_rows)
                new = write_shard(self.shards_dir, self.key, self.row_format, shard.env, keys, rows)
                if new == name:
                    self._forget(name)
                    return
        except FileNotFoundError:
            return
        except DamagedShard as error:
            self._quarantine(name, str(error), None)
        except OSError as error:
            log.warning("Damaged shard %s is left in place: %s.", shard.path, error)
            self.damage.append(Damage(name, reason, shard.num_damaged))
        else:
            self._quarantine(name, reason, shard.num_damaged)

    def _quarantine(self, name: str, reason: str, rows_lost: int | None) -> bool:
        """Move a damaged shard away with its reason; return whether it is out of the way."""
        self.damage.append(Damage(name, reason, rows_lost))
        if not self._repair:
            return False
        try:
            _make_own_folder(self.quarantine_dir)
            files.publish(self.quarantine_dir / f"{name}.txt", [f"{reason}\n".encode()])
            files.move(self.shards_dir / name, self.quarantine_dir / name)
        except FileNotFoundError:  # another process was quicker
            return True
        except OSError as error:
            log.warning("Damaged shard %s is ignored (%s) but left in place: %s.", name, reason, error)
            return False
        self._forget(name)
        with suppress(OSError):
            files.touch(self.quarantine_dir / name)  # prune keeps it for 30 days from now
        log.warning("Damaged shard moved to %s: %s.", self.quarantine_dir / name, reason)
        return True

    def _forget(self, name: str) -> None:
        """Have the next look at the folder open a file of this name anew, also when it got the same inode."""
        self._shards = {file: shard for file, shard in self._shards.items() if file[0] != name}

    def _mark_used(self) -> None:
        mark = self.directory / "last_used"
        with suppress(OSError):
            if self._repair and not 0 <= time.time() - files.changed(mark) < TOUCH_SECONDS:
                files.touch(mark)

    def verify(self, *, deep: bool = False, progress: Progress | None = None) -> list[Damage]:
        """Check every row of every shard, and heal or quarantine what is damaged.

        Args:
            deep: Also hash whole shards and compare with their names.
            progress: Told of rows checked.

        Returns:
            What was found.

        Raises:
            StorageError: The folder or a shard cannot be opened.
        """
        progress = progress or Silent()
        with cache_errors("verify", self.directory):
            with suppress(OSError):  # of a cache that may only be read
                self._remove_temporaries()
            self._scan()
            progress.start("verify", sum(len(shard.keys) for shard in self._order), unit="rows")
            for shard in list(self._order):
                reason = ""
                try:
                    for _, _, intact in shard.read(np.arange(len(shard.keys))):
                        progress.advance(len(intact))
                    if not shard.sound.all():
                        reason = "rows do not match their checksums"
                    elif deep and not shard.matches_name():
                        reason = "its bytes do not hash to its name"
                except FileNotFoundError:
                    continue
                except DamagedShard as error:
                    reason = str(error)
                if reason:
                    self._heal(shard, reason)
            self._scan()
        progress.finish()
        return list(self.damage)

    def writer(
        self,
        env: Mapping[str, Any],
        *,
        guard: Callable[[], None] | None = None,
        flush_bytes: int = FLUSH_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> Writer:
        """Return a Writer of new rows, after removing temporaries that no writer will finish.

        Args:
            env: Library versions and device, plain data; stored in each shard.
            guard: Called before every publication; what it raises refuses the rows (changed weights, say).
            flush_bytes: Rows are published when they fill this many bytes.
            flush_seconds: Or when the oldest has waited this long.
            clock: Monotonic seconds.
        """
        with cache_errors("clean", self.directory):
            self._remove_temporaries()
        publish = functools.partial(self._publish, environment(env))
        return Writer(self.row_format, publish, guard, flush_bytes, (flush_seconds, clock))

    def _remove_temporaries(self) -> None:
        """Remove what killed processes left half-written, where it may be changed."""
        folders = (self.root, self.directory, self.shards_dir, self.quarantine_dir)
        for folder in folders if self._repair else ():
            for path in files.stale_temporaries(folder):
                files.remove_tree(path)

    def _publish(self, env: str, keys: Bytes2D, rows: Bytes2D) -> str:
        with cache_errors("write features to", self.directory, rows.nbytes):
            try:
                name = self._write(env, keys, rows)
            except FileNotFoundError:  # the entry or the temporary was pruned meanwhile: once more
                name = self._write(env, keys, rows)
            self._scan()
        self._mark_used()
        return name

    def _write(self, env: str, keys: Bytes2D, rows: Bytes2D) -> str:
        """Write a shard, after making the entry's folder and spec.json as far as they do not exist."""
        if not (self.root / "CACHEDIR.TAG").exists():
            tag_root(self.root)
        _make_own_folder(self.directory)
        try:
            read_spec(self.directory)
        except FileNotFoundError:
            text = json.dumps(self.spec, indent=2, sort_keys=True) + "\n"
            files.publish(self.directory / "spec.json", [text.encode("ascii")])
        _make_own_folder(self.shards_dir)
        return write_shard(self.shards_dir, self.key, self.row_format, env, keys, rows)


def _make_own_folder(path: Path) -> None:
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
