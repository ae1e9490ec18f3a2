"""Finding the tensors of a network in a checkpoint: by the ends of their names, and by their shapes.

A name of the file fits where it ends like a name of the network: what comes before, a key of nesting, a
wrapper or the name that a script gave the network, is the *prefix* of a *candidate*, one set of tensors in
the file. What a candidate has too much inside the network's own parts counts like what it lacks, or a deeper
network would pass for a shallower one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tlcli.backbones.weights_file import StateDict

MATCH_RATE = 0.95
"""Share of a backbone's tensors, and of its values, that a weights file must hold to be accepted."""

MOST_CANDIDATES = 16
TOKENS = {
    "cls_token",
    "reg_token",
    "dist_token",
    "pos_embed",
}  # parts of a network without a dot in their names
NOT_COUNTED = "num_batches_tracked"  # a counter that old checkpoints lack and evaluation does not use
MOST_CHANNELS = 64  # of a first layer's images: beyond colours, the bands of satellites


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Name -> (shape in the file, shape in the network)."""


@dataclass(frozen=True)
class Target:
    """The tensors that a network wants.

    Attributes:
        tensors: Name -> tensor, of which shape and kind are read.
        heads: How the names of its classifier begin, which a headless network lacks.
        parts: Its modules at the top that hold tensors.
        patterns: The names with every number of a block replaced by #.
        counted: Name -> number of values, counters left out.
    """

    tensors: StateDict
    heads: tuple[str, ...]
    parts: frozenset[str]
    patterns: frozenset[str]
    counted: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> "Target":
        """Return what `model`, without its classifier, wants."""
        tensors = dict(model.state_dict())
        return cls(
            tensors=tensors,
            heads=_heads(model),
            parts=frozenset(name.partition(".")[0] for name in tensors if "." in name),
            patterns=frozenset(map(pattern, tensors)),
            counted={key: value.numel() for key, value in tensors.items() if not key.endswith(NOT_COUNTED)},
        )


@dataclass(frozen=True)
class Match:
    """How a set of tensors fits a network.

    Attributes:
        tensors: The fitting tensors, under the network's names.
        missing: Names the network has and the file lacks (counters left out).
        wrong_shape: Name -> (shape in the file, shape in the network).
        unused: Names of the file that the network does not have.
        surplus: Those of them that lie inside the network's own parts.
        deeper: Those of the surplus that are named like blocks of the network: it would have to be deeper.
        rate: Share of tensors, or of values where that is less, that fit, of those that either side has; in
            [0, 1].
        prefix: What came before the network's names, as `--weights-key` takes it with the dot left out.
        ordered: The order of tensors decided and not their names; then what is missing must be neutral.
        neutral: Whether only norms and biases are missing, whose initial values change nothing.
        channels: Names of first layers that were adapted -> their channels in the file.
        how: What was done to the names, for people; "" for nothing but a prefix.
    """

    tensors: StateDict
    missing: tuple[str, ...]
    wrong_shape: Shapes
    unused: tuple[str, ...]
    surplus: tuple[str, ...]
    deeper: tuple[str, ...]
    rate: float
    prefix: str = ""
    ordered: bool = False
    neutral: bool = True
    channels: Mapping[str, int] = field(default_factory=dict)
    how: str = ""

    @property
    def accepted(self) -> bool:
        """Return whether the tensors may be loaded.

        A few may be missing, or too many; where one stands for the other it is another network.
        """
        other = (
            self.wrong_shape
            or self.deeper
            or (self.missing and (self.surplus or (self.ordered and not self.neutral)))
        )
        return self.rate >= MATCH_RATE and not other

    @property
    def complete(self) -> bool:
        """Return whether nothing is missing, of another shape, or too much."""
        return self.rate == 1.0 and not self.wrong_shape and not self.deeper

    @property
    def order(self) -> tuple[bool, float, int]:
        """Return the key by which matches are ranked: the larger the better."""
        return (self.accepted, self.rate, len(self.tensors) + len(self.wrong_shape))


def candidates(state: StateDict, target: Target) -> list[Match]:
    """Return how each set of tensors in `state` fits, best first; sets of a few names are left out.

    Takes time linear in the number of names.
    """
    votes: Counter[str] = Counter()
    for name in state:
        place = 0
        while True:
            if name[place:] in target.tensors:
                votes[name[:place]] += 1
            place = name.find(".", place) + 1
            if not place:
                break
    most = max(votes.values(), default=0)
    prefixes = [prefix for prefix, count in votes.most_common(MOST_CANDIDATES) if count >= most / 2] or [""]
    found = [fit(state, target, prefix) for prefix in prefixes]
    return sorted(found, key=lambda match: match.order, reverse=True)


def fit(state: StateDict, target: Target, prefix: str = "") -> Match:
    """Return how the names of `state` that begin with `prefix` fit."""
    tensors: StateDict = {}
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    channels: dict[str, int] = {}
    unused, surplus, deeper, too_much = [], [], [], 0
    for key, value in state.items():
        name = key.removeprefix(prefix) if key.startswith(prefix) else None
        wanted = None if name is None else target.tensors.get(name)
        if name is None or wanted is None:
            unused.append(key)
            if name is None or not _counts(name, value, target):
                continue
            if is_block := pattern(name) in target.patterns:
                deeper.append(key)
            if is_block or name.partition(".")[0] in target.parts or name in TOKENS:
                surplus.append(key)
                too_much += value.numel()
        elif value.shape == wanted.shape:
            tensors[name] = value
        elif _is_first_layer(value, wanted):
            channels[name] = value.shape[1]
            tensors[name] = colours(value)
        else:
            wrong[name] = (tuple(value.shape), tuple(wanted.shape))
    hits = [name for name in tensors if name in target.counted]
    rate = min(
        len(hits) / max(1, len(target.counted) + len(surplus)),
        sum(target.counted[name] for name in hits) / max(1, sum(target.counted.values()) + too_much),
    )
    missing = tuple(name for name in target.counted if name not in tensors and name not in wrong)
    return Match(
        tensors, missing, wrong, tuple(unused), tuple(surplus), tuple(deeper),
        rate, prefix,
        neutral=all(target.tensors[name].ndim == 1 for name in missing), channels=channels,
    )  # fmt: skip


def roots(state: StateDict, target: Target) -> Iterator[str]:
    """Yield the prefixes below which lie enough tensors for the network, the shortest first."""
    counts: Counter[str] = Counter()
    for name in state:
        place = 0
        while True:
            counts[name[:place]] += 1
            place = name.find(".", place) + 1
            if not place:
                break
    enough = [path for path, count in counts.items() if 2 * count >= len(target.counted)]
    yield from sorted(enough, key=len)[:MOST_CANDIDATES]


def below(state: StateDict, prefix: str) -> StateDict:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def under(prefix: str, found: Match, how: str) -> Match:
    """Return a match of names without `prefix`, changed as `how` says, as one of the names in the file."""
    return replace(
        found,
        how=how,
        prefix=prefix + found.prefix,
        unused=tuple(prefix + name for name in found.unused),
        surplus=tuple(prefix + name for name in found.surplus),
        deeper=tuple(prefix + name for name in found.deeper),
    )


def pattern(name: str) -> str:
    """Return a tensor's name with # for the numbers of blocks: `layer#.#.conv1.weight`.

    The number in the name of a layer itself stays: a third convolution is another kind of block.
    """
    if "." not in name:
        return name
    *blocks, layer, leaf = name.split(".")
    layer = "#" if layer.isdigit() else layer
    return ".".join([*(re.sub(r"\d+", "#", block) for block in blocks), layer, leaf])


def colours(weight: torch.Tensor) -> torch.Tensor:
    """Return the weights of a first layer for three channels, as timm adapts them.

    Channels are repeated or left out, and scaled so that the sum over equal channels stays: what one grey
    channel gave is what the same grey gives in three.

    Args:
        weight: [out, channels, height, width].
    """
    given = weight.shape[1]
    repeated = weight.float().repeat(1, -(-3 // given), 1, 1)[:, :3]
    return (repeated * (given / 3)).to(weight.dtype)


def _is_first_layer(value: torch.Tensor, wanted: torch.Tensor) -> bool:
    if value.ndim != 4 or wanted.ndim != 4 or wanted.shape[1] != 3:
        return False
    if not value.is_floating_point() or value.layout != torch.strided:
        return False
    same = value.shape[0] == wanted.shape[0] and value.shape[2:] == wanted.shape[2:]
    return same and 0 < value.shape[1] <= MOST_CHANNELS


def _counts(name: str, value: torch.Tensor, target: Target) -> bool:
    """Return whether a tensor can be too much: heads, counters and tables of indices cannot."""
    return value.is_floating_point() and value.numel() > 1 and not name.startswith(target.heads)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of the classifier begin, whose place an identity holds."""
    getter: Any = getattr(model, "get_classifier", None)
    try:
        heads = getter() if getter else None
    except AttributeError:  # a few look inside a classifier that is gone
        heads = None
    modules = heads if isinstance(heads, tuple | list) else (heads,)
    places = [name for name, module in model.named_modules() if any(module is head for head in modules)]
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    places += [named] if isinstance(named, str) else list(named or ())
    if not places:
        places = [name for name, module in model.named_modules() if isinstance(module, nn.Identity)][-1:]
    # A classifier of one's own may have more layers in the same place.
    return tuple(f"{place.rpartition('.')[0] or place}." for place in places if place)
