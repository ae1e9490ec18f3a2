"""One entry: reading its rows, writing new ones, and having healed what is damaged.

The index is what the folder's valid shards say (index.py). A row is given out only after its checksum was
compared; rows of shards that are gone or damaged are reported as missing, so that the caller computes them
again. A damaged shard goes to quarantine/ with the reason, after its intact rows were published in a new one
(healing.py).
"""

import functools
import json
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcli.cache.entry_files import make_own_folder, read_spec, tag_root
from tlcli.cache.errors import cache_errors
from tlcli.cache.healing import Damage, Healer
from tlcli.cache.index import ROW_MASK, Index
from tlcli.cache.key import RowKey
from tlcli.cache.shard import Bytes2D, DamagedShard, RowFormat, Shard, environment_record, write_shard
from tlcli.cache.writer import FLUSH_BYTES, FLUSH_SECONDS, Writer
from tlcli.machine import files
from tlcli.progress import Progress, Silent

TOUCH_SECONDS = 300.0  # how old the mark of last use may get while an entry is used
READ_ATTEMPTS = 4  # shards may be pruned, compacted or healed between two of them


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
    """

    def __init__(self, root: Path, directory: Path, spec: Mapping[str, Any], *, repair: bool = True) -> None:
        self.root = root
        self.directory = directory
        self.key = directory.name
        self.spec = dict(spec)
        self.row_format = RowFormat.from_spec(spec)
        self._repair = repair
        self._index = Index(self.shards_dir, self.key, self.row_format)
        self._healer = Healer(directory, self.row_format, self._index, repair=repair)

    @property
    def shards_dir(self) -> Path:
        """Return the folder of the entry's shards."""
        return self.directory / "shards"

    @property
    def quarantine_dir(self) -> Path:
        """Return the folder of the entry's damaged shards and their reasons."""
        return self.directory / "quarantine"

    @property
    def damage(self) -> list[Damage]:
        """Return what was found damaged so far."""
        return self._healer.damage

    def rows(self) -> set[RowKey]:
        """Return the keys of all rows that valid shards hold now.

        Raises:
            StorageError: The folder cannot be read.
        """
        with cache_errors("read", self.directory):
            self._scan()
        return self._index.rows()

    def shards(self) -> tuple[Shard, ...]:
        """Return the valid shards as of the last look at the folder (`rows`, `read` or `verify`)."""
        return tuple(self._index.shards)

    def trust(self, environments: Container[str]) -> None:
        """From now on give out only rows that these environments wrote; those of others count as missing.

        Args:
            environments: Records as shards hold them; see `environment_record`.
        """
        self._index.trust(environments)

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
            while attempts < READ_ATTEMPTS + len(
                self._index.shards
            ):  # each shard may have a damaged copy of a row
                pending = self._read_known(keys, pending, flat)
                if not len(pending) or not self._scan():
                    break
                attempts += 1
        flat[pending] = 0
        self._mark_used()
        return out, pending.tolist()

    def _read_known(self, keys: Sequence[RowKey], pending: NDArray[Any], flat: Bytes2D) -> NDArray[Any]:
        """Read the rows at the positions `pending` that the index has; return the positions still missing."""
        locations = self._index.places(keys, pending)
        order = np.argsort(locations, kind="stable")
        locations, pending = locations[order], pending[order]
        numbers = locations >> 32  # -1 where the index has no row
        failed = [pending[numbers < 0]]
        for number in np.unique(numbers[numbers >= 0]).tolist():
            part = slice(*np.searchsorted(numbers, [number, number + 1]))
            shard = self._index.shards[number]
            failed.append(self._read_shard(shard, locations[part] & ROW_MASK, pending[part], flat))
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
            self._healer.heal(shard, "rows do not match their checksums")
        return np.concatenate(failed)

    def _scan(self) -> bool:
        """Look at the folder; return whether anything changed."""
        return self._index.update(self._healer.quarantine)

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
            progress.start("verify", sum(len(shard.keys) for shard in self._index.shards), unit="rows")
            for shard in list(self._index.shards):
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
                    self._healer.heal(shard, reason)
            self._scan()
        progress.finish()
        return list(self._healer.damage)

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
        publish = functools.partial(self._publish, environment_record(env))
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
        make_own_folder(self.directory)
        try:
            read_spec(self.directory)
        except FileNotFoundError:
            text = json.dumps(self.spec, indent=2, sort_keys=True) + "\n"
            files.publish(self.directory / "spec.json", [text.encode("ascii")])
        make_own_folder(self.shards_dir)
        return write_shard(self.shards_dir, self.key, self.row_format, env, keys, rows)
