"""One optimiser step and what surrounds it: parameter groups, penalties, the average of the weights.

Optimisers are timm's. What a step does depends on nothing that a checkpoint would have to remember.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.training.recipe import Recipe
from tlcli.wording import did_you_mean, near_misses

IN_NEED_OF_CLOSURE = ("adahessian",)  # needs second derivatives, which the loop does not compute


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
    from timm.optim import list_optimizers

    known = [item for item in list_optimizers() if not item.startswith(IN_NEED_OF_CLOSURE)]
    if name.lower() in known:
        return
    near = near_misses(name, known)
    raise UsageError(
        f"--opt {name!r} is not an optimiser that can be used here.",
        hint=did_you_mean(near).strip() or "adamw, sgd, rmsprop and adagrad are usual.",
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


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
