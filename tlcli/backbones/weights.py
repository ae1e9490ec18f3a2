"""Fitting the tensors of a weights file to a network, by names and shapes."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tlcli.backbones.weights_file import StateDict, read_state_dict, some
from tlcli.errors import BackboneError
from tlcli.machine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

MATCH_RATE = 0.95
"""Share of a backbone's tensors, and of its values, that a weights file must hold to be accepted."""

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
"""What wrappers and training scripts put before every name."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.bool)  # counters, and the index tables of some transformers
NOT_COUNTED = "num_batches_tracked"  # a counter that old checkpoints lack and evaluation does not use


WRONG_ARCHITECTURE = "Name the architecture they were trained with; `tlcli backbones list` shows the names."


@dataclass(frozen=True)
class Match:
    """How a state dict fits a network.

    Attributes:
        tensors: The fitting tensors, under the network's names.
        missing: Names the network has and the file lacks (counters left out).
        wrong_shape: Name -> (shape in the file, shape in the network).
        unused: Names of the file that the network does not have.
        rate: Share of the network's tensors, or of its values where that is less, that fit; in [0, 1].
        stripped: The prefix removed from the file's names.
    """

    tensors: StateDict
    missing: tuple[str, ...]
    wrong_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: tuple[str, ...]
    rate: float
    stripped: str


def match(state: StateDict, model: nn.Module) -> Match:
    """Fit `state` to `model`, trying the prefixes that wrappers add; the best fit is returned."""
    wanted = model.state_dict()
    candidates = frontier = [""]
    for _ in range(3):  # as deep as wrappers nest in practice: module._orig_mod.backbone.
        frontier = [
            prefix + more
            for prefix in frontier
            for more in PREFIXES
            if any(name.startswith(prefix + more) for name in state)
        ]
        candidates = candidates + frontier
    found = [_match_names(state, wanted, prefix) for prefix in candidates]
    return max(found, key=lambda one: (one.rate, len(one.tensors) + len(one.wrong_shape)))


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    convert: Callable[[StateDict], StateDict] | None = None,
) -> None:
    """Load a weights file into a headless backbone, in place.

    A classifier in the file is ignored. Prefixes are stripped and logged.

    Args:
        model: The backbone, whose state dict names the tensors wanted.
        path: The weights file.
        name: What the user called the backbone, for messages.
        convert: Renames and reshapes a foreign checkpoint into the model's form; tried when names differ.

    Raises:
        BackboneError: The file cannot be read, has tensors of wrong shapes, fits less than 95 % of the
            backbone, or holds quantised, sparse or non-finite values.
    """
    state = read_state_dict(path)
    found = match(state, model)
    if convert is not None and (found.rate < 1.0 or found.wrong_shape):
        plain = {key.removeprefix(found.stripped): value for key, value in state.items()}
        try:
            converted = match(convert(plain), model)
        except (
            Exception
        ) as error:  # converters are written for their own checkpoints and fail freely on others
            if is_out_of_memory(error):
                raise
            logger.debug("%s: its checkpoint converter failed: %s", name, error)
        else:
            if converted.rate > found.rate:
                found = converted
    check_match(found, path, name)
    if found.stripped:
        logger.info("Removed the prefix %r from the names in %s.", found.stripped, path)
    if found.missing:
        logger.warning(
            "%s lacks %d tensors of %s (%s); they keep their initial values.",
            path,
            len(found.missing),
            name,
            some(found.missing),
        )
    if found.unused:
        logger.debug("%s: not used: %s", path, ", ".join(found.unused))
    check_plain(found.tensors, path)
    check_finite(found.tensors, path)
    check_kinds(found.tensors, model, path)
    state = model.state_dict()  # carries the format versions that some modules ask for
    state.update(found.tensors)
    model.load_state_dict(state)


def check_match(found: Match, path: str | os.PathLike[str], name: str) -> None:
    """Refuse a poor fit, naming counts and examples.

    Raises:
        BackboneError: A tensor has the wrong shape, or the match rate is below 95 %.
    """
    total = len(found.missing) + len(found.wrong_shape) + len(found.tensors)
    named = len(found.wrong_shape) + len(found.tensors)
    if found.wrong_shape and named > total / 2:
        key, (have, want) = next(iter(found.wrong_shape.items()))
        raise BackboneError(
            f"Weights {str(path)!r} are not for {name}: {len(found.wrong_shape)} tensors have another shape, "
            f"such as {key!r} ({list(have)} in the file, {list(want)} in the network).",
            hint=WRONG_ARCHITECTURE,
        )
    if found.wrong_shape or found.rate < MATCH_RATE:
        examples = f"The network wants {some(found.missing)}; the file has {some(found.unused) or 'no more'}."
        raise BackboneError(
            f"Weights {str(path)!r} fit only {found.rate:.0%} of {name}: {len(found.tensors)} of {total} "
            f"tensors were found, at least {MATCH_RATE:.0%} are expected. {examples}",
            hint=WRONG_ARCHITECTURE,
        )


def check_plain(state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors that are not plain floating-point ones. Reads no values and allocates nothing.

    Raises:
        BackboneError: A tensor is sparse, quantised, on the meta device, or claims more values than stored.
    """
    for name, tensor in state.items():
        if odd := _oddity(tensor):
            raise BackboneError(
                f"Weights {str(path)!r}: tensor {name!r} is {odd}; a plain floating-point one is expected.",
                hint="Save the network's float32 state dict and use that.",
            )


def check_finite(state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse NaN and infinity.

    Raises:
        BackboneError: A tensor holds one.
    """
    for name, tensor in state.items():
        # A sum carries any NaN or infinity, and in float64 it cannot overflow by itself.
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BackboneError(
                f"Weights {str(path)!r}: tensor {name!r} holds {bad} values that are NaN or infinite.",
                hint="The file is damaged or its training diverged; get it again or use other weights.",
            )


def check_kinds(state: Mapping[str, torch.Tensor], model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Refuse whole numbers where the network has weights: these are the codes of quantised ones.

    Raises:
        BackboneError: A tensor is of whole numbers and the network's of floating-point ones.
    """
    for name, wanted in model.state_dict().items():
        if wanted.is_floating_point() and name in state and not state[name].is_floating_point():
            raise BackboneError(
                f"Weights {str(path)!r}: tensor {name!r} is {state[name].dtype}, probably quantised; "
                "a floating-point one is expected.",
                hint="Save the network's float32 state dict and use that.",
            )


def _oddity(tensor: torch.Tensor) -> str | None:
    """Return what makes `tensor` unusable as a weight, or None. Allocates nothing."""
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized or (tensor.dtype not in FLOATS and tensor.dtype not in INTEGERS):
        return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.is_meta:
        return "empty (on the meta device)"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"said to hold {tensor.numel():,} values, of which few are stored"
    return None


def _match_names(state: StateDict, wanted: StateDict, prefix: str) -> Match:
    tensors: StateDict = {}
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    unused = []
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if name not in wanted:
            unused.append(key)
        elif tuple(value.shape) != tuple(wanted[name].shape):
            wrong[name] = (tuple(value.shape), tuple(wanted[name].shape))
        else:
            tensors[name] = value
    counted = {name: tensor.numel() for name, tensor in wanted.items() if not name.endswith(NOT_COUNTED)}
    hits = [name for name in tensors if name in counted]
    rate = min(
        len(hits) / max(1, len(counted)),
        sum(counted[name] for name in hits) / max(1, sum(counted.values())),
    )
    missing = tuple(name for name in counted if name not in tensors and name not in wrong)
    return Match(tensors, missing, wrong, tuple(unused), rate, prefix)
