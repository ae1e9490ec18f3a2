"""Items 1 to 36 of the list of bad inputs: images that are damaged, odd or hostile.

All files that need nothing of their own lie in one folder, beside good images. One `extract`, one `finetune`
and one `data check` go over it; the tests look at what became of their file. An image that is accepted must
have the row of a plain PNG with the pixels that are expected, which a second folder holds.

The list's --strict is `--max-bad 0` here: one option sets how many bad images are too many.
"""

import dataclasses
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bad_inputs import fuzz_decode
from tests.bad_inputs.image_files import (
    black_png,
    encoded,
    exif_block,
    jpeg_file,
    jpeg_segments,
    many_scans,
    picture,
    png_chunks,
    png_file,
)
from tests.tiny import TINY_FP32 as TINY
from tlcli.commands.extract import extract, plan_extract
from tlcli.config.commands import ExtractConfig
from tlcli.features.plan import read_rows
from tlcli.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as tlcli does; pytest sets its own filters

CORPUS = Path(__file__).parent / "corpus"
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, 1),
}

Run = Callable[..., Any]


def plain(*colour: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (size[1], size[0], 3))


def blocks() -> np.ndarray:
    """Return grey blocks of 8x8 pixels, all different: a JPEG of quality 100 keeps them exactly."""
    values = np.arange(12).reshape(3, 4) * 20 + 10
    return np.kron(values, np.ones((8, 8))).astype(np.uint8)[:, :, None].repeat(3, axis=2)


def blocks_jpeg(**options: Any) -> bytes:
    return encoded(Image.fromarray(blocks()[:, :, 0]), "JPEG", quality=100, **options)


@functools.cache
def _grows_to_200_megabytes() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(10**6)) for _ in range(200)) + packer.flush()


def bomb(kind: bytes, before: bytes) -> bytes:
    """Return a small PNG one chunk of which grows to 200 MB."""
    packed = _grows_to_200_megabytes()
    chunks = list(png_chunks(encoded(picture(), "PNG")))
    return png_file([chunks[0], (kind, before + packed), *chunks[1:]])


def _bad() -> dict[str, tuple[bytes, str]]:
    """Return name -> content and what the reason must hold."""
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    wrong_sum = bytearray(png)
    wrong_sum[-20] ^= 1
    return {
        "001.jpg": (b"", "empty file"),
        "002.jpg": (b"\xff", "not an image"),
        "003.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "004.jpg": (jpeg[:-1], "truncated"),
        "006.png": (bytes(wrong_sum), "checksum"),
        "009.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        "010.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "014-float.tif": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "float samples"),
        "014-int.tif": (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit samples"),
        "025-eps.jpg": (encoded(picture(), "EPS"), "PostScript"),
        "025-pdf.jpg": (encoded(picture(), "PDF"), "PDF"),
        "025-fits.jpg": (b"SIMPLE  =                    T" + bytes(2850), "FITS"),
        "026-psd.jpg": (b"8BPS\0\1" + bytes(100), "Photoshop"),
        "026-gd.jpg": (b"\xff\xfe\0\4\0\4\1" + bytes(100), "not an image of a supported format"),
        "026-dds.jpg": (encoded(picture(), "DDS"), "DDS"),
        "029-scans.jpg": (many_scans(encoded(picture(), "JPEG", progressive=True), 101), "scans"),
        "031-svg.jpg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "031-heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        "031-avif.jpg": (b"\0\0\0\x18ftypavif" + bytes(100), "AVIF"),
    }


