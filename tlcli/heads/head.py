"""What a head is, and how a saved one is read back."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tlcli.errors import DataError
from tlcli.heads.linear import LinearHead
from tlcli.heads.mlp import MlpHead
from tlcli.heads.neighbours import NeighboursHead


class Head(Protocol):
    """A trained classifier of features."""

    def logits(self, features: Tensor) -> Tensor:
        """Return the fp32 logits [N, C] of raw features [N, D]."""

    def shifted(self, values: Tensor) -> "Head":
        """Return the head whose logits are larger by `values`, fp32 [C]."""

    def rescaled(self, factor: float) -> "Head":
        """Return the head that gives features the logits of this one for `factor` times the features."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""

    def document(self) -> dict[str, object]:
        """Return what is needed beside `state` to rebuild the head."""


def head_from_state(facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> Head:
    """Return the head that `facts()` and `state()` of a saved one describe.

    Raises:
        DataError: The kind is unknown, or a tensor is missing.
    """
    try:
        if facts["kind"] == "linear":
            return LinearHead(state["weight"].float(), state["bias"].float(), bool(facts["normalise"]))
        if facts["kind"] == "mlp":
            return MlpHead.load(facts, state)
        if facts["kind"] == "knn":
            return NeighboursHead.load(facts, state)
    except KeyError as error:
        raise DataError(f"The saved head lacks {error.args[0]!r}.", hint="Train the run again.") from error
    raise DataError(
        f"The saved head is of an unknown kind {facts['kind']!r}; expected linear, mlp or knn.",
        hint="It may come from a newer tlcli.",
    )
