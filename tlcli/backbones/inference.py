"""A frozen prefix made fast for inference, and checked against itself in fp32.

Batch normalisation is folded into the convolution before it, memory is channels-last and, where the
processor is quick at it, layers compute in bf16. Plain casting to bf16 costs depthwise networks dearly: most
of the error is the rounding of weights and folded biases, which is the same in every image and does not
average out. Two remedies, both free of data:

- short filters (depthwise ones) are rounded with error diffusion, so that their sums stay what they were;
- the first layers, where errors travel furthest, stay in fp32: three, or `CAREFUL_SHARE` of all where three
  are not enough. That is measured on synthetic smooth images, which suffer most.

Networks that mix number types themselves fail with single layers in bf16. They run under torch's autocast, or
in fp32 where that fails or strays. No clock decides, for the rows would then follow how busy the machine is;
with 16 images autocast was quicker than fp32 in all of 23 such networks on a CPU (0.41 to 0.93 of the time).

Median cosine between bf16 and fp32 features of a MobileNetV2, plain cast and as done here: photographs 0.997
and 0.9997, enlarged thumbnails 0.983 and 0.9992, close-ups of steel 0.989 and 0.9989.
"""

import copy
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tlcli.backbones.memory_format import in_memory_format, to_channels_last
from tlcli.machine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

VERSION = 1  # part of the cache key: raise it when rows computed by this module change
FEW_LAYERS = 3  # more costs speed: the first layers have the largest maps
CAREFUL_SHARE = 3 / 8
GOOD_COSINE = 0.999  # median over synthetic images; below it more layers stay in fp32
MIN_COSINE = 0.99  # below it all of them do
PROBE_IMAGES = 4
PROBE_SCALES = (16, 64)  # pixels
SHORT_FILTER = 64


@dataclass(frozen=True)
class FastPrefix:
    """A prefix ready for inference.

    Attributes:
        module: Takes normalised float32 images [B, 3, H, W] and gives rows in float32 or bf16.
        channels_last: The memory format of these images; contiguous otherwise.
        facts: How it computes, for the cache key.
        reason: The same for people.
    """

    module: nn.Module
    channels_last: bool
    facts: dict[str, Any]
    reason: str


