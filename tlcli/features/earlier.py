"""Rows kept before the cut, from which the rows at the cut are computed: the same ones, bit for bit on a CPU.

The prefix is prepared once and divided as it is. What crosses an earlier place is kept without loss; the
frozen rest then runs in batches of the same size, and what it gives is rounded as a row at the cut is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlcli.backbones.earlier import INPUT, EarlierParts, earlier_parts
from tlcli.backbones.exactness import BATCH
from tlcli.backbones.inference import median_cosine
from tlcli.backbones.memory_format import in_memory_format
from tlcli.backbones.units import units
from tlcli.features.extractor import Extractor
from tlcli.machine.device import torch_threads

MAX_EARLIER = 3
MIN_COSINE = 0.9999  # on a GPU, where the kernels chosen may differ


@dataclass(frozen=True)
class EarlierRows:
    """Rows at a place before the cut.

    Attributes:
        where: Name of the place.
        extractor: Computes and stores the rows there.
        at_cut: Computes the rows at the cut.
        parts: The divided prefix.
    """

    where: str
    extractor: Extractor
    at_cut: Extractor
    parts: EarlierParts

    def rows_at_cut(self, rows: Tensor) -> Tensor:
        """Return rows at the cut, as `at_cut.rows` does, of rows at the place, at most `batch_size` of them.

        Several threads may call it at once.
        """
        on_cpu = self.at_cut.device.type == "cpu"
        return self.at_cut.computed(self._rest, rows, pad=on_cpu)

    def _rest(self, rows: Tensor) -> Tensor:
        if self.where == INPUT:
            return self.at_cut.from_pixels(rows)
        placed = in_memory_format(rows.to(self.at_cut.device), self.at_cut.fast.channels_last)
        found: Tensor = self.parts.rest(placed)
        return found

    def is_exact(self) -> bool:
        """Return whether the rows at the cut are those that come from the images; tried on noise."""
        size = self.at_cut.backbone.preprocess.image_size
        on_cpu = self.at_cut.device.type == "cpu"
        draw = torch.Generator().manual_seed(0)
        count = self.at_cut.batch_size if on_cpu else BATCH
        images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=draw)
        with torch_threads(1):  # as each of the threads that compute has
            expected = self.at_cut.rows(images)
            found = self.rows_at_cut(self.extractor.rows(images).cpu())
        if on_cpu:
            return torch.equal(found, expected)
        return median_cosine(found.float(), expected.float()) >= MIN_COSINE


def earlier_rows(extractor: Extractor) -> list[EarlierRows]:
    """Return where an extractor's rows could be kept earlier, with fewer bytes; the last of them first.

    Args:
        extractor: Cut where the trained units begin.
    """
    size = extractor.backbone.preprocess.image_size
    images = extractor.normalise(torch.zeros(BATCH, 3, *size, dtype=torch.uint8))
    frozen = units(extractor.backbone.model)[: extractor.cut.num_frozen_units]
    found = earlier_parts(extractor.fast.module, images, extractor.row_bytes, frozen)
    return [
        EarlierRows(parts.where, _derived(extractor, parts), extractor, parts)
        for parts in found[-MAX_EARLIER:]
    ]


def rows_at(
    extractor: Extractor, where: str, places: Sequence[EarlierRows] | None = None
) -> EarlierRows | None:
    """Return the rows at a place, or None where there are none from which those at the cut come exactly."""
    for place in earlier_rows(extractor) if places is None else places:
        if place.where == where:
            return place if place.is_exact() else None
    return None


def _derived(extractor: Extractor, parts: EarlierParts) -> Extractor:
    cut = extractor.cut
    share = parts.saved.share * (cut.saved.share if cut.saved else 1.0)
    saved = replace(parts.saved, share=share)
    facts = {"divided": cut.node} | ({"values": "pixels"} if parts.where == INPUT else {})
    return extractor.derived(
        parts.first,
        replace(cut, node=parts.where, row_shape=parts.row_shape, saved=saved),
        "fp32" if parts.dtype == torch.float32 else "bf16",
        facts,
        pixels=parts.where == INPUT,
    )
