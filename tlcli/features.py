"""Features of images: each image goes through the frozen prefix once, and the cache keeps the row.

    image bytes -> SHA-256 -> row in the cache?  yes: read it
                                                 no:  decode -> resize -> prefix -> cache

An `Extractor` is a prefix on a device with its transform; `FeatureStore` is its entry of the cache. Rows do
not depend on order, batch or restart: every batch is padded to one size, and on a CPU each batch is computed
by a single thread, several batches side by side. (That also bears a busy machine better than one batch over
all cores: there the cores wait for the slowest, measured 60 against 18 images/s under a load of 10.)
"""

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcli import __version__, paths
from tlcli.backbones import inference
from tlcli.backbones.cut import Cut, cut_at
from tlcli.backbones.units import parse_freeze, units
from tlcli.backbones.zoo import Backbone, state_sha256
from tlcli.cache.entry import Entry
from tlcli.cache.key import SCHEMA
from tlcli.cache.store import Store
from tlcli.config import CacheMode
from tlcli.data.decode import POLICY, BadImage, DecodeError, decode, read_bytes
from tlcli.data.scan import Sample
from tlcli.data.split import Fingerprint
from tlcli.data.transforms import EvalTransform
from tlcli.device import DeviceChoice, DtypeChoice, choose_device, choose_dtype
from tlcli.errors import BackboneError
from tlcli.progress import Progress

logger = logging.getLogger(__name__)

CPU_BATCH = 4  # of 224 x 224 pixels, more of smaller ones: the maps of a batch should stay in the cache
MAX_CPU_BATCH = 16
GPU_BATCH = 128
PLAIN_VIEW = 0
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # largest relative difference `--cache verify` accepts

Array = np.ndarray[Any, Any]


