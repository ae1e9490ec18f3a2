"""Mixing the samples of a batch: mixup and CutMix."""

import math

import torch
from torch import Tensor

from tlcli.errors import UsageError
from tlcli.training.recipe import Recipe

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
    """Return a draw of Beta(alpha, alpha), as a ratio of gamma draws, which torch keeps above 0."""
    concentration = torch.tensor([alpha, alpha], dtype=torch.float64)
    first, second = torch._standard_gamma(concentration, generator=draw).tolist()
    return float(first / (first + second))


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
