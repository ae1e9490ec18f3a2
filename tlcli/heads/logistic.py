"""Many multinomial logistic regressions on the same features, solved exactly as one batched job.

Every problem minimises, over a weight matrix W [C, D] and a bias b [C] that is not penalised,

    sum_i s_i * cross_entropy(W x_i + b, t_i)  +  l2 / 2 * ||W||^2        with sum_i s_i = 1,

so `l2` belongs to the *mean* loss and keeps its meaning when rows are added or a fold is left out. It applies
to features that were centred and divided so that their mean variance is 1. On such features scikit-learn's
`C` is 1 / (l2 * N) for three or more classes and 2 / (l2 * N) for two (its two-class model has one weight
vector w where this one has w / 2 and -w / 2).

How it is made fast, without giving up the exact solution:

- Solutions are a smooth function of log l2. On a CPU a few values are solved first; the others start from a
  cubic through their solved neighbours of the same fold, which on a dense grid is within tolerance already.
- Nonlinear conjugate gradients, preconditioned by `curvature * covariance + l2`, the Hessian's shape, where
  `curvature` is the head's current mean p(1 - p). The covariance is exact along the directions a basis knows
  and a multiple of the identity on the rest. It needs tens of iterations where plain methods need hundreds,
  and no history of vectors.
- All problems of a batch share two matrix products an iteration, one from directions to changes of the logits
  and one from changes of the residuals to changes of the gradient. Both are increments, so their rounding is
  relative to a step that shrinks: they are taken in bf16 where the processor is faster at it. A problem that
  seems solved is computed anew in fp32 and counts only if that gradient is within the tolerance.
- Logits are linear in the step, so the line search needs no further product.
- A fold is a row of sample weights with zeros. Converged problems leave the batch. Element-wise work runs in
  blocks that stay in a core's cache.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.conjugate_gradients import SMALL_ELEMENTS, Problems, Solver, Space
from tlcli.heads.linear import Basis

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # scikit-learn's default `tol`: largest absolute component of the gradient
BATCH_BYTES = 1 << 30  # memory of a batch on a CPU
KNOT_TOLERANCE = 0.7  # of the tolerance asked for
KNOTS = 6  # solved neighbours that a start is interpolated from


@dataclass(frozen=True)
class Solutions:
    """The solved problems, in the order of Problems.l2; S bases.

    Attributes:
        weights: fp32 [S, H, C, r + 1] in the coordinates of each basis; where those are fewer, zeros stand
            before the last one.
        iterations: int32 [S, H].
        gradient: fp32 [S, H], largest absolute component at the solution, computed in fp32.
        converged: bool [S, H], whether that is within the tolerance.
    """

    weights: Tensor
    iterations: Tensor
    gradient: Tensor
    converged: Tensor


def solve(bases: list[Basis], problems: Problems, *, tolerance: float = TOLERANCE) -> Solutions:
    """Solve every problem on every basis, in as few batches as memory allows.

    Args:
        bases: S bases of the same rows. One batch spans them on a GPU, or when they are small; large ones
            are solved in turn on a CPU, where a wider product gains nothing.
        problems: What to solve on each.
        tolerance: Largest absolute component of the gradient at which a problem is solved.
    """
    rank = max(basis.coordinates.shape[1] for basis in bases)
    spaces = [Space.of(basis, rank) for basis in bases]
    together = side_by_side(problems.targets.device, *bases[0].coordinates.shape)
    parts = [
        _solve_path(group, problems, tolerance) for group in ([spaces] if together else [[s] for s in spaces])
    ]
    columns = [torch.cat([part[index] for part in parts]) for index in range(3)]
    converged = columns[2] <= tolerance
    if missing := int((~converged).sum()):
        logger.debug("%d of %d linear heads stopped above the tolerance", missing, converged.numel())
    return Solutions(columns[0], columns[1], columns[2], converged)


def side_by_side(device: torch.device, num_rows: int, rank: int) -> bool:
    """Return whether one batch should span the bases."""
    return device.type != "cpu" or num_rows * rank <= SMALL_ELEMENTS


def _batch_size(num_bases: int, rank: int, problems: Problems) -> int:
    """Return how many problems a basis fit into the memory budget at once."""
    num_classes, num_rows = problems.targets.shape
    budget = BATCH_BYTES
    if problems.targets.device.type == "cuda":
        budget = int(0.4 * torch.cuda.mem_get_info(problems.targets.device)[0])
    return max(1, budget // (4 * num_bases * num_classes * (5 * num_rows + 10 * rank)))


def _solve_path(spaces: list["Space"], problems: Problems, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve level after level; return weights [S, H, C, R], iterations [S, H] and gradients [S, H]."""
    device, count = problems.l2.device, len(problems.l2)
    num_classes, num_rows = problems.targets.shape
    rows, rank = (1 if num_classes == 2 else num_classes), spaces[0].coordinates.shape[1]
    weights = torch.zeros(len(spaces), count, rows, rank, device=device)
    iterations = torch.zeros(len(spaces), count, dtype=torch.int32, device=device)
    gradient = torch.zeros(len(spaces), count, device=device)
    levels = _levels(problems)
    # Logits are linear in the weights: where there is room for them, they are interpolated too.
    room = len(levels) > 1 and 4 * len(spaces) * count * rows * num_rows <= BATCH_BYTES // 2
    logits = torch.zeros(len(spaces), count, rows, num_rows, device=device) if room else None
    size = _batch_size(len(spaces), rank, problems)
    solved = levels[0][:0]
    for number, level in enumerate(levels):
        # Errors of the knots add to the start's, so knots are solved a little better than asked.
        goal = tolerance * (1.0 if number == len(levels) - 1 else KNOT_TOLERANCE)
        for chunk in [level[first : first + size] for first in range(0, len(level), size)]:
            part = dataclasses.replace(problems, l2=problems.l2[chunk], folds=problems.folds[chunk])
            knots = _knots(problems, solved, chunk)
            solver = Solver(spaces, part, goal)
            if number:
                solver.weights = _interpolate(weights, knots)
                solver.logits = solver.logits if logits is None else _interpolate(logits, knots)
            solver.run(recompute=logits is None)
            shape = (len(spaces), len(chunk))
            iterations[:, chunk] = solver.iterations.view(shape)
            gradient[:, chunk] = solver.reached.view(shape)
            weights[:, chunk] = solver.solution.view(*shape, rows, rank)
            if logits is not None:
                logits[:, chunk] = solver.outputs.view(*shape, rows, num_rows)
        solved = torch.cat([solved, level])
    if num_classes == 2:
        weights = torch.cat([weights, -weights], 2) * math.sqrt(0.5)
    return weights, iterations, gradient


