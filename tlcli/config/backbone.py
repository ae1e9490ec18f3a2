"""Options of the backbone: which network, its images, how its features are computed and kept."""

import os
import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tlcli.config.fields import HasCacheLimit, HasWorkers, Options, option
from tlcli.config.model_kwargs import parse_arguments
from tlcli.errors import UsageError
from tlcli.wording import parse_device, parse_numbers, parse_size

Device = str
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]
CacheMode = Literal["auto", "always", "never", "verify"]

SIDES = (8, 4096)  # of the images that --image-size asks for, in pixels


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The evaluation transform of a backbone, every value resolved; part of the cache key.

    Attributes:
        image_size: Height and width given to the network, in pixels.
        crop_pct: Share of the resized image the centre crop keeps, in (0, 1].
        crop_mode: "center" resizes the shorter side, then crops; "squash" resizes both sides; "border"
            fits the longer side and pads with the mean.
        interpolation: How the resize interpolates (always antialiased).
        mean: Per-channel mean subtracted from values in [0, 1], in RGB order.
        std: Per-channel divisor, in RGB order.
    """

    image_size: tuple[int, int]
    crop_pct: float
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


# ---- what the texts stand for -----------------------------------------------------------------------------

Origin = Literal["timm", "torchvision", "classic", "hf-hub", "local-dir", "bundled"]


@dataclass(frozen=True)
class BackboneName:
    """A backbone's name, taken apart.

    Attributes:
        origin: Where its network and weights come from.
        rest: The name there: timm's, torchvision's, a repository, a path.
    """

    origin: Origin
    rest: str


WEIGHTS_FILES = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt", ".safetensors", ".npz", ".t7", ".pkl", ".h5")
"""How the names of weights files end; no name of a backbone ends so."""


class WeightsFileError(UsageError):
    """A weights file was given where a backbone's name is expected.

    Args:
        path: The file, which need not exist.
        name: The option.
        architecture: What to name, where that is known.
    """

    def __init__(self, path: str, name: str, architecture: str | None = None) -> None:
        looks = f" These look like the weights of {architecture}." if architecture else ""
        super().__init__(
            f"{name} {path!r} is a weights file; the name of an architecture is expected.{looks}",
            hint=f"Write --backbone {architecture or 'ARCH'} --weights {shlex.quote(path)}"
            + (
                "."
                if architecture
                else ", with the architecture that the weights were trained with for ARCH."
            ),
        )
        self.path, self.name = path, name


def parse_backbone(text: str, name: str = "--backbone") -> BackboneName:
    """Return what a backbone's name says about where it comes from; whether it is there is not looked up.

    Raises:
        UsageError: It has a prefix that does not exist, or is a weights file.
    """
    if text == "bundled":
        return BackboneName("bundled", text)
    for origin in get_args(Origin):
        mark = {"local-dir": ":", "hf-hub": ":", "torchvision": "/", "classic": "/"}.get(origin)
        if mark and text.startswith(prefix := origin + mark) and len(text) > len(prefix):
            return BackboneName(origin, text.removeprefix(prefix))
    if text.lower().endswith(WEIGHTS_FILES) or (any(sign in text for sign in "/\\") and os.path.isfile(text)):
        raise WeightsFileError(text, name)
    if any(sign in text for sign in "/\\:"):
        hint = f"For a folder write local-dir:{text}; for a hub repository hf-hub:{text}."
        if text.startswith(("torchvision", "timm/", "timm:")):
            hint = "Write torchvision/NAME for torchvision, and the bare name for timm."
        raise UsageError(f"{name} {text!r} is not a timm model name.", hint=hint)
    return BackboneName("timm", text)


def parse_freeze(text: str, name: str = "--freeze") -> int | Literal["all"]:
    """Return what `--freeze` says: a number of units (`none` is 0), or `all`.

    Raises:
        UsageError: It is neither.
    """
    word = str(text).strip().lower()
    if word == "all":
        return "all"
    if word != "none" and not re.fullmatch(r"[0-9]{1,9}", word):
        raise UsageError(
            f"{name} takes all, none, or a number of units; got {text!r}.",
            hint="`tlcli backbones show B` lists the units of a backbone.",
        )
    return 0 if word == "none" else int(word)


def parse_image_size(text: str | int, name: str = "--image-size") -> tuple[int, int]:
    """Return the height and width that `--image-size` says: one number for a square, or HxW.

    Raises:
        UsageError: It is neither, or a side is out of range.
    """
    sides = re.fullmatch(r"([0-9]{1,9})(?:[x×]([0-9]{1,9}))?", str(text).strip().lower())
    if not sides:
        raise UsageError(
            f"{name} {str(text)!r} is not an image size.",
            hint="Use one number for a square, as in 224, or height x width, as in 96x160, in pixels.",
        )
    height = int(sides[1])
    width = int(sides[2] or height)
    low, high = SIDES
    if not (low <= height <= high and low <= width <= high):
        raise UsageError(
            f"{name} {text} is out of range.", hint=f"Expected sides from {low} to {high} pixels."
        )
    return height, width


def parse_color(text: str, name: str) -> tuple[float, float, float]:
    """Return the red, green and blue part that `--mean` or `--std` says; one number stands for all three.

    Raises:
        UsageError: It is not one or three finite numbers, or a deviation is not above 0.
    """
    lowest = -1e3 if name == "--mean" else 1e-6
    found = parse_numbers(text, name, minimum=lowest, maximum=1e3)
    if len(found) not in {1, 3}:
        raise UsageError(
            f"{name} {text} has {len(found)} numbers; expected three, for red, green and blue.",
            hint=f"As in {name} 0.485,0.456,0.406; one number stands for all three.",
        )
    red, green, blue = found if len(found) == 3 else found * 3
    return red, green, blue


# ---- groups of options, shared by commands ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Options):
    """Which pretrained network, and how images are prepared for it."""

    backbone: str | None = option(
        None,
        "timm name (resnet50.a1_in1k), torchvision/NAME, classic/NAME, hf-hub:ORG/NAME, local-dir:PATH or "
        "bundled.",
        metavar="B",
        parse=parse_backbone,
    )
    weights: str | None = option(
        None, "Weights for the named architecture: a .safetensors, .pth, .pt or .npz file.", metavar="FILE"
    )
    weights_key: str | None = option(
        None,
        "Which of several networks in that file is meant, as the message that lists them names it.",
        metavar="KEY",
    )
    random_init: bool = option(False, "Leave the weights random (a baseline; no hub is asked).")
    model_kwargs: str | None = option(
        None,
        "Arguments of the network: norm=every,activation=tanh for classic/lenet5, or what timm's own takes.",
        metavar="KEY=VALUE,...",
        parse=parse_arguments,
    )
    image_size: str | int | None = option(
        None,
        "Size of the image given to the backbone, in pixels: N for a square, or HxW; its own by default.",
        metavar="N|HxW",
        parse=parse_image_size,
    )
    crop_pct: float | None = option(
        None,
        "Share of the resized image the centre crop keeps; the backbone's own unless given.",
        minimum=0.1,
        maximum=1.0,
    )
    crop_mode: CropMode | None = option(
        None,
        "center crops, squash resizes both sides, border pads; the backbone's own by default.",
    )
    interpolation: Interpolation | None = option(
        None, "How images are resized; the backbone's own unless given."
    )
    mean: str | None = option(
        None,
        "Mean of red, green and blue in [0, 1], subtracted from images; the backbone's own by default.",
        metavar="R,G,B",
        parse=parse_color,
    )
    std: str | None = option(
        None, "What images are then divided by; the backbone's own by default.", metavar="R,G,B",
        parse=parse_color,
    )  # fmt: skip

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Return the height and width that --image-size gives, in pixels."""
        found: tuple[int, int] | None = self.parsed("image_size")
        return found

    def check(self) -> None:
        """Refuse a key into no file; keep a square's side as a number, as the files of earlier releases do.

        Raises:
            UsageError: There is a key and no file.
        """
        if str(self.image_size).strip().isdecimal():
            object.__setattr__(self, "image_size", int(str(self.image_size)))
        if self.weights_key and not self.weights:
            raise UsageError(
                "--weights-key chooses among the networks of a weights file, and there is none.",
                hint="Add --weights FILE, or leave --weights-key out.",
            )

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of the network that --model-kwargs gives."""
        return dict(self.parsed("model_kwargs") or {})


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(HasWorkers, HasCacheLimit, Options):
    """How features are computed and cached."""

    freeze: str | None = option(
        None,
        "Freeze units 1..K, `all` or `none`; see `tlcli backbones show`.",
        metavar="K|all|none",
        parse=parse_freeze,
    )
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Compute type of the frozen prefix; auto is bf16 where the processor is fast at it."
    )
    cache_dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "Type of the stored rows; auto is fp32 for pooled vectors, bf16 for activation maps."
    )
    cache: CacheMode = option(
        "auto", "Use the feature cache; never bypasses it, verify recomputes everything and compares."
    )
    cache_max_size: str = option(
        "200GB",
        "Refuse work that would grow the cache beyond this, before it begins; lower it on a shared disk, "
        "raise it for many views of large maps.",
        metavar="SIZE",
        parse=parse_size,
    )
    device: Device = option(
        "auto", "auto, cpu, cuda, cuda:0 or mps.", envvar="TLCLI_DEVICE", metavar="DEVICE", parse=parse_device
    )
    workers: int | None = option(
        None,
        "Threads that decode images; one per core, at most 16, unless given.",
        flags=("-j", "--workers"),
        envvar="TLCLI_WORKERS",
        minimum=1,
        maximum=256,
    )

    @property
    def frozen_units(self) -> int | Literal["all"] | None:
        """Return the number of units that --freeze names, or `all`; None where it is not given."""
        found: int | Literal["all"] | None = self.parsed("freeze")
        return found
