"""Training the backbone's units: inputs, linear probe, network, training, logits of val."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tlcli.backbones.cut import freeze_parameters
from tlcli.backbones.units import units
from tlcli.config.commands import FinetuneConfig
from tlcli.data.collection import Collection, groups_of, labels_of
from tlcli.features.plan import read_rows
from tlcli.heads.choice import FittedHead
from tlcli.heads.fit import fit_head
from tlcli.heads.head import Head
from tlcli.progress import Progress, Silent
from tlcli.runs.directory import RunDirectory
from tlcli.training.checkpoints import Checkpoints
from tlcli.training.continued import load_weights
from tlcli.training.inputs import ImageInputs, Inputs, RowInputs
from tlcli.training.logit_adjustment import LogitAdjustment, fit_adjustment
from tlcli.training.loop import Samples, Trained, network_logits, train, val_figures
from tlcli.training.measure import network_features
from tlcli.training.network import HEAD, Network, make_network, smoothed_scale
from tlcli.training.optimizer import undecayed_names
from tlcli.training.plan import TrainingPlan
from tlcli.training.publishing import Comparison, Name, Publication, candidate, held_out, publish
from tlcli.training.setting import Setting
from tlcli.training.stepper import diverged
from tlcli.warned import warn

logger = logging.getLogger(__name__)

UNCHANGED_SCALINGS = "plain,standardised"  # a head that normalises its input is no linear layer


@dataclass(frozen=True)
class TrainedBackbone:
    """A trained network, whose weights are in the backbone.

    Attributes:
        head: Its head.
        logits: fp32 [N, C] of val's images; None without val.
        result: What happened.
        probe: The head on frozen features it started from.
        probe_accuracy: Accuracy on val of the network before training.
        publication: Whether the trained network is published or that of the probe.
        adjustment: Added to the head's biases after training; None unless classes are balanced and there are
            images to fit it to.
        before: fp32 [N, C] of val's images before training; None without val or probe.
        after: The same of the trained network, published or not.
    """

    head: Head
    logits: Tensor | None
    result: Trained
    probe: FittedHead | None
    probe_accuracy: float | None
    publication: Publication
    adjustment: LogitAdjustment | None
    before: Tensor | None
    after: Tensor | None

    @property
    def selected_on(self) -> Literal["train", "val"] | None:
        """Return the split whose images chose the network or its adjustment; None where nothing did."""
        return self.adjustment.fitted_on if self.adjustment else self.publication.selected_on

    def document(self) -> dict[str, Any]:
        """Return what happened, for run.json."""
        probe = None
        if self.probe is not None:
            probe = {"chosen": self.probe.chosen, "val_top1_accuracy": self.probe_accuracy}
        return {
            "epochs": self.result.history[-1]["epoch"],
            "steps": self.result.steps,
            "lr": self.result.lr,
            "best_epoch": self.result.best_epoch,
            "share_of_zeros": self.result.share_of_zeros,
            "probe": probe,
            "publication": self.publication.document(),
            "logit_adjustment": self.adjustment.document() if self.adjustment else None,
        }


@dataclass(frozen=True)
class Parts:
    """The images of a training.

    Attributes:
        train: Trained on.
        val: Measured on; may be empty.
        chooses: Choose between probe and trained network, and fit the logit adjustment: val, or held out of
            train; None for neither.
    """

    train: Collection
    val: Collection
    chooses: Collection | None

    @property
    def selected_on(self) -> Literal["train", "val"]:
        """Return the split that the choosing images are of."""
        return "val" if self.chooses is self.val else "train"


def divide(plan: TrainingPlan, train_part: Collection, val_part: Collection) -> Parts:
    """Return the images to train on, to measure and to choose with.

    Args:
        plan: Its `select_fraction` is held out of train.
        train_part: Usable images of train.
        val_part: Usable images of val; may be empty.
    """
    if plan.recipe.head_init == "random" and not plan.recipe.balanced:  # there is nothing to compare with
        return Parts(train_part, val_part, None)
    if not plan.select_fraction:
        return Parts(train_part, val_part, val_part if val_part.samples else None)
    out = held_out(labels_of(train_part), groups_of(train_part), plan.select_fraction, plan.recipe.seed)
    if not out.any():
        return Parts(train_part, val_part, None)
    rest, chosen = (train_part.select(torch.nonzero(mask).flatten().tolist()) for mask in (~out, out))
    return Parts(rest, val_part, chosen)


# ---- training -------------------------------------------------------------------------------------------


def train_backbone(
    plan: TrainingPlan,
    config: FinetuneConfig,
    train_part: Collection,
    val_part: Collection,
    writer: RunDirectory,
    progress: Progress,
) -> TrainedBackbone:
    """Train the network of a plan, in place.

    Args:
        plan: From `plan_training`, its features computed.
        config: The run's configuration.
        train_part: Usable images of train.
        val_part: Usable images of val; may be empty.
        writer: Of the run.
        progress: Told of every image.
    """
    extractor, recipe, workers = plan.extractor, plan.recipe, config.num_workers
    parts = divide(plan, train_part, val_part)
    first = load_weights(plan.continued, extractor.backbone.model) if plan.continued else None
    freeze_parameters(extractor.cut)
    suffix = extractor.cut.suffix.to(extractor.device)
    train_inputs = _inputs(plan, parts.train, plan.num_views)
    val_inputs = _inputs(plan, val_part, 1) if val_part.samples else None
    probe = None
    if recipe.head_init == "probe":
        features = _pooled(plan, suffix, train_inputs, parts.train, workers)
        probe = _fit_probe(config, features, parts.train, progress)
    network = make_network(
        suffix.to("cpu"), extractor.backbone.num_features, len(train_part.dataset.class_names), config,
        dropout=recipe.dropout, start=probe.head if probe else first, full=plan.scenario != "freeze",
    )  # fmt: skip
    measured = _Measured(plan, network, parts, val_inputs, workers)
    before = measured.logits() if recipe.head_init != "random" else None
    start = {name: value.clone() for name, value in network.state_dict().items()} if before else {}
    if probe:
        logits, labels = probe.head.logits(features), labels_of(parts.train)
        network.scale_logits(smoothed_scale(logits, labels, recipe.label_smoothing))
    row = [] if probe is None or before is None else _epoch_0(before, val_part)
    without = _head_without(config, probe, features, parts.train, recipe.label_smoothing) if probe else None
    setting = _setting(plan, config, writer, progress, row, without)
    val = Samples(val_inputs, labels_of(val_part)) if val_inputs is not None else None
    trained = train(
        network, recipe, Samples(train_inputs, labels_of(parts.train)), val, setting, plan.continued
    )
    after = measured.logits()
    _check_finite(after, trained)
    if after.val is not None:
        _keep_final_figures(trained, after.val, labels_of(val_part))
        setting.on_epoch(trained.history)
    publication = _publication(plan, parts, before, after)
    published = after
    if publication.published != "trained" and before is not None:
        network.load_state_dict(start)
        published = before
    return TrainedBackbone(
        published.head, published.val, trained, probe, row[0]["val_accuracy"] if row else None,
        publication, published.adjustment, before.val if before else None, after.val,
    )  # fmt: skip


@dataclass(frozen=True)
class _Logits:
    """What a network gives, fp32 [N, C]: for val, and for the images that choose; with which head."""

    head: Head
    adjustment: LogitAdjustment | None
    val: Tensor | None
    chooses: Tensor | None


@dataclass(frozen=True)
class _Measured:
    """The images that networks are measured on, and the network that is."""

    plan: TrainingPlan
    network: Network
    parts: Parts
    val_inputs: Inputs | None
    workers: int

    def logits(self) -> _Logits:
        """Return what the network gives now, computed as `evaluate` will."""
        extractor, parts, head = self.plan.extractor, self.parts, self.network.trained_head()
        self.network.to(extractor.device).eval()
        val = chooses = adjustment = None
        if self.val_inputs is not None:
            val = chooses = network_features(extractor, self.val_inputs, workers=self.workers)
        if parts.chooses is not None and parts.selected_on == "train":
            inputs = _inputs(self.plan, parts.chooses, 1)
            chooses = network_features(extractor, inputs, workers=self.workers)
        self.network.to("cpu")
        if parts.chooses is not None and chooses is not None and self.plan.recipe.balanced:
            adjustment = fit_adjustment(
                head.logits(chooses), labels_of(parts.chooses), labels_of(parts.train), parts.selected_on
            )
            head = head.shifted(adjustment.values)
        logits = (None if features is None else head.logits(features) for features in (val, chooses))
        return _Logits(head, adjustment, *logits)


def _epoch_0(before: _Logits, val_part: Collection) -> list[dict[str, Any]]:
    """Return the line of metrics.jsonl of the network before training; none without val."""
    if before.val is None:
        return []
    return [{"kind": "epoch", "epoch": 0, "step": 0, **val_figures(before.val, labels_of(val_part))}]


def _check_finite(found: _Logits, trained: Trained) -> None:
    """Refuse a network that gives no numbers: the last step's loss was one, but it left weights that are not.

    Raises:
        UsageError: Its logits are not finite.
    """
    if any(part is not None and not part.isfinite().all() for part in (found.val, found.chooses)):
        raise diverged(f"The network gives no numbers after step {trained.steps}", trained.lr)


def _publication(plan: TrainingPlan, parts: Parts, before: _Logits | None, after: _Logits) -> Publication:
    """Choose between the probe and the trained network, and say what came of it."""
    if before is None:  # it started from a random head: there is nothing to compare with
        return Publication("trained")
    if parts.chooses is None or before.chooses is None or after.chooses is None:
        if not plan.insist:
            warn(
                "nothing_selected",
                "There are no images to compare the trained network with its probe on; it is published "
                "unseen. Add val images, or more training images a class.",
            )
        return Publication("trained", plan.insist)
    labels = labels_of(parts.chooses)
    first: Name = "earlier" if plan.continued else "probe"
    comparison = Comparison(
        candidate(first, before.chooses, labels), candidate("trained", after.chooses, labels),
        parts.selected_on, balanced=plan.recipe.balanced, groups=groups_of(parts.chooses),
    )  # fmt: skip
    found = publish(comparison, insist=plan.insist)
    if not found.give_warnings():
        logger.info("%s", found.sentence())
    return found


def _setting(
    plan: TrainingPlan,
    config: FinetuneConfig,
    writer: RunDirectory,
    progress: Progress,
    before: list[dict[str, Any]],
    head_without: Callable[[Tensor], dict[str, Tensor]] | None,
) -> Setting:
    unit_of = {name: unit.index for unit in units(plan.extractor.backbone.model) for name in unit.parameters}
    return Setting(
        device=plan.extractor.device, amp=plan.compute.amp, channels_last=plan.compute.channels_last,
        workers=config.num_workers, unit_of=unit_of, num_units=plan.num_units,
        undecayed=undecayed_names(plan.extractor.backbone.model),
        checkpoints=Checkpoints(writer.path), checkpoint_seconds=60 * config.checkpoint_minutes,
        progress=progress, head_without=head_without,
        on_epoch=lambda history: writer.write_lines("metrics.jsonl", [*before, *history]),
        tracker=config.tracker, log_dir=writer.path,
    )  # fmt: skip


def _keep_final_figures(trained: Trained, logits: Tensor, labels: Tensor) -> None:
    """Let the epoch whose weights are kept say what they measure: the loop measures in mixed precision."""
    epoch = trained.history[-1]["epoch"] if trained.best_epoch is None else trained.best_epoch
    for row in trained.history:
        if row["epoch"] == epoch:
            row |= val_figures(logits, labels)


def _inputs(plan: TrainingPlan, part: Collection, num_views: int | None) -> Inputs:
    keys = [found.sha256 or "" for found in part.fingerprints]
    seed = plan.recipe.seed
    if not plan.trains_on_rows:
        return ImageInputs(
            plan.extractor, part.samples, keys, num_views=num_views, seed=seed,
            channels_last=plan.compute.channels_last,
        )  # fmt: skip
    features = plan.features

    def read(indices: Sequence[int], views: Sequence[int]) -> Tensor:
        assert features is not None
        return read_rows(features, part.select(indices), views)

    return RowInputs(
        read, keys, num_views=num_views or 1, seed=seed, device=plan.extractor.device,
        channels_last=plan.compute.channels_last, earlier=plan.earlier,
    )  # fmt: skip


def _pooled(
    plan: TrainingPlan, suffix: torch.nn.Module, inputs: Inputs | None, part: Collection, workers: int
) -> Tensor:
    """Return the frozen network's features of the plain views, fp32 [N, D]."""
    if inputs is None:
        return torch.empty(0)
    if plan.scenario != "freeze" and plan.features is not None:
        return read_rows(plan.features, part).float()
    with plan.compute.precision(plan.extractor.device):
        return network_logits(suffix, inputs, workers=workers)


