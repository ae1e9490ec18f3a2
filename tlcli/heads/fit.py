"""A grid of heads on frozen features, chosen by cross-validation inside train.

The linear grid is 16 l2 values x 3 scalings of the features (linear.py, solved by logistic.py), the grid of
MLP heads learning rate x l2 x dropout (mlp.py). Folds are stratified by class and never divide a group
(folds.py); rows that are not train are never looked at. Scaling and rotation use the features of all train
rows, never their labels.

How a head is chosen: every grid member is scored by the mean log loss of its held-out rows, which is finer
than accuracy (that moves in steps of 1/N, and on small sets many members tie). The smallest wins, with one
preference: a head that l2-normalises its input is no plain linear layer, so it gives way to the best head
that is one (and that timm can load) when that is at most one standard error worse.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.data.folds import assign_folds
from tlcli.errors import DataError
from tlcli.heads.conjugate_gradients import Problems
from tlcli.heads.head import Head
from tlcli.heads.linear import Basis, LinearHead, make_basis
from tlcli.heads.logistic import side_by_side, solve
from tlcli.heads.mlp import Grid, TrainedStack, TrainingRows, train_mlps
from tlcli.progress import Progress, Silent
from tlcli.warned import warn

logger = logging.getLogger(__name__)

AUTO_L2 = tuple(10.0 ** (step / 3) for step in range(-12, 4))  # 1e-4 ... 10, three a decade
AUTO_L2_MLP = (0.3, 10.0)  # decoupled, so times the learning rate: 0.1 to 3 % a step at 0.003
FALLBACK_L2 = 0.1  # where nothing can be held out; on the strong side, for data so small
CPU_BUDGET = 1e14  # floating-point operations: about a quarter of an hour on two cores
KEPT_BYTES = 1 << 30  # bases kept between cross-validation and the final fit


@dataclass(frozen=True)
class FittedHead:
    """The chosen head, trained on all rows, and how it was chosen.

    Attributes:
        head: Applies to raw features.
        chosen: Hyperparameters of the chosen grid member.
        cv: `folds`, `num_samples` (rows held out once), `top1_accuracy`, `top1_accuracy_standard_error`,
            `log_loss`, `log_loss_standard_error`; the scores are None where nothing could be held out.
        table: One dict a grid member: its hyperparameters, `cv_top1_accuracy` and `cv_log_loss`.
        seconds: Wall time of the whole fit.
        curve: For MLP heads one dict an epoch with `epoch`, `train_loss` and `cv_loss`; else empty.
    """

    head: Head
    chosen: dict[str, Any]
    cv: dict[str, Any]
    table: list[dict[str, Any]]
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What a head is fitted to.

    Attributes:
        features: fp32 [N, D] on the device, or on the CPU when they do not fit there.
        labels: int64 [N] on the device.
        targets: fp32 [C, N], smoothed one-hot columns.
        row_weights: fp32 [N], from the class weights, mean 1.
        folds: int64 [N], the fold that holds the row out, -1 where it always trains.
        num_folds: How many folds there are; 0 when nothing can be held out.
    """

    features: Tensor
    labels: Tensor
    targets: Tensor
    row_weights: Tensor
    folds: Tensor
    num_folds: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.targets)


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
    _check(features, labels, num_classes)
    task = _task(features, labels, num_classes, options, groups, torch.device(device))
    progress = progress or Silent()
    fitted = (_fit_mlp if options.hidden_sizes else _fit_linear)(task, options, progress)
    fitted.cv["folds"] = task.num_folds
    return FittedHead(
        fitted.head, fitted.chosen, fitted.cv, fitted.table, time.perf_counter() - started, fitted.curve
    )


def _check(features: Tensor, labels: Tensor, num_classes: int) -> None:
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


