"""How much of the frozen units' work lies before a cut, and so is cached."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tlcli.backbones.graph import Traced
from tlcli.backbones.units import Unit

WORTH_A_WORD = 0.95
"""Where caching saves less than this share of the frozen work, people are told."""


@dataclass(frozen=True)
class SavedWork:
    """What caching at a cut saves.

    Attributes:
        share: Of the frozen units' multiplications and additions, those before the cut, in [0, 1]. The rest
            is done again whenever a cached row is used.
        num_units: So many of the first units lie before the cut entirely.
    """

    share: float
    num_units: int


@contextmanager
def flop_counter(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count FLOPs inside the block, where no parameter asks for a gradient.

    The counter follows modules by hooks that want a graph for tensors that need gradients.
    """
    needing = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)


def saved_work(
    traced: Traced, node: fx.Node, flops: Mapping[fx.Node, int], parts: list[Unit], num_frozen_units: int
) -> SavedWork:
    """Return how much of the work of the first units is done once a graph is divided at `node`.

    Args:
        traced: The graph, in eval mode.
        node: A dominator.
        flops: Node -> FLOPs, for any number of images; other nodes have none.
        parts: All units of the network.
        num_frozen_units: How many of them are frozen.
    """
    before = traced.inputs[node]
    kept = sum(flops.get(item, 0) for item in before)
    again = Counter[int]()
    for item, unit in behind(traced, node, parts, num_frozen_units).items():
        again[unit] += flops.get(item, 0)
    if not again.total():
        return SavedWork(1.0, num_frozen_units)
    first = min(unit for unit, work in again.items() if work)
    return SavedWork(kept / (kept + again.total()), first - 1)


def behind(traced: Traced, node: fx.Node, parts: list[Unit], num_frozen_units: int) -> dict[fx.Node, int]:
    """Return the operations of frozen units that do not lie before `node`, and which unit each is of."""
    owner = {name: unit.index for unit in parts[:num_frozen_units] for name in unit.modules}
    found = {
        item: _owner_of(traced.names.get(item, ""), owner)
        for item in traced.inputs[traced.output] - traced.inputs[node]
    }
    return {item: unit for item, unit in found.items() if unit is not None}


def _owner_of(name: str, owner: Mapping[str, int]) -> int | None:
    """Return the frozen unit that an operation belongs to, by the module that it or its container is."""
    while name and name not in owner:
        name = name.rpartition(".")[0]
    return owner.get(name)


def saved_text(saved: SavedWork, num_frozen_units: int) -> str | None:
    """Return what people should know about a cut before the end of the frozen units, or None."""
    if saved.share >= WORTH_A_WORD:
        return None
    place = f"after unit {saved.num_units}" if saved.num_units else "within unit 1"
    if not saved.share:
        place = "at the image"
    return (
        f"{place}, of {num_frozen_units} frozen units: {saved.share:.0%} of the frozen work is cached, "
        "the rest is computed again in each epoch"
    )
