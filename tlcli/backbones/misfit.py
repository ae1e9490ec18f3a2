"""Refusing weights that do not fit: what is wrong, and which architecture they look like."""

import os
import shlex
from collections import Counter
from collections.abc import Mapping

import torch

from tlcli.backbones.guess import guess
from tlcli.backbones.matching import MATCH_RATE, Match, Target
from tlcli.backbones.weights_file import some
from tlcli.errors import BackboneError
from tlcli.wording import counted

SHOWS = "`tlcli backbones list` shows the names."


def check_match(
    found: Match,
    path: str | os.PathLike[str],
    name: str,
    state: Mapping[str, torch.Tensor] | None = None,
    target: Target | None = None,
) -> None:
    """Refuse a poor fit, naming counts, examples, and the architecture that the file looks like.

    Args:
        found: How the file fits.
        path: The file.
        name: What the user called the backbone.
        state: Everything in the file, from which the architecture is guessed.
        target: What the network wants.

    Raises:
        BackboneError: A tensor has the wrong shape, the network would have to be deeper, or the match rate is
            below 95 %.
    """
    if found.accepted:
        return
    what = f"Weights {str(path)!r} {_difference(found, name)}"
    # JAX's original names match no network here.
    likely = guess(dict(state), near=name) if state and not any("/" in key for key in state) else None
    if likely == name.partition(".")[0]:
        hint = f"They fit {likely} as it is by itself; leave out --model-kwargs and --image-size."
    elif likely:
        what += f" These look like the weights of {likely}."
        written = f"--backbone {likely} --weights {shlex.quote(str(path))}"
        hint = f"Name the architecture they were trained with: {written}. {SHOWS}"
    elif found.rate > 0.5 and not found.wrong_shape and not found.surplus:
        hint = "The file is incomplete; save the network's whole state_dict() and use that."
    elif target and _has_shapes(target, state or {}):
        hint = f"It has tensors of the shapes of {name} under other names; give them the network's names."
    else:
        hint = f"Name the architecture they were trained with; {SHOWS}"
    raise BackboneError(what, hint=hint)


def _difference(found: Match, name: str) -> str:
    """Return what is wrong, as a sentence about the weights."""
    total = len(found.missing) + len(found.wrong_shape) + len(found.tensors)
    named = len(found.wrong_shape) + len(found.tensors)
    if found.wrong_shape and named > total / 2:
        key, (have, want) = next(iter(found.wrong_shape.items()))
        return (
            f"are not for {name}: {counted(len(found.wrong_shape), 'tensor')} of another shape, such as "
            f"{key!r} ({list(have)} in the file, {list(want)} in the network)."
        )
    if found.deeper and len(found.missing) < total / 2:
        return (
            f"are of a deeper network than {name}: the file has {counted(len(found.deeper), 'tensor')} of "
            f"further blocks, such as {found.deeper[0]!r}."
        )
    if found.surplus and found.rate >= MATCH_RATE:
        return (
            f"are of another network than {name}: the file has {found.surplus[0]!r}, and the network wants "
            f"{found.missing[0]!r}."
        )
    if found.surplus and not found.missing:
        return (
            f"are of another network than {name}: the file has {counted(len(found.surplus), 'tensor')} "
            f"inside its parts that it does not have, such as {found.surplus[0]!r}."
        )
    more = f" It has {len(found.surplus)} too many inside the network." if found.surplus else ""
    return (
        f"fit only {found.rate:.0%} of {name}: {len(found.tensors)} of {total} tensors were found, at least "
        f"{MATCH_RATE:.0%} are expected. The network wants {some(found.missing) or 'no more'}; the file has "
        f"{some(found.unused) or 'no more'}.{more}"
    )


def _has_shapes(target: Target, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a file has as many tensors of each shape as the network, whatever their names."""
    wanted = Counter(tuple(target.tensors[name].shape) for name in target.counted)
    lacking = wanted - Counter(tuple(value.shape) for value in state.values())
    return lacking.total() <= (1 - MATCH_RATE) * wanted.total()
