"""The training loop: over cached rows or images, in one process or several."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlcli.errors import Interrupted, UsageError
from tlcli.machine import interrupts, processes
from tlcli.training import rate_search
from tlcli.training.continued import Continued
from tlcli.training.inputs import PLAIN, Inputs, generator, loading
from tlcli.training.network import Network, fp32_where_bf16_is_slow, holding
from tlcli.training.order import epoch_order
from tlcli.training.recipe import Recipe
from tlcli.training.resume import Counters, State
from tlcli.training.schedule import rate_factor
from tlcli.training.selection import Selection
from tlcli.training.setting import Setting
from tlcli.training.stepper import Stepper, diverged

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 64
FRESH_SECONDS = 20.0  # an epoch's end is saved when the last checkpoint is older than this


@dataclass(frozen=True)
class Samples:
    """What is trained or measured on.

    Attributes:
        inputs: Gives the network's inputs.
        labels: int64 [N] on the CPU.
    """

    inputs: Inputs
    labels: Tensor


@dataclass(frozen=True)
class Trained:
    """What training gave, beside the network, which holds the final weights.

    Attributes:
        history: One dict an epoch, as in metrics.jsonl.
        steps: Optimiser steps.
        lr: Peak learning rate.
        best_epoch: The epoch whose weights were kept because val was best; None when the last one's were.
        share_of_zeros: Of the weights that --l1 acts on; None without it.
        seconds: Wall time, of this process alone when resumed.
    """

    history: list[dict[str, Any]]
    steps: int
    lr: float
    best_epoch: int | None
    share_of_zeros: float | None
    seconds: float


def train(
    network: Network,
    recipe: Recipe,
    data: Samples,
    val: Samples | None,
    setting: Setting,
    continued: Continued | None = None,
) -> Trained:
    """Train a network in place; it ends on the CPU, in eval mode.

    Args:
        network: Rows to logits.
        recipe: How.
        data: Training samples.
        val: Measured after every epoch; needed where the recipe selects on it.
        setting: Where.
        continued: The finished run whose weights the network has: epochs and steps are numbered on from it.

    Raises:
        UsageError: An optimiser is not there, the loss is not finite, or a checkpoint is of another recipe.
        Interrupted: A signal came (machine/interrupts.py); the state is saved.
    """
    started = time.perf_counter()
    loop = _Loop(network, recipe, data, val, setting, continued)
    on_slow_bf16 = setting.device.type == "cpu" and setting.amp == "bf16"
    try:
        with (
            interrupts.deferred() as stop_signal,
            fp32_where_bf16_is_slow(network) if on_slow_bf16 else nullcontext(),
        ):
            loop.run(stop_signal)
    finally:
        loop.stepper.close()
    counters, selection = loop.counters, loop.selection
    return Trained(
        counters.history, loop.first_step + counters.step, counters.lr,
        selection.best_epoch if recipe.patience else None,
        loop.stepper.penalties.share_of_zeros() if recipe.l1 else None, time.perf_counter() - started,
    )  # fmt: skip


def network_logits(
    network: nn.Module, inputs: Inputs, *, workers: int, samples: Sequence[int] | None = None
) -> Tensor:
    """Return what a network in eval mode gives for each sample's plain view, fp32 [N, C] on the CPU.

    Args:
        network: Rows or images to logits.
        inputs: Of the samples.
        workers: Threads that load.
        samples: Positions of the samples; all by default.
    """
    network.train()  # some attention layers keep their biases in eval mode, and drop them here alone
    network.eval()
    wanted = range(len(inputs)) if samples is None else samples
    mine = list(wanted[processes.rank() :: processes.world_size()])
    batches = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
    parts = []
    with torch.no_grad(), loading(inputs, batches, PLAIN, workers=workers) as stream:
        parts = [network(inputs.finish(loaded)).float().cpu() for loaded in stream]
    found = torch.cat(parts) if parts else torch.empty(0)
    if processes.world_size() == 1:
        return found
    shares = processes.gather_objects(found)
    width = next(share.shape[1] for share in shares if len(share))
    result = torch.empty(len(wanted), width)
    for rank, share in enumerate(shares):
        if len(share):  # fewer samples than processes leave some without one, and so without a width
            result[rank :: processes.world_size()] = share
    return result


def val_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what a line of metrics.jsonl says of val."""
    return {
        "val_log_loss": float(functional.cross_entropy(logits, labels)),
        "val_accuracy": float((logits.argmax(1) == labels).double().mean()),
    }


