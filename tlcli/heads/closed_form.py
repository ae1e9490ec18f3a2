"""Ridge, linear discriminants and nearest class means, cross-validated and calibrated.

All training rows are read once for their sums (sums.py), and once more for l2-normalised ones; each fold is
then solved from the sums of the others. An eigendecomposition of X'X would give every penalty at once, and
takes the time of 10 to 20 Cholesky factorisations, of which a fold and scaling has eight; a factorisation in
fp32 with refinement takes half the time of one in fp64.

The scores of a member become probabilities by a temperature, fitted to the held-out rows of all its folds:
one number, so that what the log loss gains by it is small beside its standard error. The final head has the
temperature of its cross-validation. Label smoothing has no meaning here: the temperature would undo it.

Class means take the shares of the classes as their prior or none, whichever holds better; ridge and
discriminants know the shares by themselves (a prior kept out of the temperature made both worse on a set
where 71 % of the images are of one class). With balanced class weights all classes count alike.

A class without rows has the weights of the most frequent class and a bias below it, so that its logits are
finite and it is never the answer.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, Trials, choose_member
from tlcli.heads.discriminants import Discriminants, Ridge, Scorer, nearest_directions, nearest_means
from tlcli.heads.linear import LinearHead
from tlcli.heads.scaled import FoldSums, Scaled, scale
from tlcli.heads.sums import BLOCK, Sums, add_all
from tlcli.heads.task import Task
from tlcli.heads.temperature import fit_temperature
from tlcli.progress import Progress

logger = logging.getLogger(__name__)

AUTO_L2_CLOSED = tuple(10.0 ** (2 * step / 3) for step in range(-4, 4))  # 0.002 ... 100, three in two decades
FALLBACK_L2_CLOSED = 1.0  # where nothing can be held out
BUDGET = 1e12  # floating-point operations of cross-validation: some 20 seconds on two cores

PRIORS = ("equal", "shares")  # of the classes, for class means: the nearest one, or frequent ones first
Solver = Callable[[float], Scorer]


def fit_closed_form(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the grid of ridge, lda or ncm heads, choose, and solve the chosen one on all rows."""
    kind = options.kind
    sums = FoldSums(task, products=kind != "ncm")
    members, num_measured = _affordable(task, options)
    if not num_measured:
        return _unmeasured(task, members[len(members) // 2], sums, kind)
    progress.start("cross-validating heads", len(members), "heads")
    results = []
    every = scale(task.features, options.scalings, rotate=kind != "ncm")
    for scaling, scaled in every.items():
        parts = sums.parts(scaled)
        solvers = [
            _solver(kind, add_all(parts[:fold] + parts[fold + 1 :]), scaled, task)
            for fold in range(num_measured)
        ]
        for member in (found for found in members if found["scaling"] == scaling):
            by_fold = [solve(member.get("l2", 0.0)) for solve in solvers]
            member["temperature"], result = _measure(task, scaled, by_fold, _offset(task, member))
            results.append(result)
            progress.advance(1)
    progress.finish()
    rows = torch.nonzero((task.folds >= 0) & (task.folds < num_measured))[:, 0]
    loss, correct = (torch.stack(found) for found in zip(*results, strict=True))
    scores = Scores(loss, correct, task.held_out_weights(rows))
    foldable = torch.tensor([member["scaling"] != "l2-normalised" for member in members])
    best = choose_member(scores, foldable.to(scores.log_loss.device))
    table = scores.table(members)
    scaled = every[members[best]["scaling"]]
    head = _final(scaled, _solved(task, scaled, members[best], sums, kind), members[best], task)
    trials = Trials(scores, rows, foldable)
    return FittedHead(head, members[best], scores.summary(best), table, 0.0, trials=trials)


def num_closed_form(options: HeadOptions) -> int:
    """Return how many heads the grid has."""
    return len(_members(options, options.l2_values or AUTO_L2_CLOSED))


def _unmeasured(task: Task, member: dict[str, Any], sums: FoldSums, kind: str) -> FittedHead:
    """Return the head of a member, its temperature fitted to the rows it was solved on."""
    scaled = scale(task.features, (member["scaling"],), rotate=kind != "ncm")[member["scaling"]]
    scorer = _solved(task, scaled, member, sums, kind)
    rows = torch.arange(len(task.labels), device=task.labels.device)
    scores = _scores(scaled.head(_present(scorer, task), 1.0), task.features, rows)
    offset = _offset(task, member)
    member["temperature"] = fit_temperature(scores, _labels_of_present(task), task.row_weights, offset)
    return FittedHead(_final(scaled, scorer, member, task), member, dict(NO_SCORES), [], 0.0)


def _solved(task: Task, scaled: Scaled, member: dict[str, Any], sums: FoldSums, kind: str) -> Scorer:
    """Return the scores of a member of the grid from all rows."""
    return _solver(kind, add_all(sums.parts(scaled)), scaled, task)(member.get("l2", 0.0))


def _members(options: HeadOptions, values: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return the hyperparameters of each member of the grid, those of one scaling together."""
    if options.kind == "ncm":
        priors = PRIORS if options.class_weights == "none" else PRIORS[:1]
        return [{"scaling": name, "prior": prior} for name in options.scalings for prior in priors]
    members: list[dict[str, Any]] = [
        {"scaling": name, "l2": l2} for name in options.scalings for l2 in values
    ]
    if options.kind == "lda":
        return [{**member, "shrinkage": member["l2"] / (1.0 + member["l2"])} for member in members]
    return members


def _offset(task: Task, member: dict[str, Any]) -> Tensor:
    """Return what the logits of the classes with rows have beside their scores, fp32 [C']."""
    weights = _class_weights(task)
    logs = weights[weights > 0].float().log() - weights.sum().float().log()
    return logs if member.get("prior") == "shares" else torch.zeros_like(logs)


def _solver(kind: str, sums: Sums, scaled: Scaled, task: Task) -> Solver:
    """Return what gives the scores in the coordinates of `scaled` for a penalty."""
    if kind == "ridge":
        return Ridge(sums).at
    if kind == "lda":
        return Discriminants(sums, task.features.shape[1]).at
    if scaled.unit:  # cosines are between the features and the means themselves, not centred ones
        means = sums.in_units(-scaled.centre / scaled.divisor, 1.0 / scaled.divisor)
        directions = nearest_directions(means).weight * scaled.divisor
        found = Scorer(directions, directions @ (scaled.centre / scaled.divisor))
        return lambda _: found
    nearest = nearest_means(sums)
    return lambda _: nearest


def _measure(
    task: Task, scaled: Scaled, by_fold: list[Scorer], offset: Tensor
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Return the temperature of a member and the log loss and correctness of its held-out rows."""
    rows = torch.nonzero((task.folds >= 0) & (task.folds < len(by_fold)))[:, 0]
    held_by, labels = task.folds[rows], _labels_of_present(task)[rows]
    scores = torch.empty(len(rows), len(offset), device=rows.device)
    for fold, scorer in enumerate(by_fold):
        inside = torch.nonzero(held_by == fold)[:, 0]
        head = scaled.head(_present(scorer, task), 1.0)
        scores[inside] = _scores(head, task.features, rows[inside])
    temperature = fit_temperature(scores, labels, task.row_weights[rows], offset)
    logits = scores / temperature + offset
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return temperature, (losses.double(), logits.argmax(1) == labels)


def _scores(head: LinearHead, features: Tensor, rows: Tensor) -> Tensor:
    """Return the head's outputs for rows of features, fp32 [n, C], a few rows at a time."""
    head = LinearHead(head.weight.to(features.device), head.bias.to(features.device), head.normalise)
    index = rows.to(features.device)
    parts = [head.logits(features[index[start : start + BLOCK]]) for start in range(0, len(index), BLOCK)]
    return torch.cat(parts).to(rows.device)


def _class_weights(task: Task) -> Tensor:
    """Return the weight of all rows of each class, fp64 [C]."""
    weights = task.row_weights.double() if task.row_weights.device.type != "mps" else task.row_weights
    return torch.zeros(task.num_classes, dtype=weights.dtype, device=weights.device).index_add_(
        0, task.labels, weights
    )


def _present(scorer: Scorer, task: Task) -> Scorer:
    """Return the scores of the classes that have rows."""
    present = (_class_weights(task) > 0).to(scorer.weight.device)
    return Scorer(scorer.weight[present], scorer.bias[present])


def _labels_of_present(task: Task) -> Tensor:
    """Return each row's class as its number among the classes that have rows, int64 [N]."""
    return ((_class_weights(task) > 0).long().cumsum(0) - 1)[task.labels]


def _final(scaled: Scaled, scorer: Scorer, member: dict[str, Any], task: Task) -> LinearHead:
    """Return the head of a member on the CPU, with an output for classes without rows."""
    head = scaled.head(scorer, 1.0 / member["temperature"])
    weight, bias = head.weight.cpu(), head.bias.cpu()
    weights = _class_weights(task).cpu()
    absent, most = weights == 0, int(weights.argmax())
    bias[~absent] += _offset(task, member).cpu()
    weight[absent] = weight[most].clone()
    bias[absent] = bias[most] - math.log(2 * len(task.labels))
    return LinearHead(weight, bias, head.normalise)


def _affordable(task: Task, options: HeadOptions) -> tuple[list[dict[str, Any]], int]:
    """Return the members of the grid, and the number of folds to measure, that fit the budget of work.

    A member costs a factorisation and a solution a fold, and a product with the held-out rows. When the whole
    grid would take too long, fewer folds are measured, then every second penalty. Where nothing can be held
    out, one member is left.
    """
    values = options.l2_values or AUTO_L2_CLOSED
    if not task.num_folds:
        plain = tuple(name for name in options.scalings if name == "plain") or options.scalings
        fallback = options.l2_values or (FALLBACK_L2_CLOSED,)
        return _members(dataclasses.replace(options, scaling=plain[0]), fallback), 0
    num_rows, width = task.features.shape
    size, num_classes = min(num_rows, width), task.num_classes
    solving = 0.0 if options.kind == "ncm" else 2 * (size**3 / 3 + 2 * size**2 * num_classes)
    scoring = 2.0 * num_rows / task.num_folds * width * num_classes
    budget = BUDGET * (1 if task.features.device.type in ("cpu", "mps") else 20)
    for stride, folds in ((1, task.num_folds), (1, 2), (1, 1), (2, 1)):
        few = values if options.l2_values else values[::stride]
        members, folds = _members(options, few), min(folds, task.num_folds)
        if len(members) * folds * (solving + scoring) <= budget:
            break
    if folds < task.num_folds:
        count, whole = len(members), num_closed_form(options)
        logger.info(
            "large data: cross-validation tries %d of %d heads on %d of %d folds",
            count, whole, folds, task.num_folds,
        )  # fmt: skip
    return members, folds
