"""Options of training the backbone's units."""

from dataclasses import dataclass
from typing import Literal

from tlcli.config.fields import Options, option

Scenario = Literal["feature-extraction", "freeze", "full", "scratch"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How the backbone's trained units are trained (scenarios freeze, full and scratch).

    A default of None is filled in by training/recipe.py from the scenario and the size of the data.
    """

    head_init: Literal["auto", "probe", "random"] = option(
        "auto",
        "probe starts from the linear head that is best on the frozen features (LP-FT), random does not; "
        "auto is probe where weights are pretrained.",
    )
    publish: Literal["auto", "trained"] = option(
        "auto",
        "auto publishes the trained network or the linear probe it started from, whichever names more of "
        "val's images rightly; trained insists on the trained one.",
    )
    select_fraction: float | None = option(
        None,
        "Share of the training images held out to choose what is published, so that val stays untouched; "
        "0.2 without val, otherwise val chooses.",
        metavar="SHARE",
        minimum=0.01,
        maximum=0.5,
    )
    opt: str = option(
        "adamw",
        "Optimiser, by timm's name: sgd, momentum, rmsprop, adagrad, adam, adamw, lion, ... "
        "sgd wants a learning rate some 10 to 100 times larger.",
        metavar="NAME",
    )
    momentum: float = option(
        0.9,
        "Momentum of sgd and rmsprop; sgd's is Nesterov's, momentum's is not.",
        minimum=0.0,
        maximum=0.999,
    )
    weight_decay: float | None = option(
        None,
        "Weight decay (decoupled in adamw; biases and norms are spared); raise it when overfitting.",
        minimum=0.0,
    )
    l2_sp: float = option(
        0.0,
        "Pull of the trained units towards their pretrained weights (L2-SP); try 0.01 on very small data.",
        minimum=0.0,
    )
    layer_decay: float | None = option(
        None,
        "Factor of the learning rate from each unit to the one before it; 1 treats all alike, lower keeps "
        "early units closer to what they were.",
        minimum=0.01,
        maximum=1.0,
    )
    sched: Literal["cosine", "constant", "step", "exponential", "plateau", "one-cycle"] = option(
        "cosine", "Schedule of the learning rate; plateau follows val, so that val then also selects."
    )
    warmup_epochs: float | None = option(
        None,
        "Epochs in which the rate rises to its full value; raise it when the loss jumps at the start.",
        minimum=0.0,
    )
    decay_epochs: float | None = option(
        None,
        "Epochs between decays of step (a third of all unless given), patience of plateau (2).",
        minimum=0.01,
    )
    decay_rate: float = option(
        0.1,
        "Factor of step's and plateau's decays, and of exponential over the whole training.",
        minimum=1e-6,
        maximum=1.0,
    )
    clip_grad: float | None = option(
        None, "Clip gradients at X; try 1 when the loss jumps.", metavar="X", minimum=0.0
    )
    clip_mode: Literal["norm", "value"] = option(
        "norm", "norm scales the whole gradient down to X, value cuts each number at X."
    )
    ema: float = option(
        0.0,
        "Decay of an average of the weights that is used in the end; try 0.998 on long training.",
        minimum=0.0,
        maximum=0.99999,
    )
    mixup: float = option(
        0.0, "Mixup alpha; 0.2 is usual. For long training on data that it learns by heart.", minimum=0.0
    )
    cutmix: float = option(0.0, "CutMix alpha; 1 is usual. As mixup, for larger images.", minimum=0.0)
    sampling: Literal["shuffle", "balanced"] = option(
        "shuffle", "balanced draws every class equally often; try it when rare classes matter most."
    )
    drop_path: float = option(
        0.0,
        "Drop-path rate (stochastic depth); try 0.1 for transformers and deep networks.",
        minimum=0.0,
        maximum=0.9,
    )
    norm: Literal["auto", "frozen", "train"] = option(
        "auto",
        "BatchNorm statistics of trained units: frozen keeps the pretrained ones, train follows the data; "
        "auto goes by batch and data. Frozen units' never move.",
    )
    aux_weight: float = option(
        0.3, "Weight of the side branches' loss, for networks that have them (GoogLeNet).", minimum=0.0
    )
    grad_accum: int = option(
        1,
        "Divide each batch into N passes; raise it when memory runs out.",
        metavar="N",
        minimum=1,
        maximum=1_000_000,
    )
    amp: Literal["auto", "none", "bf16", "fp16"] = option(
        "auto", "Compute type of training; auto is bf16 where the processor is fast at it."
    )
    checkpoint_minutes: float = option(
        5.0, "Minutes between checkpoints, beside the one after each epoch.", minimum=0.0
    )
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = option(
        "none", "Also log to a tracker (extra tlcli[trackers]); tensorboard writes into the run directory."
    )
