"""Where the rows of an entry are: what its folder's valid shards say, and nothing else is believed."""

import itertools
import re
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcli.cache.key import RowKey
from tlcli.cache.shard import SUFFIX, DamagedShard, RowFormat, Shard, open_shard
from tlcli.machine import files

SHARD_NAME = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
ROW_MASK = (1 << 32) - 1

ShardFile = tuple[str, int]
"""A shard's name and inode: a damaged file that was published again is another one of the same name."""


class Index:
    """The valid shards of one folder as of the last look at it, and the place of each row in them.

    Args:
        shards_dir: The folder, which need not exist.
        key: Of the entry that its shards belong to.
        row_format: Type and shape of a row.

    Attributes:
        shards: In the order in which they were found.
        stale: Set when a shard was damaged: the next look takes all of them in again.
    """

    def __init__(self, shards_dir: Path, key: str, row_format: RowFormat) -> None:
        self.shards: list[Shard] = []
        self.stale = False
        self._folder, self._key, self._row_format = shards_dir, key, row_format
        self._files: dict[ShardFile, Shard | None] = {}  # None: damaged, and could not be moved away
        self._places: dict[RowKey, int] = {}  # place in shards << 32 | row
        self._trusted: Container[str] | None = None  # environment records; None is every one

    def rows(self) -> set[RowKey]:
        """Return the keys of all rows."""
        return set(self._places)

    def places(self, keys: Sequence[RowKey], positions: NDArray[Any]) -> NDArray[Any]:
        """Return where the rows of some of `keys` are: the place of the shard << 32 | row, or -1.

        Args:
            keys: Of rows.
            positions: Of those that are wanted, int64.
        """
        wanted = map(keys.__getitem__, positions.tolist())
        found = map(self._places.get, wanted, itertools.repeat(-1))
        return np.fromiter(found, np.int64, len(positions))

    def trust(self, environments: Container[str]) -> None:
        """From now on know only rows that these environments wrote."""
        self._trusted, self._places, self.stale = environments, {}, True

    def forget(self, name: str) -> None:
        """Have the next look at the folder open a file of this name anew, also when it got the same inode."""
        self._files = {file: shard for file, shard in self._files.items() if file[0] != name}

    def update(self, quarantine: Callable[[str, str], bool]) -> bool:
        """Look at the folder; return whether anything changed.

        Args:
            quarantine: Called with name and reason of a damaged shard; returns whether it is out of the way.
        """
        present = {
            (entry.name, entry.inode())
            for entry in files.list_folder(self._folder)
            if SHARD_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        }
        rebuild = self.stale or not self._files.keys() <= present
        if rebuild:
            kept = {file: shard for file, shard in self._files.items() if file in present}
            self._files, self.shards, self._places, self.stale = {}, [], {}, False
            for file, shard in kept.items():
                self._add(file, shard)
        new = sorted(present - self._files.keys())
        for file in new:
            name = file[0]
            try:
                self._add(file, open_shard(self._folder / name, self._key, self._row_format))
            except FileNotFoundError:
                continue
            except DamagedShard as error:
                if not quarantine(name, str(error)):
                    self._add(file, None)
        return rebuild or bool(new)

    def _add(self, file: ShardFile, shard: Shard | None) -> None:
        self._files[file] = shard
        if shard is None:
            return
        first = len(self.shards) << 32
        self.shards.append(shard)
        if self._trusted is not None and shard.env not in self._trusted:
            return
        sound = shard.sound.tolist()
        for row, key in enumerate(shard.row_keys()):
            if sound[row]:
                self._places.setdefault(key, first + row)
