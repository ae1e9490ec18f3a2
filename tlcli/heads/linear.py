"""Linear heads, and features prepared for fitting many of them.

A `Basis` holds the features of one scaling, centred and divided so that their mean variance is 1, together
with what is known of their covariance. logistic.py solves on it; `Basis.head` turns a solution into a
`LinearHead`, which applies to raw features.

Where there are far fewer rows than features, solutions lie in the span of the rows: an eigendecomposition
of the small Gram matrix rotates the features into that many uncorrelated coordinates. Narrow features are
rotated by their covariance likewise. Elsewhere an eigendecomposition would cost more than all the fitting, so
the features stay as they are, and only their AXES directions of largest variance are found, by randomised
subspace iteration (Halko, Martinsson and Tropp 2011): enough to precondition with.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 64  # directions of large variance known of wide features
NARROW = 256  # features up to this width are rotated: the decomposition takes milliseconds


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

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {"weight": self.weight, "bias": self.bias}

    def document(self) -> dict[str, object]:
        """Return what is needed beside `state` to rebuild the head; plain values."""
        return {"kind": "linear", "normalise": self.normalise}


@dataclass(frozen=True)
class Basis:
    """Features of one scaling, in r coordinates: D scaled features, or fewer uncorrelated ones.

    Attributes:
        scaling: One of SCALINGS.
        coordinates: fp32 [N, r + 1]; the last column is 1 and stands for the bias.
        rotation: fp32 [D, r], orthonormal columns; None where the coordinates are the scaled features.
        centre: fp32 [D], subtracted from the features.
        divisor: fp32 [D], by which centred features are divided before the rotation.
        axes: fp32 [r + 1, k], orthonormal directions of known variance, the bias among them; None where each
            coordinate is one.
        variances: fp32 [k], or [r + 1] without axes; the mean square along each direction, 1 for the bias.
        rest: Mean variance of the directions orthogonal to all axes.
    """

    scaling: str
    coordinates: Tensor
    rotation: Tensor | None
    centre: Tensor
    divisor: Tensor
    axes: Tensor | None
    variances: Tensor
    rest: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Memory the basis holds."""
        tensors = (self.coordinates, self.rotation, self.axes)
        return 4 * sum(tensor.numel() for tensor in tensors if tensor is not None)

    def logits(self, weights: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the fp32 logits [..., C, N'] of `rows` (all unless given) for weights [..., C, >= r + 1]."""
        inside = weights[..., : self.coordinates.shape[1] - 1] @ self.coordinates[rows, :-1].T
        return inside + weights[..., -1:]

    def unrotated(self, weights: Tensor) -> Tensor:
        """Return weights [C, >= r + 1] as weights [C, D] of the scaled features, without the bias."""
        inside = weights[:, : self.coordinates.shape[1] - 1]
        return inside if self.rotation is None else inside @ self.rotation.T

    def head(self, weights: Tensor) -> LinearHead:
        """Return the head for `weights` [C, >= r + 1] in this basis, with the scaling folded in."""
        weight = self.unrotated(weights) / self.divisor
        bias = weights[:, -1].double() - weight.double() @ self.centre.double()
        return LinearHead(weight.contiguous(), bias.float(), self.scaling == "l2-normalised")


def unit_rows(features: Tensor) -> Tensor:
    """Return features [N, D] with every row divided by its l2 norm (zero rows stay zero)."""
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / norms.clamp_min(1e-12)


def make_basis(features: Tensor, scaling: str) -> Basis:
    """Scale features and prepare them for fitting.

    Args:
        features: fp32 [N, D], finite, N >= 1.
        scaling: One of SCALINGS.
    """
    num_rows, width = features.shape
    if scaling == "l2-normalised":
        features = unit_rows(features)
    centre = features.mean(0)
    inputs = torch.ones(num_rows, width + 1, device=features.device)  # the last column is the bias
    centred = torch.sub(features, centre, out=inputs[:, :-1])
    variances = torch.linalg.vector_norm(centred, dim=0).square() / num_rows
    divisor = torch.ones_like(centre)
    if scaling == "standardised":
        deviation = variances.sqrt()
        # A constant column has only rounding noise: blowing that up to variance 1 would invent a feature.
        divisor = torch.where(deviation > 1e-6 * centre.abs(), deviation, divisor)
    spread = float((variances / divisor.square()).mean().sqrt()) or 1.0
    divisor = divisor * spread
    centred /= divisor
    if num_rows < 0.75 * width or width <= NARROW:
        rotation = _principal_axes(centred)
        rotated = torch.cat([centred @ rotation, inputs[:, -1:]], 1)
        return Basis(scaling, rotated, rotation, centre, divisor, None, rotated.square().mean(0))
    axes, variances, rest = _leading_axes(inputs)
    return Basis(scaling, inputs, None, centre, divisor, axes, variances, rest)


def _principal_axes(centred: Tensor) -> Tensor:
    """Return orthonormal axes [D, r] whose span holds every row of `centred` [N, D]."""
    num_rows, width = centred.shape
    on_cpu = centred.cpu() if centred.device.type == "mps" else centred  # MPS has neither eigh nor fp64
    if num_rows < 0.75 * width:
        # The Gram matrix squares the condition number, hence fp64; what lies below 1e-5 of the largest
        # singular value is rounding of the fp32 features.
        wide = on_cpu.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        singular = values.clamp_min(0).sqrt()
        keep = singular > 1e-5 * singular[-1]
        axes: Tensor = (wide.T @ (vectors[:, keep] / singular[keep])).float()
    else:
        axes = torch.linalg.eigh(on_cpu.T @ on_cpu)[1][:, -num_rows:]
    return axes.contiguous().to(centred.device)


def _leading_axes(inputs: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return AXES directions of large variance and the bias's, their variances, and the rest's mean.

    Args:
        inputs: fp32 [N, D + 1] with mean variance 1; the last column, the bias, is 1.
    """
    num_rows, width = len(inputs), inputs.shape[1] - 1
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
    rest = max(0.0, width - float(values.sum())) / (width - AXES)
    axes = torch.cat([axes @ vectors, bias], 1)
    return axes.to(inputs.device), variances.to(inputs.device), rest