class Extractor:
    """A frozen prefix on its device, with the transform before it.

    Args:
        backbone: From `load_backbone`.
        freeze: Units to freeze: K, "all" or "none".
        device: Name of a device.
        dtype: Compute type: auto, fp32 or bf16.
        cache_dtype: Type of the rows: auto, fp32 or bf16.

    Attributes:
        cut: Where the backbone is divided.
        row_dtype: "fp32" or "bf16".
        spec: The facts that make a row what it is: the entry key is their hash.
        reason: Why this device and these types, for people.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        freeze: str | None = "all",
        device: str = "auto",
        dtype: str = "auto",
        cache_dtype: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.device_choice: DeviceChoice = choose_device(device)
        self.device = self.device_choice.device
        size = backbone.preprocess.image_size
        self.cut: Cut = cut_at(backbone.model, parse_freeze(freeze, len(units(backbone.model))), size)
        self.dtype_choice: DtypeChoice = choose_dtype(dtype, self.device)
        prefix_sha256 = state_sha256(self.cut.prefix)
        self._fast = inference.prepare(self.cut.prefix, size, self.dtype_choice.dtype, self.device)
        self._fast_sha256 = state_sha256(self._fast.module)
        pooled = len(self.cut.row_shape) == 1
        self.row_dtype = ("fp32" if pooled else "bf16") if cache_dtype == "auto" else cache_dtype
        self.transform = EvalTransform(backbone.preprocess)
        self.spec: dict[str, Any] = {
            "schema": SCHEMA,
            "architecture": backbone.architecture,
            "arguments": json.dumps(backbone.arguments, sort_keys=True, default=str),
            "prefix_sha256": prefix_sha256,
            "cut": self.cut.node,
            "preprocess": self.transform.facts(),
            "decode": dict(POLICY),
            "compute": self._fast.facts,
            "row_dtype": self.row_dtype,
            "row_shape": list(self.cut.row_shape),
        }
        mean = torch.tensor(backbone.preprocess.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(backbone.preprocess.std, device=self.device).view(1, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        on_cpu = round(CPU_BATCH * 224 * 224 / (size[0] * size[1]))
        self.batch_size = max(1, min(MAX_CPU_BATCH, on_cpu)) if self.device.type == "cpu" else GPU_BATCH

    @property
    def reason(self) -> str:
        """Return the device and compute type with why they were taken."""
        return f"{self.device} ({self.device_choice.reason}); {self._fast.reason}, {self.dtype_choice.reason}"

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return int(np.prod(self.cut.row_shape)) * (4 if self.row_dtype == "fp32" else 2)

    def environment(self) -> dict[str, Any]:
        """Return versions and device, recorded with the rows but no part of their key."""
        import timm
        import torchvision

        return {
            "tlcli": __version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "timm": str(timm.__version__),
            "device": str(self.device),
        }

    def check_unchanged(self) -> None:
        """Refuse rows of a prefix that is no longer the one the key was made of.

        Raises:
            BackboneError: A weight or buffer changed since the start.
        """
        if state_sha256(self._fast.module) != self._fast_sha256:
            raise BackboneError(
                "The backbone's weights changed while features were computed; these features are not kept.",
                hint="Nothing may train the prefix during extraction.",
            )

    def rows(self, images: Tensor) -> Tensor:
        """Return the rows of uint8 images [n, 3, h, w], n at most the batch size, on the device.

        The batch is padded to the batch size, so that a row does not depend on the size of its batch.
        """
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros((self.batch_size - count, *images.shape[1:]))])
        # TF32 would make "fp32" on a GPU something else than on a CPU.
        on_gpu = self.device.type == "cuda"
        precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if on_gpu else nullcontext()
        with torch.inference_mode(), precise:
            pixels = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            rows: Tensor = self._fast.module(torch.addcmul(self._shift, pixels.float(), self._scale))
            return rows[:count].to(torch.float32 if self.row_dtype == "fp32" else torch.bfloat16)

    def predicted_seconds(self, samples: Sequence[Sample], workers: int) -> float:
        """Return about how long the rows of `samples` will take, from a trial of a few batches."""
        lanes = min(workers, 4)
        few = samples[: lanes * self.batch_size]
        if not few:
            return 0.0
        started = time.perf_counter()
        for _ in self.compute(few, lanes):
            pass
        return (time.perf_counter() - started) / len(few) * len(samples) * lanes / workers

    def compute(self, samples: Sequence[Sample], workers: int) -> Iterator["Batch"]:
        """Yield the rows of `samples` in batches, in order, decoded by `workers` threads.

        Each file is read once here: the bytes that are hashed are the bytes that are decoded.
        """
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers, "tlcli-features", torch.set_num_threads, (1,))
        waiting: deque[Future[Batch]] = deque()
        computing: deque[Batch] = deque()
        on_cpu = self.device.type == "cpu"
        try:
            for start in range(0, len(samples), self.batch_size):
                waiting.append(pool.submit(self._load_batch, samples[start : start + self.batch_size]))
                if len(waiting) <= 2 * workers:
                    continue
                computing.append(self._start(waiting.popleft().result()))
                if on_cpu or len(computing) > 1:  # a GPU computes one batch while the one before is taken
                    yield computing.popleft()
            while waiting:
                computing.append(self._start(waiting.popleft().result()))
                yield computing.popleft()
            yield from computing
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # the threads' own setting also set MKL's, which is everybody's

    def _load_batch(self, samples: Sequence[Sample]) -> "Batch":
        """Return decoded images, and on a CPU already their rows; runs in a thread of the pool."""
        batch, images = Batch(), []
        for sample in samples:
            try:
                data = read_bytes(sample.path)
                key = hashlib.sha256(data).hexdigest()
                try:
                    images.append(self.transform(decode(data)))
                    batch.keys.append((key, sample.name))
                except DecodeError as error:
                    batch.undecodable[key] = error.reason
                    raise
            except DecodeError as error:
                batch.bad_images.append(BadImage(sample.name, sample.path, error.reason))
        if images:
            batch.tensor = torch.stack(images)
            if self.device.type == "cpu":
                batch.tensor = self.rows(batch.tensor)
            elif self.device.type == "cuda":
                batch.tensor = batch.tensor.pin_memory()
        return batch

    def _start(self, batch: "Batch") -> "Batch":
        """Start computing a decoded batch's rows on a GPU, and their way back."""
        if batch.tensor is None or self.device.type == "cpu":
            return batch
        rows = self.rows(batch.tensor)
        if self.device.type == "cuda":
            # Copied as soon as it is computed: asked for later, it would wait for the batch behind it.
            batch.tensor = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            batch.tensor.copy_(rows, non_blocking=True)
            batch.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            batch.ready.record()
        else:
            batch.tensor = rows
        return batch


