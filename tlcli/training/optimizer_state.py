"""What an optimiser remembers, as tensors and JSON, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tlcli.errors import BackboneError, UsageError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# ---- optimisers ------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an optimiser remembers, for `Checkpoints.save`.

    Returns:
        Its tensors, not copied, by name; and everything else (counters, hyperparameters, where each tensor
        belongs) as JSON holds it.

    Raises:
        UsageError: It remembers what a checkpoint cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    try:
        if any(isinstance(value, torch.Generator) for value in vars(optimizer).values()):
            raise TypeError("a random generator")
        return tensors, {"optimizer": _name(optimizer), "state": _packed(optimizer.state_dict(), "", tensors)}
    except TypeError as error:
        raise _not_restorable(optimizer, f"keeps {error}, which a checkpoint cannot hold") from error


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Give a fresh optimiser of the same parameters the state that `optimizer_state` returned.

    Args:
        optimizer: Made with the same options over parameters of the same order and shapes.
        tensors: From a checkpoint; more than those of the optimiser may be there.
        facts: From a checkpoint.

    Raises:
        UsageError: It is another optimiser, or does not take its state back exactly.
        BackboneError: The state is damaged.
    """
    if facts.get("optimizer") != _name(optimizer):
        raise _not_restorable(optimizer, f"is not the {facts.get('optimizer')} of the checkpoint")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    try:
        state = _unpacked(facts["state"], tensors, device)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"The checkpoint's state of {_name(optimizer)} is damaged: {error!r}.") from error
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise _not_restorable(optimizer, f"does not take its state back: {error}") from error
    # What is cast or dropped on the way in would make a resumed run another run.
    after, found = optimizer_state(optimizer)
    if found["state"] != facts["state"] or not all(_same(after[name], tensors[name]) for name in after):
        raise _not_restorable(optimizer, "does not take its state back exactly")


def _name(optimizer: torch.optim.Optimizer) -> str:
    inner = getattr(optimizer, "_base_optimizer", None)  # timm's Lookahead
    return type(optimizer).__name__ + (f"({_name(inner)})" if inner is not None else "")


def _not_restorable(optimizer: torch.optim.Optimizer, why: str) -> UsageError:
    return UsageError(
        f"Optimiser {_name(optimizer)} {why}.",
        hint="Use another --opt, such as adamw, and begin anew with --overwrite.",
    )


def _packed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON holds it: scalars and lists as they are, the rest tagged; tensors go by name."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise TypeError(f"a tensor of {value.dtype}")
        tensors[path] = value
        return {"tensor": path, "cpu": value.device.type == "cpu"}
    if isinstance(value, dict):
        below = f"{path}/" if path else ""
        return {"dict": [[_packed(key, path, tensors), _packed(item, f"{below}{key}", tensors)]
                         for key, item in value.items()]}  # fmt: skip
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.clone() if value["cpu"] else tensor.to(device, copy=True)
    if "dict" in value:
        return {
            _unpacked(key, tensors, device): _unpacked(item, tensors, device) for key, item in value["dict"]
        }
    if "tuple" in value:
        return tuple(_unpacked(item, tensors, device) for item in value["tuple"])
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{value['dtype']!r} is no type")
    return dtype


def _same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors hold the same bytes, so that NaN equals NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    one, other = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)
    )
    return torch.equal(one, other)
