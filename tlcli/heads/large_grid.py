"""The search of a linear head where a single step takes seconds: many rows, many features, many classes.

The whole grid would take hours there, so it is searched:

- The scaling is chosen on a sample of the rows, with a few l2 of the grid.
- The l2 is sought on all rows but one fold, from the sample's best towards smaller ones (the mean loss of
  more rows needs less penalty), each solution starting from the one before, until the held-out log loss has
  risen; upwards if it rose at once.
- The chosen head starts from the solution without the fold, and is solved on all rows.
"""

import dataclasses
import logging
import math
from typing import Any

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import FittedHead, Scores, Trials, choose_member
from tlcli.heads.conjugate_gradients import Solver
from tlcli.heads.linear import (
    Basis,
    Coordinates,
    LinearHead,
    is_wide,
    make_basis,
    make_coordinates,
    unit_rows,
)
from tlcli.heads.linear_grid import cross_validate
from tlcli.heads.spaces import Fold, Problems, make_spaces
from tlcli.heads.task import Task
from tlcli.progress import Progress, Silent
from tlcli.warned import warn

logger = logging.getLogger(__name__)

LARGE_WORK = 1e11  # operations of a step, 4 N D C, from which the grid is searched: about a second
SAMPLE_WORK = 2e10  # of a step on the sample
SAMPLE_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
STEP = 10.0**0.5  # between the l2 values sought
LEAST_L2, MOST_L2 = 1e-6, 1e2
SEARCH_TOLERANCE = 2e-2  # decrement, where heads are only compared
TOLERANCE = 4e-3  # of the chosen head
MOST_VALUES = 9  # of l2 that are sought
PATIENCE = 0  # values without a smaller loss after which the search ends
LOSS_BLOCK = 4096  # rows whose outputs are held at once


def is_large(task: Task) -> bool:
    """Return whether the grid is searched rather than tried whole: neither on a GPU nor on few rows."""
    if task.labels.device.type != "cpu" or is_wide(*task.features.shape):
        return False
    return 4.0 * task.features.numel() * task.num_classes >= LARGE_WORK


