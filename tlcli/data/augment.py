"""Augmented views: view v of an image is a pure function of its content, v, a seed and a policy.

View 0 is the evaluation transform. For any other view, the numbers that decide it come from a generator keyed
by a hash of (image SHA-256, view, view seed), so that neither the order, nor the thread, nor the process, nor
what was computed before matters; the global random state is not read or changed. All numbers are drawn for
every view, whatever the policy uses: one operation switched on changes nothing about the others.

The order is: one geometric resampling (crop, rotation, shear, warp, the geometric operations of RandAugment),
mirror, brightness, contrast, saturation, hue, PCA colour, the other operations of RandAugment or
TrivialAugment, erasing; all but the first at the network's size.

**Crops.** A random crop shows a window whose area is a share u of the window that evaluation shows, u uniform
from `crop_scale` to 1 / crop_scale, and never larger than ZOOM_OUT times its sides or the image. So objects
are on average about as large in training as in evaluation. The usual crops from 0.08 to 1 of the image
show them larger in training than in testing (Touvron et al. 2019, "Fixing the train-test resolution
discrepancy"), which costs accuracy when the few epochs of a fine-tuning must also teach the network a new
scale. The window lies anywhere in the image, but inside the evaluation's window enlarged 1 / crop_scale
times, so that a light crop of a panorama still shows what evaluation shows. Where it could not move
(crop_pct 1) the image is continued by its reflection, by (ZOOM_OUT - 1) / 2 of the window's side.

**Presets.** `light` moves and scales, nothing else: no class of digits, letters or signs becomes another.
`medium` adds a mirror, which is right for most photographs and wrong for writing. `strong` is for
training that would otherwise learn the images by heart: many epochs, large networks, from scratch.

**The default** goes by the number of training images and takes no risk. Up to MANY_IMAGES it is `light`:
small data is where a network overfits, so augmentation pays, and where stronger distortion costs most,
since a fine-tuning of a few hundred steps has no time to learn what it makes harder (Steiner et al. 2022:
augmentation helps small data and long training, and hurts where there is plenty). It is never a mirror, as
only the user knows whether left and right mean something. Above, it is `none`: fine-tuning sees each image
only a few times, and every view would have to be computed or stored.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from tlcli.config.backbone import Preprocess
from tlcli.config.data import Augment, AugmentOptions
from tlcli.data import color_ops
from tlcli.data.color_ops import MAX_MAGNITUDE, OPERATIONS, RANDAUGMENT, TRIVIALAUGMENT, Operation
from tlcli.data.resampling import WARP_KNOTS, Window, cut_and_resize, evaluation_window, look_up, warp_shifts
from tlcli.data.transforms import EvalTransform
from tlcli.errors import UsageError

VERSION = 1
MANY_IMAGES = 100_000
ZOOM_OUT = 1.15
NUM_OPERATIONS = 2  # of RandAugment, as in the paper's ImageNet and in timm's and torchvision's defaults


@dataclass(frozen=True, kw_only=True)
class AugmentPolicy:
    """How views are made, every value resolved; ranges are symmetric and drawn uniformly.

    Attributes:
        name: The preset it came from; says nothing about the pixels.
        reason: Why that preset, for people.
        mirror: Probability of a left-right mirror.
        crop_scale: Smallest area of a crop, in share of what evaluation shows; 1 is the evaluation's own.
        crop_ratio: Largest change of a crop's ratio of sides; 1 is none.
        rotate: Largest rotation, in degrees.
        shear: Largest horizontal shear, in degrees.
        warp: Standard deviation of the elastic warp's shifts, in share of the side.
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest shift, in turns.
        pca_color: Standard deviation of the weights of AlexNet's colour shift.
        erase: Probability of erasing a rectangle.
        magnitude: RandAugment's, 1 to 30; 0 is without.
        trivial: Whether TrivialAugment is used.
    """

    name: str = "none"
    reason: str = field(default="", compare=False)
    mirror: float = 0.0
    crop_scale: float = 1.0
    crop_ratio: float = 1.0
    rotate: float = 0.0
    shear: float = 0.0
    warp: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    pca_color: float = 0.0
    erase: float = 0.0
    magnitude: int = 0
    trivial: bool = False

    @property
    def is_none(self) -> bool:
        """Return whether every view is the plain one."""
        return self.key_facts() == AugmentPolicy().key_facts()

    def values(self) -> dict[str, float | int | bool]:
        """Return every value that changes pixels, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in {"name", "reason"}
        }

    def key_facts(self) -> dict[str, Any]:
        """Return everything that changes pixels, for the cache key; floats as `repr` strings."""
        values = {
            name: repr(float(value)) if isinstance(value, float) else value
            for name, value in self.values().items()
        }
        return {"version": VERSION, **values}

    def describe(self) -> str:
        """Return the operations in words, such as "crop from 0.75, mirror 0.5, rotation to 10 degrees"."""
        words = {
            "crop_scale": "crop from {:g} of the area", "rotate": "rotation to {:g} degrees",
            "shear": "shear to {:g} degrees", "warp": "warp {:g}", "mirror": "mirror {:g}",
            "brightness": "brightness {:g}", "contrast": "contrast {:g}", "saturation": "saturation {:g}",
            "hue": "hue {:g}", "pca_color": "PCA colour {:g}", "magnitude": "RandAugment {:g}",
            "trivial": "TrivialAugment", "erase": "erasing {:g}",
        }  # fmt: skip
        values, off = self.values(), AugmentPolicy().values()
        used = [text.format(values[name]) for name, text in words.items() if values[name] != off[name]]
        return ", ".join(used) or "nothing"


