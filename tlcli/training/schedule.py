"""The learning rate as a function of the step, and on a plateau of the loss."""

import math
from dataclasses import dataclass

from tlcli.training.recipe import Recipe

ONE_CYCLE_WARMUP = 0.3  # share of all steps; as torch's OneCycleLR (Smith & Topin 2019)
ONE_CYCLE_START = 1 / 25
MIN_FACTOR = 1e-3  # of the peak rate, where cosine and one-cycle end


# ---- schedule -------------------------------------------------------------------------------------------


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the share of the peak learning rate at a step, in (0, 1].

    Args:
        recipe: Schedule, warm-up and decay.
        step: Optimiser steps done, from 0; all of them gives the rate that is told of the last epoch.
        steps_per_epoch: Optimiser steps in an epoch.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.sched == "one-cycle":
        rise = max(1, round(ONE_CYCLE_WARMUP * total))
        if step < rise:
            return _between(ONE_CYCLE_START, 1.0, step / rise)
        return _between(1.0, MIN_FACTOR, (step - rise) / max(1, total - rise))
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / (total - warmup)
    if recipe.sched == "cosine":
        return _between(1.0, MIN_FACTOR, share)
    if recipe.sched == "exponential":
        return float(recipe.decay_rate**share)
    if recipe.sched == "step":
        return float(recipe.decay_rate ** math.floor(step / (recipe.decay_epochs * steps_per_epoch)))
    return 1.0  # constant, and plateau, which Plateau lowers


def _between(start: float, end: float, share: float) -> float:
    """Return the point at `share` of half a cosine from start to end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Plateau:
    """Lowers the learning rate when the watched loss stops falling.

    Attributes:
        factor: Current share of the peak rate.
        best: Smallest loss so far.
        waited: Epochs since then.
    """

    factor: float = 1.0
    best: float = math.inf
    waited: int = 0

    def update(self, loss: float, recipe: Recipe) -> None:
        """Look at an epoch's loss; does nothing for other schedules."""
        if recipe.sched != "plateau":
            return
        if loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > recipe.decay_epochs:
            self.factor, self.waited = self.factor * recipe.decay_rate, 0
