"""What the solver multiplies with: bases brought to one shape, with the labels and weights of their rows."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.linear import Basis
from tlcli.machine.device import fast_bf16

SMALL_ELEMENTS = 1 << 18  # coordinates of a basis below which calls cost more than arithmetic


@dataclass(frozen=True)
class Fold:
    """Rows in one scaling, and which of them a head trains on.

    Attributes:
        basis: The rows.
        labels: int64 [n].
        row_weights: fp32 [n], not negative, summing to 1; 0 for rows that are held out.
    """

    basis: Basis
    labels: Tensor
    row_weights: Tensor


@dataclass(frozen=True)
class Problems:
    """Logistic regressions: every l2 on every fold.

    Attributes:
        folds: S folds, on one device.
        num_classes: C.
        l2: fp64 [H].
        smoothing: Share of the target spread over all classes, in [0, 1).
    """

    folds: list[Fold]
    num_classes: int
    l2: Tensor
    smoothing: float = 0.0

    @property
    def num_rows(self) -> int:
        """Rows of the largest fold."""
        return max(len(fold.labels) for fold in self.folds)

    @property
    def rank(self) -> int:
        """Coordinates of the largest basis, the bias among them."""
        return max(len(fold.basis.centre) + 1 for fold in self.folds)

    def take(self, l2: Tensor) -> "Problems":
        """Return the same folds with other l2 values."""
        return dataclasses.replace(self, l2=l2)


def widen(value: Tensor, rank: int) -> Tensor:
    """Insert zero coordinates before the last one, the bias: bases of different rank then fit one tensor."""
    zeros = value.new_zeros(*value.shape[:-1], rank - value.shape[-1])
    return torch.cat([value[..., :-1], zeros, value[..., -1:]], -1) if zeros.numel() else value


def lengthen(value: Tensor, num_rows: int) -> Tensor:
    """Append zeros to the first dimension: rows without weight, which change nothing."""
    zeros = value.new_zeros(num_rows - len(value), *value.shape[1:])
    return torch.cat([value, zeros]) if len(zeros) else value


@dataclass(frozen=True)
class Space:
    """A fold brought to N rows and R coordinates, with the labels and weights of its rows.

    Attributes:
        coordinates: fp32 [N, R]; folds that share theirs share the tensor.
        fast: The same, or in bf16.
        basis: Its own centre and factor, axes and variances widened to R coordinates.
        labels: int64 [N].
        row_weights: fp32 [N].
    """

    coordinates: Tensor
    fast: Tensor
    basis: Basis
    labels: Tensor
    row_weights: Tensor

    def precondition(self, gradient: Tensor, curvature: Tensor, penalty: Tensor, out: Tensor) -> None:
        """Give the gradients of Q problems times the inverse of `curvature * covariance + l2`.

        Args:
            gradient: [Q, K, R].
            curvature: Mean curvature of each class in each problem, [Q, K].
            penalty: l2 of each problem, [Q].
            out: Takes them, [Q, K, R].
        """
        basis = self.basis
        known = curvature[..., None] * basis.variances
        known[..., :-1] += penalty[:, None, None]
        along = gradient @ basis.axes
        if basis.rest is None:
            torch.matmul(along.div_(known), basis.axes.T, out=out)
            return
        rest = (curvature * basis.rest + penalty[:, None]).reciprocal_()[..., None]
        along.mul_(known.reciprocal_().sub_(rest))
        torch.addcmul(along @ basis.axes.T, gradient, rest, out=out)

    def hessian(self, shares: Tensor, penalty: float) -> Tensor | None:
        """Return Cholesky factors fp32 [K, R, R] of the Hessian's blocks, one a class, if they have any.

        Args:
            shares: Curvature of each row in each class times its weight, fp32 [K, N].
            penalty: l2.
        """
        basis = self.basis
        exact = torch.float32 if shares.device.type == "mps" else torch.float64
        inside = (self.coordinates[:, :-1] - basis.centre) * basis.factor
        rows = torch.cat([inside, self.coordinates[:, -1:]], 1)
        blocks = torch.stack([(rows.T * share) @ rows for share in shares]).to(exact)
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        diagonal[:, :-1] += penalty
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True)  # fp32 products are not quite positive
        factors, failed = torch.linalg.cholesky_ex(blocks)
        return None if bool(failed.any()) else factors.float()


def make_spaces(problems: Problems) -> list[Space]:
    """Return the folds of `problems`, brought to one shape."""
    num_rows, rank = problems.num_rows, problems.rank
    widened: dict[int, tuple[Tensor, Tensor]] = {}
    spaces = []
    for fold in problems.folds:
        basis, shared = fold.basis, fold.basis.coordinates.values
        if id(shared) not in widened:
            coordinates = lengthen(widen(shared, rank), num_rows)
            small = coordinates.device.type == "cpu" and coordinates.numel() <= SMALL_ELEMENTS
            low = torch.bfloat16 if not small and fast_bf16(coordinates.device)[0] else torch.float32
            widened[id(shared)] = coordinates, coordinates.to(low)
        more = rank - 1 - len(basis.centre)
        basis = dataclasses.replace(
            basis,
            centre=torch.nn.functional.pad(basis.centre, (0, more)),
            factor=torch.nn.functional.pad(basis.factor, (0, more)),
            axes=widen(basis.axes.T, rank).T,
        )
        labels, weights = lengthen(fold.labels, num_rows), lengthen(fold.row_weights, num_rows)
        spaces.append(Space(*widened[id(shared)], basis, labels, weights))
    return spaces


Span = tuple[Space, slice]  # a fold, and the slots of its problems in a batch


def forward(spans: list[Span], values: Tensor, out: Tensor, *, fast: bool) -> None:
    """Give what parameters [Q, K, R] add to the logits, into out [Q, K, N]; the slots of `spans` adjoin.

    Folds that share their coordinates share a product.
    """
    moved = torch.cat([space.basis.inward(values[span]) for space, span in spans])
    for factor, first, end in _shared(spans, fast=fast):
        _product(moved[first:end], factor.T, out[first:end])


def backward(spans: list[Span], values: Tensor, out: Tensor, *, fast: bool) -> None:
    """Give the gradient by the parameters, into out [Q, K, R], of gradients by the logits [Q, K, N]."""
    for factor, first, end in _shared(spans, fast=fast):
        _product(values[first:end], factor, out[first:end])
    for space, span in spans:
        out[span] = space.basis.outward(out[span])


def _shared(spans: list[Span], *, fast: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (coordinates, first slot, end) of neighbouring folds that share their coordinates."""
    for _, group in itertools.groupby(spans, lambda pair: id(pair[0].coordinates)):
        members = list(group)
        space = members[0][0]
        yield space.fast if fast else space.coordinates, members[0][1].start, members[-1][1].stop


def _product(values: Tensor, factor: Tensor, out: Tensor) -> None:
    """Multiply values [Q, K, X] by a factor [X, Y] into out [Q, K, Y], in the factor's number type."""
    left, target = values.flatten(0, 1).to(factor.dtype), out.view(-1, out.shape[-1])
    if target.dtype == factor.dtype:
        torch.mm(left, factor, out=target)
    else:
        target.copy_(left @ factor)
