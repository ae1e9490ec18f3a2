"""Several processes of one job, as `torchrun` starts them; in a single process everything here does nothing.

Each process has a rank from 0 on, and rank 0 alone writes and prints. They talk over gloo on the CPU (NCCL
carries what lies on GPUs), joined when the first of these functions is called that needs the others.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tlcli.errors import (
    BackboneError,
    DataError,
    DeviceError,
    ResourceError,
    StorageError,
    TlcliError,
    UsageError,
)

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # one process may have far more to do than another; a dead one is noticed anyway


def world_size() -> int:
    """Return the number of processes of this job: WORLD_SIZE as torchrun sets it, or 1."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Return which of them this is, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return which of the processes on this machine this is, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", rank()) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine, which share its cores."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of `items`, which must be the same in all; every item is in one part."""
    return items[rank() :: world_size()]


def barrier() -> None:
    """Wait until every process has come here.

    Raises:
        ResourceError: Another process ended.
    """
    gather_objects(None)


def gather_objects(item: T) -> list[T]:
    """Return what every process gave, in the order of their ranks, on each of them.

    Raises:
        ResourceError: Another process ended.
    """
    if world_size() == 1:
        return [item]
    import torch.distributed

    found: list[Any] = [None] * world_size()
    _together(lambda: torch.distributed.all_gather_object(found, item))
    return found


def from_main(item: T) -> T:
    """Return what rank 0 gave, on every process.

    Raises:
        ResourceError: Another process ended.
    """
    if world_size() == 1:
        return item
    import torch.distributed

    found: list[Any] = [item]
    _together(lambda: torch.distributed.broadcast_object_list(found, src=0))
    result: T = found[0]
    return result


def average(tensors: "Sequence[torch.Tensor]") -> None:
    """Replace floating-point tensors by their means over all processes, in place; all give the same shapes.

    Raises:
        ResourceError: Another process ended.
    """
    if world_size() == 1 or not tensors:
        return
    import torch

    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    _together(lambda: torch.distributed.all_reduce(flat))
    flat /= world_size()
    start = 0
    for tensor in tensors:
        end = start + tensor.numel()
        tensor.copy_(flat[start:end].view_as(tensor))
        start = end


def raise_together(error: TlcliError | None) -> None:
    """Raise the error of the first process that has one, on every process; each must call this.

    So that all end alike, instead of waiting for one that is gone.

    Raises:
        TlcliError: A process gave one.
        ResourceError: Another process ended without coming here.
    """
    told = None if error is None else (type(error).__name__, error.message, error.hint)
    found = next((item for item in gather_objects(told) if item is not None), None)
    if found is None:
        return
    if error is not None:
        raise error
    name, message, hint = found
    kinds = (UsageError, DataError, BackboneError, DeviceError, StorageError)
    raise {kind.__name__: kind for kind in kinds}.get(name, ResourceError)(message, hint=hint)


def start(device: "torch.device | None" = None) -> None:
    """Join the processes of this job, unless that was done before.

    Args:
        device: Where this process computes; a GPU is made the current one.

    Raises:
        ResourceError: They cannot be reached.
    """
    if world_size() == 1:
        return
    import torch
    import torch.distributed

    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _reached(lambda: torch.distributed.init_process_group(backend, timeout=PATIENCE))
    atexit.register(_leave)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _together(call: Callable[[], Any]) -> None:
    start()
    _reached(call)


def _reached(call: Callable[[], Any]) -> None:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"Another process of this job cannot be reached: {str(error).splitlines()[0]}",
            hint="It ended, and its own message above says why; or torchrun's address is wrong.",
        ) from error