@dataclass
class Batch:
    """Rows of a few images.

    Attributes:
        keys: SHA-256 and name of each image, in the order of the rows.
        bad_images: The images that could not be read or decoded.
        undecodable: SHA-256 -> reason of those that could be read.
        tensor: The rows; before they are computed, the images.
        ready: When set, to be waited for before the rows are read.
    """

    keys: list[tuple[str, str]] = field(default_factory=list)
    bad_images: list[BadImage] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)
    tensor: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def rows(self) -> Tensor | None:
        """Return the rows on the CPU, in the order of the keys, or None when there are none."""
        if self.ready is not None:
            self.ready.synchronize()
        return None if self.tensor is None else self.tensor.cpu()

    def items(self) -> Iterator[tuple[str, str, Array]]:
        """Yield SHA-256, name and row (float32, or bf16 as uint16 bit patterns)."""
        rows = self.rows()
        if rows is not None:
            for (key, name), row in zip(self.keys, to_numpy(rows), strict=True):
                yield key, name, row


@dataclass
class Features:
    """What became of the images of a data set.

    Attributes:
        rows_reused: Images whose row was there already.
        rows_computed: Rows computed now; copies of one image share a row.
        bad_images: Images skipped, each with its reason.
        entry_key: Key of the cache entry; None with --cache never.
        seconds: Time the missing rows took.
        largest_difference: With --cache verify, the largest relative difference to a stored row.
        differing: With --cache verify, names of images whose stored row is not what was recomputed.
    """

    rows_reused: int = 0
    rows_computed: int = 0
    bad_images: list[BadImage] = field(default_factory=list)
    entry_key: str | None = None
    seconds: float = 0.0
    largest_difference: float = 0.0
    differing: list[str] = field(default_factory=list)


