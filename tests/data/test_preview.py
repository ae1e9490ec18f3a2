"""The contact sheet: which images it takes, what it refuses, and that its pixels are the views."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tlcli.config.backbone import Preprocess
from tlcli.config.commands import DataPreviewConfig
from tlcli.config.data import DataOptions
from tlcli.data import preview as sheets
from tlcli.data.augment import Augmenter
from tlcli.data.collection import collect
from tlcli.data.decode import decode
from tlcli.data.preview import check_picture_path, draw_sheet, make_preview, num_views, spread, write_picture
from tlcli.errors import DataError, StorageError, UsageError
from tlcli.progress import Silent

Images = Callable[..., Path]


def small(root: Path, **values: object) -> DataPreviewConfig:
    chosen = {"images": 4, "samples": 2, "image_size": 24, "output": str(root / "p.png"), **values}
    return DataPreviewConfig(data=str(root / "data"), **chosen)


def test_rows_are_spread_over_the_classes_and_hold_the_views(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path / "data", {"ants": 10, "bees": 10, "cats": 1})
    made = make_preview(small(tmp_path, images=5, augment="strong", view_seed=3), 2, Silent())
    assert [row.label for row in made.rows] == ["ants", "ants", "bees", "bees", "cats"]
    assert len({row.name for row in made.rows}) == 5
    augmenter = Augmenter(made.policy, Preprocess(image_size=(24, 24), crop_pct=sheets.CROP_PCT))
    for row in made.rows:
        image = decode((root / row.name).read_bytes())
        assert len(row.views) == 3
        for number, view in enumerate(row.views):
            assert torch.equal(view, augmenter(image, row.sha256, number, 3))


def test_only_training_images_are_shown_and_few_show_far_apart_classes(
    tmp_path: Path, make_images: Images
) -> None:
    root = make_images(tmp_path / "data", {f"{n:02d}": 3 for n in range(16)})
    collection = collect(DataOptions(data=str(root)), 2, Silent())
    shown = list(spread(collection))
    train = [s for s, split in zip(collection.samples, collection.splits, strict=True) if split == "train"]
    assert sorted(s.name for s in shown) == sorted(s.name for s in train)
    assert sorted(sample.label for sample in shown[:4]) == [0, 4, 8, 12]
    assert sorted(sample.label for sample in shown[:16]) == list(range(16))
    assert [s.name for s in shown] == [s.name for s in spread(collection)]


def test_bad_images_are_named_and_replaced(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "bees": 1})
    for number in range(20):
        (root / "ants" / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]))
    made = make_preview(small(tmp_path, images=5), 2, Silent())
    assert len(made.rows) == 5
    assert made.bad_images
    assert all("broken" in image.name for image in made.bad_images)
    everything = make_preview(small(tmp_path, images=100), 2, Silent())
    assert 5 <= len(everything.rows) <= 9  # those of train
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="None of the training images"):
        make_preview(small(tmp_path), 2, Silent())


def test_views_bound_the_samples() -> None:
    assert num_views(DataPreviewConfig(samples=8)) == 8
    assert num_views(DataPreviewConfig(samples=8, views=4)) == 3
    assert num_views(DataPreviewConfig(samples=8, views=1)) == 0
    assert num_views(DataPreviewConfig(samples=2, views=4)) == 2


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"output": "p.jpg"}, UsageError, "no PNG"),
        ({"output": "there.png"}, UsageError, "exists"),
        ({"output": "folder.png"}, UsageError, "is a folder"),
        ({"output": "nowhere/p.png"}, StorageError, "no folder 'nowhere'"),
        ({"images": 200, "samples": 50, "image_size": 1024}, UsageError, "pixels"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    values: dict[str, object], error: type[Exception], words: str
) -> None:
    Path("there.png").write_bytes(b"")
    Path("folder.png").mkdir()
    with pytest.raises(error, match=words):
        check_picture_path(DataPreviewConfig(data="nowhere", **values))
    check_picture_path(DataPreviewConfig(data="nowhere", output="there.png", overwrite=True))


def test_the_sheet_shows_every_view_where_it_belongs(tmp_path: Path, make_images: Images) -> None:
    odd = "a very long name of a class that goes on and on \t, with ünïcode"
    make_images(tmp_path / "data", {odd: 4, "b": 4})
    made = make_preview(small(tmp_path), 1, Silent())
    sheet = draw_sheet(made, "data\n")
    assert sheet.size == sheets._sheet_size(4, 3, 24)
    pixels = np.asarray(sheet)
    left, top = sheets.CAPTION_WIDTH, sheets._header_height()
    for row in made.rows:
        for column, view in enumerate(row.views):
            at = left + column * (24 + sheets.GAP)
            tile = pixels[top : top + 24, at : at + 24]
            assert np.array_equal(tile, view.permute(1, 2, 0).numpy())
        top += 24 + sheets.GAP
    assert (pixels[: sheets._header_height(), :] < 128).any()  # words above
    write_picture(sheet, str(tmp_path / "p.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), pixels)
    assert [path.name for path in tmp_path.glob("p.png*")] == ["p.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.png").mkdir()
    with pytest.raises(StorageError, match="Cannot write"):
        write_picture(Image.new("RGB", (4, 4)), str(tmp_path / "p.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_text_is_cut_to_its_place() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (9, 9))), sheets._font(15)
    assert sheets._fitting(draw, font, "short", 500) == "short"
    assert sheets._fitting(draw, font, "a\nb\udcff", 500) == "a\\nb\\udcff"
    cut = sheets._fitting(draw, font, "x" * 400, 60)
    assert cut.endswith("…")
    assert draw.textlength(cut, font) <= 60
    lines = sheets._wrapped(draw, font, "one two three four five six", 60)
    assert " ".join(lines) == "one two three four five six"
    assert len(lines) > 2
    assert sheets._wrapped(draw, font, "", 60) == [""]
