"""Dividing a backbone into a frozen prefix and a trained suffix, with one tensor crossing.

The network is traced with torch.fx, and divided at a *dominator* of the graph: an operation that every path
from the image to the features passes through. Of these, the last is taken before anything that a trained
unit's parameters touch; what lies between it and the end of the last frozen unit is frozen, but recomputed.

A graph traced in eval mode has lost dropout, one traced in train mode is random at evaluation. So the suffix
holds both and switches, as torchvision's feature extractor does. Frozen modules are in eval mode in both.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn
from torchvision.models import feature_extraction

from tlcli.backbones.exactness import Walk, agrees, agrees_at_other_batches, check_images, row_shape
from tlcli.backbones.folding import fold
from tlcli.backbones.graph import (
    Traced,
    candidates,
    constants_of,
    copy_graph,
    forget_constants,
    live,
    trace,
    twin_of,
    without_constants,
    writes,
)
from tlcli.backbones.units import Unit, frozen_modules, units
from tlcli.backbones.work import SavedWork, behind, saved_work
from tlcli.errors import BackboneError, UsageError


@dataclass
class Cut:
    """A divided backbone: `suffix(prefix(images))` equals `model(images)`.

    Dividing leaves the network as it was: its values, its modes, the gradients it asks for. The parts share
    its tensors, so that what trains or moves a part trains or moves the network, and have modes of their own.
    With everything frozen the prefix is the network itself, with nothing frozen the suffix is.

    Attributes:
        prefix: Images [B, 3, H, W] -> rows [B, *row_shape]; in eval mode whatever `train` is asked.
        suffix: Rows -> features [B, D]. Parameter and buffer names are the network's. Its frozen parts are in
            eval mode after every `train()`.
        node: Name of the operation that gives the rows; "all" when everything is frozen, "input" when the
            rows are the images.
        num_frozen_units: K of `--freeze K`.
        row_shape: Shape of one image's row.
        frozen_parameters: Names of the suffix's parameters that belong to frozen units.
        saved: How much of the frozen units' work the prefix does; None where that is all of it.
    """

    prefix: nn.Module
    suffix: nn.Module
    node: str
    num_frozen_units: int
    row_shape: tuple[int, ...]
    frozen_parameters: tuple[str, ...] = ()
    saved: SavedWork | None = None

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the units that are not frozen."""
        frozen = set(self.frozen_parameters)
        return [value for name, value in self.suffix.named_parameters() if name not in frozen]


@dataclass(frozen=True)
class CutPoint:
    """Where a network would be cut for K frozen units, without building the parts.

    Attributes:
        num_frozen_units: K.
        node: As in Cut.
        row_shape: As in Cut.
        saved_share: Share of the work of the units up to K that lies before it, in [0, 1].
    """

    num_frozen_units: int
    node: str
    row_shape: tuple[int, ...]
    saved_share: float = 1.0


