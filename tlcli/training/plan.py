"""How the backbone's units will be trained, in the scenarios freeze, full and scratch.

freeze      trains the units after the cut from the prefix's rows: cached, or computed as they are needed
full        trains everything from images, starting at the pretrained weights
scratch     trains everything from images, starting at random weights
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlcli.backbones.backbone import Backbone
from tlcli.backbones.compute import Amp, Compute, choose_compute
from tlcli.backbones.initialise import BATCH_NORMS, reinitialise
from tlcli.backbones.units import num_frozen_units, units
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import FeatureOptions
from tlcli.config.commands import FinetuneConfig
from tlcli.config.fields import from_options, to_options
from tlcli.config.training import Scenario
from tlcli.data.augment import AugmentPolicy, resolve_policy
from tlcli.data.collection import Collection
from tlcli.errors import UsageError
from tlcli.features.cache_decision import UNDECIDED, CachingDecision, decide, is_measured
from tlcli.features.cost_trial import CUT, RECOMPUTE
from tlcli.features.earlier import EarlierRows, rows_at
from tlcli.features.extractor import Extractor
from tlcli.features.plan import FeaturePlan, make_extractor, plan_features
from tlcli.features.views import Views
from tlcli.machine import processes
from tlcli.machine.device import fast_bf16
from tlcli.training.continued import Continued, continued_from
from tlcli.training.optimizer import check_optimizer
from tlcli.training.recipe import Recipe, head_init, resolve

logger = logging.getLogger(__name__)

DEFAULT_VIEWS = 4
SELECT_FRACTION = 0.2  # of train, without val; as --val-fraction
NO_NORM = "the trained units hold no BatchNorm"
DEFAULT_SHARE = 2 / 3  # of the units, that --scenario freeze freezes without a number


@dataclass(frozen=True)
class TrainingPlan:
    """How the backbone's units will be trained.

    Attributes:
        recipe: Every value of the training.
        policy: How training images are varied.
        num_views: Views of each training image; None for a new one every epoch.
        extractor: Transform, and the prefix where units are frozen.
        earlier: The rows that are kept before the cut; None where none are.
        features: The rows to compute before training: at the cut, before it, or the pooled ones of the
            probe; None when there are none.
        caching: Where the prefix's work is kept, and why; None where nothing is frozen.
        compute: How the trained part computes.
        num_units: Units of the backbone.
        select_fraction: Share of the training images that is held out to choose between the probe and the
            trained network; 0 where val chooses, or nothing is chosen.
        insist: Whether the trained network is published whatever it is worth.
        notes: What people should know beforehand.
        continued: The finished run that is trained on; None where training begins anew.
    """

    recipe: Recipe
    policy: AugmentPolicy
    num_views: int | None
    extractor: Extractor
    earlier: EarlierRows | None
    features: FeaturePlan | None
    caching: CachingDecision | None
    compute: Compute
    num_units: int
    select_fraction: float
    insist: bool
    notes: tuple[str, ...]
    continued: Continued | None = None

    @property
    def scenario(self) -> Scenario:
        """Return the scenario."""
        return self.recipe.scenario

    @property
    def trains_on_rows(self) -> bool:
        """Return whether training reads cached rows."""
        return self.scenario == "freeze" and self.features is not None

    def summary(self) -> dict[str, str]:
        """Return the plan for people."""
        frozen = self.extractor.cut.num_frozen_units
        views = "a new view every epoch" if self.num_views is None else f"{self.num_views} views of an image"
        units = f"unit{'s' * (frozen + 1 < self.num_units)} {frozen + 1}"
        if frozen + 1 < self.num_units:
            units += f" to {self.num_units}"
        result = {} if self.continued is None else {"continues": self.continued.summary()}
        result |= {
            "trains": f"{units} of {self.num_units} and the head, "
            + ("in fp32" if self.compute.amp == "none" else f"mixed precision {self.compute.amp}"),
            "recipe": self.recipe.summary(),
            "augmentation": "none",
        }
        if self.recipe.norm_reason != NO_NORM:
            result["BatchNorm"] = f"{self.recipe.norm} in trained units: {self.recipe.norm_reason}"
        if not self.policy.is_none:
            result["augmentation"] = f"{self.policy.describe()}; {views}"
        if self.recipe.head_init != "random":
            result["publishes"] = self._publishes()
        if self.caching is not None:
            result["caching"] = self.caching.reason
        return result

    def _publishes(self) -> str:
        """Return what decides which network is published, for people."""
        if self.insist:
            return "the trained network: --publish trained"
        start = "the run as it is" if self.continued else "the linear probe"
        images = (
            "val"
            if not self.select_fraction
            else (f"{100 * self.select_fraction:.0f} % of the training images, held out")
        )
        return f"the trained network or {start}, whichever is better on {images}"

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {
            "recipe": self.recipe.document(),
            "augmentation": self.policy.key_facts(),
            "num_views": self.num_views,
            "caching": None if self.caching is None else self.caching.document(),
            "num_frozen_units": self.extractor.cut.num_frozen_units,
            "num_units": self.num_units,
            "amp": self.compute.amp,
            "select_fraction": self.select_fraction,
            **({} if self.continued is None else {"continued": self.continued.document()}),
        }


# ---- planning -------------------------------------------------------------------------------------------


def plan_training(
    config: FinetuneConfig,
    collection: Collection,
    continued: Mapping[str, Any] | None = None,
    *,
    dry_run: bool = False,
) -> TrainingPlan:
    """Return how the backbone will be trained.

    Args:
        config: With a scenario other than feature-extraction.
        collection: Images of train and val.
        continued: run.json of the run that is continued: what was measured for it holds. From a finished run
            training goes on to `config.epochs`.
        dry_run: Nothing is written, and what a trial would decide stays undecided.

    Raises:
        UsageError: Options contradict each other.
        BackboneError: The backbone cannot be loaded or cut.
        StorageError: The rows would not fit.
    """
    scenario = config.resolved_scenario()
    earlier_run = continued_from(Path(config.output or ""), continued, config.epochs)
    backbone = load_trainable(config, scenario)
    num_units = len(units(backbone.model))
    frozen, notes = _frozen_units(config, num_units) if scenario == "freeze" else (0, ())
    select_fraction = _select_fraction(config, collection)
    num_train = round((1 - select_fraction) * collection.num_images()["train"])
    policy = resolve_policy(config, num_train)
    config = dataclasses.replace(config, freeze=str(frozen), scenario=scenario)
    num_views = _num_views(config, scenario, policy, continued)
    recipe = _recipe(config, num_train, backbone, earlier_run)
    features, decision, earlier = None, None, None
    made_views = None if policy.is_none else Views(policy, config.view_seed)
    extractor = make_extractor(backbone, config, views=made_views)
    compute = _compute(config, extractor)
    if scenario == "freeze":
        # The probe is one more pass over the images.
        passes = recipe.epochs + (recipe.head_init == "probe")
        decision = _decided(continued) or _decide(
            config, collection, extractor, compute, num_views=num_views or 1, epochs=passes, dry_run=dry_run
        )  # fmt: skip
        decision = processes.from_main(decision)
        if decision.node is not None and (earlier := rows_at(extractor, decision.node)) is None:
            decision = CachingDecision(CUT, f"caching at the cut: nothing can be kept at {decision.node}")
        if decision.where != RECOMPUTE:
            kept = earlier.extractor if earlier else extractor
            features = _plan_features(config, collection, kept, num_views or 1)
    elif recipe.head_init == "probe":
        whole = from_options(FeatureOptions, {**to_options(config), "freeze": "all"})
        features = _plan_features(config, collection, make_extractor(backbone, whole), 1)
    notes += (compute.note,) if compute.note else ()
    if not _trains_batch_norm(extractor):
        recipe, notes = _without_norm(config, recipe, notes)
    return TrainingPlan(
        recipe, policy, num_views, extractor, earlier, features, decision, compute, num_units,
        select_fraction, config.publish == "trained", notes, earlier_run,
    )  # fmt: skip


def _recipe(
    config: FinetuneConfig, num_train: int, backbone: Backbone, earlier_run: Continued | None
) -> Recipe:
    """Return the recipe; of a run that goes on, that of the epochs which are left."""
    if earlier_run is not None:
        config = dataclasses.replace(config, epochs=earlier_run.upto - earlier_run.epochs)
    recipe = resolve(
        config,
        num_train=num_train,
        has_batch_norm=any(isinstance(module, BATCH_NORMS) for module in backbone.model.modules()),
        num_processes=processes.world_size(),
    )
    return recipe if earlier_run is None else dataclasses.replace(recipe, head_init="run")


def _trains_batch_norm(extractor: Extractor) -> bool:
    """Return whether a trained unit holds batch normalisation."""
    trained = set(map(id, extractor.cut.trained_parameters()))
    norms = (module for module in extractor.cut.suffix.modules() if isinstance(module, BATCH_NORMS))
    return any(id(value) in trained for norm in norms for value in norm.parameters())


def _without_norm(
    config: FinetuneConfig, recipe: Recipe, notes: tuple[str, ...]
) -> tuple[Recipe, tuple[str, ...]]:
    """Return a recipe, and what is noted, that say nothing of BatchNorm which is not there."""
    if config.norm != "auto":
        notes += (f"--norm {config.norm} changes nothing: {NO_NORM}",)
    return dataclasses.replace(recipe, norm_reason=NO_NORM), notes


def _num_views(
    config: FinetuneConfig, scenario: Scenario, policy: AugmentPolicy, continued: Mapping[str, Any] | None
) -> int | None:
    """Return the views of each training image, None for a new one every epoch: a rule, whatever is cached."""
    if policy.is_none:
        return 1
    if continued and "num_views" in continued.get("recipe", {}):
        stored: int | None = continued["recipe"]["num_views"]  # 0.2.0 took another number where it recomputed
        return stored
    return config.views or (DEFAULT_VIEWS if scenario == "freeze" else None)


def _compute(config: FinetuneConfig, extractor: Extractor) -> Compute:
    size = extractor.backbone.preprocess.image_size
    return choose_compute(extractor.cut, size, _amp(config, extractor.device), extractor.device)


def _plan_features(
    config: FinetuneConfig, collection: Collection, extractor: Extractor, num_views: int
) -> FeaturePlan:
    return plan_features(
        collection,
        extractor,
        cache=config.cache,
        workers=config.num_workers,
        max_bad=config.max_bad,
        num_views=num_views,
        max_bytes=config.cache_max_bytes,
    )


def _decided(continued: Mapping[str, Any] | None) -> CachingDecision | None:
    """Return the decision of the run that is continued."""
    before = (continued or {}).get("recipe", {}).get("caching")
    return None if before is None else CachingDecision(before["where"], f"as before: {before['reason']}")


def _decide(
    config: FinetuneConfig,
    collection: Collection,
    extractor: Extractor,
    compute: Compute,
    *,
    num_views: int,
    epochs: int,
    dry_run: bool,
) -> CachingDecision:
    """Return where the prefix's work is kept: as --cache says, or where it is quickest."""
    if config.cache == "never":
        return CachingDecision(RECOMPUTE, "recomputing in each epoch: --cache never")
    if config.cache != "auto":
        return CachingDecision(CUT, f"caching at the cut: --cache {config.cache}")
    if dry_run and is_measured(collection):
        return CachingDecision(
            UNDECIDED, "a trial of a few seconds will decide: caching at the cut, earlier, or recomputing"
        )
    return decide(
        extractor, collection, epochs=epochs, num_views=num_views, workers=config.num_workers,
        compute=compute, max_bytes=config.cache_max_bytes,
    )  # fmt: skip


