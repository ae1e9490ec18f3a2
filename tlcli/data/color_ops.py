"""What is done to a view's colours and contents, on uint8 at the network's size; pure functions.

The operations are torchvision's functional ones, but for contrast, where it sums floats in an order that
depends on the number of threads, and solarize, where it is slow.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import functional as operations

# Standard deviations and directions of ImageNet's RGB values in [0, 1] along their principal components, as
# the Torch 7 training code that reproduced AlexNet's augmentation has them (Krizhevsky et al. 2012, 4.1).
PCA_SCALES = (0.2175, 0.0188, 0.0045)
PCA_DIRECTIONS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
# Random erasing (Zhong et al. 2020): share of the image that is erased, and largest ratio of its sides.
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = 10 / 3

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# The 14 operations of RandAugment and of TrivialAugment's wide space alike.
OPERATIONS = (
    "Identity", *GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize",
    "AutoContrast", "Equalize",
)  # fmt: skip
MAX_MAGNITUDE = 30


class Ranges(NamedTuple):
    """How strong the operations are at the largest magnitude; they are nothing at magnitude 0.

    Attributes:
        shear: Tangent of the angle.
        translate: Share of the side.
        rotate: Degrees.
        blend: Change of the factor of brightness, colour, contrast and sharpness.
        posterize: Bits taken away of eight.
    """

    shear: float
    translate: float
    rotate: float
    blend: float
    posterize: int


RANDAUGMENT = Ranges(shear=0.3, translate=150 / 331, rotate=30.0, blend=0.9, posterize=4)
TRIVIALAUGMENT = Ranges(shear=0.99, translate=32 / 224, rotate=135.0, blend=0.99, posterize=6)


class Operation(NamedTuple):
    """One drawn operation of RandAugment or TrivialAugment.

    Attributes:
        name: One of OPERATIONS.
        strength: In [-1, 1]: the share of the largest magnitude, with its sign where the operation has one.
    """

    name: str
    strength: float


def geometry(operation: Operation, ranges: Ranges, size: tuple[int, int]) -> Any:
    """Return float64 [3, 3]: the operation on positions (x, y, 1) in pixels from the centre; or None."""
    name, strength = operation
    height, width = size
    matrix = np.eye(3)
    if name == "ShearX":
        matrix[0, 1] = strength * ranges.shear
    elif name == "ShearY":
        matrix[1, 0] = strength * ranges.shear
    elif name == "TranslateX":
        matrix[0, 2] = strength * ranges.translate * width
    elif name == "TranslateY":
        matrix[1, 2] = strength * ranges.translate * height
    elif name == "Rotate":
        matrix[:2, :2] = rotation(strength * ranges.rotate)
    else:
        return None
    return matrix


def rotation(degrees: float) -> Any:
    """Return float64 [2, 2]: the rotation by an angle."""
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def apply(image: torch.Tensor, operation: Operation, ranges: Ranges) -> torch.Tensor:
    """Return the image after an operation that is not geometric.

    Args:
        image: uint8 [3, h, w].
        operation: What to do, and how much.
        ranges: How strong it is at most.

    Returns:
        uint8 [3, h, w].
    """
    name, strength = operation
    factor = 1 + strength * ranges.blend
    if name == "Brightness":
        return brightness(image, factor)
    if name == "Color":
        return saturation(image, factor)
    if name == "Contrast":
        return contrast(image, factor)
    if name == "Sharpness":
        return _tensor(operations.adjust_sharpness(image, factor))
    if name == "Posterize":
        return _tensor(operations.posterize(image, 8 - round(abs(strength) * ranges.posterize)))
    if name == "Solarize":
        return _solarize(image, 255 * (1 - abs(strength)))
    if name == "AutoContrast":
        return _tensor(operations.autocontrast(image))
    if name == "Equalize":
        return _tensor(operations.equalize(image))
    return image


def brightness(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the image with every value multiplied."""
    return _tensor(operations.adjust_brightness(image, factor))


def contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the image with every value's distance from the mean grey multiplied."""
    grey = _tensor(operations.rgb_to_grayscale(image))
    mean = int(grey.sum(dtype=torch.int32 if grey.numel() < 2**23 else torch.int64)) / grey.numel()
    return image.float().mul_(factor).add_((1 - factor) * mean).clamp_(0, 255).to(torch.uint8)


def saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the image with every pixel's distance from its grey multiplied."""
    return _tensor(operations.adjust_saturation(image, factor))


def hue(image: torch.Tensor, turns: float) -> torch.Tensor:
    """Return the image with its hues moved around the colour wheel."""
    return _tensor(operations.adjust_hue(image, turns))


def pca_color(image: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the image with one colour added to all of it (Krizhevsky et al. 2012).

    Args:
        image: uint8 [3, h, w].
        weights: How many standard deviations along each of the three components.
    """
    moves = [weight * scale for weight, scale in zip(weights, PCA_SCALES, strict=True)]
    colour = [255 * sum(move * at for move, at in zip(moves, row, strict=True)) for row in PCA_DIRECTIONS]
    moved = image.float() + torch.tensor(colour)[:, None, None]
    return moved.round_().clamp_(0, 255).to(torch.uint8)


def erase(image: torch.Tensor, draws: Sequence[float], noise: "np.random.Generator") -> torch.Tensor:
    """Return the image with a random rectangle replaced by noise (Zhong et al. 2020).

    Where the paper draws again when a rectangle is too large, this one is cut to the image.

    Args:
        image: uint8 [3, h, w]; changed in place.
        draws: Four numbers in [0, 1): area, ratio of the sides, top, left.
        noise: Gives the rectangle's values.
    """
    _, height, width = image.shape
    area = (ERASED_AREA[0] + draws[0] * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
    ratio = ERASED_RATIO ** (2 * draws[1] - 1)
    rows = min(height, max(1, round(math.sqrt(area * ratio))))
    columns = min(width, max(1, round(math.sqrt(area / ratio))))
    top, left = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
    values = noise.integers(0, 256, (3, rows, columns), dtype=np.uint8)
    image[:, top : top + rows, left : left + columns] = torch.from_numpy(values)
    return image


def _solarize(image: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the image with the values from `threshold` on inverted."""
    mask = (image >= threshold).to(torch.uint8).mul_(255)
    return image ^ mask


def _tensor(value: Any) -> torch.Tensor:
    """Return what torchvision gave, with its type."""
    assert isinstance(value, torch.Tensor)
    return value
