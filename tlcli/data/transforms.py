"""The evaluation transform: a decoded image to the network's size, as timm does it, on uint8.

timm's own transform works on Pillow images. This one has the same geometry (sizes and crop offsets are
equal) and works on the decoder's tensor, in memory order channels-last, with torch's native uint8 kernel. Its
values differ from Pillow's by one level in less than one per cent of the pixels, so `key_facts` names the
backend for the cache key. Mean and standard deviation are applied later, on the device.
"""

import math
from typing import Any

import torch
from torch.nn import functional

from tlcli.config.backbone import Interpolation, Preprocess

VERSION = 1
# Above this ratio of the sides only the middle of the image is resized. Otherwise an image of 20000x1 pixels,
# of which a square crop shows a sliver, would first become one of 5 million columns.
EXTREME_ASPECT = 16
_FILTER_MARGIN = 4


class EvalTransform:
    """Resize and crop one image for the network, without randomness.

    The modes are timm's: "center" resizes the shorter side to image_size / crop_pct (rounded down) and cuts
    out the centre; "squash" resizes both sides to that, then cuts; "border" fits the longer side and pads
    with the mean colour. Resizing is antialiased.

    Args:
        preprocess: The resolved values of the backbone.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.image_size = preprocess.image_size
        height, width = self.image_size
        self.scale_size = (
            math.floor(height / preprocess.crop_pct),
            math.floor(width / preprocess.crop_pct),
        )
        self.fill = tuple(round(255 * value) for value in preprocess.mean)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image at the network's size.

        Args:
            image: uint8 [3, H, W], RGB; any memory layout, channels-last is fastest.

        Returns:
            uint8 [3, h, w], contiguous, with (h, w) the image size.
        """
        image = self._trim_extreme(image)
        size = self.resized_size(image.shape[1], image.shape[2])
        resized = resize(image, size, self.preprocess.interpolation)
        return self._crop_or_pad(resized).contiguous()

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after the resize and before the crop, for an image of the given size."""
        target_height, target_width = self.scale_size
        if self.preprocess.crop_mode == "squash":
            return self.scale_size
        if self.preprocess.crop_mode == "center" and target_height == target_width:
            # torchvision's Resize(int): the longer side is rounded down.
            if width <= height:
                return int(target_width * height / width), target_width
            return target_height, int(target_height * width / height)
        # timm's ResizeKeepRatio: the side that decides the ratio is met exactly, the other rounded.
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.preprocess.crop_mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def key_facts(self) -> dict[str, Any]:
        """Return every value that decides the result, for the cache key; floats as `repr` strings."""
        preprocess = self.preprocess
        return {
            "version": VERSION,
            "backend": "pillow" if preprocess.interpolation == "lanczos" else "torch-uint8",
            "image_size": list(preprocess.image_size),
            "crop_pct": repr(float(preprocess.crop_pct)),
            "crop_mode": preprocess.crop_mode,
            "interpolation": preprocess.interpolation,
            "antialias": preprocess.interpolation != "nearest",
            "mean": [repr(float(value)) for value in preprocess.mean],
            "std": [repr(float(value)) for value in preprocess.std],
        }

    def _trim_extreme(self, image: torch.Tensor) -> torch.Tensor:
        """Return the middle of a very long image: what the crop shows, and the filter's reach around it."""
        _, height, width = image.shape
        if self.preprocess.crop_mode != "center" or max(height, width) <= EXTREME_ASPECT * min(height, width):
            return image
        resized = self.resized_size(height, width)
        for dimension, size in ((1, height), (2, width)):
            scale = resized[dimension - 1] / size
            # Upscaling reaches a few source pixels beyond the crop, downscaling a few result pixels.
            margin = _FILTER_MARGIN * max(1.0, 1.0 / scale)
            keep = math.ceil(self.image_size[dimension - 1] / scale + 2 * margin)
            keep += (size - keep) % 2  # an equal number is cut on both sides, so that the centre stays
            if keep < size:
                image = image.narrow(dimension, (size - keep) // 2, keep)
        return image

    def _crop_or_pad(self, image: torch.Tensor) -> torch.Tensor:
        _, height, width = image.shape
        crop_height, crop_width = self.image_size
        if height < crop_height or width < crop_width:
            image = self._pad(image, max(0, crop_height - height), max(0, crop_width - width))
            _, height, width = image.shape
        # Python's round, half to even, as torchvision does.
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
        return image[:, top : top + crop_height, left : left + crop_width]

    def _pad(self, image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        _, height, width = image.shape
        fill = self.fill if self.preprocess.crop_mode == "border" else (0, 0, 0)
        padded = torch.empty((3, height + rows, width + columns), dtype=torch.uint8)
        padded[:] = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
        padded[:, rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width] = image
        return padded


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """Return the image resized, antialiased unless `interpolation` is "nearest".

    Args:
        image: uint8 [3, H, W]; any memory layout, channels-last is fastest.
        size: Height and width of the result.
        interpolation: nearest, bilinear, bicubic or lanczos.

    Returns:
        uint8 [3, *size]; the image itself where it has that size already.
    """
    if (image.shape[1], image.shape[2]) == size:
        return image
    if interpolation == "lanczos":
        return _resize_by_pillow(image, size)
    batch = image.unsqueeze(0)
    if interpolation == "nearest":  # as Pillow counts: the pixel under the centre
        return functional.interpolate(batch, size, mode="nearest-exact")[0]
    return functional.interpolate(batch, size, mode=interpolation, antialias=True, align_corners=False)[0]


def _resize_by_pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize with Lanczos, which torch does not have."""
    import numpy as np
    from PIL import Image

    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = pixels.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
