"""Options of the head: what it is, and the grid that it is chosen from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tlcli.config.fields import Options, option
from tlcli.errors import UsageError
from tlcli.wording import parse_numbers

SCALINGS = ("plain", "standardised", "l2-normalised")
MAX_HIDDEN = 65_536
HeadKind = Literal["linear", "mlp", "knn", "ncm", "lda", "ridge"]
SINGLE_LAYER = ("linear", "ncm", "lda", "ridge")  # heads that are one linear layer
CLOSED_FORM = ("knn", "ncm", "lda", "ridge")  # heads that are not trained with a log loss


def parse_head(text: str, name: str = "--head") -> tuple[int, ...]:
    """Return the hidden sizes of an MLP head, or () for any other.

    Raises:
        UsageError: `text` is neither the name of a head nor `mlp:` with positive whole numbers.
    """
    if text in (*SINGLE_LAYER, *CLOSED_FORM):
        return ()
    kind, _, sizes = text.partition(":")
    try:
        hidden = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        hidden = ()
    if kind != "mlp" or not hidden or min(hidden) < 1 or max(hidden) > MAX_HIDDEN:
        raise UsageError(
            f"{name} {text!r} is not a head.",
            hint="Expected linear, knn, ncm, lda, ridge, or hidden sizes as in mlp:512 or mlp:1024,256.",
        )
    return hidden


def parse_scalings(text: str, name: str = "--scaling") -> tuple[str, ...]:
    """Return the scalings that linear heads are tried with, each once.

    Raises:
        UsageError: One of them does not exist.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [part for part in names if part not in SCALINGS]:
        raise UsageError(
            f"{name} {text!r}: {unknown[0]!r} is not a scaling.",
            hint=f"Expected one or more of {', '.join(SCALINGS)}.",
        )
    return names


def _auto_or_numbers(minimum: float, maximum: float) -> Callable[[str, str], tuple[float, ...] | None]:
    """Return a parser of `auto`, which gives None, or a grid of numbers in [minimum, maximum]."""

    def parse(text: str, name: str) -> tuple[float, ...] | None:
        return None if text == "auto" else parse_numbers(text, name, minimum=minimum, maximum=maximum)

    return parse


