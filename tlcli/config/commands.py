"""One frozen dataclass a command, put together from the groups of this package. No torch here."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlcli.config.backbone import BackboneOptions, CacheMode, Device, FeatureOptions
from tlcli.config.data import AugmentOptions, DataOptions, Split
from tlcli.config.fields import HasCacheLimit, HasWorkers, Options, argument, long_name, option, same
from tlcli.config.head import CLOSED_FORM, HeadOptions
from tlcli.config.training import Scenario, TrainingOptions
from tlcli.errors import UsageError
from tlcli.wording import parse_age, parse_size


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(AugmentOptions, FeatureOptions, BackboneOptions, DataOptions):
    """`tlcli extract`."""

    output: str | None = option(
        None,
        "Also write the features, file names and labels: .safetensors, .npz or .csv.",
        flags=("-o", "--output"),
        metavar="FILE",
    )
    overwrite: bool = option(False, "Replace an existing output file.")

    def check(self) -> None:
        """Refuse an export format that does not exist."""
        if self.output and Path(self.output).suffix not in {".safetensors", ".npz", ".csv"}:
            raise UsageError(
                f"--output {self.output!r} has no known format.",
                hint="Expected a name that ends in .safetensors, .npz or .csv.",
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(
    TrainingOptions, AugmentOptions, HeadOptions, FeatureOptions, BackboneOptions, DataOptions
):
    """`tlcli finetune`."""

    scenario: Scenario | None = option(
        None,
        "feature-extraction trains a head alone, freeze also the units after --freeze K, full everything, "
        "scratch everything from random weights; follows from --freeze unless given.",
    )
    output: str | None = option(
        None,
        "Run directory; runs/<data>-<backbone>-<scenario> unless given.",
        flags=("-o", "--output"),
        metavar="DIR",
    )
    overwrite: bool = option(False, "Replace an existing run directory.")
    resume: bool = option(
        False,
        "Continue the run in -o: an unfinished one from its newest checkpoint, a finished one with more "
        "--epochs; start it where there is none.",
    )

    def check(self) -> None:
        """Refuse contradictions that need no data.

        Raises:
            UsageError: Options contradict each other.
        """
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other.", hint="Leave one of them out.")
        if self.resume and not self.output:
            raise UsageError("--resume needs -o: the run directory to continue.")
        scenario = self.resolved_scenario()
        if scenario == "feature-extraction":
            self._refuse_training_options()
            self._refuse_meaningless_of_closed_forms()
        else:
            self._refuse_closed_forms()
            self._refuse_head_options()
            self._refuse_publishing()
            self._refuse_balancing_twice()
        if scenario == "scratch":
            self._refuse_pretraining()

    def _refuse_training_options(self) -> None:
        """Refuse what trains the backbone where it is frozen: ignored, it would mislead."""
        for group in (TrainingOptions, AugmentOptions):
            for item in dataclasses.fields(group):
                if getattr(self, item.name) not in (item.default, "none"):
                    raise UsageError(
                        f"--{long_name(item.name)} belongs to training the backbone, and scenario "
                        "feature-extraction freezes all of it.",
                        hint="Add --freeze K, or --scenario freeze, full or scratch; or leave it out.",
                    )

    def _refuse_meaningless_of_closed_forms(self) -> None:
        """Refuse what heads in closed form cannot follow and would have to ignore."""
        without = {
            "label_smoothing": (CLOSED_FORM, "is not trained with a log loss that smoothing would change"),
            "l2": (("knn", "ncm"), "has no weights to penalise"),
            "scaling": (("knn",), "compares directions, which are those of the features as they are"),
        }
        for name, (kinds, why) in without.items():
            default = type(self).__dataclass_fields__[name].default
            if self.kind in kinds and getattr(self, name) != default:
                raise UsageError(
                    f"--{long_name(name)} and --head {self.head} contradict each other: {self.head} {why}.",
                    hint=f"Leave --{long_name(name)} out, or use --head linear.",
                )

    def _refuse_closed_forms(self) -> None:
        """Refuse a closed form that no network can be trained from."""
        if self.kind == "knn":
            raise UsageError(
                "--head knn is not a layer, and training the backbone needs one to train with it.",
                hint="Use --freeze all for knn, or another --head.",
            )
        if self.kind in CLOSED_FORM and self.head_starts_at_random:
            raise UsageError(
                f"--head {self.head} says what the linear probe is that training starts from, and a training "
                "from random weights has no probe.",
                hint="Use --head linear.",
            )

    @property
    def head_starts_at_random(self) -> bool:
        """Return whether training the backbone starts without a linear probe."""
        unpretrained = self.resolved_scenario() == "scratch" or self.random_init
        return self.head_init == "random" or (unpretrained and self.head_init == "auto")

    def _refuse_head_options(self) -> None:
        """Refuse what only heads on frozen features can take."""
        if self.refit:
            raise UsageError(
                "--refit belongs to heads on frozen features.",
                hint="Train on all images with --val-fraction 0.01, or leave --refit out.",
            )
        for name in ("l2", "lr", "dropout"):
            if len(self.parsed(name) or ()) > 1:
                raise UsageError(
                    f"--{name} {getattr(self, name)!r} is a grid; a training takes one value.",
                    hint="Grids are for heads on frozen features (--freeze all).",
                )

    def _refuse_balancing_twice(self) -> None:
        """Refuse to make up for rare classes twice."""
        if self.class_weights == "balanced" and self.sampling == "balanced":
            raise UsageError(
                "--class-weights balanced and --sampling balanced both make up for rare classes: together "
                "they would do it twice.",
                hint="Leave one of them out.",
            )

    def _refuse_publishing(self) -> None:
        """Refuse what chooses between a probe and a trained network where there is no such choice."""
        if self.select_fraction is None:
            return
        if self.publish == "trained":
            raise UsageError(
                "--select-fraction holds out images to choose what is published, and --publish trained has "
                "chosen.",
                hint="Leave one of them out.",
            )
        if self.head_starts_at_random:
            raise UsageError(
                "--select-fraction chooses between the linear probe and the trained network, and a training "
                "from random weights has no probe.",
                hint="Leave --select-fraction out.",
            )

    def _refuse_pretraining(self) -> None:
        """Refuse what needs pretrained weights, which scenario scratch gives up."""
        if self.head_init == "probe":
            raise UsageError(
                "--head-init probe needs pretrained features, which --scenario scratch gives up.",
                hint="Leave --head-init out.",
            )
        if self.l2_sp:
            raise UsageError(
                "--l2-sp pulls towards pretrained weights, which --scenario scratch gives up.",
                hint="Leave --l2-sp out.",
            )
        if self.weights:
            raise UsageError(
                "--weights and --scenario scratch contradict each other: scratch starts from random weights.",
                hint="Leave --weights out, or use --scenario full.",
            )

    def resolved_scenario(self) -> Scenario:
        """Return the scenario, which follows from --freeze where it is not given.

        Raises:
            UsageError: --scenario and --freeze contradict each other.
        """
        frozen = self.frozen_units
        implied: Scenario = "full" if frozen == 0 else "freeze"
        if frozen in {None, "all"}:
            implied = "feature-extraction"
        scenario = self.scenario or implied
        allowed = {
            "feature-extraction": frozen in {None, "all"},
            "freeze": implied == "freeze" or frozen is None,
            "full": frozen in {None, 0},
            "scratch": frozen in {None, 0},
        }
        if not allowed[scenario]:
            hint = {"feature-extraction": "It freezes all.", "freeze": "It takes a number, --freeze K.",
                    "full": "It freezes none.", "scratch": "It freezes none."}[scenario]  # fmt: skip
            raise UsageError(
                f"--scenario {scenario} and --freeze {self.freeze} contradict each other.",
                hint=f"{hint} Leave one of them out.",
            )
        return scenario


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(HasWorkers, HasCacheLimit, Options):
    """`tlcli evaluate`."""

    run: str | None = argument(None, "Run directory that `tlcli finetune` wrote.", "RUN")
    data: str | None = argument(None, "Other data with the same classes; the run's own unless given.", "DATA")
    split: Split = option("val", "Which split to measure; DATA without splits is measured whole.")
    max_bad: float = same(DataOptions, "max_bad")
    allow_outside_root: bool = same(DataOptions, "allow_outside_root")
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Compute type of the whole network; auto is as in training, part by part."
    )
    cache: CacheMode = same(FeatureOptions, "cache")
    cache_max_size: str = same(FeatureOptions, "cache_max_size")
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")
    min_accuracy: float | None = option(
        None, "Exit with 6 when top-1 accuracy is below X.", metavar="X", minimum=0.0, maximum=1.0
    )
    worst: int = option(10, "How many of the most confident mistakes to list.", minimum=0, maximum=1000)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(HasWorkers, Options):
    """`tlcli predict`."""

    run: str | None = argument(None, "Run directory that `tlcli finetune` wrote.", "RUN")
    images: tuple[str, ...] = argument(
        (), "Image files, folders, or - for paths on standard input.", "IMAGES"
    )
    top: int = option(1, "Classes listed for each image.", metavar="K", minimum=1, maximum=1000)
    format: Literal["table", "csv", "jsonl"] = option("table", "How rows are written; csv and jsonl stream.")
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Compute type of the whole network; auto is as in training, part by part."
    )
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
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
class RecommendConfig(Options):
    """`tlcli recommend`."""

    size: Literal["small", "large"] | None = option(None, "Size of your data set.")
    similarity: Literal["low", "high"] | None = option(
        None, "How much your images are like the pretraining data (everyday photographs for ImageNet)."
    )
    backbone: str = option("resnet50.a1_in1k", "Backbone named in the printed command.", metavar="B")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(HasWorkers, Options):
    """`tlcli demo`."""

    output: str = option(
        "demo", "Folder for the demo's images and run.", flags=("-o", "--output"), metavar="DIR"
    )
    overwrite: bool = option(False, "Replace a demo folder that an earlier demo made.")
    device: Device = same(FeatureOptions, "device")
    workers: int | None = same(FeatureOptions, "workers")


@dataclass(frozen=True, kw_only=True)
class DataPreviewConfig(HasWorkers, AugmentOptions, DataOptions):
    """`tlcli data preview`."""

    image_size: int = option(
        160, "Side of each picture, in pixels: of the images given to the backbone.", minimum=8, maximum=1024
    )
    images: int = option(
        6, "How many training images are shown, spread over the classes.", metavar="N", minimum=1, maximum=200
    )
    samples: int = option(
        8, "How many augmented versions of each are shown.", metavar="N", minimum=1, maximum=50
    )
    workers: int | None = same(FeatureOptions, "workers")
    output: str = option("preview.png", "Picture to write.", flags=("-o", "--output"), metavar="FILE")
    overwrite: bool = option(False, "Replace an existing file.")


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(HasWorkers, DataOptions):
    """`tlcli data check`."""

    workers: int | None = same(FeatureOptions, "workers")
    min_per_class: int = option(5, "Warn of a class with fewer training images.", minimum=1)
    isolate: float | None = option(
        None,
        "Decode in child processes, each image within this time: names what crashes or hangs a decoder.",
        metavar="SECONDS",
        minimum=0.1,
    )


@dataclass(frozen=True, kw_only=True)
class DataSplitConfig(HasWorkers, DataOptions):
    """`tlcli data split`."""

    workers: int | None = same(FeatureOptions, "workers")
    output: str | None = option(
        None, "Also write the split as CSV (filename,label,split).", flags=("-o", "--output"), metavar="FILE"
    )
    overwrite: bool = option(False, "Replace an existing output file.")


@dataclass(frozen=True, kw_only=True)
class BackbonesListConfig(Options):
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
class BackbonesShowConfig(Options):
    """`tlcli backbones show`."""

    backbone: str | None = argument(None, "Backbone, spelled as for --backbone.", "NAME")
    weights: str | None = same(BackboneOptions, "weights")
    weights_key: str | None = same(BackboneOptions, "weights_key")
    random_init: bool = option(False, "Do not load weights: the table does not depend on them.")
    model_kwargs: str | None = same(BackboneOptions, "model_kwargs")
    image_size: str | int | None = same(BackboneOptions, "image_size")


@dataclass(frozen=True, kw_only=True)
class CacheListConfig(Options):
    """`tlcli cache list`."""


@dataclass(frozen=True, kw_only=True)
class CacheShowConfig(Options):
    """`tlcli cache show`."""

    key: str | None = argument(None, "Entry key, or its unambiguous beginning.", "KEY")


@dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig(Options):
    """`tlcli cache verify`."""

    key: str | None = argument(None, "Entry key, or its beginning; every entry unless given.", "KEY")
    deep: bool = option(False, "Also hash whole shards and compare with their names.")


@dataclass(frozen=True, kw_only=True)
class CachePruneConfig(Options):
    """`tlcli cache prune`."""

    older_than: str | None = option(
        None, "Delete entries not used for this long: 30d, 12h, 45m.", metavar="AGE", parse=parse_age
    )
    max_size: str | None = option(
        None,
        "Delete least recently used entries until the cache is at most this: 20GB, 500MB.",
        metavar="SIZE",
        parse=parse_size,
    )
