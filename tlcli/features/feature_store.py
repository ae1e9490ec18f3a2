"""The rows of one extractor: read where they are known, computed once where they are not."""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey
from tlcli.cache.store import Store
from tlcli.config.backbone import CacheMode
from tlcli.data.dataset import Sample
from tlcli.data.image_files import BadImage
from tlcli.data.split import Fingerprint
from tlcli.errors import TlcliError
from tlcli.features import other_versions
from tlcli.features.batch import Array, Item, to_tensor
from tlcli.features.extractor import Extractor
from tlcli.features.outcome import Outcome
from tlcli.features.row_storage import CachedRows, Keep, RowsInMemory, RowStorage
from tlcli.features.views import PLAIN_VIEW
from tlcli.machine import paths, processes
from tlcli.progress import Progress

PLAIN = (PLAIN_VIEW,)


@dataclass
class _Work:
    """What one process found while it computed its share; see Features."""

    computed: set[RowKey] = field(default_factory=set)
    undecodable: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    rows_compared: int = 0
    largest_difference: float = 0.0
    differing: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence["_Work"]) -> "_Work":
        """Return what several processes found."""
        return cls(
            set[RowKey]().union(*(part.computed for part in parts)),
            {key: reason for part in parts for key, reason in part.undecodable.items()},
            any(part.stopped for part in parts),
            sum(part.rows_compared for part in parts),
            max(part.largest_difference for part in parts),
            [name for part in parts for name in part.differing],
        )