@dataclass(frozen=True, kw_only=True)
class HeadOptions(Options):
    """The classifier trained on the features."""

    head: str = option(
        "linear",
        "linear (a grid of 48), mlp:H1,H2,... (hidden sizes), or in closed form: ridge, lda "
        "(linear discriminants), ncm (nearest class mean), knn (nearest neighbours).",
        metavar="HEAD",
        parse=parse_head,
    )
    folds: int = option(5, "Cross-validation folds inside train that choose the head.", minimum=2, maximum=20)
    class_weights: Literal["none", "balanced"] = option(
        "none",
        "balanced weighs classes by inverse frequency and, where units are trained, adjusts the logits on "
        "held-out images; try it when rare classes matter most.",
    )
    label_smoothing: float | None = option(
        None,
        "Share of the target spread over all classes: 0.1 when units of the backbone are trained, 0 for "
        "heads alone, unless given; raise it on noisy labels.",
        minimum=0.0,
        maximum=0.9,
    )
    l2: str = option(
        "auto",
        "Comma-separated l2 penalties of the grid (lda: shrinkage is l2 / (1 + l2)); auto spans the useful "
        "range.",
        metavar="GRID",
        parse=_auto_or_numbers(0.0, 1e9),
    )
    scaling: str = option(
        ",".join(SCALINGS),
        "Comma-separated scalings of the features that linear heads are tried with.",
        metavar="NAMES",
        parse=parse_scalings,
    )
    seed: int = option(0, "Seed of folds, initialisation and order.", minimum=0)
    refit: bool = option(
        False, "After choosing a head, train it on train+val; val then no longer measures anything."
    )
    activation: Literal["elu", "relu", "leaky-relu", "gelu", "tanh", "sigmoid"] = option(
        "elu", "Activation between an MLP head's layers."
    )
    init: Literal["he", "xavier", "normal"] = option(
        "he",
        "Initialisation of an MLP head and of --scenario scratch; xavier suits tanh and sigmoid, normal is "
        "N(0, 1), for showing why the others exist.",
    )
    batch_norm: bool = option(False, "Batch normalisation after each hidden layer of an MLP head.")
    dropout: str | None = option(
        None,
        "Dropout rate before the classifier; a comma-separated grid for an MLP head on frozen features. "
        "Raise it when train accuracy runs away from val.",
        metavar="RATE|GRID",
        parse=partial(parse_numbers, minimum=0.0, maximum=0.95),
    )
    lr: str | None = option(
        None,
        "Learning rate, or auto to try some; a comma-separated grid for an MLP head on frozen features. "
        "Lower it when the loss jumps.",
        metavar="RATE|auto|GRID",
        parse=_auto_or_numbers(1e-8, 10.0),
    )
    l1: float = option(
        0.0,
        "l1 penalty; makes weights exactly zero. Try 1e-3 where a sparse network is wanted, 1e-2 for more "
        "zeros.",
        minimum=0.0,
    )
    max_norm: float = option(
        0.0,
        "Largest l2 norm of a unit's incoming weights; 0 is off, 3 to 4 is usual with high dropout.",
        minimum=0.0,
    )
    epochs: int | None = option(
        None,
        "Epochs (for an MLP head on frozen features the most it may take); by data-set size unless given. "
        "Raise it when the loss still falls at the end.",
        minimum=1,
        maximum=100_000,
    )
    patience: int | None = option(
        None,
        "Stop after N epochs without improvement on val and keep the best weights (an MLP head on frozen "
        "features: 10, inside train); never unless given. Val then also selects.",
        metavar="N",
        minimum=1,
    )
    batch_size: int | None = option(
        None,
        "Training batch over all processes; by data-set size unless given. Lower it when memory runs out.",
        flags=("-b", "--batch-size"),
        metavar="N",
        minimum=1,
        maximum=1_000_000,
    )

    @property
    def kind(self) -> HeadKind:
        """Return what kind of head it is."""
        kind: HeadKind = "mlp" if self.hidden_sizes else self.head  # type: ignore[assignment]
        return kind

    @property
    def is_single_layer(self) -> bool:
        """Return whether the head is one linear layer, which a network can be trained from and end in."""
        return self.kind in SINGLE_LAYER

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Return the hidden sizes of an MLP head, or () for any other."""
        found: tuple[int, ...] = self.parsed("head")
        return found

    @property
    def scalings(self) -> tuple[str, ...]:
        """Return the scalings that linear heads are tried with."""
        found: tuple[str, ...] = self.parsed("scaling")
        return found

    @property
    def l2_values(self) -> tuple[float, ...] | None:
        """Return the l2 penalties of the grid; None for `auto`."""
        found: tuple[float, ...] | None = self.parsed("l2")
        return found

    @property
    def dropout_values(self) -> tuple[float, ...] | None:
        """Return the dropout rates of the grid; None where none is given."""
        found: tuple[float, ...] | None = self.parsed("dropout")
        return found

    @property
    def lr_values(self) -> tuple[float, ...] | None:
        """Return the learning rates of the grid; None where none is given, and for `auto`."""
        found: tuple[float, ...] | None = self.parsed("lr")
        return found

    def mlp_grid(self) -> "MlpGrid":
        """Return what an MLP head on frozen features is trained with, defaults filled in.

        Raises:
            UsageError: The learning rate is `auto`, which a grid cannot be.
        """
        if self.lr == "auto":
            raise UsageError(
                "--lr auto is for training the backbone; an MLP head on frozen features tries a grid.",
                hint="Leave --lr out, or write a grid such as --lr 0.0003,0.001.",
            )
        given = {item.name: self.parsed(item.name) for item in dataclasses.fields(MlpGrid)}
        return MlpGrid(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class MlpGrid:
    """Defaults of an MLP head on frozen features; fields as in HeadOptions."""

    dropout: tuple[float, ...] = (0.0, 0.5)
    lr: tuple[float, ...] = (0.0003, 0.001, 0.003)
    epochs: int = 100
    patience: int = 10
    batch_size: int = 256
