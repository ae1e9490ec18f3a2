"""Names of a checkpoint that carry numbers, or words in between, where the network has other names.

`nn.Sequential(*list(network.children()))` numbers the parts of a network (fastai, lightly, feature
extractors), and a wrapper around a part, such as DataParallel around `features`, puts a word into the middle
of names. Order then says which part is which, and every shape and every name inside the parts must agree.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tlcli.backbones.matching import MATCH_RATE, Match, Target, below, candidates, roots, under
from tlcli.backbones.weights_file import StateDict

Tree = dict[str, Any]
"""Part of a name -> the tree below it, or a tensor."""


def matches(state: StateDict, target: Target) -> list[Match]:
    """Return every way in which tensors of a file fit by their names' ends, or by numbers; best first."""
    found = candidates(state, target)
    if not found[0].complete and (shorter := without_wrappers(state, target)):
        found += candidates(shorter, target)
    if not any(one.complete for one in found):
        for root in roots(state, target):
            for named in renamed(state, target, root):
                how = "the order of its parts"
                found += [replace(under(root, one, how), ordered=True) for one in candidates(named, target)]
    return sorted(found, key=lambda one: one.order, reverse=True)


def without_wrappers(state: StateDict, target: Target) -> StateDict | None:
    """Return `state` without the words inside names that no name of the network has; None where that fails.

    What stands before the first word of the network is a prefix and stays.
    """
    words = {word for name in target.tensors for word in name.split(".")}
    found: StateDict = {}
    changed = False
    for name, value in state.items():
        parts = name.split(".")
        first = next((place for place, part in enumerate(parts) if part in words), len(parts))
        kept = ".".join([*parts[:first], *(part for part in parts[first:] if part in words)])
        changed = changed or kept != name
        if kept in found:
            if kept == name:  # the other was shortened to the name of this one
                return None
            kept = name
        found[kept] = value
    return found if changed else None


def renamed(state: StateDict, target: Target, root: str) -> Iterator[StateDict]:
    """Yield the tensors below `root` under the network's names, numbers replaced by order.

    Names without a counterpart keep their end, so that a network with more blocks is still seen as one.
    """
    part = below(state, root)
    given, wanted = _tree(part), _tree(target.tensors)
    for start, tree in _starts(wanted):
        if names := _aligned(given, tree):
            found = {start + names.get(name, name): value for name, value in part.items()}
            if len(found) == len(part):
                yield found
    if (in_order := _in_order(part, target)) is not None:
        yield in_order


def _tree(state: StateDict) -> Tree:
    tree: Tree = {}
    for name, value in state.items():
        *parts, leaf = name.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):  # a tensor and a part of one name
                return {}
        node[leaf] = value
    return tree


def _starts(tree: Tree) -> list[tuple[str, Tree]]:
    """Return the network, and its one part that holds nearly all of it, with the path to each."""
    found = [("", tree)]
    total = _size(tree)
    while True:
        start, tree = found[-1]
        large = [
            key for key, part in tree.items() if isinstance(part, dict) and _size(part) >= MATCH_RATE * total
        ]
        if not large:
            return found
        found.append((f"{start}{large[0]}.", tree[large[0]]))


def _size(tree: Tree) -> int:
    return sum(_size(part) if isinstance(part, dict) else 1 for part in tree.values())


def _aligned(given: Tree, wanted: Tree, was: str = "", becomes: str = "") -> dict[str, str] | None:
    """Return name in the file -> name in the network; None where the trees do not correspond."""
    parts = {key: part for key, part in given.items() if isinstance(part, dict)}
    targets = {key: part for key, part in wanted.items() if isinstance(part, dict)}
    names = {was + key: becomes + key for key, part in given.items() if not isinstance(part, dict)}
    if targets.keys() <= parts.keys():
        pairs = [(key, key) for key in parts]
    elif all(key.isdigit() for key in parts):
        # safetensors sorts names as text. What the file has beyond is a head.
        pairs = list(zip(sorted(parts, key=int), targets, strict=False))
    else:
        return None
    for key, other in pairs:
        if other not in targets:
            names |= dict(_relabelled(parts[key], f"{was}{key}.", f"{becomes}{key}."))
            continue
        found = _aligned(parts[key], targets[other], f"{was}{key}.", f"{becomes}{other}.")
        if found is None:
            return None
        names |= found
    return names


def _relabelled(tree: Tree, was: str, becomes: str) -> list[tuple[str, str]]:
    found = []
    for key, part in tree.items():
        if isinstance(part, dict):
            found += _relabelled(part, f"{was}{key}.", f"{becomes}{key}.")
        else:
            found.append((was + key, becomes + key))
    return found


def _in_order(state: StateDict, target: Target) -> StateDict | None:
    """Match tensor by tensor, where names differ by numbers alone and modules begin at the same places.

    `nn.Sequential(stem, *stages)` needs it: parts of two levels stand on one.
    """
    given, wanted = list(state.items()), list(target.tensors.items())
    if len(given) < len(wanted):
        return None
    found: StateDict = {}
    last = ("", "")
    for (name, value), (other, tensor) in zip(given, wanted, strict=False):
        modules = name.rpartition(".")[0], other.rpartition(".")[0]
        same_module = (modules[0] == last[0]) == (modules[1] == last[1])
        words = [part for part in name.split(".") if not part.isdigit()]
        theirs = [part for part in other.split(".") if not part.isdigit()]
        if not same_module or value.shape != tensor.shape or theirs[-len(words) :] != words:
            return None
        found[other] = value
        last = modules
    rest = given[len(wanted) :]
    inside = {_skeleton(name, value) for name, value in given[: len(wanted)]}
    if any(
        (kind := _skeleton(name, value)) in inside and (kind[1] == 4 or len(kind[0]) > 1)
        for name, value in rest
    ):
        return None  # more blocks of the same kind: a deeper network
    return found | {name: value for name, value in rest if name not in target.tensors}


def _skeleton(name: str, value: torch.Tensor) -> tuple[tuple[str, ...], int]:
    return tuple(part for part in name.split(".") if not part.isdigit()), value.ndim
