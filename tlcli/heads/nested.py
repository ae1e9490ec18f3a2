"""What a chosen head is worth: its cross-validation score, corrected for its having been chosen.

The smallest of many held-out losses is too small: the choice follows the luck of those rows, and so does the
epoch at which an MLP stops. Two corrections, both of the whole choice:

- Nested cross-validation (Stone 1974; Varma & Simon 2006, "Bias in error estimation when using
  cross-validation for model selection"): for each fold, everything is done again on the other rows alone (a
  grid, its folds, the choice, the final fit), and the head that comes of it is measured on the fold. Used
  where it is affordable, which is where it matters: on few rows.
- BBC-CV (Tsamardinos et al. 2018, "Bootstrapping the out-of-sample predictions for efficient and accurate
  cross-validation"): rows, or whole groups, are drawn with replacement from the held-out results of all
  members; a member is chosen by the rows drawn and measured on those that were not. It costs next to nothing,
  and leaves what folds share and what early stopping gains.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tlcli.data.folds import assign_folds
from tlcli.heads.choice import Scores, Trials, choose_member
from tlcli.heads.head import Head
from tlcli.heads.task import Task

FEW_ROWS = 200  # up to which a part must keep nine tenths of them: with four fifths, heads are clearly worse
OUTER_FOLDS = (10, 5)  # with few rows, and with more
RESAMPLES = 200  # of the bootstrap; a row is out of 37 % of them
Method = Literal["nested", "bootstrap", "cross-validation"]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class HeldOut:
    """Results of rows that neither trained the head that answered nor helped to choose it.

    Attributes:
        method: How they were got; `cross-validation` where there was nothing to choose.
        rows: int64 [N'], which rows of the task, each once.
        correct: fp64 [N'], whether top-1 is right: 0 or 1, or between them the mean of several heads.
        log_loss: fp64 [N'], in nats.
    """

    method: Method
    rows: IntArray
    correct: FloatArray
    log_loss: FloatArray

    def document(self) -> dict[str, Any]:
        """Return the means, for `cv.corrected`."""
        return {
            "method": self.method,
            "num_samples": len(self.rows),
            "top1_accuracy": float(self.correct.mean()),
            "log_loss": float(self.log_loss.mean()),
        }


def nested(task: Task, fit: Callable[[Task], Head]) -> HeldOut:
    """Return the held-out results of the whole procedure, fold by fold.

    Args:
        task: Has folds.
        fit: Chooses and trains a head on the rows of a task, and looks at no others.
    """
    folds, num_folds = outer_folds(task)
    rows, correct, losses = [], [], []
    for fold in range(num_folds):
        inside = torch.nonzero(folds == fold)[:, 0]
        head = fit(part_of(task, folds != fold, fold))
        logits = head.logits(task.features[inside.to(task.features.device)].cpu()).double()
        labels = task.labels[inside].cpu()
        rows.append(inside.cpu())
        correct.append(logits.argmax(1) == labels)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return HeldOut(
        "nested",
        torch.cat(rows).numpy(),
        torch.cat(correct).double().numpy(),
        torch.cat(losses).numpy(),
    )


def outer_folds(task: Task) -> tuple[Tensor, int]:
    """Return the fold of each row, int64 [N] with -1 where it always trains, and how many folds there are."""
    wanted = OUTER_FOLDS[len(task.labels) > FEW_ROWS]
    folds, num_folds = assign_folds(task.labels.cpu().numpy(), task.groups.cpu().numpy(), wanted, 0)
    return torch.from_numpy(folds).to(task.labels.device), num_folds


def part_of(task: Task, kept: Tensor, seed: int) -> Task:
    """Return the task of the rows in `kept` bool [N], with folds of its own."""
    kept = torch.nonzero(kept)[:, 0]
    labels, groups = task.labels[kept], task.groups[kept]
    folds, num_folds = assign_folds(labels.cpu().numpy(), groups.cpu().numpy(), task.num_folds, seed)
    return replace(
        task,
        features=task.features[kept.to(task.features.device)],
        labels=labels,
        row_weights=task.row_weights[kept],
        groups=groups,
        folds=torch.from_numpy(folds).to(labels.device),
        num_folds=num_folds,
    )


def bootstrapped(trials: Trials, groups: IntArray, seed: int) -> HeldOut:
    """Return each row's mean result over the members that were chosen without it.

    A row that was drawn every time (one in e^90) keeps the result of the member chosen by all rows.

    Args:
        trials: Held-out results of the members.
        groups: int64 [N'], rows that are drawn together.
        seed: Of the drawing.
    """
    loss, correct = trials.scores.log_loss.cpu(), trials.scores.correct.cpu()
    foldable = trials.foldable.cpu()
    weights = trials.scores.weights
    scores = Scores(loss, correct, None if weights is None else weights.cpu())
    names, of = np.unique(groups, return_inverse=True)
    draw = np.random.default_rng(seed)
    count = np.zeros(loss.shape[1])
    sums = np.zeros((2, loss.shape[1]))
    for _ in range(RESAMPLES):
        times = np.bincount(draw.integers(0, len(names), len(names)), minlength=len(names))[of]
        if not times.any() or times.all():
            continue
        drawn = torch.from_numpy(np.repeat(np.arange(len(times)), times))
        member = choose_member(scores.take(drawn), foldable)
        out = times == 0
        count += out
        sums[0] += np.where(out, correct[member].numpy(), 0)
        sums[1] += np.where(out, loss[member].numpy(), 0)
    best = choose_member(scores, foldable)
    whole = np.stack([correct[best].double().numpy(), loss[best].numpy()])
    found = np.where(count > 0, sums / np.maximum(count, 1), whole)
    return HeldOut("bootstrap", trials.rows.cpu().numpy(), found[0], found[1])


def only_member(trials: Trials) -> HeldOut:
    """Return the held-out results of the only member there is."""
    found = trials.scores.correct[0].double().cpu().numpy(), trials.scores.log_loss[0].cpu().numpy()
    return HeldOut("cross-validation", trials.rows.cpu().numpy(), *found)
