"""The head of nearest neighbours: it stores the training rows and asks the most similar ones.

As in the usual evaluation of features by nearest neighbours (Wu et al. 2018, "Unsupervised Feature Learning
via Non-Parametric Instance Discrimination"): similarity is the cosine, and each of the k nearest rows votes
for its class with exp(similarity / temperature). Votes of a few rows are 0 for most classes, whose log loss
would be infinite; so the shares of the votes are mixed with the shares of the classes in the training rows,
in a proportion fitted to held-out rows.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlcli.heads.linear import unit_rows
from tlcli.heads.sums import BLOCK

SMALL_ELEMENTS = 1 << 24  # stored rows up to this size stay fp32 (64 MiB); larger ones are kept in fp16
SIMILARITIES = 1 << 25  # similarities in memory at a time (128 MiB)


@dataclass(frozen=True)
class NeighboursHead:
    """A classifier by the votes of the nearest training rows, which applies to raw features.

    Attributes:
        rows: fp32 or fp16 [N, D], training rows divided by their l2 norm.
        labels: int32 [N].
        votes: fp32 [C], what the vote of a row of each class counts.
        prior: fp32 [C], positive shares of the classes that votes are mixed with; their sum is 1.
        shift: fp32 [C], added to the logits.
        neighbours: How many of the nearest rows vote, at most N.
        temperature: Of the votes; small ones listen to the nearest only.
        prior_share: Share of the prior in the mixture, in (0, 1].
    """

    rows: Tensor
    labels: Tensor
    votes: Tensor
    prior: Tensor
    shift: Tensor
    neighbours: int
    temperature: float
    prior_share: float

    def logits(self, features: Tensor) -> Tensor:
        """Return the fp32 logits [N', C], log probabilities but for `shift`, of raw features [N', D]."""
        similar, index = nearest(unit_rows(features.to(self.votes)), self.rows, self.neighbours)
        labels = self.labels[index].long()
        weights = vote_weights(similar, self.temperature) * self.votes[labels]
        shares = torch.zeros(len(similar), len(self.votes), device=similar.device)
        shares.scatter_add_(1, labels, weights / weights.sum(1, keepdim=True))
        return (shares * (1.0 - self.prior_share) + self.prior_share * self.prior).log() + self.shift

    def shifted(self, values: Tensor) -> "NeighboursHead":
        """Return the head whose logits are larger by `values`, fp32 [C]."""
        return dataclasses.replace(self, shift=self.shift + values)

    def rescaled(self, factor: float) -> "NeighboursHead":  # noqa: ARG002 (rows are compared by direction)
        """Return the head that gives features the logits of this one for `factor` times the features."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        return {name: getattr(self, name) for name in ("rows", "labels", "votes", "prior", "shift")}

    def document(self) -> dict[str, object]:
        """Return what is needed beside `state` to rebuild the head; plain values."""
        return {
            "kind": "knn",
            "neighbours": self.neighbours,
            "temperature": self.temperature,
            "prior_share": self.prior_share,
        }

    @classmethod
    def load(cls, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> "NeighboursHead":
        """Return the head that `facts` and `state` describe.

        Raises:
            KeyError: A fact or a tensor is missing.
        """
        return cls(
            state["rows"], state["labels"], state["votes"].float(), state["prior"].float(),
            state["shift"].float(), int(facts["neighbours"]), float(facts["temperature"]),
            float(facts["prior_share"]),
        )  # fmt: skip


def stored_rows(features: Tensor) -> Tensor:
    """Return raw features [N, D] as rows of norm 1, fp32, or fp16 where they are large.

    Args:
        features: fp32 [N, D].
    """
    rows = unit_rows(features)
    return rows if rows.numel() <= SMALL_ELEMENTS else rows.half()


def vote_weights(similar: Tensor, temperature: float) -> Tensor:
    """Return exp(similarity / temperature) of neighbours [N', k], nearest first, relative to the nearest."""
    return ((similar - similar[:, :1]) / temperature).exp()


def nearest(
    queries: Tensor,
    rows: Tensor,
    neighbours: int,
    *,
    query_folds: Tensor | None = None,
    row_folds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the nearest rows of each query, nearest first.

    Args:
        queries: fp32 [N', D], of norm 1.
        rows: fp32 or fp16 [N, D], of norm 1, on the same device.
        neighbours: How many, at most N.
        query_folds: int64 [N']; rows of the same fold are not asked. None asks all.
        row_folds: int64 [N].

    Returns:
        The similarities, fp32 [N', k], and the places of the rows, int64 [N', k].
    """
    at_once = max(1, min(1024, SIMILARITIES // len(rows)))
    similarities = torch.empty(len(queries), neighbours, device=queries.device)
    places = torch.empty(len(queries), neighbours, dtype=torch.long, device=queries.device)
    for start in range(0, len(queries), at_once):
        block = queries[start : start + at_once]
        similar = torch.empty(len(block), len(rows), device=queries.device)
        for first in range(0, len(rows), BLOCK):
            similar[:, first : first + BLOCK] = block @ rows[first : first + BLOCK].to(block).T
        if query_folds is not None and row_folds is not None:
            similar.masked_fill_(query_folds[start : start + at_once, None] == row_folds, -torch.inf)
        span = slice(start, start + len(block))
        similarities[span], places[span] = similar.topk(neighbours, 1)
    return similarities, places
