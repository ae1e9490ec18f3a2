"""The tensors of a checkpoint under one name each, however deeply training scripts nested them.

A tensor's name is the path to it: `{"state_dict": {"conv1.weight": t}}` gives `state_dict.conv1.weight`. So a
key of nesting and a prefix of names are the same thing, and one rule finds the network's names at their ends.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tlcli.backbones.weights_file import StateDict

CONTAINERS = (Mapping, list, tuple, argparse.Namespace)
MAX_DEPTH = 24
"""How deeply containers may nest; what lies deeper is left out."""


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds, flattened.

    Attributes:
        tensors: Full name -> tensor, in the order of the file.
        nests: The paths of the containers that hold tensors themselves, each with a dot at its end ("" is the
            file as a whole).
    """

    tensors: StateDict
    nests: tuple[str, ...]

    def below(self, path: str) -> "Checkpoint":
        """Return the part of the file whose names begin with `path`."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name.startswith(path)}
        return Checkpoint(kept, self.nests)

    def prefix_of_names(self, prefix: str) -> str:
        """Return what of `prefix` belongs to the names themselves rather than to a nesting key."""
        nested = (nest for nest in self.nests if prefix.startswith(nest))
        return prefix[len(max(nested, key=len, default="")) :]


def flatten(loaded: Any) -> Checkpoint:
    """Return every tensor inside mappings, sequences and namespaces, under the path to it.

    A container that is met twice is walked once, so that one that holds itself ends.

    Args:
        loaded: What the file holds.
    """
    tensors: StateDict = {}
    nests: dict[str, None] = {}
    seen: set[int] = set()
    pending: list[tuple[str, int, Any]] = [("", 0, loaded)]
    while pending:
        path, depth, value = pending.pop()
        items = _items(value)
        if items is None or id(value) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(value))
        inner = []
        for key, item in items:
            if isinstance(item, torch.Tensor):
                tensors.setdefault(path + key, item)
                nests[path] = None
            elif isinstance(item, CONTAINERS):
                inner.append((f"{path}{key}.", depth + 1, item))
        pending.extend(reversed(inner))
    return Checkpoint(tensors, tuple(nests))


def _items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """Return the named parts of a container; None for anything else."""
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return ((str(place), item) for place, item in enumerate(value))
    if isinstance(value, argparse.Namespace):
        return iter(vars(value).items())
    return None