def _levels(problems: Problems) -> list[Tensor]:
    """Return the problems by the order in which to solve them: every 2^n-th l2 value, then those between.

    A GPU has room for all at once and pays for every level, so there it is one.
    """
    values, place = torch.unique(problems.l2, return_inverse=True)
    if problems.l2.device.type != "cpu" or len(values) < 4:
        return [torch.arange(len(place), device=place.device)]
    last = len(values) - 1
    stride = 1 << ((2 * last // 3).bit_length() - 1)
    seen = (place % stride == 0) | (place == last)
    levels = [seen.nonzero()[:, 0]]
    while stride > 1:
        stride //= 2
        here = (place % stride == 0) & ~seen
        levels.append(here.nonzero()[:, 0])
        seen |= here
    return [level for level in levels if len(level)]


def _knots(problems: Problems, solved: Tensor, chunk: Tensor) -> list[list[tuple[int, float]]]:
    """Return (problem, share) of the `solved` neighbours in the same fold, for each of `chunk` [Q]."""
    if not len(solved):
        return []
    # l2 = 0 has no logarithm; as the smallest it may stand a few decades below the others.
    lowest = problems.l2[problems.l2 > 0].min() * 1e-3
    position = problems.l2.clamp_min(lowest).double().log()
    result = []
    for index in chunk.tolist():
        knots = solved[problems.folds[solved] == problems.folds[index]]
        knots = knots[(position[knots] - position[index]).abs().argsort(stable=True)[:KNOTS]]
        gaps = position[knots][:, None] - position[knots][None]
        share = (position[index] - position[knots])[None] / gaps.fill_diagonal_(1.0)
        result.append(list(zip(knots.tolist(), share.fill_diagonal_(1.0).prod(1).tolist(), strict=True)))
    return result


def _interpolate(values: Tensor, knots: list[list[tuple[int, float]]]) -> Tensor:
    """Return the weighted sums [S * Q, K, X] of values [S, H, K, X] at the knots of Q problems."""
    result = values.new_zeros(values.shape[0], len(knots), *values.shape[2:])
    for row, neighbours in enumerate(knots):
        for knot, share in neighbours:
            result[:, row].add_(values[:, knot], alpha=share)
    return result.flatten(0, 1)
