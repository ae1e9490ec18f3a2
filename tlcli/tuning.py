"""Training the backbone's own units: the scenarios freeze, full and scratch.

    plan:  backbone -> cut -> recipe, views, what is cached
    tune:  rows or images -> linear probe -> network -> training -> logits of val

freeze      trains the units after the cut from the prefix's rows: cached, or computed as they are needed
full        trains everything from images, starting at the pretrained weights
scratch     trains everything from images, starting at random weights
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli import caching, paths, processes
from tlcli.backbones.initialise import reinitialise
from tlcli.backbones.units import parse_freeze, units
from tlcli.backbones.zoo import Backbone, load_backbone
from tlcli.cache.store import parse_size
from tlcli.checkpoints import Checkpoints
from tlcli.config import FinetuneConfig, Scenario, from_options, to_options
from tlcli.data.audit import examine, require_usable
from tlcli.data.augment import AugmentPolicy, resolve_policy
from tlcli.data.collection import Collection
from tlcli.data.decode import BadImage
from tlcli.device import fast_bf16
from tlcli.errors import UsageError
from tlcli.extract import FeaturePlan, make_extractor, plan_features, read_rows, write_bad_images
from tlcli.features import Extractor, Features
from tlcli.heads import FittedHead, Head, fit_head
from tlcli.network import NORM_LAYERS, make_network
from tlcli.optimization import check_optimizer
from tlcli.option_groups import FeatureOptions
from tlcli.progress import Progress
from tlcli.recipe import Recipe, resolve
from tlcli.recommend import scratch_warning
from tlcli.runs import RunWriter
from tlcli.sources import ImageSource, RowSource, Source
from tlcli.training import Samples, Setting, Trained, logits_of, train

logger = logging.getLogger(__name__)

DEFAULT_VIEWS = 4
DEFAULT_SHARE = 2 / 3  # of the units, that --scenario freeze freezes without a number
UNCHANGED_SCALINGS = "plain,standardised"  # a head that normalises its input is no linear layer


@dataclass(frozen=True)
class TuningPlan:
    """How the backbone's units will be trained.

    Attributes:
        recipe: Every value of the training.
        policy: How training images are varied.
        num_views: Views of each training image; None for a new one every epoch.
        extractor: Transform, and the prefix where units are frozen.
        features: The rows to compute before training: at the cut, or the pooled ones of the probe; None when
            there are none.
        caching: Where the prefix's work is kept, and why; None where nothing is frozen.
        amp: Compute type of training.
        num_units: Units of the backbone.
        notes: What people should know beforehand.
    """

    recipe: Recipe
    policy: AugmentPolicy
    num_views: int | None
    extractor: Extractor
    features: FeaturePlan | None
    caching: caching.CachingDecision | None
    amp: Any
    num_units: int
    notes: tuple[str, ...]

    @property
    def scenario(self) -> Scenario:
        """Return the scenario."""
        return self.recipe.scenario

    @property
    def trains_on_rows(self) -> bool:
        """Return whether training reads cached rows."""
        return self.scenario == "freeze" and self.features is not None

    def facts(self) -> dict[str, str]:
        """Return the plan for people."""
        frozen = self.extractor.cut.num_frozen_units
        views = "a new view every epoch" if self.num_views is None else f"{self.num_views} views of an image"
        result = {
            "trains": f"units {frozen + 1} to {self.num_units} of {self.num_units} and the head, "
            + ("in fp32" if self.amp == "none" else f"mixed precision {self.amp}"),
            "recipe": self.recipe.facts(),
            "augmentation": "none",
            "BatchNorm": f"{self.recipe.norm} in trained units: {self.recipe.norm_reason}",
        }
        if not self.policy.is_none:
            result["augmentation"] = f"{self.policy.describe()}; {views}"
        if self.caching is not None:
            result["caching"] = self.caching.reason
        return result

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {
            "recipe": self.recipe.document(),
            "augmentation": self.policy.facts(),
            "num_views": self.num_views,
            "caching": None if self.caching is None else self.caching.document(),
            "num_frozen_units": self.extractor.cut.num_frozen_units,
            "num_units": self.num_units,
            "amp": self.amp,
        }


@dataclass(frozen=True)
class Tuned:
    """A trained network, whose weights are in the backbone.

    Attributes:
        head: Its head.
        logits: fp32 [N, C] of val's images; None without val.
        trained: What happened.
        probe: The head on frozen features it started from.
        probe_accuracy: That head's accuracy on val.
    """

    head: Head
    logits: Tensor | None
    trained: Trained
    probe: FittedHead | None
    probe_accuracy: float | None

    def document(self) -> dict[str, Any]:
        """Return what happened, for run.json."""
        probe = None
        if self.probe is not None:
            probe = {"chosen": self.probe.chosen, "val_top1_accuracy": self.probe_accuracy}
        return {
            "epochs": len(self.trained.history),
            "steps": self.trained.steps,
            "lr": self.trained.lr,
            "best_epoch": self.trained.best_epoch,
            "probe": probe,
        }


# ---- planning -------------------------------------------------------------------------------------------


def plan_tuning(
    config: FinetuneConfig, collection: Collection, continued: Mapping[str, Any] | None = None
) -> TuningPlan:
    """Return how the backbone will be trained.

    Args:
        config: With a scenario other than feature-extraction.
        collection: Images of train and val.
        continued: run.json of the run that is continued: what was measured for it holds.

    Raises:
        UsageError: Options contradict each other.
        BackboneError: The backbone cannot be loaded or cut.
        StorageError: The rows would not fit.
    """
    scenario = config.resolved_scenario()
    check_optimizer(config.opt)
    _check_tracker(config.tracker)
    backbone = load_tunable(config, scenario)
    num_units = len(units(backbone.model))
    notes = []
    frozen = 0
    if scenario == "freeze":
        frozen, note = _frozen_units(config, num_units)
        notes += [note] if note else []
    if scenario == "scratch":
        notes.append(scratch_warning())
    num_train = collection.num_images()["train"]
    policy = resolve_policy(config, num_train)
    config = dataclasses.replace(config, freeze=str(frozen), scenario=scenario)
    num_views = 1 if policy.is_none else config.views or (DEFAULT_VIEWS if scenario == "freeze" else None)
    features: FeaturePlan | None = None
    decision = None
    recipe = resolve(
        config,
        num_train=num_train,
        has_batch_norm=any(isinstance(module, NORM_LAYERS) for module in backbone.model.modules()),
        num_processes=processes.world_size(),
    )
    pictures = None if policy.is_none else policy
    extractor = None
    if scenario == "freeze":
        extractor = make_extractor(backbone, config, policy=pictures)
        # The probe is one more pass over the images.
        passes = recipe.epochs + (recipe.head_init == "probe")
        decision = _decided(continued) or _decide(config, collection, extractor, num_views or 1, passes)
        decision = processes.from_main(decision)
        if decision.node is not None:
            extractor = make_extractor(backbone, config, node=decision.node, policy=pictures)
        if decision.where == caching.RECOMPUTE:
            num_views = 1 if policy.is_none else config.views
        else:
            features = _plan_features(config, collection, extractor, num_views or 1)
    elif recipe.head_init == "probe":
        whole = from_options(FeatureOptions, {**to_options(config), "freeze": "all"})
        pooled = make_extractor(backbone, whole)
        features = _plan_features(config, collection, pooled, 1)
    extractor = extractor or make_extractor(backbone, config, policy=pictures)
    amp = _amp(config, extractor.device)
    return TuningPlan(recipe, policy, num_views, extractor, features, decision, amp, num_units, tuple(notes))


def _plan_features(
    config: FinetuneConfig, collection: Collection, extractor: Extractor, num_views: int
) -> FeaturePlan:
    workers = config.workers or paths.default_workers()
    return plan_features(
        collection,
        extractor,
        cache=config.cache,
        workers=workers,
        max_bad=config.max_bad,
        num_views=num_views,
        max_bytes=parse_size(config.cache_max_size),
    )


def _decided(continued: Mapping[str, Any] | None) -> caching.CachingDecision | None:
    """Return the decision of the run that is continued: another would draw other views."""
    before = (continued or {}).get("recipe", {}).get("caching")
    return (
        None if before is None else caching.CachingDecision(before["where"], f"as before: {before['reason']}")
    )


def _decide(
    config: FinetuneConfig, collection: Collection, extractor: Extractor, num_views: int, epochs: int
) -> caching.CachingDecision:
    """Return where the prefix's work is kept: as --cache says, or where it is quickest."""
    if config.cache == "never":
        return caching.CachingDecision(caching.RECOMPUTE, "recomputing in each epoch: --cache never")
    if config.cache != "auto":
        return caching.CachingDecision(caching.CUT, f"caching at the cut: --cache {config.cache}")
    workers = config.workers or paths.default_workers()
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(_amp(config, extractor.device))
    return caching.decide(
        extractor, collection, epochs=epochs, num_views=num_views, workers=workers, amp=amp,
        max_bytes=parse_size(config.cache_max_size),
    )  # fmt: skip