class _Loop:
    """A training between two steps: epochs, what is measured after them, checkpoints."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        data: Samples,
        val: Samples | None,
        setting: Setting,
        continued: Continued | None,
    ) -> None:
        self.network, self.recipe, self.data, self.val, self.setting = network, recipe, data, val, setting
        self.rank, self.world = processes.rank(), processes.world_size()
        self.batch_size = min(recipe.batch_size, len(data.labels))
        if self.batch_size < self.world:
            raise UsageError(
                f"A batch of {self.batch_size} images cannot be divided over {self.world} processes.",
                hint="Use fewer processes.",
            )
        self.steps_per_epoch = len(data.labels) // self.batch_size
        self.stepper = Stepper(network, recipe, data.labels, setting)
        # Counters, schedule and checkpoints are of this training alone; what is told, and what is drawn by
        # chance, goes on from the epochs before.
        self.first_epoch, self.first_step = (continued.epochs, continued.steps) if continued else (0, 0)
        self.selection = Selection(recipe, best_epoch=self.first_epoch)
        history = list(continued.history) if continued else []
        self.counters = Counters(lr=recipe.lr or 0.0, history=history)
        self.state = State(self.counters, self.stepper, self.selection, len(data.labels))
        self.saved_at = time.monotonic()

    def run(self, stop_signal: Callable[[], int | None]) -> None:
        """Train from where the newest checkpoint was to the end.

        Args:
            stop_signal: Returns the number of the signal that asks the process to stop, or None.
        """
        recipe, counters, progress = self.recipe, self.counters, self.setting.progress
        if self.setting.checkpoints and self.state.restore(self.setting.checkpoints):
            logger.info(
                "resumed at step %d, epoch %d of %d",
                self.first_step + counters.step,
                self.first_epoch + min(counters.epoch + 1, recipe.epochs),
                self.first_epoch + recipe.epochs,
            )
        if not counters.lr:
            counters.lr = self._find_rate()
            logger.info("learning rate %.2g, found by short trainings", counters.lr)
        progress.start("training", recipe.epochs * self.steps_per_epoch * self.batch_size)
        progress.advance(counters.step * self.batch_size)
        while counters.epoch < recipe.epochs and not self.selection.is_over(self.epoch):
            started = time.perf_counter()
            self._train_epoch(stop_signal)
            self._end_epoch(time.perf_counter() - started)
            if time.monotonic() - self.saved_at >= min(FRESH_SECONDS, self.setting.checkpoint_seconds):
                self._save()
        progress.finish()
        if self.stepper.average:
            self.network.load_state_dict(self.stepper.average.values)
        if recipe.patience and self.selection.best:
            self.network.load_state_dict(self.selection.best)

    def _find_rate(self) -> float:
        """Return a learning rate by short trainings on a part of the training images."""
        inputs, workers = self.data.inputs, self.setting.workers
        draw = generator(self.recipe.seed, "rate search")
        out, rest = rate_search.held_out(self.data.labels, draw)
        total = self.recipe.epochs * self.steps_per_epoch
        count, found, epoch = min(rate_search.STEPS, total), list[list[int]](), 0
        while len(found) < count:
            epoch -= 1  # an order of its own
            found += self._batches(epoch, rest)

        def measure(samples: list[int]) -> Tensor:
            return network_logits(self.network, inputs, workers=workers, samples=samples)

        search = rate_search.RateSearch(self.stepper, inputs, self.data.labels, measure, workers)
        start, head_without = self.network.state_dict(), self.setting.head_without
        with holding(self.network, start | (head_without(out) if head_without else {})):
            return search.find(found[:count], out.tolist(), min(self.batch_size, len(rest)), total)

    def _train_epoch(self, stop_signal: Callable[[], int | None]) -> None:
        recipe, inputs, counters, stepper = self.recipe, self.data.inputs, self.counters, self.stepper
        # The head comes from features under the pretrained statistics: those stay for its first epoch.
        stepper.start_epoch(
            train_norm=recipe.norm == "train" and (recipe.head_init != "probe" or counters.epoch > 0)
        )
        done = counters.step - counters.epoch * self.steps_per_epoch
        batches = self._batches(self.epoch)[done:]
        with loading(inputs, batches, self.epoch, workers=self.setting.workers) as stream:
            for batch, loaded in zip(batches, stream, strict=True):
                labels = self.data.labels[batch].to(stepper.device)
                number = self.first_step + counters.step
                stepper.step(inputs.finish(loaded), labels, self.rate(), number, whole=self.batch_size)
                counters.step += 1
                self.setting.progress.advance(self.batch_size)
                if stepper.is_due():
                    stepper.read()
                    self.setting.progress.describe(self._running())
                self._save_or_stop(stop_signal())
        stepper.read()

    def _running(self) -> str:
        loss, correct, count = self.stepper.sums.tolist()
        return f"epoch {self.epoch + 1}  loss {loss / count:.3f}  accuracy {correct / count:.3f}"

    def _save_or_stop(self, signal_number: int | None) -> None:
        """Save when it is time to, or when the process is asked to stop.

        Raises:
            Interrupted: It is; the state is saved.
        """
        if self.world > 1:  # all stop at the same step, or those that go on wait for the others for ever
            found = [number for number in processes.gather_objects(signal_number) if number]
            signal_number = found[0] if found else None
        if signal_number is not None:
            self._save()
            raise Interrupted(signal_number)
        if time.monotonic() - self.saved_at >= self.setting.checkpoint_seconds:
            self._save()

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        self.stepper.read()  # a training that has diverged is not saved
        if self.setting.checkpoints is not None and self.rank == 0:
            self.state.save(self.setting.checkpoints)

    def _batches(self, epoch: int, samples: Tensor | None = None) -> list[list[int]]:
        """Return this process's part of each batch: positions of samples, a function of (seed, epoch).

        Args:
            epoch: From 0.
            samples: Positions to draw from; all by default.
        """
        labels = self.data.labels if samples is None else self.data.labels[samples]
        order = epoch_order(labels, self.recipe, generator(self.recipe.seed, "order", epoch))
        order = order if samples is None else samples[order]
        size = min(self.batch_size, len(order))
        return [
            order[step * size + self.rank : (step + 1) * size : self.world].tolist()
            for step in range(len(order) // size)
        ]

    @property
    def epoch(self) -> int:
        """Return the epochs done, those before included."""
        return self.first_epoch + self.counters.epoch

    def rate(self) -> float:
        """Return the learning rate of the present step."""
        share = rate_factor(self.recipe, self.counters.step, self.steps_per_epoch)
        return self.counters.lr * self.selection.plateau.factor * share

    def _end_epoch(self, seconds: float) -> None:
        """Measure, remember and report the epoch that has ended."""
        stepper, counters = self.stepper, self.counters
        sums = stepper.sums.clone()
        if self.world > 1:
            sums = torch.stack(processes.gather_objects(sums)).sum(0)
        loss, correct, count = sums.tolist()
        row: dict[str, Any] = {
            "kind": "epoch", "epoch": self.epoch + 1, "step": self.first_step + counters.step,
            "lr": self.rate(), "train_loss": loss / count,
            "train_accuracy": correct / count,
        }  # fmt: skip
        if self.val is not None:
            row |= self._measure(self.val)
        row["seconds"] = round(seconds, 3)
        average = stepper.average
        self.selection.update(row, average.values if average else self.network.state_dict())
        counters.history.append(row)
        stepper.sums.zero_()
        counters.epoch += 1
        if self.rank == 0:
            self.setting.on_epoch(counters.history)
            logger.info("%s", _summary(row, self.first_epoch + self.recipe.epochs))
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        stepper.accelerator.log(numbers, step=row["step"])

    def _measure(self, val: Samples) -> dict[str, float]:
        average = self.stepper.average
        with holding(self.network, average.values) if average else nullcontext():
            logits = network_logits(self.network, val.inputs, workers=self.setting.workers)
        found = val_figures(logits, val.labels)
        if not math.isfinite(found["val_log_loss"]):  # the last step's loss was, but not the weights it left
            what = f"The loss on val is {found['val_log_loss']} after epoch {self.epoch + 1}"
            raise diverged(what, self.rate())
        return found


def _summary(row: dict[str, Any], epochs: int) -> str:
    text = (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  accuracy {row['train_accuracy']:.3f}"
    )
    if "val_accuracy" in row:
        text += f", val {row['val_accuracy']:.3f}"
    return text + f" ({row['seconds']:.1f} s)"
