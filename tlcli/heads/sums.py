"""What closed-form heads need to know of features: counts, sums and products, which add over parts.

Ridge, linear discriminants and nearest class means follow from the number of rows and the sum of the features
of each class and from X'X of all rows. These add: the sums of a data set are those of its parts, wherever
each part was read, and the sums without a fold are those of the other folds, added, never a difference of
two large numbers. All are taken about a shift near the mean, as X'X about zero would lose the variances of
features whose means are large; sums about two shifts are brought to one when they are added, exactly but for
rounding in fp64.
"""

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.linear import unit_rows

BLOCK = 1024  # rows at a time: larger blocks are given back to the system, and asked for again, each time
STRIP = 512  # columns of X'X at a time: what lies left of a strip's diagonal is mirrored, not computed
EXACT_WORK = 2e10  # products up to this many multiplications are fp64; fp32 blocks are twice as fast


@dataclass(frozen=True)
class Sums:
    """Sums over the rows of one part, each row times its weight, about `shift`.

    Attributes:
        shift: fp64 [D], subtracted from every row.
        counts: fp64 [C], rows of each class.
        weights: fp64 [C], their weights in sum.
        sums: fp64 [C, D], of the rows of each class.
        products: fp64 [D, D], X'X over the rows of all classes; [0, 0] where it was not asked for.
    """

    shift: Tensor
    counts: Tensor
    weights: Tensor
    sums: Tensor
    products: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        """Return the sums over both parts, about the shift of this one."""
        other = other.about(self.shift)
        return Sums(
            self.shift,
            self.counts + other.counts,
            self.weights + other.weights,
            self.sums + other.sums,
            self.products + other.products,
        )

    def about(self, shift: Tensor) -> "Sums":
        """Return the same sums about another shift, fp64 [D]."""
        if torch.equal(shift, self.shift):
            return self
        moved = self.shift - shift
        products = self.products
        if self.has_products:
            total = self.sums.sum(0)
            cross = torch.outer(total, moved)
            products = products + cross + cross.T + self.weights.sum() * torch.outer(moved, moved)
        sums = self.sums + self.weights[:, None] * moved
        return Sums(shift, self.counts, self.weights, sums, products)

    def in_units(self, centre: Tensor, divisor: Tensor) -> "Sums":
        """Return the sums of (rows - centre) / divisor; both fp64 [D]."""
        products = self.products
        if self.has_products:
            products = products / divisor[:, None] / divisor
        shift = (self.shift - centre) / divisor
        return Sums(shift, self.counts, self.weights, self.sums / divisor, products)

    @property
    def has_products(self) -> bool:
        """Return whether X'X was asked for."""
        return self.products.numel() > 0

    @property
    def mean(self) -> Tensor:
        """Mean of all rows about the shift, fp64 [D]."""
        return self.sums.sum(0) / self.weights.sum()

    @property
    def class_means(self) -> Tensor:
        """Mean of each class about the shift, fp64 [C, D]; that of all rows for a class without any."""
        means = self.sums / self.weights.clamp_min(1e-300)[:, None]
        return torch.where(self.weights[:, None] > 0, means, self.mean)

    def covariance(self) -> Tensor:
        """Return the covariance of all rows about their mean, fp64 [D, D]."""
        return self.products / self.weights.sum() - torch.outer(self.mean, self.mean)

    def covariance_within(self) -> Tensor:
        """Return the covariance of rows about the means of their classes, fp64 [D, D]."""
        means = self.class_means * (self.weights / self.weights.sum()).sqrt()[:, None]
        return self.products / self.weights.sum() - means.T @ means

    def arrays(self) -> dict[str, Tensor]:
        """Return the tensors by name, to be stored or sent."""
        return dict(vars(self))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> "Sums":
        """Return the sums that `arrays()` gave.

        Raises:
            KeyError: One is missing.
        """
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def sum_rows(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    row_weights: Tensor | None = None,
    shift: Tensor | None = None,
    unit: bool = False,
    products: bool = True,
) -> Sums:
    """Return the sums over rows, which are read in blocks.

    Products are computed in fp32 and accumulated in fp64 from block to block; in fp64 throughout where that
    takes well below a second.

    Args:
        features: fp32 [N, D].
        labels: int64 [N] in [0, num_classes).
        num_classes: Number of classes, those of other parts included.
        row_weights: fp32 [N], not negative; 1 for every row without.
        shift: fp64 [D]; the mean of the first block if None. It is rounded to fp32, so that rows
            near it lose nothing when it is subtracted in fp32.
        unit: Divide each row by its l2 norm first.
        products: Whether X'X is needed.
    """
    num_rows, width = features.shape
    device = torch.device("cpu") if features.device.type == "mps" else features.device  # MPS has no fp64
    first = _block(features[:BLOCK], unit)
    near = (first.double().mean(0) if len(first) else torch.zeros(width)) if shift is None else shift
    near = near.float().to(features.device)
    weights = torch.ones(num_rows, device=device) if row_weights is None else row_weights
    weights = weights.to(device, torch.float64)
    plain = bool((weights == 1).all())
    labels = labels.to(device)
    counts = torch.bincount(labels, minlength=num_classes).double()
    by_class = torch.zeros(num_classes, dtype=torch.float64, device=device).index_add_(0, labels, weights)
    sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
    size = width if products else 0
    matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
    exact = num_rows * width**2 <= EXACT_WORK
    for start in range(0, num_rows, BLOCK):
        span = slice(start, start + BLOCK)
        rows = _block(features[span], unit)
        if exact:
            block = rows.to(device).double() - near.to(device)
        else:
            rows = rows - near
            block = rows.to(device).double()
        here = weights[span][:, None]
        sums.index_add_(0, labels[span], block if plain else block * here)
        if products:
            factor = block if exact else rows
            _add_products(matrix, factor if plain else factor * here.sqrt().to(factor))
    if products:
        matrix = torch.triu(matrix) + torch.triu(matrix, 1).T
    return Sums(near.to(device).double(), counts, by_class, sums, matrix)


def _block(rows: Tensor, unit: bool) -> Tensor:
    return unit_rows(rows) if unit else rows


def _add_products(matrix: Tensor, rows: Tensor) -> None:
    """Add rows' rows to the upper triangle of an fp64 matrix [D, D], strip by strip."""
    for left in range(0, len(matrix), STRIP):
        strip = matrix[left : left + STRIP, left:]
        strip += (rows[:, left : left + STRIP].T @ rows[:, left:]).to(strip.device)


def add_all(parts: Iterable[Sums]) -> Sums:
    """Return the sums over all parts, at least one."""
    return functools.reduce(operator.add, parts)
