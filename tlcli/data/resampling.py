"""Where a view's pixels come from: the window of the source that is shown, and its resampling in one step.

A window is a box in the source's pixel coordinates (edges, not centres; it may reach beyond the image). Plain
crops are cut out and resized with the antialiased uint8 kernel of the evaluation transform. Rotation, shear
and warp need a lookup per pixel: one bicubic `grid_sample` of the part that is shown, after an antialiased
downscale where the source is much finer than the result.

Beyond the image's edge the image is reflected: no artificial edge, and neither a colour nor a texture that
evaluation never shows. (A black or grey corner is easily learnt; it marks an image as a training image.) The
crop mode "border" is the exception, since evaluation itself pads with the mean colour there.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from tlcli.data.transforms import EvalTransform, resize

# Source pixels per result pixel above which the source is downscaled before the lookup, and to which. At 1
# the result is 5 % less sharp than one antialiased resize, at 1.5 it aliases; here it is as sharp.
MAX_DENSITY = 1.1
WARP_KNOTS = 5  # the warp's field is random on this grid: shifts differ over a fifth of the side
_REACH = 2  # source pixels on either side that bicubic interpolation reads
_KNOT_SPREAD = 0.864  # standard deviation of what is interpolated between knots of standard deviation 1


class Window(NamedTuple):
    """A box in the source, in its pixels."""

    left: float
    top: float
    width: float
    height: float


def evaluation_window(transform: EvalTransform, height: int, width: int) -> Window:
    """Return what the evaluation transform shows of an image of this size; "border" reaches beyond it."""
    resized_height, resized_width = transform.resized_size(height, width)
    crop_height, crop_width = transform.image_size
    top, left = round((resized_height - crop_height) / 2), round((resized_width - crop_width) / 2)
    down, across = height / resized_height, width / resized_width
    return Window(left * across, top * down, crop_width * across, crop_height * down)


def cut_and_resize(image: torch.Tensor, window: Window, transform: EvalTransform) -> torch.Tensor:
    """Return the window, rounded to whole pixels, at the network's size.

    Args:
        image: uint8 [3, H, W].
        window: What to show.
        transform: Size, interpolation and fill.

    Returns:
        uint8 [3, h, w].
    """
    left, top = round(window.left), round(window.top)
    width, height = max(1, round(window.width)), max(1, round(window.height))
    cut = _cut(image, (top, height), (left, width), transform)
    return resize(cut, transform.image_size, transform.preprocess.interpolation)


def look_up(
    image: torch.Tensor,
    window: Window,
    matrix: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    shifts: torch.Tensor | None,
    transform: EvalTransform,
) -> torch.Tensor:
    """Return the window, rotated, sheared, shifted and warped, at the network's size, in one resampling.

    Args:
        image: uint8 [3, H, W].
        window: What would be shown without the rest.
        matrix: float64 [3, 3], from a position in the result to the position it is taken from; both in the
            result's pixels, from its centre.
        shifts: float32 [2, h, w], added to the position it is taken from, x then y, in the result's pixels.
        transform: Size, interpolation and fill.

    Returns:
        uint8 [3, h, w].
    """
    height, width = transform.image_size
    density = window.width / width, window.height / height
    centre = window.left + window.width / 2, window.top + window.height / 2
    reach = (0.0, 0.0) if shifts is None else tuple(shifts.abs().amax(dim=(1, 2)).tolist())
    spans = [
        _span(matrix[axis], (width, height), centre[axis], density[axis], reach[axis]) for axis in (0, 1)
    ]
    part = _cut(image, spans[1], spans[0], transform)
    grid = torch.empty(1, height, width, 2)
    xs, ys = _centred(width), _centred(height).unsqueeze(1)
    for axis, (start, length) in enumerate(spans):
        # grid_sample counts from -1 to 1 over the part.
        scale = 2 * density[axis] / length
        offset = 2 * (centre[axis] - start) / length - 1
        row = matrix[axis] * scale
        # Plain products and sums, each rounded by itself: no processor may contract them differently.
        position = xs * float(row[0]) + ys * float(row[1])
        if shifts is not None:
            position += shifts[axis] * scale
        torch.add(position, float(row[2] + offset), out=grid[0, :, :, axis])
    return _sample(_downscaled(part, density, transform), grid, transform)


def warp_shifts(knots: torch.Tensor, size: tuple[int, int], strength: float) -> torch.Tensor:
    """Return the smooth random shifts of a local elastic warp (after Simard et al. 2003).

    Simard smooths noise of every pixel with a Gaussian; bicubic interpolation between a few random knots
    gives the same kind of field for a hundredth of the work.

    Args:
        knots: float32 [2, WARP_KNOTS, WARP_KNOTS], standard normal.
        size: Height and width of the result.
        strength: Standard deviation of the shift, in share of the side.

    Returns:
        float32 [2, h, w], x then y, in pixels.
    """
    height, width = size
    # With antialias, which changes nothing when upscaling, torch takes its separable kernel, thrice as fast.
    field = functional.interpolate(knots.unsqueeze(0), size, mode="bicubic", antialias=True)[0]
    return field * torch.tensor([width, height])[:, None, None] * (strength / _KNOT_SPREAD)


def _cut(
    image: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int], transform: EvalTransform
) -> torch.Tensor:
    """Return the box of (start, length) rows and columns; outside the image its reflection, or the fill."""
    pixels = image.permute(1, 2, 0)  # as the decoders lay it out, which the resize is fastest on
    for dimension, (start, length) in enumerate((rows, columns)):
        size = pixels.shape[dimension]
        if start >= 0 and start + length <= size:
            pixels = pixels.narrow(dimension, start, length)
        elif transform.preprocess.crop_mode == "border":
            pixels = _filled(pixels, dimension, start, length, transform.fill)
        else:
            pixels = pixels.index_select(dimension, _reflected(start, length, size))
    return pixels.permute(2, 0, 1)


def _reflected(start: int, length: int, size: int) -> torch.Tensor:
    """Return int64 [length]: the pixels start, start + 1, ..., with the image mirrored at its edges."""
    position = torch.arange(start, start + length) % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def _filled(
    pixels: torch.Tensor, dimension: int, start: int, length: int, fill: tuple[int, ...]
) -> torch.Tensor:
    size = pixels.shape[dimension]
    shape = [*pixels.shape]
    shape[dimension] = length
    result = torch.tensor(fill, dtype=torch.uint8).repeat(*shape[:2], 1)
    first, last = max(0, start), min(size, start + length)
    if first < last:
        inside = pixels.narrow(dimension, first, last - first)
        result.narrow(dimension, first - start, last - first).copy_(inside)
    return result


def _centred(length: int) -> torch.Tensor:
    """Return float32 [length]: the pixels' centres, counted from the middle of the side."""
    return torch.arange(length, dtype=torch.float32) - (length - 1) / 2