def prepare(
    prefix: nn.Module, image_size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> FastPrefix:
    """Return `prefix` made fast; the module given is left as it was.

    Args:
        prefix: The frozen part of a backbone, in eval mode.
        image_size: Height and width of its input, in pixels.
        dtype: torch.float32 or torch.bfloat16.
        device: Where it will run.
    """
    exact, images, channels_last = _placed(prefix, synthetic_images(image_size).to(device), device)
    expected = run(exact, images)
    folded, count = fold_batch_norms(exact)
    finite = bool(expected.isfinite().all())  # where it is not, rows are refused when they are published
    if count and not (
        finite and torch.allclose(run(folded, images), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    ):
        # Children are not always run in the order they are declared; then folding is wrong and is not done.
        folded, count = exact, 0
    facts: dict[str, Any] = {
        "version": VERSION,
        "dtype": "fp32",
        "folded_batch_norms": count,
        "memory_format": "channels_last" if channels_last else "contiguous",
    }

    def ready(module: nn.Module, more: dict[str, Any], reason: str) -> FastPrefix:
        where = "" if channels_last else ", in contiguous memory"
        return FastPrefix(module, channels_last, facts | more, reason + where)

    if dtype == torch.float32:
        return ready(folded, {}, "fp32")
    order = layers_in_order(folded, images[:1])
    if len(order) <= FEW_LAYERS:
        return ready(folded, {}, f"fp32, because the prefix has only {len(order)} layers")
    reasons = []
    for attempt in (_reduced_layers, _under_autocast):
        try:
            found, more, reason = attempt(folded, order, images, expected)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            # Products of a bf16 layer's output and an fp32 mask, bias or scale; recurrent layers; kernels
            # that have no bf16. Each has its own exception.
            logger.debug("%s does not run in this backbone: %s", attempt.__name__, error)
            reasons.append("bf16 does not run in this backbone")
            continue
        if found is not None:
            return ready(found, more, reason)
        reasons.append(reason)
    return ready(folded, {}, f"fp32, because {reasons[-1]}")


def _placed(prefix: nn.Module, images: Tensor, device: torch.device) -> tuple[nn.Module, Tensor, bool]:
    """Return a copy of the prefix on its device, the images, and whether both are in channels-last memory."""
    copied = to_channels_last(_copy(prefix, device))
    try:
        run(copied, in_memory_format(images[:1], True))
    except (RuntimeError, ValueError) as error:  # a view that this memory format does not allow
        if is_out_of_memory(error):
            raise
        logger.debug("channels-last memory does not suit this backbone: %s", error)
        return _copy(prefix, device), images, False
    return copied, in_memory_format(images, True), True


def _copy(prefix: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(prefix).eval().requires_grad_(False).to(device)


def _reduced_layers(
    folded: nn.Module, order: list[str], images: Tensor, expected: Tensor
) -> tuple[nn.Module | None, dict[str, Any], str]:
    """Return the prefix with most layers in bf16, the facts of it and the reason; None where it strays."""
    cosine = 0.0
    for num_fp32 in (FEW_LAYERS, max(FEW_LAYERS, round(CAREFUL_SHARE * len(order)))):
        reduced = _to_bf16(folded, set(order[num_fp32:]))
        cosine = median_cosine(run(reduced, images), expected)
        if cosine >= GOOD_COSINE:
            break
    if cosine < MIN_COSINE:
        return None, {}, f"bf16 strays too far in this backbone (cosine {cosine:.3f})"
    reason = (
        f"bf16 but for {num_fp32} of {len(order)} layers (cosine to fp32 {cosine:.4f} on synthetic images)"
    )
    return reduced, {"dtype": "bf16", "fp32_layers": num_fp32, "rounding": "error-diffusion"}, reason


def _under_autocast(
    folded: nn.Module, _order: list[str], images: Tensor, expected: Tensor
) -> tuple[nn.Module | None, dict[str, Any], str]:
    """Return the prefix under torch's autocast to bf16, likewise."""
    wrapped = Autocast(folded)
    cosine = median_cosine(run(wrapped, images), expected)
    if cosine < MIN_COSINE:
        return None, {}, f"bf16 strays too far in this backbone (cosine {cosine:.3f})"
    return (
        wrapped,
        {"dtype": "bf16", "autocast": True},
        f"bf16 by autocast (cosine to fp32 {cosine:.4f} on synthetic images)",
    )


class Autocast(nn.Module):
    """A module that runs under torch's autocast to bf16, for networks that mix number types themselves."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Return the module's rows; [B, 3, H, W] float32 -> [B, ...]."""
        with torch.autocast(images.device.type, torch.bfloat16):
            rows: Tensor = self.module(images)
        return rows


def synthetic_images(image_size: tuple[int, int]) -> Tensor:
    """Return float32 [PROBE_IMAGES, 3, H, W] of smooth noise in [-2, 2], always the same."""
    generator = torch.Generator().manual_seed(0)
    height, width = image_size
    images = torch.zeros(PROBE_IMAGES, 3, height, width)
    for scale in PROBE_SCALES:
        size = max(2, height // scale), max(2, width // scale)
        coarse = torch.randn(PROBE_IMAGES, 3, *size, generator=generator)
        images += nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (images / images.std()).clamp(-2, 2)


def run(module: nn.Module, images: Tensor) -> Tensor:
    """Return the rows of a batch, float32.

    Without `inference_mode`: some networks keep tensors of the forward pass, which training uses again.
    """
    with torch.no_grad():
        rows: Tensor = module(images)
        return rows.float()


def median_cosine(rows: Tensor, expected: Tensor) -> float:
    """Return the median cosine between rows [N, ...] and what they should be; NaN counts as 0."""
    cosine = nn.functional.cosine_similarity(rows.flatten(1), expected.flatten(1))
    return float(cosine.nan_to_num(0.0).median())


def layers_in_order(module: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the convolutions and linear layers in the order they run."""
    order: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: order.append(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    try:
        run(module, images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(order))


def fold_batch_norms(module: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy with each batch norm that is declared right after a convolution folded into it.

    timm's BatchNormAct2d keeps its activation. The count of folded norms comes with it. Whether declaration
    order was execution order must be checked by the caller.
    """
    module = copy.deepcopy(module)
    count = 0
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if norm.running_mean is None or norm.num_features != conv.out_channels:
                continue
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            activation = getattr(norm, "act", None)
            setattr(parent, norm_name, nn.Identity() if activation is None else activation)
            count += 1
    return module, count


def diffuse_to_bf16(weight: Tensor) -> Tensor:
    """Return a weight [out, ...] rounded to bf16 so that the sum of each short filter is kept.

    Within a filter the rounding error of one value is added to the next, from the largest magnitude to the
    smallest, so that what remains is half a unit in the last place of the smallest. Filters of more than
    `SHORT_FILTER` values are rounded to nearest: their errors average out, and sorting them takes seconds.
    """
    flat = weight.detach().float().flatten(1)
    if flat.shape[1] > SHORT_FILTER:
        return weight.detach().to(torch.bfloat16)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)
    values = flat.gather(1, order)
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    carry = torch.zeros_like(values[:, 0])
    for index in range(values.shape[1]):
        wanted = values[:, index] + carry
        rounded[:, index] = wanted.to(torch.bfloat16)
        carry = wanted - rounded[:, index].float()
    return torch.empty_like(rounded).scatter_(1, order, rounded).view(weight.shape)


def _to_bf16(module: nn.Module, names: set[str]) -> nn.Module:
    """Return a copy whose named layers compute in bf16; every layer casts its input to its own type."""
    module = copy.deepcopy(module)
    for name, layer in module.named_modules():
        if name in names:
            channels_last = layer.weight.is_contiguous(memory_format=torch.channels_last)
            rounded = diffuse_to_bf16(layer.weight)
            layer.to(torch.bfloat16)
            layer.weight.data = in_memory_format(rounded, channels_last)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(_cast_input)
    return module


def _cast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (inputs[0].to(weight.dtype), *inputs[1:])
