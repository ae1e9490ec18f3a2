"""The training loop, on Hugging Face accelerate: over cached rows or images, in one process or several.

A step's randomness is a function of (seed, step) and the order of samples one of (seed, epoch), so a
checkpoint holds weights, optimiser state and counters, and a resumed training is bit-identical on a CPU.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlcli.errors import BackboneError, Interrupted, UsageError
from tlcli.machine import interrupts, processes
from tlcli.machine.memory import is_out_of_memory
from tlcli.progress import Progress, Silent
from tlcli.training.checkpoints import Checkpoint, Checkpoints
from tlcli.training.inputs import PLAIN, Inputs, generator, loading, random_seed
from tlcli.training.mixing import mix
from tlcli.training.network import Network, fp32_where_bf16_is_slow, holding
from tlcli.training.optimizer import Average, Penalties, make_optimizer, parameter_groups, set_rate
from tlcli.training.optimizer_state import load_optimizer_state, optimizer_state
from tlcli.training.recipe import Recipe
from tlcli.training.schedule import Plateau, rate_factor

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 64
FRESH_SECONDS = 20.0  # an epoch's end is saved when the last checkpoint is older than this
READ_STEPS = {"cuda": 16}  # between two looks at losses: a GPU is not waited for in every step
RANGE_TEST_STEPS = 80
RANGE_TEST_RATES = (1e-6, 1.0)
RANGE_TEST_DIVISOR = 10  # the rate of the smallest loss is too large already (Smith 2017)
# Of a resumed recipe: a range test's result is in the checkpoint, and words do not change a training.
ALLOWED_TO_DIFFER = ("lr", "norm_reason")


@dataclass(frozen=True)
class Samples:
    """What is trained or measured on.

    Attributes:
        source: Gives the network's inputs.
        labels: int64 [N] on the CPU.
    """

    source: Inputs
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how training runs; nothing here changes what comes out, but for `amp` and `device`.

    Attributes:
        device: Where the network is trained.
        amp: Compute type under automatic mixed precision.
        workers: Threads that load.
        unit_of: Backbone parameter name -> unit, from 1.
        num_units: Units of the backbone.
        checkpoints: Where states go; None saves none.
        checkpoint_seconds: Between two of them, beside those at the end of an epoch.
        progress: Told of every image.
        on_epoch: Called by the first process with one dict an epoch, all of them so far.
        tracker: Name of one of accelerate's trackers, or none.
        log_dir: Where a tracker may write.
    """

    device: torch.device
    amp: Literal["none", "bf16", "fp16"] = "none"
    workers: int = 1
    unit_of: dict[str, int] = field(default_factory=dict)
    num_units: int = 0
    checkpoints: Checkpoints | None = None
    checkpoint_seconds: float = 300.0
    progress: Progress = field(default_factory=Silent)
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda _history: None
    tracker: str = "none"
    log_dir: Path | None = None


@dataclass(frozen=True)
class Trained:
    """What training gave, beside the network, which holds the final weights.

    Attributes:
        history: One dict an epoch, as in metrics.jsonl.
        steps: Optimiser steps.
        lr: Peak learning rate.
        best_epoch: The epoch whose weights were kept because val was best; None when the last one's were.
        seconds: Wall time, of this process alone when resumed.
    """

    history: list[dict[str, Any]]
    steps: int
    lr: float
    best_epoch: int | None
    seconds: float


