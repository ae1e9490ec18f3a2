"""Decoding: what is accepted gives the right pixels, what is not is refused with a reason that helps."""

import contextlib
import io
import os
import stat
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tlcli.data import decode as decoding
from tlcli.data import image_files, jpeg
from tlcli.data.decode import decode, inspect
from tlcli.data.image_files import _MAGIC, MAX_FILE_BYTES, MAX_SIDE, DecodeError, read_bytes
from tlcli.data.jpeg import MAX_SCANS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")

WIDTH, HEIGHT = 48, 32


def picture() -> Image.Image:
    """Return an image without symmetry, smooth enough for JPEG."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = np.stack([rows * 7, columns * 5, rows * 2 + columns * 2], axis=2)
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def reason(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data)
    return caught.value.reason


def png(width: int, height: int) -> bytes:
    """Return a small file that claims a black-and-white image of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# ---- what is accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode(encoded(picture(), format, **options))
    assert image.dtype == torch.uint8
    assert torch.equal(image, pixels(picture()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_what_pillow_gives(options: dict[str, Any]) -> None:
    data = encoded(picture(), "JPEG", **options)
    assert torch.equal(decode(data), pixels(Image.open(io.BytesIO(data))))


def test_grey_jpeg_becomes_three_equal_channels() -> None:
    image = decode(encoded(picture().convert("L"), "JPEG"))
    assert image.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_by_both_decoders(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture(), format, exif=exif, **options)
    expected = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert torch.equal(decode(data), expected)
    assert torch.equal(decoding._decode_by_pillow(format, data), expected)
    assert inspect(data).orientation == orientation


def test_corrupt_exif_is_ignored() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(), format, exif=b"Exif\0\0II*\0" + b"\xff" * 50)
        assert decode(data).shape == (3, HEIGHT, WIDTH)
        assert inspect(data).orientation == 1


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(format: str) -> None:
    # Pillow writes JPEGs of the Adobe kind, in which the four channels are inverted.
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format))
    assert red[:, 4, 4].tolist() == [255, 0, 0]
    assert inspect(encoded(Image.new("CMYK", (8, 8)), format)).mode == "CMYK"


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    image = decode(encoded(Image.fromarray(values), format))
    assert image[0].flatten().tolist() == list(range(256))
    assert torch.equal(image[0], image[1])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("LA", (0, 0), [255, 255, 255]),
        ("LA", (10, 255), [10, 10, 10]),
    ],
)
def test_transparency_shows_white(mode: str, colour: tuple[int, ...], expected: list[int]) -> None:
    data = encoded(Image.new(mode, (8, 8), colour), "PNG")
    assert decode(data)[:, 0, 0].tolist() == expected
    assert inspect(data).alpha


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_a_large_image_converted_in_bands_is_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture()
    image.putalpha(picture().convert("L").rotate(180))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 200)
    elif mode == "P":
        image = picture().quantize(16)
    elif mode != "RGBA":
        image = image.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = decode(data)
    for pixels_at_once in (1, WIDTH * 5, WIDTH * HEIGHT - 1):
        monkeypatch.setattr(decoding, "_BAND_PIXELS", pixels_at_once)
        assert torch.equal(decode(data), whole)