class FeatureStore:
    """The rows of one extractor: in the cache or, with --cache never, in memory.

    Args:
        extractor: Computes what is missing.
        mode: auto and always use the cache, never does not, verify recomputes everything and compares.
    """

    def __init__(self, extractor: Extractor, mode: CacheMode = "auto") -> None:
        self.extractor = extractor
        self.mode = mode
        self.store = Store(paths.features_dir())
        self.entry: Entry | None = None if mode == "never" else self.store.entry(extractor.spec)
        self._memory: dict[str, Array] = {}

    def known(self) -> set[str]:
        """Return SHA-256 of the images whose plain row is there now."""
        if self.entry is None:
            return set(self._memory)
        return {key for key, view in self.entry.rows() if view == PLAIN_VIEW}

    def missing(self, samples: Sequence[Sample], fingerprints: Sequence[Fingerprint]) -> list[Sample]:
        """Return one sample for each image whose row must be computed."""
        taken = set() if self.mode == "verify" else self.known()
        result = []
        for sample, found in zip(samples, fingerprints, strict=True):
            if found.sha256 is not None and found.sha256 not in taken:
                taken.add(found.sha256)
                result.append(sample)
        return result

    def num_new(self, fingerprints: Sequence[Fingerprint]) -> int:
        """Return how many rows the cache will grow by."""
        if self.entry is None:
            return 0
        return len({found.sha256 for found in fingerprints if found.sha256} - self.known())

    def check_space(self, num_rows: int, *, write: bool = True) -> None:
        """Refuse rows that would not fit or could not be written, before any is computed.

        Args:
            num_rows: Rows to store.
            write: Also make the cache folder and write in it, which a mere plan must not.

        Raises:
            StorageError: Too little space, or the cache cannot be written.
        """
        if self.entry is not None and num_rows:
            self.store.check_space(num_rows * self.extractor.row_bytes)
            if write:
                self.store.check_writable()

    def fill(
        self,
        samples: Sequence[Sample],
        fingerprints: Sequence[Fingerprint],
        *,
        workers: int,
        progress: Progress,
        stop: Callable[[int], bool] = lambda _num_bad: False,
    ) -> Features:
        """Compute every row that is missing.

        Args:
            samples: The images.
            fingerprints: One a sample.
            workers: Threads that decode, and on a CPU compute.
            progress: Told of every image.
            stop: Called with the number of bad images so far; True ends the work early. Rows finished by
                then are kept, and of the bad images only those found by then are listed.

        Raises:
            StorageError: The cache cannot take the rows.
            BackboneError: Rows are not finite, or weights changed meanwhile.
        """
        started = time.perf_counter()
        before = self.known()
        todo = self.missing(samples, fingerprints)
        self.check_space(self.num_new(fingerprints))
        unreadable = sum(found.sha256 is None for found in fingerprints)
        result = Features(entry_key=self.entry.key if self.entry else None)
        undecodable: dict[str, str] = {}
        computed: set[str] = set()
        stopped = stop(unreadable)
        progress.start("computing features", len(todo))
        with self._sink(result) as sink:
            for batch in self.extractor.compute([] if stopped else todo, workers):
                undecodable |= batch.undecodable
                for key, name, row in batch.items():
                    sink(key, name, row)
                    computed.add(key)
                progress.advance(len(batch.keys) + len(batch.bad_images))
                if stopped := stop(unreadable + len(undecodable)):
                    break
        progress.finish()
        result.rows_computed = len(computed)
        for sample, found in zip(samples, fingerprints, strict=True):
            key = found.sha256 or ""
            lost = key not in computed and key not in before
            if found.reason or key in undecodable or (lost and not stopped):
                reason = found.reason or undecodable.get(key) or "changed or vanished while it was read"
                result.bad_images.append(BadImage(sample.name, sample.path, reason))
            elif self.mode != "verify":
                result.rows_reused += key in before
        result.seconds = time.perf_counter() - started
        return result

    @contextmanager
    def _sink(self, result: Features) -> Iterator[Callable[[str, str, Array], None]]:
        """Give the function that takes each computed row: the cache's writer, memory, or a comparison."""
        if self.entry is None:
            yield lambda key, _name, row: self._memory.__setitem__(key, row.copy())
            return
        entry, extractor = self.entry, self.extractor
        with entry.writer(extractor.environment(), guard=extractor.check_unchanged) as writer:

            def take(key: str, name: str, row: Array) -> None:
                if self.mode != "verify" or not self._compare(entry, key, name, row, result):
                    writer.add((key, PLAIN_VIEW), row, name)

            yield take

    def _compare(self, entry: Entry, key: str, name: str, row: Array, result: Features) -> bool:
        """Compare a recomputed row with the stored one; return whether there is one."""
        stored, missing = entry.read([(key, PLAIN_VIEW)])
        if missing:
            return False
        result.rows_reused += 1
        new, old = (to_tensor(value).float() for value in (row, stored[0]))
        difference = float((new - old).norm() / old.norm().clamp_min(1e-12))
        result.largest_difference = max(result.largest_difference, difference)
        if not difference <= TOLERANCE[self.extractor.row_dtype]:
            result.differing.append(name)
        return True

    def read(self, keys: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return the rows of images, and the positions of those that are not there (zeros).

        Args:
            keys: SHA-256 of each image, in the order wanted.

        Returns:
            float32 or bfloat16 [len(keys), *row_shape], in the order of `keys`; ascending positions.
        """
        if self.entry is not None:
            rows, missing = self.entry.read([(key, PLAIN_VIEW) for key in keys])
            return to_tensor(rows), missing
        shape = self.extractor.cut.row_shape
        zero = np.zeros(shape, np.float32 if self.extractor.row_dtype == "fp32" else np.uint16)
        rows = (
            np.stack([self._memory.get(key, zero) for key in keys])
            if keys
            else np.empty((0, *shape), zero.dtype)
        )
        return to_tensor(rows), [i for i, key in enumerate(keys) if key not in self._memory]


def to_numpy(rows: Tensor) -> Array:
    """Return rows as the cache takes them: float32, or bf16 as uint16 bit patterns."""
    rows = rows.cpu().contiguous()
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


def to_tensor(rows: Array) -> Tensor:
    """Return the cache's rows as a tensor, float32 or bfloat16, of the same memory."""
    if rows.dtype == np.uint16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
