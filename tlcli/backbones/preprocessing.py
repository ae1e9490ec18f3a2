"""The evaluation transform of a backbone, from timm's configuration, a stored run or the user's options.

Of timm it is the plain one (`input_size`, `crop_pct`), not the larger test size that some configurations
also name: it is the size the network was trained for, and timm's own default.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import timm

from tlcli.backbones.specs import LIST_HINT
from tlcli.config.backbone import BackboneOptions, Interpolation, Preprocess
from tlcli.errors import BackboneError

SIZES = (1, 4096)  # sides of an image in pixels, and shares of a crop, that a configuration may ask for
CROPS = (0.1, 2.0)  # above 1 the image is padded
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


def preprocess_of(cfg: Mapping[str, Any], name: str) -> Preprocess:
    """Return the evaluation transform that timm's configuration describes.

    Raises:
        BackboneError: The network takes no RGB images.
    """
    try:
        data = timm.data.resolve_data_config(pretrained_cfg=dict(cfg), use_test_size=False)
        channels, height, width = data["input_size"]
        values = {key: data[key] for key in ("crop_pct", "crop_mode", "mean", "std")}
    except (TypeError, ValueError, KeyError, AssertionError, AttributeError) as error:
        raise _no_transform(name, str(error)) from error
    if channels != 3:
        raise BackboneError(
            f"{name} takes images of {channels} channels; only RGB backbones can be used.", hint=LIST_HINT
        )
    known = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    return stored_preprocess({"image_size": (height, width), "interpolation": known, **values}, name)


def stored_preprocess(values: Mapping[str, Any], name: str) -> Preprocess:
    """Return the evaluation transform that a file of any origin describes.

    Args:
        values: The fields of Preprocess.
        name: What the user called the backbone, for messages.

    Raises:
        BackboneError: A value is missing or unknown, or asks for what no transform can give, such as a crop
            so small that each image would be enlarged to gigabytes.
    """
    try:
        height, width = (int(value) for value in values["image_size"])
        (red, green, blue), (r, g, b) = (map(float, values[key]) for key in ("mean", "std"))
        found = Preprocess(**{
            **values, "image_size": (height, width), "crop_pct": float(values["crop_pct"]),
            "mean": (red, green, blue), "std": (r, g, b),
        })  # fmt: skip
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _no_transform(name, str(error)) from error
    wrong = {
        f"images of {height}x{width} pixels": not all(
            SIZES[0] <= side <= SIZES[1] for side in (height, width)
        ),
        f"a crop of {found.crop_pct:g}": not CROPS[0] <= found.crop_pct <= CROPS[1],
        f"the crop mode {found.crop_mode!r}": found.crop_mode not in CROP_MODES,
        f"the interpolation {found.interpolation!r}": found.interpolation not in INTERPOLATIONS,
        f"the mean {list(found.mean)}": not all(map(math.isfinite, found.mean)),
        f"the deviation {list(found.std)}": not all(0 < value < math.inf for value in found.std),
    }
    if odd := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise _no_transform(name, f"it asks for {odd[0]}")
    return found


def _no_transform(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"The configuration of {name} describes no transform of images: {why}.",
        hint="Its config.json is damaged or not timm's; get it again.",
    )


def with_options(preprocess: Preprocess, options: BackboneOptions) -> Preprocess:
    """Return a transform with what the user asked for in its place."""
    changes: dict[str, Any] = {}
    if options.height_width:
        changes["image_size"] = options.height_width
    if options.crop_mode:
        changes["crop_mode"] = options.crop_mode
    if options.crop_pct:
        changes["crop_pct"] = options.crop_pct
    if options.interpolation:
        changes["interpolation"] = options.interpolation
    for name in ("mean", "std"):
        if (given := options.parsed(name)) is not None:
            changes[name] = given
    return dataclasses.replace(preprocess, **changes)
