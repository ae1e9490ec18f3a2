"""A grid of heads on frozen features, chosen by cross-validation inside train.

The linear grid is in linear_grid.py, the grid of MLP heads in mlp_grid.py, how one is chosen in choice.py.
Folds are stratified by class and never divide a group (folds.py); rows that are not train are never looked
at.
"""

import dataclasses
import time

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import FittedHead
from tlcli.heads.linear_grid import AUTO_L2, fit_linear
from tlcli.heads.mlp_grid import AUTO_L2_MLP, fit_mlp
from tlcli.heads.task import check_features, make_task
from tlcli.progress import Progress, Silent


def num_heads(options: HeadOptions) -> int:
    """Return how many heads the grid of `options` has; large data is tried with fewer."""
    if options.hidden_sizes:
        settings = options.mlp_grid()
        return len(settings.lr) * len(options.l2_values or AUTO_L2_MLP) * len(settings.dropout)
    return len(options.l2_values or AUTO_L2) * len(options.scalings)


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    options: HeadOptions,
    *,
    groups: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> FittedHead:
    """Choose a head by cross-validation and train it on all rows.

    Args:
        features: fp32 [N, D], raw pooled features.
        labels: int64 [N] in [0, num_classes).
        num_classes: Number of classes; classes without rows are allowed.
        options: The head and its grid.
        groups: int64 [N]; rows of one group are never divided by a fold (copies of one image, one patient).
        device: Where to compute.
        progress: Told of grid members finished.

    Raises:
        DataError: The features are not a finite matrix with a label a row.
    """
    started = time.perf_counter()
    check_features(features, labels, num_classes)
    task = make_task(features, labels, num_classes, options, groups, torch.device(device))
    progress = progress or Silent()
    fitted = (fit_mlp if options.hidden_sizes else fit_linear)(task, options, progress)
    fitted.cv["folds"] = task.num_folds
    return dataclasses.replace(fitted, seconds=time.perf_counter() - started)