def test_half_transparency_is_mixed_and_a_transparent_palette_colour_is_white() -> None:
    mixed = decode(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert mixed[0, 0, 0].item() == pytest.approx(127, abs=1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert decode(encoded(palette, "PNG"))[:, 0, 0].tolist() == [200, 10, 10]
    assert decode(encoded(palette, "PNG", transparency=1))[:, 0, 0].tolist() == [255, 255, 255]
    assert decode(encoded(palette, "GIF", transparency=1))[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_they_are_told(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data)[:, 4, 4].tolist() == [255, 0, 0]
    assert inspect(data).animated
    assert not inspect(encoded(frames[0], format)).animated


def test_black_and_white_and_one_pixel_images() -> None:
    assert decode(encoded(Image.new("1", (3, 5), 1), "PNG")).unique().tolist() == [255]
    assert decode(encoded(Image.new("RGB", (1, 1)), "PNG")).shape == (3, 1, 1)
    assert decode(encoded(Image.new("RGB", (2000, 1)), "JPEG")).shape == (3, 1, 2000)


def test_the_format_is_told_by_content() -> None:
    facts = inspect(encoded(picture(), "PNG"))
    assert (facts.format, facts.width, facts.height, facts.mode) == ("PNG", WIDTH, HEIGHT, "RGB")
    assert (facts.animated, facts.alpha) == (False, False)
    assert inspect(encoded(picture().convert("L"), "JPEG")).mode == "L"


def test_what_follows_the_end_of_an_image_is_allowed() -> None:
    for format in ("JPEG", "PNG"):
        data = encoded(picture(), format)
        assert torch.equal(decode(data + b"\0" * 1000), decode(data))
        assert torch.equal(decode(data + encoded(picture(), "JPEG")), decode(data))


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_truncated_file_is_refused(format: str, share: float) -> None:
    image = picture().resize((200, 150))
    data = encoded(image, format)
    assert any(word in reason(data[: int(share * len(data))]) for word in ("truncated", "corrupt"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_file_without_its_last_byte_is_truncated(format: str) -> None:
    assert "truncated" in reason(encoded(picture(), format)[:-1])


def test_a_jpeg_cut_and_padded_with_zeros_is_truncated() -> None:
    data = encoded(picture(), "JPEG", exif=Image.Exif())
    assert "truncated" in reason(data[:-100] + bytes(100))


def test_the_thumbnail_of_a_truncated_jpeg_does_not_count_as_its_end() -> None:
    thumbnail = encoded(picture().resize((16, 12)), "JPEG")
    segment = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    data = encoded(picture(), "JPEG")
    whole = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert torch.equal(decode(whole), decode(data))
    assert "truncated" in reason(whole[:-2])


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[len(data) // 2] ^= 1
    assert "checksum" in reason(bytes(data))


@pytest.mark.parametrize("side", [9_500, 14_000, 2**31 - 1])
def test_a_bomb_is_refused_before_memory_is_taken(side: int) -> None:
    data = png(side, side)
    tracemalloc.start()
    try:
        assert "more than" in reason(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_a_jpeg_bomb_is_refused() -> None:
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert "60000x60000" in reason(bytes(data))
    data[frame + 5 : frame + 9] = struct.pack(">HH", 0, 100)
    assert "empty image" in reason(bytes(data))


def test_a_text_bomb_in_a_png_takes_no_memory() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * 50_000_000, zip=True)
    data = encoded(picture(), "PNG", pnginfo=info)
    tracemalloc.start()
    try:
        assert "corrupt PNG" in reason(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_header_that_only_the_decoder_would_see_is_refused() -> None:
    # After FF 00 a decoder looks for the next FF; who believes in a length there is led past the large frame.
    small = encoded(picture(), "JPEG")
    frame, scan = small.index(b"\xff\xc0"), small.index(b"\xff\xda")
    content = small[frame : frame + 19]
    large = content[:5] + struct.pack(">HH", 10_000, 12_000) + content[9:]
    hidden = b"\xff\xe5" + struct.pack(">H", 2 + len(content)) + content
    jump = struct.pack(">H", 2 + len(large) + 4)
    tables = small[2:frame] + small[frame + 19 : scan]
    assert "corrupt" in reason(b"\xff\xd8\xff\0" + jump + large + hidden + tables + small[scan:])
    for size in (b"\0\0", b"\0\1"):
        assert "corrupt" in reason(small[:2] + b"\xff\xe5" + size + small[2:])


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(picture(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data + b"\xff\xda\0\x02" * 200).shape == (
        3,
        HEIGHT,
        WIDTH,
    )  # what follows the end does not count
    assert "scans" in reason(data[:-2] + scan * (MAX_SCANS + 1) + data[-2:])
    with_table = data[:-2] + b"\xff\xfe\0\x06\xff\xd9\xff\xd9" + scan * MAX_SCANS + data[-2:]
    assert "scans" in reason(with_table)  # an end marker inside of a comment does not end the count


@pytest.mark.parametrize("kind", [b"VP8 ", b"VP8L", b"VP8X"])
def test_the_size_of_a_webp_is_checked_before_it_is_opened(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture().convert("RGBA" if kind == b"VP8X" else "RGB")
    if kind == b"VP8X":
        image.putpixel((3, 3), (0, 0, 0, 0))
    data = encoded(image, "WEBP", lossless=kind == b"VP8L")
    assert data[12:16] == kind
    monkeypatch.setattr(image_files, "MAX_PIXELS", WIDTH * HEIGHT)
    assert decode(data).shape == (3, HEIGHT, WIDTH)
    monkeypatch.setattr(image_files, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    monkeypatch.setattr(decoding, "_image_file", lambda _name: pytest.fail("opened"))
    assert f"{WIDTH}x{HEIGHT} pixels" in reason(data)


def test_pillow_sees_no_comments_of_a_plain_ppm(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would copy up to a megabyte for each: half a million of them took a minute.
    assert decode(b"P3 # a\n2 #\r1 255 1 2 3 4 5 6\n").flatten().tolist() == [1, 4, 2, 5, 3, 6]
    assert decode(b"P5 1 1 255\n#").flatten().tolist() == [35, 35, 35]  # no comment, a pixel
    seen = []
    opener = decoding._image_file("PPM")
    monkeypatch.setattr(decoding, "_image_file", lambda _: lambda file: seen.append(file) or opener(file))
    many = b"P3 2 1 255 1 2 " + b"#\n" * 1000 + b"3 4 5 6\n"
    assert decode(many).flatten().tolist() == [1, 4, 2, 5, 3, 6]
    assert seen[0].getvalue() == b"P3 2 1 255 1 2 3 4 5 6\n"


def test_a_very_long_side_is_refused() -> None:
    # Pillow reads 64 KiB at a time and copies what it has of a row each time: minutes for a row of 28 MB.
    assert decode(encoded(Image.new("L", (MAX_SIDE, 1)), "PNG")).shape == (3, 1, MAX_SIDE)
    for size in ((MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)):
        assert "a side may have" in reason(encoded(Image.new("L", size), "PNG"))


def test_a_large_bmp_in_runs_is_refused() -> None:
    data = bytearray(encoded(picture().quantize(16), "BMP"))
    data[30] = 1  # run-length encoded
    data[18:26] = struct.pack("<ii", 5000, 5000)
    assert "run-length" in reason(bytes(data))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] can't allocate memory: 1 GB")])
def test_a_lack_of_memory_is_not_called_a_corrupt_file(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    if isinstance(error, MemoryError):
        for name in ("load", "__init__"):
            with monkeypatch.context() as patch:
                patch.setattr(decoding._image_file("PNG"), name, fail)
                assert reason(encoded(picture(), "PNG")) == "too little memory to decode it"
    monkeypatch.setattr(jpeg, "_OPERATOR", fail)
    if isinstance(error, RuntimeError):
        assert reason(encoded(picture(), "JPEG")) == "too little memory to decode it"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\xff", "not an image"),
        (b"hello", "not an image"),
        (bytes(500), "zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n <html>", "HTML"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"%PDF-1.4", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"DDS |\0\0\0", "DDS"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"PK\x03\x04", "ZIP"),
        (b"PF\n1 1\n-1.0\n\0\0\0\0", "not an image"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (b"\xff\xd8\xff\xe0\0\x04ab\x17\x18\x19\x20", "corrupt JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated PNG"),
        (b"BM", "corrupt BMP"),
        (b"GIF89a", "corrupt GIF"),
        (b"II*\0", "corrupt TIFF"),
    ],
)
def test_the_reason_names_what_a_file_really_is(data: bytes, expected: str) -> None:
    assert expected in reason(data)
    with pytest.raises(DecodeError):
        inspect(data)


def test_samples_of_unknown_range_are_refused() -> None:
    assert "float" in reason(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    assert "32-bit" in reason(encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"))


def test_random_bytes_behind_every_signature_never_escape_as_another_error() -> None:
    generator = np.random.default_rng(0)
    for magic, _ in (*_MAGIC, (b"RIFF\0\0\0\0WEBP", "WEBP"), (b"P6 ", "PPM")):
        for length in (0, 1, 10, 100, 1000):
            noise = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
            for call in (decode, inspect):
                with contextlib.suppress(DecodeError):
                    call(magic + noise)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_damaged_images_decode_or_are_refused_and_nothing_else(format: str) -> None:
    generator = np.random.default_rng(0)
    data = encoded(picture(), format)
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = int(generator.integers(0, 256))
        try:
            image = decode(bytes(damaged))
        except DecodeError:
            continue
        assert image.dtype == torch.uint8
        assert image.ndim == 3


# ---- reading ----------------------------------------------------------------------------------------------


def test_read_bytes_gives_the_file(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9\n[red].png")
    Path(name).write_bytes(b"content")
    assert read_bytes(name) == b"content"


def test_read_bytes_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "lfs.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for name, expected in {
        "fifo.jpg": "regular",
        ".": "folder",
        "missing.jpg": "not found",
        "empty.jpg": "empty",
        "lfs.jpg": "git-LFS",
        "nul\0.jpg": "cannot be read",
        "a" * 300: "cannot be read",
    }.items():
        with pytest.raises(DecodeError, match=expected):
            read_bytes(str(tmp_path / name))
    with pytest.raises(DecodeError, match="regular"):
        read_bytes("/dev/null")


def test_read_bytes_says_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jpg").write_bytes(b"x")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DecodeError, match="permission"):
        read_bytes(str(tmp_path / "a.jpg"))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.jpg", "wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    assert stat.S_ISREG((tmp_path / "huge.jpg").stat().st_mode)
    with pytest.raises(DecodeError, match="more than"):
        read_bytes(str(tmp_path / "huge.jpg"))


def test_threads_give_what_one_gives() -> None:
    formats = ("JPEG", "PNG", "GIF", "WEBP", "TIFF")
    files = [encoded(picture().rotate(angle), formats[angle % 5]) for angle in range(40)]
    barrier = threading.Barrier(4)

    def work(_: int) -> list[torch.Tensor]:
        barrier.wait()
        return [decode(data) for data in files]

    expected = [decode(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for images in pool.map(work, range(4)):
            assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))


def test_without_torchvisions_operator_pillow_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "JPEG")
    expected = decode(data)
    monkeypatch.setattr(jpeg, "HAS_OPERATOR", False)
    assert torch.equal(decode(data), expected)


def test_the_policy_can_be_part_of_a_cache_key() -> None:
    assert all(isinstance(value, str | int) for value in decoding.POLICY.values())
    assert decoding.POLICY["jpeg"] == "torchvision"


@pytest.mark.real
def test_the_placeholder_among_the_ants_decodes(real_assets: Path) -> None:
    data = (real_assets / "hymenoptera/train/ants/imageNotFound.gif").read_bytes()
    assert inspect(data).format == "GIF"
    assert decode(data).shape == (3, 300, 300)