def _task(
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
        logger.info("too few images for cross-validation: the head takes default hyperparameters, unmeasured")
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
    smoothing = options.label_smoothing or 0.0
    one_hot = torch.nn.functional.one_hot(labels.long().cpu(), num_classes).T.float()
    targets = one_hot * (1.0 - smoothing) + smoothing / num_classes
    return Task(
        features.detach().to(home, torch.float32),
        labels.to(device, torch.long),
        targets.contiguous().to(device),
        per_class[labels.long().cpu()].to(device),
        torch.from_numpy(folds).to(device),
        num_folds,
    )


def _fits(features: Tensor, device: torch.device) -> bool:
    """Return whether the features and their three rotated copies fit on the device with room to work."""
    return device.type != "cuda" or 24 * features.numel() < torch.cuda.mem_get_info(device)[0]


# ---- choosing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Held-out results of grid members.

    Attributes:
        log_loss: fp64 [M, N'] of every held-out row, for each of M members.
        correct: bool [M, N'].
    """

    log_loss: Tensor
    correct: Tensor

    def summary(self, member: int) -> dict[str, Any]:
        """Return the means and standard errors of one member."""
        count = self.log_loss.shape[1]
        correct, loss = self.correct[member].double(), self.log_loss[member]
        accuracy = float(correct.mean())
        return {
            "num_samples": count,
            "top1_accuracy": accuracy,
            "top1_accuracy_standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
            "log_loss": float(loss.mean()),
            "log_loss_standard_error": float(loss.std(correction=0)) / count**0.5,
        }


NO_SCORES: dict[str, Any] = {
    "num_samples": 0,
    "top1_accuracy": None,
    "top1_accuracy_standard_error": None,
    "log_loss": None,
    "log_loss_standard_error": None,
}


def choose_member(scores: Scores, foldable: Tensor) -> int:
    """Return the grid member to use, by the rule in this module's docstring.

    Args:
        scores: Held-out results of M members.
        foldable: bool [M], whether the member is a plain linear layer on raw features.
    """
    mean = scores.log_loss.mean(1).nan_to_num(torch.inf)  # a head that diverged must not win
    best = int(mean.argmin())
    if bool(foldable[best]) or not bool(foldable.any()):
        return best
    rival = int(torch.where(foldable, mean, torch.inf).argmin())
    error = float(scores.log_loss[best].std(correction=0)) / scores.log_loss.shape[1] ** 0.5
    return rival if float(mean[rival]) <= float(mean[best]) + error else best


def _finite(value: Tensor) -> float | None:
    """Return a number for a JSON document, None where there is none."""
    return float(value) if bool(torch.isfinite(value)) else None


# ---- the linear grid --------------------------------------------------------------------------------------


def _fit_linear(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
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
        {**member, "cv_top1_accuracy": float(accuracy), "cv_log_loss": _finite(loss)}
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


# ---- the grid of MLP heads --------------------------------------------------------------------------------


def _fit_mlp(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
    """Cross-validate the grid of MLP heads, choose, and train the chosen one on all rows.

    The final network trains for the median of the best epochs its folds found.
    """
    l2 = options.l2_values or AUTO_L2_MLP
    settings = options.mlp_grid()
    members = [
        {"lr": lr, "l2": penalty, "dropout": rate}
        for lr in settings.lr
        for penalty in l2
        for rate in settings.dropout
    ]
    rows = TrainingRows(task.features, task.labels, task.targets, task.row_weights, task.folds)
    device = task.labels.device
    if not task.num_folds:
        member = members[len(members) // 2]
        final = train_mlps(
            rows, _mlp_grid([member], [-2], device), options, epochs=settings.epochs, progress=Silent()
        )
        chosen = {**member, "epochs": settings.epochs}
        return FittedHead(final.heads[0], chosen, dict(NO_SCORES), [], 0.0)
    progress.start("cross-validating heads", len(members) * task.num_folds, "networks")
    folds = list(range(task.num_folds))
    trained = train_mlps(
        rows, _mlp_grid(members, folds, device), options, epochs=settings.epochs, progress=progress
    )
    progress.finish()
    held = torch.nonzero(task.folds >= 0)[:, 0]
    by_member = (len(members), task.num_folds, -1)
    held_by = task.folds[held]
    scores = Scores(
        trained.log_loss.view(by_member)[:, held_by, held].double(),
        trained.correct.view(by_member)[:, held_by, held],
    )
    best = choose_member(scores, torch.ones(len(members), dtype=torch.bool, device=device))
    best_epochs = trained.best_epoch.view(len(members), task.num_folds)
    epochs = int(best_epochs.median(1).values[best])
    final = train_mlps(
        rows, _mlp_grid([members[best]], [-2], device), options, epochs=epochs, progress=Silent()
    )
    table = [
        {**member, "epochs": int(count), "cv_top1_accuracy": float(accuracy), "cv_log_loss": _finite(loss)}
        for member, count, accuracy, loss in zip(
            members,
            best_epochs.median(1).values,
            scores.correct.double().mean(1),
            scores.log_loss.mean(1),
            strict=True,
        )
    ]
    curve = _curve_of(trained, best, len(members), task.num_folds)
    chosen = {**members[best], "epochs": epochs}
    return FittedHead(final.heads[0], chosen, scores.summary(best), table, 0.0, curve)


def _curve_of(trained: TrainedStack, member: int, num_members: int, num_folds: int) -> list[dict[str, float]]:
    """Return the losses of one member by epoch, means over its folds, up to where the first fold stopped."""
    losses = [
        curve.view(len(curve), num_members, num_folds)[:, member].mean(1).tolist()
        for curve in (trained.train_loss, trained.held_out_loss)
    ]
    return [
        {"epoch": epoch, "train_loss": train, "cv_loss": held_out}
        for epoch, (train, held_out) in enumerate(zip(*losses, strict=True), start=1)
        if train == train  # NaN from where the first fold has stopped: a mean of the others would jump
    ]


def _mlp_grid(members: list[dict[str, float]], folds: list[int], device: torch.device) -> Grid:
    """Return the networks for every member and fold, folds innermost."""
    values = {
        name: torch.tensor([member[name] for member in members for _ in folds], device=device)
        for name in ("lr", "l2", "dropout")
    }
    fold = torch.tensor(folds * len(members), device=device)
    return Grid(values["lr"], values["l2"], values["dropout"], fold)