def fit_large(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Search scaling and l2, and solve the chosen head on all rows."""
    scaling, start = _sampled(task, options)
    text = "large data: a sample of the rows says scaling %s and l2 %.2g; l2 is sought downwards from there"
    logger.info(text, scaling, start)
    inputs = unit_rows(task.features) if scaling == "l2-normalised" else task.features
    coordinates = make_coordinates(inputs)
    del inputs  # rows divided by their norm are a copy
    training = task.folds != 0
    rows = torch.nonzero(~training)[:, 0]
    fold = _fold(task, coordinates, scaling, training)
    progress.start("searching the penalty", MOST_VALUES, "heads")
    members, scores, weights = _searched(task, fold, scaling, start, progress)
    progress.finish()
    foldable = torch.full((len(members),), scaling != "l2-normalised", device=task.labels.device)
    best = choose_member(scores, foldable)
    whole = _fold(task, coordinates, scaling, torch.ones_like(training))
    first = whole.basis.inverse(fold.basis.inward(weights))
    weights, decrement = solved_from(task, whole, float(members[best]["l2"]), TOLERANCE, first)
    if decrement > TOLERANCE:
        text = f"the chosen head stopped short of its minimum, by {decrement:.2g} of its size"
        warn("head_stopped_short", text)
    head = whole.basis.head(weights, normalise=scaling == "l2-normalised")
    head = LinearHead(head.weight.cpu(), head.bias.cpu(), head.normalise)
    trials = Trials(scores, rows, foldable)
    table = scores.table(members)
    return FittedHead(head, dict(members[best]), scores.summary(best), table, 0.0, trials=trials)


def _sampled(task: Task, options: HeadOptions) -> tuple[str, float]:
    """Return the scaling and the l2 that are best on a sample of the rows, by one fold of it."""
    width, num_classes = task.features.shape[1], task.num_classes
    count = min(len(task.labels), max(4 * num_classes, int(SAMPLE_WORK / (4.0 * width * num_classes))))
    order = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(options.seed))
    rows = order[:count].to(task.labels.device)
    part = dataclasses.replace(
        task,
        features=task.features[rows.to(task.features.device)],
        labels=task.labels[rows],
        row_weights=task.row_weights[rows],
        folds=task.folds[rows],
        groups=task.groups[rows],
    )
    scores = cross_validate(part, options.scalings, SAMPLE_L2, 1, Silent())
    members = [(scaling, l2) for scaling in options.scalings for l2 in SAMPLE_L2]
    foldable = [scaling != "l2-normalised" for scaling, _ in members]
    return members[choose_member(scores, torch.tensor(foldable, device=scores.log_loss.device))]


def _fold(task: Task, coordinates: Coordinates, scaling: str, training: Tensor) -> Fold:
    """Return the rows `training` (bool [N]), prepared to be solved on."""
    rows = torch.nonzero(training)[:, 0]
    basis = make_basis(coordinates, rows, standardised=scaling == "standardised")
    weights = task.row_weights * training
    return Fold(basis, task.labels, weights / weights.sum())


def _searched(
    task: Task, fold: Fold, scaling: str, start: float, progress: Progress
) -> tuple[list[dict[str, Any]], Scores, Tensor]:
    """Return the members that were tried, their held-out results, and the weights of the best."""
    rows = torch.nonzero(fold.row_weights == 0)[:, 0]
    members: list[dict[str, Any]] = []
    losses, hits = [], []
    scores, kept = Scores(torch.empty(0), torch.empty(0)), torch.empty(0)
    for factor in (1.0 / STEP, STEP):
        value, weights, worse = min(start, MOST_L2), None, 0
        if factor > 1.0:  # upwards only if the largest was the best
            if len(members) > 1 and int(scores.mean_loss().argmin()) > 0:
                break
            value, weights = value * STEP, kept
        while worse <= PATIENCE and len(members) < MOST_VALUES and LEAST_L2 * 0.99 <= value <= MOST_L2 * STEP:
            weights, _ = solved_from(task, fold, value, SEARCH_TOLERANCE, weights)
            loss, hit = _held_out(task, fold.basis, weights, rows)
            members.append({"scaling": scaling, "l2": value})
            losses.append(loss)
            hits.append(hit)
            progress.advance()
            scores = Scores(torch.stack(losses), torch.stack(hits), task.held_out_weights(rows))
            if int(scores.mean_loss().argmin()) == len(members) - 1:
                kept, worse = weights, 0
            else:
                worse += 1
            value *= factor
    return members, scores, kept


def solved_from(
    task: Task, fold: Fold, l2: float, tolerance: float, start: Tensor | None
) -> tuple[Tensor, float]:
    """Solve one problem from known weights.

    Args:
        task: Of the fold.
        fold: The rows.
        l2: Penalty.
        tolerance: Decrement at which it is solved.
        start: Weights [C, r + 1] in the basis; zeros if None.

    Returns:
        Weights fp32 [C, r + 1] and the decrement reached.
    """
    values = torch.tensor([l2], dtype=torch.float64, device=task.labels.device)
    problems = Problems([fold], task.num_classes, values, task.smoothing)
    solver = Solver(make_spaces(problems), problems, tolerance)
    two = task.num_classes == 2
    if start is not None:
        solver.weights = ((start[:1] - start[1:]) * math.sqrt(0.5) if two else start)[None].contiguous()
    solver.run(recompute=start is not None)
    found = solver.solution[0]
    weights = torch.cat([found, -found]) * math.sqrt(0.5) if two else found
    return weights, float(solver.reached[0])


def _held_out(task: Task, basis: Basis, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log loss, fp64, and whether top-1 is right, of held-out `rows`, [N'] each."""
    moved = basis.inward(weights)
    losses, hits = [], []
    for part in rows.split(LOSS_BLOCK):  # type: ignore[no-untyped-call]
        outputs = basis.coordinates.values[part] @ moved.T
        labels = task.labels[part]
        losses.append(torch.nn.functional.cross_entropy(outputs, labels, reduction="none").double())
        hits.append(outputs.argmax(1) == labels)
    return torch.cat(losses), torch.cat(hits)
