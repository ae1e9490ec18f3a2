"""torchvision's classification networks as headless backbones, with its weights and their transform.

The last linear layer gives way to the identity, so that the network returns what that layer was fed: pooled
features in most families, the second hidden layer in AlexNet and VGG. SqueezeNet ends in a convolution; its
features are pooled instead. GoogLeNet and Inception are built without their side branches, which training
may add again (`tlcli.backbones.side_branches`).
"""

import math
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models

from tlcli.backbones import hub, weights
from tlcli.backbones.image_sizes import ImageSizeError
from tlcli.backbones.weights_file import StateDict
from tlcli.config.backbone import Preprocess
from tlcli.errors import UsageError
from tlcli.wording import did_you_mean, near_misses

PREFIX = "torchvision/"
INIT_SEED = 0


def names() -> list[str]:
    """Return the names of torchvision's image classifiers, without the prefix."""
    return [str(name) for name in models.list_models(module=models)]


def weights_of(name: str) -> dict[str, Any]:
    """Return torchvision's weights of a classifier by their tags, the default ones first.

    A tag is what torchvision calls them in lower case, such as "imagenet1k_v1". Weights are members of an
    enumeration, with url, meta and transforms.
    """
    known = models.get_model_weights(name)
    return {member.name.lower(): member for member in sorted(known, key=lambda one: one != known.DEFAULT)}


def default_weights(name: str) -> Any:
    """Return torchvision's default weights of a name."""
    return next(iter(weights_of(name).values()))


def chosen_weights(name: str) -> tuple[str, Any]:
    """Return the classifier and the weights that a name such as "resnet50" or "resnet50.v1" stands for.

    Args:
        name: Without the prefix; what follows the dot is a tag, or its end where that is unambiguous.

    Raises:
        UsageError: torchvision has no such classifier or weights.
    """
    short, dot, tag = name.partition(".")
    if short not in names():
        raise UsageError(f"torchvision has no image classifier {short!r}.", hint=_near(short))
    known = weights_of(short)
    found = [key for key in known if key == tag.lower()] or [
        key for key in known if key.endswith(f"_{tag.lower()}")
    ]
    if dot and len(found) != 1:
        raise UsageError(
            f"torchvision has no weights {tag!r} of {short}.",
            hint=f"Known: {', '.join(f'{PREFIX}{short}.{key}' for key in known)}.",
        )
    return short, known[found[0]] if dot else default_weights(short)


def build(
    name: str,
    *,
    weights_file: str | None = None,
    weights_key: str | None = None,
    random_init: bool = False,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return what a Backbone needs of a torchvision network: model, preprocess, arguments, license.

    Args:
        name: With the prefix, such as "torchvision/resnet18" or "torchvision/resnet50.imagenet1k_v1".
        weights_file: Weights to use instead of torchvision's.
        weights_key: Which of several sets of tensors in that file is meant.
        random_init: Load no weights.
        image_size: Height and width of the images in pixels; vision transformers alone are built for one.

    Raises:
        UsageError: torchvision has no classifier or weights of this name.
        BackboneError: The weights cannot be found, loaded or trusted.
    """
    short, wanted = chosen_weights(name.removeprefix(PREFIX))
    preprocess = _preprocess(wanted)
    arguments: dict[str, Any] = {}
    if short.startswith("vit_"):
        height, width = image_size or preprocess.image_size
        if height != width:
            raise ImageSizeError(f"{name} does not take images of {height}x{width} pixels: only square ones.")
        arguments["image_size"] = height
    model = headless(short, arguments)
    if weights_file or not random_init:
        path = weights_file or hub.url_file(wanted.url, name)
        older = weights.Conversion("torchvision's own conversion", partial(_convert, short, model, arguments))
        weights.load_weights(model, path, name, [older], weights_key)
    return {
        "model": model,
        "preprocess": preprocess,
        "arguments": arguments,
        "license": wanted.meta.get("license"),
    }


def _preprocess(default: Any) -> Preprocess:
    """Return the evaluation transform of torchvision weights."""
    transform = default.transforms()
    crop, resize = int(transform.crop_size[0]), int(transform.resize_size[0])
    crop_pct = crop / resize
    while math.floor(crop / crop_pct) < resize:  # division by the rounded share can fall just below
        crop_pct = math.nextafter(crop_pct, 0.0)
    return Preprocess(
        image_size=(crop, crop),
        crop_pct=crop_pct,
        crop_mode="center",
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def headless(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build a network under a fixed seed, without its classifier."""
    if name in {"googlenet", "inception_v3"}:
        # The published weights expect images normalised another way, which the network does itself.
        arguments = arguments | {"aux_logits": False, "init_weights": False, "transform_input": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INIT_SEED)
        try:
            model: nn.Module = models.get_model(name, weights=None, **arguments)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ImageSizeError(f"{PREFIX}{name} cannot be built: {error}") from error
    if name.startswith("squeezenet"):
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)))
        return model
    last = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.set_submodule(last, nn.Identity())
    return model


def _convert(name: str, model: nn.Module, arguments: dict[str, Any], state: StateDict) -> StateDict:
    """Return published weights under the names and shapes of today's networks."""
    if name.startswith("densenet"):  # published when the two convolutions of a layer had names with a dot
        return {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): value
            for key, value in state.items()
        }
    if name.startswith("vit_"):
        from torchvision.models.vision_transformer import interpolate_embeddings

        patch = int(model.patch_size)  # type: ignore[arg-type]
        return dict(interpolate_embeddings(int(arguments["image_size"]), patch, dict(state)))
    return state


def _near(name: str) -> str:
    if name in models.list_models():
        return "It is a detection, segmentation, video or quantised network; tlcli classifies images."
    return did_you_mean(near_misses(name, names())) + "`tlcli backbones list torchvision/` shows the names."
