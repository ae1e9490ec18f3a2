"""Places before the cut where fewer bytes cross, in a prefix that is ready for inference.

The prefix is prepared as a whole and divided then, so that its two parts, one after the other, do what the
whole does: what is trained does not depend on where rows are kept. What crosses is kept in the number type
that it has, without loss.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlcli.backbones.cut import Frozen, Prefix
from tlcli.backbones.exactness import BATCH
from tlcli.backbones.graph import (
    PLACE,
    Traced,
    analyse,
    batch_size,
    candidates,
    copy_graph,
    forget_constants,
    live,
    writes,
)
from tlcli.backbones.inference import Autocast
from tlcli.backbones.units import Unit
from tlcli.backbones.work import SavedWork, flop_counter, saved_work

INPUT = "input"
PIXEL_BYTES = 2  # bf16 holds the integers from 0 to 255


@dataclass(frozen=True)
class EarlierParts:
    """A prefix divided at one place: `rest(first(images))` are the prefix's rows.

    Attributes:
        where: Name of the operation whose result crosses; "input" for the image itself.
        row_shape: Shape of one image's part of it.
        dtype: Its number type; that of pixels for the image, which is kept before it is normalised.
        first: Normalised images -> what crosses.
        rest: What crosses -> rows.
        saved: How much of the frozen units' work `first` does, of what the prefix does.
    """

    where: str
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    first: nn.Module
    rest: nn.Module
    saved: SavedWork

    @property
    def row_bytes(self) -> int:
        """Return the bytes of what crosses for one image."""
        return torch.Size(self.row_shape).numel() * self.dtype.itemsize


class _Walk(fx.Interpreter):
    """Runs a graph for BATCH images; keeps shape and number type of each row, and each node's FLOPs."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.rows: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}
        self.flops: dict[fx.Node, int] = {}

    def walk(self, images: Tensor) -> None:
        """Run the graph."""
        with torch.no_grad(), flop_counter(self.module) as self.counter:
            self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        before = self.counter.get_total_flops()
        value: Any = BATCH if n.target is batch_size else super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        is_row = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if is_row and value.shape[0] == BATCH:
            self.rows[n] = tuple(value.shape[1:]), value.dtype
        return value


def earlier_parts(
    prefix: nn.Module, images: Tensor, row_bytes: int, frozen: list[Unit]
) -> list[EarlierParts]:
    """Return where a prefix could be divided so that fewer bytes cross than anywhere later; the latest first.

    Args:
        prefix: As prepared for inference; one that is no traced graph has no earlier places.
        images: Normalised images [BATCH, 3, H, W] on the prefix's device, in its memory format.
        row_bytes: Of a row at the prefix's end.
        frozen: The units that are frozen.
    """
    reduced = isinstance(prefix, Autocast)
    graphed = prefix.module if isinstance(prefix, Autocast) else prefix
    if not isinstance(graphed, Prefix):
        return []
    traced = _traced(graphed)
    walk = _Walk(graphed, traced.graph)
    with torch.autocast(images.device.type, torch.bfloat16) if reduced else nullcontext():
        walk.walk(images)
    found = []
    first: nn.Module
    rest: nn.Module
    for node in reversed(candidates(traced, ())):
        if node not in walk.rows or traced.output.args[0] is node:
            continue
        row_shape, dtype = walk.rows[node]
        if node is traced.image:
            dtype = torch.bfloat16
            first, rest = Frozen().eval(), prefix
        else:
            first, rest = _parts(graphed, traced, node)
            if reduced:
                first, rest = Autocast(first).eval(), Autocast(rest).eval()
        saved = saved_work(traced, node, walk.flops, frozen, len(frozen))
        parts = EarlierParts(traced.name(node), row_shape, dtype, first, rest, saved)
        if dtype in (torch.float32, torch.bfloat16) and parts.row_bytes < row_bytes:
            found.append(parts)
            row_bytes = parts.row_bytes
    return found


def _traced(prefix: Prefix) -> Traced:
    """Return the graph of a prefix with what the search for a place needs to know of its nodes."""
    graph = fx.Graph(tracer_cls=None)
    copies: dict[fx.Node, fx.Node] = {}
    names = {}
    image = next(node for node in prefix.graph.nodes if node.op == "placeholder")
    for node in prefix.graph.nodes:
        if node.target == "size" and node.args == (image, 0):  # see copy_graph
            copies[node] = graph.call_function(batch_size)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        names[copies[node]] = str(node.meta.get(PLACE, node.name))
    traced = Traced(graph=graph, names=names)
    analyse(traced, prefix)
    return traced


def _parts(prefix: Prefix, traced: Traced, node: fx.Node) -> tuple[nn.Module, nn.Module]:
    """Return the two parts of a prefix, which share its layers."""
    end = traced.output.args[0]
    needed = traced.inputs[traced.output] - {traced.output, node}
    after = live(
        {item for item in needed if node in traced.inputs[item] or traced.image not in traced.inputs[item]},
        end,
    )
    graphs = (
        copy_graph(traced, traced.inputs[node], traced.image, node),
        copy_graph(traced, after, node, end, clone=writes(traced, after, node, prefix)),
    )
    first, rest = (Prefix(prefix, graph, class_name="Prefix") for graph in graphs)
    for part in (first, rest):
        part.train(False)
        forget_constants(part)
    return first, rest