def load_trainable(config: FinetuneConfig, scenario: Scenario) -> Backbone:
    """Load the backbone; for scratch its architecture alone, with random weights."""
    if scenario != "scratch":
        return load_backbone(config, drop_path=config.drop_path)
    backbone = load_backbone(dataclasses.replace(config, random_init=True), drop_path=config.drop_path)
    reinitialise(backbone.model, config.init, config.seed)
    return backbone


def _select_fraction(config: FinetuneConfig, collection: Collection) -> float:
    """Return the share of train that is held out to choose what is published; 0 where val chooses."""
    if config.publish == "trained" or head_init(config) != "probe":
        return 0.0
    if config.select_fraction is not None:
        return config.select_fraction
    return 0.0 if collection.num_images().get("val") else SELECT_FRACTION


def _frozen_units(config: FinetuneConfig, num_units: int) -> tuple[int, tuple[str, ...]]:
    if config.freeze is None:
        frozen = max(1, min(num_units - 1, round(DEFAULT_SHARE * num_units)))
        return frozen, (f"freezing {frozen} of {num_units} units, two thirds; --freeze K chooses",)
    frozen = num_frozen_units(config.freeze, num_units)
    if frozen == num_units:
        raise UsageError(
            f"--freeze {config.freeze} freezes all of the {num_units} units: nothing is left to train.",
            hint="Use --freeze all to train a head alone, or a smaller number.",
        )
    return frozen, ()


def _amp(config: FinetuneConfig, device: torch.device) -> Amp:
    if config.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU.", hint="Use --amp bf16, none or auto.")
    if config.amp != "auto":
        return config.amp
    if fast_bf16(device)[0]:
        return "bf16"
    return "fp16" if device.type == "cuda" else "none"


def check_packages(config: FinetuneConfig) -> None:
    """Refuse an optimiser or a tracker that is not installed, before the data is read.

    Raises:
        UsageError: It is not.
    """
    check_optimizer(config.opt)
    name = config.tracker
    package = {"none": "torch"}.get(name, name)
    if importlib.util.find_spec(package) is None:
        extra = "'tlcli[trackers]'" if name == "tensorboard" else name
        raise UsageError(f"--tracker {name} needs a package.", hint=f"Install it: pip install {extra}")
