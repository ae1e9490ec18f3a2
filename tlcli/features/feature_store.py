"""The rows of one extractor: read where they are known, computed once where they are not.

The rows of view 0 live in the plain entry, which every augmentation shares; those of the other views in an
entry whose key also holds the augmentation and its seed. Views added later cost their own rows alone.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey
from tlcli.cache.shard import TABLE_BYTES, environment
from tlcli.cache.store import Store
from tlcli.cache.writer import Writer
from tlcli.config.backbone import CacheMode
from tlcli.data.dataset import Sample
from tlcli.data.image_files import BadImage
from tlcli.data.split import Fingerprint
from tlcli.errors import ResourceError, TlcliError
from tlcli.features import other_versions as canary
from tlcli.features.extractor import PLAIN_VIEW, Array, Extractor, Item, to_tensor
from tlcli.features.outcome import Outcome
from tlcli.machine import memory, paths, processes
from tlcli.progress import Progress
from tlcli.wording import size_text

MEMORY_SHARE = 0.8  # of what is available, for the rows of --cache never
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
        cached = mode != "never"
        self.entry: Entry | None = self.store.entry(extractor.spec) if cached else None
        views_spec = extractor.views_spec if cached else None
        self.views_entry: Entry | None = self.store.entry(views_spec) if views_spec else None
        self._memory: dict[RowKey, Array] = {}
        self._lock = threading.RLock()
        self._env = environment(extractor.environment())
        self._trusted: dict[str, set[str]] = {}  # entry key -> environments whose rows are used
        self._refused: dict[str, set[str]] = {}
        for entry in self._entries():
            self._trusted[entry.key], self._refused[entry.key] = {self._env}, set()
            entry.trust(self._trusted[entry.key])

    @functools.cached_property
    def store(self) -> Store:
        """The cache, whose folder need not even be there with --cache never."""
        return Store(paths.features_dir(), max_bytes=self._max_bytes)

    def _entries(self) -> list[Entry]:
        return [entry for entry in (self.entry, self.views_entry) if entry is not None]

    def known(self) -> set[RowKey]:
        """Return the keys (SHA-256 and view) of the rows that are there now.

        Rows of other library versions are among them until `missing` finds that they disagree.
        """
        if self.entry is None:
            return set(self._memory)
        with self._lock:
            found = set[RowKey]()
            for entry in self._entries():
                rows = entry.rows().union(*(self._foreign_rows(entry).values()))
                found |= {key for key in rows if (key[1] == PLAIN_VIEW) == (entry is self.entry)}
            return found

    def _foreign_rows(self, entry: Entry) -> dict[str, set[RowKey]]:
        """Return the rows of each environment that was not compared yet, as of the last look."""
        decided = self._trusted[entry.key] | self._refused[entry.key]
        found: dict[str, set[RowKey]] = {}
        for shard in entry.shards():
            if shard.env not in decided:
                found.setdefault(shard.env, set()).update(shard.row_keys())
        return found

    def _judge(self, wanted: Mapping[RowKey, Sample]) -> None:
        """Decide whether rows of other versions are used, where they are wanted; see other_versions.py.

        With --cache verify they are, since each is compared before.
        """
        for entry in self._entries():
            there = entry.rows()
            for env, rows in sorted(self._foreign_rows(entry).items()):
                if not (keys := (rows & wanted.keys()) - there):
                    continue
                agrees = self.mode == "verify"
                if not agrees:
                    stored = self.store.entry(entry.spec)
                    stored.trust({env})
                    found = canary.compare(self.extractor, stored, keys, wanted)
                    canary.log_decision(entry.key, env, self._env, len(keys), found)
                    agrees = found.agrees
                (self._trusted if agrees else self._refused)[entry.key].add(env)
                entry.trust(self._trusted[entry.key])
                there = entry.rows()

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
            self._judge(wanted)
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
        num_bytes = num_rows * self.extractor.row_bytes
        if self.entry is None:
            available = memory.available_bytes()
            if num_bytes > MEMORY_SHARE * available:
                raise ResourceError(
                    f"The features need {size_text(num_bytes)} of memory with --cache never; "
                    f"{size_text(available)} are available.",
                    hint="Use --cache auto, which keeps them on the disk, or fewer --views.",
                )
        elif num_rows:
            self.store.check_space(num_bytes + num_rows * TABLE_BYTES)
            if write:
                self.store.check_writable()

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
        with self._sink(work) as sink:
            for batch in self.extractor.compute_items([] if work.stopped else todo, workers):
                work.undecodable |= batch.undecodable
                for key, name, row in batch.items():
                    sink(key, name, row)
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
    def _sink(self, work: "_Work") -> Iterator[Callable[[RowKey, str, Array], None]]:
        """Give the function that takes each computed row: the cache's writers, memory, or a comparison."""
        if self.entry is None:
            yield lambda key, _name, row: self._memory.__setitem__(key, row.copy())
            return
        writers: dict[str, Writer] = {}
        with ExitStack() as stack:

            def take(key: RowKey, name: str, row: Array) -> None:
                entry = self._entry_of(key[1])
                if self.mode == "verify" and self._compare(entry, key, name, row, work):
                    return
                if entry.key not in writers:
                    extractor = self.extractor
                    writer = entry.writer(extractor.environment(), guard=extractor.check_unchanged)
                    writers[entry.key] = stack.enter_context(writer)
                writers[entry.key].add(key, row, name)

            yield take

    def _entry_of(self, view: int) -> Entry:
        entry = self.entry if view == PLAIN_VIEW else self.views_entry
        if entry is None:
            raise ValueError(f"view {view}: this extractor has no augmentation")
        return entry

    def _compare(self, entry: Entry, key: RowKey, name: str, row: Array, work: "_Work") -> bool:
        """Compare a recomputed row with the stored one; return whether there is one."""
        stored, missing = entry.read([key])
        if missing:
            return False
        work.rows_compared += 1
        difference = canary.relative_difference(row, stored[0])
        work.largest_difference = max(work.largest_difference, difference)
        if difference > canary.tolerance(self.extractor):
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
        shape = (len(wanted), *self.extractor.cut.row_shape)
        kind = np.float32 if self.extractor.row_dtype == "fp32" else np.uint16
        if self.entry is None:
            rows = np.zeros(shape, kind)
            missing = []
            for place, key in enumerate(wanted):
                if key in self._memory:
                    rows[place] = self._memory[key]
                else:
                    missing.append(place)
            return to_tensor(rows), missing
        augmented = [place for place, (_, view) in enumerate(wanted) if view != PLAIN_VIEW]
        with self._lock:
            if len(augmented) in {0, len(wanted)}:
                rows, missing = self._entry_of(wanted[0][1] if wanted else PLAIN_VIEW).read(wanted)
                return to_tensor(rows), missing
            rows, missing = np.empty(shape, kind), []
            plain = sorted(set(range(len(wanted))) - set(augmented))
            for places, entry in ((plain, self.entry), (augmented, self._entry_of(wanted[augmented[0]][1]))):
                rows[places], lost = entry.read([wanted[place] for place in places])
                missing += [places[place] for place in lost]
        return to_tensor(rows), sorted(missing)
