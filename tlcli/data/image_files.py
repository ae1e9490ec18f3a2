"""What an image file is: its bytes, its format by the first of them, its limits, and why it is refused.

Nothing here trusts a file: only regular files of at most MAX_FILE_BYTES are read, the format must be on a
short list, and sizes are refused before any pixel is allocated.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; also where Pillow begins to warn
MAX_SIDE = 65_535  # what a JPEG can have; Pillow's time grows with the square of a row's bytes
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
NO_MEMORY = "too little memory to decode it"
_ORIENTATION_TAG = 0x0112


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


def check_size(width: int, height: int) -> None:
    """Refuse an image by the size that its header names.

    Raises:
        DecodeError: It is empty or too large.
    """
    if width < 1 or height < 1:
        raise DecodeError(f"{width}x{height} pixels: an empty image")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels, more than the {MAX_PIXELS:,} an image may have")
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"{width}x{height} pixels, more than the {MAX_SIDE:,} a side may have")


def orientation_of(exif: Mapping[int, Any]) -> int:
    """Return the orientation, 1 to 8, that an EXIF block names; 1 where it names none."""
    try:
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # tags are parsed when they are asked for
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def brief(error: Exception) -> str:
    """Return the message of an error in one short line."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