def _head_without(
    config: FinetuneConfig, probe: FittedHead, features: Tensor, part: Collection, smoothing: float
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return what gives the head of a probe that some training samples were kept from."""
    l2, scaling = "auto", UNCHANGED_SCALINGS
    if not config.hidden_sizes:
        scaling = probe.chosen["scaling"]
        l2 = repr(probe.chosen["l2"]) if "l2" in probe.chosen else l2

    def head_without(out: Tensor) -> dict[str, Tensor]:
        kept = torch.ones(len(features), dtype=torch.bool)
        kept[out] = len(out) == len(features)  # a single image is held out and trained on
        rest = part.select(torch.nonzero(kept).flatten().tolist())
        head = _fit_probe(config, features[kept], rest, Silent(), l2=l2, scaling=scaling).head
        network = make_network(
            torch.nn.Identity(),
            features.shape[1],
            len(part.dataset.class_names),
            config,
            dropout=0.0,
            start=head,
        )
        network.scale_logits(smoothed_scale(head.logits(features[kept]), labels_of(rest), smoothing))
        return {name: value for name, value in network.state_dict().items() if name.startswith(HEAD)}

    return head_without


def _fit_probe(
    config: FinetuneConfig,
    features: Tensor,
    part: Collection,
    progress: Progress,
    *,
    l2: str = "auto",
    scaling: str = UNCHANGED_SCALINGS,
) -> FittedHead:
    """Fit the head that training starts from, with the grid's own defaults."""
    options = dataclasses.replace(
        config, lr=None, dropout=None, epochs=None, patience=None, batch_size=None, l2=l2, l1=0.0,
        label_smoothing=None, scaling=scaling,
    )  # fmt: skip
    return fit_head(
        features, labels_of(part), len(part.dataset.class_names), options, groups=groups_of(part),
        progress=progress,
    ).alone()  # fmt: skip
