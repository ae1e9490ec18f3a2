"""Small image files of every supported format and variant, and the parts they are made of."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
WIDTH, HEIGHT = 20, 12


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return an image without symmetry, smooth enough for JPEG."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = np.stack([rows * 17, columns * 11, rows * 5 + columns * 5], axis=2)
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def exif_block(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker of this camera"
    return exif


# ---- PNG --------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return PNG_MAGIC + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each chunk of a sound PNG."""
    position = 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        position += size + 12


def png_header(width: int, height: int, depth: int, colour: int, interlace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


def black_png(width: int, height: int) -> bytes:
    """Return a whole, valid black-and-white PNG of any size in a small file."""
    row = bytes(1 + (width + 7) // 8)
    packer, body = zlib.compressobj(9), []
    for start in range(0, height, 1000):
        body.append(packer.compress(row * min(1000, height - start)))
    body.append(packer.flush())
    return png_file([(b"IHDR", png_header(width, height, 1, 0)), (b"IDAT", b"".join(body)), (b"IEND", b"")])


def interlaced_png(image: Image.Image) -> bytes:
    """Return an Adam7 PNG, which Pillow reads and does not write."""
    pixels = np.asarray(image.convert("RGB"))
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    body = b""
    for top, left, down, right in passes:
        part = pixels[top::down, left::right]
        if part.size:
            body += b"".join(b"\0" + row.tobytes() for row in part)
    header = png_header(image.width, image.height, 8, 2, interlace=1)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")])


# ---- JPEG -------------------------------------------------------------------------------------------------


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return marker and content of each segment before the first scan of a sound JPEG, and all from there."""
    segments, position = [], 2
    while data[position + 1] != 0xDA:
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        segments.append((data[position + 1], data[position + 4 : position + 2 + size]))
        position += 2 + size
    return segments, data[position:]


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def jpeg_file(segments: list[tuple[int, bytes]], rest: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(jpeg_segment(*segment) for segment in segments) + rest


def many_scans(data: bytes, count: int) -> bytes:
    """Return a progressive JPEG with `count` more scans: each one run of blocks that change nothing."""
    frame = data.index(b"\xff\xc2")
    height, width = struct.unpack(">HH", data[frame + 5 : frame + 9])
    blocks = -(-height // 8) * -(-width // 8)
    # One table of one code, 0: a run of 2**14 blocks and as many more as its 14 extra bits say.
    table = jpeg_segment(0xC4, bytes([0x10, 1]) + bytes(15) + bytes([0xE0]))
    bits = "".join("0" + "1" * 14 for _ in range(-(-blocks // (2**15 - 1))))
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = jpeg_segment(0xDA, bytes([1, data[frame + 10], 0x00, 1, 63, 0x00])) + body
    return data[:-2] + table + scan * count + data[-2:]


# ---- one of each ------------------------------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    """Return name -> a sound small file, for every format and variant that decodes."""
    rgb = picture()
    grey, rgba = rgb.convert("L"), rgb.convert("RGBA")
    rgba.putalpha(grey)
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette, cmyk, bits = rgb.quantize(16), rgb.convert("CMYK"), grey.convert("1")
    frames = [rgb.rotate(angle) for angle in (0, 90, 180)]
    moving = {"save_all": True, "append_images": frames[1:]}
    text = PngInfo()
    text.add_text("Comment", "word " * 40, zip=True)
    text.add_itxt("Title", "täglich", "de", "Titel")
    found = {
        "baseline.jpg": encoded(rgb, "JPEG"),
        "444.jpg": encoded(rgb, "JPEG", subsampling=0, quality=95, optimize=True),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "grey.jpg": encoded(grey, "JPEG"),
        "grey-progressive.jpg": encoded(grey, "JPEG", progressive=True),
        "cmyk.jpg": encoded(cmyk, "JPEG"),
        "cmyk-progressive.jpg": encoded(cmyk, "JPEG", progressive=True),
        "restart.jpg": encoded(picture(64, 48), "JPEG", restart_marker_blocks=2),
        "exif.jpg": encoded(rgb, "JPEG", exif=exif_block(6), icc_profile=bytes(range(200)), comment=b"hello"),
        "grey.png": encoded(grey, "PNG"),
        "rgb.png": encoded(rgb, "PNG", exif=exif_block(8), pnginfo=text, icc_profile=bytes(range(100))),
        "interlaced.png": interlaced_png(rgb),
        "rgba.png": encoded(rgba, "PNG"),
        "la.png": encoded(rgba.convert("LA"), "PNG"),
        "bits.png": encoded(bits, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=bytes([0, 90, 255])),
        "grey16.png": encoded(grey16, "PNG"),
        "moving.png": encoded(rgb, "PNG", **moving),
        "still.gif": encoded(rgb, "GIF", comment=b"a comment"),
        "moving.gif": encoded(palette, "GIF", transparency=1, loop=0, **moving),
        "rgb.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(palette, "BMP"),
        "bits.bmp": encoded(bits, "BMP"),
        "rgba.bmp": encoded(rgba, "BMP"),
        "runs.bmp": _bmp_in_runs(),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "alpha.webp": encoded(rgba, "WEBP", exif=exif_block(3)),
        "moving.webp": encoded(rgb, "WEBP", **moving),
        "bits.pbm": encoded(bits, "PPM"),
        "grey.pgm": encoded(grey, "PPM"),
        "grey16.pgm": encoded(grey16, "PPM"),
        "rgb.ppm": encoded(rgb, "PPM"),
        "odd.ppm": b"P6 4 3 100\n" + bytes(range(36)),
        "plain.pbm": b"P1\n# bits\n4 2\n0 1 0 1\n1 0 1 0\n",
        "plain.pgm": b"P2 4 2 15 # grey\n" + b"1 2 3 4 5 6 7 8\n",
        "plain.ppm": b"P3 2 2 255\n" + b"255 0 0  0 255 0  0 0 255  9 9 9\n",
        "moving.tif": encoded(rgb, "TIFF", **moving),
        "grey16.tif": encoded(grey16, "TIFF"),
        "rgba.tif": encoded(rgba, "TIFF", compression="tiff_adobe_deflate"),
        "cmyk.tif": encoded(cmyk, "TIFF", compression="tiff_lzw", exif=exif_block(5)),
        "palette.tif": encoded(palette, "TIFF", compression="packbits"),
        "big.tif": encoded(rgb, "TIFF", big_tiff=True, compression="tiff_deflate"),
    }
    for compression in ("raw", "tiff_lzw", "jpeg", "zstd", "lzma"):
        found[f"{compression}.tif"] = encoded(rgb, "TIFF", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        found[f"{compression}.tif"] = encoded(bits, "TIFF", compression=compression)
    return found


def _bmp_in_runs() -> bytes:
    """Return an 8-bit BMP compressed in runs, which Pillow reads and does not write."""
    plain = encoded(picture().quantize(16), "BMP")
    body = (
        b"".join(bytes([10, row % 16, 3, 1, 0, 4, 1, 2, 3, 4, 3, 2, 0, 0]) for row in range(HEIGHT)) + b"\0\1"
    )
    offset = int.from_bytes(plain[10:14], "little")
    head = bytearray(plain[:offset])
    head[2:6] = (offset + len(body)).to_bytes(4, "little")
    head[30:34] = (1).to_bytes(4, "little")
    head[34:38] = len(body).to_bytes(4, "little")
    return bytes(head) + body
