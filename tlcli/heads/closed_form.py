"""Ridge, linear discriminants and nearest class means, cross-validated and calibrated.

All training rows are read once or twice, for their sums (sums.py); each fold is then solved from the sums of
the others. An eigendecomposition of X'X would give every penalty at once and takes the time of 20 to 30
Cholesky factorisations, of which a fold and scaling has eleven at most; large data has fewer.

The scores of a member become probabilities by a temperature, fitted to the held-out rows of all its folds:
one number, so that what the log loss gains by it is small beside its standard error. The final head has the
temperature of its cross-validation. Label smoothing has no meaning here: the temperature would undo it.

A class without rows has the weights of the most frequent class and a bias below it, so that its logits are
finite and it is never the answer.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, choose_member, finite
from tlcli.heads.discriminants import Discriminants, Ridge, Scorer, nearest_directions, nearest_means
from tlcli.heads.linear import LinearHead
from tlcli.heads.scaled import FoldSums, Scaled, scale
from tlcli.heads.sums import BLOCK, Sums, add_all
from tlcli.heads.task import Task
from tlcli.heads.temperature import fit_temperature
from tlcli.progress import Progress

logger = logging.getLogger(__name__)

AUTO_L2_CLOSED = tuple(10.0 ** (step / 2) for step in range(-6, 5))  # 1e-3 ... 100, two a decade
FALLBACK_L2_CLOSED = 1.0  # where nothing can be held out
BUDGET = 2e12  # floating-point operations of cross-validation: about half a minute on two cores

Solver = Callable[[float], Scorer]


def fit_closed_form(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the grid of ridge, lda or ncm heads, choose, and solve the chosen one on all rows."""
    kind, values = options.kind, closed_form_l2(options)
    sums = FoldSums(task, products=kind != "ncm")
    if not task.num_folds:
        return _unmeasured(task, options, sums)
    values, num_measured = _affordable(task, kind, values, options)
    members = [_member(kind, scaling, l2) for scaling in options.scalings for l2 in values]
    progress.start("cross-validating heads", len(members), "heads")
    temperatures, results = [], []
    for scaling in options.scalings:
        scaled = scale(task.features, scaling, rotate=kind != "ncm")
        parts = sums.parts(scaled)
        solvers = [
            _solver(kind, add_all(parts[:fold] + parts[fold + 1 :]), scaled, task)
            for fold in range(num_measured)
        ]
        for l2 in values:
            temperature, result = _measure(task, scaled, [solve(l2) for solve in solvers])
            temperatures.append(temperature)
            results.append(result)
            progress.advance(1)
    progress.finish()
    scores = Scores(*(torch.stack(found) for found in zip(*results, strict=True)))
    foldable = torch.tensor([member["scaling"] != "l2-normalised" for member in members])
    best = choose_member(scores, foldable.to(scores.log_loss.device))
    chosen = {**members[best], "temperature": temperatures[best]}
    scaled = scale(task.features, chosen["scaling"], rotate=kind != "ncm")
    final = _solver(kind, add_all(sums.parts(scaled)), scaled, task)(chosen.get("l2", 0.0))
    head = _final(scaled.head(final, 1.0 / temperatures[best]), task)
    table = [
        {**member, "temperature": warmth, "cv_top1_accuracy": float(accuracy), "cv_log_loss": finite(loss)}
        for member, warmth, accuracy, loss in zip(
            members, temperatures, scores.correct.double().mean(1), scores.log_loss.mean(1), strict=True
        )
    ]
    return FittedHead(head, chosen, scores.summary(best), table, 0.0)


