"""A traced graph with image sizes as constants, so that fewer paths lead round the places to divide it at.

A network that reads `x.shape` hands the sizes to later layers, beside the tensor that could cross a cut. At
one image size they are constants. Found by running the graph on the meta device, which computes shapes only,
with batches of two sizes: what is equal in both depends on the image size alone, and what grows with the
batch is a multiple of its size, which a suffix reads from the rows. No tensor's value becomes a constant.

Dense blocks concatenate all features so far in each layer: [a, b], then [a, b, c]. Written as [[a, b], c],
which has the same values, each concatenation passes through the one before, and the network can be cut there.
"""

import copy
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tlcli.backbones.graph import Traced, analyse, batch_size, is_view, writes
from tlcli.wording import first_line

logger = logging.getLogger(__name__)

BATCHES = (2, 101)  # the second so odd that no size of a network is near a multiple of it
# getitem counts where the item that it takes of a function's result is not a tensor.
SHAPE_FUNCTIONS = {torch.numel, len, operator.getitem}
SHAPE_METHODS = {"size", "dim", "ndimension", "numel"}


class Varies(Exception):
    """A value that is neither a constant nor a multiple of the batch size."""


@dataclass(frozen=True)
class Multiple:
    """An integer that is `factor` times the number of images."""

    factor: int


def fold(traced: Traced, model: nn.Module, image_size: tuple[int, int]) -> Traced:
    """Return an equivalent graph of the same names, with at least the same places to divide it at.

    Args:
        traced: Of `model`; left as it is, and returned itself where there is nothing to fold.
        model: The network; neither its tensors nor its modes change.
        image_size: Height and width of the images, in pixels: the only ones that the result is right for.
    """
    try:
        constants = _constants(traced, model, image_size)
    except Exception as error:  # any network's code, on a device it may not know: the plain cuts remain
        logger.debug("the image sizes of %s are not folded: %s", type(model).__name__, first_line(error))
        constants = {}
    graph, names = _replaced(traced, constants)
    result = Traced(graph=graph, names=names, constants=traced.constants)
    chained = _chain_concatenations(result, model)
    if not constants and not chained:
        return traced
    graph.lint()
    analyse(result, model)
    result.dominators = list(_worth_a_cut(result, {traced.name(node) for node in traced.dominators}, model))
    return result


# ---- which values are constants --------------------------------------------------------------------------


def _constants(traced: Traced, model: nn.Module, image_size: tuple[int, int]) -> dict[fx.Node, Any]:
    """Return node -> value, of integers, floats, truth values and tuples; batch sizes are Multiples."""
    if not any(_reads_shape(node) for node in traced.graph.nodes):
        return {}
    twin = _on_meta(model)
    runs = []
    for size in BATCHES:
        with torch.no_grad(), torch.device("meta"):
            recorder = _Recorder(twin, graph=traced.graph)
            recorder.run(torch.empty(size, 3, *image_size))
        runs.append(recorder.values)
    found: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node not in runs[0] or not node.all_input_nodes:
            continue
        known = all(arg in found for arg in node.all_input_nodes) or runs[0][node] is None
        if not known and not _reads_shape(node):
            continue
        try:
            found[node] = _expressed(*(run[node] for run in runs))
        except Varies:
            continue
    return found


def _reads_shape(node: fx.Node) -> bool:
    """Return whether a node reads nothing but the shape of what it is given."""
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    if node.op != "call_function":
        return False
    return node.target in SHAPE_FUNCTIONS or (node.target is getattr and node.args[1] in {"shape", "ndim"})


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values that are not tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, keeping what it gives."""
        value = super().run_node(n)
        plain = value is None or isinstance(value, int | float | str | tuple | list)
        if plain and n.op in {"call_function", "call_method"}:
            self.values[n] = value
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of a node, on this device wherever the graph names another."""
        meta = torch.device("meta")
        found: tuple[Any, Any] = fx.node.map_aggregate(
            super().fetch_args_kwargs_from_env(n), lambda arg: meta if isinstance(arg, torch.device) else arg
        )
        return found


def _expressed(small: Any, large: Any) -> Any:
    """Return the value of a node by what it is in the two batches.

    Raises:
        Varies: It depends on the batch in another way, or is not a plain value.
    """
    if isinstance(small, tuple | list) and isinstance(large, tuple | list) and len(small) == len(large):
        values = [_expressed(*pair) for pair in zip(small, large, strict=True)]
        return values if isinstance(small, list) else tuple(values)
    if small is None and large is None:
        return None
    if type(small) is type(large) and isinstance(small, int | float | str) and small == large:
        return small
    if type(small) is type(large) is int and small and small * BATCHES[1] == large * BATCHES[0]:
        return Multiple(small // BATCHES[0])
    raise Varies


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a network on the meta device, made without copying a tensor."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        for tensor in own:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo)


# ---- graphs ----------------------------------------------------------------------------------------------


def _replaced(traced: Traced, constants: Mapping[fx.Node, Any]) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Return a copy of a graph, and its names, with constants in place of the nodes that give them."""
    graph = fx.Graph(tracer_cls=None)
    copies: dict[fx.Node, fx.Node] = {}
    batch: fx.Node | None = None
    multiples: dict[int, fx.Node] = {}
    factors = sorted({item.factor for value in constants.values() for item in _multiples_in(value)})

    def written(value: Any) -> Any:
        if isinstance(value, Multiple):
            return multiples[value.factor]
        if isinstance(value, tuple | list):
            return type(value)(written(item) for item in value)
        return value

    for node in traced.graph.nodes:
        if constants.get(node) is not None:
            continue
        copies[node] = graph.node_copy(
            node, lambda arg: written(constants[arg]) if arg in constants else copies[arg]
        )
        if node is traced.image and factors:
            batch = graph.call_function(batch_size)
            for factor in factors:
                product = graph.call_function(operator.mul, (batch, factor)) if factor != 1 else batch
                multiples[factor] = product
    return graph, {copies[node]: name for node, name in traced.names.items() if node in copies}


def _multiples_in(value: Any) -> list[Multiple]:
    if isinstance(value, tuple | list):
        return [found for item in value for found in _multiples_in(item)]
    return [value] if isinstance(value, Multiple) else []


def _chain_concatenations(traced: Traced, model: nn.Module) -> bool:
    """Let each concatenation that begins with all parts of an earlier one take that; return whether any does.

    An earlier one that is written into later has other values by then, and is not taken.
    """
    nodes = set(traced.graph.nodes)
    earlier: dict[tuple[Any, ...], fx.Node] = {}
    changed = False
    for node in traced.graph.nodes:
        if node.target is not torch.cat or not node.args or not isinstance(node.args[0], tuple | list):
            continue
        parts = tuple(node.args[0])
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        for length in range(len(parts) - 1, 1, -1):
            before = earlier.get((dim, *parts[:length]))
            if before is not None and not writes(traced, nodes, before, model):
                node.update_arg(0, [before, *parts[length:]])
                changed = True
                break
        if dim is not None and not isinstance(dim, fx.Node):
            earlier.setdefault((dim, *parts), node)
    return changed


def _worth_a_cut(traced: Traced, known: set[str], model: nn.Module) -> Iterator[fx.Node]:
    """Yield the dominators but for new ones that are views of the one before: those save no work.

    Rows that are cached at the one before stay valid.
    """
    aliases: set[Any] = set()
    for node in traced.dominators:
        is_alias = is_view(node, model) and bool(node.args) and node.args[0] in aliases
        if is_alias and traced.name(node) not in known:
            aliases.add(node)
        else:
            aliases = {node}
            yield node
