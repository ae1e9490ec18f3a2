"""Where the rows of one extractor are kept: in the cache, or with --cache never in memory.

The rows of view 0 live in the plain entry, which every augmentation shares; those of the other views in an
entry whose key also holds the augmentation and its seed. Views added later cost their own rows alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import numpy as np

from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey
from tlcli.cache.shard import TABLE_BYTES, environment_record
from tlcli.cache.store import Store
from tlcli.cache.writer import Writer
from tlcli.data.dataset import Sample
from tlcli.errors import ResourceError
from tlcli.features import other_versions
from tlcli.features.batch import Array
from tlcli.features.extractor import Extractor
from tlcli.features.views import PLAIN_VIEW
from tlcli.machine import memory
from tlcli.wording import size_text

MEMORY_SHARE = 0.8  # of what is available, for the rows of --cache never

Keep = Callable[[RowKey, str, Array], None]
"""Takes a computed row: its key, the name of its image, the row."""


class RowStorage(Protocol):
    """Keeps rows and gives them back. Not for several threads at once."""

    def known(self) -> set[RowKey]:
        """Return the keys (SHA-256 and view) of the rows that are there now."""

    def compare_versions(self, wanted: Mapping[RowKey, Sample], *, verifying: bool) -> None:
        """Decide which of the rows that are there can be used, of those wanted."""

    def check_space(self, num_rows: int, *, write: bool) -> None:
        """Refuse rows that would not fit or could not be written."""

    def keeping(self) -> AbstractContextManager[Keep]:
        """Give the function that keeps each computed row, inside the block."""

    def read(self, keys: Sequence[RowKey]) -> tuple[Array, list[int]]:
        """Return rows, and the positions of those that are not there (zeros), ascending."""


class RowsInMemory:
    """Rows of --cache never: gone when the process ends.

    Args:
        extractor: Computes them.
    """

    def __init__(self, extractor: Extractor) -> None:
        self._extractor = extractor
        self._rows: dict[RowKey, Array] = {}

    def known(self) -> set[RowKey]:
        """Return the keys of the rows."""
        return set(self._rows)

    def compare_versions(self, wanted: Mapping[RowKey, Sample], *, verifying: bool) -> None:
        """Do nothing: all rows are this process's own."""

    def check_space(self, num_rows: int, *, write: bool) -> None:
        """Refuse rows that would not fit.

        Raises:
            ResourceError: Too little memory.
        """
        del write
        num_bytes, available = num_rows * self._extractor.row_bytes, memory.available_bytes()
        if num_bytes > MEMORY_SHARE * available:
            raise ResourceError(
                f"The features need {size_text(num_bytes)} of memory with --cache never; "
                f"{size_text(available)} are available.",
                hint="Use --cache auto, which keeps them on the disk, or fewer --views.",
            )

    @contextmanager
    def keeping(self) -> Iterator[Keep]:
        """Give the function that keeps each computed row."""
        yield lambda key, _name, row: self._rows.__setitem__(key, row.copy())

    def read(self, keys: Sequence[RowKey]) -> tuple[Array, list[int]]:
        """Return rows, and the positions of those that are not there."""
        rows, missing = np.zeros(_shape(self._extractor, keys), _type(self._extractor)), []
        for place, key in enumerate(keys):
            if key in self._rows:
                rows[place] = self._rows[key]
            else:
                missing.append(place)
        return rows, missing


