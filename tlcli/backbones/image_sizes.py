"""Image sizes that a network takes, and what it looks at: advice that was tried before it is given."""

import time
from collections.abc import Callable

import torch

from tlcli.backbones.backbone import Backbone
from tlcli.backbones.initialise import varied
from tlcli.errors import BackboneError

STEPS = (32, 16, 14, 28, 56, 64, 7 * 32)  # what patches, windows and strides multiply to, in pixels
MAX_TRIES = 8
TRY_SECONDS = 10.0  # of processor time
LOOKS = 4  # images; of one, a pooling layer may pass over the last rows


class ImageSizeError(BackboneError):
    """A network does not take images of a size."""


def size_advice(
    wanted: tuple[int, int] | None, takes: Callable[[tuple[int, int] | None], bool]
) -> str | None:
    """Return a hint that names the nearest size that was tried and works; None where none does.

    Args:
        wanted: Height and width that do not work, in pixels; None for the network's own.
        takes: Tells whether a size works; None is the network's own.
    """
    if wanted is None:
        return None
    started = time.process_time()
    for size in _near(wanted)[:MAX_TRIES]:
        if time.process_time() - started > TRY_SECONDS:
            break
        if takes(size):
            return f"--image-size {_text(size)} works."
    return "Leave --image-size out: its own size works." if takes(None) else None


def _near(wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """Return sizes near the one wanted, the nearest first."""
    sides = [
        sorted({max(step, round_to(side, step)) for step in STEPS for round_to in (_floor, _ceiling)})
        for side in wanted
    ]
    if wanted[0] == wanted[1]:
        found = {(side, side) for side in sides[0]}
    else:
        found = {(height, width) for height in sides[0] for width in sides[1]}
        found |= {(side, side) for pair in sides for side in pair}
    found.discard(wanted)
    return sorted(found, key=lambda size: (abs(size[0] - wanted[0]) + abs(size[1] - wanted[1]), size))


def _floor(side: int, step: int) -> int:
    return side // step * step


def _ceiling(side: int, step: int) -> int:
    return -(-side // step) * step


def uncovered(backbone: Backbone, takes: Callable[[tuple[int, int] | None], bool]) -> str | None:
    """Return a note where the network never looks at the last rows or columns of its images, else None.

    Measured: what it looks at changes what it gives, and has a gradient.

    Args:
        backbone: Loaded, its model in eval mode.
        takes: As for `size_advice`; sizes are only advised where it says yes.
    """
    height, width = backbone.preprocess.image_size
    model = varied(backbone.model).eval()  # residual branches that begin at zero look at nothing
    draw = torch.Generator().manual_seed(0)
    images = torch.randn((LOOKS, 3, height, width), generator=draw)
    lower, right = images.clone(), images.clone()
    lower[..., -1, :] *= -10.0
    right[..., :, -1] *= -10.0
    with torch.no_grad():
        before = model(images)
        if not any(torch.equal(model(changed), before) for changed in (lower, right)):
            return None
    images.requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
    seen = gradient.abs().sum((0, 1)) > 0
    if not seen[height // 2 :, width // 2 :].any():  # nothing that a patch explains
        return None
    rows, columns = (int(seen.any(1 - side).nonzero().max()) + 1 for side in (0, 1))
    sizes = [(rows, columns)]
    if step := _patch(backbone, height - rows):
        sizes.append((_ceiling(height, step), _ceiling(width, step)))
    advised = " or ".join(_text(size) for size in sizes if takes(size))
    note = (
        f"the backbone looks at {rows}x{columns} pixels of images of {height}x{width}: the last rows or "
        "columns lie outside its patches"
    )
    return f"{note}; with --image-size {advised} it looks at everything" if advised else note


def _text(size: tuple[int, int]) -> str:
    """Return a size as --image-size takes it."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _patch(backbone: Backbone, left: int) -> int | None:
    """Return the side of a vision transformer's patches where they explain the rows left out."""
    size = getattr(getattr(backbone.model, "patch_embed", None), "patch_size", None)
    side = size[0] if isinstance(size, tuple) and size else size
    return side if isinstance(side, int) and left == backbone.preprocess.image_size[0] % side else None
