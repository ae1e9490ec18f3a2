"""Loading a weights file into a network: which of its tensors, whether they fit, and what is said."""

import logging
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tlcli.backbones import numbered
from tlcli.backbones.checkpoint import Checkpoint, flatten
from tlcli.backbones.guess import guess
from tlcli.backbones.matching import MATCH_RATE as MATCH_RATE
from tlcli.backbones.matching import Match, Shapes, Target, below, candidates, fit, roots, under
from tlcli.backbones.misfit import check_match
from tlcli.backbones.weights_file import StateDict, read_checkpoint, some
from tlcli.errors import BackboneError
from tlcli.machine.memory import is_out_of_memory
from tlcli.warned import warn
from tlcli.wording import counted

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.bool)  # counters, and the index tables of some transformers

TOP = "."
"""How --weights-key names the tensors that lie at the top of a file, without any prefix."""


@dataclass(frozen=True)
class Conversion:
    """One way from a foreign checkpoint to the network's names.

    Attributes:
        how: What it is, for the log.
        convert: Takes the tensors below one prefix of the file; returns None, or raises anything, where it is
            not meant for them.
        whole: It takes the file as a whole and needs time, so that it comes last.
    """

    how: str
    convert: Callable[[StateDict], StateDict | None]
    whole: bool = False


def match(state: StateDict, model: nn.Module) -> Match:
    """Fit `state` to `model` by the ends of its names; the best fit is returned."""
    return candidates(state, Target.of(model))[0]


def architecture_of(path: str | os.PathLike[str]) -> str | None:
    """Return the architecture that a weights file looks like, or None where that cannot be told."""
    try:
        return guess(flatten(read_checkpoint(path)).tensors)
    except BackboneError as error:
        logger.debug("%s: %s", path, error)
        return None


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    conversions: Sequence[Conversion] = (),
    key: str | None = None,
) -> None:
    """Load a weights file into a headless backbone, in place.

    A classifier in the file, and whatever else it holds beside the network, is ignored. What was done to make
    the file fit is logged.

    Args:
        model: The backbone, whose state dict names the tensors wanted.
        path: The weights file.
        name: What the user called the backbone, for messages.
        conversions: Ways to rename and reshape a foreign checkpoint, tried in turn when names differ.
        key: Which of several sets of tensors in the file is meant, as --weights-key has it.

    Raises:
        BackboneError: The file cannot be read, has tensors of wrong shapes, is of a deeper network, fits less
            than 95 % of the backbone, holds two sets that fit, or quantised, sparse or non-finite values.
    """
    checkpoint = flatten(read_checkpoint(path))
    if not checkpoint.tensors:
        raise BackboneError(
            f"Weights {str(path)!r} hold no state dict: there is not one tensor in the file.",
            hint="Expected a mapping of names to tensors, such as the network's state_dict().",
        )
    if key is not None:
        checkpoint = _keyed(checkpoint, key)
    target = Target.of(model)
    matches = _search(checkpoint.tensors, target, conversions)
    if key is not None:
        matches = _named(matches, key, checkpoint, path)
    check_match(matches[0], path, name, checkpoint.tensors, target)
    found = _chosen(matches, path, name)
    _tell(found, matches, checkpoint, path, name)
    check_plain(found.tensors, path)
    check_finite(found.tensors, path, model.state_dict)
    check_kinds(found.tensors, model, path)
    state = model.state_dict()  # carries the format versions that some modules ask for
    state.update(found.tensors)
    model.load_state_dict(state)


def _search(state: StateDict, target: Target, conversions: Sequence[Conversion]) -> list[Match]:
    """Return every way in which tensors of the file fit, best first; slow ways only where others fail."""
    found = numbered.matches(state, target)
    if not found[0].complete:
        places = list(roots(state, target))
        for conversion in (one for one in conversions if not one.whole):
            for root in places:
                found += _converted(below(state, root), target, conversion, root)
    if not any(one.accepted for one in found):
        for conversion in (one for one in conversions if one.whole):
            found += _converted(state, target, conversion, "")
    return sorted(found, key=lambda one: one.order, reverse=True)


