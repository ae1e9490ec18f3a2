"""Linear heads, and features prepared for fitting many of them.

Features become `Coordinates`, which all folds may share: the features themselves, or, where there are far
fewer rows than features, as many coordinates as there are rows, by the Cholesky factor of their Gram matrix
(solutions lie in the span of the rows). A `Basis` is what one fold makes of them: centred and divided so that
the mean variance of the rows it trains on is 1, with what is known of their covariance. Rows that the fold
holds out shape neither. logistic.py solves on a basis; `Basis.head` turns a solution into a `LinearHead`,
which applies to raw features.

Up to FEW coordinates are decorrelated by an eigendecomposition, which takes milliseconds. Of more, the AXES
directions of largest variance are found by randomised subspace iteration (Halko, Martinsson and Tropp 2011):
enough to precondition with.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 64  # directions of large variance known of many coordinates
FEW = 320  # coordinates up to which an eigendecomposition takes milliseconds
RANK_TOLERANCE = 1e-5  # of the largest singular value: what lies below is rounding of the fp32 features
SMALLEST_DEVIATION = 0.05  # of the median one: a column that hardly varies is not blown up to variance 1


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier that applies to raw features.

    Attributes:
        weight: fp32 [C, D], the scaling of the features folded in.
        bias: fp32 [C].
        normalise: Divide each row of features by its l2 norm first; such a head is no plain linear layer.
    """

    weight: Tensor
    bias: Tensor
    normalise: bool = False

    def logits(self, features: Tensor) -> Tensor:
        """Return the fp32 logits [N, C] of raw features [N, D]."""
        features = features.to(self.weight)
        if self.normalise:
            features = unit_rows(features)
        return torch.nn.functional.linear(features, self.weight, self.bias)

    def shifted(self, values: Tensor) -> "LinearHead":
        """Return the head whose logits are larger by `values`, fp32 [C]."""
        return dataclasses.replace(self, bias=self.bias + values)

    def rescaled(self, factor: float) -> "LinearHead":
        """Return the head that gives features the logits of this one for `factor` times the features."""
        return self if self.normalise else dataclasses.replace(self, weight=self.weight * factor)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {"weight": self.weight, "bias": self.bias}

    def document(self) -> dict[str, object]:
        """Return what is needed beside `state` to rebuild the head; plain values."""
        return {"kind": "linear", "normalise": self.normalise}


@dataclass(frozen=True)
class Coordinates:
    """Rows of features in r coordinates: D features, centred and divided, or as many as there are rows.

    Attributes:
        values: fp32 [N, r + 1]; the last column is 1 and stands for the bias.
        centre: fp32 [D], subtracted from the features.
        divisor: fp32 [D], by which they are then divided.
        span: The rows so scaled, fp32 [N, D], where `values` is the Cholesky factor of their Gram matrix.
    """

    values: Tensor
    centre: Tensor
    divisor: Tensor
    span: Tensor | None = None

    def of_features(self, weights: Tensor) -> Tensor:
        """Return weights [M, D] of the scaled features for weights [M, r] of the coordinates."""
        if self.span is None:
            return weights
        exact = torch.float32 if weights.device.type == "mps" else torch.float64
        factor = self.values[:, :-1].to(exact)  # its small pivots blow rounding up
        dual: Tensor = torch.linalg.solve_triangular(factor.T, weights.T.to(exact), upper=True).T
        # Of n centred rows only n - 1 are independent: what the last pivot blows up cancels in the product.
        found: Tensor = (dual - dual.mean(1, keepdim=True)) @ self.span.to(exact)
        return found.float()


