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

import contextlib
import functools
import importlib
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; also where Pillow begins to warn
MAX_SIDE = 65_535  # what a JPEG can have; Pillow's time grows with the square of a row's bytes
MAX_RUN_LENGTH_PIXELS = 2**24  # of a BMP in runs, which Pillow decodes in Python, a pixel at a time
MAX_SCANS = 100  # of a JPEG: encoders write about ten, and each may cost a pass over all pixels
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
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_REFUSED = (
    (b"version https://git-lfs", "git-LFS pointer, not the image itself (git lfs pull fetches it)"),
    (b"%!PS", "PostScript, a format that is not supported"),
    (b"\xc5\xd0\xd3\xc6", "PostScript, a format that is not supported"),
    (b"%PDF", "PDF, a format that is not supported"),
    (b"8BPS", "Photoshop document, a format that is not supported"),
    (b"SIMPLE  =", "FITS, a format that is not supported"),
    (b"DDS ", "DDS, a format that is not supported"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000, a format that is not supported"),
    (b"\xff\x4f\xff\x51", "JPEG 2000, a format that is not supported"),
    (b"\xff\x0a", "JPEG XL, a format that is not supported"),
    (b"\0\0\0\x0cJXL ", "JPEG XL, a format that is not supported"),
    (b"\0\0\x01\0", "Windows icon, a format that is not supported"),
    (b"PK\x03\x04", "ZIP archive, not an image"),
    (b"\x1f\x8b", "gzip archive, not an image"),
)
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_PPM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")
_NO_MEMORY = "too little memory to decode it"
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_PNG_END = b"IEND\xaeB`\x82"

# torch warns, once in a process, that the tensor over a bytes object must not be written to. The decoder only
# reads it: the warning is used up here. (catch_warnings at each use would not do, it is not safe in threads.)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"once", dtype=torch.uint8)
# What Pillow warns of, a corrupt EXIF block above all, is ignored by policy or refused.
warnings.filterwarnings("ignore", module="PIL")


def _find_jpeg_operator() -> Any:
    """Return torchvision's JPEG operator, or None in a build without it."""
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None


# The operator rather than torchvision.io.decode_jpeg: that wrapper warns of its deprecation on every use.
_DECODE_JPEG = _find_jpeg_operator()

POLICY: dict[str, str | int] = {
    "version": 1,
    "jpeg": "torchvision" if _DECODE_JPEG is not None else "pillow",
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


class DecodeError(Exception):
    """An image cannot be used; always caught, and turned into a BadImage.

    Args:
        reason: Why, in a few words without the file's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class BadImage:
    """An image that was skipped.

    Attributes:
        name: As shown to the user, relative to the data folder.
        path: To open it.
        reason: Why it was skipped.
    """

    name: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image's header says.

    Attributes:
        format: JPEG, PNG, GIF, BMP, WEBP, TIFF or PPM, by content.
        width: In pixels, as stored (before EXIF orientation).
        height: In pixels, as stored.
        mode: Pillow's name of the pixel layout: L, RGB, CMYK, P, RGBA, I;16, ...
        animated: Whether there are more frames or pages than the one that is used.
        alpha: Whether the image can be transparent.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
    """

    format: str
    width: int
    height: int
    mode: str
    animated: bool = False
    alpha: bool = False
    orientation: int = 1


@dataclass(frozen=True, slots=True)
class _JpegHeader:
    """What decides how a JPEG is decoded: its first frame header, and its EXIF block (empty without one)."""

    width: int
    height: int
    components: int
    precision: int
    marker: int
    exif: bytes


def read_bytes(path: str) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file; bytes that are no UTF-8 come as surrogate escapes.

    Raises:
        DecodeError: It is missing, empty, unreadable, too large, a git-LFS pointer or no regular file.
    """
    try:
        _check_regular(os.stat(path))
        # A file can be exchanged for a FIFO between the two calls: never wait on opening one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as stream:
            _check_regular(os.fstat(descriptor))
            data = stream.read()
    except FileNotFoundError:
        raise DecodeError("file not found") from None
    except PermissionError:
        raise DecodeError("permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DecodeError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise DecodeError("empty file")
    if data.startswith(b"version https://git-lfs"):
        raise DecodeError(_REFUSED[0][1])
    return data


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
    if name == "JPEG":
        header = _read_jpeg_header(data)
        if (
            _DECODE_JPEG is not None
            and header.components in (1, 3)
            and header.precision == 8
            and header.marker in (_BASELINE, _EXTENDED, _PROGRESSIVE)
        ):
            return _decode_by_torchvision(data)
    return _decode_by_pillow(name, data)


def inspect(data: bytes) -> ImageFacts:
    """Return what the header of an image says, without decoding its pixels.

    Raises:
        DecodeError: As for `decode`, as far as the header shows it.
    """
    name = sniff(data)
    if name == "JPEG":
        return _jpeg_facts(_read_jpeg_header(data))
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
        orientation=_orientation(_exif(image)),
    )


def sniff(data: bytes) -> str:
    """Return the format of an image file by its first bytes.

    Raises:
        DecodeError: It is not one of the supported formats; the reason names what it is where it is known.
    """
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n#" and len(data) > 2:
        return "PPM"
    if not data:
        raise DecodeError("empty file")
    for magic, reason in _REFUSED:
        if data.startswith(magic):
            raise DecodeError(reason)
    if data[4:8] == b"ftyp":
        kind = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC or another video container"
        raise DecodeError(f"{kind}, a format that is not supported")
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        raise DecodeError("SVG, a format that is not supported")
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        raise DecodeError("an HTML page, not an image (a failed download?)")
    if not any(data[:1024]):
        raise DecodeError("not an image: the file begins with zeros (a failed download or copy?)")
    raise DecodeError("not an image of a supported format")


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError("folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise DecodeError(f"{status.st_size:,} bytes, more than the {MAX_FILE_BYTES:,} an image may have")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError(f"{width}x{height} pixels: an empty image")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than the {MAX_PIXELS:,} an image may have")
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"{width}x{height} pixels, more than the {MAX_SIDE:,} a side may have")


def _read_jpeg_header(data: bytes) -> _JpegHeader:
    """Return the frame header of a JPEG, having checked its size and that the stream ends where it says.

    Walks the segments before the first scan (about ten, some microseconds). Within a scan 0xFFD9 can only be
    the end marker, so that its absence after the scan's start means a truncated file; anything after it
    (padding, a second picture of a phone) is allowed.
    """
    frame: tuple[int, int, int, int, int] | None = None
    exif = b""
    position, length = 2, len(data)
    while position + 4 <= length:
        if data[position] != 0xFF:
            raise DecodeError("corrupt JPEG: no marker where one must be")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
            continue
        if marker == 0xD9:
            break
        size = data[position + 2] << 8 | data[position + 3]
        if marker < 0xC0 or size < 2:  # decoders resume elsewhere, where another frame header may wait
            raise DecodeError("corrupt JPEG: no segment where one must be")
        if marker in _FRAME_MARKERS and frame is None and position + 10 <= length:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            frame = (width, height, components, precision, marker)
            _check_size(width, height)
        if marker == 0xDA:
            if frame is None:
                raise DecodeError("corrupt JPEG: a scan without a frame header")
            if data.rfind(b"\xff\xd9") < position:
                raise DecodeError("truncated JPEG: the end marker is missing")
            _check_scans(data, position)
            return _JpegHeader(*frame, exif=exif)
        if marker == 0xE1 and not exif and data[position + 4 : position + 10] == b"Exif\0\0":
            exif = data[position + 4 : position + 2 + size]
        position += 2 + size
    raise DecodeError("truncated JPEG: it ends before the image begins")


def _check_scans(data: bytes, position: int) -> None:
    """Refuse a JPEG of very many scans; the first begins at `position`."""
    # The bytes may also stand in what follows the image: only when there are many is it worth a real count.
    if data.count(b"\xff\xda", position) <= MAX_SCANS:
        return
    count = 0
    while found := _MARKER_IN_SCAN.search(data, position):
        position, marker = found.start(), data[found.start() + 1]
        if marker == 0xD9:
            return
        count += marker == 0xDA
        if count > MAX_SCANS:
            raise DecodeError(f"a JPEG of more than the {MAX_SCANS} scans that one may have")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _check_webp(data: bytes) -> None:
    """Refuse a WebP that ends early or is too large; libwebp takes memory for it when it is opened."""
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise DecodeError("truncated WEBP: shorter than its header says")
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        _check_size(1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little"))
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        _check_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 6)
        _check_size(width & 0x3FFF, height & 0x3FFF)


def _jpeg_facts(header: _JpegHeader) -> ImageFacts:
    from PIL.Image import Exif

    exif = Exif()
    with contextlib.suppress(Exception):  # a corrupt EXIF block is ignored
        exif.load(header.exif)
    return ImageFacts(
        format="JPEG",
        width=header.width,
        height=header.height,
        mode={1: "L", 3: "RGB", 4: "CMYK"}.get(header.components, f"{header.components} components"),
        orientation=_orientation(exif),
    )


def _decode_by_torchvision(data: bytes) -> torch.Tensor:
    try:
        image: torch.Tensor = _DECODE_JPEG(torch.frombuffer(data, dtype=torch.uint8), 3, True)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise DecodeError(_NO_MEMORY) from error
        reason = str(error).splitlines()[0] if str(error) else "unknown error"
        word = "truncated" if "incomplete or truncated" in reason else "corrupt"
        raise DecodeError(f"{word} JPEG: {reason}") from error
    return image


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
        raise DecodeError(_NO_MEMORY) from error
    except Exception as error:  # decoders raise anything on damaged files
        raise DecodeError(f"corrupt {name} header: {_brief(error)}") from error
    _check_size(image.width, image.height)
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
        raise DecodeError(_NO_MEMORY) from error
    except Exception as error:  # decoders raise anything on damaged files
        word = "truncated" if "truncated" in str(error) else "corrupt"
        raise DecodeError(f"{word} {name}: {_brief(error)}") from error
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
    }.get(_orientation(_exif(image)))
    return image if method is None else image.transpose(method)


def _exif(image: "Image") -> Mapping[int, Any]:
    try:
        return image.getexif()
    except Exception:  # a corrupt EXIF block is ignored
        return {}


def _orientation(exif: Mapping[int, Any]) -> int:
    try:
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # tags are parsed when they are asked for
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
