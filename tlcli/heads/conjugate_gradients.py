"""The solver of many multinomial logistic regressions at once: batched preconditioned conjugate gradients."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tlcli.heads.row_loss import RowLoss
from tlcli.heads.spaces import Problems, Space, Span, backward, forward

MAX_ITERATIONS = 500
SLOW_ELEMENTS = 1 << 25  # of the Hessians of slow problems, fp32: 128 MiB
REFRESH = 20  # iterations after which increments are replaced by what they add up to
# Share of the gradient at the last check below which what increments add up to is uncertain.
NOISE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
STEEP = 0.3  # share of its slope at the start that a step may leave
ATTEMPTS = 6  # checks without progress after which a problem is at the limit of fp32
LEAST_CURVATURE = 1e-9  # where every row is named with certainty, the step is the penalty's
COMPACT = 0.9  # share of unsolved problems below which the solved ones leave the batch
CACHE_ELEMENTS = 1 << 17  # fp32 elements in a block of element-wise work on a CPU: 512 KiB
LOSS_SHARE = 0.02  # of the spread of the outputs, beside the penalty, in what the decrement is compared with
STATE = ("penalty", "space", "shares", "weights", "gradient", "direction", "turn", "logits", "slack",
         "curvature", "spread")  # fmt: skip
COUNTS = ("checked", "seen", "best", "attempts", "place")


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each problem's parameters: [P, K, R] x [P, K, R] -> [P]."""
    count = len(left)
    return torch.bmm(left.reshape(count, 1, -1), right.reshape(count, -1, 1)).reshape(count)


def bracket(
    slope: Tensor, step: Tensor, bend: Tensor, measure: Callable[[Tensor | slice, Tensor], Tensor]
) -> Tensor:
    """Return step sizes at which convex objectives no longer fall steeply, [P].

    Args:
        slope: Slope of each objective at step 0, [P], not positive.
        step: First steps, [P]; changed in place.
        bend: Second derivative of the penalty along the direction, [P].
        measure: (problems, all or their places; steps) -> how much the slope of the data loss rises. Only
            problems whose step fails are measured again.
    """
    here = slope + measure(slice(None), step) + step * bend
    todo = (here.abs() > STEEP * slope.abs()).nonzero()[:, 0]
    if not len(todo):
        return step
    here = here[todo]
    low, low_slope = torch.zeros_like(here), slope[todo]
    high, high_slope = torch.full_like(here, math.inf), torch.zeros_like(here)
    for _ in range(10):
        at, start = step[todo], slope[todo]
        beyond = here > 0
        high, high_slope = torch.where(beyond, at, high), torch.where(beyond, here, high_slope)
        low, low_slope = torch.where(beyond, low, at), torch.where(beyond, low_slope, here)
        share = (low_slope / (low_slope - high_slope)).clamp(0.1, 0.9)
        longer = (start / (start - low_slope)).nan_to_num(4.0, 4.0, 4.0).clamp(1.5, 4.0)
        at = torch.where(high.isinf(), at * longer, low + (high - low) * share)
        step[todo] = at
        here = start + measure(todo, at) + at * bend[todo]
        left = here.abs() > STEEP * start.abs()
        if not bool(left.any()):
            break
        todo, here, low, low_slope = todo[left], here[left], low[left], low_slope[left]
        high, high_slope = high[left], high_slope[left]
    return step


