"""A grid of heads on frozen features, chosen by cross-validation inside train.

The linear grid is in linear_grid.py, the grid of MLP heads in mlp_grid.py, ridge, linear discriminants and
class means in closed_form.py, nearest neighbours in neighbours_grid.py, how one is chosen in choice.py.
Folds are stratified by class and never divide a group (folds.py); rows that are not train are never looked
at.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tlcli.config.head import CLOSED_FORM, HeadKind, HeadOptions
from tlcli.heads.choice import FittedHead
from tlcli.heads.closed_form import fit_closed_form, num_closed_form
from tlcli.heads.head import Head
from tlcli.heads.large_grid import fit_large, is_large
from tlcli.heads.linear_grid import AUTO_L2, fit_linear
from tlcli.heads.mlp_grid import AUTO_L2_MLP, fit_mlp
from tlcli.heads.neighbours_grid import fit_neighbours, num_neighbours
from tlcli.heads.nested import HeldOut, bootstrapped, nested, only_member, outer_folds
from tlcli.heads.task import Task, check_features, comfortable, make_task
from tlcli.progress import Progress, Silent

FITTERS: dict[HeadKind, Callable[[Task, HeadOptions, Progress], FittedHead]] = {
    "linear": fit_linear,
    "mlp": fit_mlp,
    "knn": fit_neighbours,
    "ncm": fit_closed_form,
    "lda": fit_closed_form,
    "ridge": fit_closed_form,
}
NESTED_ROWS = 1000  # up to which early stopping's gain is worth training all networks several times


def num_heads(options: HeadOptions) -> int:
    """Return how many heads the grid of `options` has; large data is tried with fewer."""
    if options.kind == "knn":
        return num_neighbours(options)
    if options.kind in CLOSED_FORM:
        return num_closed_form(options)
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
        options: The head and its grid. Label smoothing is for `linear` and `mlp`.
        groups: int64 [N]; rows of one group are never divided by a fold (copies of one image, one patient).
        device: Where to compute.
        progress: Told of grid members finished.

    Raises:
        DataError: The features are not a finite matrix with a label a row.
    """
    started = time.perf_counter()
    check_features(features, labels, num_classes)
    factor = comfortable(features)
    features = features if factor == 1.0 else features * factor
    task = make_task(features, labels, num_classes, options, groups, torch.device(device))
    fitted = _choose(task, options, progress or Silent())
    if factor != 1.0:
        fitted = dataclasses.replace(fitted, head=fitted.head.rescaled(factor))
    fitted.cv["folds"] = task.num_folds
    return dataclasses.replace(fitted, task=task, seconds=time.perf_counter() - started)


def held_out_scores(
    fitted: FittedHead, options: HeadOptions, progress: Progress | None = None
) -> HeldOut | None:
    """Return the cross-validation results of a chosen head, corrected for its having been chosen.

    MLP heads on few rows are chosen and trained anew without each fold, since the epoch they stop at is
    chosen on held-out rows too; other choices are corrected by the bootstrap of their results (nested.py).

    Args:
        fitted: From `fit_head`.
        options: The same as there.
        progress: Told of folds finished.

    Returns:
        None where nothing could be held out.
    """
    task, trials = fitted.task, fitted.trials
    if task is None or trials is None:
        return None
    progress = progress or Silent()
    if options.hidden_sizes and len(task.labels) <= NESTED_ROWS:
        progress.start("cross-validating the choice", outer_folds(task)[1], "folds")

        def again(part: Task) -> Head:
            progress.advance()
            return _choose(part, options, Silent()).head

        found = nested(task, again)
        progress.finish()
        return found
    if len(trials.scores.log_loss) == 1 and not options.hidden_sizes:
        return only_member(trials)
    return bootstrapped(trials, task.groups[trials.rows].cpu().numpy(), options.seed)


def _choose(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    if options.kind == "linear" and options.l2 == "auto" and task.num_folds and is_large(task):
        return fit_large(task, options, progress)
    return FITTERS[options.kind](task, options, progress)
