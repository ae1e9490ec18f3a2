"""The grid of linear heads: 16 l2 values x 3 scalings of the features, cross-validated as one job."""

import logging

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, Trials, choose_member
from tlcli.heads.linear import LinearHead, is_wide, make_basis, make_coordinates, unit_rows
from tlcli.heads.logistic import TOLERANCE, Solutions, solve
from tlcli.heads.spaces import Fold, Problems
from tlcli.heads.task import Task
from tlcli.progress import Progress, Silent
from tlcli.warned import warn

logger = logging.getLogger(__name__)

AUTO_L2 = tuple(10.0 ** (step / 3) for step in range(-12, 4))  # 1e-4 ... 10, three a decade
SMALLEST_L2 = 1e-8  # what 0 stands for: the limit that can still be told from 0
LEAST_L2, MOST_L2 = 1e-6, 1e3  # to which the grid goes on where the best l2 is at its end
MOST_STEPS = 3  # of a decade each
NEAR_ZERO_LOSS = 0.02  # nats below which a smaller penalty gains nothing
FALLBACK_L2 = 0.1  # where nothing can be held out; on the strong side, for data so small
TIGHT = TOLERANCE / 8  # of the chosen head, and of every head on few rows, where it costs nothing
FEW_OUTPUTS = 1 << 11  # rows x classes that count as few
CPU_BUDGET = 1e14  # floating-point operations: about a quarter of an hour on two cores

Member = dict[str, object]  # `scaling` and `l2`