def train(network: Network, recipe: Recipe, data: Samples, val: Samples | None, setting: Setting) -> Trained:
    """Train a network in place; it ends on the CPU, in eval mode.

    Args:
        network: Rows to logits.
        recipe: How.
        data: Training samples.
        val: Measured after every epoch; needed where the recipe selects on it.
        setting: Where.

    Raises:
        UsageError: An optimiser is not there, the loss is not finite, or a checkpoint is of another recipe.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    started = time.perf_counter()
    loop = _Loop(network, recipe, data, val, setting)
    try:
        eased = setting.device.type == "cpu" and setting.amp == "bf16"
        with interrupts.deferred() as asked, fp32_where_bf16_is_slow(network) if eased else nullcontext():
            loop.run(asked)
    finally:
        loop.close()
    return Trained(
        loop.history, loop.step, loop.lr, loop.best_epoch if recipe.patience else None,
        time.perf_counter() - started,
    )  # fmt: skip


def network_logits(network: nn.Module, source: Inputs, *, workers: int) -> Tensor:
    """Return what a network in eval mode gives for each sample's plain view, fp32 [N, C] on the CPU."""
    network.eval()
    mine = list(range(processes.rank(), len(source), processes.world_size()))
    batches = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
    parts = []
    with torch.no_grad(), loading(source, batches, PLAIN, workers=workers) as stream:
        parts = [network(_packed(source.finish(loaded))).float().cpu() for loaded in stream]
    found = torch.cat(parts) if parts else torch.empty(0)
    if processes.world_size() == 1:
        return found
    shares = processes.gather_objects(found)
    width = next(share.shape[1] for share in shares if len(share))
    result = torch.empty(len(source), width)
    for rank, share in enumerate(shares):
        result[rank :: processes.world_size()] = share
    return result