def _span(
    row: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    size: tuple[int, int],
    centre: float,
    density: float,
    reach: float,
) -> tuple[int, int]:
    """Return (start, length) of the source's pixels that one axis of the lookup reads."""
    half = (abs(row[0]) * size[0] + abs(row[1]) * size[1]) / 2 + reach
    middle = centre + row[2] * density
    margin = half * density + _REACH * max(1.0, density)
    start, end = math.floor(middle - margin), math.ceil(middle + margin)
    return start, end - start


def _downscaled(part: torch.Tensor, density: tuple[float, float], transform: EvalTransform) -> torch.Tensor:
    """Return the part with at most about MAX_DENSITY pixels for one of the result."""
    interpolation = transform.preprocess.interpolation
    if interpolation == "nearest" or max(density) <= MAX_DENSITY:
        return part
    width, height = (
        max(1, round(part.shape[2 - axis] * min(1.0, MAX_DENSITY / density[axis]))) for axis in (0, 1)
    )
    return resize(part, (height, width), interpolation)


def _sample(part: torch.Tensor, grid: torch.Tensor, transform: EvalTransform) -> torch.Tensor:
    interpolation = transform.preprocess.interpolation
    mode = interpolation if interpolation in {"nearest", "bilinear"} else "bicubic"
    pixels = part.unsqueeze(0).float().contiguous()
    # The part holds every pixel that is asked for, so that the cheapest padding does.
    result = functional.grid_sample(pixels, grid, mode, "border", align_corners=False)
    return result[0].round_().clamp_(0, 255).to(torch.uint8)