def _unmeasured(task: Task, options: HeadOptions, sums: FoldSums) -> FittedHead:
    """Return a head with default hyperparameters, its temperature fitted to the rows it was solved on."""
    kind, values = options.kind, closed_form_l2(options)
    scaling = "plain" if "plain" in options.scalings else options.scalings[0]
    l2 = FALLBACK_L2_CLOSED if options.l2 == "auto" else values[len(values) // 2]
    scaled = scale(task.features, scaling, rotate=kind != "ncm")
    scorer = _solver(kind, add_all(sums.parts(scaled)), scaled, task)(l2)
    rows = torch.arange(len(task.labels), device=task.labels.device)
    scores = _scores(scaled.head(_present(scorer, task), 1.0), task.features, rows)
    temperature = fit_temperature(scores, _labels_of_present(task), task.row_weights)
    head = _final(scaled.head(scorer, 1.0 / temperature), task)
    chosen = {**_member(kind, scaling, l2), "temperature": temperature}
    return FittedHead(head, chosen, dict(NO_SCORES), [], 0.0)


def closed_form_l2(options: HeadOptions) -> tuple[float, ...]:
    """Return the penalties of the grid; one that counts for nothing where the head has none."""
    return (0.0,) if options.kind == "ncm" else options.l2_values or AUTO_L2_CLOSED


def _member(kind: str, scaling: str, l2: float) -> dict[str, Any]:
    """Return the hyperparameters of a member of the grid."""
    if kind == "ncm":
        return {"scaling": scaling}
    shrinkage = {"shrinkage": l2 / (1.0 + l2)} if kind == "lda" else {}
    return {"scaling": scaling, "l2": l2, **shrinkage}


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


def _measure(task: Task, scaled: Scaled, by_fold: list[Scorer]) -> tuple[float, tuple[Tensor, Tensor]]:
    """Return the temperature of a member and the log loss and correctness of its held-out rows."""
    rows = torch.nonzero((task.folds >= 0) & (task.folds < len(by_fold)))[:, 0]
    held_by, labels = task.folds[rows], _labels_of_present(task)[rows]
    num_present = int((_class_weights(task) > 0).sum())
    scores = torch.empty(len(rows), num_present, device=rows.device)
    for fold, scorer in enumerate(by_fold):
        inside = torch.nonzero(held_by == fold)[:, 0]
        head = scaled.head(_present(scorer, task), 1.0)
        scores[inside] = _scores(head, task.features, rows[inside])
    temperature = fit_temperature(scores, labels, task.row_weights[rows])
    losses = torch.nn.functional.cross_entropy(scores / temperature, labels, reduction="none")
    return temperature, (losses.double(), scores.argmax(1) == labels)


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


def _final(head: LinearHead, task: Task) -> LinearHead:
    """Return the head on the CPU, with an output for classes without rows."""
    weight, bias = head.weight.cpu(), head.bias.cpu()
    weights = _class_weights(task).cpu()
    absent, most = weights == 0, int(weights.argmax())
    weight[absent] = weight[most].clone()
    bias[absent] = bias[most] - math.log(2 * len(task.labels))
    return LinearHead(weight, bias, head.normalise)


def _affordable(
    task: Task, kind: str, values: tuple[float, ...], options: HeadOptions
) -> tuple[tuple[float, ...], int]:
    """Return the penalties and the number of folds to measure that fit the budget of work.

    A member costs a factorisation and a solution a fold, and a product with the held-out rows. When the whole
    grid would take too long, every second penalty is tried, then fewer folds.
    """
    num_rows, width = task.features.shape
    size, num_classes = min(num_rows, width), task.num_classes
    solving = 0 if kind == "ncm" else size**3 / 3 + 2 * size**2 * num_classes
    scoring = 2 * num_rows / task.num_folds * width * num_classes
    budget = BUDGET * (1 if task.features.device.type in ("cpu", "mps") else 20)
    fixed = kind == "ncm" or options.l2 != "auto"
    for stride, folds in ((1, task.num_folds), (2, task.num_folds), (2, 3), (2, 2), (2, 1)):
        few = values if fixed else values[::stride]
        folds = min(folds, task.num_folds)
        if len(options.scalings) * len(few) * folds * (2 * solving + scoring) <= budget:
            break
    if len(few) < len(values) or folds < task.num_folds:
        logger.info(
            "large data: cross-validation tries %d of %d heads on %d of %d folds",
            len(few) * len(options.scalings),
            len(values) * len(options.scalings),
            folds,
            task.num_folds,
        )
    return few, folds


def num_closed_form(options: HeadOptions) -> int:
    """Return how many heads the grid has."""
    return len(options.scalings) * len(closed_form_l2(options))