def _converted(state: StateDict, target: Target, conversion: Conversion, root: str) -> list[Match]:
    kernels = {
        name
        for name, (have, want) in fit(state, target).wrong_shape.items()
        if name.endswith("weight") and len(have) == len(want) == 4 and have[2:] != want[2:]
    }
    try:
        named = conversion.convert(state)
        found = [under(root, one, conversion.how) for one in candidates(named, target)] if named else []
        # Patches of another size would be resampled as well, but that is another architecture.
        return [one for one in found if not kernels & one.tensors.keys()]
    except Exception as error:  # conversions are written for their own checkpoints, and fail freely on others
        if is_out_of_memory(error):
            raise
        logger.debug("%s did not apply below %r: %s", conversion.how, root, error)
        return []


# ---- one of several ---------------------------------------------------------------------------------------

AVERAGED = {"ema", "swa", "averaged", "average", "avg", "shadow"}
USUAL = {
    *("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module"),
    *("_orig_mod", "backbone", "encoder"),
}
"""Names under which training scripts of timm and torchvision nest tensors."""


def _key(found: Match) -> str:
    return found.prefix.removesuffix(".") or TOP


def _keyed(checkpoint: Checkpoint, key: str) -> Checkpoint:
    """Return what --weights-key leaves of a file; a prefix that holds other words inside keeps it whole."""
    start = "" if key.rstrip(".") == "" else key.rstrip(".") + "."
    part = checkpoint.below(start)
    return part if part.tensors else checkpoint


def _named(
    matches: list[Match], key: str, checkpoint: Checkpoint, path: str | os.PathLike[str]
) -> list[Match]:
    """Return the matches that --weights-key names, or all where the file was reduced to what lies below it.

    Raises:
        BackboneError: Nothing in the file has this name.
    """
    wanted = key.rstrip(".") or TOP
    if exact := [one for one in matches if _key(one) == wanted]:
        return exact
    if wanted != TOP and all(name.startswith(wanted + ".") for name in checkpoint.tensors):
        return matches
    fitting = list(dict.fromkeys(_key(one) for one in matches if one.accepted))
    known = fitting or list(dict.fromkeys(name.partition(".")[0] for name in checkpoint.tensors))
    raise BackboneError(
        f"Weights {str(path)!r} hold nothing that fits under the key {key!r}.",
        hint=f"There is {some(known, 6)}. Leave --weights-key out where one network is in the file.",
    )


def _chosen(matches: list[Match], path: str | os.PathLike[str], name: str) -> Match:
    """Return the best match, where it is the only one or the others hold the same values.

    Averaged weights are preferred to the raw ones of the same training, as timm does.

    Raises:
        BackboneError: Two sets of tensors fit equally well and differ.
    """
    best = matches[0]
    rivals = [best]
    for other in matches[1:]:
        if other.order[:2] == best.order[:2] and not any(_equal(other, one) for one in rivals):
            rivals.append(other)
    if len(rivals) == 1:
        _tell_of_part_average(best, matches, path)
        return best
    averaged = [one for one in rivals if _is_averaged(one)]
    raw = [one for one in rivals if not _is_averaged(one)]
    if len(averaged) == 1 and len(raw) == 1:
        first, second = averaged[0], raw[0]
        if _is_usual(second) and not _is_usual(first):
            first, second = second, first
        kinds = ("averaged", "raw") if first is averaged[0] else ("raw", "averaged")
        warn(
            "averaged_weights",
            f"{path} holds averaged (EMA) and raw weights; the {kinds[0]} ones are used ({_key(first)}). "
            f"--weights-key {shlex.quote(_key(second))} takes the {kinds[1]} ones.",
        )
        return first
    keys = [_key(one) for one in rivals]
    raise BackboneError(
        f"Weights {str(path)!r} hold {len(keys)} networks that fit {name} and differ: {', '.join(keys)}.",
        hint=f"Choose one: {' or '.join(f'--weights-key {shlex.quote(key)}' for key in keys)}.",
    )


