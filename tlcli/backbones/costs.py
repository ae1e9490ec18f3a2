"""What each unit of a backbone costs: its share of the work, and the bytes of a row cached at its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlcli.backbones.cut import CutPoint, cut_points
from tlcli.backbones.units import Unit, units
from tlcli.backbones.work import flop_counter
from tlcli.errors import BackboneError

VECTOR_BYTES = 4
MAP_BYTES = 2


@dataclass(frozen=True)
class UnitCosts:
    """One row of `tlcli backbones show`.

    Attributes:
        unit: The unit.
        output_shape: What its last module gives for one image; None where that is no tensor.
        flops: Multiplications and additions of its matrix products and convolutions, for one image.
        flops_share: Of the whole backbone, in [0, 1].
        cut: Where the network is cut when this is the last frozen unit; None where it cannot be.
        row_bytes: Bytes of one cached row there, in the default types: float32 for a vector, bf16 for a map.
        saved_share: Of the FLOPs of this unit and those before it, the share before that cut, in [0, 1].
    """

    unit: Unit
    output_shape: tuple[int, ...] | None
    flops: int
    flops_share: float
    cut: CutPoint | None
    row_bytes: int | None
    saved_share: float | None


def unit_costs(model: nn.Module, image_size: tuple[int, int]) -> list[UnitCosts]:
    """Return the costs of every unit, from one forward pass and one trace.

    Args:
        model: From `load_backbone`.
        image_size: Height and width of the images, in pixels.
    """
    parts = units(model)
    owner = {name: unit.index for unit in parts for name in unit.modules}
    shapes, counts = _run(model, owner, image_size)
    flops = _per_unit(counts, owner, len(parts))
    try:
        points = {point.num_frozen_units: point for point in cut_points(model, image_size)}
    except BackboneError:  # not traceable: it can be frozen as a whole only
        points = {len(parts): CutPoint(len(parts), "all", shapes[0])}
    total = max(1, sum(flops))
    return [
        UnitCosts(
            unit=unit,
            output_shape=shapes.get(unit.index),
            flops=flops[unit.index - 1],
            flops_share=flops[unit.index - 1] / total,
            cut=points.get(unit.index),
            row_bytes=row_bytes(points[unit.index].row_shape) if unit.index in points else None,
            saved_share=points[unit.index].saved_share if unit.index in points else None,
        )
        for unit in parts
    ]


def row_bytes(row_shape: tuple[int, ...]) -> int:
    """Return the bytes of one cached row in the default types: float32 for a vector, bf16 for a map."""
    return math.prod(row_shape) * (VECTOR_BYTES if len(row_shape) == 1 else MAP_BYTES)


def _run(
    model: nn.Module, owner: Mapping[str, int], image_size: tuple[int, int]
) -> tuple[dict[int, tuple[int, ...]], dict[str, int]]:
    """Return unit -> output shape (0 is the whole network), and module -> FLOPs with its children's."""
    shapes: dict[int, tuple[int, ...]] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            if isinstance(output, torch.Tensor):
                shapes[index] = tuple(output.shape[1:])

        return hook

    outermost = [name for name in owner if name.rpartition(".")[0] not in owner]
    handles = [model.get_submodule(name).register_forward_hook(keep(owner[name])) for name in outermost]
    try:
        with flop_counter(model) as counter, torch.no_grad():
            shapes[0] = tuple(model.eval()(torch.zeros(1, 3, *image_size)).shape[1:])
    finally:
        for handle in handles:
            handle.remove()
    root = type(model).__name__ + "."
    counted = {
        name.removeprefix(root) if name != "Global" else "": sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name == "Global" or name.startswith(root)
    }
    return shapes, counted


def _per_unit(counts: Mapping[str, int], owner: Mapping[str, int], num_units: int) -> list[int]:
    """Return FLOPs by unit; what no unit's module counts, such as a pooling with weights, is the last's."""
    own = dict(counts)
    for name, count in counts.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent not in own:
                parent = parent.rpartition(".")[0]
            own[parent] -= count
    result = [0] * num_units
    for name, count in own.items():
        result[owner.get(name, num_units) - 1] += count
    return result
