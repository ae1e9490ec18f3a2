"""A backbone's traced graph: what depends on what, where it can be divided, and what writes in place."""

import copy
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models import feature_extraction

from tlcli.errors import BackboneError

CONSTANT = "_tensor_constant"  # fx's name for a tensor that forward makes from no parameter
PLACE = "tlcli_place"  # where a copied node keeps the path it came from


class _Tracer(feature_extraction.NodePathTracer):  # type: ignore[misc]
    """Traces `forward(images)`: other arguments keep their defaults, and childless modules stay whole.

    A module left whole still follows its own `training` flag, where a traced one has it baked in.
    """

    def __init__(self) -> None:
        arguments = {
            "leaf_modules": list(get_notrace_modules()),
            "autowrap_functions": list(get_notrace_functions()),
        }
        super().__init__(**feature_extraction._set_default_tracer_kwargs(arguments))

    def is_leaf_module(self, module: nn.Module, module_qualname: str) -> bool:
        """Return whether `module` is one operation of the graph."""
        return not any(True for _ in module.children()) or bool(
            super().is_leaf_module(module, module_qualname)
        )

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make the image the only argument that is traced."""
        del is_module, concrete_args
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]


def batch_size() -> int:
    """Stand in a graph for the number of images, which every part of the graph reads from its own input."""
    raise NotImplementedError


@dataclass
class Traced:
    """A traced graph and what the search for a cut needs to know of its nodes.

    Attributes:
        graph: The graph.
        names: Node -> the path it came from.
        inputs: Node -> every node it depends on, itself included.
        touches: Node -> parameters used by it, or by constants it takes; image-dependent nodes only.
        dominators: Nodes that every path from the image to the output passes, in order; the image first.
        constants: The tensor constants of the network's graphs, by name.
    """

    graph: fx.Graph
    names: dict[fx.Node, str]
    inputs: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    touches: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    dominators: list[fx.Node] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def image(self) -> fx.Node:
        """The network's input."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return node

    def name(self, node: fx.Node) -> str:
        """Return the name of a place to divide the graph at."""
        return "input" if node is self.image else self.names[node]

    @property
    def output(self) -> fx.Node:
        """The node that returns the features."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "output")
        return node


def trace(model: nn.Module, frozen: frozenset[str], *, training: bool) -> Traced:
    """Trace `model` in the given mode, with `frozen` modules in eval mode, and leave it as it was."""
    tracer = _Tracer()
    with _modes(model, frozen, training):
        try:
            graph = tracer.trace(model)
        except Exception as error:  # tracing runs the model's own code on stand-ins, which can fail anywhere
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"{type(model).__name__} cannot be traced, so it can be frozen as a whole only: {reason}",
                hint="Use --freeze all, or --freeze none.",
            ) from error
    traced = Traced(graph=graph, names=dict(tracer.node_to_qualname), constants=constants_of(model))
    analyse(traced, model)
    return traced


@contextmanager
def _modes(model: nn.Module, frozen: frozenset[str], training: bool) -> Iterator[None]:
    """Put the modules in the modes to trace in, then back; what forward stores on them is undone too.

    Some attention layers (LeViT's) keep their biases between evaluations and drop them on `train()`. Kept
    ones would become constants of the graph, and stand-ins kept while tracing would break the network.
    """
    before = {module: module.training for module in model.modules()}
    model.train()
    stores = [
        (store, copy.copy(store))
        for module in model.modules()
        for key, store in vars(module).items()
        if not key.startswith("_") and isinstance(store, dict)
    ]
    for name, module in model.named_modules():
        module.training = training and name not in frozen
    try:
        yield
    finally:
        for store, content in stores:
            store.clear()
            store.update(content)
        for module, mode in before.items():
            module.training = mode


@contextmanager
def without_constants(model: nn.Module) -> Iterator[None]:
    """Remove the tensor constants that tracing leaves on a network."""
    before = set(constants_of(model))
    try:
        yield
    finally:
        for name in set(constants_of(model)) - before:
            delattr(model, name)


def constants_of(model: nn.Module) -> dict[str, Any]:
    """Return the tensor constants that tracing has left on a network, by the names that graphs use."""
    return {name: value for name, value in vars(model).items() if name.startswith(CONSTANT)}


def forget_constants(part: nn.Module) -> None:
    """Keep the constants of a traced part out of its state dict, which then has the network's names alone."""
    part._non_persistent_buffers_set |= {name for name in part._buffers if name.startswith(CONSTANT)}


def analyse(traced: Traced, model: nn.Module) -> None:
    """Fill in dependencies, parameters touched, and dominators of a graph whose other fields are given.

    Raises:
        BackboneError: The output does not depend on the image.
    """
    import networkx

    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    edges = networkx.DiGraph()
    constants: dict[fx.Node, frozenset[str]] = {}
    image = traced.image
    edges.add_node(image)
    for node in traced.graph.nodes:
        traced.inputs[node] = frozenset({node}).union(*(traced.inputs[arg] for arg in node.all_input_nodes))
        used = frozenset(_own_parameters(node, model, parameters)).union(
            *(constants.get(arg, frozenset()) for arg in node.all_input_nodes)
        )
        if image in traced.inputs[node]:
            traced.touches[node] = used
            edges.add_edges_from((arg, node) for arg in node.all_input_nodes if image in traced.inputs[arg])
        else:
            constants[node] = used
    above = networkx.immediate_dominators(edges, image)
    node = traced.output
    if node not in above:
        raise BackboneError(f"{type(model).__name__}: its output does not depend on the image.")
    while node is not image:
        node = above[node]
        traced.dominators.append(node)
    traced.dominators.reverse()


def _own_parameters(node: fx.Node, model: nn.Module, names: dict[int, str]) -> Iterator[str]:
    if node.op == "call_module":
        for parameter in model.get_submodule(str(node.target)).parameters():
            yield names[id(parameter)]
    elif node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(model)
        if id(value) in names:
            yield names[id(value)]


def candidates(traced: Traced, trained: Iterable[str]) -> list[fx.Node]:
    """Return the dominators before anything trained, with no parameter on both sides; the image first."""
    trained = frozenset(trained)
    relevant = traced.inputs[traced.output]
    result = []
    for node in traced.dominators:
        before = traced.inputs[node]
        inside = frozenset().union(*(traced.touches.get(item, frozenset()) for item in before))
        if inside & trained:
            break
        outside = frozenset().union(*(traced.touches.get(item, frozenset()) for item in relevant - before))
        if not inside & outside:
            result.append(node)
    return result


def twin_of(node: fx.Node, plain: Traced, random: Traced) -> fx.Node | None:
    """Return the dominator of the train graph that computes what `node` does, or None."""
    wanted = _signature(node, plain)
    for other in random.dominators:
        if random.names.get(other) == plain.names.get(node) and _signature(other, random) == wanted:
            return other
    return None


def _signature(node: fx.Node, traced: Traced) -> list[tuple[Any, ...]]:
    """Return the computation below `node` as comparable values.

    Each trace gives constants new names, so that only their values can be compared.
    """
    before = [item for item in traced.graph.nodes if item in traced.inputs[node]]
    places = {item: place for place, item in enumerate(before)}
    return [
        (
            item.op,
            _content(traced.constants[item.target]) if item.target in traced.constants else str(item.target),
            repr(fx.node.map_arg((item.args, item.kwargs), lambda arg: f"#{places[arg]}")),
        )
        for item in before
    ]


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return type, shape and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def live(nodes: set[fx.Node], end: Any) -> set[fx.Node]:
    """Return those of `nodes` that `end` depends on through `nodes` alone."""
    live: set[fx.Node] = set()
    stack = [end]
    while stack:
        item = stack.pop()
        if item in nodes and item not in live:
            live.add(item)
            stack.extend(item.all_input_nodes)
    return live


def _plain(node: fx.Node) -> Iterator[Any]:
    """Yield the arguments of a node, those inside collections included."""
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    yield from found


def _replace_devices(node: fx.Node, here: fx.Node) -> None:
    def moved(value: Any) -> Any:
        return here if isinstance(value, torch.device) else value

    arguments: Any = fx.node.map_aggregate(node.args, moved)
    named: Any = fx.node.map_aggregate(node.kwargs, moved)
    node.args, node.kwargs = arguments, named


def copy_graph(
    traced: Traced, nodes: Iterable[fx.Node], start: fx.Node, end: Any, *, clone: bool = False
) -> fx.Graph:
    """Return the part of a graph made of `nodes`, from `start` (its input) to `end` (its output).

    The batch size is the first dimension of the input, wherever the part begins. Where the network was traced
    does not matter: what was made on that device is made where the input is.
    """
    wanted = set(nodes)
    graph = fx.Graph(tracer_cls=None)
    first = graph.placeholder("x")
    copies = {start: graph.call_method("clone", (first,)) if clone else first}
    for node in traced.graph.nodes:
        if node in wanted and node not in copies:
            if node.target is batch_size:
                copies[node] = graph.call_method("size", (first, 0))
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta[PLACE] = traced.names.get(node, node.name)
            if any(isinstance(value, torch.device) for value in _plain(node)):
                with graph.inserting_before(copies[node]):
                    here = graph.call_function(getattr, (first, "device"))
                _replace_devices(copies[node], here)
    graph.output(copies[end])
    return graph


VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "contiguous",
    "chunk", "split", "unbind", "narrow", "movedim", "swapaxes", "unflatten", "to", "float", "t", "type_as",
    "getitem",
    "dropout", "identity", "detach", "getattr",
}  # fmt: skip
IN_PLACE_OPERATORS = {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "setitem")}


def writes(traced: Traced, nodes: set[fx.Node], start: fx.Node, model: nn.Module) -> bool:
    """Return whether an operation among `nodes` may write into `start`'s tensor, directly or by a view."""
    aliases = {start}
    for node in traced.graph.nodes:
        if node not in nodes or not node.args or node.args[0] not in aliases:
            continue
        if _is_in_place(node, model):
            return True
        if is_view(node, model):
            aliases.add(node)
    return False


def _is_in_place(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        inner = getattr(
            module, "act", None
        )  # timm's norm layers carry an activation, applied to a new tensor
        return bool(getattr(module, "inplace", False)) and inner is None
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.target in IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")) or _name(node).endswith("_")


def is_view(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a node gives the values of its first argument, of frozen modules at least."""
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target)))
        names = {base.__name__.lower() for base in kind.__mro__}
        return bool(
            names & {"identity", "flatten", "unflatten", "dropout", "droppath", "permute", "dropout2d"}
        )
    return _name(node) in VIEWS


def _name(node: fx.Node) -> str:
    return (
        str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    )
