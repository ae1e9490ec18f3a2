"""Training the backbone's units: inputs, linear probe, network, training, logits of val."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcli.backbones.cut import freeze_parameters
from tlcli.backbones.units import units
from tlcli.config.commands import FinetuneConfig
from tlcli.data.collection import Collection, groups_of, labels_of
from tlcli.features.plan import read_rows
from tlcli.heads.fit import FittedHead, fit_head
from tlcli.heads.head import Head
from tlcli.progress import Progress
from tlcli.runs.directory import RunDirectory
from tlcli.training.checkpoints import Checkpoints
from tlcli.training.inputs import ImageInputs, Inputs, RowInputs
from tlcli.training.loop import Samples, Trained, network_logits, train
from tlcli.training.network import make_network
from tlcli.training.plan import TrainingPlan
from tlcli.training.setting import Setting

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
        probe_accuracy: That head's accuracy on val.
    """

    head: Head
    logits: Tensor | None
    result: Trained
    probe: FittedHead | None
    probe_accuracy: float | None

    def document(self) -> dict[str, Any]:
        """Return what happened, for run.json."""
        probe = None
        if self.probe is not None:
            probe = {"chosen": self.probe.chosen, "val_top1_accuracy": self.probe_accuracy}
        return {
            "epochs": len(self.result.history),
            "steps": self.result.steps,
            "lr": self.result.lr,
            "best_epoch": self.result.best_epoch,
            "probe": probe,
        }


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
    extractor, recipe = plan.extractor, plan.recipe
    num_classes = len(train_part.dataset.class_names)
    device, workers = extractor.device, config.num_workers
    freeze_parameters(extractor.cut)
    suffix = extractor.cut.suffix.to(device)
    train_inputs = _inputs(plan, train_part, plan.num_views)
    val_inputs = _inputs(plan, val_part, 1) if val_part.samples else None
    probe, probe_accuracy = None, None
    if recipe.head_init == "probe":
        train_features, val_features = (
            _pooled(plan, suffix, inputs, part, workers)
            for inputs, part in ((train_inputs, train_part), (val_inputs, val_part))
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
        device=device, amp=plan.compute.amp, channels_last=plan.compute.channels_last, workers=workers,
        unit_of={name: unit.index for unit in units(extractor.backbone.model) for name in unit.parameters},
        num_units=plan.num_units,
        checkpoints=Checkpoints(writer.path), checkpoint_seconds=60 * config.checkpoint_minutes,
        progress=progress, on_epoch=lambda history: writer.write_lines("metrics.jsonl", history),
        tracker=config.tracker, log_dir=writer.path,
    )  # fmt: skip
    val = Samples(val_inputs, labels_of(val_part)) if val_inputs is not None else None
    trained = train(network, recipe, Samples(train_inputs, labels_of(train_part)), val, setting)
    logits = None
    if val_inputs is not None:
        network.to(device)
        logits = network_logits(network, val_inputs, workers=workers)
        network.to("cpu")
    return TrainedBackbone(network.trained_head(), logits, trained, probe, probe_accuracy)


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
        channels_last=plan.compute.channels_last,
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


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
