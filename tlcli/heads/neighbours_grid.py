"""The grid of nearest-neighbour heads: how many vote x how much the nearest count, cross-validated at once.

A held-out row asks the rows of the other folds. The most neighbours of the grid are found once; every member
counts the votes of the first of them. Comparing all rows with all is N^2 D operations, so that of large data
a sample of rows is held out and asks all the others.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, Trials, choose_member
from tlcli.heads.neighbours import NeighboursHead, nearest, stored_rows, vote_weights
from tlcli.heads.task import Task
from tlcli.progress import Progress

logger = logging.getLogger(__name__)

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2)  # 0.07 is the usual one
FALLBACK = {"neighbours": 1, "temperature": 0.07}  # where nothing can be held out
FALLBACK_PRIOR_SHARE = 0.1
BUDGET = 5e11  # floating-point operations of finding neighbours in cross-validation
MIN_QUERIES = 2000
STEPS = 50
VOTES = 1 << 25  # votes by class in memory at a time


def num_neighbours(_: HeadOptions) -> int:
    """Return how many heads the grid has; with one neighbour the temperature counts for nothing."""
    return 1 + (len(NEIGHBOURS) - 1) * len(TEMPERATURES)


def fit_neighbours(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the grid of nearest-neighbour heads; the chosen one stores all rows."""
    rows = stored_rows(task.features).to(task.labels.device)
    votes, prior = _votes(task), _prior(task)
    if not task.num_folds:
        head = _head(rows, task, {**FALLBACK, "prior_share": FALLBACK_PRIOR_SHARE})
        return FittedHead(head, {**FALLBACK, "prior_share": FALLBACK_PRIOR_SHARE}, dict(NO_SCORES), [], 0.0)
    queries = _queries(task, options.seed)
    folds, labels = task.folds[queries], task.labels[queries]
    fewest = int(min((task.folds != fold).sum() for fold in range(task.num_folds)))
    members: list[dict[str, Any]] = [
        {"neighbours": count, "temperature": warmth}
        for count in NEIGHBOURS
        for warmth in (TEMPERATURES if count > 1 else TEMPERATURES[1:2])
        if count <= fewest
    ]
    progress.start("cross-validating heads", len(members), "heads")
    most = max(member["neighbours"] for member in members)
    similar, places = nearest(rows[queries].float(), rows, most, query_folds=folds, row_folds=task.folds)
    asked = task.labels[places]
    results = []
    for member in members:
        count = member["neighbours"]
        weights = vote_weights(similar[:, :count], member["temperature"]) * votes[asked[:, :count]]
        weights = weights / weights.sum(1, keepdim=True)
        right = (weights * (asked[:, :count] == labels[:, None])).sum(1)
        member["prior_share"] = _prior_share(right, prior[labels], task.row_weights[queries])
        results.append(_result(member, weights, asked[:, :count], labels, prior))
        progress.advance(1)
    progress.finish()
    loss, correct = (torch.stack(found) for found in zip(*results, strict=True))
    scores = Scores(loss, correct, task.held_out_weights(queries))
    trials = Trials(scores, queries, torch.ones(len(members), dtype=torch.bool, device=labels.device))
    best = choose_member(scores, trials.foldable)
    table = scores.table(members)
    head = _head(rows, task, members[best])
    return FittedHead(head, dict(members[best]), scores.summary(best), table, 0.0, trials=trials)


def _head(rows: Tensor, task: Task, member: dict[str, Any]) -> NeighboursHead:
    """Return the head that stores the rows, on the CPU."""
    return NeighboursHead(
        rows.cpu(), task.labels.cpu().int(), _votes(task).cpu(), _prior(task).cpu(),
        torch.zeros(task.num_classes), **member,
    )  # fmt: skip


def _votes(task: Task) -> Tensor:
    """Return what a row of each class counts, fp32 [C]; 1 for a class without rows."""
    votes = torch.ones(task.num_classes, device=task.labels.device)
    votes[task.labels] = task.row_weights
    return votes


def _prior(task: Task) -> Tensor:
    """Return the smoothed shares of the classes, fp32 [C]: half a row more for each, so that none is 0."""
    counts = torch.bincount(task.labels, minlength=task.num_classes) * _votes(task) + 0.5
    return counts / counts.sum()


def _queries(task: Task, seed: int) -> Tensor:
    """Return the rows that are held out, int64 [Q]: those of all folds, or a sample within the budget."""
    held = torch.nonzero(task.folds >= 0)[:, 0]
    affordable = int(BUDGET / (2 * task.features.numel()))
    affordable = max(MIN_QUERIES, affordable * (1 if held.device.type == "cpu" else 100))
    if len(held) <= affordable:
        return held
    logger.info("large data: cross-validation holds out %d of %d rows", affordable, len(held))
    drawn = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))[:affordable]
    return held[drawn.sort().values.to(held.device)]


def _prior_share(right: Tensor, prior: Tensor, row_weights: Tensor) -> float:
    """Return the share of the prior in the mixture for which held-out rows are likeliest, in (0, 1].

    Expectation-maximisation of a mixture of two, whose likelihood is concave in the share. One row's worth of
    prior is added, so that rows that are all right leave some doubt.

    Args:
        right: fp32 [Q], share of the votes for the row's own class.
        prior: fp32 [Q], of the row's own class.
        row_weights: fp32 [Q].
    """
    share, total = 0.5, float(row_weights.sum()) + 1.0
    for _ in range(STEPS):
        mixed = share * prior
        before, share = (
            share,
            (float((row_weights * mixed / (mixed + (1 - share) * right)).sum()) + 1) / total,
        )
        if abs(share - before) < 1e-4 * share:
            break
    return min(1.0, share)


def _result(
    member: dict[str, Any], weights: Tensor, asked: Tensor, labels: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log loss, fp64 [Q], and whether the answer is right, bool [Q], of held-out rows.

    Args:
        member: With its `prior_share`.
        weights: fp32 [Q, k], the neighbours' shares of the votes.
        asked: int64 [Q, k], their classes.
        labels: int64 [Q].
        prior: fp32 [C].
    """
    share = member["prior_share"]
    at_once = max(1, VOTES // len(prior))
    losses, correct = [], []
    for start in range(0, len(labels), at_once):
        span = slice(start, start + at_once)
        mixed = (share * prior).repeat(len(labels[span]), 1)
        mixed.scatter_add_(1, asked[span], (1 - share) * weights[span])
        losses.append(-mixed.gather(1, labels[span, None])[:, 0].log().double())
        correct.append(mixed.argmax(1) == labels[span])
    return torch.cat(losses), torch.cat(correct)
