"""The solver of many multinomial logistic regressions at once: batched preconditioned conjugate gradients."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.linear import Basis
from tlcli.machine.device import fast_bf16

MAX_ITERATIONS = 500
REFRESH = 30  # iterations after which increments are replaced by what they add up to, in fp32
NOISE = 0.02  # what increments in bf16 leave uncertain of the gradient at the last check
STEEP = 0.3  # share of its slope at the start that a step may leave
ATTEMPTS = 6  # fp32 checks without progress after which a problem is at the limit of fp32
CACHE_ELEMENTS = 1 << 17  # fp32 elements in a block of element-wise work on a CPU: 512 KiB
SMALL_ELEMENTS = 1 << 18  # coordinates of a basis below which calls cost more than arithmetic
STATE = ("penalty", "shares", "weights", "gradient", "direction", "turn", "logits", "means", "curvature")
COUNTS = ("checked", "latest", "best", "attempts", "place")


@dataclass(frozen=True)
class Problems:
    """Problems on the same rows and classes: every basis with every (l2, row weights) pair.

    Attributes:
        targets: fp32 [C, N], each column a distribution over the classes.
        row_weights: fp32 [F, N], not negative, each row summing to 1; zeros leave a fold out.
        l2: fp32 [H].
        folds: int64 [H], which of `row_weights` each problem uses.
    """

    targets: Tensor
    row_weights: Tensor
    l2: Tensor
    folds: Tensor


def widen(value: Tensor, rank: int) -> Tensor:
    """Insert zero coordinates before the last one, the bias: bases of different rank then fit one tensor."""
    zeros = value.new_zeros(*value.shape[:-1], rank - value.shape[-1])
    return torch.cat([value[..., :-1], zeros, value[..., -1:]], -1) if zeros.numel() else value


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each problem's parameters: [P, K, R] x [P, K, R] -> [P]."""
    count = len(left)
    return torch.bmm(left.reshape(count, 1, -1), right.reshape(count, -1, 1)).reshape(count)


@dataclass(frozen=True)
class Space:
    """A basis widened to R coordinates, and its copy in the type of fast products."""

    coordinates: Tensor
    fast: Tensor
    axes: Tensor | None
    variances: Tensor
    rest: float

    @classmethod
    def of(cls, basis: Basis, rank: int) -> "Space":
        """Return a basis with coordinates that do nothing, up to `rank` of them."""
        coordinates = widen(basis.coordinates, rank)
        small = coordinates.device.type == "cpu" and coordinates.numel() <= SMALL_ELEMENTS
        low = torch.bfloat16 if not small and fast_bf16(coordinates.device)[0] else torch.float32
        variances = widen(basis.variances, rank) if basis.axes is None else basis.variances
        return cls(coordinates, coordinates.to(low), basis.axes, variances, basis.rest)

    def precondition(self, gradient: Tensor, curvature: Tensor, penalty: Tensor, out: Tensor) -> None:
        """Give the gradients of Q problems times the inverse of `curvature * covariance + l2`.

        Args:
            gradient: [Q, K, R].
            curvature: Mean curvature of each problem, [Q, 1].
            penalty: l2 of each problem, [Q].
            out: Takes them, [Q, K, R].
        """
        known = curvature * self.variances
        known[:, :-1] += penalty[:, None]
        known = known.clamp_min_(1e-7).reciprocal_()[:, None]
        if self.axes is None:
            torch.mul(gradient, known, out=out)
            return
        rest = (curvature * self.rest + penalty[:, None]).clamp_min(1e-7).reciprocal()
        along = (gradient @ self.axes) * (known - rest[:, None])
        torch.addcmul(along @ self.axes.T, gradient, rest[:, None], out=out)


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