_RANDOM_CROP: dict[str, Any] = {"mirror": 0.5, "crop_scale": 0.5, "crop_ratio": 4 / 3}
PRESETS: dict[Augment, dict[str, Any]] = {
    "none": {},
    "light": {"crop_scale": 0.75},
    "medium": {
        "mirror": 0.5, "crop_scale": 0.5, "crop_ratio": 1.2, "rotate": 10.0, "brightness": 0.2,
        "contrast": 0.2,
    },
    "strong": {
        "mirror": 0.5, "crop_scale": 0.35, "crop_ratio": 4 / 3, "magnitude": 9, "erase": 0.25,
    },
    "randaugment": {**_RANDOM_CROP, "magnitude": 9},
    "trivialaugment": {**_RANDOM_CROP, "trivial": True},
}  # fmt: skip


def choose_preset(num_train: int) -> Augment:
    """Return the preset for a number of training images; the module's text says why."""
    return "light" if num_train < MANY_IMAGES else "none"


def resolve_policy(options: AugmentOptions, num_train: int) -> AugmentPolicy:
    """Return the policy that the options mean: the preset's values, and what was given beside it.

    Args:
        options: Values of None are the preset's.
        num_train: Number of training images, by which "auto" chooses.

    Raises:
        UsageError: A magnitude beside TrivialAugment, which draws its own.
    """
    name = choose_preset(num_train) if options.augment == "auto" else options.augment
    values = dict(PRESETS[name])
    if values.get("trivial") and options.magnitude is not None:
        raise UsageError(
            "--magnitude is RandAugment's; TrivialAugment draws its own.",
            hint="Leave --magnitude out, or use --augment randaugment.",
        )
    for key, off in AugmentPolicy().values().items():
        given = getattr(options, key, None)
        if given is not None:
            values[key] = type(off)(given)  # 20 and 20.0 are one policy
    if values.get("crop_scale", 1.0) == 1.0:
        values.pop("crop_ratio", None)  # without a crop there is no ratio to vary
    reason = "as asked"
    if options.augment == "auto":
        fewer = "fewer than" if num_train < MANY_IMAGES else "at least"
        reason = f"{num_train:,} training images, {fewer} {MANY_IMAGES:,}"
    return AugmentPolicy(name=name, reason=reason, **values)


class _Draws(NamedTuple):
    """Every random number of one view: uniform in [0, 1) unless it says normal."""

    mirror: float
    area: float
    ratio: float
    top: float
    left: float
    rotate: float
    shear: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    erase: list[float]  # whether, and color_ops.erase's four
    operations: list[float]  # which, sign and magnitude, for each of NUM_OPERATIONS
    colour: tuple[float, ...]  # normal, three
    knots: "np.ndarray[tuple[int, int, int], np.dtype[np.float32]]"  # normal [2, WARP_KNOTS, WARP_KNOTS]


def _draw(sha256: str, view: int, view_seed: int) -> tuple[_Draws, np.random.Generator]:
    """Return the numbers of one view, and the generator for the noise of erasing."""
    key = hashlib.sha256(f"tlcli view {view_seed} {view} {sha256}".encode()).digest()
    # Philox is keyed rather than seeded: no two of its 2^128 keys share a stream.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))
    uniform = generator.random(16 + 3 * NUM_OPERATIONS).tolist()
    normal = generator.standard_normal(3 + 2 * WARP_KNOTS**2)
    knots = normal[3:].astype(np.float32).reshape(2, WARP_KNOTS, WARP_KNOTS)
    colour = tuple(normal[:3].tolist())
    return _Draws._make([*uniform[:11], uniform[11:16], uniform[16:], colour, knots]), generator


