"""Which architecture a checkpoint is of, from the names and shapes of its tensors.

Building all of timm takes minutes. So the table of parameter counts says which networks are as large as what
the file holds, and the nearest of them are built on the meta device, which takes milliseconds and no memory.
"""

import csv
import difflib
import functools
import logging
import time
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision import models

from tlcli.backbones.matching import Target
from tlcli.backbones.numbered import matches
from tlcli.backbones.weights_file import StateDict

logger = logging.getLogger(__name__)

TABLE = Path(__file__).parent / "catalog.csv"
TORCHVISION = "torchvision/"
MOST_SECONDS = 3.0
MOST_BUILT = 40
MOST_HEADS = 5
NEAR = 0.02  # how far the size of a candidate may be from what the file holds


@functools.cache
def parameter_counts() -> dict[str, int]:
    """Return the table: architecture -> number of parameters, 0 for one that cannot be a backbone."""
    try:
        with TABLE.open(newline="", encoding="utf-8") as file:
            return {row["architecture"]: int(row["num_parameters"]) for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}


def guess(state: StateDict, near: str = "", only: str = "") -> str | None:
    """Return the architecture whose names and shapes the tensors have, or None; within seconds.

    Args:
        state: Full name -> tensor, as the file has them.
        near: The architecture that was asked for; of several that fit, one of the same zoo is named.
        only: How the names begin that are looked at.
    """
    deadline, best, built = time.monotonic() + MOST_SECONDS, None, 0
    nearest, others = _by_size(state, near)
    for name in [*nearest, *_siblings(near), *others]:
        if not name.startswith(only):
            continue
        built += 1
        if built > MOST_BUILT or time.monotonic() > deadline:
            break
        model = build_on_meta(name)
        if model is None:
            continue
        found = matches(state, Target.of(model))[0]
        if found.complete:
            return name
        if found.accepted and (best is None or found.rate > best[0]):
            best = (found.rate, name)
    return best[1] if best else None


def build_on_meta(name: str) -> nn.Module | None:
    """Return a network without its classifier, and mostly without values; None where it cannot be built."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                if name.startswith(TORCHVISION):
                    return _headless(models.get_model(name.removeprefix(TORCHVISION), weights=None))
                model: nn.Module = timm.create_model(name, num_classes=0)
                return model
        except Exception as error:  # some read values while they are built
            logger.debug("%s cannot be built on %s: %s", name, device, error)
    return None


def _headless(model: nn.Module) -> nn.Module:
    last = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if last:
        model.set_submodule(last[-1], nn.Identity())
    return model


def _by_size(state: StateDict, near: str) -> tuple[list[str], list[str]]:
    """Return the architectures exactly as large as a set of tensors in the file, and those nearly so."""
    sizes: set[int] = set()
    for group in _groups(state):
        sizes |= _sizes(group)
    ranked = []
    zoo = near.startswith(TORCHVISION)
    for name, count in parameter_counts().items():
        distance = min((abs(size - count) / count for size in sizes), default=1.0) if count else 1.0
        if distance <= NEAR and not name.startswith("classic/"):
            ranked.append((distance, name.startswith(TORCHVISION) != zoo, len(name), name))
    ranked.sort()
    return [name for distance, *_, name in ranked if not distance], [
        name for distance, *_, name in ranked if distance
    ]


def _siblings(near: str) -> list[str]:
    """Return the architectures beside one of timm's that the table of those with weights does not have."""
    architecture = near.partition(".")[0]
    if not timm.is_model(architecture):
        return []
    module = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    names = timm.list_models(module=module)
    alike = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, architecture, name).ratio())
    return [name for name in alike if name not in parameter_counts()]


def _groups(state: StateDict) -> list[StateDict]:
    """Return the parameters of each set of tensors in the file, told apart by what their names begin with."""
    found = [state]
    for depth in (1, 2, 3):
        parts: dict[str, StateDict] = {}
        for name, value in state.items():
            start = ".".join(name.split(".")[:depth])
            parts.setdefault(start, {})[name] = value
        found += [part for part in parts.values() if 4 * len(part) >= len(state)]
    return found


def _sizes(state: StateDict) -> set[int]:
    """Return how many parameters a set has, with and without linear layers that may be its head."""
    kept = {
        name: value.numel()
        for name, value in state.items()
        if value.is_floating_point() and not name.endswith(("running_mean", "running_var"))
    }
    total = sum(kept.values())
    flat = {name.rpartition(".")[0] for name in kept if state[name].ndim == 2}
    found, rest = {total}, total
    for module in sorted(flat, key=lambda name: (name.count("."), name))[:MOST_HEADS]:  # heads are not nested
        size = sum(count for name, count in kept.items() if name.rpartition(".")[0] == module)
        rest -= size
        found |= {total - size, rest}
    return found - {0}
