"""Features as closed-form heads see them: one scaling, perhaps in fewer coordinates, and their sums by fold.

Where there are fewer rows than features, the rows span a space of at most N dimensions, and the solutions lie
in it: a QR decomposition of the scaled rows gives axes, and X'X is N x N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.discriminants import Scorer
from tlcli.heads.linear import LinearHead, unit_rows
from tlcli.heads.sums import BLOCK, Sums, add_all, sum_rows
from tlcli.heads.task import Task

GATHERED = 32_768  # rows of a fold that are copied together at a time


@dataclass(frozen=True)
class Scaled:
    """How raw features become the coordinates of one scaling.

    Attributes:
        scaling: One of SCALINGS.
        centre: fp64 [D], subtracted from the features, which are divided by their l2 norm before where the
            scaling says so.
        divisor: fp64 [D], by which centred features are divided; their mean variance is 1 then.
        rotation: fp64 [D, N], orthonormal axes whose span holds every training row; None where the
            coordinates are the scaled features.
    """

    scaling: str
    centre: Tensor
    divisor: Tensor
    rotation: Tensor | None = None

    @property
    def unit(self) -> bool:
        """Return whether rows are divided by their l2 norm first."""
        return self.scaling == "l2-normalised"

    def coordinates(self, features: Tensor) -> Tensor:
        """Return the coordinates of raw features [N, D], fp64 [N, D], or [N, r] where they are rotated."""
        rows = unit_rows(features) if self.unit else features
        scaled = (rows.to(self.centre) - self.centre) / self.divisor
        return scaled if self.rotation is None else scaled @ self.rotation

    def head(self, scorer: Scorer, factor: float) -> LinearHead:
        """Return the head on raw features whose logits are `factor` times the scores."""
        weight = scorer.weight if self.rotation is None else scorer.weight @ self.rotation.T
        weight = factor * weight / self.divisor
        bias = factor * scorer.bias - weight @ self.centre
        return LinearHead(weight.float().contiguous(), bias.float(), self.unit)


def scale(features: Tensor, scalings: tuple[str, ...], *, rotate: bool) -> dict[str, Scaled]:
    """Return how features are scaled, by scaling.

    Args:
        features: fp32 [N, D], finite, N >= 1.
        scalings: Of SCALINGS.
        rotate: Reduce the coordinates to as many as there are rows, where there are more features.
    """
    moments = {unit: _moments(features, unit) for unit in {name == "l2-normalised" for name in scalings}}
    found = {}
    for name in scalings:
        centre, variance = moments[name == "l2-normalised"]
        divisor = torch.ones_like(centre)
        if name == "standardised":
            deviation = variance.sqrt()
            # A constant column has only rounding noise: blowing that up to variance 1 would invent a feature.
            divisor = torch.where(deviation > 1e-6 * centre.abs(), deviation, divisor)
        divisor = divisor * (float((variance / divisor.square()).mean()) ** 0.5 or 1.0)
        found[name] = Scaled(name, centre, divisor)
        if rotate and len(features) < features.shape[1]:
            axes = torch.linalg.qr(found[name].coordinates(features).T).Q
            found[name] = Scaled(name, centre, divisor, axes)
    return found


def _moments(features: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each feature, fp64 [D], of l2-normalised ones with `unit`."""
    home = torch.device("cpu") if features.device.type == "mps" else features.device  # MPS has no fp64
    starts = range(0, len(features), BLOCK)
    blocks = (features[start : start + BLOCK].to(home) for start in starts)
    centre = torch.zeros(features.shape[1], dtype=torch.float64, device=home)
    for block in blocks:
        centre += (unit_rows(block) if unit else block).sum(0, dtype=torch.float64)
    centre /= len(features)
    near, variance = centre.float(), torch.zeros_like(centre)
    for block in (features[start : start + BLOCK].to(home) for start in starts):
        centred = (unit_rows(block) if unit else block) - near
        variance += centred.square_().sum(0, dtype=torch.float64)
    return centre, (variance / len(features) - (centre - near).square()).clamp_min(0.0)


class FoldSums:
    """Sums of a task's training rows in the coordinates of any scaling, without one fold or whole.

    Plain and standardised coordinates follow from the same sums of raw features, which are computed once.
    """

    def __init__(self, task: Task, *, products: bool) -> None:
        """Remember the task.

        Args:
            task: Whose rows are summed, with their weights.
            products: Whether X'X is needed.
        """
        self.task = task
        self.products = products
        self.raw: dict[bool, list[Sums]] = {}

    def parts(self, scaled: Scaled) -> list[Sums]:
        """Return the sums of each fold, then those of the rows that always train."""
        if scaled.rotation is not None:
            rows = scaled.coordinates(self.task.features)
            return self._by_fold(rows, torch.zeros_like(rows[0]), unit=False)
        if scaled.unit not in self.raw:
            self.raw[scaled.unit] = self._by_fold(self.task.features, scaled.centre, unit=scaled.unit)
        return [part.in_units(scaled.centre, scaled.divisor) for part in self.raw[scaled.unit]]

    def _by_fold(self, rows: Tensor, shift: Tensor, *, unit: bool) -> list[Sums]:
        folds = self.task.folds.to(rows.device)
        return [
            self._sum(rows, torch.nonzero(folds == fold)[:, 0], shift, unit)
            for fold in (*range(self.task.num_folds), -1)
        ]

    def _sum(self, rows: Tensor, index: Tensor, shift: Tensor, unit: bool) -> Sums:
        """Return the sums of the rows at `index`, int64 [n], copied a few at a time."""
        labels, weights = self.task.labels.to(rows.device), self.task.row_weights.to(rows.device)
        chunks = [index[start : start + GATHERED] for start in range(0, max(1, len(index)), GATHERED)]
        return add_all(
            sum_rows(
                rows[here],
                labels[here],
                self.task.num_classes,
                row_weights=weights[here],
                shift=shift,
                unit=unit,
                products=self.products,
            )
            for here in chunks
        )