class FeatureStore:
    """The rows of one extractor: in the cache or, with --cache never, in memory.

    Any number of threads may `read`; one may `fill`, and the readers wait for it.

    Args:
        extractor: Computes what is missing.
        mode: auto and always use the cache, never does not, verify recomputes everything and compares.
        max_bytes: Size that the cache must not grow beyond; None is no limit.

    Attributes:
        entry: The cache entry of view 0; None with --cache never.
        views_entry: That of the other views; None also where the extractor has no augmentation.
    """

    def __init__(
        self, extractor: Extractor, mode: CacheMode = "auto", *, max_bytes: int | None = None
    ) -> None:
        self.extractor = extractor
        self.mode = mode
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._cached = None if mode == "never" else CachedRows(extractor, self.cache)
        self._rows: RowStorage = self._cached or RowsInMemory(extractor)
        self.entry: Entry | None = self._cached.plain if self._cached else None
        self.views_entry: Entry | None = self._cached.views if self._cached else None

    @functools.cached_property
    def cache(self) -> Store:
        """The cache, whose folder need not even be there with --cache never."""
        return Store(paths.features_dir(), max_bytes=self._max_bytes)

    def known(self) -> set[RowKey]:
        """Return the keys (SHA-256 and view) of the rows that are there now.

        Rows of other library versions are among them until `missing` finds that they disagree.
        """
        with self._lock:
            return self._rows.known()

    def missing(
        self,
        samples: Sequence[Sample],
        fingerprints: Sequence[Fingerprint],
        views: Sequence[Sequence[int]] | None = None,
    ) -> list[Item]:
        """Return the images and views whose rows must be computed, each row once.

        Args:
            samples: The images.
            fingerprints: One a sample.
            views: The views wanted of each sample; None is view 0.
        """
        wanted: dict[RowKey, Sample] = {}
        for sample, found, chosen in zip(samples, fingerprints, views or [PLAIN] * len(samples), strict=True):
            if found.sha256 is not None:
                for view in chosen:
                    wanted.setdefault((found.sha256, view), sample)
        with self._lock:
            self._rows.compare_versions(wanted, verifying=self.mode == "verify")
            known = set() if self.mode == "verify" else self.known()
        items: dict[str, tuple[Sample, list[int]]] = {}
        for (sha256, view), sample in wanted.items():
            if (sha256, view) not in known:
                items.setdefault(sha256, (sample, []))[1].append(view)
        return list(items.values())

    def num_new(
        self, fingerprints: Sequence[Fingerprint], views: Sequence[Sequence[int]] | None = None
    ) -> int:
        """Return how many rows the cache, or with --cache never the memory, will grow by."""
        wanted = {
            (found.sha256, view)
            for found, chosen in zip(fingerprints, views or [PLAIN] * len(fingerprints), strict=True)
            if found.sha256
            for view in chosen
        }
        return len(wanted - self.known())

    def check_space(self, num_rows: int, *, write: bool = True) -> None:
        """Refuse rows that would not fit or could not be written, before any is computed.

        Args:
            num_rows: Rows to store.
            write: Also make the cache folder and write in it, which a mere plan must not.

        Raises:
            StorageError: Too little space, or the cache cannot be written.
            ResourceError: With --cache never, too little memory.
        """
        self._rows.check_space(num_rows, write=write)

    def fill(
        self,
        samples: Sequence[Sample],
        fingerprints: Sequence[Fingerprint],
        *,
        workers: int,
        progress: Progress,
        views: Sequence[Sequence[int]] | None = None,
        stop: Callable[[int], bool] = lambda _num_bad: False,
        together: bool = False,
    ) -> Outcome:
        """Compute every row that is missing.

        Args:
            samples: The images.
            fingerprints: One a sample.
            workers: Threads that decode, and on a CPU compute.
            progress: Told of every row.
            views: The views wanted of each sample; None is view 0.
            stop: Called with the number of bad images so far; True ends the work early. Rows finished by
                then are kept, and of the bad images only those found by then are listed.
            together: Every process of the job calls this with the same images: each computes its share of
                the rows and all get the same answer. With --cache never each computes everything.

        Raises:
            StorageError: The cache cannot take the rows.
            ResourceError: With --cache never, too little memory.
            BackboneError: Rows are not finite, or weights changed meanwhile.
        """
        views = views or [PLAIN] * len(samples)
        together = together and self.entry is not None and processes.world_size() > 1
        with self._lock:
            started = time.perf_counter()
            todo = self.missing(samples, fingerprints, views)
            before = self.known()
            self.check_space(self.num_new(fingerprints, views))
            if together:  # as rank 0 found it, before anything was written
                before, todo = processes.from_main((before, todo))
                todo = list(processes.share(todo))
            unreadable = sum(found.sha256 is None for found in fingerprints)
            progress.start("computing features", sum(len(wanted) for _, wanted in todo))
            work = _Work()
            error: TlcliError | None = None
            try:
                self._compute(todo, workers, progress, work, lambda bad: stop(unreadable + bad))
            except TlcliError as caught:
                if not together:
                    raise
                error = caught
            if together:
                processes.raise_together(error)
                work = _Work.joined(processes.gather_objects(work))
            progress.finish()
            result = self._summary(samples, fingerprints, views, before, work)
            result.seconds = time.perf_counter() - started
        return result

    def _compute(
        self,
        todo: Sequence[Item],
        workers: int,
        progress: Progress,
        work: "_Work",
        stop: Callable[[int], bool],
    ) -> None:
        """Compute and keep the rows of items, until they are done or `stop` says so."""
        work.stopped = stop(0)
        with self._keeping(work) as keep:
            for batch in self.extractor.compute_items([] if work.stopped else todo, workers):
                work.undecodable |= batch.undecodable
                for key, name, row in batch.items():
                    keep(key, name, row)
                    work.computed.add(key)
                progress.advance(batch.num_items)
                if stop(len(work.undecodable)):
                    work.stopped = True
                    break

    def _summary(
        self,
        samples: Sequence[Sample],
        fingerprints: Sequence[Fingerprint],
        views: Sequence[Sequence[int]],
        before: set[RowKey],
        work: "_Work",
    ) -> Outcome:
        """Return what became of the images."""
        result = Outcome(entry_key=self.entry.key if self.entry else None)
        result.rows_computed = len(work.computed)
        result.rows_reused = work.rows_compared
        result.largest_difference, result.differing = work.largest_difference, work.differing
        there = before | work.computed
        for sample, found, wanted in zip(samples, fingerprints, views, strict=True):
            keys = [(found.sha256 or "", view) for view in wanted]
            lost = not there.issuperset(keys)
            if found.reason or found.sha256 in work.undecodable or (lost and not work.stopped):
                reason = found.reason or work.undecodable.get(found.sha256 or "")
                reason = reason or "changed or vanished while it was read"
                result.bad_images.append(BadImage(sample.name, sample.path, reason))
            elif self.mode != "verify":
                result.rows_reused += sum(key in before for key in keys)
        return result

    @contextmanager
    def _keeping(self, work: "_Work") -> Iterator[Keep]:
        """Give the function that takes each computed row; with --cache verify it compares those there are."""
        with self._rows.keeping() as keep:

            def compare_or_keep(key: RowKey, name: str, row: Array) -> None:
                if not self._compare(key, name, row, work):
                    keep(key, name, row)

            yield compare_or_keep if self.mode == "verify" else keep

    def _compare(self, key: RowKey, name: str, row: Array, work: "_Work") -> bool:
        """Compare a recomputed row with the stored one; return whether there is one."""
        stored, missing = self._rows.read([key])
        if missing:
            return False
        work.rows_compared += 1
        difference = other_versions.relative_difference(row, stored[0])
        work.largest_difference = max(work.largest_difference, difference)
        if difference > other_versions.tolerance(self.extractor):
            work.differing.append(name if key[1] == PLAIN_VIEW else f"{name} (view {key[1]})")
        return True

    def read(self, keys: Sequence[str], views: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Return rows, and the positions of those that are not there (zeros).

        Args:
            keys: SHA-256 of each image, in the order wanted.
            views: The view wanted of each; None is view 0.

        Returns:
            float32 or bfloat16 [len(keys), *row_shape], in the order of `keys`; ascending positions.
        """
        wanted = list(zip(keys, views or PLAIN * len(keys), strict=True))
        with self._lock:
            rows, missing = self._rows.read(wanted)
        return to_tensor(rows), missing