class Frozen(nn.Sequential):
    """Modules that stay in eval mode whatever `train` is asked."""

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode."""
        del mode
        super().train(False)
        return self


class Prefix(fx.GraphModule):
    """The frozen part of a traced network; stays in eval mode whatever `train` is asked."""

    def train(self, mode: bool = True) -> "Prefix":
        """Stay in eval mode."""
        del mode
        super().train(False)
        return self


class Suffix(feature_extraction.DualGraphModule):  # type: ignore[misc]
    """The rest of a traced network, switching between its graphs of train and eval mode.

    Args:
        root: The network whose modules are used.
        train_graph: Traced in train mode, frozen modules in eval mode.
        eval_graph: Traced in eval mode.
        frozen: Names of modules that stay in eval mode.
        unused: Names of parameters and buffers that no operation uses, kept so that none is lost.
    """

    def __init__(
        self,
        root: nn.Module,
        train_graph: fx.Graph,
        eval_graph: fx.Graph,
        frozen: Iterable[str],
        unused: Iterable[str],
    ) -> None:
        self.frozen_modules = frozenset(frozen)
        self.unused_names = tuple(unused)
        super().__init__(root, train_graph, eval_graph, class_name="Suffix")
        for name in self.unused_names:
            fx.graph_module._copy_attr(root, self, name)
        forget_constants(self)
        self.frozen_modules = frozenset(frozen)
        self.unused_names = tuple(unused)
        self.train(True)

    def train(self, mode: bool = True) -> "Suffix":
        """Switch to `mode`, except for what is frozen."""
        super().train(mode)
        for name, module in self.named_modules():
            if name in self.frozen_modules:
                module.training = False
        return self

    def _deepcopy_init(self) -> Callable[..., None]:
        def init(result: "Suffix", source: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph) -> None:
            Suffix.__init__(result, source, train_graph, eval_graph, self.frozen_modules, self.unused_names)
            result.train(self.training)
            for name, module in self.named_modules():
                result.get_submodule(name).training = module.training

        return init


def cut_at(model: nn.Module, num_frozen_units: int, image_size: tuple[int, int]) -> Cut:
    """Divide a headless backbone after its first units, as late as can be; the network is left as it was.

    Args:
        model: From `load_backbone`.
        num_frozen_units: 0 to the number of units. With all of them the prefix is the model itself, with none
            the suffix is; neither is traced.
        image_size: Height and width of the images, in pixels.

    Raises:
        UsageError: The network has fewer units.
        BackboneError: The network cannot be traced or divided exactly.
    """
    parts = units(model)
    if not 0 <= num_frozen_units <= len(parts):
        raise UsageError(f"The backbone has {len(parts)} units; {num_frozen_units} cannot be frozen.")
    images = check_images(image_size)
    if num_frozen_units == len(parts):
        with _as_it_was(model), torch.no_grad():
            vector = tuple(model(images[:1]).shape[1:])
        return Cut(model, nn.Identity(), "all", num_frozen_units, vector)
    if num_frozen_units == 0:
        return Cut(Frozen(), model, "input", 0, tuple(images.shape[1:]))
    return _divided(model, parts, num_frozen_units, images).cut()


def freeze_parameters(cut: Cut) -> None:
    """Let the network of a cut ask for gradients where it is trained, and nowhere else.

    The first step of a training. Until then a network asks for the gradients it was loaded with.
    """
    cut.prefix.requires_grad_(False)
    cut.suffix.requires_grad_(False)
    for parameter in cut.trained_parameters():
        parameter.requires_grad_(True)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode inside the block, and every module back in its own mode after it."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class _Traces(NamedTuple):
    """A network traced in eval mode, and in train mode with its frozen modules in eval mode."""

    plain: Traced
    random: Traced


@dataclass(frozen=True)
class _Division:
    """A traced network and its frozen units.

    Attributes:
        model: The network.
        parts: Its units.
        num_frozen_units: How many of them are frozen.
        images: The batch that cuts are checked with, [2, 3, H, W].
        traces: With the sizes of the images as constants where that changes anything; last, as traced.
        constants: The tensors that the graphs expect on the network.
    """

    model: nn.Module
    parts: list[Unit]
    num_frozen_units: int
    images: torch.Tensor
    traces: list[_Traces]
    constants: dict[str, torch.Tensor]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let parts of the graphs be made and run inside the block; then the network is as it was."""
        with without_constants(self.model), _as_it_was(self.model), torch.no_grad():
            vars(self.model).update(self.constants)
            yield

    def frozen(self) -> frozenset[str]:
        """Return the names of the parameters of frozen units."""
        return frozenset(name for unit in self.parts[: self.num_frozen_units] for name in unit.parameters)

    def places(self, plain: Traced) -> list[fx.Node]:
        """Return where a graph of eval mode could be divided, the image first."""
        trained = {name for name, _ in self.model.named_parameters()} - self.frozen()
        return candidates(plain, trained)

    def cut(self) -> Cut:
        """Return the last exact cut.

        Raises:
            BackboneError: There is none.
        """
        with self.ready():
            found = self._exact()
        if found is None:
            raise BackboneError(
                f"{type(self.model).__name__} cannot be divided after unit {self.num_frozen_units}: "
                "no cut is exact.",
                hint="Use --freeze all.",
            )
        return found

    def _exact(self) -> Cut | None:
        modules, frozen = frozen_modules(self.parts, self.num_frozen_units), self.frozen()
        expected = self.model(self.images)
        one = self.model(self.images[:1]) if len(self.traces) > 1 else expected[:1]
        for node, traces in self._tries():
            twin = twin_of(node, traces.plain, traces.random)
            if twin is None or (shape := row_shape(self.model, traces.plain, node, self.images)) is None:
                continue
            prefix, suffix = _divide(self.model, traces, node, twin, modules)
            if agrees(prefix, suffix, self.images, expected) and (
                traces is self.traces[-1] or agrees_at_other_batches(prefix, suffix, self.images, one)
            ):
                kept = tuple(key for key, _ in suffix.named_parameters() if key in frozen)
                saved = self._saved(traces.plain, node)
                name = traces.plain.name(node)
                return Cut(prefix, suffix.eval(), name, self.num_frozen_units, shape, kept, saved)
        return None

    def _saved(self, plain: Traced, node: fx.Node) -> SavedWork:
        """Return how much of the frozen work a cut saves."""
        if not behind(plain, node, self.parts, self.num_frozen_units):
            return SavedWork(1.0, self.num_frozen_units)
        self.model.eval()
        walk = Walk(self.model, plain.graph, set())
        walk.count(self.images, self.model)
        return saved_work(plain, node, walk.flops, self.parts, self.num_frozen_units)

    def _tries(self) -> list[tuple[fx.Node, _Traces]]:
        """Return the places from the last to the image, at each the folded graphs first."""
        order = {name: place for place, name in enumerate(self.traces[-1].plain.names.values())}
        found = [(node, traces) for traces in self.traces for node in self.places(traces.plain)]
        return sorted(found, key=lambda item: -order.get(item[1].plain.name(item[0]), -1))


