"""A contact sheet of augmented training images, so that a policy can be judged by eye before training.

One row an image: what evaluation shows first, then augmented views, the very ones that a training with the
same `view_seed` and the same geometry sees.
"""

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlcli.config.backbone import Preprocess
from tlcli.config.commands import DataPreviewConfig
from tlcli.data.augment import Augmenter, AugmentPolicy, resolve_policy
from tlcli.data.collection import Collection, collect
from tlcli.data.dataset import Sample
from tlcli.data.decode import decode
from tlcli.data.image_files import BadImage, DecodeError, read_bytes
from tlcli.data.split import digest, map_threads
from tlcli.errors import DataError, StorageError, UsageError
from tlcli.machine import files
from tlcli.progress import Progress
from tlcli.wording import printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

CROP_PCT = 0.875  # what most backbones evaluate with
MAX_PIXELS = 100_000_000
GAP = 6
CAPTION_WIDTH = 150
TEXT_SIZE = 15
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Shown:
    """One row of the sheet.

    Attributes:
        name: The image, relative to the data folder.
        label: Its class.
        sha256: Of the file's bytes.
        views: uint8 [3, size, size] each, the plain one first.
    """

    name: str
    label: str
    sha256: str
    views: list[torch.Tensor]


@dataclass(frozen=True)
class Preview:
    """What a sheet shows.

    Attributes:
        policy: How the views were made.
        num_train: Training images, by which the default preset is chosen.
        rows: The images, spread over the classes.
        bad_images: Images that were chosen, could not be read and were replaced.
    """

    policy: AugmentPolicy
    num_train: int
    rows: list[Shown]
    bad_images: list[BadImage]


def check_picture_path(config: DataPreviewConfig) -> None:
    """Refuse a picture that must not or cannot be written, before any work.

    Raises:
        UsageError: The name does not end in .png, the file exists, or the picture would be too large.
        StorageError: Its folder is missing.
    """
    path = config.output
    if os.path.splitext(path)[1].lower() != ".png":
        raise UsageError(f"Output {path!r} is no PNG picture.", hint="Expected a name ending in .png.")
    if os.path.isdir(path):
        raise UsageError(f"Output {path!r} is a folder.", hint="Name a file in it that ends in .png.")
    if os.path.lexists(path) and not config.overwrite:
        raise UsageError(f"Output {path!r} exists.", hint="Choose another name, or add --overwrite.")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise StorageError(f"There is no folder {folder!r} to write {path!r} into.", hint="Make it first.")
    width, height = _sheet_size(config.images, num_views(config) + 1, config.image_size)
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"The picture would have {width:,} x {height:,} pixels.",
            hint="Lower --images, --samples or --image-size.",
        )


def num_views(config: DataPreviewConfig) -> int:
    """Return how many augmented views a row shows: no more than --views would store."""
    return config.samples if config.views is None else max(0, min(config.samples, config.views - 1))


def make_preview(config: DataPreviewConfig, workers: int, progress: Progress) -> Preview:
    """Return augmented views of some training images.

    Args:
        config: The data, the policy, and how much to show.
        workers: Threads.
        progress: Told of every file.

    Raises:
        UsageError: No data was named, or the augmentation contradicts itself.
        DataError: The data is missing, or none of its training images can be read.
        StorageError: A folder or file cannot be read.
    """
    collection = collect(config, workers, progress)
    num_train = collection.num_images()["train"]
    policy = resolve_policy(config, num_train)
    size = config.image_size
    augmenter = Augmenter(policy, Preprocess(image_size=(size, size), crop_pct=CROP_PCT))
    views = range(num_views(config) + 1)
    rows: list[Shown] = []
    bad_images: list[BadImage] = []

    def show(sample: Sample) -> Shown | BadImage:
        try:
            data = read_bytes(sample.path)
            image = decode(data)
        except DecodeError as error:
            return BadImage(sample.name, sample.path, error.reason)
        sha256 = digest(data).sha256 or ""
        label = collection.dataset.class_names[sample.label or 0]
        made = [augmenter(image, sha256, view, config.view_seed) for view in views]
        return Shown(sample.name, label, sha256, made)

    waiting = spread(collection)
    # Unreadable images are replaced by the next ones.
    while chosen := list(itertools.islice(waiting, config.images - len(rows))):
        for result in map_threads(show, chosen, workers, "augmenting", progress):
            if isinstance(result, BadImage):
                bad_images.append(result)
            else:
                rows.append(result)
    if not rows:
        raise DataError(
            f"None of the training images in {config.data!r} can be read.",
            hint="`tlcli data check` says what is wrong with them.",
        )
    order = {name: number for number, name in enumerate(collection.dataset.class_names)}
    rows.sort(key=lambda row: order[row.label])
    return Preview(policy, num_train, rows, bad_images)


