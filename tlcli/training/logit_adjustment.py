"""Logit adjustment for networks that are trained with balanced classes.

Once a network has memorised its few images of a class, their loss is small whatever they weigh, and class
weights or balanced sampling no longer have an effect: the decision boundary lies too close to those images,
and others of the class fall on the wrong side of it. Adding tau times minus the log of each class's share to
the logits moves the boundary back (post-hoc logit adjustment; Menon et al. 2021, "Long-tail learning via
logit adjustment", equation 9). Here tau, one number whatever the number of classes, is fitted to images that
were not trained on.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

MOST = 1.0  # the right tau for a network trained without weights


@dataclass(frozen=True)
class LogitAdjustment:
    """What is added to the logits.

    Attributes:
        tau: In [0, 1]; 0 adds nothing.
        values: fp32 [C], of mean 0.
        fitted_on: Split of the images it was fitted to.
    """

    tau: float
    values: Tensor
    fitted_on: Literal["train", "val"] = "val"

    def document(self) -> dict[str, Any]:
        """Return tau and the values for run.json."""
        return {"tau": self.tau, "values": [round(value, 6) for value in self.values.tolist()]}


def fit_adjustment(
    logits: Tensor, labels: Tensor, trained_on: Tensor, fitted_on: Literal["train", "val"] = "val"
) -> LogitAdjustment:
    """Return the adjustment with the smallest log loss, every class weighing the same.

    Args:
        logits: fp32 [N, C] for images that were not trained on.
        labels: int64 [N] of these.
        trained_on: int64 [M], labels of the training images. A class without one counts as one with one.
        fitted_on: Split of the N images.
    """
    from scipy.optimize import minimize_scalar

    counts = torch.bincount(trained_on, minlength=logits.shape[1]).clamp_min(1).double()
    rarity = -counts.log()
    rarity -= rarity.mean()
    there = torch.bincount(labels)
    weights = 1.0 / there[labels].double()

    def loss(tau: float) -> float:
        losses = cross_entropy(logits.double() + tau * rarity, labels, reduction="none")
        return float((weights * losses).sum())

    tau = float(minimize_scalar(loss, bounds=(0.0, MOST)).x)
    tau = min((0.0, tau, MOST), key=loss)
    return LogitAdjustment(tau, (tau * rarity).float(), fitted_on)