def _tell_of_part_average(found: Match, matches: list[Match], path: str | os.PathLike[str]) -> None:
    """Warn where the file has averaged weights too, but not a whole network: often parameters alone."""
    left = [name for name in found.unused if _has_averaged(name.rpartition(".")[0])]
    whole = any(_is_averaged(one) and one.order[:2] == found.order[:2] for one in matches)
    if left and not whole:
        warn(
            "averaged_weights",
            f"{path} also holds averaged (EMA) weights ({some(left)}) that do not fill the network; "
            "the raw ones are used.",
        )


def _equal(one: Match, other: Match) -> bool:
    names = one.tensors.keys() & other.tensors.keys()
    return bool(names) and all(
        one.tensors[name] is other.tensors[name] or torch.equal(one.tensors[name], other.tensors[name])
        for name in names
        if not any(found.tensors[name].is_meta or found.tensors[name].is_sparse for found in (one, other))
    )


def _is_averaged(found: Match) -> bool:
    return _has_averaged(found.prefix)


def _has_averaged(path: str) -> bool:
    words = path.lower().replace("_", ".").replace("-", ".").split(".")
    return not AVERAGED.isdisjoint(words)


def _is_usual(found: Match) -> bool:
    return all(part in USUAL for part in found.prefix.split(".") if part)


# ---- what is said -----------------------------------------------------------------------------------------


def _tell(
    found: Match, matches: list[Match], checkpoint: Checkpoint, path: str | os.PathLike[str], name: str
) -> None:
    """Log what was done to make a file fit."""
    if stripped := checkpoint.prefix_of_names(found.prefix):
        logger.info("Removed the prefix %r from the names in %s.", stripped, path)
    if found.how:
        logger.info("Matched the tensors of %s to %s by %s.", path, name, found.how)
    for layer, channels in found.channels.items():
        warn(
            "adapted_channels",
            f"{path} is for images of {counted(channels, 'channel')}; its first layer ({layer}) was adapted "
            "to three, as timm does.",
        )
    if resampled := _resampled(found, matches):
        changed, (have, want) = next(iter(resampled.items()))
        more = f", and {len(resampled) - 1} more" if len(resampled) > 1 else ""
        warn(
            "resampled_weights",
            f"{path} is for another image size: {changed} was resampled from {list(have)} to {list(want)}"
            f"{more}.",
        )
    if found.missing:
        warn(
            "missing_tensors",
            f"{path} lacks {counted(len(found.missing), 'tensor')} of {name} ({some(found.missing)}); "
            "they keep their initial values.",
        )
    if found.surplus:
        warn(
            "surplus_tensors",
            f"{path} holds {counted(len(found.surplus), 'tensor')} inside {name} that it does not have "
            f"({some(found.surplus)}); they are left out.",
        )
    if found.unused:
        logger.debug("%s: not used: %s", path, ", ".join(found.unused))


def _resampled(found: Match, matches: list[Match]) -> Shapes:
    """Return the tensors that have another shape in the file, by what the names alone would have given."""
    plain = (one for one in matches if one.prefix == found.prefix and not one.how)
    wrong = next((one.wrong_shape for one in plain), {})
    return {name: shapes for name, shapes in wrong.items() if name in found.tensors}


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


def check_finite(
    state: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    untrained: Callable[[], Mapping[str, torch.Tensor]],
) -> None:
    """Refuse NaN and infinity, except for infinite values that the architecture itself begins with.

    Args:
        state: Name -> tensor.
        path: The file, for messages.
        untrained: Returns the state of the network without these weights; called where a value is not finite.

    Raises:
        BackboneError: A tensor holds one.
    """
    fresh: Mapping[str, torch.Tensor] | None = None
    for name, tensor in state.items():
        # A sum carries any NaN or infinity, and in float64 it cannot overflow by itself.
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            bad = ~torch.isfinite(tensor)
            fresh = untrained() if fresh is None else fresh
            initial = fresh.get(name, torch.empty(0))
            # Layers that clip their input begin with infinite bounds.
            if initial.shape == tensor.shape and torch.equal(tensor[bad], initial.to(tensor.dtype)[bad]):
                continue
            raise BackboneError(
                f"Weights {str(path)!r}: tensor {name!r} holds {int(bad.sum())} values that are NaN or "
                "infinite.",
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
