"""A batch of rows on its way from the images to the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcli.cache.key import RowKey
from tlcli.data.dataset import Sample
from tlcli.data.image_files import BadImage

Array = np.ndarray[Any, Any]
Item = tuple[Sample, Sequence[int]]
"""An image and the views of it that are wanted."""
ROWS_AT_ONCE = 64  # a thread's turn: enough that several views of a few images fill whole batches


@dataclass
class Batch:
    """Rows of a few images.

    Attributes:
        keys: SHA-256 and name of the image of each row, in the order of the rows.
        views: The view of each row.
        num_items: Rows asked for, those of bad images included.
        bad_images: The images that could not be read or decoded.
        undecodable: SHA-256 -> reason of those that could be read.
        tensor: The rows; before they are computed, the images.
        ready: When set, to be waited for before the rows are read.
    """

    keys: list[tuple[str, str]] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    num_items: int = 0
    bad_images: list[BadImage] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)
    tensor: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def rows(self) -> Tensor | None:
        """Return the rows on the CPU, in the order of the keys, or None when there are none."""
        if self.ready is not None:
            self.ready.synchronize()
        return None if self.tensor is None else self.tensor.cpu()

    def items(self) -> Iterator[tuple[RowKey, str, Array]]:
        """Yield key (SHA-256 and view), name and row (float32, or bf16 as uint16 bit patterns)."""
        rows = self.rows()
        if rows is not None:
            for (key, name), view, row in zip(self.keys, self.views, to_numpy(rows), strict=True):
                yield (key, view), name, row


def groups(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """Divide items so that the rows of each group fill whole batches, or nearly; in order."""
    limit = max(ROWS_AT_ONCE, batch_size)
    group: list[Item] = []
    count = 0
    for sample, views in items:
        if group and count + len(views) > limit:
            yield group
            group, count = [], 0
        group.append((sample, views))
        count += len(views)
        if count % batch_size == 0:
            yield group
            group, count = [], 0
    if group:
        yield group


def to_numpy(rows: Tensor) -> Array:
    """Return rows as the cache takes them: float32, or bf16 as uint16 bit patterns."""
    rows = rows.cpu().contiguous()
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


def to_tensor(rows: Array) -> Tensor:
    """Return the cache's rows as a tensor, float32 or bfloat16, of the same memory."""
    if rows.dtype == np.uint16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
