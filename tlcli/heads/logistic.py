"""Many multinomial logistic regressions on the same features, solved as one batched job.

Every problem minimises, over a weight matrix W [C, D] and a bias b [C] that is not penalised,

    sum_i s_i * cross_entropy(W x_i + b, t_i)  +  l2 / 2 * ||W||^2        with sum_i s_i = 1,

so `l2` belongs to the *mean* loss and keeps its meaning when rows are added or a fold is left out. It applies
to features that were centred and divided so that their mean variance is 1. On such features scikit-learn's
`C` is 1 / (l2 * N) for three or more classes and 2 / (l2 * N) for two (its two-class model has one weight
vector w where this one has w / 2 and -w / 2).

How far it goes: until the Newton decrement is TOLERANCE of the size of the solution (conjugate_gradients.py).
A tolerance of the gradient alone would not do: where rows are fewer than features, the gradient of a small l2
is tiny long before the minimum. Against scikit-learn at tol 1e-8 that is within 2 % of the held-out log loss
and, on few rows, within 0.005 of any probability (examples/benchmarks/exact.py).

How it is made fast:

- Solutions are a smooth function of log l2. On a CPU every STRIDE-th l2 is solved first, from the largest
  down, each from a line through the two before it (few classes: several at a time); the others start from a
  cubic through their solved neighbours, which on a dense grid is nearly within tolerance already.
- Nonlinear conjugate gradients, preconditioned by `curvature * covariance + l2`, the Hessian's shape, where
  `curvature` is each class's current mean p(1 - p). The covariance is exact along the directions a basis
  knows and a multiple of the identity on the rest. It needs tens of iterations where plain methods need
  hundreds, and no history of vectors.
- All l2 of a fold share two matrix products an iteration, one from directions to changes of the logits and
  one from changes of the residuals to changes of the gradient. Both are increments, so their rounding is
  relative to a step that shrinks: they are taken in bf16 where the processor is faster at it. A problem that
  seems solved is then computed anew and counts only if it is.
- Logits are linear in the step, so the line search needs no further product.
- Small folds form one batch. Converged problems leave it. Element-wise work runs in blocks that stay in a
  core's cache.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.conjugate_gradients import Solver
from tlcli.heads.spaces import Problems, Space, make_spaces

logger = logging.getLogger(__name__)

TOLERANCE = 4e-3  # decrement at which a problem is solved
BATCH_BYTES = 1 << 30  # memory of a batch on a CPU
KNOTS = 4  # solved neighbours that a start is interpolated from
JOINT_OUTPUTS = 1 << 19  # logits an l2 of the folds in a batch: with fewer, calls cost more than arithmetic
PRODUCT_ROWS = 64  # rows of a product below which reading the other factor takes the time
STRIDE = 4  # of the l2 values that are solved first


@dataclass(frozen=True)
class Solutions:
    """The solved problems: H l2 values on each of S folds.

    Attributes:
        weights: fp32 [S, H, C, R] in the coordinates of each basis; where those are fewer, zeros
            stand before the last one.
        iterations: int32 [S, H].
        decrement: fp64 [S, H], the Newton decrement as a share of the size of the solution.
        converged: bool [S, H], whether that is within the tolerance.
    """

    weights: Tensor
    iterations: Tensor
    decrement: Tensor
    converged: Tensor


def solve(problems: Problems, *, tolerance: float = TOLERANCE) -> Solutions:
    """Solve every l2 on every fold, in as few batches as memory allows.

    Args:
        problems: What to solve. One batch spans its folds on a GPU, or when they are small; large ones are
            solved in turn on a CPU, where a wider product gains nothing.
        tolerance: Decrement at which a problem is solved.
    """
    spaces = make_spaces(problems)
    size = at_once(problems.l2.device, problems.num_rows * problems.num_classes)
    groups = [spaces[start : start + size] for start in range(0, len(spaces), size)]
    parts = [_solve_path(group, problems, tolerance) for group in groups]
    weights, iterations, decrement = (torch.cat([part[index] for part in parts]) for index in range(3))
    converged = decrement <= tolerance
    if missing := int((~converged).sum()):
        logger.debug("%d of %d linear heads stopped above the tolerance", missing, converged.numel())
    return Solutions(weights, iterations, decrement, converged)


def at_once(device: torch.device, num_outputs: int) -> int:
    """Return how many folds of `num_outputs` logits an l2 one batch should span."""
    return max(1, JOINT_OUTPUTS // num_outputs) if device.type == "cpu" else 1 << 16


def _batch_size(spaces: list[Space], num_classes: int) -> int:
    """Return how many l2 values fit into the memory budget at once."""
    first = spaces[0].coordinates
    num_rows, rank = first.shape
    budget = BATCH_BYTES
    if first.device.type == "cuda":
        budget = int(0.4 * torch.cuda.mem_get_info(first.device)[0])
    each = 4 * len(spaces) * num_classes * (6 * num_rows + 10 * rank)
    return max(1, budget // each)


def _solve_path(spaces: list[Space], problems: Problems, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solve level after level; return weights [S, H, C, R], iterations [S, H] and decrements [S, H]."""
    first, count = spaces[0].coordinates, len(problems.l2)
    rows = 1 if problems.num_classes == 2 else problems.num_classes
    weights = first.new_zeros(len(spaces), count, rows, first.shape[1])
    iterations = torch.zeros(len(spaces), count, dtype=torch.int32, device=first.device)
    decrement = torch.zeros(len(spaces), count, dtype=torch.float64, device=first.device)
    levels = _levels(problems.l2, rows * len(spaces))
    # Logits are linear in the weights: where there is room for them, they are interpolated too.
    size = 4 * len(spaces) * count * rows * len(first)
    room = len(levels) > 1 and size <= BATCH_BYTES // 8
    logits = first.new_zeros(len(spaces), count, rows, len(first)) if room else None
    size = _batch_size(spaces, problems.num_classes)
    solved = levels[0][:0]
    for level in levels:
        for chunk in [level[start : start + size] for start in range(0, len(level), size)]:
            solver = Solver(spaces, problems.take(problems.l2[chunk]), tolerance)
            if len(solved):
                knots = _knots(problems.l2, solved, chunk)
                solver.weights = _interpolate(weights, knots)
                solver.logits = solver.logits if logits is None else _interpolate(logits, knots)
            solver.run(recompute=logits is None)
            shape = (len(spaces), len(chunk))
            iterations[:, chunk] = solver.iterations.view(shape)
            decrement[:, chunk] = solver.reached.view(shape)
            weights[:, chunk] = solver.solution.view(*shape, rows, -1)
            if logits is not None:
                logits[:, chunk] = solver.outputs.view(*shape, rows, len(first))
        solved = torch.cat([solved, level])
    if problems.num_classes == 2:
        weights = torch.cat([weights, -weights], 2) * math.sqrt(0.5)
    return weights, iterations, decrement