def load_tunable(config: FinetuneConfig, scenario: Scenario) -> Backbone:
    """Load the backbone; for scratch its architecture alone, with random weights.

    Raises:
        UsageError: Weights are named for a training that does not use them.
    """
    if scenario != "scratch":
        return load_backbone(config, drop_path=config.drop_path)
    if config.weights:
        raise UsageError(
            "--weights and --scenario scratch contradict each other: scratch starts from random weights.",
            hint="Leave --weights out, or use --scenario full.",
        )
    backbone = load_backbone(dataclasses.replace(config, random_init=True), drop_path=config.drop_path)
    reinitialise(backbone.model, config.init, config.seed)
    return backbone


def _frozen_units(config: FinetuneConfig, num_units: int) -> tuple[int, str]:
    if config.freeze is None:
        frozen = max(1, min(num_units - 1, round(DEFAULT_SHARE * num_units)))
        return frozen, f"freezing {frozen} of {num_units} units, two thirds; --freeze K chooses"
    frozen = parse_freeze(config.freeze, num_units)
    if frozen == num_units:
        raise UsageError(
            f"--freeze {config.freeze} freezes all of the {num_units} units: nothing is left to train.",
            hint="Use --freeze all to train a head alone, or a smaller number.",
        )
    return frozen, ""


