"""How a backbone is trained, every value resolved: from the options, the scenario and the size of the data.

What the user gives is taken; the rest follows from a few rules, written here and nowhere else. They start
from BiT's (Kolesnikov et al. 2020: schedule length by data-set size, nothing to tune) and are measured on
small sets with a MobileNetV2, see BENCHMARKS.md.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from tlcli.config.commands import FinetuneConfig
from tlcli.config.training import Scenario, TrainingOptions
from tlcli.errors import UsageError
from tlcli.wording import counted

# Optimiser steps that a default training takes, by scenario, and the epochs it stays within.
STEPS = {"freeze": 400, "full": 400, "scratch": 4_000}
EPOCHS = {"freeze": (8, 30), "full": (8, 30), "scratch": (30, 120)}
ADAPTIVE_LR = {"freeze": 2e-3, "full": 1e-3, "scratch": 2e-3}  # at a batch of 32, grows with its square root
SGD_LR = {"freeze": 0.02, "full": 0.01, "scratch": 0.1}  # at a batch of 32, grows with the batch
TRANSFORMER_FACTOR = 0.1  # of the learning rate: networks without batch norm diverge at a CNN's rate
LAYER_DECAY = {"freeze": 0.95, "full": 0.9, "scratch": 1.0}
WEIGHT_DECAY = {"freeze": 0.02, "full": 0.02, "scratch": 0.05}
WARMUP_SHARE = 0.2  # of all epochs, at most WARMUP_EPOCHS
WARMUP_EPOCHS = 5.0
WARMUP_STEPS = 20
LABEL_SMOOTHING = 0.1
NORM_MIN_BATCH = 16  # images a process: fewer make the statistics of a batch too noisy
NORM_MIN_IMAGES = 5_000
NORM_MIN_STEPS = 300
FULL_RATE_STEPS = {"freeze": 100, "full": 50}  # fewer take a part of the rate, see rate_by_steps
LARGE = 20_000  # images, BiT's border between small and medium


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved training. Fields without a word are those of TrainingOptions and HeadOptions.

    Attributes:
        scenario: freeze, full or scratch.
        lr: Peak learning rate, or None: found by short trainings before the whole one.
        usual_lr: The rule's rate for a training of many steps, where the search for a rate begins.
        norm: Whether BatchNorm of trained units follows the data.
        norm_reason: Why.
        head_init: Training starts from the linear probe (LP-FT), a random head, or the run that goes on.
        select_on_val: Whether an epoch or a rate is chosen by looking at val.
    """

    scenario: Scenario
    epochs: int
    batch_size: int
    grad_accum: int
    lr: float | None
    usual_lr: float
    opt: str
    momentum: float
    weight_decay: float
    l1: float
    l2: float
    l2_sp: float
    max_norm: float
    layer_decay: float
    sched: Literal["cosine", "constant", "step", "exponential", "plateau", "one-cycle"]
    warmup_epochs: float
    decay_epochs: float
    decay_rate: float
    clip_grad: float | None
    clip_mode: Literal["norm", "value"]
    ema: float
    mixup: float
    cutmix: float
    label_smoothing: float
    class_weights: Literal["none", "balanced"]
    sampling: Literal["shuffle", "balanced"]
    dropout: float
    drop_path: float
    norm: Literal["frozen", "train"]
    norm_reason: str
    head_init: Literal["probe", "random", "run"]
    aux_weight: float
    patience: int | None
    seed: int

    @property
    def select_on_val(self) -> bool:
        """Return whether val decides anything, so that its score is no longer unbiased."""
        return self.patience is not None or self.sched == "plateau"

    @property
    def balanced(self) -> bool:
        """Return whether every class is to count the same, however many images it has."""
        return "balanced" in (self.class_weights, self.sampling)

    def document(self) -> dict[str, Any]:
        """Return every value, for run.json."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """Return the recipe in one line, for people."""
        rate = "learning rate by short trainings" if self.lr is None else f"learning rate {self.lr:.2g}"
        start = {
            "probe": "from the linear probe", "random": "from a random head", "run": "from the run's weights",
        }[self.head_init]  # fmt: skip
        parts = [
            f"{counted(self.epochs, 'epoch')} of batch {self.batch_size}, {self.opt}, {rate}, {self.sched}",
            f"layer decay {self.layer_decay:g}" if self.layer_decay < 1 else "",
            f"weight decay {self.weight_decay:g}",
            f"label smoothing {self.label_smoothing:g}" if self.label_smoothing else "",
            start,
        ]
        return ", ".join(part for part in parts if part)


def resolve(
    config: FinetuneConfig, *, num_train: int, has_batch_norm: bool, num_processes: int = 1
) -> Recipe:
    """Return the recipe for a data set.

    Args:
        config: With a scenario other than feature-extraction.
        num_train: Training images.
        has_batch_norm: Whether the trained units hold batch normalisation.
        num_processes: Over which each batch is divided.
    """
    scenario = config.resolved_scenario()
    batch = config.batch_size or _batch_size(num_train, num_processes)
    epochs = config.epochs or _epochs(scenario, num_train, batch)
    options = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(TrainingOptions)
        if item.name in Recipe.__dataclass_fields__
    }
    steps_per_epoch = max(1, num_train // batch)
    part = batch // (num_processes * config.grad_accum)  # images of a pass through the network
    norm, reason = _norm(config, scenario, epochs * steps_per_epoch, num_train, part)
    if norm == "train" and has_batch_norm and part < 2:
        raise UsageError(
            f"BatchNorm cannot follow the data in passes of one image: --batch-size {batch} is divided by "
            f"--grad-accum {config.grad_accum} and over {num_processes} processes.",
            hint="Use a larger --batch-size, a smaller --grad-accum, or --norm frozen.",
        )
    usual = _usual_rate(config, scenario, batch, has_batch_norm)
    smoothing = config.label_smoothing
    values: dict[str, Any] = {
        **options,
        "scenario": scenario,
        "epochs": epochs,
        "batch_size": batch,
        "lr": _learning_rate(config, usual, epochs * steps_per_epoch),
        "usual_lr": usual,
        "weight_decay": _or(config.weight_decay, WEIGHT_DECAY[scenario]),
        "l2": _only(config.l2_values) or 0.0,
        "l1": config.l1,
        "max_norm": config.max_norm,
        "layer_decay": _or(config.layer_decay, LAYER_DECAY[scenario]),
        "warmup_epochs": _or(config.warmup_epochs, _warmup(epochs, steps_per_epoch)),
        "decay_epochs": _or(config.decay_epochs, 2.0 if config.sched == "plateau" else epochs / 3),
        "label_smoothing": LABEL_SMOOTHING if smoothing is None else smoothing,
        "class_weights": config.class_weights,
        "dropout": _only(config.dropout_values) or 0.0,
        "norm": norm,
        "norm_reason": reason,
        "head_init": head_init(config),
        "patience": config.patience,
        "seed": config.seed,
    }
    return Recipe(**values)


def _batch_size(num_train: int, num_processes: int) -> int:
    """Return 32 for small sets, so that an epoch has enough steps; more for large ones."""
    batch = 32 if num_train < 5_000 else 64 if num_train < LARGE else 128
    return max(num_processes, min(batch, num_train))


def _epochs(scenario: Scenario, num_train: int, batch: int) -> int:
    fewest, most = EPOCHS[scenario]
    return max(fewest, min(most, math.ceil(STEPS[scenario] * batch / max(1, num_train))))


def _learning_rate(config: FinetuneConfig, usual: float, steps: int) -> float | None:
    if config.lr == "auto":
        return None
    if config.lr is not None:
        return _only(config.lr_values)
    return usual * rate_by_steps(steps, config.resolved_scenario(), head_init(config))


def rate_by_steps(steps: int, scenario: Scenario, start: str) -> float:
    """Return the share of the usual learning rate that suits a training of so many steps, in (0, 1].

    A network that starts from its probe first gets worse before it gets better, the more so the higher the
    rate. In few steps it does not come back: measured in examples/benchmarks/recipe.py.

    Args:
        steps: Optimiser steps.
        scenario: freeze, full or scratch.
        start: probe, or random: a random head has nothing to lose.
    """
    if start == "random" or scenario == "scratch":
        return 1.0
    return min(1.0, steps / FULL_RATE_STEPS[scenario])


def _usual_rate(config: FinetuneConfig, scenario: Scenario, batch: int, has_batch_norm: bool) -> float:
    """Return the rate of a training of many steps."""
    words = config.opt.lower()
    if words.startswith(("sgd", "momentum", "nesterov", "lars", "muon")):
        rate = SGD_LR[scenario] * batch / 32
    else:
        rate = ADAPTIVE_LR[scenario] * math.sqrt(batch / 32)
    if "lion" in words:
        rate /= 10  # its steps are as long as the rate, whatever the gradient (Chen et al. 2023)
    return rate if has_batch_norm else rate * TRANSFORMER_FACTOR


def _warmup(epochs: int, steps_per_epoch: int) -> float:
    """Return the epochs of warm-up; more of them where an epoch has few steps, or the first is rash."""
    return max(min(WARMUP_EPOCHS, WARMUP_SHARE * epochs), min(WARMUP_STEPS / steps_per_epoch, epochs / 2))


def _norm(
    config: FinetuneConfig, scenario: Scenario, steps: int, num_train: int, batch: int
) -> tuple[Literal["frozen", "train"], str]:
    if config.norm != "auto":
        return config.norm, "asked for"
    if scenario == "scratch":
        return "train", "there are no pretrained statistics"
    if batch < NORM_MIN_BATCH:
        return "frozen", f"batches of {batch} are too small for statistics of their own"
    if steps < NORM_MIN_STEPS:
        return "frozen", f"{steps} steps are too few for statistics of their own"
    if num_train < NORM_MIN_IMAGES:
        return "frozen", f"{num_train} training images are too few for statistics of their own"
    return "train", f"batches of {batch} from {num_train} images"


def head_init(config: FinetuneConfig) -> Literal["probe", "random"]:
    """Return where training starts: from the linear probe, or from a random head."""
    if config.head_init != "auto":
        return config.head_init
    return "random" if config.resolved_scenario() == "scratch" or config.random_init else "probe"


def _only(values: tuple[float, ...] | None) -> float | None:
    """Return the one value of an option that heads take as a grid; None where none is given."""
    return values[0] if values else None


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
