"""What caching and recomputing cost, measured on a few of the user's images."""

import copy
import dataclasses
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlcli.backbones.compute import Compute
from tlcli.backbones.memory_format import in_memory_format
from tlcli.cache.entry import Entry
from tlcli.cache.errors import cache_errors
from tlcli.cache.key import RowKey
from tlcli.cache.store import Store
from tlcli.data.collection import Collection
from tlcli.data.decode import decode
from tlcli.data.image_files import DecodeError, read_bytes
from tlcli.errors import DataError
from tlcli.features.earlier import EarlierRows
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.views import PLAIN_VIEW
from tlcli.machine import memory
from tlcli.machine.device import torch_threads
from tlcli.machine.files import opened

PAGE_CACHE_SHARE = 0.5  # of the memory that is left, for files
TRIAL_BYTES = 16 << 20  # of rows written and read
MIN_TRIAL_ROWS, MAX_TRIAL_ROWS = 16, 512
MIN_TRIAL_IMAGES, MAX_TRIAL_IMAGES = 12, 128
TRIAL_SECONDS = 0.5  # for each of a handful of parts
READ_BATCH = 32
REPEATS = 3
CUT, RECOMPUTE = "cut", "recompute"


@dataclass(frozen=True, kw_only=True)
class CachePlace:
    """What caching at one place costs; seconds are those of one row.

    Attributes:
        where: "cut", or the name of an earlier operation ("input" is the image itself).
        row_bytes: Bytes of a row.
        rows_to_compute: Rows that are not cached yet.
        prefix_seconds: From the image to the place, when the cache is filled.
        rest_seconds: From the place to the cut, when a batch is loaded; 0 at the cut.
        write_seconds: To write it durably.
        read_seconds: To read it and compare its checksum.
    """

    where: str
    row_bytes: int
    rows_to_compute: int
    prefix_seconds: float
    rest_seconds: float
    write_seconds: float
    read_seconds: float


@dataclass(frozen=True, kw_only=True)
class CachingCosts:
    """What the decision is made from; seconds are those of one thread of `workers` and one image or row.

    Attributes:
        epochs: Passes over the training and validation images, the probe's included.
        num_train: Training images.
        num_val: Validation images.
        num_views: Views cached of each training image.
        load_seconds: To read and decode an image.
        view_seconds: To make a view of it.
        prefix_seconds: From a view to the cut.
        step_seconds: Of training on a row at the cut, on the whole device.
        workers: Threads that load, and on a CPU compute the prefix.
        overlap: Whether loading goes on beside the device's work (a GPU), or takes turns with it (a CPU).
        free_bytes: Of the cache's disk, the reserve taken off.
        places: Where rows could be cached, the cut first.
    """

    epochs: int
    num_train: int
    num_val: int
    num_views: int
    load_seconds: float
    view_seconds: float
    prefix_seconds: float
    step_seconds: float
    workers: int
    overlap: bool
    free_bytes: int
    places: tuple[CachePlace, ...]