class Solver:
    """The state of P problems (S bases x H) being solved together; those of a basis stand side by side.

    Two classes need only one logit v, with logits (v, -v) / sqrt(2): K = 1 row of parameters a problem, and
    `means` holds sqrt(2) times the first probability, the derivative of the loss by v but for the target's.
    More classes keep K = C rows, whose sum the gradient never moves from zero, and `means` is the softmax.
    """

    def __init__(self, spaces: list[Space], problems: Problems, tolerance: float) -> None:
        self.spaces = spaces
        self.low = spaces[0].fast.dtype
        self.tolerance = tolerance
        self.num_classes, self.num_rows = problems.targets.shape
        self.two = self.num_classes == 2
        self.top = math.sqrt(2.0) if self.two else 1.0  # what a mean is at most
        self.targets = problems.targets[:1] * self.top if self.two else problems.targets
        device = problems.l2.device
        count, rows = len(spaces) * len(problems.l2), len(self.targets)
        self.weights = torch.zeros(count, rows, spaces[0].coordinates.shape[1], device=device)
        self.penalty = problems.l2.repeat(len(spaces))
        self.shares = problems.row_weights[problems.folds.repeat(len(spaces))]  # [P, N]
        self.gradient, self.direction, self.turn = (torch.zeros_like(self.weights) for _ in range(3))
        self.logits, self.means, self.spare = (
            torch.zeros(count, rows, self.num_rows, device=device) for _ in range(3)
        )
        self.change, self.rise = (torch.zeros_like(self.logits, dtype=self.low) for _ in range(2))
        self.curvature = torch.zeros(count, device=device)
        self.checked = torch.zeros(count, dtype=torch.long, device=device)  # iteration of the last fp32 check
        self.latest = torch.zeros(count, device=device)  # largest gradient at the last check
        self.noise = NOISE if self.low != torch.float32 else 0.0
        self.best = torch.full((count,), math.inf, device=device)  # smallest gradient at a check
        self.attempts = torch.zeros(count, dtype=torch.long, device=device)  # checks that did not halve it
        # Which problem each slot of the state holds: slots are given up as problems converge.
        self.place = torch.arange(count, device=device)
        self.bounds = [len(problems.l2) * number for number in range(len(spaces) + 1)]

    # ---- the loop -----------------------------------------------------------------------------------------

    def run(self, *, recompute: bool) -> None:
        """Minimise every problem from `weights`, whose `logits` are there unless `recompute`.

        Sets solution [P, K, R], outputs [P, K, N] (their logits), iterations [P] and reached [P], the largest
        gradient component.
        """
        count, device = len(self.place), self.place.device
        self.solution, self.outputs = torch.empty_like(self.weights), torch.empty_like(self.logits)
        self.iterations = torch.zeros(count, dtype=torch.int32, device=device)
        self.reached = torch.full((count,), math.inf, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        ready = torch.arange(count, device=device)
        for iteration in range(MAX_ITERATIONS + 1):
            if len(ready):
                self._check(ready, iteration, recompute or iteration > 0)
                over = ready[(self.latest <= self.tolerance)[ready] | (self.attempts >= ATTEMPTS)[ready]]
                # A solution is taken when reached, though the problem may stay a while.
                over = ready if iteration == MAX_ITERATIONS else over
                taken = self.place[over]
                self.solution[taken], self.outputs[taken] = self.weights[over], self.logits[over]
                self.reached[taken], self.iterations[taken] = self.latest[over], iteration
                done[taken] = True
            left = ~done[self.place]
            share = float(left.float().mean())
            if share == 0.0:
                break
            if share < 0.9:
                self._compact(left.nonzero()[:, 0])
                left = ~done[self.place]
            self._iterate()
            largest = self.gradient.abs().amax((1, 2)) / self.top
            due = (largest <= 0.9 * self.tolerance) | (largest <= self.noise * self.latest)
            due |= iteration + 1 - self.checked >= REFRESH
            ready = ((due | (iteration + 1 == MAX_ITERATIONS)) & left).nonzero()[:, 0]

    def _check(self, which: Tensor, iteration: int, recompute: bool) -> None:
        """Compute the gradients of problems `which` [Q] anew in fp32, and the logits too if `recompute`."""
        every = len(which) == len(self.place)
        weights = self.weights if every else self.weights[which]
        logits = self.logits if every else self.logits[which]
        if recompute:
            self._multiply(weights, [s.coordinates.T for s in self.spaces], logits, which)
        means = self.means if every else self.means[which]
        residual = self.spare[: len(which)]
        curvature = torch.zeros(len(which), device=which.device)
        for part, rows in self._blocks(len(which)):
            mean = means[part, :, rows] = self._means(logits[part, :, rows])
            weight = self.shares[part if every else which[part], rows]
            curvature[part] += self._mean_curvature(mean, weight)
            torch.mul(mean - self.targets[:, rows], weight[:, None], out=residual[part, :, rows])
        gradient = torch.empty_like(weights)
        self._multiply(residual, [s.coordinates for s in self.spaces], gradient, which)
        gradient[..., :-1] += weights[..., :-1] * self.penalty[which, None, None]
        if not every:
            self.logits[which], self.means[which] = logits, means
        self.gradient[which], self.curvature[which] = gradient, curvature
        self.checked[which] = iteration
        largest = gradient.abs().amax((1, 2)) / self.top  # with two rows each has 1 / sqrt(2) of it
        better = largest < 0.5 * self.best[which]
        self.attempts[which] = torch.where(better, 0, self.attempts[which] + 1)
        self.best[which] = torch.minimum(self.best[which], largest)
        self.latest[which] = largest

    def _compact(self, keep: Tensor) -> None:
        """Keep the slots `keep` of the state."""
        self.bounds = torch.searchsorted(keep, torch.tensor(self.bounds, device=keep.device)).tolist()
        for name in STATE + COUNTS:
            setattr(self, name, getattr(self, name)[keep])
        for name in ("spare", "change", "rise"):
            setattr(self, name, getattr(self, name)[: len(keep)])

    # ---- one iteration ------------------------------------------------------------------------------------

    def _iterate(self) -> None:
        """Take one step in every problem."""
        slope = self._turn_direction()
        self._multiply(self.direction, [s.fast.T for s in self.spaces], self.change)
        bend = self.penalty * self.direction[..., :-1].square().sum((1, 2))
        step = self._line_search(slope, bend)
        self.means, self.spare = self.spare, self.means
        for part, rows in self._blocks(len(step)):
            self.logits[part, :, rows].addcmul_(self.change[part, :, rows].float(), step[part, None, None])
        self.weights.addcmul_(self.direction, step[:, None, None])
        self._multiply(self.rise, [s.fast for s in self.spaces], self.turn)
        scale = (step * self.penalty)[:, None, None]
        self.turn[..., :-1].addcmul_(self.direction[..., :-1], scale)
        self.gradient += self.turn

    def _turn_direction(self) -> Tensor:
        """Set the next conjugate direction; return the slope of the objective along it, [P]."""
        descent = self._precondition(self.gradient)
        bent = dot(self.direction, self.turn)
        share = dot(self.turn, descent) / bent.clamp_min(1e-30)  # Hestenes and Stiefel
        share = torch.where(bent > 1e-30, share.clamp(0.0, 100.0), 0.0)
        steepest = dot(self.gradient, descent)
        slope = share * dot(self.gradient, self.direction) - steepest
        downhill = slope < -0.01 * steepest
        share = torch.where(downhill, share, 0.0)
        self.direction.mul_(share[:, None, None]).sub_(descent)
        if self.low != torch.float32:
            self.direction.copy_(self.direction.to(self.low))  # the step that the products see
        return torch.where(downhill, slope, -steepest)

    def _precondition(self, gradient: Tensor) -> Tensor:
        """Return gradient [P, K, R] times the inverse of `curvature * covariance + l2`."""
        result = torch.empty_like(gradient)
        curvature = self.curvature.clamp_min(1e-4)[:, None]
        for number, space in enumerate(self.spaces):
            here = slice(self.bounds[number], self.bounds[number + 1])
            space.precondition(gradient[here], curvature[here], self.penalty[here], out=result[here])
        return result

    def _multiply(
        self, values: Tensor, factors: list[Tensor], out: Tensor, which: Tensor | None = None
    ) -> None:
        """Multiply values [Q, K, X], each by the factor [X, Y] of its basis, into out [Q, K, Y].

        Slot i of both is slot which[i] of the state, in ascending order.
        """
        bounds = self.bounds
        if which is not None:
            bounds = (
                [0, len(which)]
                if len(factors) == 1
                else torch.searchsorted(which, torch.tensor(bounds, device=which.device)).tolist()
            )
        for first, end, factor in zip(bounds[:-1], bounds[1:], factors, strict=True):
            if first == end:
                continue
            left = values[first:end].flatten(0, 1).to(factor.dtype)
            target = out[first:end].view(-1, out.shape[-1])
            if target.dtype == factor.dtype:
                torch.mm(left, factor, out=target)
            else:
                target.copy_(left @ factor)

    # ---- line search --------------------------------------------------------------------------------------

    def _line_search(self, slope: Tensor, bend: Tensor) -> Tensor:
        """Return step sizes [P]; leaves means in `spare` and changes of the residuals in `rise`.

        The objective along the direction is convex, so its slope brackets the minimum; Newton's step comes
        first.

        Args:
            slope: Slope of the objective at step 0, [P], not positive.
            bend: Second derivative of the penalty along the direction, [P].
        """
        step = (-slope / (self._second_derivative() + bend).clamp_min(1e-30)).clamp_max(1e6)
        return bracket(slope, step, bend, self._measure)

    def _blocks(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Yield (problems, rows) of blocks that stay in a core's cache."""
        whole = CACHE_ELEMENTS if self.targets.device.type == "cpu" else 1 << 26
        columns = min(self.num_rows, max(1, whole // len(self.targets)))
        at_once = max(1, whole // (columns * len(self.targets)))
        for first in range(0, count, at_once):
            for left in range(0, self.num_rows, columns):
                yield slice(first, min(first + at_once, count)), slice(left, left + columns)

    def _means(self, logits: Tensor) -> Tensor:
        """Return the means of logits [Q, K, B]."""
        return (logits * self.top).sigmoid_().mul_(self.top) if self.two else logits.softmax(1)

    def _mean_curvature(self, means: Tensor, weight: Tensor) -> Tensor:
        """Return the mean curvature p(1 - p) [Q] of means [Q, K, B] under row weights [Q, B]."""
        spread = self.top * means.sum(1) - means.square().sum(1)
        return (spread * weight).sum(1) / (self.num_classes - 1)

    def _second_derivative(self) -> Tensor:
        """Return the second derivative of the data loss along the change, at step 0, [P]."""
        result = torch.zeros(len(self.place), device=self.place.device)
        for part, rows in self._blocks(len(result)):
            change = self.change[part, :, rows].float()
            product = self.means[part, :, rows] * change
            first = product.sum(1)
            second = product.mul_(change).sum(1).mul_(self.top)
            weight = self.shares[part, rows]
            result[part] += (second.addcmul_(first, first, value=-1.0) * weight).sum(1)
        return result

    def _measure(self, which: Tensor | slice, step: Tensor) -> Tensor:
        """Go `step` [Q] along the change in problems `which` [Q], or in all.

        Sets their means in `spare`, their changes of residuals in `rise`, and their curvature.

        Returns:
            How much the slope of the data loss rises, [Q].
        """
        steeper = torch.zeros_like(step)
        curvature = torch.zeros_like(step)
        for part, rows in self._blocks(len(step)):
            slots = part if isinstance(which, slice) else which[part]  # a slice copies nothing
            change = self.change[slots, :, rows].float()
            means = self._means(torch.addcmul(self.logits[slots, :, rows], change, step[part, None, None]))
            weight = self.shares[slots, rows]
            curvature[part] += self._mean_curvature(means, weight)
            rise = (means - self.means[slots, :, rows]).mul_(weight[:, None])
            self.spare[slots, :, rows] = means
            self.rise[slots, :, rows] = rise.to(self.rise.dtype)
            steeper[part] += rise.mul_(change).sum((1, 2))
        self.curvature[which] = curvature
        return steeper
