"""The grid of linear heads: 16 l2 values x 3 scalings of the features, cross-validated as one job."""

import logging

import torch

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, choose_member, finite
from tlcli.heads.conjugate_gradients import Problems
from tlcli.heads.linear import Basis, LinearHead, make_basis
from tlcli.heads.logistic import side_by_side, solve
from tlcli.heads.task import Task
from tlcli.progress import Progress
from tlcli.warned import warn

logger = logging.getLogger(__name__)

AUTO_L2 = tuple(10.0 ** (step / 3) for step in range(-12, 4))  # 1e-4 ... 10, three a decade
FALLBACK_L2 = 0.1  # where nothing can be held out; on the strong side, for data so small
CPU_BUDGET = 1e14  # floating-point operations: about a quarter of an hour on two cores
KEPT_BYTES = 1 << 30  # bases kept between cross-validation and the final fit


def fit_linear(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the linear grid, choose, and solve the chosen head on all rows."""
    l2 = options.l2_values or AUTO_L2
    if not task.num_folds:
        value = FALLBACK_L2 if options.l2 == "auto" else l2[len(l2) // 2]
        basis = make_basis(task.features, "plain")
        chosen = {"scaling": "plain", "l2": value}
        return FittedHead(_solve_one(basis, task, value), chosen, dict(NO_SCORES), [], 0.0)
    tried = options.scalings
    l2, num_measured = _affordable(task, l2, fixed=options.l2 != "auto")
    members = [{"scaling": scaling, "l2": value} for scaling in tried for value in l2]
    progress.start("cross-validating heads", len(members), "heads")
    kept: dict[str, Basis] = {}
    results = []
    num_rows, width = task.features.shape
    at_once = side_by_side(task.features.device, num_rows, min(num_rows, width))
    for scalings in [tried] if at_once else [(name,) for name in tried]:
        bases = [make_basis(task.features, name) for name in scalings]
        results.append(_cross_validate(bases, task, l2, num_measured))
        kept.update({b.scaling: b for b in bases if b.num_bytes * len(tried) <= KEPT_BYTES})
        progress.advance(len(l2) * len(scalings))
    progress.finish()
    scores = Scores(
        torch.cat([part.log_loss for part in results]), torch.cat([part.correct for part in results])
    )
    foldable = torch.tensor([member["scaling"] != "l2-normalised" for member in members])
    best = choose_member(scores, foldable.to(scores.log_loss.device))
    chosen = members[best]
    scaling, value = str(chosen["scaling"]), float(str(chosen["l2"]))
    basis = kept.get(scaling) or make_basis(task.features, scaling)
    head = _solve_one(basis, task, value)
    table = [
        {**member, "cv_top1_accuracy": float(accuracy), "cv_log_loss": finite(loss)}
        for member, accuracy, loss in zip(
            members, scores.correct.double().mean(1), scores.log_loss.mean(1), strict=True
        )
    ]
    return FittedHead(head, dict(chosen), scores.summary(best), table, 0.0)


def _affordable(task: Task, l2: tuple[float, ...], *, fixed: bool) -> tuple[tuple[float, ...], int]:
    """Return the l2 values and the number of folds to measure that fit the budget of work.

    A product costs 2 N r C operations, an iteration two products, a problem about 10 iterations. When the
    whole grid would take too long, every second, then every fourth l2 is tried, then fewer folds.
    """
    num_rows, width = task.features.shape
    each = 10 * 4.0 * num_rows * min(num_rows, width) * task.num_classes * 3
    budget = CPU_BUDGET * (1 if task.features.device.type == "cpu" else 100)
    for stride, folds in ((1, task.num_folds), (2, task.num_folds), (4, task.num_folds), (4, 2), (4, 1)):
        few = l2 if fixed else l2[::-stride][::-1]
        folds = min(folds, task.num_folds)
        if len(few) * folds * each <= budget:
            break
    if len(few) < len(l2) or folds < task.num_folds:
        logger.info(
            "large data: cross-validation tries %d of %d l2 values on %d of %d folds",
            len(few),
            len(l2),
            folds,
            task.num_folds,
        )
    return few, folds


def _cross_validate(bases: list[Basis], task: Task, l2: tuple[float, ...], num_measured: int) -> Scores:
    """Return the held-out results of every scaling and l2; all folds are solved as one job."""
    device = task.labels.device
    fold_ids = torch.arange(num_measured, device=device)
    training = (task.folds[None] != fold_ids[:, None]).float() * task.row_weights
    rows = torch.nonzero((task.folds >= 0) & (task.folds < num_measured))[:, 0]
    held_by, labels = task.folds[rows], task.labels[rows]
    loss = torch.empty(len(bases), len(l2), len(rows), dtype=torch.float64, device=device)
    correct = torch.empty(len(bases), len(l2), len(rows), dtype=torch.bool, device=device)
    problems = Problems(
        task.targets,
        training / training.sum(1, keepdim=True),
        torch.tensor(l2, device=device).repeat_interleave(num_measured),
        fold_ids.repeat(len(l2)),
    )
    weights = solve(bases, problems).weights
    for fold in range(num_measured):
        inside = torch.nonzero(held_by == fold)[:, 0]
        expected = labels[inside].expand(len(l2), -1)
        for number, basis in enumerate(bases):
            by_l2 = weights[number, fold::num_measured]  # [L, C, R]
            outputs = basis.logits(by_l2, rows[inside])
            losses = torch.nn.functional.cross_entropy(outputs, expected, reduction="none")
            loss[number][:, inside] = losses.double()
            correct[number][:, inside] = outputs.argmax(1) == expected
    return Scores(loss.flatten(0, 1), correct.flatten(0, 1))


def _solve_one(basis: Basis, task: Task, l2: float) -> LinearHead:
    """Return the head for one l2 on all rows, on the CPU."""
    device = task.labels.device
    weights = task.row_weights[None] / task.row_weights.sum()
    zero = torch.zeros(1, dtype=torch.long, device=device)
    problems = Problems(task.targets, weights, torch.tensor([l2], device=device), zero)
    solved = solve([basis], problems)
    if not bool(solved.converged.all()):
        gradient = float(solved.gradient.max())
        text = f"the chosen head (l2 {l2:.3g}) stopped short: its gradient is {gradient:.2g}"
        warn("head_stopped_short", text)
    head = basis.head(solved.weights[0, 0])
    return LinearHead(head.weight.cpu(), head.bias.cpu(), head.normalise)