def _packed(inputs: Tensor) -> Tensor:
    """Return maps in channels-last memory, which convolutions are fastest on."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def _accelerator(setting: Setting) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    processes.start(setting.device)
    # One process may train several times, with another type each time.
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return Accelerator(
        mixed_precision={"none": "no"}.get(setting.amp, setting.amp),
        cpu=setting.device.type == "cpu",
        log_with=None if setting.tracker == "none" else setting.tracker,
        project_dir=setting.log_dir,
    )


class _Loop:
    """The state of a training between two steps."""

    def __init__(
        self, network: Network, recipe: Recipe, data: Samples, val: Samples | None, setting: Setting
    ) -> None:
        self.network, self.recipe, self.data, self.val, self.setting = network, recipe, data, val, setting
        self.device = setting.device
        self.rank, self.world = processes.rank(), processes.world_size()
        self.num_classes = network.num_classes
        self.batch_size = min(recipe.batch_size, len(data.labels))
        self.steps_per_epoch = max(1, len(data.labels) // self.batch_size)
        self.class_weights = self._class_weights()
        self.step, self.epoch, self.lr = 0, 0, recipe.lr or 0.0
        self.history: list[dict[str, Any]] = []
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, samples of the epoch under way
        # What the last steps gave and is not in `sums` yet: step, rate, loss, correct, samples.
        self.unread: list[tuple[int, float, Tensor, Tensor, int]] = []
        self.read_steps = READ_STEPS.get(self.device.type, 1)
        self.plateau, self.best_epoch, self.best_loss = Plateau(), 0, math.inf
        self.best: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self._prepare()

    def _prepare(self) -> None:
        recipe, setting = self.recipe, self.setting
        self.accelerator = _accelerator(setting)
        self.network.to(self.device).to(memory_format=torch.channels_last)
        names = self.network.backbone_names()
        units = {name: setting.unit_of.get(own, setting.num_units) for name, own in names.items()}
        groups = parameter_groups(self.network, units, setting.num_units, recipe)
        trained = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        start = {}
        if recipe.l2_sp:
            start = {name: value.detach().clone() for name, value in trained.items() if name in units}
        self.penalties = Penalties(recipe, trained, start)
        self.optimizer = make_optimizer(groups, recipe)
        optimizer_state(self.optimizer)  # one whose state cannot be saved is refused now, not after an epoch
        self.model, self.stepper = self.accelerator.prepare(self.network, self.optimizer)
        self.average = Average(self.network, recipe.ema) if recipe.ema else None
        if setting.tracker != "none":
            values = {key: value for key, value in recipe.document().items() if value is not None}
            self.accelerator.init_trackers("tlcli", config=values)

    def close(self) -> None:
        """Take the network back from accelerate, to the CPU and eval mode."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # What is marked as prepared would train without AMP the next time.
        for name in ("_is_accelerate_prepared", "forward"):
            vars(self.network).pop(name, None)
        self.network.to("cpu").eval()
        self.network.zero_grad(set_to_none=True)

    # ---- epochs -------------------------------------------------------------------------------------------

    def run(self, asked: Callable[[], int | None]) -> None:
        """Train from where the newest checkpoint was to the end."""
        recipe = self.recipe
        self._restore()
        if not self.lr:
            self.lr = self._range_test()
            logger.info("range test: learning rate %.2g", self.lr)
        total = recipe.epochs * self.steps_per_epoch * self.batch_size
        self.setting.progress.start("training", total)
        self.setting.progress.advance(self.step * self.batch_size)
        while self.epoch < recipe.epochs and not self._has_waited_enough():
            started = time.perf_counter()
            self._train_epoch(asked)
            self._end_epoch(time.perf_counter() - started)
            if time.monotonic() - self.saved_at >= min(FRESH_SECONDS, self.setting.checkpoint_seconds):
                self._save()
        self.setting.progress.finish()
        if self.average:
            self.network.load_state_dict(self.average.values)
        if recipe.patience and self.best:
            self.network.load_state_dict(self.best)

    def _train_epoch(self, asked: Callable[[], int | None]) -> None:
        recipe, source = self.recipe, self.data.source
        # The head comes from features under the pretrained statistics: those stay for its first epoch.
        self.network.train_norm = recipe.norm == "train" and (recipe.head_init != "probe" or self.epoch > 0)
        self.model.train()
        done = self.step - self.epoch * self.steps_per_epoch
        batches = self._batches(self.epoch)[done:]
        with loading(source, batches, self.epoch, workers=self.setting.workers) as stream:
            for batch, loaded in zip(batches, stream, strict=True):
                labels = self.data.labels[batch].to(self.device)
                self._step(_packed(source.finish(loaded)), labels, self.rate())
                self.step += 1
                self.setting.progress.advance(self.batch_size)
                if len(self.unread) >= self.read_steps:
                    self._read()
                    self.setting.progress.describe(self._running())
                self._attend(asked())
        self._read()

    def _running(self) -> str:
        loss, correct, count = self.sums.tolist()
        return f"epoch {self.epoch + 1}  loss {loss / count:.3f}  accuracy {correct / count:.3f}"

    def _attend(self, signal_number: int | None) -> None:
        """Save when it is time to, or when the process is asked to stop."""
        if self.world > 1:  # all stop at the same step, or those that go on wait for the others for ever
            found = [number for number in processes.gather_objects(signal_number) if number]
            signal_number = found[0] if found else None
        if signal_number is not None:
            self._save()
            raise Interrupted(signal_number)
        if time.monotonic() - self.saved_at >= self.setting.checkpoint_seconds:
            self._save()

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return this process's part of each batch: positions of samples, a function of (seed, epoch)."""
        draw = generator(self.recipe.seed, "order", epoch)
        count = len(self.data.labels)
        if self.recipe.sampling == "balanced":
            per_class = torch.bincount(self.data.labels, minlength=self.num_classes).clamp_min(1)
            weights = 1.0 / per_class[self.data.labels].double()
            order = torch.multinomial(weights, count, replacement=True, generator=draw)
        else:
            order = torch.randperm(count, generator=draw)
        size = self.batch_size
        return [
            order[step * size + self.rank : (step + 1) * size : self.world].tolist()
            for step in range(self.steps_per_epoch)
        ]

    def rate(self) -> float:
        """Return the learning rate of the present step."""
        return self.lr * self.plateau.factor * rate_factor(self.recipe, self.step, self.steps_per_epoch)

    def _end_epoch(self, seconds: float) -> None:
        """Measure, remember and report the epoch that has ended."""
        sums = self.sums.clone()
        if self.world > 1:
            sums = torch.stack(processes.gather_objects(sums)).sum(0)
        loss, correct, count = sums.tolist()
        row: dict[str, Any] = {
            "kind": "epoch", "epoch": self.epoch + 1, "step": self.step, "lr": self.rate(),
            "train_loss": loss / count, "train_accuracy": correct / count,
        }  # fmt: skip
        if self.val is not None:
            row |= self._measure(self.val)
        row["seconds"] = round(seconds, 3)
        self._select(row)
        self.history.append(row)
        self.sums.zero_()
        self.epoch += 1
        if self.rank == 0:
            self.setting.on_epoch(self.history)
            logger.info("%s", _summary(row, self.recipe.epochs))
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)

    def _measure(self, val: Samples) -> dict[str, float]:
        with holding(self.network, self.average.values) if self.average else nullcontext():
            logits = network_logits(self.network, val.source, workers=self.setting.workers)
        return {
            "val_log_loss": float(functional.cross_entropy(logits, val.labels)),
            "val_accuracy": float((logits.argmax(1) == val.labels).double().mean()),
        }

    def _select(self, row: dict[str, Any]) -> None:
        """Follow val where the recipe says so: the rate on a plateau, the best epoch's weights."""
        if not self.recipe.select_on_val:
            return
        loss = row.get("val_log_loss", row["train_loss"])
        self.plateau.update(loss, self.recipe)
        if self.recipe.patience and loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch + 1
            values = self.average.values if self.average else self.network.state_dict()
            self.best = {name: value.detach().clone() for name, value in values.items()}

    def _has_waited_enough(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.epoch - self.best_epoch >= patience

    # ---- a step -------------------------------------------------------------------------------------------

    def _step(self, inputs: Tensor, labels: Tensor, rate: float) -> None:
        """Do one optimiser step; what it gave waits in `unread`."""
        recipe = self.recipe
        torch.manual_seed(random_seed(recipe.seed, "step", self.step, self.rank))
        draw = generator(recipe.seed, "mix", self.step, self.rank)
        set_rate(self.optimizer, rate)
        targets = functional.one_hot(labels, self.num_classes).to(inputs.dtype)
        inputs, targets = mix(inputs, targets, recipe, draw)
        total = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        parts = list(zip(inputs.chunk(recipe.grad_accum), targets.chunk(recipe.grad_accum), strict=True))
        for index, (some, wanted) in enumerate(parts):
            whole = index == len(parts) - 1
            with nullcontext() if whole else self.accelerator.no_sync(self.model):
                outputs = self.model(some)
                logits, *branches = outputs if isinstance(outputs, tuple) else (outputs,)
                loss = self._loss(logits, wanted)
                total += loss.detach() * len(some) / len(inputs)
                correct += (logits.detach().argmax(1) == wanted.argmax(1)).sum()
                loss = loss + recipe.aux_weight * sum(self._loss(branch, wanted) for branch in branches)
                self.accelerator.backward(loss * len(some) / len(inputs))
        self._update()
        self.unread.append((self.step, rate, total, correct, len(inputs)))

    def _read(self) -> float:
        """Take in what the steps since the last reading gave; a GPU is waited for. Return the last loss.

        Raises:
            UsageError: A loss is not finite.
        """
        mean = 0.0
        unread, self.unread = self.unread, []
        for step, rate, loss, correct, count in unread:
            mean = float(loss)
            if not math.isfinite(mean):
                raise UsageError(
                    f"The loss is {mean} at step {step + 1}, learning rate {rate:.2g}: training diverged.",
                    hint="Lower --lr, or add --clip-grad 1; with --amp fp16 try bf16 or none.",
                )
            self.sums += torch.tensor([mean * count, int(correct), count], dtype=torch.float64)
        return mean

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits.float(), targets, weight=self.class_weights, label_smoothing=self.recipe.label_smoothing
        )

    def _update(self) -> None:
        recipe = self.recipe
        self.accelerator.unscale_gradients(self.stepper)
        self.penalties.add_gradients()
        if recipe.clip_grad:
            trained = list(self.penalties.trained.values())
            if recipe.clip_mode == "norm":
                self.accelerator.clip_grad_norm_(trained, recipe.clip_grad)
            else:
                self.accelerator.clip_grad_value_(trained, recipe.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()
        self.penalties.project(self.optimizer)
        if self.average:
            self.average.update(self.network)

    def _class_weights(self) -> Tensor | None:
        if self.recipe.class_weights != "balanced":
            return None
        counts = torch.bincount(self.data.labels, minlength=self.num_classes).float()
        present = int((counts > 0).sum())
        weights = torch.where(counts > 0, counts.sum() / (counts.clamp_min(1) * present), 1.0)
        return weights.to(self.device)

    # ---- range test ---------------------------------------------------------------------------------------

    def _range_test(self) -> float:
        """Return a learning rate: a tenth of that where the loss is smallest while the rate rises.

        Smith 2017, "Cyclical learning rates", section 3.3. Network and optimiser are put back.
        """
        network = {name: value.clone() for name, value in self.network.state_dict().items()}
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        low, high = RANGE_TEST_RATES
        losses: list[float] = []
        batches = [batch for epoch in range(RANGE_TEST_STEPS) for batch in self._batches(-1 - epoch)]
        batches = batches[:RANGE_TEST_STEPS]
        rates = [low * (high / low) ** (i / (RANGE_TEST_STEPS - 1)) for i in range(RANGE_TEST_STEPS)]
        self.network.train_norm = self.recipe.norm == "train" and self.recipe.head_init != "probe"
        self.model.train()
        smooth = 0.0
        with loading(self.data.source, batches, 0, workers=self.setting.workers) as stream:
            for index, (rate, batch, loaded) in enumerate(zip(rates, batches, stream, strict=True)):
                labels = self.data.labels[batch].to(self.device)
                try:
                    self._step(_packed(self.data.source.finish(loaded)), labels, rate)
                    loss = self._read()
                except UsageError:
                    loss = math.inf
                if self.world > 1:
                    loss = sum(processes.gather_objects(loss)) / self.world
                smooth = 0.9 * smooth + 0.1 * loss
                losses.append(smooth / (1 - 0.9 ** (index + 1)))
                if not math.isfinite(loss) or losses[-1] > 4 * min(losses):
                    break
        self.network.load_state_dict(network)
        self.optimizer.load_state_dict(optimizer)
        self.sums.zero_()
        best = min(range(len(losses)), key=lambda index: losses[index])
        return float(rates[best]) / RANGE_TEST_DIVISOR

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        self._read()  # a training that has diverged is not saved
        if self.setting.checkpoints is None or self.rank:
            return
        state, about = optimizer_state(self.optimizer)
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
        scaler = self.accelerator.scaler
        facts = {
            "recipe": {**self.recipe.document(), "num_train": len(self.data.labels)},
            "step": self.step, "epoch": self.epoch, "lr": self.lr, "history": self.history,
            "sums": self.sums.tolist(),
            "best_epoch": self.best_epoch, "best_loss": self.best_loss,
            "plateau": vars(self.plateau),
            "average_steps": self.average.steps if self.average else 0,
            "optimizer": about,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }  # fmt: skip
        self.setting.checkpoints.save(self.step, tensors, facts)

    def _restore(self) -> None:
        """Continue from the newest intact checkpoint, where there is one."""
        found = self.setting.checkpoints.newest() if self.setting.checkpoints else None
        if found is None:
            return
        try:
            self._take(found)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise BackboneError(
                f"Checkpoint {str(found.path)!r} is no state of this training: {error!r}.",
                hint=f"It was not written by tlcli; remove {found.path} to continue from an earlier one.",
            ) from error
        logger.info("resumed at step %d, epoch %d of %d", self.step, self.epoch + 1, self.recipe.epochs)

    def _take(self, found: Checkpoint) -> None:
        facts = found.facts
        mine = {**self.recipe.document(), "num_train": len(self.data.labels)}
        different = [
            name for name, value in mine.items()
            if name not in ALLOWED_TO_DIFFER and facts["recipe"].get(name) != value
        ]  # fmt: skip
        if different:
            name = different[0]
            raise UsageError(
                f"The checkpoint is of another training: {name} was {facts['recipe'].get(name)!r}, now "
                f"{mine[name]!r}.",
                hint="Resume with the options the run was started with.",
            )
        self.network.load_state_dict(_part(found, "network."))
        load_optimizer_state(self.optimizer, _part(found, "optimizer."), facts["optimizer"])
        self.best = {name: value.to(self.device) for name, value in _part(found, "best.").items()}
        if self.average:
            for name, value in _part(found, "average.").items():
                self.average.values[name].copy_(value)
            self.average.steps = facts["average_steps"]
        self.step, self.epoch, self.lr = int(facts["step"]), int(facts["epoch"]), float(facts["lr"])
        self.history, self.sums = facts["history"], torch.tensor(facts["sums"], dtype=torch.float64)
        self.best_epoch, self.best_loss = facts["best_epoch"], facts["best_loss"]
        self.plateau = Plateau(**facts["plateau"])
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])


def _part(found: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)
    }


def _summary(row: dict[str, Any], epochs: int) -> str:
    text = (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  accuracy {row['train_accuracy']:.3f}"
    )
    if "val_accuracy" in row:
        text += f", val {row['val_accuracy']:.3f}"
    return text + f" ({row['seconds']:.1f} s)"