def blocks(values: Tensor, count: int) -> Iterator[tuple[slice, slice]]:
    """Yield (problems, rows) of blocks of values [P, K, N], of the first `count`, that stay in a cache."""
    _, height, num_rows = values.shape
    whole = CACHE_ELEMENTS if values.device.type == "cpu" else 1 << 26
    columns = min(num_rows, max(1, whole // height))
    at_once = max(1, whole // (columns * height))
    for first in range(0, count, at_once):
        for left in range(0, num_rows, columns):
            yield slice(first, min(first + at_once, count)), slice(left, left + columns)


def add_variance(variance: Tensor, weight: Tensor, curvature: Tensor, spread: Tensor) -> None:
    """Add what p(1 - p) [Q, K, B] under row weights [Q, B] gives to the curvature [Q, K] and spread [Q].

    The curvature of a class is its mean p(1 - p), the spread of a row its 1 - sum p^2.
    """
    found = variance.mul_(weight[:, None]).sum(2)
    curvature += found
    spread += found.sum(1)


class Solver:
    """The state of P problems (S folds x H) being solved together; those of a fold stand side by side.

    A problem is solved when its Newton decrement, by the preconditioner's model of the Hessian, is at most
    `tolerance` of the size of the solution:  g' inv(H) g <= tolerance^2 (l2 ||W||^2 + LOSS_SHARE spread),
    where `spread` is the mean of 1 - sum p^2. The distance of W from the minimiser, measured by the Hessian,
    is then that share of W's own: a small l2 is held to it as a large one is.
    """

    def __init__(self, spaces: list[Space], problems: Problems, tolerance: float) -> None:
        self.spaces = spaces
        first, device = spaces[0].coordinates, problems.l2.device
        self.low = spaces[0].fast.dtype
        self.rounds = self.low != torch.float32
        self.tolerance = tolerance
        self.labels = torch.stack([space.labels for space in spaces])  # [S, N]
        self.loss = RowLoss(problems.num_classes, problems.smoothing)
        each = len(problems.l2)
        count, rows = len(spaces) * each, self.loss.num_logits
        self.weights = torch.zeros(count, rows, first.shape[1], device=device)
        self.penalty = problems.l2.float().repeat(len(spaces))
        self.space = torch.arange(len(spaces), device=device).repeat_interleave(each)
        self.shares = torch.stack([space.row_weights for space in spaces])[self.space]  # [P, N]
        self.gradient, self.direction, self.turn = (torch.zeros_like(self.weights) for _ in range(3))
        outputs = torch.zeros(count, rows, len(first), device=device)
        self.logits, self.slack, self.spare = outputs, outputs.clone(), outputs.clone()
        self.change, self.rise = (torch.zeros_like(self.logits, dtype=self.low) for _ in range(2))
        self.curvature = torch.zeros(count, rows, device=device)
        self.spread = torch.zeros(count, device=device)
        self.checked = torch.full((count,), -1, device=device)  # iteration of the last check
        self.seen = torch.full((count,), math.inf, device=device)  # size of the gradient at the last check
        self.best = torch.full_like(self.seen, math.inf)  # smallest one
        self.attempts = torch.zeros(count, dtype=torch.long, device=device)  # checks that did not halve it
        # Which problem each slot of the state holds: slots are given up as problems converge.
        self.place = torch.arange(count, device=device)
        self.hessians: list[Tensor | None] = [None] * count  # Cholesky factors [K, R, R] of slow problems
        self.built = [0] * count  # the iteration they are of
        self.bounds = [each * number for number in range(len(spaces) + 1)]

    # ---- the loop -----------------------------------------------------------------------------------------

    def run(self, *, recompute: bool) -> None:
        """Minimise every problem from `weights`, whose `logits` are there unless `recompute`.

        Sets solution [P, K, R], outputs [P, K, N] (their logits), iterations [P] and reached [P], the
        decrement as a share of the size of the solution.
        """
        count, device = len(self.place), self.place.device
        self.solution, self.outputs = torch.empty_like(self.weights), torch.empty_like(self.logits)
        self.iterations = torch.zeros(count, dtype=torch.int32, device=device)
        self.reached = torch.full((count,), math.inf, dtype=torch.float64, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        self._check(self.place, 0, recompute)
        for iteration in range(MAX_ITERATIONS + 1):
            descent, decrement = self._descent()
            size = dot(self.gradient, self.gradient).sqrt()
            due = (iteration - self.checked >= REFRESH) | (size <= NOISE[self.low] * self.seen)
            due |= (decrement <= self.tolerance) & self.rounds
            due |= torch.full_like(due, iteration == MAX_ITERATIONS)
            due &= self.checked < iteration
            if bool(due.any()):
                self._check(due.nonzero()[:, 0], iteration, True)
                self._model_hessians((due & ~done[self.place]).nonzero()[:, 0], iteration)
                descent, decrement = self._descent()
            self._note(decrement, iteration)
            over = (decrement <= self.tolerance) | (self.attempts >= ATTEMPTS)
            if iteration == MAX_ITERATIONS:
                over = torch.ones_like(over)
            # A solution is taken when reached, though the problem may stay a while.
            self._take((over & ~done[self.place]).nonzero()[:, 0], decrement, iteration)
            done[self.place[over]] = True
            left = ~done[self.place]
            share = float(left.float().mean())
            if share == 0.0:
                break
            if share < COMPACT:
                keep = left.nonzero()[:, 0]
                self._compact(keep)
                descent = descent[keep]
            self._iterate(descent)

    def _descent(self) -> tuple[Tensor, Tensor]:
        """Return the preconditioned gradients [P, K, R] and the decrements relative to the solutions, [P]."""
        descent = torch.empty_like(self.gradient)
        curvature = self.curvature.clamp_min(LEAST_CURVATURE)
        for space, span in self._spans():
            space.precondition(self.gradient[span], curvature[span], self.penalty[span], out=descent[span])
        for slot, factor in enumerate(self.hessians):
            if factor is not None:
                descent[slot] = torch.cholesky_solve(self.gradient[slot][..., None], factor)[..., 0]
        size = self.penalty * self.weights[..., :-1].square().sum((1, 2)) + LOSS_SHARE * self.spread
        return descent, (dot(self.gradient, descent) / size.clamp_min(1e-30)).abs().sqrt()

    def _model_hessians(self, which: Tensor, iteration: int) -> None:
        """Precondition problems `which` that are slow with the Hessian's own blocks, one a class.

        Where rows stay undecided (an image in two classes), a mean curvature says little of the others'.
        """
        elements = self.weights[0].numel() * self.weights.shape[2]
        room = SLOW_ELEMENTS // elements - sum(factor is not None for factor in self.hessians)
        # Building them costs about half as many iterations as there are coordinates.
        due = max(REFRESH, self.weights.shape[2] // 4)
        slow = [slot for slot in which.tolist() if iteration - self.built[slot] >= due]
        for slot in slow[: max(0, room)]:
            space = self.spaces[int(self.space[slot])]
            share = self.loss.variance(self.slack[slot][None])[0] * self.shares[slot]
            self.hessians[slot] = space.hessian(share, float(self.penalty[slot]))
            self.built[slot] = iteration

    def _note(self, decrement: Tensor, iteration: int) -> None:
        """Remember the decrements of problems that were checked at `iteration`."""
        fresh = self.checked == iteration
        better = decrement < 0.5 * self.best
        self.attempts = torch.where(fresh, torch.where(better, 0, self.attempts + 1), self.attempts)
        self.best = torch.where(fresh, self.best.minimum(decrement), self.best)

    def _take(self, over: Tensor, decrement: Tensor, iteration: int) -> None:
        """Keep the solutions of the slots `over`."""
        taken = self.place[over]
        self.solution[taken], self.outputs[taken] = self.weights[over], self.logits[over]
        self.reached[taken], self.iterations[taken] = decrement[over].double(), iteration

    def _check(self, which: Tensor, iteration: int, recompute: bool) -> None:
        """Compute the gradients of problems `which` [Q] anew, and the logits too if `recompute`."""
        every = len(which) == len(self.place)
        weights = self.weights if every else self.weights[which]
        logits = self.logits if every else self.logits[which]
        if recompute:
            forward(self._spans(which), weights, logits, fast=False)
        slack = self.slack if every else self.slack[which]
        residual = self.spare[: len(which)]
        curvature, spread = torch.zeros_like(self.curvature[which]), torch.zeros_like(self.spread[which])
        for part, rows in blocks(self.slack, len(which)):
            labels = self._labels(part if every else which[part], rows)
            found = slack[part, :, rows] = self.loss.slack(logits[part, :, rows], labels)
            weight = self.shares[part if every else which[part], rows]
            add_variance(self.loss.variance(found), weight, curvature[part], spread[part])
            residual[part, :, rows] = self.loss.derivative(found, labels) * weight[:, None]
        gradient = torch.empty_like(weights)
        backward(self._spans(which), residual, gradient, fast=False)
        gradient[..., :-1] += weights[..., :-1] * self.penalty[which, None, None]
        if not every:
            self.logits[which], self.slack[which] = logits, slack
        self.gradient[which], self.curvature[which], self.spread[which] = gradient, curvature, spread
        self.checked[which] = iteration
        self.seen[which] = dot(gradient, gradient).sqrt()

    def _labels(self, which: Tensor | slice, rows: slice) -> Tensor:
        """Return the labels [Q, B] of a block of rows in slots `which`."""
        return self.labels[self.space[which], rows]

    def _compact(self, keep: Tensor) -> None:
        """Keep the slots `keep` of the state."""
        self.bounds = torch.searchsorted(keep, torch.tensor(self.bounds, device=keep.device)).tolist()
        for name in STATE + COUNTS:
            setattr(self, name, getattr(self, name)[keep])
        self.hessians = [self.hessians[slot] for slot in keep.tolist()]
        self.built = [self.built[slot] for slot in keep.tolist()]
        for name in ("spare", "change", "rise"):
            setattr(self, name, getattr(self, name)[: len(keep)])

    # ---- one iteration ------------------------------------------------------------------------------------

    def _iterate(self, descent: Tensor) -> None:
        """Take one step in every problem, given its preconditioned gradient."""
        slope = self._turn_direction(descent)
        forward(self._spans(), self.direction, self.change, fast=True)
        bend = self.penalty * self.direction[..., :-1].square().sum((1, 2))
        step = self._line_search(slope, bend)
        self.slack, self.spare = self.spare, self.slack
        for part, rows in blocks(self.slack, len(step)):
            change = self.change[part, :, rows].to(step.dtype)
            self.logits[part, :, rows].addcmul_(change, step[part, None, None])
        self.weights.addcmul_(self.direction, step[:, None, None])
        backward(self._spans(), self.rise, self.turn, fast=True)
        scale = (step * self.penalty)[:, None, None]
        self.turn[..., :-1].addcmul_(self.direction[..., :-1], scale)
        self.gradient += self.turn

    def _turn_direction(self, descent: Tensor) -> Tensor:
        """Set the next conjugate direction; return the slope of the objective along it, [P]."""
        bent = dot(self.direction, self.turn)
        share = dot(self.turn, descent) / bent.clamp_min(1e-30)  # Hestenes and Stiefel
        share = torch.where(bent > 1e-30, share.clamp(0.0, 100.0), 0.0)
        steepest = dot(self.gradient, descent)
        slope = share * dot(self.gradient, self.direction) - steepest
        downhill = slope < -0.01 * steepest
        share = torch.where(downhill, share, 0.0)
        self.direction.mul_(share[:, None, None]).sub_(descent)
        if self.rounds:
            self.direction.copy_(self.direction.to(self.low))  # the step that the products see
        return torch.where(downhill, slope, -steepest)

    def _spans(self, which: Tensor | None = None) -> list[Span]:
        """Return each space with its slots, or those of `which`, which ascends."""
        bounds = self.bounds
        if which is not None:
            bounds = torch.searchsorted(which, torch.tensor(bounds, device=which.device)).tolist()
        pairs = zip(self.spaces, bounds[:-1], bounds[1:], strict=True)
        return [(space, slice(first, end)) for space, first, end in pairs if first < end]

    # ---- line search --------------------------------------------------------------------------------------

    def _line_search(self, slope: Tensor, bend: Tensor) -> Tensor:
        """Return step sizes [P]; leaves the slack in `spare` and changes of the residuals in `rise`.

        The objective along the direction is convex, so its slope brackets the minimum; Newton's step comes
        first.

        Args:
            slope: Slope of the objective at step 0, [P], not positive.
            bend: Second derivative of the penalty along the direction, [P].
        """
        step = (-slope / (self._second_derivative() + bend).clamp_min(1e-30)).clamp_max(1e6)
        return bracket(slope, step, bend, self._measure)

    def _second_derivative(self) -> Tensor:
        """Return the second derivative of the data loss along the change, at step 0, [P]."""
        result = torch.zeros_like(self.spread)
        for part, rows in blocks(self.slack, len(result)):
            change = self.change[part, :, rows].to(result.dtype)
            labels, weight = self._labels(part, rows), self.shares[part, rows]
            second = self.loss.bend(self.slack[part, :, rows], change, labels)
            result[part] += (second * weight).sum(1)
        return result

    def _measure(self, which: Tensor | slice, step: Tensor) -> Tensor:
        """Go `step` [Q] along the change in problems `which` [Q], or in all.

        Sets their slack in `spare`, their changes of residuals in `rise`, their curvature and spread.

        Returns:
            How much the slope of the data loss rises, [Q].
        """
        steeper = torch.zeros_like(step)
        curvature = step.new_zeros(len(step), self.weights.shape[1])
        spread = torch.zeros_like(step)
        for part, rows in blocks(self.slack, len(step)):
            slots = part if isinstance(which, slice) else which[part]  # a slice copies nothing
            change = self.change[slots, :, rows].to(step.dtype)
            logits = torch.addcmul(self.logits[slots, :, rows], change, step[part, None, None])
            slack = self.loss.slack(logits, self._labels(slots, rows))
            weight = self.shares[slots, rows]
            add_variance(self.loss.variance(slack), weight, curvature[part], spread[part])
            rise = (slack - self.slack[slots, :, rows]).mul_(weight[:, None])
            self.spare[slots, :, rows] = slack
            self.rise[slots, :, rows] = rise.to(self.rise.dtype)
            steeper[part] += rise.mul_(change).sum((1, 2))
        self.curvature[which], self.spread[which] = curvature, spread
        return steeper
