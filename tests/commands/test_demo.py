"""The demo as a library: its folder, its digits, its comparison, and that it keeps quiet."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlcli.commands import demo as library
from tlcli.config.commands import DemoConfig
from tlcli.errors import StorageError, UsageError
from tlcli.metrics.significance import sign_test
from tlcli.progress import Silent

MARKER = library.MARKER


def plan(folder: Path, **options: object) -> library.DemoPlan:
    return library.plan_demo(DemoConfig(output=str(folder), **options))


def marked(folder: Path, status: str) -> Path:
    """Make a folder as a demo leaves it, with something of the user's inside."""
    for name in ("images", "run"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old.txt").write_text("old")
    (folder / "mine.txt").write_text("mine")
    document = {"schema": library.MARKER_SCHEMA, "status": status, "tlcli_version": "0"}
    (folder / MARKER).write_text(json.dumps(document))
    return folder


# ---- the folder -------------------------------------------------------------------------------------------


def test_planning_writes_nothing(tmp_path: Path) -> None:
    plan(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_a_finished_demo_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = marked(tmp_path / "demo", "done")
    with pytest.raises(UsageError) as caught:
        plan(folder)
    assert "--overwrite" in (caught.value.hint or "")
    library._prepare(plan(folder, overwrite=True))
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "mine.txt"]


def test_an_interrupted_demo_is_taken_up_by_the_same_command(tmp_path: Path) -> None:
    folder = marked(tmp_path / "demo", "running")
    library._prepare(plan(folder))
    assert not (folder / "images").exists()


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    plan(tmp_path)


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"schema": "other/1", "status": "running"}'])
def test_what_no_demo_made_is_never_deleted(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    if content is not None:
        (folder / MARKER).write_text(content)
    with pytest.raises(UsageError, match="no demo made it"):
        plan(folder, overwrite=True)
    assert (folder / "images").is_dir()


def test_a_file_and_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    marked(tmp_path / "demo", "done")
    (tmp_path / "link").symlink_to(tmp_path / "demo")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="left alone"):
            plan(tmp_path / name, overwrite=True)


def test_a_link_in_place_of_the_images_is_not_followed(tmp_path: Path) -> None:
    folder = marked(tmp_path / "demo", "running")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    library._prepare(plan(folder))
    assert (tmp_path / "elsewhere" / "old.txt").exists()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Not a directory"):
        library.demo(plan(tmp_path / "file" / "demo"), Silent())


# ---- the commands -----------------------------------------------------------------------------------------


def test_commands_are_quoted_and_name_the_hardware(tmp_path: Path) -> None:
    config = DemoConfig(output="-my demo", device="cpu", workers=2)
    found = {step.name: step.command for step in library.plan_demo(config, program="bin/tlcli").steps}
    assert found["extract"] == (
        "bin/tlcli extract './-my demo/images' --backbone bundled --device cpu --workers 2"
    )
    assert found["report"] == "bin/tlcli report './-my demo/run'"
    assert found["images"] is None


# ---- the digits and the comparison ------------------------------------------------------------------------


def test_digits_are_written_as_learnable_images(tmp_path: Path) -> None:
    assert library.write_digits(tmp_path, Silent()) == {"train": 1437, "val": 360}
    names = {str(path.relative_to(tmp_path / "val")) for path in (tmp_path / "val").rglob("*.png")}
    assert set(library.SHOWN) <= names
    with Image.open(tmp_path / "val" / library.SHOWN[0]) as image:
        assert (image.mode, image.size) == ("L", (64, 64))
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    from sklearn.datasets import load_digits

    original = load_digits().images[library.NUM_TRAIN] * 255 / 16
    assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.98


def test_raw_pixels_are_measured_on_every_val_digit() -> None:
    found, right = library.fit_raw_pixels()
    assert found["num_images"] == len(right) == 360
    assert sum(right.values()) == round(found["top1_accuracy"] * 360)
    assert 0.88 < found["top1_accuracy"] < 0.94  # the digits never change
    assert found["interval"]["low"] < found["top1_accuracy"] < found["interval"]["high"]


def right(count: int, of: int) -> dict[str, bool]:
    return {str(number): number < count for number in range(of)}


@pytest.mark.parametrize(
    ("ours", "raw", "expected"),
    [
        (100, 80, "helps here"),
        (80, 100, "raw pixels are better"),
        (99, 98, "do not tell"),
        (9, 9, "do not tell"),
    ],
)
def test_the_conclusion_follows_the_numbers(ours: int, raw: int, expected: str) -> None:
    compared = library.comparison(sign_test(right(ours, 100), right(raw, 100)))
    assert compared["only_backbone_right"] == max(0, ours - raw)
    assert compared["only_raw_pixels_right"] == max(0, raw - ours)
    assert expected in library.conclusion({"comparison": compared, "num_images": {"val": 100}})
