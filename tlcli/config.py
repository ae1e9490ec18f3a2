"""Every option of every command: its default, its help, its range. Written once, here.

A command takes one frozen dataclass, put together from the option groups below. cli/options.py turns the
fields into flags, `--config FILE.yaml` fills them by their long names, and a run stores them resolved in
config.yaml. Checks that need no data happen in `__post_init__` and raise UsageError. No torch here.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tlcli.errors import DataError, UsageError

T = TypeVar("T")
Device = str
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CacheMode = Literal["auto", "always", "never", "verify"]
Split = Literal["train", "val", "test"]


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
        "timm name (resnet50.a1_in1k), torchvision/NAME, hf-hub:ORG/NAME, local-dir:PATH or bundled.",
        metavar="B",
    )
    weights: str | None = option(
        None, "Weights for the named architecture: a .safetensors, .pth or .pt file.", metavar="FILE"
    )
    random_init: bool = option(False, "Leave the weights random (a baseline; no hub is asked).")
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
    label_smoothing: float = option(
        0.0, "Share of the target spread over all classes; try 0.1 on noisy labels.", minimum=0.0, maximum=0.9
    )
    l2: str = option(
        "auto", "Comma-separated l2 penalties of the grid; auto spans the useful range.", metavar="GRID"
    )
    seed: int = option(0, "Seed of folds, initialisation and order.", minimum=0)
    refit: bool = option(False, "After choosing, train on train+val; val then no longer measures anything.")
    activation: Literal["elu", "relu", "leaky-relu", "gelu", "tanh", "sigmoid"] = option(
        "elu", "Activation between an MLP head's layers."
    )
    init: Literal["he", "xavier"] = option(
        "he", "Initialisation of an MLP head; xavier suits tanh and sigmoid."
    )
    batch_norm: bool = option(False, "Batch normalisation after each hidden layer of an MLP head.")
    dropout: str = option("0,0.5", "Comma-separated dropout rates of an MLP head's grid.", metavar="GRID")
    lr: str = option(
        "0.0003,0.001,0.003", "Comma-separated learning rates of an MLP head's grid.", metavar="GRID"
    )
    l1: float = option(0.0, "l1 penalty on an MLP head's weights; makes them sparse.", minimum=0.0)
    max_norm: float = option(
        0.0,
        "Largest l2 norm of a hidden unit's incoming weights in an MLP head; 0 is off, 3 to 4 is usual.",
        minimum=0.0,
    )
    epochs: int = option(100, "Most epochs of an MLP head.", minimum=1, maximum=100_000)
    patience: int = option(10, "Epochs without improvement after which an MLP head stops.", minimum=1)
    batch_size: int = option(
        256, "Training batch of an MLP head.", flags=("-b", "--batch-size"), minimum=1, maximum=1_000_000
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
        if self.l2 != "auto":
            grid(self.l2, "--l2", minimum=0.0)
        grid(self.dropout, "--dropout", minimum=0.0, maximum=0.95)
        grid(self.lr, "--lr", minimum=1e-8, maximum=10.0)


# ---- one configuration a command --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(FeatureOptions, BackboneOptions, DataOptions):
    """`tlcli extract`."""

    output: str | None = option(
        None,
        "Also write the features, file names and labels: .safetensors, .npz or .csv.",
        flags=("-o", "--output"),
        metavar="FILE",
    )
    overwrite: bool = option(False, "Replace an existing output file.")

    def __post_init__(self) -> None:
        """Refuse an export format that does not exist."""
        if self.output and Path(self.output).suffix not in {".safetensors", ".npz", ".csv"}:
            raise UsageError(
                f"--output {self.output!r} has no known format.",
                hint="Expected a name that ends in .safetensors, .npz or .csv.",
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(HeadOptions, FeatureOptions, BackboneOptions, DataOptions):
    """`tlcli finetune`."""

    scenario: Literal["feature-extraction"] | None = option(
        None, "Which of the scenarios to apply; feature-extraction freezes the whole backbone."
    )
    output: str | None = option(
        None,
        "Run directory; runs/<data>-<backbone>-<scenario> unless given.",
        flags=("-o", "--output"),
        metavar="DIR",
    )
    overwrite: bool = option(False, "Replace an existing run directory.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`tlcli evaluate`."""

    run: str | None = argument(None, "Run directory that `tlcli finetune` wrote.", "RUN")
    data: str | None = argument(None, "Other data with the same classes; the run's own unless given.", "DATA")
    split: Split = option("val", "Which split to measure; DATA without splits is measured whole.")
    max_bad: float = same(DataOptions, "max_bad")
    allow_outside_root: bool = same(DataOptions, "allow_outside_root")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "Compute type; auto is the run's own.")
    cache: CacheMode = same(FeatureOptions, "cache")
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")
    min_accuracy: float | None = option(
        None, "Exit with 6 when top-1 accuracy is below X.", metavar="X", minimum=0.0, maximum=1.0
    )
    worst: int = option(10, "How many of the most confident mistakes to list.", minimum=0, maximum=1000)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """`tlcli predict`."""

    run: str | None = argument(None, "Run directory that `tlcli finetune` wrote.", "RUN")
    images: tuple[str, ...] = argument(
        (), "Image files, folders, or - for paths on standard input.", "IMAGES"
    )
    top: int = option(1, "Classes listed for each image.", metavar="K", minimum=1, maximum=1000)
    format: Literal["table", "csv", "jsonl"] = option("table", "How rows are written; csv and jsonl stream.")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "Compute type; auto is the run's own.")
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`tlcli report`."""

    run: str | None = argument(None, "Run directory that `tlcli finetune` wrote.", "RUN")
    output: str | None = option(
        None,
        "File to write; report.html in the run directory unless given.",
        flags=("-o", "--output"),
        metavar="FILE",
    )
    worst: int = option(24, "How many of the most confident mistakes to show.", minimum=0, maximum=200)


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """`tlcli recommend`."""

    size: Literal["small", "large"] | None = option(None, "Size of your data set.")
    similarity: Literal["low", "high"] | None = option(
        None, "How much your images are like the pretraining data (everyday photographs for ImageNet)."
    )
    backbone: str = option("resnet50.a1_in1k", "Backbone named in the printed command.", metavar="B")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`tlcli demo`."""

    output: str = option(
        "demo", "Folder for the demo's images and run.", flags=("-o", "--output"), metavar="DIR"
    )
    overwrite: bool = option(False, "Replace a demo folder that an earlier demo made.")
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(DataOptions):
    """`tlcli data check`."""

    workers: int | None = same(FeatureOptions, "workers")
    min_per_class: int = option(5, "Warn of a class with fewer training images.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class DataSplitConfig(DataOptions):
    """`tlcli data split`."""

    workers: int | None = same(FeatureOptions, "workers")
    output: str | None = option(
        None, "Also write the split as CSV (filename,label,split).", flags=("-o", "--output"), metavar="FILE"
    )
    overwrite: bool = option(False, "Replace an existing output file.")


@dataclass(frozen=True, kw_only=True)
class BackbonesListConfig:
    """`tlcli backbones list`."""

    pattern: str | None = argument(None, "Part of a name, or a glob such as 'resnet*'.", "PATTERN")
    cached: bool = option(False, "Only backbones whose weights are on this machine.")
    max_params: float | None = option(
        None, "Only backbones of at most M million parameters.", metavar="M", minimum=0.0
    )
    image_size: int | None = option(None, "Only backbones whose own image size is PIXELS.", metavar="PIXELS")
    sort: Literal["name", "params", "image-size"] = option("name", "Order of the list.")
    limit: int = option(50, "Longest list; 0 lists all.", metavar="N", minimum=0)


@dataclass(frozen=True, kw_only=True)
class BackbonesShowConfig:
    """`tlcli backbones show`."""

    backbone: str | None = argument(None, "Backbone, spelled as for --backbone.", "NAME")
    weights: str | None = same(BackboneOptions, "weights")
    random_init: bool = option(False, "Do not load weights: the table does not depend on them.")
    image_size: int | None = option(
        None, "Side of the square image, in pixels; the backbone's own unless given.", minimum=8, maximum=4096
    )


@dataclass(frozen=True, kw_only=True)
class CacheListConfig:
    """`tlcli cache list`."""


@dataclass(frozen=True, kw_only=True)
class CacheShowConfig:
    """`tlcli cache show`."""

    key: str | None = argument(None, "Entry key, or its unambiguous beginning.", "KEY")


@dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig:
    """`tlcli cache verify`."""

    key: str | None = argument(None, "Entry key, or its beginning; every entry unless given.", "KEY")
    deep: bool = option(False, "Also hash whole shards and compare with their names.")


@dataclass(frozen=True, kw_only=True)
class CachePruneConfig:
    """`tlcli cache prune`."""

    older_than: str | None = option(
        None, "Delete entries not used for this long: 30d, 12h, 45m.", metavar="AGE"
    )
    max_size: str | None = option(
        None,
        "Delete least recently used entries until the cache is at most this: 20GB, 500MB.",
        metavar="SIZE",
    )


# ---- reading and writing configurations -------------------------------------------------------------------


def grid(text: str, name: str, *, minimum: float, maximum: float = float("inf")) -> tuple[float, ...]:
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


def long_name(field_name: str) -> str:
    """Return the option's long name without dashes in front: val_fraction -> val-fraction."""
    return field_name.replace("_", "-")


def read_config_file(path: str | Path, known: set[str]) -> dict[str, Any]:
    """Return the options a YAML file sets, by field name.

    Args:
        path: The file; keys are long option names, with dashes or underscores.
        known: Field names the command has.

    Raises:
        UsageError: The file is not a YAML mapping, or has an unknown key (the nearest is named).
        DataError: The file is missing or cannot be read.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Configuration {str(path)!r} cannot be read: {error}.") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"Configuration {str(path)!r} is not YAML: {error}") from error
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"Configuration {str(path)!r} holds a {type(loaded).__name__}, not a mapping.",
            hint="Write one `option: value` a line, as in `val-fraction: 0.3`.",
        )
    options = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {long_name(near[0])}?" if near else "See the command's --help for its options."
            )
            raise UsageError(f"Configuration {str(path)!r} has an unknown option {str(key)!r}.", hint=hint)
        if value is not None:
            options[name] = value
    return options


def to_options(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration as long option name -> plain value, in declaration order."""
    return {
        long_name(item.name): list(value) if isinstance(value := getattr(config, item.name), tuple) else value
        for item in dataclasses.fields(config)
        if item.name not in without
    }


def from_options(kind: type[T], options: dict[str, Any]) -> T:
    """Return a configuration from long or field names, ignoring names `kind` does not have."""
    known = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {key.replace("-", "_"): value for key, value in options.items()}
    return kind(**{key: value for key, value in values.items() if key in known})