def spread(collection: Collection) -> Iterator[Sample]:
    """Yield the training images in turns over the classes, each class's by content hash.

    With fewer turns than classes, those that come first lie evenly over the list of classes.
    """
    stock: dict[int, list[tuple[str, Sample]]] = {}
    for sample, found, split in zip(
        collection.samples, collection.fingerprints, collection.splits, strict=True
    ):
        if split == "train":
            stock.setdefault(sample.label or 0, []).append((found.sha256 or "", sample))
    for label in stock:
        stock[label].sort(key=lambda item: (item[0], item[1].name))
    labels = _evenly(sorted(stock))
    for turn in range(max(map(len, stock.values()), default=0)):
        yield from (stock[label][turn][1] for label in labels if turn < len(stock[label]))


def draw_sheet(preview: Preview, data: str) -> "Image":
    """Return the contact sheet.

    Args:
        preview: What to show.
        data: Name of the data, for the header.
    """
    from PIL import Image, ImageDraw

    size, columns = preview.rows[0].views[0].shape[1], len(preview.rows[0].views)
    width, height = _sheet_size(len(preview.rows), columns, size)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font, line = ImageDraw.Draw(sheet), _font(TEXT_SIZE), TEXT_SIZE + GAP
    policy = preview.policy
    header = [
        (f"{data}: {preview.num_train:,} training images", INK),
        (f"augment {policy.name} ({policy.reason})", INK),
        *((text, FAINT) for text in _wrapped(draw, font, policy.describe(), width - 2 * GAP)[:2]),
    ]
    for number, (text, colour) in enumerate(header):
        draw.text((GAP, GAP + number * line), _fitting(draw, font, text, width - 2 * GAP), colour, font)
    top = _header_height()
    for column in range(columns):
        left = CAPTION_WIDTH + column * (size + GAP)
        title = _fitting(draw, font, f"view {column}" if column else "plain", size)
        draw.text((left, top - line), title, FAINT, font)
    for row in preview.rows:
        name = os.path.basename(row.name)
        lines = [(text, INK) for text in _wrapped(draw, font, row.label, CAPTION_WIDTH - 2 * GAP)[:3]]
        lines.append((_fitting(draw, font, name, CAPTION_WIDTH - 2 * GAP), FAINT))
        for number, (text, colour) in enumerate(lines[: max(1, size // line)]):
            draw.text((GAP, top + number * line), text, colour, font)
        for column, view in enumerate(row.views):
            tile = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile, (CAPTION_WIDTH + column * (size + GAP), top))
        top += size + GAP
    return sheet


def write_picture(picture: "Image", path: str) -> None:
    """Write a picture as PNG, all at once.

    Raises:
        StorageError: It cannot be written.
    """
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    with files.storage_errors("write", path, hint=files.OUTPUT_HINT):
        files.publish(Path(path), [stream.getvalue()])


def _evenly(labels: Sequence[int]) -> list[int]:
    """Return the labels ordered so that any first few lie far apart: halves, quarters, ... of the list."""
    bits = max(1, (len(labels) - 1).bit_length())
    turned = sorted(range(2**bits), key=lambda number: f"{number:0{bits}b}"[::-1])
    return [labels[number] for number in turned if number < len(labels)]


def _header_height() -> int:
    return GAP + 5 * (TEXT_SIZE + GAP)  # two lines, two of the policy, the columns' names


def _sheet_size(rows: int, columns: int, size: int) -> tuple[int, int]:
    """Return the width and height of a sheet in pixels."""
    return CAPTION_WIDTH + columns * (size + GAP), _header_height() + rows * (size + GAP)


def _font(size: int) -> "FreeTypeFont":
    """Return a font that knows more than Latin letters: matplotlib's."""
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def _fitting(draw: "ImageDraw", font: Any, text: str, width: int) -> str:
    """Return the text on one line, its end left out where it is too long."""
    text = printable(text)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _wrapped(draw: "ImageDraw", font: Any, text: str, width: int) -> list[str]:
    """Return the text on as many lines as it takes, divided at spaces; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_fitting(draw, font, word, width))
    return lines or [""]
