"""`--model-kwargs KEY=VALUE,...`: reading it, and saying what a network takes instead."""

import ast
import math
from collections.abc import Iterable
from typing import Any

from tlcli.errors import UsageError
from tlcli.wording import did_you_mean, near_misses

WORDS = {"true": True, "false": False, "none": None}
OWN_OPTIONS = {
    "img_size": "--image-size",
    "image_size": "--image-size",
    "input_size": "--image-size",
    "drop_path_rate": "--drop-path",
    "drop_path": "--drop-path",
    "drop_rate": "--dropout",
    "pretrained": "--random-init",
    "checkpoint_path": "--weights",
}
"""Arguments that have an option of their own, which alone sets them."""

SETTLED = {
    "num_classes",
    "in_chans",
    "features_only",
    "global_pool",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "device",
    "dtype",
    "scriptable",
    "exportable",
    "no_jit",
}
"""Arguments that a backbone here must leave alone: a headless network for RGB images, pooled its own way."""


def parse_arguments(text: str, name: str = "--model-kwargs") -> dict[str, Any]:
    """Return the arguments of a network as plain values.

    Args:
        text: KEY=VALUE pairs with commas between. A value is a number, true, false, none, a list of these in
            brackets, or else a word: `depth=3,norm=every,layers=[1,1,1,1]`.
        name: What messages call the option.

    Raises:
        UsageError: A part is no KEY=VALUE, a key is given twice, or has an option of its own.
    """
    result: dict[str, Any] = {}
    for part in _parts(text):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key.isidentifier() or not value:
            raise UsageError(
                f"{name} {text!r}: {part.strip()!r} is not KEY=VALUE.",
                hint="Write pairs with commas between, as in --model-kwargs norm=every,activation=tanh.",
            )
        if key in result:
            raise UsageError(f"{name} {text!r} gives {key!r} twice.", hint="Leave one of them out.")
        if key in OWN_OPTIONS:
            raise UsageError(f"{name} does not take {key!r}.", hint=f"Use {OWN_OPTIONS[key]} instead.")
        if key in SETTLED:
            raise UsageError(
                f"{name} does not take {key!r}: a backbone takes RGB images and has no classifier.",
                hint="Leave it out.",
            )
        result[key] = _value(value, key)
    return result


def unknown_argument(name: str, key: str, known: Iterable[str]) -> UsageError:
    """Return the error for an argument that the network `name` does not take."""
    known = sorted(known)
    hint = did_you_mean(near_misses(key, known, most=1))
    hint += f"It takes {', '.join(known)}." if known else "It takes none."
    return UsageError(f"{name} takes no argument {key!r} in --model-kwargs.", hint=hint)


def _parts(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts = [""]
    depth = 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text.strip() else []


def _value(text: str, key: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if any(mark in text for mark in "[](){}\"'="):
            raise UsageError(
                f"--model-kwargs: {key}={text} cannot be read.",
                hint="A value is a number, true, false, none, a word, or a list such as [2,2].",
            ) from None
        return text
    if not _is_plain(value):
        raise UsageError(
            f"--model-kwargs: {key}={text} is no plain value.",
            hint="A value is a finite number, true, false, none, a word, or a list such as [2,2].",
        )
    return list(value) if isinstance(value, tuple) else value


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)