def _odd() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return name -> content and the pixels that must be seen."""
    jpeg = encoded(picture(), "JPEG")
    flipped = bytearray(jpeg)
    flipped[-40] ^= 0x10
    found: dict[str, tuple[bytes, np.ndarray]] = {
        "005-whole.jpg": (jpeg, _pixels(jpeg)),
        "005-flipped.jpg": (bytes(flipped), _pixels(bytes(flipped))),
        "007.jpg": (encoded(picture(21, 30), "PNG"), np.asarray(picture(21, 30))),
        "008.JPEG": (encoded(picture(22, 30), "PNG"), np.asarray(picture(22, 30))),
        "008.jfif": (encoded(picture(23, 30), "PNG"), np.asarray(picture(23, 30))),
    }
    found |= _odd_colours() | _odd_frames()
    for orientation, turn in TURNED.items():
        found[f"019-{orientation}.jpg"] = (blocks_jpeg(exif=exif_block(orientation)), turn(blocks()))
        exif_png = encoded(picture(), "PNG", exif=exif_block(orientation))
        found[f"019-{orientation}.png"] = (exif_png, turn(np.asarray(picture())))
    corrupt = b"Exif\0\0II*\0" + b"\xff" * 50
    found["020.jpg"] = (blocks_jpeg(exif=corrupt), blocks())
    found["020.png"] = (encoded(picture(24, 30), "PNG", exif=corrupt), np.asarray(picture(24, 30)))
    profile = random.Random(0).randbytes(5 << 20)
    found["024-icc.jpg"] = (blocks_jpeg(icc_profile=profile), blocks())
    middle = np.full((1, 20_000, 3), (200, 0, 0), np.uint8)
    middle[:, 9_900:10_100] = (0, 90, 30)
    found["027.png"] = (encoded(Image.new("RGB", (1, 1), (9, 80, 200)), "PNG"), plain(9, 80, 200))
    found["028-high.png"] = (encoded(Image.new("RGB", (1, 5000), (9, 80, 7)), "PNG"), plain(9, 80, 7))
    found["028-wide.png"] = (encoded(Image.fromarray(middle), "PNG"), plain(0, 90, 30))
    found["029-comments.ppm"] = (b"P3 1 1 255\n" + b"#\n" * 500_000 + b"9 8 7\n", plain(9, 8, 7, size=(1, 1)))
    found["032.png"] = (encoded(Image.new("RGB", (30, 30)), "PNG"), plain(0, 0, 0))
    return found


def _odd_colours() -> dict[str, tuple[bytes, np.ndarray]]:
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, 8:16], cmyk[:, 16:24], cmyk[:, 24:] = (0, 255, 255, 0), (100, 0, 0, 0), (0, 0, 0, 255)
    rgb = np.full((16, 32, 3), 255, np.uint8)
    rgb[:, 8:16], rgb[:, 16:24], rgb[:, 24:] = (255, 0, 0), (155, 255, 255), (0, 0, 0)
    adobe = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    segments, rest = jpeg_segments(adobe)
    assert any(marker == 0xEE for marker, _ in segments)
    unmarked = jpeg_file([segment for segment in segments if segment[0] != 0xEE], rest)
    grey = np.arange(256, dtype=np.int64).reshape(16, 16)
    deep = (grey * 257 + np.resize([0, 100, -100], (16, 16))).clip(0, 65535).astype(np.uint16)
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 10, 10, 0, 99, 0])
    mixed = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    mixed.paste((0, 0, 80, 255), (0, 0, 4, 8))
    composed = plain(255, 127, 127, size=(8, 8)).copy()
    composed[:, :4] = (0, 0, 80)
    return {
        "011.jpg": (unmarked, rgb),
        "012.jpg": (adobe, rgb),
        "013.png": (
            encoded(Image.fromarray(deep), "PNG"),
            grey.astype(np.uint8)[:, :, None].repeat(3, axis=2),
        ),
        "015-rgba.png": (encoded(mixed, "PNG"), composed),
        "015-la.png": (encoded(Image.new("LA", (8, 8), (0, 128)), "PNG"), plain(127, 127, 127)),
        "015-palette.png": (
            encoded(palette, "PNG", transparency=1),
            np.array([[[10, 20, 30], [255] * 3], [[0, 99, 0], [255] * 3]], np.uint8),
        ),
        "016.png": (encoded(Image.new("RGBA", (9, 9), (255, 0, 90, 0)), "PNG"), plain(255, 255, 255)),
        "016.webp": (
            encoded(Image.new("RGBA", (9, 9), (255, 0, 90, 0)), "WEBP", lossless=True, exact=True),
            plain(255, 255, 255),
        ),
    }


def _odd_frames() -> dict[str, tuple[bytes, np.ndarray]]:
    found = {}
    kinds = {"017.gif": "GIF", "017.png": "PNG", "017.webp": "WEBP", "018.tif": "TIFF"}
    for number, (name, format) in enumerate(kinds.items()):
        colours = (250, number, 0), (0, 250, 0), (0, 0, 250)
        frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        found[name] = (data, plain(*colours[0]))
    return found


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@dataclasses.dataclass(frozen=True)
class Found:
    """What the commands made of the folder; rows by name, without the folder and, if expected, the suffix."""

    bad: dict[str, tuple[bytes, str]]
    rows: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    good: frozenset[str]
    extracted: dict[str, Any]
    errors: str
    listed: dict[str, str]
    finetuned: dict[str, Any]
    listed_by_finetune: dict[str, str]
    checked: dict[str, Any]
    ghostscript: Path

    def refused(self, *names: str) -> None:
        """Assert that these files are listed everywhere with their reason, and have no row."""
        for name in names:
            assert self.bad[name][1] in self.listed[f"b/{name}"]
            assert self.listed_by_finetune[f"b/{name}"] == self.listed[f"b/{name}"]
            assert {"name": f"b/{name}", "reason": self.listed[f"b/{name}"]} in self.checked["bad_images"]
            assert f"b/{name}" not in self.rows

    def accepted(self, *names: str) -> None:
        """Assert that these files have exactly the row of the pixels that are expected."""
        for name in names:
            assert f"b/{name}" not in self.listed
            assert np.isfinite(self.rows[f"b/{name}"]).all()
            assert np.array_equal(self.rows[f"b/{name}"], self.expected[f"b/{name}.png"]), name

    def note(self, kind: str) -> str:
        """Return what `data check` noted of a kind."""
        (finding,) = (finding for finding in self.checked["findings"] if finding["kind"] == kind)
        return f"{finding['message']} {finding['items']}"


def rows_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(zip(file["files"].tolist(), file["features"], strict=True))


def listed_in(path: Path) -> dict[str, str]:
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    assert head == "file,reason"
    return {name: reason.strip('"') for name, _, reason in (line.partition(",") for line in lines)}


_FOUND: list[Found] = []


@pytest.fixture
def found(run_cli: Run, make_images: Run, tmp_path_factory: pytest.TempPathFactory,
          monkeypatch: pytest.MonkeyPatch) -> Found:  # fmt: skip
    """Run the commands once for all tests: run_cli belongs to a single test, and so does its cache."""
    if not _FOUND:
        _FOUND.append(_find(run_cli, make_images, tmp_path_factory.mktemp("found"), monkeypatch))
    return _FOUND[0]


def _find(run_cli: Run, make_images: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    ghostscript = root / "ghostscript-ran"
    for name in ("gs", "ghostscript"):
        (root / "bin").mkdir(exist_ok=True)
        (root / "bin" / name).write_text(f"#!/bin/sh\ntouch '{ghostscript}'\n")
        (root / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    bad, odd = _bad(), _odd()
    images = make_images(root / "images", {"a": 12, "b": 12}, suffix="-good.png")
    shutil.copytree(images, root / "expected")
    good = frozenset(str(path.relative_to(images)) for path in images.rglob("*.png"))
    for name, (data, _) in [*bad.items(), *odd.items()]:
        (images / "b" / name).write_bytes(data)
    for name in ("008", "031.heic", "031.avif", "031.svg"):
        (images / "b" / name).write_bytes(b"left out by its name")
    for name, (_, pixels) in odd.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(root / "expected" / "b" / f"{name}.png")
    out = root / "out"
    out.mkdir()
    expected = run_cli("extract", root / "expected", *TINY, "-o", root / "expected.npz", "--max-bad", 0)
    assert expected.code == 0, expected.stderr
    extracted = run_cli("extract", images, *TINY, "--max-bad", 0.9, "-o", out / "rows.npz", "--json")
    assert extracted.code == 0, extracted.stderr
    finetuned = run_cli(
        "finetune", images, *TINY, "--max-bad", 0.9, "--l2", "0.1", "-o", root / "run", "--json"
    )
    assert finetuned.code == 0, finetuned.stderr
    checked = run_cli("data", "check", images, "--max-bad", 0.9, "--json")
    assert checked.code == 0, checked.stderr
    return Found(
        bad, rows_of(out / "rows.npz"), rows_of(root / "expected.npz"), good, json.loads(extracted.stdout),
        extracted.stderr, listed_in(out / "bad_images.csv"), json.loads(finetuned.stdout),
        listed_in(root / "run" / "bad_images.csv"), json.loads(checked.stdout), ghostscript,
    )  # fmt: skip


# ---- what holds for all of them ---------------------------------------------------------------------------


def test_every_good_image_keeps_its_own_row(found: Found) -> None:
    assert found.good
    for name in found.good:
        assert np.array_equal(found.rows[name], found.expected[name])
    assert len(found.rows) == len(found.expected)
    assert len({row.tobytes() for name, row in found.rows.items() if name in found.good}) == len(found.good)


def test_every_bad_image_is_counted_and_listed_and_nothing_else(found: Found) -> None:
    names = {f"b/{name}" for name in found.bad}
    assert set(found.listed) == set(found.listed_by_finetune) == names
    assert found.extracted["features"]["images_skipped"] == len(names)
    assert found.finetuned["features"]["images_skipped"] == len(names)
    assert {image["file"]: image["reason"] for image in found.extracted["bad_images"]} == found.listed
    assert f"{len(names)} of {len(names) + len(found.rows)} images cannot be used" in found.errors
    assert "Traceback" not in found.errors


def test_max_bad_decides_and_zero_is_strict(run_cli: Run, make_images: Run, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"a": 20, "b": 20})
    (images / "a" / "half.jpg").write_bytes(_bad()["003.jpg"][0])
    out = tmp_path / "rows.npz"
    for share in ((), ("--max-bad", 0)):  # 1 of 41 is more than the 1 % that is the default
        refused = run_cli("extract", images, *TINY, *share, "-o", out, "--json")
        assert (refused.code, refused.stdout) == (3, "")
        assert "'a/half.jpg': truncated" in refused.stderr
        assert "--max-bad" in refused.stderr
        assert not out.exists()
    done = run_cli("extract", images, *TINY, "--max-bad", 0.03, "-o", out, "--json")
    assert done.code == 0
    document = json.loads(done.stdout)["features"]
    assert document["images_skipped"] == 1
    assert document["rows_reused"] + document["rows_computed"] == 40
    assert document["rows_reused"] > 0  # what the refused runs had finished was kept
    assert run_cli("data", "check", images, "--max-bad", 0).code == 3


def test_a_class_that_loses_all_its_images(run_cli: Run, make_images: Run, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"a": 20, "b": 2})
    for path in (images / "b").iterdir():
        path.write_bytes(b"\xff\xd8\xff" + path.name.encode())
    refused = run_cli("extract", images, *TINY, "--max-bad", 0.5)
    assert (refused.code, refused.stdout) == (3, "")
    assert "No usable training image is left of 'b'" in refused.stderr
    assert "b/000.png" in refused.stderr


# ---- one item after another -------------------------------------------------------------------------------


def test_001_empty_file(found: Found) -> None:
    found.refused("001.jpg")


def test_002_one_byte(found: Found) -> None:
    found.refused("002.jpg")


def test_003_jpeg_cut_in_half(found: Found) -> None:
    found.refused("003.jpg")


def test_004_jpeg_without_its_last_byte(found: Found) -> None:
    found.refused("004.jpg")


def test_005_byte_flipped_in_a_jpeg(found: Found) -> None:
    # It decodes without a complaint. There is no manifest to compare files with (the row's key is the file's
    # hash): it is another image, with a row of its own, and the row of the old content stays what it was.
    found.accepted("005-whole.jpg", "005-flipped.jpg")
    assert not np.array_equal(found.rows["b/005-whole.jpg"], found.rows["b/005-flipped.jpg"])


def test_006_png_with_a_wrong_checksum(found: Found) -> None:
    found.refused("006.png")


def test_007_png_saved_as_jpg(found: Found) -> None:
    found.accepted("007.jpg")


def test_008_odd_and_missing_extensions(found: Found) -> None:
    found.accepted("008.JPEG", "008.jfif")
    assert "b/008" not in found.rows
    assert found.checked["ignored"]["files without an image extension"] == 1


def test_009_html_page_as_jpg(found: Found) -> None:
    found.refused("009.jpg")


def test_010_git_lfs_pointer(found: Found) -> None:
    found.refused("010.jpg")


def test_011_cmyk_jpeg_without_the_adobe_marker(found: Found) -> None:
    # Taken as inverted like Adobe's, as Pillow does: such files come from Adobe's tools, the marker stripped.
    found.accepted("011.jpg")
    assert "b/011.jpg" in found.note("cmyk")


def test_012_cmyk_jpeg_inverted_as_adobe_does(found: Found) -> None:
    found.accepted("012.jpg")
    assert "b/012.jpg" in found.note("cmyk")


def test_013_grey_of_16_bits_is_scaled(found: Found) -> None:
    found.accepted("013.png")
    assert "b/013.png" in found.note("grey16")


def test_014_float_and_32_bit_samples_are_rejected(found: Found) -> None:
    found.refused("014-float.tif", "014-int.tif")


def test_015_transparency_is_put_on_white(found: Found) -> None:
    found.accepted("015-rgba.png", "015-la.png", "015-palette.png")
    assert "b/015-palette.png" in found.note("alpha")


def test_016_colour_below_full_transparency_is_not_seen(found: Found) -> None:
    found.accepted("016.png", "016.webp")


def test_017_of_an_animation_the_first_frame(found: Found) -> None:
    found.accepted("017.gif", "017.png", "017.webp")
    assert found.note("animation").count("b/017") == 3


def test_018_of_several_pages_the_first(found: Found) -> None:
    found.accepted("018.tif")
    assert "b/018.tif" in found.note("animation")


@pytest.mark.parametrize("orientation", TURNED)
def test_019_orientation_is_applied(found: Found, orientation: int) -> None:
    found.accepted(f"019-{orientation}.jpg", f"019-{orientation}.png")
    assert f"b/019-{orientation}.jpg" in found.note("orientation")


def test_020_corrupt_exif_is_ignored(found: Found) -> None:
    # Without a warning: nothing is lost but the orientation, and cameras write odd blocks by the thousand.
    found.accepted("020.jpg", "020.png")


def test_025_formats_that_run_programs_or_parse_much(found: Found) -> None:
    found.refused("025-eps.jpg", "025-pdf.jpg", "025-fits.jpg")
    assert not found.ghostscript.exists()


def test_026_more_formats_off_the_list(found: Found) -> None:
    found.refused("026-psd.jpg", "026-gd.jpg", "026-dds.jpg")


def test_027_one_pixel(found: Found) -> None:
    found.accepted("027.png")


def test_028_one_pixel_wide_or_high(found: Found) -> None:
    found.accepted("028-high.png", "028-wide.png")


def test_029_small_files_that_would_take_minutes(found: Found) -> None:
    found.refused("029-scans.jpg")
    found.accepted("029-comments.ppm")


def test_031_formats_without_a_decoder(found: Found) -> None:
    found.refused("031-svg.jpg", "031-heic.jpg", "031-avif.jpg")
    for suffix in (".heic", ".avif", ".svg"):
        assert found.checked["ignored"][f"image formats that are not supported ({suffix})"] == 1
        assert suffix in found.errors


def test_032_black_is_an_image(found: Found) -> None:
    found.accepted("032.png")
    assert "b/032.png" in found.note("blank")


# ---- while it runs ----------------------------------------------------------------------------------------


def _config(images: Path) -> ExtractConfig:
    return ExtractConfig(
        data=str(images), backbone="test_resnet", random_init=True, image_size=32, dtype="fp32", max_bad=0.1,
        workers=2,
    )  # fmt: skip


def test_033_image_edited_between_hash_and_decode(make_images: Run, tmp_path: Path) -> None:
    # The two halves of the command, with an edit between them.
    images = make_images(tmp_path / "images", {"a": 10, "b": 10})
    plan = plan_extract(_config(images), Silent())
    shutil.copy(images / "b/000.png", tmp_path / "before.png")
    picture().save(images / "b/000.png")
    features = extract(_config(images), plan, Silent())
    assert [(bad.name, bad.reason) for bad in features.bad_images] == [
        ("b/000.png", "changed or vanished while it was read")
    ]
    # What was decoded is stored under its own hash, so that the next run finds it and has nothing to do.
    again = plan_extract(_config(images), Silent())
    features = extract(_config(images), again, Silent())
    assert (features.rows_computed, features.rows_reused, features.bad_images) == (0, 20, [])
    row = read_rows(again, again.collection)[[s.name for s in again.collection.samples].index("b/000.png")]
    fresh = plan_extract(dataclasses.replace(_config(images), cache="never"), Silent())
    extract(_config(images), fresh, Silent())
    assert (row == read_rows(fresh, fresh.collection)[10]).all()


def test_034_image_deleted_between_hash_and_decode(make_images: Run, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"a": 10, "b": 10})
    plan = plan_extract(_config(images), Silent())
    (images / "b/000.png").unlink()
    features = extract(_config(images), plan, Silent())
    assert [bad.name for bad in features.bad_images] == ["b/000.png"]
    assert features.bad_images[0].reason in {"file not found", "changed or vanished while it was read"}
    assert features.rows_computed == 19


def test_035_same_image_in_two_classes(run_cli: Run, make_images: Run, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", {"a": 10, "b": 10})
    shutil.copy(images / "a/000.png", images / "b/copy.png")
    done = run_cli("extract", images, *TINY)
    assert done.code == 0
    assert "conflicting labels: the same image in more than one class (1 such" in done.stderr
    refused = run_cli("data", "check", images)
    assert (refused.code, refused.stdout) == (3, "")
    assert "'a/000.png' ('a', " in refused.stderr
    assert "'b/copy.png' ('b', " in refused.stderr


def test_036_same_image_in_train_and_val(run_cli: Run, make_images: Run, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1)):
        make_images(tmp_path / "images" / split, {"a": 6, "b": 6}, seed=seed)
    for number in range(2):
        shutil.copy(tmp_path / f"images/train/a/00{number}.png", tmp_path / f"images/val/a/copy{number}.png")
    done = run_cli("extract", tmp_path / "images", *TINY)
    assert done.code == 0
    assert "leakage: the same image in more than one split" in done.stderr
    assert "(2 such" in done.stderr
    refused = run_cli("data", "check", tmp_path / "images")
    assert (refused.code, refused.stdout) == (3, "")
    assert "2 images in more than one split" in refused.stderr


# ---- in a process of its own: memory, crashes, hangs ------------------------------------------------------

# One interpreter for all of it, since importing torch takes seconds. The peak of memory is taken after good
# images went through, and again after the hostile ones.
SCRIPT = """
import contextlib, io, json, os, resource, shutil, sys
from tlcli.cli.app import main

