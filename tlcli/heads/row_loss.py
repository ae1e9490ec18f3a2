"""Cross-entropy of a row's logits, by the slack: its derivative, less what label smoothing adds to it.

Two classes need only one logit v, with logits (v, -v) / sqrt(2): K = 1. More classes keep K = C of them.

The slack of a row are its probabilities, less 1 for its own class. That one is computed as the sum of the
others, never as p - 1: with a small penalty rows are named with certainty to seven digits, and the difference
would be rounding.
"""

import math

import torch
from torch import Tensor


class RowLoss:
    """Cross-entropy for C classes, `smoothing` of every target spread over all of them."""

    def __init__(self, num_classes: int, smoothing: float) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing
        self.two = num_classes == 2
        self.top = math.sqrt(2.0) if self.two else 1.0  # what a slack is at most

    @property
    def num_logits(self) -> int:
        """K, the logits kept a row."""
        return 1 if self.two else self.num_classes

    def slack(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the slack [Q, K, B] of logits [Q, K, B] and labels [Q, B]."""
        if self.two:
            sign = torch.where(labels == 0, -self.top, self.top).to(logits)[:, None]
            return (sign * logits).sigmoid_().mul_(sign)
        own = labels[:, None]
        slack = logits.softmax(1).scatter_(1, own, 0.0)
        return slack.scatter_(1, own, -slack.sum(1, keepdim=True))

    def derivative(self, slack: Tensor, labels: Tensor) -> Tensor:
        """Return the derivative of the loss by the logits, [Q, K, B]."""
        if not self.smoothing:
            return slack
        if self.two:
            return slack + torch.where(labels == 0, 0.5, -0.5).to(slack)[:, None] * self.smoothing * self.top
        moved = slack - self.smoothing / self.num_classes
        own = labels[:, None]
        return moved.scatter_add_(1, own, moved.new_full((), self.smoothing).expand(own.shape))

    def variance(self, slack: Tensor) -> Tensor:
        """Return p(1 - p) of every logit, [Q, K, B]: the diagonal of the second derivative."""
        size = slack.abs()
        return (self.top - size).mul_(size)

    def bend(self, slack: Tensor, change: Tensor, labels: Tensor) -> Tensor:
        """Return the second derivative along `change` [Q, K, B] of each row's loss, [Q, B]."""
        if self.two:
            return self.variance(slack).mul_(change).mul_(change)[:, 0]
        # The variance of the change under the probabilities, whose own class is 1 + slack.
        own = change.gather(1, labels[:, None])[:, 0]
        product = slack * change
        first = product.sum(1)
        return product.mul_(change).sum(1) - (2.0 * own + first) * first
