"""How one head of a grid is chosen by its held-out rows.

Every grid member is scored by the mean log loss of its held-out rows, weighted as the classes are. That is
finer than accuracy, which moves in steps of 1/N, so that on small sets many members tie. The smallest wins,
with one preference: a head that l2-normalises its input is no plain linear layer, so it gives way to the best
head that is one (and that timm can load) when that is at most one standard error worse.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tlcli.heads.head import Head
from tlcli.heads.task import Task


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
        trials: What it was chosen by; None where nothing could be held out.
        task: What it was fitted to.
    """

    head: Head
    chosen: dict[str, Any]
    cv: dict[str, Any]
    table: list[dict[str, Any]]
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)
    trials: "Trials | None" = None
    task: Task | None = None

    def alone(self) -> "FittedHead":
        """Return it without what it was fitted to and chosen by, which may be large."""
        return dataclasses.replace(self, task=None, trials=None)


@dataclass(frozen=True)
class Scores:
    """Held-out results of grid members.

    Attributes:
        log_loss: fp64 [M, N'] of every held-out row, for each of M members.
        correct: bool [M, N'].
        weights: fp64 [N'], from the class weights; None where classes weigh the same.
    """

    log_loss: Tensor
    correct: Tensor
    weights: Tensor | None = None

    def take(self, index: Tensor) -> "Scores":
        """Return the results of the rows at `index`, int64 [K]."""
        weights = None if self.weights is None else self.weights[index]
        return Scores(self.log_loss[:, index], self.correct[:, index], weights)

    def mean_loss(self) -> Tensor:
        """Return the log loss by which members are compared, fp64 [M]: of rows as the classes weigh."""
        if self.weights is None:
            return self.log_loss.mean(1)
        return (self.log_loss * self.weights).sum(1) / self.weights.sum()

    def summary(self, member: int) -> dict[str, Any]:
        """Return the means and standard errors of one member."""
        count = self.log_loss.shape[1]
        correct, loss = self.correct[member].double(), self.log_loss[member]
        accuracy = float(correct.mean())
        weighted = {} if self.weights is None else {"weighted_log_loss": float(self.mean_loss()[member])}
        return {
            "num_samples": count,
            "top1_accuracy": accuracy,
            "top1_accuracy_standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
            "log_loss": float(loss.mean()),
            "log_loss_standard_error": float(loss.std(correction=0)) / count**0.5,
            **weighted,
        }

    def table(self, members: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one dict a member: what it is, and its mean held-out results."""
        rows = []
        for number, member in enumerate(members):
            found = {
                "cv_top1_accuracy": float(self.correct[number].double().mean()),
                "cv_log_loss": finite(self.log_loss[number].mean()),
            }
            if self.weights is not None:
                found["cv_weighted_log_loss"] = finite(self.mean_loss()[number])
            rows.append({**member, **found})
        return rows


@dataclass(frozen=True)
class Trials:
    """What a head was chosen by.

    Attributes:
        scores: Held-out results of M members on N' rows.
        rows: int64 [N'], which rows of the task these are.
        foldable: bool [M], whether the member is a plain linear layer on raw features.
    """

    scores: Scores
    rows: Tensor
    foldable: Tensor


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
    mean = scores.mean_loss().nan_to_num(torch.inf)  # a head that diverged must not win
    best = int(mean.argmin())
    if bool(foldable[best]) or not bool(foldable.any()):
        return best
    rival = int(torch.where(foldable, mean, torch.inf).argmin())
    loss = scores.log_loss[best]
    share = torch.ones_like(loss) if scores.weights is None else scores.weights
    share = share / share.sum()
    error = float((share * (loss - mean[best])).square().sum().sqrt())
    return rival if float(mean[rival]) <= float(mean[best]) + error else best


def finite(value: Tensor) -> float | None:
    """Return a number for a JSON document, None where there is none."""
    return float(value) if bool(torch.isfinite(value)) else None