# ---- the measurement -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Times the parts of an extractor and of what is trained after it.

    On a CPU, processor time is what counts: loading, prefix and training share the cores, and what else the
    machine does while a part is timed says nothing about that part. On a GPU, time passes as it passes.
    """

    extractor: Extractor
    compute: Compute

    @property
    def on_cpu(self) -> bool:
        """Whether the extractor computes on the CPU."""
        return self.extractor.device.type == "cpu"

    def seconds(self, function: Callable[[], Any]) -> float:
        """Return the least seconds of a few calls after one to warm up, on all threads torch uses now."""
        clock = time.process_time if self.on_cpu else time.perf_counter
        spent, begun = [], time.perf_counter()
        for _ in range(1 + REPEATS):
            started = clock()
            function()
            if self.extractor.device.type == "cuda":
                torch.cuda.synchronize(self.extractor.device)
            elif self.extractor.device.type == "mps":
                torch.mps.synchronize()
            spent.append(clock() - started)
            if len(spent) > 1 and time.perf_counter() - begun > TRIAL_SECONDS:
                break
        return min(spent[1:]) / (torch.get_num_threads() if self.on_cpu else 1)

    def load(self, collection: Collection, view: int, workers: int) -> tuple[Tensor, float, float]:
        """Return a batch of images, and a thread's seconds to load one and to make a view of it.

        Raises:
            DataError: None of the images tried can be decoded.
        """

        def one(index: int) -> tuple[Tensor, float, float] | None:
            begun = time.perf_counter()
            try:
                data = read_bytes(collection.samples[index].path)
                started, waited = time.thread_time(), time.perf_counter() - begun
                key = hashlib.sha256(data).hexdigest()
                image = decode(data)
            except DecodeError:
                return None
            loaded = time.thread_time()
            made = self.extractor.view(image, key, view)
            return made, waited + loaded - started, time.thread_time() - loaded

        wanted = min(self.extractor.batch_size, MAX_TRIAL_IMAGES)
        enough = max(wanted, MIN_TRIAL_IMAGES)
        splits = collection.splits
        train = [i for i, split in enumerate(splits) if split == "train"] or list(range(len(splits)))
        with _threads(workers) as pool:
            tried = list(pool.map(one, train[:: max(1, len(train) // enough)][:enough]))
        good = [item for item in tried if item is not None]
        if not good:
            raise DataError(
                "None of the images tried can be decoded.", hint="`tlcli data check` looks closer."
            )
        batch = [good[number % len(good)][0] for number in range(wanted)]
        return torch.stack(batch), median(item[1] for item in good), median(item[2] for item in good)

    def prefix_seconds(self, images: Tensor, workers: int, extractor: Extractor | None = None) -> float:
        """Return a thread's seconds (a GPU's) for the row of an image, of this or a derived extractor."""
        rows = functools.partial((extractor or self.extractor).rows, images)
        if not self.on_cpu:
            return self.seconds(rows) / len(images)
        with _threads(workers) as pool:

            def together() -> None:
                for done in [pool.submit(rows) for _ in range(workers)]:
                    done.result()

            return self.seconds(together) / (workers * len(images))

    def step_seconds(self, images: Tensor) -> float:
        """Return the seconds a row of forward and backward pass through the trained part.

        In eval mode, so that no statistic and no random number is touched.
        """
        rows = in_memory_format(self.extractor.rows(images).float(), self.compute.channels_last)
        cut = self.extractor.cut
        suffix = self.placed(cut.suffix).eval()
        trained = dataclasses.replace(cut, suffix=suffix).trained_parameters()
        if not trained:
            return 0.0

        def step() -> None:
            with self.precision():
                value = suffix(rows).float().square().mean()
            torch.autograd.grad(value, trained, allow_unused=True)

        return self.seconds(step) / len(rows)

    def placed(self, module: nn.Module) -> nn.Module:
        """Return a module on the device; a copy where that is not the CPU."""
        return module if self.on_cpu else copy.deepcopy(module).to(self.extractor.device)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context that the training computes in."""
        return self.compute.precision(self.extractor.device)


def _threads(workers: int) -> ThreadPoolExecutor:
    """Return the threads that share the cores while a part is timed, as they do in training.

    One alone would be quicker than it is then: two threads of one core take turns, all share the memory.
    """
    return ThreadPoolExecutor(workers, "tlcli-trial", torch.set_num_threads, (1,))


