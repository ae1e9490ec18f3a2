"""From a file's bytes to an RGB image, safely and by one stated policy.

Nothing here trusts a file: only regular files of at most MAX_FILE_BYTES are read, the format is told by the
first bytes and must be on a short list, the size is refused by the header before any pixel is allocated, and
a file that ends early is refused although most decoders would fill the rest with grey. Small files that would
keep a decoder busy for minutes are refused too. What is done with unusual but valid images is POLICY, which
belongs to the cache key:

- EXIF orientation is applied; a corrupt EXIF block is ignored, and so are ICC profiles.
- CMYK (Adobe's inverted kind too) and YCbCr are converted to RGB; 16-bit grey is scaled, never clipped.
- Transparency is composited on white.
- Of an animation or a file with several pages the first one is taken.
- Float and 32-bit samples are refused: the format does not say which range they have.

Plain JPEGs go through torchvision, which decodes about twice as fast as Pillow; the rest goes through Pillow.
Every function may be called from many threads at once; both decoders release the GIL.
"""

import functools
import importlib
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tlcli.data.image_files import (
    MAX_PIXELS,
    NO_MEMORY,
    DecodeError,
    ImageFacts,
    brief,
    check_size,
    orientation_of,
    sniff,
)
from tlcli.data.jpeg import HAS_OPERATOR, decode_plain, image_facts, is_plain, read_header

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_RUN_LENGTH_PIXELS = 2**24  # of a BMP in runs, which Pillow decodes in Python, a pixel at a time
BACKGROUND = 255
_BAND_PIXELS = 2**22

_FORMATS = {
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "WEBP": ("WebPImagePlugin", "WebPImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
    "PPM": ("PpmImagePlugin", "PpmImageFile"),
}
_PPM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")
_BITS_PER_SAMPLE_TAG = 258
_PNG_END = b"IEND\xaeB`\x82"

# What Pillow warns of, a corrupt EXIF block above all, is ignored by policy or refused.
warnings.filterwarnings("ignore", module="PIL")

POLICY: dict[str, str | int] = {
    "version": 1,
    "jpeg": "torchvision" if HAS_OPERATOR else "pillow",
    "other": "pillow",
    "orientation": "exif",
    "alpha": "white",
    "grey16": "scaled",
    "cmyk": "pillow",
    "icc": "ignored",
    "frame": 0,
    "float": "refused",
    "truncated": "refused",
    "max_pixels": MAX_PIXELS,
}


def decode(data: bytes) -> torch.Tensor:
    """Return the RGB image in `data`, by POLICY.

    Args:
        data: A whole image file.

    Returns:
        uint8 [3, H, W] in RGB order, H and W at least 1. The memory may be laid out channels-last, as the
        decoders give it (that is also the layout the resize is fastest on).

    Raises:
        DecodeError: The bytes are not an image of a supported format, are truncated or corrupt, or the
            image has more than MAX_PIXELS pixels.
    """
    name = sniff(data)
    if name == "JPEG" and is_plain(read_header(data)):
        return decode_plain(data)
    return _decode_by_pillow(name, data)


def inspect(data: bytes) -> ImageFacts:
    """Return what the header of an image says, without decoding its pixels.

    Raises:
        DecodeError: As for `decode`, as far as the header shows it.
    """
    name = sniff(data)
    if name == "JPEG":
        return image_facts(read_header(data))
    image = _open(name, data)
    try:  # not n_frames: counting those of a long file can take minutes
        animated = bool(getattr(image, "is_animated", False))
    except Exception:  # the second frame is damaged; decoding the first one may still work
        animated = True
    return ImageFacts(
        format=name,
        width=image.width,
        height=image.height,
        mode=image.mode,
        animated=animated,
        alpha=_has_alpha(image),
        orientation=orientation_of(_exif(image)),
    )


def _check_webp(data: bytes) -> None:
    """Refuse a WebP that ends early or is too large; libwebp takes memory for it when it is opened."""
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise DecodeError("truncated WEBP: shorter than its header says")
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        check_size(1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little"))
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        check_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 6)
        check_size(width & 0x3FFF, height & 0x3FFF)


@functools.cache
def _image_file(name: str) -> Any:
    """Return Pillow's class for a format.

    The class is used directly instead of Image.open: no other format can get in, and Pillow's own size check,
    which warns where we refuse, is not passed.
    """
    module, attribute = _FORMATS[name]
    return getattr(importlib.import_module(f"PIL.{module}"), attribute)


def _open(name: str, data: bytes) -> "Image":
    if name == "PNG":
        _check_png(data)
    elif name == "WEBP":
        _check_webp(data)
    elif name == "PPM" and data[1:2] in b"123":
        data = _PPM_COMMENT.sub(b"", data)  # Pillow's time grows with the square of their number
    try:
        image: Image = _image_file(name)(BytesIO(data))
    except MemoryError as error:
        raise DecodeError(NO_MEMORY) from error
    except Exception as error:  # decoders raise anything on damaged files
        raise DecodeError(f"corrupt {name} header: {brief(error)}") from error
    check_size(image.width, image.height)
    in_runs = any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ()))
    if in_runs and image.width * image.height > MAX_RUN_LENGTH_PIXELS:
        raise DecodeError(f"{image.width}x{image.height} pixels, too many for a run-length encoded BMP")
    return image


