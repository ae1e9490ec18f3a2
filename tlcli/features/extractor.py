"""Features of images: each image goes through the frozen prefix once, and the cache keeps the row.

    image bytes -> SHA-256 -> row in the cache?  yes: read it
                                                 no:  decode -> resize or augment -> prefix -> cache

An `Extractor` is a prefix on a device with its transform; feature_store.py keeps its rows. View 0 of an image
is the plain one; every other is a pure function of the image's hash, the view and a seed, so that its row can
be kept too. Rows do not depend on order, batch or restart: every batch is padded to one size, and on a CPU
each batch is computed by a single thread, several batches side by side. (That also bears a busy machine
better than one batch over all cores: there the cores wait for the slowest, measured 60 against 18 images/s
under a load of 10.)
"""

import copy
import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlcli.backbones import inference
from tlcli.backbones.backbone import Backbone, state_sha256
from tlcli.backbones.cut import Cut, cut_at
from tlcli.backbones.memory_format import in_memory_format
from tlcli.backbones.units import num_frozen_units, units
from tlcli.cache.key import SCHEMA
from tlcli.data.dataset import Sample
from tlcli.data.decode import POLICY, decode
from tlcli.data.image_files import BadImage, DecodeError, read_bytes
from tlcli.errors import BackboneError
from tlcli.features.batch import Batch, Item, groups
from tlcli.features.views import PLAIN_VIEW, ViewMaker, Views
from tlcli.machine.device import DeviceChoice, DtypeChoice, choose_device, choose_dtype
from tlcli.machine.versions import environment

