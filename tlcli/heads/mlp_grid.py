"""The grid of MLP heads: learning rate x l2 x dropout, networks cross-validated side by side."""

import torch

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import NO_SCORES, FittedHead, Scores, Trials, choose_member
from tlcli.heads.mlp_stack import Grid, TrainedStack, TrainingRows, train_mlps
from tlcli.heads.task import Task
from tlcli.progress import Progress, Silent

AUTO_L2_MLP = (0.3, 10.0)  # decoupled, so times the learning rate: 0.1 to 3 % a step at 0.003


def fit_mlp(task: Task, options: HeadOptions, progress: Progress) -> FittedHead:
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
    rows = TrainingRows(task.features, task.labels, task.targets(), task.row_weights, task.folds)
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
        task.held_out_weights(held),
    )
    trials = Trials(scores, held, torch.ones(len(members), dtype=torch.bool, device=device))
    best = choose_member(scores, trials.foldable)
    best_epochs = trained.best_epoch.view(len(members), task.num_folds)
    epochs = int(best_epochs.median(1).values[best])
    final = train_mlps(
        rows, _mlp_grid([members[best]], [-2], device), options, epochs=epochs, progress=Silent()
    )
    counts = best_epochs.median(1).values.tolist()
    table = scores.table([{**member, "epochs": count} for member, count in zip(members, counts, strict=True)])
    curve = _curve_of(trained, best, len(members), task.num_folds)
    chosen = {**members[best], "epochs": epochs}
    return FittedHead(final.heads[0], chosen, scores.summary(best), table, 0.0, curve, trials)


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