def _levels(l2: Tensor, rows: int) -> list[Tensor]:
    """Return the problems by the order in which to solve them; `rows` of parameters for each value.

    The largest l2 come first, then every STRIDE-th one down to the smallest, so many at a time that a product
    is worth its call, then those between. A GPU has room for all at once and pays for every level, so there
    it is one.
    """
    order = l2.argsort(descending=True, stable=True)
    if l2.device.type != "cpu":
        return [order]
    last = len(order) - 1
    knots = [*range(0, last, STRIDE), last]
    width = -(-PRODUCT_ROWS // rows)
    levels = [order[knots[first : first + width]] for first in range(0, len(knots), width)]
    stride = STRIDE
    seen = set(knots)
    while stride > 1:
        stride //= 2
        between = [place for place in range(0, last, stride) if place not in seen]
        seen.update(between)
        levels.append(order[between])
    return [level for level in levels if len(level)]


def _knots(l2: Tensor, solved: Tensor, chunk: Tensor) -> list[list[tuple[int, float]]]:
    """Return (problem, share) of the `solved` neighbours of each of `chunk` [Q].

    Between solved values these are KNOTS of a polynomial, below all of them the two of a line.
    """
    position = l2.log()
    result = []
    for index in chunk.tolist():
        gaps = (position[solved] - position[index]).abs()
        outside = bool((position[solved] > position[index]).all())
        knots = solved[gaps.argsort(stable=True)[: 2 if outside else KNOTS]]
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