class CachedRows:
    """Rows in the cache.

    Args:
        extractor: Computes them.
        cache: Holds them.

    Attributes:
        plain: The entry of view 0.
        views: That of the other views; None where the extractor has no augmentation.
    """

    def __init__(self, extractor: Extractor, cache: Store) -> None:
        self._extractor, self._cache = extractor, cache
        self.plain = cache.entry(extractor.spec)
        self.views = cache.entry(extractor.views_spec) if extractor.views_spec else None
        self._env = environment_record(extractor.environment())
        self._trusted: dict[str, set[str]] = {}  # entry key -> environments whose rows are used
        self._refused: dict[str, set[str]] = {}
        for entry in self._entries():
            self._trusted[entry.key], self._refused[entry.key] = {self._env}, set()
            entry.trust(self._trusted[entry.key])

    def _entries(self) -> list[Entry]:
        return [entry for entry in (self.plain, self.views) if entry is not None]

    def entry_of(self, view: int) -> Entry:
        """Return the entry that holds a view.

        Raises:
            ValueError: The extractor has no augmentation.
        """
        entry = self.plain if view == PLAIN_VIEW else self.views
        if entry is None:
            raise ValueError(f"view {view}: this extractor has no augmentation")
        return entry

    def known(self) -> set[RowKey]:
        """Return the keys of the rows.

        Rows of other library versions are among them until `compare_versions` finds that they disagree.
        """
        found = set[RowKey]()
        for entry in self._entries():
            rows = entry.rows().union(*(self._not_compared(entry).values()))
            found |= {key for key in rows if (key[1] == PLAIN_VIEW) == (entry is self.plain)}
        return found

    def _not_compared(self, entry: Entry) -> dict[str, set[RowKey]]:
        """Return the rows of each environment that was not compared yet, as of the last look."""
        decided = self._trusted[entry.key] | self._refused[entry.key]
        found: dict[str, set[RowKey]] = {}
        for shard in entry.shards():
            if shard.env not in decided:
                found.setdefault(shard.env, set()).update(shard.row_keys())
        return found

    def compare_versions(self, wanted: Mapping[RowKey, Sample], *, verifying: bool) -> None:
        """Decide whether rows of other versions are used, where they are wanted; see other_versions.py.

        With --cache verify they are, since each is compared before.
        """
        for entry in self._entries():
            there = entry.rows()
            for env, rows in sorted(self._not_compared(entry).items()):
                if not (keys := (rows & wanted.keys()) - there):
                    continue
                agrees = verifying
                if not agrees:
                    stored = self._cache.entry(entry.spec)
                    stored.trust({env})
                    found = other_versions.compare(self._extractor, stored, keys, wanted)
                    other_versions.log_decision(entry.key, env, self._env, len(keys), found)
                    agrees = found.agrees
                (self._trusted if agrees else self._refused)[entry.key].add(env)
                entry.trust(self._trusted[entry.key])
                there = entry.rows()

    def check_space(self, num_rows: int, *, write: bool) -> None:
        """Refuse rows that would not fit or could not be written.

        Args:
            num_rows: Rows to store.
            write: Also make the cache folder and write in it, which a mere plan must not.

        Raises:
            StorageError: Too little space, or the cache cannot be written.
        """
        if num_rows:
            self._cache.check_space(num_rows * (self._extractor.row_bytes + TABLE_BYTES))
            if write:
                self._cache.check_writable()

    @contextmanager
    def keeping(self) -> Iterator[Keep]:
        """Give the function that keeps each computed row; shards are published as they fill."""
        writers: dict[str, Writer] = {}
        extractor = self._extractor
        with ExitStack() as stack:

            def keep(key: RowKey, name: str, row: Array) -> None:
                entry = self.entry_of(key[1])
                if entry.key not in writers:
                    writer = entry.writer(extractor.environment(), guard=extractor.check_unchanged)
                    writers[entry.key] = stack.enter_context(writer)
                writers[entry.key].add(key, row, name)

            yield keep

    def read(self, keys: Sequence[RowKey]) -> tuple[Array, list[int]]:
        """Return rows, and the positions of those that are not there."""
        augmented = [place for place, (_, view) in enumerate(keys) if view != PLAIN_VIEW]
        if len(augmented) in {0, len(keys)}:
            return self.entry_of(keys[0][1] if keys else PLAIN_VIEW).read(keys)
        rows, missing = np.empty(_shape(self._extractor, keys), _type(self._extractor)), []
        plain = sorted(set(range(len(keys))) - set(augmented))
        for places, entry in ((plain, self.plain), (augmented, self.entry_of(keys[augmented[0]][1]))):
            rows[places], lost = entry.read([keys[place] for place in places])
            missing += [places[place] for place in lost]
        return rows, sorted(missing)


def _shape(extractor: Extractor, keys: Sequence[RowKey]) -> tuple[int, ...]:
    return (len(keys), *extractor.cut.row_shape)


def _type(extractor: Extractor) -> type[np.generic]:
    return np.float32 if extractor.row_dtype == "fp32" else np.uint16
