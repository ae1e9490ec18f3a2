"""What a head is fitted to: features, targets, class weights and folds."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.data.folds import assign_folds
from tlcli.errors import DataError
from tlcli.warned import warn

logger = logging.getLogger(__name__)

LARGEST = 1e36  # features whose weights are still normal numbers of fp32


@dataclass(frozen=True)
class Task:
    """What a head is fitted to.

    Attributes:
        features: fp32 [N, D] on the device, or on the CPU when they do not fit there.
        labels: int64 [N] on the device.
        num_classes: C.
        smoothing: Share of each target spread over all classes.
        row_weights: fp32 [N], from the class weights, mean 1.
        folds: int64 [N], the fold that holds the row out, -1 where it always trains.
        num_folds: How many folds there are; 0 when nothing can be held out.
        groups: int64 [N], equal for rows that no fold divides.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    smoothing: float
    row_weights: Tensor
    folds: Tensor
    num_folds: int
    groups: Tensor

    def held_out_weights(self, rows: Tensor) -> Tensor | None:
        """Return how much rows [N] count where heads are compared, fp64; None where all do alike."""
        weights = self.row_weights[rows].double()
        return None if bool((weights == weights[0]).all()) else weights

    def targets(self) -> Tensor:
        """Return the smoothed one-hot columns, fp32 [C, N]."""
        shape = (self.num_classes, len(self.labels))
        even = torch.full(shape, self.smoothing / self.num_classes, device=self.labels.device)
        own = even.new_full((1, len(self.labels)), 1.0 - self.smoothing)
        return even.scatter_add_(0, self.labels[None], own)


def check_features(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuse what no head can be fitted to."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or 0 in features.shape:
        raise DataError(
            f"A head needs features [N, D] and labels [N], not {list(features.shape)}, {list(labels.shape)}.",
            hint="Activation maps must be pooled first.",
        )
    if num_classes < 2:
        raise DataError(
            f"A classifier needs two classes or more, not {num_classes}.",
            hint="Add a folder for another class.",
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"Labels must lie in 0..{num_classes - 1}; got {int(labels.min())}..{int(labels.max())}."
        )
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite)[:, 0]
        raise DataError(
            f"{len(bad)} of {len(features)} feature rows are not finite, the first is row {int(bad[0])}.",
            hint="Extract them again with --dtype fp32; if they stay, the backbone's weights are broken.",
        )
    if float(features.abs().max()) > LARGEST:
        raise DataError(
            f"The largest feature is {float(features.abs().max()):.1e}; a head holds up to {LARGEST:.0e}.",
            hint="The backbone's weights are broken or its images are not normalised as it expects.",
        )
    if bool((features == features[:1]).all()):
        text = f"all {len(features)} images have the same features, so that a head can only name the most"
        warn("constant_features", f"{text} frequent class; is the backbone's weights file the right one?")
    if bool((labels == labels[0]).all()) and len(labels) > 1:
        text = f"all {len(labels)} images trained on are of one class of {num_classes}"
        warn("one_class", f"{text}: the head names it for every image")


def comfortable(features: Tensor) -> float:
    """Return the power of two that brings features far from 1 near it, 1 for others.

    Squares of what is near an end of fp32's range are infinite or 0.
    """
    largest = float(features.abs().max())
    if largest == 0.0 or 1e-12 <= largest <= 1e12:
        return 1.0
    return float(2.0 ** -round(math.log2(largest)))


def make_task(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    options: HeadOptions,
    groups: Tensor | None,
    device: torch.device,
) -> Task:
    """Put features on the device and work out targets, class weights and folds."""
    home = device
    labels_array = labels.cpu().numpy()
    groups_array = np.arange(len(labels)) if groups is None else groups.cpu().numpy()
    folds, num_folds = assign_folds(labels_array, groups_array, options.folds, options.seed)
    if not num_folds:
        text = "too few images for cross-validation, which needs two independent ones of a class"
        warn("unmeasured_head", f"{text}: the head takes default hyperparameters, unmeasured")
    elif num_folds < options.folds:
        reason = "no class has more independent images"
        logger.info("cross-validation uses %d folds instead of %d: %s", num_folds, options.folds, reason)
    counts = torch.from_numpy(np.bincount(labels_array, minlength=num_classes)).float()
    per_class = torch.ones(num_classes)
    if options.class_weights == "balanced":
        per_class = torch.where(
            counts > 0, len(labels) / (counts.clamp_min(1) * int((counts > 0).sum())), 1.0
        )
    if not _fits(features, device):
        logger.info("the features do not fit on %s: linear heads run on the CPU, MLPs in minibatches", device)
        device = device if options.hidden_sizes else torch.device("cpu")
        home = torch.device("cpu")
    return Task(
        features.detach().to(home, torch.float32),
        labels.to(device, torch.long),
        num_classes,
        options.label_smoothing or 0.0,
        per_class[labels.long().cpu()].to(device),
        torch.from_numpy(folds).to(device),
        num_folds,
        torch.from_numpy(groups_array).to(device),
    )


def _fits(features: Tensor, device: torch.device) -> bool:
    """Return whether the features and their three rotated copies fit on the device with room to work."""
    return device.type != "cuda" or 24 * features.numel() < torch.cuda.mem_get_info(device)[0]
