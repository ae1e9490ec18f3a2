"""One optimiser step and what surrounds it: parameter groups, schedule, penalties, mixing of samples.

Optimisers are timm's. The schedule is a function of the step, and every random draw a function of (seed,
step): what a step does depends on nothing that a checkpoint would have to remember.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.recipe import Recipe

ONE_CYCLE_WARMUP = 0.3  # share of all steps; as torch's OneCycleLR (Smith & Topin 2019)
ONE_CYCLE_START = 1 / 25
MIN_FACTOR = 1e-3  # of the peak rate, where cosine and one-cycle end
IN_NEED_OF_CLOSURE = ("adahessian",)  # needs second derivatives, which the loop does not compute


def random_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a function of `parts`, equal on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(random_seed(*parts))


# ---- parameter groups and the optimiser -----------------------------------------------------------------


def parameter_groups(
    network: nn.Module, unit_of: Mapping[str, int], num_units: int, recipe: Recipe
) -> list[dict[str, Any]]:
    """Return the trained parameters, grouped by learning rate and weight decay.

    The learning rate of unit i of n is `layer_decay ** (n + 1 - i)` of the head's (as in BEiT, Bao et al.
    2021). Biases, norms and other vectors are spared weight decay.

    Args:
        network: Its trained parameters have `requires_grad`.
        unit_of: Parameter name -> unit, from 1; names that are missing belong to the head.
        num_units: Units of the backbone.
        recipe: Rates and decay.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = recipe.layer_decay ** (num_units + 1 - unit_of.get(name, num_units + 1))
        decay = 0.0 if parameter.ndim <= 1 else recipe.weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "weight_decay": decay, "scale": scale, "lr": 0.0}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return timm's optimiser of that name.

    Raises:
        UsageError: There is none, or it needs something that is not there.
    """
    from timm.optim import create_optimizer_v2

    check_optimizer(recipe.opt)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=recipe.opt, lr=recipe.lr or 1e-3, momentum=recipe.momentum
        )
    except (AssertionError, ImportError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(
            f"--opt {recipe.opt} cannot be used: {error or type(error).__name__}.",
            hint="Use adamw, sgd or another of timm's that needs no extra package.",
        ) from error
    return optimizer


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that timm does not have.

    Raises:
        UsageError: The name is unknown (the nearest is named), or the optimiser needs a closure.
    """
    import difflib

    from timm.optim import list_optimizers

    known = [item for item in list_optimizers() if not item.startswith(IN_NEED_OF_CLOSURE)]
    if name.lower() in known:
        return
    near = difflib.get_close_matches(name.lower(), known, n=3)
    raise UsageError(
        f"--opt {name!r} is no optimiser that can be used here.",
        hint=f"Did you mean {', '.join(near)}?" if near else "adamw, sgd, rmsprop and adagrad are usual.",
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


# ---- schedule -------------------------------------------------------------------------------------------


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the share of the peak learning rate at a step, in (0, 1].

    Args:
        recipe: Schedule, warm-up and decay.
        step: Optimiser steps done, from 0.
        steps_per_epoch: Optimiser steps in an epoch.
    """
    total = max(1, recipe.epochs * steps_per_epoch)
    if recipe.sched == "one-cycle":
        rise = max(1, round(ONE_CYCLE_WARMUP * total))
        if step < rise:
            return _between(ONE_CYCLE_START, 1.0, step / rise)
        return _between(1.0, MIN_FACTOR, (step - rise) / max(1, total - rise))
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    if recipe.sched == "cosine":
        return _between(1.0, MIN_FACTOR, share)
    if recipe.sched == "exponential":
        return float(recipe.decay_rate**share)
    if recipe.sched == "step":
        return float(recipe.decay_rate ** math.floor(step / (recipe.decay_epochs * steps_per_epoch)))
    return 1.0  # constant, and plateau, which Plateau lowers


def _between(start: float, end: float, share: float) -> float:
    """Return the point at `share` of half a cosine from start to end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass
class Plateau:
    """Lowers the learning rate when the watched loss stops falling.

    Attributes:
        factor: Current share of the peak rate.
        best: Smallest loss so far.
        waited: Epochs since then.
    """

    factor: float = 1.0
    best: float = math.inf
    waited: int = 0

    def update(self, loss: float, recipe: Recipe) -> None:
        """Look at an epoch's loss; does nothing for other schedules."""
        if recipe.sched != "plateau":
            return
        if loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > recipe.decay_epochs:
            self.factor, self.waited = self.factor * recipe.decay_rate, 0


# ---- mixing samples -------------------------------------------------------------------------------------


def mix(inputs: Tensor, targets: Tensor, recipe: Recipe, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a batch mixed with itself by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    With both, each batch draws one of them. Works on images and on cached activations alike.

    Args:
        inputs: [B, ...]; CutMix needs maps [B, C, H, W].
        targets: One-hot fp32 [B, classes].
        recipe: The alphas.
        draw: What the numbers are drawn from, a CPU generator.
    """
    if not recipe.mixup and not recipe.cutmix:
        return inputs, targets
    order = torch.randperm(len(inputs), generator=draw).to(inputs.device)
    use_cutmix = recipe.cutmix > 0 and (not recipe.mixup or bool(torch.rand((), generator=draw) < 0.5))
    share = _beta(recipe.cutmix if use_cutmix else recipe.mixup, draw)
    if use_cutmix:
        if inputs.ndim != 4:
            raise UsageError(
                f"--cutmix needs maps, and a row at this cut is {list(inputs.shape[1:])}.",
                hint="Use --mixup.",
            )
        inputs, share = _cutmix(inputs, order, share, draw)
    else:
        inputs = inputs * share + inputs[order] * (1 - share)
    return inputs, targets * share + targets[order] * (1 - share)


def _beta(alpha: float, draw: torch.Generator) -> float:
    """Return a draw of Beta(alpha, alpha), as a ratio of gamma draws."""
    concentration = torch.tensor([alpha, alpha], dtype=torch.float64)
    first, second = torch._standard_gamma(concentration, generator=draw).tolist()
    return 0.5 if first + second == 0 else float(first / (first + second))


def _cutmix(inputs: Tensor, order: Tensor, share: float, draw: torch.Generator) -> tuple[Tensor, float]:
    height, width = inputs.shape[2:]
    side = math.sqrt(1 - share)
    centre = torch.rand(2, generator=draw).tolist()
    top, bottom = _span(centre[0] * height, side * height, height)
    left, right = _span(centre[1] * width, side * width, width)
    mixed = inputs.clone()
    mixed[:, :, top:bottom, left:right] = inputs[order, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(centre: float, length: float, size: int) -> tuple[int, int]:
    start, end = round(centre - length / 2), round(centre + length / 2)
    return max(0, start), min(size, end)


# ---- penalties ------------------------------------------------------------------------------------------


@dataclass
class Penalties:
    """Penalties on the trained weights, beside the optimiser's own weight decay.

    Attributes:
        recipe: Their strengths.
        trained: Name -> trained parameter.
        start: Name -> its pretrained value, for L2-SP (Li et al. 2018); the head has none.
    """

    recipe: Recipe
    trained: Mapping[str, nn.Parameter]
    start: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of l2 and L2-SP to those of the loss."""
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            if self.recipe.l2 and parameter.ndim > 1:
                parameter.grad.add_(parameter, alpha=self.recipe.l2)
            if self.recipe.l2_sp and name in self.start:
                parameter.grad.add_(parameter - self.start[name], alpha=self.recipe.l2_sp)

    @torch.no_grad()
    def project(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply what acts on the weights after a step: l1 (proximal, so that zeros are real), max-norm."""
        recipe = self.recipe
        if not recipe.l1 and not recipe.max_norm:
            return
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.ndim <= 1:
                    continue
                if recipe.l1:
                    threshold = group["lr"] * recipe.l1
                    weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_min(0))
                if recipe.max_norm:
                    norms = weight.flatten(1).norm(dim=1).clamp_min(1e-12)
                    shrink = (recipe.max_norm / norms).clamp_max(1.0)
                    weight.mul_(shrink.view(-1, *[1] * (weight.ndim - 1)))


class Average:
    """An exponential moving average of a network's parameters and floating-point buffers.

    Args:
        network: Averaged from its present values on.
        decay: Share of the old average that each step keeps; less in the first steps, as in timm's.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the network after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)
