"""A learning rate found before training: short trainings at several rates, compared on images held out.

A range test (Smith 2017) raises the rate until the loss no longer falls. From a linear probe that already
knows the training set there is no fall to find, so the rates are compared by what they lead to. What suits
a short training is slower than what suits the whole one; so a short training's rates are multiples of the
rule's rate for its own length, and the best multiple is applied to the rule's rate for the whole. The images
held out are few: of the multiples that are not worse than the best by more than one standard error, the one
that is nearest to the rule is taken.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.errors import UsageError
from tlcli.machine import processes
from tlcli.training.inputs import Inputs, loading
from tlcli.training.recipe import rate_by_steps
from tlcli.training.schedule import rate_factor
from tlcli.training.stepper import Stepper

logger = logging.getLogger(__name__)

STEPS = 24  # of each short training, or all that there are
MULTIPLES = (1.0, 1 / 4, 4.0, 1 / 16, 16.0)  # of the rule's rate; then on from an edge, and between two
FURTHEST = 4.0**4
HELD_OUT = 0.2  # of the training images, at most MOST_HELD_OUT
MOST_HELD_OUT = 256


class RateSearch:
    """Short trainings of one network, each from where it stands now; it is put back after each.

    Args:
        stepper: Before its first step.
        inputs: Of the training samples.
        labels: int64 [N] of them.
        measure: Returns the network's logits of samples' plain views, fp32 [n, C]; the same in all processes.
        workers: Threads that load.
    """

    def __init__(
        self,
        stepper: Stepper,
        inputs: Inputs,
        labels: Tensor,
        measure: Callable[[list[int]], Tensor],
        workers: int,
    ) -> None:
        self.stepper, self.inputs, self.labels = stepper, inputs, labels
        self.measure, self.workers = measure, workers

    def find(self, batches: list[list[int]], held_out: list[int], whole: int, total_steps: int) -> float:
        """Return the learning rate for the whole training.

        Args:
            batches: This process's samples of each step of a short training, without those held out.
            held_out: Samples whose loss decides.
            whole: Samples of a batch over all processes.
            total_steps: Optimiser steps of the whole training.
        """
        recipe = self.stepper.recipe
        base = recipe.usual_lr * rate_by_steps(len(batches), recipe.scenario, recipe.head_init)
        losses: dict[float, Tensor] = {}

        def try_out(*multiples: float) -> float:
            """Return the best multiple of all that were tried, these among them."""
            for multiple in multiples:
                if multiple not in losses:
                    losses[multiple] = self._losses_after(batches, held_out, whole, base * multiple)
                    logger.debug(
                        "a short training at %.2g ends at loss %.4f",
                        *(base * multiple, float(losses[multiple].mean())),
                    )
            return nearest(losses)

        best = try_out(*MULTIPLES)
        while best in {min(losses), max(losses)} and max(best, 1 / best) < FURTHEST:
            best = try_out(best * 4 if best == max(losses) else best / 4)
        best = try_out(best / 2, best * 2)
        if not losses[best].isfinite().all():
            raise UsageError(
                "--lr auto found no learning rate at which training does not diverge.",
                hint="Give --lr, or add --clip-grad 1.",
            )
        return recipe.usual_lr * rate_by_steps(total_steps, recipe.scenario, recipe.head_init) * best

    def _losses_after(self, batches: list[list[int]], held_out: list[int], whole: int, peak: float) -> Tensor:
        """Return the losses of held-out samples after a short training, [n]; everything is put back."""
        stepper = self.stepper
        network = {name: value.clone() for name, value in stepper.network.state_dict().items()}
        optimizer = copy.deepcopy(stepper.optimizer.state_dict())
        scaler = stepper.accelerator.scaler
        scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        average, stepper.average = stepper.average, None
        recipe = dataclasses.replace(stepper.recipe, epochs=1, sched="cosine", warmup_epochs=0.25)
        try:
            stepper.start_epoch(train_norm=recipe.norm == "train" and recipe.head_init != "probe")
            with loading(self.inputs, batches, 0, workers=self.workers) as stream:
                for number, (batch, loaded) in enumerate(zip(batches, stream, strict=True)):
                    rate = peak * rate_factor(recipe, number, len(batches))
                    wanted = self.labels[batch].to(stepper.device)
                    stepper.step(self.inputs.finish(loaded), wanted, rate, number, whole=whole)
            if not all(processes.gather_objects(_is_finite(stepper))):
                return torch.full((len(held_out),), math.inf)
            logits = self.measure(held_out).double()
            return functional.cross_entropy(logits, self.labels[held_out], reduction="none").nan_to_num(
                math.inf
            )
        finally:
            stepper.network.load_state_dict(network)
            stepper.optimizer.load_state_dict(optimizer)
            if scaler is not None:
                scaler.load_state_dict(scale)
            stepper.average = average
            stepper.reset()


def nearest(losses: Mapping[float, Tensor]) -> float:
    """Return the multiple nearest to 1 whose mean loss is the smallest, or within one standard error of it.

    Args:
        losses: Multiple -> losses of the same samples, [n].
    """
    best = min(losses, key=lambda multiple: float(losses[multiple].mean()))

    def is_as_good(multiple: float) -> bool:
        more = losses[multiple] - losses[best]
        error = float(more.std(correction=0)) / math.sqrt(max(1, len(more) - 1))
        return multiple == best or float(more.mean()) <= error

    return min(filter(is_as_good, losses), key=lambda multiple: (abs(math.log(multiple)), multiple))


def _is_finite(stepper: Stepper) -> bool:
    """Return whether every loss of the steps that wait to be read is finite, in this process."""
    try:
        stepper.read()
    except UsageError:  # it diverged
        return False
    return True


def held_out(labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the samples that short trainings are compared on, and those they train on.

    Args:
        labels: int64 [N].
        draw: What they are drawn from.

    Returns:
        int64 [n] and int64 [N - n], in ascending order. A single sample is both.
    """
    count = max(1, min(MOST_HELD_OUT, round(HELD_OUT * len(labels))))
    order = torch.randperm(len(labels), generator=draw)
    out, rest = order[:count].sort().values, order[count:].sort().values
    return out, rest if len(rest) else out