def _amp(config: FinetuneConfig, device: torch.device) -> str:
    if config.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU.", hint="Use --amp bf16, none or auto.")
    if config.amp != "auto":
        return config.amp
    if fast_bf16(device)[0]:
        return "bf16"
    return "fp16" if device.type == "cuda" else "none"


def _check_tracker(name: str) -> None:
    package = {"none": "torch"}.get(name, name)
    if importlib.util.find_spec(package) is None:
        extra = "'tlcli[trackers]'" if name == "tensorboard" else name
        raise UsageError(f"--tracker {name} needs a package.", hint=f"Install it: pip install {extra}")


# ---- before training ------------------------------------------------------------------------------------


def check_images(
    collection: Collection, config: FinetuneConfig, progress: Progress, bad_images_path: Path
) -> Features:
    """Decode every image once, where no rows are computed that would show the bad ones.

    Raises:
        DataError: More than --max-bad of the images cannot be used, or a class lost all of them.
    """
    workers = config.workers or paths.default_workers()
    examined = examine(collection.samples, workers, progress)
    progress.finish()
    bad = [
        BadImage(sample.name, sample.path, item.reason)
        for sample, item in zip(collection.samples, examined, strict=True)
        if item.reason
    ]
    if bad:
        write_bad_images(bad_images_path, bad)
        logger.warning(
            "%d of %d images cannot be used and are skipped (%s)",
            len(bad), len(collection.samples), bad_images_path,
        )  # fmt: skip
    require_usable(collection.dataset, collection.splits, bad, max_bad=config.max_bad)
    return Features(bad_images=bad)


# ---- tuning ---------------------------------------------------------------------------------------------


