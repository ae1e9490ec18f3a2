"""Whether the parts of a divided backbone give what the whole gives, and which rows cross between them."""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tlcli.backbones.graph import Traced, batch_size, copy_graph
from tlcli.backbones.work import flop_counter

BATCH = 2
"""Images in the batches that check a cut: two show whether the first dimension is the batch's."""


class Walk(fx.Interpreter):
    """Runs a graph and keeps the row shapes at `wanted` nodes, and every node's FLOPs where they are counted.

    Attributes:
        shapes: Node -> shape of one image's row.
        flops: Node -> FLOPs for the BATCH images.
        given: What the graph gives; None where it cannot run.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, wanted: set[fx.Node]) -> None:
        super().__init__(model, graph=graph)
        self.wanted = wanted
        self.counter: FlopCounterMode | None = None
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.flops: dict[fx.Node, int] = {}
        self._counted = 0
        self.given: torch.Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, keeping its shape where it is a row per image."""
        if n.target is batch_size:
            return BATCH
        value = super().run_node(n)
        if self.counter is not None:
            total = self.counter.get_total_flops()
            self.flops[n] = total - self._counted
            self._counted = total
        is_row = isinstance(value, torch.Tensor) and value.is_floating_point()
        if n in self.wanted and is_row and value.ndim > 1 and value.shape[0] == BATCH:
            self.shapes[n] = tuple(value.shape[1:])
        return value

    def count(self, images: torch.Tensor, model: nn.Module) -> dict[fx.Node, tuple[int, ...]]:
        """Do as `collect`, counting FLOPs."""
        with flop_counter(model) as self.counter:
            return self.collect(images)

    def collect(self, images: torch.Tensor) -> dict[fx.Node, tuple[int, ...]]:
        """Return the shapes for BATCH images, where there is one row an image, and keep what the graph gives.

        There are none, and no output, where the graph cannot run.
        """
        try:
            self.given = self.run(images)
        except RuntimeError:  # shapes that do not fit
            return {}
        return self.shapes


def row_shape(
    model: nn.Module, traced: Traced, node: fx.Node, images: torch.Tensor
) -> tuple[int, ...] | None:
    """Return the shape of one image's row at `node`, or None where it is not a floating-point row."""
    if node is traced.image:
        return tuple(images.shape[1:])
    graph = copy_graph(traced, traced.inputs[node], traced.image, node)
    last: Any = next(item for item in graph.nodes if item.op == "output").args[0]
    return Walk(model, graph, {last}).collect(images).get(last)


def agrees(prefix: nn.Module, suffix: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the parts give exactly what the network gives, and leave the row as it is.

    The suffix runs in both modes; BatchNorm statistics and the random state are put back.
    """
    rows = prefix(images)
    before = copy.deepcopy(rows)
    suffix.eval()
    if not torch.equal(suffix(rows), expected):
        return False
    _train_mode(suffix, rows)
    return torch.equal(rows, before)


def agrees_at_other_batches(
    prefix: nn.Module, suffix: nn.Module, images: torch.Tensor, expected: torch.Tensor
) -> bool:
    """Return whether parts that `agrees` is true of do not depend on there being BATCH images.

    One image must give exactly what the network gives for it, and BATCH + 1 rows as many features.

    Args:
        prefix: Images -> rows.
        suffix: Rows -> features.
        images: [BATCH, 3, H, W].
        expected: What the network gives for the first of them, [1, D].
    """
    rows = prefix(images)
    try:
        if not torch.equal(suffix.eval()(prefix(images[:1])), expected):
            return False
        features = _train_mode(suffix, torch.cat([rows, rows[:1]]))
    except RuntimeError:  # shapes that do not fit
        return False
    return features.shape[0] == BATCH + 1


def _train_mode(suffix: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return what a suffix gives in train mode, and leave it in eval mode with the statistics it had."""
    buffers = {name: buffer.clone() for name, buffer in suffix.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            features: torch.Tensor = suffix.train()(rows)
    finally:
        suffix.eval()
        for name, buffer in suffix.named_buffers():
            buffer.copy_(buffers[name])
    return features


def check_images(image_size: tuple[int, int]) -> torch.Tensor:
    """Return the images that cuts are checked with, [BATCH, 3, H, W]."""
    return torch.randn(BATCH, 3, *image_size, generator=torch.Generator().manual_seed(0))