def fit_linear(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the linear grid, choose, and solve the chosen head on all rows."""
    l2 = _penalties(options)
    if not task.num_folds:
        value = FALLBACK_L2 if options.l2 == "auto" else l2[len(l2) // 2]
        chosen = {"scaling": "plain", "l2": value}
        return FittedHead(_solve_one(task, "plain", value), chosen, dict(NO_SCORES), [], 0.0)
    l2, num_measured = _affordable(task, l2, fixed=options.l2 != "auto")
    progress.start("cross-validating heads", len(l2) * len(options.scalings), "heads")
    scores = cross_validate(task, options.scalings, l2, num_measured, progress)
    members = [{"scaling": scaling, "l2": value} for scaling in options.scalings for value in l2]
    best = choose_member(scores, _foldable(members, scores))
    if options.l2 == "auto":
        members, scores, best = _extended(task, members, scores, best, num_measured)
    progress.finish()
    chosen = members[best]
    _warn_at_edge(members, scores, best)
    head = _solve_one(task, str(chosen["scaling"]), float(str(chosen["l2"])))
    rows = torch.nonzero((task.folds >= 0) & (task.folds < num_measured))[:, 0]
    trials = Trials(scores, rows, _foldable(members, scores))
    return FittedHead(head, dict(chosen), scores.summary(best), scores.table(members), 0.0, trials=trials)


def _foldable(members: list[Member], scores: Scores) -> Tensor:
    """Return bool [M], whether a member is a plain linear layer on raw features."""
    plain = [member["scaling"] != "l2-normalised" for member in members]
    return torch.tensor(plain, device=scores.log_loss.device)


def _penalties(options: HeadOptions) -> tuple[float, ...]:
    """Return the l2 values of the grid, each once, and say what 0 stands for."""
    given = options.l2_values or AUTO_L2
    if 0.0 in given:
        logger.info("l2 0 has no minimum on data that can be told apart: it is the limit, l2 %g", SMALLEST_L2)
    return tuple(dict.fromkeys(max(value, SMALLEST_L2) for value in given))


def _extended(
    task: Task, members: list[Member], scores: Scores, best: int, num_measured: int
) -> tuple[list[Member], Scores, int]:
    """Extend the grid of the chosen scaling as long as its best l2 lies at an end, in steps of a decade.

    Many classes need penalties below the usual grid. A log loss that is small already is left alone: no
    smaller penalty is worth its time.
    """
    for _ in range(MOST_STEPS):
        scaling, l2 = str(members[best]["scaling"]), float(str(members[best]["l2"]))
        tried = [float(str(member["l2"])) for member in members if member["scaling"] == scaling]
        if l2 not in (min(tried), max(tried)) or float(scores.mean_loss()[best]) < NEAR_ZERO_LOSS:
            break
        towards = -1 if l2 == min(tried) else 1
        more = tuple(l2 * 10.0 ** (towards * step / 3) for step in (1, 2, 3))
        more = tuple(value for value in more if LEAST_L2 * 0.99 < value < MOST_L2 * 1.01)
        if not more:
            break
        text = "the best l2 of scaling %s, %.3g, is at the end of the grid: it goes on to %.3g"
        logger.info(text, scaling, l2, more[-1])
        found = cross_validate(task, (scaling,), more, num_measured, Silent())
        members = [*members, *({"scaling": scaling, "l2": value} for value in more)]
        scores = Scores(
            torch.cat([scores.log_loss, found.log_loss]),
            torch.cat([scores.correct, found.correct]),
            scores.weights,
        )
        best = choose_member(scores, _foldable(members, scores))
    return members, scores, best


def _warn_at_edge(members: list[Member], scores: Scores, best: int) -> None:
    """Warn where a penalty was chosen beyond which none was tried."""
    scaling, l2 = members[best]["scaling"], float(str(members[best]["l2"]))
    tried = [float(str(member["l2"])) for member in members if member["scaling"] == scaling]
    if len(tried) == 1 or l2 not in (min(tried), max(tried)):
        return
    if float(scores.mean_loss()[best]) < NEAR_ZERO_LOSS:
        return
    end, factor = ("smallest", 0.1) if l2 == min(tried) else ("largest", 10.0)
    beyond = ",".join(f"{l2 * factor**step:.0e}" for step in (2, 1))
    text = f"the best l2, {l2:.3g}, is the {end} that was tried; one beyond it may be better:"
    warn("penalty_at_edge", f"{text} --l2 {beyond},{l2:.3g}")


def _affordable(task: Task, l2: tuple[float, ...], *, fixed: bool) -> tuple[tuple[float, ...], int]:
    """Return the l2 values and the number of folds to measure that fit the budget of work.

    A product costs 2 N r C operations, an iteration two products, a problem about 10 iterations. When the
    whole grid would take too long, every third l2 is tried, then every fifth, both ends among them, then
    fewer folds.
    """
    num_rows, width = task.features.shape
    each = 10 * 4.0 * num_rows * min(num_rows, width) * task.num_classes * 3
    budget = CPU_BUDGET * (1 if task.features.device.type == "cpu" else 100)
    for stride, folds in ((1, task.num_folds), (3, task.num_folds), (5, task.num_folds), (5, 2), (5, 1)):
        few = l2 if fixed else l2[::stride]
        folds = min(folds, task.num_folds)
        if len(few) * folds * each <= budget:
            break
    if len(few) < len(l2):
        dropped = ", ".join(f"{value:.2g}" for value in l2 if value not in few)
        text = "large data: cross-validation tries %d of %d l2 values, without %s"
        logger.info(text, len(few), len(l2), dropped)
    if folds < task.num_folds:
        logger.info("large data: cross-validation holds out %d of %d folds", folds, task.num_folds)
    return few, folds


def cross_validate(
    task: Task, scalings: tuple[str, ...], l2: tuple[float, ...], num_measured: int, progress: Progress
) -> Scores:
    """Return the held-out results of every scaling and l2, on the first `num_measured` folds.

    A fold is solved on the rows that it trains on, as if there were no others.
    """
    device = task.labels.device
    rows = torch.nonzero((task.folds >= 0) & (task.folds < num_measured))[:, 0]
    loss = torch.empty(len(scalings), len(l2), len(rows), dtype=torch.float64, device=device)
    correct = torch.empty(len(scalings), len(l2), len(rows), dtype=torch.bool, device=device)
    few = len(task.labels) * task.num_classes <= FEW_OUTPUTS  # one batch then saves calls
    for group in [scalings] if few else [(scaling,) for scaling in scalings]:
        inputs = [scaled_rows(task, scaling) for scaling in group]
        folds = [
            fold
            for scaling, values in zip(group, inputs, strict=True)
            for fold in make_folds(
                task, scaling, values, [task.folds != number for number in range(num_measured)]
            )
        ]
        weights = solve_grid(task, folds, l2).weights
        for place, fold in enumerate(folds):
            inside = torch.nonzero(task.folds[rows] == place % num_measured)[:, 0]
            held = rows[inside]
            outputs = fold.basis.logits(weights[place].flatten(0, 1), inputs[place // num_measured][held])
            outputs = outputs.view(len(l2), task.num_classes, len(held))
            labels = task.labels[held].expand(len(l2), -1)
            index = scalings.index(group[place // num_measured])
            losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
            loss[index][:, inside] = losses.double()
            correct[index][:, inside] = outputs.argmax(1) == labels
        progress.advance(len(l2) * len(group))
    return Scores(loss.flatten(0, 1), correct.flatten(0, 1), task.held_out_weights(rows))


def scaled_rows(task: Task, scaling: str) -> Tensor:
    """Return the features that a basis of `scaling` is made of, fp32 [N, D]."""
    return unit_rows(task.features) if scaling == "l2-normalised" else task.features


def make_fold(task: Task, scaling: str, inputs: Tensor, training: Tensor) -> Fold:
    """Return the rows `training` (bool [N]) of `inputs`, prepared to be solved on."""
    return make_folds(task, scaling, inputs, [training])[0]


def make_folds(task: Task, scaling: str, inputs: Tensor, trainings: list[Tensor]) -> list[Fold]:
    """Return folds that train on the rows `trainings` (bool [N]) of `inputs`, fp32 [N, D].

    They share their coordinates, unless these are not features and every fold divides features differently.
    """
    standardised = scaling == "standardised"
    apart = standardised and is_wide(*inputs.shape)
    whole = None if apart else make_coordinates(inputs)
    folds = []
    for training in trainings:
        rows = torch.nonzero(training)[:, 0]
        if whole is None:
            coordinates = make_coordinates(inputs[rows], standardised=True)
            weights, labels = task.row_weights[rows], task.labels[rows]
            basis = make_basis(coordinates, torch.arange(len(rows), device=rows.device))
        else:
            weights, labels = task.row_weights * training, task.labels
            basis = make_basis(whole, rows, standardised=standardised)
        folds.append(Fold(basis, labels, weights / weights.sum()))
    return folds


def solve_grid(task: Task, folds: list[Fold], l2: tuple[float, ...], *, tight: bool = False) -> Solutions:
    """Solve every l2 on every fold."""
    values = torch.tensor(l2, dtype=torch.float64, device=task.labels.device)
    problems = Problems(folds, task.num_classes, values, task.smoothing)
    tight = tight or len(task.labels) * task.num_classes <= FEW_OUTPUTS
    return solve(problems, tolerance=TIGHT if tight else TOLERANCE)


def _solve_one(task: Task, scaling: str, l2: float) -> LinearHead:
    """Return the head for one l2 on all rows, on the CPU."""
    every = torch.ones_like(task.labels, dtype=torch.bool)
    fold = make_fold(task, scaling, scaled_rows(task, scaling), every)
    solved = solve_grid(task, [fold], (l2,), tight=True)
    if not bool(solved.converged.all()):
        left = float(solved.decrement.max())
        text = f"the chosen head (l2 {l2:.3g}) stopped short of its minimum, by {left:.2g} of its size"
        warn("head_stopped_short", text)
    head = fold.basis.head(solved.weights[0, 0], normalise=scaling == "l2-normalised")
    return LinearHead(head.weight.cpu(), head.bias.cpu(), head.normalise)