CPU_BATCH = 4  # of 224 x 224 pixels, more of smaller ones: the maps of a batch should stay in the cache
MAX_CPU_BATCH = 16
GPU_BATCH = 128
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Extractor:
    """A frozen prefix on its device, with the transform before it.

    Args:
        backbone: From `load_backbone`.
        freeze: Units to freeze: K, "all" or "none".
        device: Name of a device.
        dtype: Compute type: auto, fp32 or bf16.
        cache_dtype: Type of the rows: auto, fp32 or bf16.
        views: How views from 1 on are made; None where view 0 is all there is.

    Attributes:
        cut: Where the backbone is divided.
        fast: The prefix as it computes.
        view: (image, SHA-256 of its file, number) -> one view of it; see ViewMaker.
        row_dtype: "fp32" or "bf16".
        spec: The facts that make a row of view 0 what it is: the entry key is their hash.
        views_spec: The same for the other views; None without `views`.
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
        views: Views | None = None,
    ) -> None:
        self.backbone = backbone
        self.device_choice: DeviceChoice = choose_device(device)
        self.device = self.device_choice.device
        size = backbone.preprocess.image_size
        self.cut: Cut = cut_at(backbone.model, num_frozen_units(freeze, len(units(backbone.model))), size)
        self.dtype_choice: DtypeChoice = choose_dtype(dtype, self.device)
        prefix_sha256 = state_sha256(self.cut.prefix)
        self.fast = inference.prepare(self.cut.prefix, size, self.dtype_choice.dtype, self.device)
        self.fast.module.eval()  # the layers that folding put in, too
        self._fast_sha256 = state_sha256(self.fast.module)
        pooled = len(self.cut.row_shape) == 1
        self.row_dtype = ("fp32" if pooled else "bf16") if cache_dtype == "auto" else cache_dtype
        self.view = ViewMaker(backbone.preprocess, views)
        self.spec: dict[str, Any] = {
            "schema": SCHEMA,
            "architecture": backbone.architecture,
            "arguments": json.dumps(backbone.arguments, sort_keys=True, default=str),
            "prefix_sha256": prefix_sha256,
            "cut": self.cut.node,
            "preprocess": self.view.transform.key_facts(),
            "decode": dict(POLICY),
            "compute": self.fast.facts,
            "row_dtype": self.row_dtype,
            "row_shape": list(self.cut.row_shape),
        }
        self.views = views
        self.views_spec: dict[str, Any] | None = {**self.spec, **views.key_facts()} if views else None
        mean = torch.tensor(backbone.preprocess.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(backbone.preprocess.std, device=self.device).view(1, 3, 1, 1)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        on_cpu = round(CPU_BATCH * 224 * 224 / (size[0] * size[1]))
        self.batch_size = max(1, min(MAX_CPU_BATCH, on_cpu)) if self.device.type == "cpu" else GPU_BATCH

    @property
    def device_reason(self) -> str:
        """Return the device with why it was taken."""
        return f"{self.device} ({self.device_choice.reason})"

    @property
    def number_types(self) -> dict[str, str | None]:
        """Return what frozen units and those after them compute in: fp32, bf16, or None where none are."""
        prefix = self.fast.facts["dtype"] if self.cut.num_frozen_units else None
        return {"prefix": prefix, "suffix": None if isinstance(self.cut.suffix, nn.Identity) else "fp32"}

    @property
    def reason(self) -> str:
        """Return the device and compute type with why they were taken."""
        return f"{self.device_reason}; {self.dtype_reason}"

    @property
    def dtype_reason(self) -> str:
        """Return what the prefix computes in, or the network in parts, and why."""
        return f"{self.fast.reason}, {self.dtype_choice.reason}"

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return int(np.prod(self.cut.row_shape)) * (4 if self.row_dtype == "fp32" else 2)

    def environment(self) -> dict[str, str]:
        """Return versions and device, recorded with the rows but not part of their key."""
        return environment(self.device)

    def check_unchanged(self) -> None:
        """Refuse rows of a prefix that is no longer the one the key was made of.

        Raises:
            BackboneError: A weight or buffer changed since the start, or a layer is in train mode.
        """
        if any(layer.training for layer in self.fast.module.modules()):
            raise BackboneError(
                "The backbone is in train mode while features are computed; these features are not kept.",
                hint="Nothing may train the prefix during extraction.",
            )
        if state_sha256(self.fast.module) != self._fast_sha256:
            raise BackboneError(
                "The backbone's weights changed while features were computed; these features are not kept.",
                hint="Nothing may train the prefix during extraction.",
            )

    def rows(self, images: Tensor, *, pad: bool = True) -> Tensor:
        """Return the rows of uint8 images [n, 3, h, w], n at most the batch size, on the device.

        Unless `pad` is off, the batch is padded to the batch size, so that a row does not depend on the size
        of its batch. Several threads may call it at once. Rows carry no gradient, but may be trained from.
        """
        return self.computed(self.from_pixels, images, pad=pad)

    def from_pixels(self, images: Tensor) -> Tensor:
        """Return what the prefix gives for pixel values [n, 3, h, w] of any type, not padded."""
        rows: Tensor = self.fast.module(self.normalise(images))
        return rows

    def computed(self, function: Callable[[Tensor], Tensor], batch: Tensor, *, pad: bool = True) -> Tensor:
        """Return what `function` gives for a batch, in the number type of the rows; otherwise as `rows`."""
        count = len(batch)
        if pad and count < self.batch_size:
            batch = torch.cat([batch, batch.new_zeros((self.batch_size - count, *batch.shape[1:]))])
        # TF32 would make "fp32" on a GPU something else than on a CPU.
        on_gpu = self.device.type == "cuda"
        precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if on_gpu else nullcontext()
        with torch.no_grad(), precise:
            return function(batch)[:count].to(TYPES[self.row_dtype])

    def derived(
        self,
        module: nn.Module,
        cut: Cut,
        row_dtype: str,
        facts: Mapping[str, Any],
        *,
        pixels: bool = False,
        then: str = "",
    ) -> "Extractor":
        """Return an extractor of other rows of the same images, on the same device.

        Args:
            module: Normalised images (pixel values with `pixels`) -> rows, in eval mode on the device.
            cut: Says where the rows are, and their shape.
            row_dtype: "fp32" or "bf16".
            facts: What makes the rows what they are, beside the facts of this extractor's rows.
            pixels: Images are not normalised.
            then: What the reason of the number type has besides.
        """
        other = copy.copy(self)
        other.fast = dataclasses.replace(self.fast, module=module, reason=self.fast.reason + then)
        other._fast_sha256 = state_sha256(module)
        other.cut, other.row_dtype = cut, row_dtype
        changes = {"cut": cut.node, "row_dtype": row_dtype, "row_shape": list(cut.row_shape), **facts}
        other.spec = {**self.spec, **changes}
        other.views_spec = {**self.views_spec, **changes} if self.views_spec else None
        if pixels:
            other.scale, other.shift = torch.ones_like(self.scale), torch.zeros_like(self.shift)
        return other

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 images [n, 3, h, w] as the prefix takes them: float32, on the device."""
        pixels = in_memory_format(images.to(self.device, non_blocking=True), self.fast.channels_last)
        return torch.addcmul(self.shift, pixels.float(), self.scale)

    def compute(self, samples: Sequence[Sample], workers: int) -> Iterator[Batch]:
        """Yield the plain rows of `samples` in batches, in order; see `compute_items`."""
        return self.compute_items([(sample, (PLAIN_VIEW,)) for sample in samples], workers)

    def compute_items(self, items: Sequence[Item], workers: int) -> Iterator[Batch]:
        """Yield the rows of views of images in batches, in order, decoded by `workers` threads.

        Each file is read and decoded once, for all of its views: the bytes that are hashed are the bytes that
        are decoded.
        """
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers, "tlcli-features", torch.set_num_threads, (1,))
        waiting: deque[Future[Batch]] = deque()
        computing: deque[Batch] = deque()
        on_cpu = self.device.type == "cpu"
        try:
            for group in groups(items, self.batch_size):
                waiting.append(pool.submit(self._load_batch, group))
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

    def _load_batch(self, items: Sequence[Item]) -> Batch:
        """Return decoded images, and on a CPU already their rows; runs in a thread of the pool."""
        batch, images = Batch(), []
        for sample, views in items:
            batch.num_items += len(views)
            try:
                data = read_bytes(sample.path)
                key = hashlib.sha256(data).hexdigest()
                try:
                    image = decode(data)
                except DecodeError as error:
                    batch.undecodable[key] = error.reason
                    raise
            except DecodeError as error:
                batch.bad_images.append(BadImage(sample.name, sample.path, error.reason))
                continue
            for view in views:
                images.append(self.view(image, key, view))
                batch.keys.append((key, sample.name))
                batch.views.append(view)
        if images:
            batch.tensor = torch.stack(images)
            if self.device.type == "cpu":
                batch.tensor = self._all_rows(batch.tensor)
            elif self.device.type == "cuda":
                batch.tensor = batch.tensor.pin_memory()
        return batch

    def _all_rows(self, images: Tensor) -> Tensor:
        """Return the rows of any number of images."""
        if len(images) <= self.batch_size:
            return self.rows(images)
        return torch.cat([self.rows(part) for part in torch.split(images, self.batch_size)])

    def _start(self, batch: Batch) -> Batch:
        """Start computing a decoded batch's rows on a GPU, and their way back."""
        if batch.tensor is None or self.device.type == "cpu":
            return batch
        rows = self._all_rows(batch.tensor)
        if self.device.type == "cuda":
            # Copied as soon as it is computed: asked for later, it would wait for the batch behind it.
            batch.tensor = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            batch.tensor.copy_(rows, non_blocking=True)
            batch.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            batch.ready.record()
        else:
            batch.tensor = rows
        return batch
