"""One optimiser step and what surrounds it: parameter groups, penalties, the average of the weights.

Optimisers are timm's. What a step does depends on nothing that a checkpoint would have to remember.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.training.recipe import Recipe
from tlcli.wording import did_you_mean, near_misses

IN_NEED_OF_CLOSURE = ("adahessian",)  # needs second derivatives, which the loop does not compute
EMBEDDINGS = ("class_token", "pos_embedding", "position_embedding", "relative_position_bias_table")


# ---- parameter groups and the optimiser -----------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where in the network its parameters are.

    Attributes:
        unit_of: Parameter name -> unit of the backbone, from 1; names that are missing belong to the head.
        num_units: Units of the backbone.
        undecayed: Names that decay spares beside vectors, as position embeddings.
    """

    unit_of: Mapping[str, int] = field(default_factory=dict)
    num_units: int = 0
    undecayed: frozenset[str] = frozenset()


def parameter_groups(network: nn.Module, places: Places, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the trained parameters, grouped by learning rate and weight decay.

    The learning rate of unit i of n is `layer_decay ** (n + 1 - i)` of the head's (as in BEiT, Bao et al.
    2021). Weight decay spares biases, norms, other vectors, and what the architecture says it must.

    Args:
        network: Its trained parameters have `requires_grad`.
        places: Where they are.
        recipe: Rates and decay.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    above = places.num_units + 1
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = recipe.layer_decay ** (above - places.unit_of.get(name, above))
        penalised = is_penalised(name, parameter, places.undecayed)
        decay = recipe.weight_decay if penalised else 0.0
        group = groups.setdefault(
            (scale, decay, penalised),
            {"params": [], "weight_decay": decay, "scale": scale, "penalised": penalised},
        )
        group["params"].append(parameter)
    return list(groups.values())


def undecayed_names(model: nn.Module) -> frozenset[str]:
    """Return the parameters of a backbone that its authors spare weight decay, beside vectors.

    timm's networks say which (patterns as in `pos_embed.*` among them); torchvision's do not, there they are
    those that its reference training spares: tokens, position embeddings and biases of attention.

    Args:
        model: The whole backbone.
    """
    told = getattr(model, "no_weight_decay", None)
    patterns = set(told()) if callable(told) else {f"*{word}*" for word in EMBEDDINGS}
    names = (name for name, _ in model.named_parameters())
    return frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def is_penalised(name: str, parameter: Tensor, undecayed: frozenset[str]) -> bool:
    """Return whether weight decay, l2 and l1 act on a parameter."""
    return parameter.ndim > 1 and name not in undecayed


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return timm's optimiser of that name.

    Raises:
        UsageError: There is none, or it needs something that is not there.
    """
    from timm.optim import create_optimizer_v2

    check_optimizer(recipe.opt)
    # timm's sgd is Nesterov's, which is not defined without momentum; its momentum then is plain descent.
    name = "momentum" if recipe.opt.lower() == "sgd" and not recipe.momentum else recipe.opt
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=name, lr=1.0, momentum=recipe.momentum
        )  # the rate is set before every step
    except (AssertionError, ImportError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(
            f"--opt {recipe.opt} cannot be used: {str(error) or type(error).__name__}.",
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
        undecayed: Names that l2 spares, as weight decay does.
        start: Name -> its pretrained value, for L2-SP (Li et al. 2018); the head has none.
    """

    recipe: Recipe
    trained: Mapping[str, nn.Parameter]
    undecayed: frozenset[str] = frozenset()
    start: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of l2 and L2-SP to those of the loss."""
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            if self.recipe.l2 and is_penalised(name, parameter, self.undecayed):
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
                if recipe.l1 and group["penalised"]:
                    threshold = recipe.l1 * group["lr"] * metric(optimizer.state.get(weight, {}), group)
                    weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_min(0))
                if recipe.max_norm and weight.ndim > 1:
                    norms = weight.flatten(1).norm(dim=1).clamp_min(1e-12)
                    shrink = (recipe.max_norm / norms).clamp_max(1.0)
                    weight.mul_(shrink.view(-1, *[1] * (weight.ndim - 1)))

    def share_of_zeros(self) -> float:
        """Return the share of the penalised weights that are exactly 0, in [0, 1]."""
        weights = [value for name, value in self.trained.items() if is_penalised(name, value, self.undecayed)]
        total = sum(weight.numel() for weight in weights)
        return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


def metric(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | float:
    """Return how far an optimiser moves a weight for a gradient of 1 and a learning rate of 1.

    Adaptive optimisers divide by the size of past gradients, and momentum adds up its steps. A proximal step
    must do so too, or it would be nothing beside them (Duchi, Hazan & Singer 2011, section 5.1).

    Args:
        state: The optimiser's, of one parameter.
        group: The parameter's group.
    """
    epsilon = group.get("eps") or 1e-8
    momentum = float(group.get("momentum") or 0.0) if "momentum_buffer" in state else 0.0
    length = 1 / (1 - momentum)
    if "exp_avg_sq" in state and "betas" in group:  # Adam and its kin
        spread = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        steps = float(state.get("step", group.get("step", 0)) or 0)
        correction = 1 - group["betas"][1] ** steps if steps else 1.0
        found: Tensor = (spread / correction).sqrt()
        return found.add(epsilon).reciprocal()
    if "square_avg" in state:  # RMSprop
        found = state["square_avg"].sqrt()
        return found.add(epsilon).reciprocal() * length
    if "sum" in state:  # Adagrad
        found = state["sum"].sqrt()
        return found.add(epsilon).reciprocal()
    return length


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
