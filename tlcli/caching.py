"""Where the frozen work is cached when only part of a backbone is trained, decided from measured costs.

    caching at a place   once, missing rows:  read, decode, augment, prefix up to the place, write
                         each epoch:          read the row, the frozen rest up to the cut, the trained part
    recomputing          each epoch:          read, decode, augment, prefix up to the cut, the trained part

A place is the cut, or an operation before it where fewer numbers cross: rows of early layers are large, and
what fits neither the disk nor the memory that caches it is read slowly. `measure` times the parts on a few of
the user's images, `choose` is plain arithmetic on the result.
"""

import copy
import dataclasses
import functools
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlcli import memory, processes
from tlcli.backbones.cut import cut_at, earlier_cuts
from tlcli.cache.entry import Entry
from tlcli.cache.files import opened, size_text, storage_errors
from tlcli.cache.key import RowKey
from tlcli.cache.store import Store
from tlcli.data.collection import Collection
from tlcli.data.decode import DecodeError, decode, read_bytes
from tlcli.device import torch_threads
from tlcli.errors import BackboneError, DataError
from tlcli.feature_store import FeatureStore
from tlcli.features import PLAIN_VIEW, Extractor

FEW_IMAGES = 200  # fewer are not worth measuring: either side takes seconds
TIE = 0.05  # within it, the side that needs less disk is taken
MAX_EARLIER = 3
VALIDATION_SHARE = 1 / 3  # of a training step: no backward pass
PAGE_CACHE_SHARE = 0.5  # of the memory that is left, for files
TRIAL_BYTES = 16 << 20  # of rows written and read
MIN_TRIAL_ROWS, MAX_TRIAL_ROWS = 16, 512
MIN_TRIAL_IMAGES, MAX_TRIAL_IMAGES = 12, 128
TRIAL_SECONDS = 0.5  # for each of a handful of parts
READ_BATCH = 32
REPEATS = 3
CUT, RECOMPUTE = "cut", "recompute"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What caching at one place costs; seconds are those of one row.

    Attributes:
        where: "cut", or the name of an earlier operation ("input" is the image itself).
        row_bytes: Bytes of a row.
        rows_to_compute: Rows that are not cached yet.
        prefix_seconds: From the image to the place, when the cache is filled.
        rest_seconds: From the place to the cut, when a batch is trained; 0 at the cut.
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
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Option:
    """One way to train, with the seconds it takes and the bytes it writes.

    Attributes:
        where: As in CachingDecision.
        fill_seconds: Before the first epoch.
        train_seconds: All epochs.
        new_bytes: Written to the cache.
        fits: Whether the disk has room for them.
    """

    where: str
    fill_seconds: float
    train_seconds: float
    new_bytes: int
    fits: bool = True

    @property
    def seconds(self) -> float:
        """Return the seconds from the beginning to the last epoch."""
        return self.fill_seconds + self.train_seconds


@dataclass(frozen=True)
class CachingDecision:
    """Where the frozen work is cached.

    Attributes:
        where: "cut", the name of an earlier operation for `cut_at`, or "recompute".
        reason: Why, with the numbers, for people.
        options: Every way that was compared, the chosen one first; empty when nothing was measured.
        costs: What they were computed from; None when nothing was measured.
    """

    where: str
    reason: str
    options: tuple[Option, ...] = ()
    costs: CachingCosts | None = None

    @property
    def node(self) -> str | None:
        """Return what `cut_at` takes: None for the cut itself and for recomputing."""
        return None if self.where in {CUT, RECOMPUTE} else self.where

    def document(self) -> dict[str, Any]:
        """Return the decision and its numbers for machines."""
        costs = dataclasses.asdict(self.costs) if self.costs else None
        options = [{**dataclasses.asdict(option), "seconds": option.seconds} for option in self.options]
        return {
            "where": self.where, "reason": self.reason, "options": _rounded(options), "costs": _rounded(costs)
        }  # fmt: skip