def _divided(model: nn.Module, parts: list[Unit], num_frozen_units: int, images: torch.Tensor) -> _Division:
    modules = frozen_modules(parts, num_frozen_units)
    with without_constants(model), torch.no_grad():
        plain = trace(model, modules, training=False)
        try:
            as_traced = _Traces(plain, trace(model, modules, training=True))
        except BackboneError as error:
            found = _traced_from(model, parts, num_frozen_units + 1)
            if found is None:
                raise
            rest = " or more" if found < len(parts) - 1 else ", or --freeze all"
            raise BackboneError(
                f"{type(model).__name__} cannot be traced for training with {num_frozen_units} units frozen.",
                hint=f"Use --freeze {found}{rest}.",
            ) from error
        image_size = (images.shape[-2], images.shape[-1])
        folded = _Traces(*(fold(traced, model, image_size) for traced in as_traced))
        constants = constants_of(model)
    traces = [as_traced] if folded == as_traced else [folded, as_traced]
    return _Division(model, parts, num_frozen_units, images, traces, constants)


def _traced_from(model: nn.Module, parts: list[Unit], least: int) -> int | None:
    """Return the smallest number of frozen units, of those from `least`, with which train mode is traced."""
    for count in range(least, len(parts)):
        with suppress(BackboneError):
            trace(model, frozen_modules(parts, count), training=True)
            return count
    return None


def cut_points(model: nn.Module, image_size: tuple[int, int]) -> list[CutPoint]:
    """Return where the network would be cut for each K from 1 to the number of units, from one trace.

    Raises:
        BackboneError: The network cannot be traced.
    """
    parts = units(model)
    images = check_images(image_size)
    result = []
    with without_constants(model), _as_it_was(model), torch.no_grad():
        features = model(images)
        as_traced = trace(model, frozenset(), training=False)
        for traced in (fold(as_traced, model, image_size), as_traced):
            walk = Walk(model, traced.graph, set(traced.dominators))
            shapes = walk.count(images, model)
            if walk.given is not None and torch.equal(walk.given, features):
                break
        for unit in parts[:-1]:
            trained = {name for later in parts[unit.index :] for name in later.parameters}
            for node in reversed(candidates(traced, trained)):
                if (shape := shapes.get(node)) is not None:
                    saved = saved_work(traced, node, walk.flops, parts, unit.index)
                    result.append(CutPoint(unit.index, traced.name(node), shape, saved.share))
                    break
    return [*result, CutPoint(len(parts), "all", tuple(features.shape[1:]))]


# ---- dividing --------------------------------------------------------------------------------------------


def _divide(
    model: nn.Module, traces: _Traces, node: fx.Node, twin: fx.Node, frozen: frozenset[str]
) -> tuple[nn.Module, Suffix]:
    """Return prefix and suffix of a cut; the suffix never writes into the tensor that crosses."""
    prefix = _prefix(model, traces.plain, node)
    graphs = []
    for traced, start in ((traces.random, twin), (traces.plain, node)):
        end = traced.output.args[0]
        needed = traced.inputs[traced.output] - {traced.output, start}
        # Constants that both sides use are computed again in the suffix: only the row crosses.
        after = {
            item for item in needed if start in traced.inputs[item] or traced.image not in traced.inputs[item]
        }
        after = live(after, end)
        graphs.append(copy_graph(traced, after, start, end, clone=writes(traced, after, start, model)))
    used = Suffix(model, graphs[0], graphs[1], frozen, ())
    held = {name for part in (prefix, used) for name, _ in (*part.named_parameters(), *part.named_buffers())}
    unused = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in held]
    suffix = Suffix(model, graphs[0], graphs[1], frozen, unused) if unused else used
    _give_own_modes(suffix, {})
    return prefix, suffix


def _prefix(model: nn.Module, plain: Traced, node: fx.Node) -> nn.Module:
    """Return the part of a network from the image to `node`, which may be the image itself."""
    if node is plain.image:
        return Frozen()
    prefix = Prefix(model, copy_graph(plain, plain.inputs[node], plain.image, node), class_name="Prefix")
    _give_own_modes(prefix, {})
    prefix.train(False)
    forget_constants(prefix)
    return prefix


def _give_own_modes(part: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """Replace the modules of a part by shallow copies: the same tensors, in a mode of their own.

    The copies hold the same dicts of parameters and buffers, so that what moves or replaces a tensor of a
    part does it for the network too.

    Args:
        part: Its children are replaced.
        made: The copy of each module so far, since one may stand in several places.
    """
    for name, child in part.named_children():
        if child not in made:
            made[child] = copy.copy(child)
            made[child]._modules = dict(child._modules)
            _give_own_modes(made[child], made)
        part._modules[name] = made[child]