class Augmenter:
    """Makes views of decoded images; has no state that changes, so that threads may share it.

    Args:
        policy: What to vary.
        preprocess: The backbone's resolved values; decides size, scale and view 0.
    """

    def __init__(self, policy: AugmentPolicy, preprocess: Preprocess) -> None:
        self.policy = policy
        self.preprocess = preprocess
        self.plain = EvalTransform(preprocess)
        self._is_plain = policy.is_none  # asked for every image
        self._ranges = TRIVIALAUGMENT if policy.trivial else RANDAUGMENT

    def __call__(self, image: torch.Tensor, sha256: str, view: int, view_seed: int) -> torch.Tensor:
        """Return one view of an image.

        Args:
            image: uint8 [3, H, W], RGB, as decoded; any memory layout, channels-last is fastest.
            sha256: Of the image file's bytes.
            view: 0 is the evaluation transform.
            view_seed: Changes all views but 0.

        Returns:
            uint8 [3, h, w], contiguous, with (h, w) the network's image size.
        """
        if view == 0 or self._is_plain:
            return self.plain(image)
        draws, noise = _draw(sha256, view, view_seed)
        operations = self._operations(draws)
        result = self._resampled(image, draws, operations)
        if draws.mirror < self.policy.mirror:
            result = result.flip(-1)
        result = self._recoloured(result.contiguous(), draws)
        for operation in operations:
            result = color_ops.apply(result, operation, self._ranges)
        if draws.erase[0] < self.policy.erase:
            result = color_ops.erase(result.clone(), draws.erase[1:], noise)
        return result.contiguous()

    def _operations(self, draws: _Draws) -> list[Operation]:
        """Return the drawn operations of RandAugment or TrivialAugment, in order."""
        policy = self.policy
        if not policy.trivial and not policy.magnitude:
            return []
        found = []
        for number in range(1 if policy.trivial else NUM_OPERATIONS):
            which, sign, magnitude = draws.operations[3 * number : 3 * number + 3]
            level = int(magnitude * (MAX_MAGNITUDE + 1)) if policy.trivial else policy.magnitude
            strength = level / MAX_MAGNITUDE * (1 if sign < 0.5 else -1)
            found.append(Operation(OPERATIONS[int(which * len(OPERATIONS))], strength))
        return found

    def _resampled(self, image: torch.Tensor, draws: _Draws, operations: list[Operation]) -> torch.Tensor:
        """Return the geometry's part: as cheap a resampling as does it."""
        policy, size = self.policy, self.preprocess.image_size
        matrix = np.eye(3)
        matrix[:2, :2] = color_ops.rotation(_spread(draws.rotate, policy.rotate))
        matrix[:2, 1] += matrix[:2, 0] * math.tan(math.radians(_spread(draws.shear, policy.shear)))
        for operation in operations:
            moved = color_ops.geometry(operation, self._ranges, size)
            matrix = matrix if moved is None else matrix @ moved
        still = bool((matrix == np.eye(3)).all()) and not policy.warp
        if still and policy.crop_scale == 1:
            return self.plain(image)
        window = self._window(draws, image.shape[1], image.shape[2])
        if still:
            return cut_and_resize(image, window, self.plain)
        shifts = warp_shifts(torch.from_numpy(draws.knots), size, policy.warp) if policy.warp else None
        return look_up(image, window, matrix, shifts, self.plain)

    def _window(self, draws: _Draws, height: int, width: int) -> Window:
        """Return the box of the source that the view shows."""
        policy, preprocess = self.policy, self.preprocess
        shown = evaluation_window(self.plain, height, width)
        if policy.crop_scale == 1:
            return shown
        zoom_out = min(policy.crop_scale**-0.5, ZOOM_OUT)
        whole_width, whole_height = float(width), float(height)
        if preprocess.crop_mode == "border":
            whole_width, whole_height = (side / preprocess.crop_pct for side in (shown.width, shown.height))
        # What crops may show: the image, but not too far from what evaluation shows; and room to move.
        canvas_width = max(min(whole_width, shown.width / policy.crop_scale), shown.width * zoom_out)
        canvas_height = max(min(whole_height, shown.height / policy.crop_scale), shown.height * zoom_out)
        share = policy.crop_scale + draws.area * (zoom_out**2 - policy.crop_scale)
        stretch = policy.crop_ratio ** (draws.ratio - 0.5)  # of each side, so that the ratio is its square
        box_width = min(canvas_width, shown.width * math.sqrt(share) * stretch)
        box_height = min(canvas_height, shown.height * math.sqrt(share) / stretch)
        return Window(
            (width - canvas_width) / 2 + draws.left * (canvas_width - box_width),
            (height - canvas_height) / 2 + draws.top * (canvas_height - box_height),
            box_width,
            box_height,
        )

    def _recoloured(self, image: torch.Tensor, draws: _Draws) -> torch.Tensor:
        policy = self.policy
        if policy.brightness:
            image = color_ops.brightness(image, 1 + _spread(draws.brightness, policy.brightness))
        if policy.contrast:
            image = color_ops.contrast(image, 1 + _spread(draws.contrast, policy.contrast))
        if policy.saturation:
            image = color_ops.saturation(image, 1 + _spread(draws.saturation, policy.saturation))
        if policy.hue:
            image = color_ops.hue(image, _spread(draws.hue, policy.hue))
        if policy.pca_color:
            image = color_ops.pca_color(image, [policy.pca_color * value for value in draws.colour])
        return image


def _spread(draw: float, largest: float) -> float:
    """Return a number in [-largest, largest) from one in [0, 1)."""
    return (2 * draw - 1) * largest