def _rounded(value: Any) -> Any:
    """Return plain data with floats to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


# ---- the decision ----------------------------------------------------------------------------------------


def choose(costs: CachingCosts) -> CachingDecision:
    """Return the quickest way; of ways within `TIE` of it, the one that writes least."""
    options = [*(cached(costs, place) for place in costs.places), recomputed(costs)]
    possible = [option for option in options if option.fits]
    quickest = min(option.seconds for option in possible)
    near = [option for option in possible if option.seconds <= (1 + TIE) * quickest]
    best = min(near, key=lambda option: (option.new_bytes, option.seconds))
    others = [option for option in options if option is not best]
    return CachingDecision(best.where, _reason(best, others), (best, *others), costs)


def cached(costs: CachingCosts, place: Place) -> Option:
    """Return what caching at a place takes."""
    rows = place.rows_to_compute
    images = rows / costs.num_views  # one that is decoded gives all of its views
    loading = (images * costs.load_seconds + rows * costs.view_seconds) / costs.workers
    fill = _together(costs, loading, rows * place.prefix_seconds) + rows * place.write_seconds
    passes = costs.epochs * (costs.num_train + costs.num_val)
    train = _together(
        costs, passes * place.read_seconds / costs.workers, passes * place.rest_seconds + _steps(costs),
        device_is_whole=True,
    )  # fmt: skip
    new_bytes = rows * place.row_bytes
    return Option(place.where, fill, train, new_bytes, fits=new_bytes <= costs.free_bytes)


def recomputed(costs: CachingCosts) -> Option:
    """Return what computing everything anew in each epoch takes."""
    passes = costs.epochs * (costs.num_train + costs.num_val)
    loading = passes * (costs.load_seconds + costs.view_seconds) / costs.workers
    prefix = passes * costs.prefix_seconds / (1 if costs.overlap else costs.workers)
    train = _together(costs, loading, prefix + _steps(costs), device_is_whole=True)
    return Option(RECOMPUTE, 0.0, train, 0)


def _together(
    costs: CachingCosts, loading: float, computing: float, *, device_is_whole: bool = False
) -> float:
    """Return the seconds of loading and computing: side by side with a GPU, in turns on a CPU's cores."""
    if costs.overlap:
        return max(loading, computing)
    return loading + (computing if device_is_whole else computing / costs.workers)


def _steps(costs: CachingCosts) -> float:
    """Return the seconds of the trained part, which every way takes alike."""
    return costs.epochs * costs.step_seconds * (costs.num_train + VALIDATION_SHARE * costs.num_val)


def _reason(best: Option, others: Sequence[Option]) -> str:
    def place(option: Option) -> str:
        names = {CUT: "at the cut", "input": "the decoded images"}
        return "caching " + names.get(option.where, f"at {option.where}")

    def told(option: Option) -> str:
        if option.where == RECOMPUTE:
            return f"recomputing would take {option.seconds:,.0f} s"
        if not option.fits:
            return f"{place(option)} needs {size_text(option.new_bytes)}, more than is free"
        return f"{place(option)} would take {option.seconds:,.0f} s ({size_text(option.new_bytes)})"

    if best.where == RECOMPUTE:
        text = f"recomputing in each epoch: {best.seconds:,.0f} s"
    else:
        text = f"{place(best)}: {best.fill_seconds:,.0f} s to fill + {best.train_seconds:,.0f} s reading and "
        text += f"training ({size_text(best.new_bytes)})"
    return ", ".join([text, *(told(option) for option in others)])


def decide(
    extractor: Extractor,
    collection: Collection,
    *,
    epochs: int,
    num_views: int,
    workers: int,
    amp: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> CachingDecision:
    """Return where to cache the frozen work of a training, from a measurement of a few seconds.

    Of several processes rank 0 measures, and all get its answer.

    Args:
        extractor: Cut where the trained units begin.
        collection: Training and validation images.
        epochs: Passes over them, the probe's included.
        num_views: Views of each training image that a cache would hold.
        workers: Threads.
        amp: Reduced compute type of the training, if any.
        max_bytes: Size that the cache must not grow beyond; None is no limit.

    Raises:
        StorageError: The cache's folder cannot be read or trusted.
    """
    found = None
    if processes.is_main():
        splits = collection.splits
        views = [range(num_views if split == "train" else 1) for split in splits]
        if len(splits) < FEW_IMAGES:
            store = FeatureStore(extractor, max_bytes=max_bytes)
            rows = store.num_new(collection.fingerprints, views)
            fits = rows * extractor.row_bytes <= store.store.free_bytes()
            found = _unmeasured(rows if fits else math.inf, len(splits), epochs)
        else:
            trial = _Trial(extractor, amp)
            costs = measure(trial, collection, views, workers, max_bytes)
            found = _possible(extractor, dataclasses.replace(costs, epochs=epochs))
    decision = processes.from_main(found)
    assert decision is not None
    return decision


def _unmeasured(rows: float, num_images: int, epochs: int) -> CachingDecision:
    """Return the side with fewer rows to compute, for a few images."""
    where = CUT if rows <= epochs * num_images else RECOMPUTE
    name = "caching at the cut" if where == CUT else "recomputing in each epoch"
    return CachingDecision(where, f"{name}: {num_images} images are too few to measure what is quicker")


def _possible(extractor: Extractor, costs: CachingCosts) -> CachingDecision:
    """Return the best way that the network can really be cut for."""
    decision = choose(costs)
    while decision.node is not None and not _can_be_cut(extractor, decision.node):
        places = tuple(place for place in costs.places if place.where != decision.where)
        costs = dataclasses.replace(costs, places=places)
        decision = choose(costs)
    return decision


def _can_be_cut(extractor: Extractor, node: str) -> bool:
    cut, backbone = extractor.cut, extractor.backbone
    try:
        cut_at(backbone.model, cut.num_frozen_units, backbone.preprocess.image_size, node)
    except BackboneError:
        return False
    return True


# ---- the measurement -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Times the parts of an extractor and of what is trained after it.

    On a CPU, processor time is what counts: loading, prefix and training share the cores, and what else the
    machine does while a part is timed says nothing about that part. On a GPU, time passes as it passes.
    """

    extractor: Extractor
    amp: torch.dtype | None

    @property
    def on_cpu(self) -> bool:
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

    def prefix_seconds(self, images: Tensor, workers: int) -> float:
        """Return a thread's seconds (a GPU's) for the row of an image."""
        rows = functools.partial(self.extractor.rows, images)
        if not self.on_cpu:
            return self.seconds(rows) / len(images)
        with _threads(workers) as pool:

            def together() -> None:
                for done in [pool.submit(rows) for _ in range(workers)]:
                    done.result()

            return self.seconds(together) / (workers * len(images))

    def earlier_stages(self, images: Tensor) -> list[tuple[str, tuple[int, ...], float, float]]:
        """Return name, row shape, share of the prefix's time, and seconds a row from there to the cut."""
        model, cut = self.extractor.backbone.model, self.extractor.cut
        if cut.node in {"all", "input"}:
            return []
        size = self.extractor.backbone.preprocess.image_size
        earlier = earlier_cuts(model, cut.num_frozen_units, size)[-MAX_EARLIER:]  # the last are the smallest
        pixels = self.extractor.normalise(images)
        found = []
        with torch.no_grad(), self.precision():
            whole = self.seconds(functools.partial(self.placed(cut.prefix), pixels)) / len(images)
            for item in earlier:
                part = 0.0
                if item.node != "input":
                    part = self.seconds(functools.partial(self.placed(item.prefix), pixels)) / len(images)
                part = min(part, whole)
                share = part / whole if whole else 1.0
                found.append((item.node, item.row_shape, share, whole - part))
        return found

    def step_seconds(self, images: Tensor) -> float:
        """Return the seconds a row of forward and backward pass through the trained part.

        In eval mode, so that no statistic and no random number is touched.
        """
        rows = self.extractor.rows(images).float()
        if rows.ndim == 4:
            rows = rows.contiguous(memory_format=torch.channels_last)  # as training does
        suffix = self.placed(self.extractor.cut.suffix).eval()
        trained = [parameter for parameter in suffix.parameters() if parameter.requires_grad]
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
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.extractor.device.type, dtype=self.amp)


