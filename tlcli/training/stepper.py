"""A network with its optimiser: one step of it, on accelerate, and what the steps of an epoch add up to."""

import math
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlcli.backbones.memory_format import to_channels_last
from tlcli.errors import UsageError
from tlcli.machine import processes
from tlcli.training.inputs import generator, random_seed
from tlcli.training.mixing import mix
from tlcli.training.network import Network
from tlcli.training.optimizer import (
    Average,
    Penalties,
    Places,
    make_optimizer,
    parameter_groups,
    set_rate,
)
from tlcli.training.optimizer_state import optimizer_state
from tlcli.training.recipe import Recipe
from tlcli.training.setting import Setting

READ_STEPS = {"cuda": 16}  # between two looks at losses: a GPU is not waited for in every step


class Stepper:
    """A network on its device, and the optimiser that changes it.

    Args:
        network: Trained in place.
        recipe: How.
        labels: int64 [N] of the training samples, for the class weights.
        setting: Where.

    Attributes:
        network: As given.
        optimizer: timm's.
        average: The moving average of the weights; None without --ema.
        accelerator: accelerate's.
        sums: Loss, correct answers and samples of the epoch under way, as far as they were read.

    Raises:
        UsageError: The optimiser is not there, or its state could not be saved.
    """

    def __init__(self, network: Network, recipe: Recipe, labels: Tensor, setting: Setting) -> None:
        self.network, self.recipe, self.device = network, recipe, setting.device
        self.class_weights = self._class_weights(labels)
        self.sums = torch.zeros(3, dtype=torch.float64)
        # What the last steps gave and is not in `sums` yet: step, rate, loss, correct, samples.
        self._unread: list[tuple[int, float, Tensor, Tensor, int]] = []
        self._read_steps = READ_STEPS.get(self.device.type, 1)
        self.accelerator = _accelerator(setting)
        network.to(self.device)
        if setting.channels_last:
            to_channels_last(network)
        names = network.backbone_names()
        places = Places(
            {name: setting.unit_of.get(own, setting.num_units) for name, own in names.items()},
            setting.num_units,
            frozenset(name for name, own in names.items() if own in setting.undecayed),
        )
        groups = parameter_groups(network, places, recipe)
        trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        start = {}
        if recipe.l2_sp:
            start = {
                name: value.detach().clone() for name, value in trained.items() if name in places.unit_of
            }
        self.penalties = Penalties(recipe, trained, places.undecayed, start)
        self.optimizer = make_optimizer(groups, recipe)
        optimizer_state(self.optimizer)  # one whose state cannot be saved is refused now, not after an epoch
        self._model, self._prepared = self.accelerator.prepare(network, self.optimizer)
        self.average = Average(network, recipe.ema) if recipe.ema else None
        if setting.tracker != "none":
            values = {key: value for key, value in recipe.document().items() if value is not None}
            self.accelerator.init_trackers("tlcli", config=values)

    def close(self) -> None:
        """Take the network back from accelerate, to the CPU and eval mode."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        # What is marked as prepared would train without AMP the next time.
        for name in ("_is_accelerate_prepared", "forward"):
            vars(self.network).pop(name, None)
        self.network.to("cpu").eval()
        self.network.zero_grad()

    def start_epoch(self, *, train_norm: bool) -> None:
        """Put the network in train mode.

        Args:
            train_norm: Whether BatchNorm of trained units follows the data.
        """
        self.network.train_norm = train_norm
        self._model.train()

    def step(
        self, inputs: Tensor, labels: Tensor, rate: float, number: int, *, whole: int | None = None
    ) -> None:
        """Do one optimiser step; what it gave waits to be read.

        Args:
            inputs: [B, ...] on the device.
            labels: int64 [B] on the device.
            rate: Learning rate.
            number: Of the step, from 0: its randomness is a function of it and of the recipe's seed.
            whole: Samples of the batch over all processes; B in one process.
        """
        recipe, rank, count = self.recipe, processes.rank(), len(inputs)
        # The gradients of processes are averaged, so a sample of a small part would weigh more than one of a
        # large part.
        share = processes.world_size() / (whole or count)
        torch.manual_seed(random_seed(recipe.seed, "step", number, rank))
        draw = generator(recipe.seed, "mix", number, rank)
        set_rate(self.optimizer, rate)
        targets = functional.one_hot(labels, self.network.num_classes).to(inputs.dtype)
        inputs, targets = mix(inputs, targets, recipe, draw)
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        # Even parts: one of a single sample would have no statistics for BatchNorm to follow.
        pieces = min(recipe.grad_accum, count)
        parts = list(zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True))
        for index, (some, wanted) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self._model):
                outputs = self._model(some)
                logits, *branches = outputs if isinstance(outputs, tuple) else (outputs,)
                loss = self._loss(logits, wanted)
                total += loss.detach() * len(some) / count
                correct += (logits.detach().argmax(1) == wanted.argmax(1)).sum()
                loss = loss + recipe.aux_weight * sum(self._loss(branch, wanted) for branch in branches)
                self.accelerator.backward(loss * len(some) * share)
        self._update()
        self._unread.append((number, rate, total, correct, count))

    def read(self) -> float:
        """Take in what the steps since the last reading gave; a GPU is waited for. Return the last loss.

        Raises:
            UsageError: A loss is not finite.
        """
        mean = 0.0
        unread, self._unread = self._unread, []
        for number, rate, loss, correct, count in unread:
            mean = float(loss)
            if not math.isfinite(mean):
                raise diverged(f"The loss is {mean} at step {number + 1}", rate)
            self.sums += torch.tensor([mean * count, int(correct), count], dtype=torch.float64)
        return mean

    def reset(self) -> None:
        """Forget what steps gave, and their gradients."""
        self._unread.clear()
        self.sums.zero_()
        self.network.zero_grad()

    def is_due(self) -> bool:
        """Return whether enough steps have gone by to look at their losses."""
        return len(self._unread) >= self._read_steps

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch; class weights weigh a sample by its own, perhaps mixed, class.

        torch's `weight` would weigh every term of the smoothed target, so that the share that smoothing
        gives a rare class outweighs the class that is right.
        """
        smoothing = self.recipe.label_smoothing
        if self.class_weights is None:
            return functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        losses = functional.cross_entropy(
            logits.float(), targets, label_smoothing=smoothing, reduction="none"
        )
        return (targets @ self.class_weights * losses).mean()

    def _update(self) -> None:
        recipe = self.recipe
        self.accelerator.unscale_gradients(self._prepared)
        self.penalties.add_gradients()
        if recipe.clip_grad:
            trained = list(self.penalties.trained.values())
            if recipe.clip_mode == "norm":
                nn.utils.clip_grad_norm_(trained, recipe.clip_grad)
            else:
                nn.utils.clip_grad_value_(trained, recipe.clip_grad)
        self._prepared.step()
        self._prepared.zero_grad()
        if processes.world_size() > 1 and self.network.train_norm:
            processes.average(self.network.norm_statistics())
        if self.accelerator.optimizer_step_was_skipped:  # fp16: a gradient was not finite
            return
        self.penalties.project(self.optimizer)
        if self.average:
            self.average.update(self.network)

    def _class_weights(self, labels: Tensor) -> Tensor | None:
        if self.recipe.class_weights != "balanced":
            return None
        counts = torch.bincount(labels, minlength=self.network.num_classes).float()
        present = int((counts > 0).sum())
        weights: Tensor = counts.sum() / (counts.clamp_min(1) * present)  # no image has an absent class
        return weights.to(self.device)


def diverged(what: str, rate: float) -> UsageError:
    """Return the error of a training whose numbers are no longer finite.

    Args:
        what: Where that was seen.
        rate: Learning rate there.
    """
    return UsageError(
        f"{what}, learning rate {rate:.2g}: training diverged.",
        hint="Lower --lr, or add --clip-grad 1; with --amp fp16 try bf16 or none.",
    )


def _accelerator(setting: Setting) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    processes.start(setting.device)
    # One process may train several times, with another type each time.
    AcceleratorState._reset_state()
    PartialState._reset_state()
    precision: Literal["no", "bf16", "fp16"] = "no" if setting.amp == "none" else setting.amp
    # Statistics are averaged after every step, not overwritten by those of the first process.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=precision,
        kwargs_handlers=[handler],
        cpu=setting.device.type == "cpu",
        log_with=None if setting.tracker == "none" else setting.tracker,
        project_dir=setting.log_dir,
    )
