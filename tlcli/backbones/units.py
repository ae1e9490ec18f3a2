"""The units of a backbone: its steps in forward order, which `--freeze K` counts from 1.

Units are timm's `group_matcher` groups. A network without a matcher (torchvision's) is divided at its
top-level children; Sequentials, stages of like blocks and whatever holds nearly everything are opened. Every
parameter, buffer and module lies in exactly one unit, except containers that span several.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tlcli.config.backbone import parse_freeze
from tlcli.errors import BackboneError, UsageError

MAIN_SHARE = 0.8
"""A child with more than this share of the parameters is opened, or it would be nearly the only unit."""


@dataclass(frozen=True)
class Unit:
    """One step of a backbone.

    Attributes:
        index: From 1, in forward order.
        name: The module that its parameters share, such as "layer1.0"; of several, the first.
        modules: Names of all modules that belong to it alone, children included. Freezing a unit means
            these stay in eval mode.
        parameters: Names of its parameters.
        buffers: Names of its buffers.
        num_parameters: Number of values in its parameters.
    """

    index: int
    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    num_parameters: int


def units(model: nn.Module) -> list[Unit]:
    """Return the units of a headless backbone, in forward order.

    Raises:
        BackboneError: The network has no parameters.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise BackboneError(f"A {type(model).__name__} without parameters is no backbone.")
    groups = _timm_groups(model) or _child_groups(model)
    unit_of = {name: number for number, names in enumerate(groups) for name in names}
    module_unit = _module_units(model, unit_of)
    buffers = {
        name: module_unit.get(name.rpartition(".")[0], _nearest(name, unit_of))
        for name, _ in model.named_buffers()
    }
    return [
        Unit(
            index=number + 1,
            name=_unit_name(names, unit_of),
            modules=tuple(name for name, unit in module_unit.items() if unit == number),
            parameters=tuple(name for name in parameters if unit_of[name] == number),
            buffers=tuple(name for name, unit in buffers.items() if unit == number),
            num_parameters=sum(parameters[name].numel() for name in names),
        )
        for number, names in enumerate(groups)
    ]


def num_frozen_units(freeze: str | int | None, num_units: int) -> int:
    """Return the number of frozen units that `--freeze` means for a backbone.

    Args:
        freeze: "all" (also None), "none", or a whole number from 0 to `num_units`.
        num_units: How many units the backbone has.

    Raises:
        UsageError: It is none of these; the message names the number of units.
    """
    found = "all" if freeze is None else parse_freeze(str(freeze))
    if found == "all":
        return num_units
    if found > num_units:
        raise UsageError(
            f"--freeze {found} is more than the backbone has: it has {num_units} units.",
            hint=f"Use at most {num_units}, or all; `tlcli backbones show` lists them.",
        )
    return found


def _timm_groups(model: nn.Module) -> list[list[str]] | None:
    """Return parameter names by timm's matcher, in forward order, or None where there is none.

    What no pattern matches is the head's, and comes last: of a headless network, its final norm.
    """
    matcher: Callable[..., Any] | None = getattr(model, "group_matcher", None)
    if matcher is None:
        return None
    from timm.models import group_parameters

    try:
        pattern = matcher(coarse=False)
    except (NotImplementedError, AssertionError, AttributeError):
        return None
    groups: Mapping[int, list[str]] = group_parameters(model, pattern)
    result = [list(names) for _, names in sorted(groups.items())]
    return result if len(result) > 1 else None


def _child_groups(model: nn.Module) -> list[list[str]]:
    """Return parameter names by child, opened where children are containers, in order of declaration."""
    total = sum(parameter.numel() for parameter in model.parameters())
    groups: list[list[str]] = []
    own = [name for name, _ in model.named_parameters(recurse=False)]
    for prefix, module in _steps(model, "", total):
        names = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        if names and groups and _is_norm(module):
            groups[-1].extend(names)  # a normalisation ends the step before it
        elif names:
            groups.append(names)
    taken = {name for names in groups for name in names}
    # Parameters that an opened container holds itself, such as position embeddings, join its first unit.
    for name, _ in model.named_parameters():
        if name not in taken and name not in own:
            container = name.rpartition(".")[0] + "."
            next((names for names in groups if names[0].startswith(container)), groups[0]).append(name)
    groups[0].extend(own)
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    return [sorted(names, key=order.__getitem__) for names in groups]


def _steps(module: nn.Module, prefix: str, total: int, depth: int = 0) -> Iterable[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if _opens(child, total, depth):
            yield from _steps(child, path, total, depth + 1)
        else:
            yield path, child


def _opens(module: nn.Module, total: int, depth: int) -> bool:
    """Return whether a unit should rather be each of this module's children."""
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if _is_stage(module):
        return True
    inside = children if type(module) is nn.Sequential else [one for one in children if not _is_branch(one)]
    if any(_is_stage(child) for child in inside):
        return True
    if len(children) < 2:
        return False
    size = sum(parameter.numel() for parameter in module.parameters())
    return size > MAIN_SHARE * total or (depth == 0 and type(module) is nn.Sequential)


def _is_stage(module: nn.Module) -> bool:
    """Return whether a module is a row of like blocks."""
    children = list(module.children())
    return (
        isinstance(module, nn.Sequential | nn.ModuleList)
        and len(children) > 1
        and len({type(child) for child in children}) == 1
        and not isinstance(children[0], nn.Linear | nn.Conv2d | nn.Sequential)
    )


def _is_branch(module: nn.Module) -> bool:
    """Return whether a module is a row of single convolutions, as the branches of GoogLeNet's blocks are."""
    kinds = nn.Linear | nn.Conv2d
    return all(sum(isinstance(part, kinds) for part in child.modules()) == 1 for child in module.children())


def _is_norm(module: nn.Module) -> bool:
    """Return whether normalisation holds all of a module's parameters."""
    holders = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    return all("norm" in type(part).__name__.lower() for part in holders)


def _module_units(model: nn.Module, unit_of: Mapping[str, int]) -> dict[str, int]:
    """Return module name -> unit, for every module that does not span several.

    A module without parameters belongs with the module around it, else with what was declared before it.
    """
    result: dict[str, int] = {}
    before = 0
    for name, module in model.named_modules():
        if not name:
            continue
        inside = {
            unit_of[f"{name}.{key}"] for key, _ in module.named_parameters() if f"{name}.{key}" in unit_of
        }
        parent = result.get(name.rpartition(".")[0])
        if parent is not None:
            result[name] = parent
        elif len(inside) == 1:
            result[name] = inside.pop()
        elif not inside and not any(True for _ in module.parameters()):
            result[name] = before
        if name in result:
            before = result[name]
    return result


def _nearest(name: str, unit_of: Mapping[str, int]) -> int:
    """Return the unit of the parameter with the longest path in common with a buffer."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        start = f"{path}." if path else ""
        found = [unit for key, unit in unit_of.items() if key.startswith(start)]
        if found:
            return min(found)
    return 0


def _unit_name(names: list[str], unit_of: Mapping[str, int]) -> str:
    """Return the shortest module path in a group that no other group shares."""
    for name in names:
        parts = name.split(".")[:-1]
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            if len({unit for other, unit in unit_of.items() if other.startswith(f"{path}.")}) == 1:
                return path
    return names[0].rpartition(".")[0] or names[0]


def frozen_modules(parts: Iterable[Unit], num_frozen_units: int) -> frozenset[str]:
    """Return the names of the modules that stay in eval mode when the first units are frozen."""
    return frozenset(name for unit in parts if unit.index <= num_frozen_units for name in unit.modules)
