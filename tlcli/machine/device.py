"""Which device and number type the work runs on, and why.

A choice carries its reason, which the plan prints. An asked-for device that is missing is an error, never a
silent fall-back to the CPU.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tlcli.errors import DeviceError
from tlcli.machine import processes
from tlcli.wording import parse_device


@dataclass(frozen=True)
class DeviceChoice:
    """A device and why it was taken."""

    device: torch.device
    reason: str


@dataclass(frozen=True)
class DtypeChoice:
    """A compute type, by name (fp32 or bf16) and torch type, and why it was taken."""

    name: str
    dtype: torch.dtype
    reason: str


def choose_device(name: str = "auto") -> DeviceChoice:
    """Return the device for `name`: auto, cpu, cuda, cuda:N or mps.

    Raises:
        DeviceError: The named device is not there.
        UsageError: `name` is not a device.
    """
    kind, number = parse_device(name)
    has_mps = torch.backends.mps.is_available()
    if kind == "auto":
        if torch.cuda.is_available():
            number = processes.local_rank() % max(1, torch.cuda.device_count())  # one GPU per process
            return DeviceChoice(torch.device("cuda", number), f"found {torch.cuda.get_device_name(number)}")
        if has_mps:
            return DeviceChoice(torch.device("mps"), "found Apple's GPU")
        return DeviceChoice(torch.device("cpu"), "no GPU found")
    count = torch.cuda.device_count()
    if (kind == "cuda" and number >= count) or (kind == "mps" and not has_mps):
        found = f"{count} CUDA devices" if count else "no GPU"
        raise DeviceError(
            f"--device {name}: there is no such device, this machine has {found}.",
            hint="Use --device auto or --device cpu.",
        )
    return DeviceChoice(torch.device(kind, number) if kind == "cuda" else torch.device(kind), "asked for")


def choose_dtype(name: str, device: torch.device) -> DtypeChoice:
    """Return the compute type of the frozen prefix for `name`: auto, fp32 or bf16."""
    if name == "fp32":
        return DtypeChoice("fp32", torch.float32, "asked for")
    fast, reason = fast_bf16(device)
    if name == "bf16":
        return DtypeChoice("bf16", torch.bfloat16, "asked for" if fast else f"asked for, though {reason}")
    return DtypeChoice("bf16", torch.bfloat16, reason) if fast else DtypeChoice("fp32", torch.float32, reason)


def fast_bf16(device: torch.device) -> tuple[bool, str]:
    """Return whether bf16 is faster than fp32 on `device`, and the reason."""
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return capable, "the GPU has bf16 tensor cores" if capable else "the GPU has no bf16 tensor cores"
    if device.type == "mps":
        return False, "bf16 is not measured on MPS"
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has AVX512-BF16"
    return False, "the CPU has no bf16 instructions"


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with `count` intra-op threads, then restore the earlier number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