def measure_costs(
    trial: Trial,
    collection: Collection,
    views: Sequence[Sequence[int]],
    workers: int,
    max_bytes: int | None = None,
    earlier: Sequence[EarlierRows] = (),
) -> CachingCosts:
    """Return the costs of one image and row, measured on a few images.

    Nothing stays behind: trial rows are written below the cache's folder, or its nearest parent, and removed.

    Args:
        trial: Of the extractor cut where the trained units begin.
        collection: Training and validation images.
        views: The views of each that a cache would hold.
        workers: Threads.
        max_bytes: Size that the cache must not grow beyond; None is no limit.
        earlier: Where rows could be kept before the cut.
    """
    extractor = trial.extractor
    store = FeatureStore(extractor, max_bytes=max_bytes)
    free = store.cache.free_bytes()
    num_views, num_rows = max(map(len, views)), sum(map(len, views))
    with torch_threads(1):  # as each of the threads that load has
        images, load, view = trial.load(collection, PLAIN_VIEW if num_views == 1 else 1, workers)
        prefix = trial.prefix_seconds(images, workers)
        stages = [(CUT, extractor, prefix)]
        for item in earlier:
            seconds = min(prefix, trial.prefix_seconds(images, workers, item.extractor))
            stages.append((item.where, item.extractor, seconds))
    places = []
    for where, kept, seconds in stages:
        new = FeatureStore(kept, max_bytes=max_bytes).num_new(collection.fingerprints, views)
        write, read = 0.0, 0.0
        if free > 2 * TRIAL_BYTES:
            write, read = disk_seconds(store.cache, kept.spec, num_rows * kept.row_bytes)
        places.append(
            CachePlace(where=where, row_bytes=kept.row_bytes, rows_to_compute=new, prefix_seconds=seconds,
                  rest_seconds=prefix - seconds, write_seconds=write, read_seconds=read)
        )  # fmt: skip
    num_train = collection.splits.count("train")
    return CachingCosts(
        epochs=1, num_train=num_train, num_val=len(views) - num_train, num_views=num_views, load_seconds=load,
        view_seconds=view, prefix_seconds=prefix, step_seconds=trial.step_seconds(images), workers=workers,
        overlap=not trial.on_cpu, free_bytes=free, places=tuple(places),
    )  # fmt: skip


def disk_seconds(store: Store, spec: Mapping[str, Any], total_bytes: int) -> tuple[float, float]:
    """Return the seconds to write and to read one row of a spec, checksums included.

    Args:
        store: Whose disk counts; its entries are not touched.
        spec: Names the row's type and shape.
        total_bytes: Of all rows. What exceeds the memory left for cached files is read from the disk itself.

    Raises:
        StorageError: The rows cannot be written.
    """
    parent = store.root
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        parent = Path(tempfile.gettempdir())
    with cache_errors("write trial rows in", parent), tempfile.TemporaryDirectory(dir=parent) as folder:
        entry = Store(Path(folder) / "trial").entry(spec)
        row_bytes = entry.row_format.row_bytes
        count = max(MIN_TRIAL_ROWS, min(MAX_TRIAL_ROWS, TRIAL_BYTES // row_bytes))
        words = np.random.default_rng(0).integers(0, 0x3F80, (count, row_bytes // 2), np.uint16)
        rows = words.view(entry.row_format.numpy_dtype).reshape(count, *entry.row_format.shape)
        keys = [(hashlib.sha256(str(number).encode()).hexdigest(), PLAIN_VIEW) for number in range(count)]
        started = time.perf_counter()
        with entry.writer({}) as writer:
            for key, row in zip(keys, rows, strict=True):
                writer.add(key, row)
        write = (time.perf_counter() - started) / count
        keys = [keys[number] for number in np.random.default_rng(1).permutation(count)]
        read = min(_read_seconds(entry, keys) for _ in range(REPEATS))
        kept = min(1.0, PAGE_CACHE_SHARE * memory.available_bytes() / max(1, total_bytes))
        if kept < 1.0:
            _drop_from_page_cache(entry)
            read = kept * read + (1 - kept) * max(read, _read_seconds(entry, keys))
    return write, read


def _read_seconds(entry: Entry, keys: Sequence[RowKey]) -> float:
    started = time.perf_counter()
    for first in range(0, len(keys), READ_BATCH):
        entry.read(keys[first : first + READ_BATCH])
    return (time.perf_counter() - started) / len(keys)


def _drop_from_page_cache(entry: Entry) -> None:
    """Take an entry's shards out of the page cache, where the system has a call for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for shard in entry.shards():
        with opened(shard.path) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
