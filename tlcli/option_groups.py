"""The groups of options that commands share: each option's default, help and range, written once, here.

config.py puts the groups together, one configuration a command. Checks that need no data happen in
`__post_init__` and raise UsageError. No torch here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tlcli.errors import UsageError

Device = str
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CacheMode = Literal["auto", "always", "never", "verify"]
Split = Literal["train", "val", "test"]
SCALINGS = ("plain", "standardised", "l2-normalised")


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    envvar: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Return a dataclass field that is a `--flag`, with what its help says and its range (inclusive)."""
    return field(
        default=default,
        metadata={
            "help": help,
            "flags": flags,
            "metavar": metavar,
            "envvar": envvar,
            "minimum": minimum,
            "maximum": maximum,
        },
    )


def argument(default: Any, help: str, metavar: str) -> Any:
    """Return a dataclass field that is a positional argument."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "argument": True})


def same(group: type, name: str) -> Any:
    """Return the field `name` of an option group, to be used in another configuration."""
    base = group.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=base.default, metadata=base.metadata)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The evaluation transform of a backbone, every value resolved; part of the cache key.

    Attributes:
        image_size: Height and width given to the network, in pixels.
        crop_pct: Share of the resized image the centre crop keeps, in (0, 1].
        crop_mode: "center" resizes the shorter side, then crops; "squash" resizes both sides; "border"
            fits the longer side and pads with the mean.
        interpolation: How the resize interpolates (always antialiased).
        mean: Per-channel mean subtracted from values in [0, 1], in RGB order.
        std: Per-channel divisor, in RGB order.
    """

    image_size: tuple[int, int]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


