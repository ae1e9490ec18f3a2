"""JPEG: its header, checked before a decoder sees it, and torchvision's decoder for the plain ones."""

import contextlib
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tlcli.data.image_files import NO_MEMORY, DecodeError, ImageFacts, check_size, orientation_of

MAX_SCANS = 100  # of a JPEG: encoders write about ten, and each may cost a pass over all pixels
_PLAIN_MARKERS = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _find_operator() -> Any:
    """Return torchvision's JPEG operator, or None in a build without it."""
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None


# torch warns, once in a process, that the tensor over a bytes object must not be written to. The decoder only
# reads it: the warning is used up here. (catch_warnings at each use would not do, it is not safe in threads.)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"once", dtype=torch.uint8)
# The operator rather than torchvision.io.decode_jpeg: that wrapper warns of its deprecation on every use.
_OPERATOR = _find_operator()
HAS_OPERATOR = _OPERATOR is not None
"""Whether torchvision was built with its JPEG decoder; where it was not, Pillow decodes."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What decides how a JPEG is decoded: its first frame header, and its EXIF block (empty without one)."""

    width: int
    height: int
    components: int
    precision: int
    marker: int
    exif: bytes


def read_header(data: bytes) -> JpegHeader:
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
            check_size(width, height)
        if marker == 0xDA:
            if frame is None:
                raise DecodeError("corrupt JPEG: a scan without a frame header")
            if data.rfind(b"\xff\xd9") < position:
                raise DecodeError("truncated JPEG: the end marker is missing")
            _check_scans(data, position)
            return JpegHeader(*frame, exif=exif)
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


def is_plain(header: JpegHeader) -> bool:
    """Return whether `decode_plain` can decode a JPEG: 8 bits, grey or YCbCr, no arithmetic coding."""
    usual = header.components in (1, 3) and header.precision == 8
    return HAS_OPERATOR and usual and header.marker in _PLAIN_MARKERS


def image_facts(header: JpegHeader) -> ImageFacts:
    """Return what the header of a JPEG says."""
    from PIL.Image import Exif

    exif = Exif()
    with contextlib.suppress(Exception):  # a corrupt EXIF block is ignored
        exif.load(header.exif)
    return ImageFacts(
        format="JPEG",
        width=header.width,
        height=header.height,
        mode={1: "L", 3: "RGB", 4: "CMYK"}.get(header.components, f"{header.components} components"),
        orientation=orientation_of(exif),
    )


def decode_plain(data: bytes) -> torch.Tensor:
    """Return the RGB image of a JPEG of 8 bits and one or three components, uint8 [3, H, W].

    Raises:
        DecodeError: It is truncated or corrupt, or there is too little memory.
    """
    try:
        image: torch.Tensor = _OPERATOR(torch.frombuffer(data, dtype=torch.uint8), 3, True)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise DecodeError(NO_MEMORY) from error
        reason = str(error).splitlines()[0] if str(error) else "unknown error"
        word = "truncated" if "incomplete or truncated" in reason else "corrupt"
        raise DecodeError(f"{word} JPEG: {reason}") from error
    return image