@dataclass(frozen=True)
class Basis:
    """Coordinates as a fold sees them: centred and divided by the statistics of the rows it trains on.

    Attributes:
        coordinates: The rows; other folds may share them.
        centre: fp32 [r], mean coordinates of the training rows.
        factor: fp32 [r], by which centred coordinates are multiplied.
        axes: fp32 [r + 1, k], orthonormal directions of known variance, the bias among them.
        variances: fp32 [k], the mean square along each direction, 1 for the bias.
        rest: Mean variance of the directions orthogonal to all axes; None where there are none.
    """

    coordinates: Coordinates
    centre: Tensor
    factor: Tensor
    axes: Tensor
    variances: Tensor
    rest: float | None

    def inward(self, weights: Tensor) -> Tensor:
        """Return weights [..., r + 1] of the centred and divided coordinates as ones of the coordinates."""
        inside = weights[..., :-1] * self.factor
        return torch.cat([inside, weights[..., -1:] - inside @ self.centre[:, None]], -1)

    def inverse(self, weights: Tensor) -> Tensor:
        """Return weights [..., r + 1] of the coordinates as ones of the centred and divided coordinates."""
        inside = weights[..., :-1]
        return torch.cat([inside / self.factor, weights[..., -1:] + inside @ self.centre[:, None]], -1)

    def outward(self, gradient: Tensor) -> Tensor:
        """Return gradients [..., r + 1] by the coordinates as ones by the centred and divided ones."""
        bias = gradient[..., -1:]
        inside = torch.addcmul(gradient[..., :-1], bias, self.centre, value=-1.0) * self.factor
        return torch.cat([inside, bias], -1)

    def unscaled(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [M, D] and biases [M] of raw features for weights [M, >= r + 1]; the biases fp64."""
        rank = len(self.centre)
        moved = self.inward(torch.cat([weights[:, :rank], weights[:, -1:]], 1))
        weight = self.coordinates.of_features(moved[:, :-1]) / self.coordinates.divisor
        bias = moved[:, -1].double() - weight.double() @ self.coordinates.centre.double()
        return weight, bias

    def logits(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Return the fp32 logits [M, n'] of rows for weights [M, >= r + 1].

        Args:
            weights: One row a class, of any number of heads.
            inputs: fp32 [n', D], what `make_coordinates` takes.
        """
        weight, bias = self.unscaled(weights)
        centre = self.coordinates.centre
        shift = bias + weight.double() @ centre.double()  # of centred features: large means round nothing off
        return torch.addmm(shift.float()[:, None], weight, (inputs - centre).T)

    def head(self, weights: Tensor, *, normalise: bool) -> LinearHead:
        """Return the head for `weights` [C, >= r + 1] in this basis, with the scaling folded in."""
        weight, bias = self.unscaled(weights)
        return LinearHead(weight.contiguous(), bias.float(), normalise)


def unit_rows(features: Tensor) -> Tensor:
    """Return features [N, D] with every row divided by its l2 norm (zero rows stay zero)."""
    # Squares of what is near an end of fp32's range would be infinite or 0.
    largest = features.abs().amax(1, keepdim=True).clamp_min(1e-37)
    scaled = features / largest
    norms: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / norms.clamp_min(1e-12)


def make_coordinates(inputs: Tensor, *, standardised: bool = False) -> Coordinates:
    """Return rows in coordinates that heads are solved in.

    Args:
        inputs: fp32 [N, D], finite, N >= 1; unit rows for the scaling `l2-normalised`.
        standardised: Divide every column by its standard deviation in these rows.
    """
    num_rows, width = inputs.shape
    values = torch.ones(num_rows, width + 1, device=inputs.device)  # the last column is the bias
    rows = values[:, :-1]
    # Squares of features near the ends of fp32's range would overflow; a power of two changes no digit.
    unit = 2.0 ** round(math.log2(float(inputs.abs().max()) or 1.0))
    torch.div(inputs, unit, out=rows)
    centre = rows.mean(0)
    rows -= centre
    divisor = torch.ones_like(centre)
    if standardised:
        divisor = _divisor(torch.linalg.vector_norm(rows, dim=0).square() / num_rows, centre)
        rows /= divisor
    if not is_wide(num_rows, width):
        return Coordinates(values, centre * unit, divisor * unit)
    span = rows.contiguous()
    exact = (span.cpu() if span.device.type == "mps" else span).double()
    gram = exact @ exact.T  # which squares the condition number, hence fp64
    gram.diagonal().add_(RANK_TOLERANCE**2 * max(float(gram.diagonal().max()), 1e-30))
    factor = torch.linalg.cholesky(gram).float().to(span.device)
    return Coordinates(torch.cat([factor, values[:, -1:]], 1), centre * unit, divisor * unit, span)


def is_wide(num_rows: int, width: int) -> bool:
    """Return whether rows are so few that they span less than the features."""
    return num_rows < 0.75 * width


def make_basis(coordinates: Coordinates, training: Tensor, *, standardised: bool = False) -> Basis:
    """Return the basis of a fold.

    Args:
        coordinates: The rows.
        training: int64 [n], those that the fold trains on.
        standardised: Divide every coordinate, which must then be a feature, by its standard deviation.
    """
    rows = coordinates.values[training]
    inside = rows[:, :-1]
    centre = inside.mean(0)
    inside -= centre
    variances = torch.linalg.vector_norm(inside, dim=0).square() / len(rows)
    divisor = _divisor(variances, centre) if standardised else torch.ones_like(centre)
    width = len(coordinates.centre)
    divisor *= float(((variances / divisor.square()).sum() / width).sqrt()) or 1.0
    inside /= divisor
    axes, variances, rest = (_every_axis if len(centre) <= FEW else _leading_axes)(rows)
    return Basis(coordinates, centre, divisor.reciprocal(), axes, variances, rest)


def _divisor(variances: Tensor, centre: Tensor) -> Tensor:
    """Return the standard deviation of every column, [D], or what stands for it where it hardly varies."""
    deviation = variances.sqrt()
    constant = deviation <= 1e-6 * centre.abs()  # only rounding noise
    typical = deviation[~constant].median() if not bool(constant.all()) else deviation.new_ones(())
    return torch.where(constant, typical, deviation.maximum(SMALLEST_DEVIATION * typical))


def _every_axis(inputs: Tensor) -> tuple[Tensor, Tensor, None]:
    """Return what `_leading_axes` does, for as many axes as there are coordinates."""
    on_cpu = inputs.cpu() if inputs.device.type == "mps" else inputs  # MPS has no eigh
    values, vectors = torch.linalg.eigh(on_cpu[:, :-1].T @ on_cpu[:, :-1] / len(inputs))
    one = values.new_ones(1)
    axes = torch.nn.functional.pad(vectors, (0, 1, 0, 1))
    axes[-1, -1] = 1.0
    return axes.to(inputs.device), torch.cat([values.clamp_min(0), one]).to(inputs.device), None


def _leading_axes(inputs: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return AXES directions of large variance and the bias's, their variances, and the rest's mean.

    Args:
        inputs: fp32 [n, r + 1], centred but for the last column, the bias, which is 1.
    """
    num_rows, width = len(inputs), inputs.shape[1] - 1
    total = float(inputs[:, :-1].square().sum()) / num_rows
    on_cpu = inputs.cpu() if inputs.device.type == "mps" else inputs
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(width + 1, AXES, generator=generator).to(on_cpu.device)
    axes[-1] = 0.0  # centred features are uncorrelated with the bias
    for _ in range(2):
        axes = torch.linalg.qr(axes).Q
        points = on_cpu @ axes
        axes = on_cpu.T @ points
        axes[-1] = 0.0
    axes = torch.linalg.qr(axes).Q
    points = on_cpu @ axes
    values, vectors = torch.linalg.eigh(points.T @ points / num_rows)
    bias = torch.zeros(width + 1, 1, device=on_cpu.device)
    bias[-1] = 1.0
    variances = torch.cat([values.clamp_min(0), bias[-1]])
    rest = max(0.0, total - float(values.sum())) / (width - AXES)
    axes = torch.cat([axes @ vectors, bias], 1)
    return axes.to(inputs.device), variances.to(inputs.device), rest