# ---- groups of options, shared by commands ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images are and how they are split."""

    data: str | None = argument(
        None, "Folder of images (a folder a class, or train/val/test above them), or a CSV/TSV file.", "DATA"
    )
    filename_column: str = option("filename", "CSV column that holds the path, relative to the CSV file.")
    label_column: str = option("label", "CSV column that holds the class.")
    split_column: str = option("split", "CSV column that holds train, val or test; may be absent.")
    group_column: str = option("group", "CSV column of groups that must not be divided by a split.")
    val_fraction: float = option(
        0.2,
        "Share of the training images held out as val when no val split is given.",
        minimum=0.01,
        maximum=0.9,
    )
    split_seed: int = option(0, "Changes which images the content hash sends to val.", minimum=0)
    limit_per_class: int | None = option(
        None,
        "Use at most N training images of each class (lowest content hash first): few-shot.",
        metavar="N",
        minimum=1,
    )
    max_bad: float = option(
        0.01, "Share of unreadable images above which the run stops.", minimum=0.0, maximum=1.0
    )
    allow_outside_root: bool = option(False, "Let a CSV or a link name files outside the data folder.")


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which pretrained network, and how images are prepared for it."""

    backbone: str | None = option(
        None,
        "timm name (resnet50.a1_in1k), torchvision/NAME, classic/NAME, hf-hub:ORG/NAME, local-dir:PATH or "
        "bundled.",
        metavar="B",
    )
    weights: str | None = option(
        None, "Weights for the named architecture: a .safetensors, .pth or .pt file.", metavar="FILE"
    )
    random_init: bool = option(False, "Leave the weights random (a baseline; no hub is asked).")
    model_kwargs: str | None = option(
        None,
        "Arguments of the network: norm=every,activation=tanh for classic/lenet5, or what timm's own takes.",
        metavar="KEY=VALUE,...",
    )
    image_size: int | None = option(
        None,
        "Side of the square image given to the backbone, in pixels; its own size unless given.",
        minimum=8,
        maximum=4096,
    )
    crop_pct: float | None = option(
        None,
        "Share of the resized image the centre crop keeps; the backbone's own unless given.",
        minimum=0.1,
        maximum=1.0,
    )
    interpolation: Interpolation | None = option(
        None, "How images are resized; the backbone's own unless given."
    )


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How features are computed and cached."""

    freeze: str | None = option(
        None, "Freeze units 1..K, `all` or `none`; see `tlcli backbones show`.", metavar="K|all|none"
    )
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Compute type of the frozen prefix; auto is bf16 where the processor is fast at it."
    )
    cache_dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Type of the stored rows; auto is fp32 for pooled vectors, bf16 for activation maps."
    )
    cache: CacheMode = option(
        "auto", "Use the feature cache; never bypasses it, verify recomputes everything and compares."
    )
    cache_max_size: str = option(
        "200GB",
        "Refuse work that would grow the cache beyond this, before it begins; lower it on a shared disk, "
        "raise it for many views of large maps.",
        metavar="SIZE",
    )
    device: Device = option(
        "auto", "auto, cpu, cuda, cuda:0 or mps.", envvar="TLCLI_DEVICE", metavar="DEVICE"
    )
    workers: int | None = option(
        None,
        "Threads that decode images; one per core, at most 16, unless given.",
        flags=("-j", "--workers"),
        envvar="TLCLI_WORKERS",
        minimum=1,
        maximum=256,
    )


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The classifier trained on the features."""

    head: str = option(
        "linear", "linear (a grid of 48, solved exactly) or mlp:H1,H2,... (hidden sizes).", metavar="HEAD"
    )
    folds: int = option(5, "Cross-validation folds inside train that choose the head.", minimum=2, maximum=20)
    class_weights: Literal["none", "balanced"] = option(
        "none", "balanced weighs classes by inverse frequency; try it when rare classes matter most."
    )
    label_smoothing: float | None = option(
        None,
        "Share of the target spread over all classes: 0.1 when units of the backbone are trained, 0 for "
        "heads alone, unless given; raise it on noisy labels.",
        minimum=0.0,
        maximum=0.9,
    )
    l2: str = option(
        "auto", "Comma-separated l2 penalties of the grid; auto spans the useful range.", metavar="GRID"
    )
    scaling: str = option(
        ",".join(SCALINGS),
        "Comma-separated scalings of the features that linear heads are tried with.",
        metavar="NAMES",
    )
    seed: int = option(0, "Seed of folds, initialisation and order.", minimum=0)
    refit: bool = option(
        False, "After choosing a head, train it on train+val; val then no longer measures anything."
    )
    activation: Literal["elu", "relu", "leaky-relu", "gelu", "tanh", "sigmoid"] = option(
        "elu", "Activation between an MLP head's layers."
    )
    init: Literal["he", "xavier", "normal"] = option(
        "he",
        "Initialisation of an MLP head and of --scenario scratch; xavier suits tanh and sigmoid, normal is "
        "N(0, 1), for showing why the others exist.",
    )
    batch_norm: bool = option(False, "Batch normalisation after each hidden layer of an MLP head.")
    dropout: str | None = option(
        None,
        "Dropout rate before the classifier; a comma-separated grid for an MLP head on frozen features. "
        "Raise it when train accuracy runs away from val.",
        metavar="RATE|GRID",
    )
    lr: str | None = option(
        None,
        "Learning rate, or auto for a range test; a comma-separated grid for an MLP head on frozen features. "
        "Lower it when the loss jumps.",
        metavar="RATE|auto|GRID",
    )
    l1: float = option(
        0.0, "l1 penalty; makes weights exactly zero. Try 1e-5 where a sparse network is wanted.", minimum=0.0
    )
    max_norm: float = option(
        0.0,
        "Largest l2 norm of a unit's incoming weights; 0 is off, 3 to 4 is usual with high dropout.",
        minimum=0.0,
    )
    epochs: int | None = option(
        None,
        "Epochs (for an MLP head on frozen features the most it may take); by data-set size unless given. "
        "Raise it when the loss still falls at the end.",
        minimum=1,
        maximum=100_000,
    )
    patience: int | None = option(
        None,
        "Stop after N epochs without improvement on val and keep the best weights (an MLP head on frozen "
        "features: 10, inside train); never unless given. Val then also selects.",
        metavar="N",
        minimum=1,
    )
    batch_size: int | None = option(
        None,
        "Training batch over all processes; by data-set size unless given. Lower it when memory runs out.",
        flags=("-b", "--batch-size"),
        metavar="N",
        minimum=1,
        maximum=1_000_000,
    )

    def hidden_sizes(self) -> tuple[int, ...]:
        """Return the hidden sizes of an MLP head, or () for a linear one.

        Raises:
            UsageError: `head` is neither `linear` nor `mlp:` with positive whole numbers.
        """
        if self.head == "linear":
            return ()
        kind, _, sizes = self.head.partition(":")
        try:
            hidden = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            hidden = ()
        if kind != "mlp" or not hidden or min(hidden) < 1 or max(hidden) > 65_536:
            raise UsageError(
                f"--head {self.head!r} is not a head.", hint="Expected linear, or mlp:512 or mlp:1024,256."
            )
        return hidden

    def __post_init__(self) -> None:
        """Refuse a head or a grid that cannot be read."""
        self.hidden_sizes()
        self.tried_scalings()
        if self.l2 != "auto":
            grid(self.l2, "--l2", minimum=0.0)
        if self.dropout is not None:
            grid(self.dropout, "--dropout", minimum=0.0, maximum=0.95)
        if self.lr is not None and self.lr != "auto":
            grid(self.lr, "--lr", minimum=1e-8, maximum=10.0)

    def tried_scalings(self) -> tuple[str, ...]:
        """Return the scalings that linear heads are tried with.

        Raises:
            UsageError: One of them does not exist.
        """
        names = tuple(dict.fromkeys(name.strip() for name in self.scaling.split(",")))
        unknown = [name for name in names if name not in SCALINGS]
        if unknown:
            raise UsageError(
                f"--scaling {self.scaling!r}: {unknown[0]!r} is no scaling.",
                hint=f"Expected one or more of {', '.join(SCALINGS)}.",
            )
        return names

    def mlp_grid(self) -> "MlpGrid":
        """Return what an MLP head on frozen features is trained with, defaults filled in.

        Raises:
            UsageError: The learning rate is `auto`, which a grid cannot be.
        """
        if self.lr == "auto":
            raise UsageError(
                "--lr auto is for training the backbone; an MLP head on frozen features tries a grid.",
                hint="Leave --lr out, or write a grid such as --lr 0.0003,0.001.",
            )
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(MlpGrid)}
        return MlpGrid(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class MlpGrid:
    """Defaults of an MLP head on frozen features; fields as in HeadOptions."""

    dropout: str = "0,0.5"
    lr: str = "0.0003,0.001,0.003"
    epochs: int = 100
    patience: int = 10
    batch_size: int = 256


Augment = Literal["auto", "none", "light", "medium", "strong", "randaugment", "trivialaugment"]


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """How training images are varied. A preset sets every value; an option given beside it wins."""

    augment: Augment = option(
        "auto",
        "Preset: none, light (crop), medium (crop, mirror, rotation, light), strong (RandAugment, erasing), "
        "randaugment, trivialaugment; auto goes by data-set size. More when train accuracy runs away from "
        "val; see `tlcli data preview`.",
    )
    views: int | None = option(
        None,
        "Versions of each image in the cache: the plain one and V - 1 augmented ones; an epoch draws one per "
        "image. 4 unless given, 1 without augmentation and in extract. More when the network overfits.",
        metavar="V",
        minimum=1,
        maximum=1000,
    )
    view_seed: int = option(
        0, "Seed of the augmented views, so that runs of several --seed share them.", minimum=0
    )
    mirror: float | None = option(
        None, "Probability of a left-right mirror; 0 for letters, digits and signs.", minimum=0.0, maximum=1.0
    )
    crop_scale: float | None = option(
        None,
        "Smallest random crop, in share of the area that evaluation shows, 1 is off; lower when objects "
        "differ in size.",
        minimum=0.05,
        maximum=1.0,
    )
    rotate: float | None = option(
        None,
        "Largest rotation in degrees; 180 where there is no up, as in micrographs.",
        minimum=0.0,
        maximum=180.0,
    )
    shear: float | None = option(
        None, "Largest shear in degrees; try 10 for handwriting.", minimum=0.0, maximum=60.0
    )
    warp: float | None = option(
        None,
        "Local elastic warp: standard deviation of the shift, in share of the image side; try 0.02 for "
        "handwriting and tissue.",
        minimum=0.0,
        maximum=0.2,
    )
    brightness: float | None = option(
        None, "Largest relative change of brightness; try 0.2 when lighting varies.", minimum=0.0, maximum=1.0
    )
    contrast: float | None = option(
        None, "Largest relative change of contrast; try 0.2 when cameras vary.", minimum=0.0, maximum=1.0
    )
    saturation: float | None = option(
        None,
        "Largest relative change of saturation; 0 where colour decides the class.",
        minimum=0.0,
        maximum=1.0,
    )
    hue: float | None = option(
        None,
        "Largest shift of hue in turns of the colour wheel; try 0.02 when white balance varies.",
        minimum=0.0,
        maximum=0.5,
    )
    pca_color: float | None = option(
        None,
        "Standard deviation of AlexNet's colour shift along the principal components of ImageNet's "
        "colours; 0.1 there.",
        minimum=0.0,
        maximum=1.0,
    )
    erase: float | None = option(
        None,
        "Probability of erasing a random rectangle; try 0.25 when objects are often covered.",
        minimum=0.0,
        maximum=1.0,
    )
    magnitude: int | None = option(
        None, "Strength of RandAugment, 0 to 30; 9 is usual, 0 is off.", minimum=0, maximum=30
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the backbone's trained units are trained (scenarios freeze, full and scratch).

    A default of None is filled in by recipe.py from the scenario and the size of the data.
    """

    head_init: Literal["auto", "probe", "random"] = option(
        "auto",
        "probe starts from the linear head that is best on the frozen features (LP-FT), random does not; "
        "auto is probe where weights are pretrained.",
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


def grid(text: str, name: str, *, minimum: float, maximum: float = 1e9) -> tuple[float, ...]:
    """Return the numbers of a comma-separated grid, in order.

    Raises:
        UsageError: A value is not a number in [minimum, maximum].
    """
    values = []
    for part in str(text).split(","):
        try:
            value = float(part)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise UsageError(
                f"{name} {text!r}: {part.strip()!r} is not a number from {minimum:g} to {maximum:g}.",
                hint=f"Write numbers with commas between, as in {name} 0.001,0.01.",
            )
        values.append(value)
    return tuple(values)