def run(*args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*args])
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue(), "peak": peak()}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tiny = sys.argv[1].split()
found = {"calm": run("extract", "calm", *tiny)}
found["bombs"] = run("extract", "bombs", *tiny, "--max-bad", "0.9", "--json")
found["checked bombs"] = run("data", "check", "bombs", "--max-bad", "0.9")
child = os.fork()
if child == 0:
    import faulthandler
    faulthandler.enable(open("crash.txt", "w"))
    os._exit(main(["extract", "faulty", *tiny, "--workers", "1"]))
found["crash"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
isolated = ("--isolate", "1", "--workers", "1")
found["isolated"] = run("data", "check", "faulty", *isolated, "--max-bad", "0.9", "--json")
os.unlink("faulty/a/crash.ppm")
os.unlink("faulty/b/hang.ppm")
shutil.copytree("bombs", "same")
found["threads"] = run("data", "check", "same", "--max-bad", "0.9", "--json")
found["children"] = run("data", "check", "same", "--max-bad", "0.9", "--json", "--isolate", "60")
found["after"] = run("extract", "faulty", *tiny, "--max-bad", "0", "--json")
print(json.dumps(found))
"""
# A decoder with a bug in its C code: none is known, so one is put in, by size, before tlcli is imported.
SITE = """
import ctypes
from PIL.PpmImagePlugin import PpmImageFile
load = PpmImageFile.load
def broken(self):
    if self.size == (13, 13):
        ctypes.string_at(0)
    while self.size == (17, 17):
        pass
    return load(self)
PpmImageFile.load = broken
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what commands in a fresh process gave on bombs, and on images that crash or hang the decoder."""
    root = tmp_path_factory.mktemp("child")
    for number in range(16):
        for name in ("calm", "bombs", "faulty"):
            path = root / name / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(32 + number).save(path)
    for name, data in {
        "021.png": black_png(14_000, 14_000),
        "022.png": black_png(10_000, 10_000),
        "023-ztxt.png": bomb(b"zTXt", b"Comment\0\0"),
        "023-itxt.png": bomb(b"iTXt", b"Comment\0\1\0\0\0"),
        "024.png": bomb(b"iCCP", b"profile\0\0"),
    }.items():
        assert len(data) < 300_000
        (root / "bombs/a" / name).write_bytes(data)
    (root / "faulty/a/crash.ppm").write_bytes(encoded(picture(13, 13), "PPM"))
    (root / "faulty/b/hang.ppm").write_bytes(encoded(picture(17, 17), "PPM"))
    (root / "site").mkdir()
    (root / "site/sitecustomize.py").write_text(SITE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "site"), *sys.path]),
        "TLCLI_HOME": str(root / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, " ".join(TINY)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["stack"] = (root / "crash.txt").read_text()
    return result


BOUND = 64 << 20


def _refused_in_child(child: dict[str, Any], name: str, reason: str) -> None:
    document = json.loads(child["bombs"]["stdout"])
    (found,) = (image["reason"] for image in document["bad_images"] if image["file"] == f"a/{name}")
    assert reason in found
    assert document["features"]["images_skipped"] == 5
    assert document["features"]["rows_reused"] + document["features"]["rows_computed"] == 16
    assert child["calm"]["code"] == child["bombs"]["code"] == child["checked bombs"]["code"] == 0
    assert child["checked bombs"]["peak"] - child["calm"]["peak"] < BOUND


def test_021_bomb_of_196_megapixels(child: dict[str, Any]) -> None:
    _refused_in_child(child, "021.png", "14000x14000 pixels, more than")


def test_022_bomb_of_100_megapixels(child: dict[str, Any]) -> None:
    _refused_in_child(child, "022.png", "10000x10000 pixels, more than")


@pytest.mark.parametrize("name", ["023-ztxt.png", "023-itxt.png"])
def test_023_text_that_grows(child: dict[str, Any], name: str) -> None:
    _refused_in_child(child, name, "Decompressed data too large")


def test_024_colour_profile_that_grows_or_is_large(child: dict[str, Any], found: Found) -> None:
    _refused_in_child(child, "024.png", "Decompressed data too large")
    found.accepted("024-icc.jpg")  # 5 MiB of profile in a JPEG are skipped


def test_029_decoder_that_hangs(child: dict[str, Any]) -> None:
    # Not in every run: a process for each decoder costs memory and a second of start. Small files known to
    # take minutes are refused (above); where a decoder still hangs, `data check --isolate` finds the file.
    assert child["isolated"]["code"] == 0, child["isolated"]["stderr"]
    document = json.loads(child["isolated"]["stdout"])
    assert {"name": "b/hang.ppm", "reason": "decoding takes more than 1 s"} in document["bad_images"]
    assert len(document["bad_images"]) == 2
    assert document["num_images"] == 18
    assert document["formats"] == {"PNG": 16}  # the check went on after both
    assert child["threads"]["code"] == child["children"]["code"] == 0
    assert (
        child["threads"]["stdout"] == child["children"]["stdout"]
    )  # where no decoder fails, all is the same


def test_030_decoder_that_crashes(child: dict[str, Any]) -> None:
    # A crash in C code ends the run, whatever was published stays; the stack says that it was the decoder,
    # and the check in child processes which file. Without that file the same command goes on.
    assert child["crash"] == -11
    assert "Segmentation fault" in child["stack"]
    assert "tlcli/data/decode.py" in child["stack"]
    document = json.loads(child["isolated"]["stdout"])
    assert {"name": "a/crash.ppm", "reason": "crashes its decoder (SIGSEGV)"} in document["bad_images"]
    assert child["after"]["code"] == 0
    features = json.loads(child["after"]["stdout"])["features"]
    assert features["rows_reused"] + features["rows_computed"] == 16
    assert features["images_skipped"] == 0


# ---- fuzzing ----------------------------------------------------------------------------------------------


def test_the_fuzzer_makes_the_same_inputs_again_and_finds_nothing_in_a_few() -> None:
    inputs, again = fuzz_decode.Inputs(0), fuzz_decode.Inputs(0)
    verdicts = set()
    for number in range(150):
        name, data = inputs.make(number)
        assert again.make(number) == (name, data)
        verdict, details = fuzz_decode.judge(data)
        assert verdict in {"decoded", "refused"}, (number, name, verdict, details)
        verdicts.add(verdict)
    assert verdicts == {"decoded", "refused"}


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_the_fuzzer_found_once_stays_repaired(path: Path) -> None:
    verdict, details = fuzz_decode.judge(path.read_bytes())
    assert verdict in {"decoded", "refused"}, details