def tune(
    plan: TuningPlan,
    config: FinetuneConfig,
    train_part: Collection,
    val_part: Collection,
    writer: RunWriter,
    progress: Progress,
) -> Tuned:
    """Train the network of a plan, in place.

    Args:
        plan: From `plan_tuning`, its features computed.
        config: The run's configuration.
        train_part: Usable images of train.
        val_part: Usable images of val; may be empty.
        writer: Of the run.
        progress: Told of every image.
    """
    extractor, recipe = plan.extractor, plan.recipe
    num_classes = len(train_part.dataset.class_names)
    device, workers = extractor.device, config.workers or paths.default_workers()
    suffix = extractor.cut.suffix.to(device)
    train_source = _source(plan, train_part, plan.num_views)
    val_source = _source(plan, val_part, 1) if val_part.samples else None
    probe, probe_accuracy = None, None
    if recipe.head_init == "probe":
        train_features, val_features = (
            _pooled(plan, suffix, source, part, workers)
            for source, part in ((train_source, train_part), (val_source, val_part))
        )
        probe = _fit_probe(config, train_features, train_part, num_classes, progress)
        if val_part.samples:
            probe_accuracy = _accuracy(probe.head.logits(val_features), labels_of(val_part))
            logger.info("linear probe on the frozen features: val accuracy %.3f", probe_accuracy)
    network = make_network(
        suffix.to("cpu"), extractor.backbone.num_features, num_classes, config,
        dropout=recipe.dropout, start=probe.head if probe else None, full=plan.scenario != "freeze",
    )  # fmt: skip
    setting = Setting(
        device=device, amp=plan.amp, workers=workers,
        unit_of={name: unit.index for unit in units(extractor.backbone.model) for name in unit.parameters},
        num_units=plan.num_units,
        checkpoints=Checkpoints(writer.path), checkpoint_seconds=60 * config.checkpoint_minutes,
        progress=progress, on_epoch=lambda history: writer.write_lines("metrics.jsonl", history),
        tracker=config.tracker, log_dir=writer.path,
    )  # fmt: skip
    val = Samples(val_source, labels_of(val_part)) if val_source is not None else None
    trained = train(network, recipe, Samples(train_source, labels_of(train_part)), val, setting)
    logits = None
    if val_source is not None:
        network.to(device)
        logits = logits_of(network, val_source, workers=workers)
        network.to("cpu")
    return Tuned(network.trained_head(), logits, trained, probe, probe_accuracy)


def labels_of(collection: Collection) -> Tensor:
    """Return the labels of a collection, int64 [N]."""
    return torch.tensor([sample.label for sample in collection.samples], dtype=torch.int64)


def _source(plan: TuningPlan, part: Collection, num_views: int | None) -> Source:
    keys = [found.sha256 or "" for found in part.fingerprints]
    seed = plan.recipe.seed
    if not plan.trains_on_rows:
        return ImageSource(plan.extractor, part.samples, keys, num_views=num_views, seed=seed)
    features = plan.features

    def read(indices: Sequence[int], views: Sequence[int]) -> Tensor:
        assert features is not None
        return read_rows(features, part.select(indices), views)

    return RowSource(read, keys, num_views=num_views or 1, seed=seed, device=plan.extractor.device)


def _pooled(
    plan: TuningPlan, suffix: torch.nn.Module, source: Source | None, part: Collection, workers: int
) -> Tensor:
    """Return the frozen network's features of the plain views, fp32 [N, D]."""
    if source is None:
        return torch.empty(0)
    if plan.scenario != "freeze" and plan.features is not None:
        return read_rows(plan.features, part).float()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.amp)
    with torch.autocast(plan.extractor.device.type, dtype, enabled=dtype is not None):
        return logits_of(suffix, source, workers=workers)


def _fit_probe(
    config: FinetuneConfig, features: Tensor, part: Collection, num_classes: int, progress: Progress
) -> FittedHead:
    """Fit the head that training starts from, with the grid's own defaults."""
    options = dataclasses.replace(
        config, lr=None, dropout=None, epochs=None, patience=None, batch_size=None, l2="auto", l1=0.0,
        label_smoothing=None, scaling=UNCHANGED_SCALINGS,
    )  # fmt: skip
    return fit_head(
        features, labels_of(part), num_classes, options, groups=groups_of(part), progress=progress
    )


def groups_of(part: Collection) -> Tensor:
    """Return a number a sample: equal for copies of an image and for images of one group."""
    numbers: dict[str, int] = {}
    keys = [found.sha256 or "" for found in part.fingerprints]
    return torch.tensor(
        [
            numbers.setdefault(f"group {sample.group}" if sample.group else key, len(numbers))
            for sample, key in zip(part.samples, keys, strict=True)
        ]
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