def _decode_by_pillow(name: str, data: bytes) -> torch.Tensor:
    image = _open(name, data)
    _check_samples(image, name)
    try:
        image.load()
        image = _upright(image)
        array = _to_rgb(image)
    except DecodeError:
        raise
    except MemoryError as error:
        raise DecodeError(NO_MEMORY) from error
    except Exception as error:  # decoders raise anything on damaged files
        word = "truncated" if "truncated" in str(error) else "corrupt"
        raise DecodeError(f"{word} {name}: {brief(error)}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _check_png(data: bytes) -> None:
    """Refuse a PNG that ends early or has a wrong checksum; Pillow checks neither in the pixel data."""
    if data.rfind(_PNG_END) < 0:
        raise DecodeError("truncated PNG: the end chunk is missing")
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        size = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + size
        if end + 4 > len(data):
            raise DecodeError("truncated PNG: a chunk is shorter than its header says")
        kind = bytes(view[position + 4 : position + 8])
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise DecodeError(f"corrupt PNG: wrong checksum of chunk {kind.decode('latin-1')!r}")
        if kind == b"IEND":
            return
        position = end + 4


def _check_samples(image: "Image", name: str) -> None:
    """Refuse samples whose range is not known."""
    if image.mode.startswith("F"):
        raise DecodeError("float samples, whose range the format does not say (convert it to 8 bit)")
    # A 16-bit PNG or PPM is mode I in some versions of Pillow, with the range 0..65535.
    if image.mode.startswith("I") and not image.mode.startswith("I;16") and name not in ("PNG", "PPM"):
        raise DecodeError("32-bit samples, whose range the format does not say (convert it to 8 bit)")


def _upright(image: "Image") -> "Image":
    """Return the image with its EXIF orientation applied."""
    from PIL.Image import Transpose

    method = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation_of(_exif(image)))
    return image if method is None else image.transpose(method)


def _exif(image: "Image") -> Mapping[int, Any]:
    try:
        return image.getexif()
    except Exception:  # a corrupt EXIF block is ignored
        return {}


def _has_alpha(image: "Image") -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _to_rgb(image: "Image") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return a loaded image as a writable, contiguous uint8 array [H, W, 3].

    In bands: Pillow makes a copy for each step, of all that it is given.
    """
    height = max(1, _BAND_PIXELS // image.width)
    if height >= image.height:
        return _band_to_rgb(image)
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        array[top:bottom] = _band_to_rgb(image.crop((0, top, image.width, bottom)))
    return array


def _band_to_rgb(image: "Image") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if _has_alpha(image):
        from PIL import Image as pillow

        layers = image.convert("RGBA")
        canvas = pillow.new("RGBA", image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        image = pillow.alpha_composite(canvas, layers)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def _grey16_to_rgb(image: "Image") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Scale 16-bit (or, in TIFF, 12-bit) grey to 8 bit, rounding to nearest."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE_TAG, 16)
    highest = 4095 if bits in (12, (12,)) else 65535
    values = np.asarray(image).astype(np.uint32).clip(0, highest)
    grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(grey[:, :, None], (*grey.shape, 3)))