def _threads(workers: int) -> ThreadPoolExecutor:
    """Return the threads that share the cores while a part is timed, as they do in training.

    One alone would be quicker than it is then: two threads of one core take turns, all share the memory.
    """
    return ThreadPoolExecutor(workers, "tlcli-trial", torch.set_num_threads, (1,))


def measure(
    trial: _Trial,
    collection: Collection,
    views: Sequence[Sequence[int]],
    workers: int,
    max_bytes: int | None = None,
) -> CachingCosts:
    """Return the costs of one image and row, measured on a few images.

    Nothing stays behind: trial rows are written below the cache's folder, or its nearest parent, and removed.

    Args:
        trial: Of the extractor cut where the trained units begin.
        collection: Training and validation images.
        views: The views of each that a cache would hold.
        workers: Threads.
        max_bytes: Size that the cache must not grow beyond; None is no limit.
    """
    extractor = trial.extractor
    store = FeatureStore(extractor, max_bytes=max_bytes)
    free = store.store.free_bytes()
    num_views, num_rows = max(map(len, views)), sum(map(len, views))
    with torch_threads(1):  # as each of the threads that load has
        images, load, view = trial.load(collection, PLAIN_VIEW if num_views == 1 else 1, workers)
        prefix = trial.prefix_seconds(images, workers)
    stages = [(CUT, extractor.cut.row_shape, 1.0, 0.0), *trial.earlier_stages(images)]
    places = []
    for where, row_shape, share, rest in stages:
        row_bytes = math.prod(row_shape) * (4 if extractor.row_dtype == "fp32" else 2)
        # What another place holds already is not looked up: it takes a network cut there.
        new = store.num_new(collection.fingerprints, views) if where == CUT else num_rows
        spec = {**extractor.spec, "row_shape": list(row_shape)}
        write, read = 0.0, 0.0
        if free > 2 * TRIAL_BYTES:
            write, read = disk_seconds(store.store, spec, num_rows * row_bytes)
        places.append(
            Place(where=where, row_bytes=row_bytes, rows_to_compute=new, prefix_seconds=share * prefix,
                  rest_seconds=rest, write_seconds=write, read_seconds=read)
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
    with storage_errors("write trial rows in", parent), tempfile.TemporaryDirectory(dir=parent) as folder:
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
            _forget(entry)
            read = kept * read + (1 - kept) * max(read, _read_seconds(entry, keys))
    return write, read


def _read_seconds(entry: Entry, keys: Sequence[RowKey]) -> float:
    started = time.perf_counter()
    for first in range(0, len(keys), READ_BATCH):
        entry.read(keys[first : first + READ_BATCH])
    return (time.perf_counter() - started) / len(keys)


def _forget(entry: Entry) -> None:
    """Take an entry's shards out of the page cache, where the system has a call for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for shard in entry.shards():
        with opened(shard.path) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
