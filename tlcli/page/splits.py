"""What the page shows of one split: confusions, calibration, the worst mistakes with their images."""

import base64
import csv
import dataclasses
import heapq
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.data.listing import plain_cell
from tlcli.errors import DataError
from tlcli.page import figures
from tlcli.runs.results import read_json

THUMBNAIL_PIXELS = 160
TABLE_CLASSES = 20  # a confusion matrix of more classes is drawn as a heat map
CONFUSIONS = 15


@dataclass(frozen=True)
class Mistake:
    """One image whose class was predicted wrongly.

    Attributes:
        file: The image's name in the data set.
        label: Its class.
        predicted: The class it was given.
        probability: Of the predicted class, 0 to 1.
        path: Where the image was, if the predictions say so.
        picture: The image as a data URL, or None.
        missing: Why there is no picture.
    """

    file: str
    label: str
    predicted: str
    probability: float
    path: str | None = None
    picture: str | None = None
    missing: str | None = None


def data_root(run: Mapping[str, Any]) -> Path:
    """Return the folder that the names of a run's images are relative to."""
    path = Path(run["data"]["path"])
    return path.parent if path.is_file() else path


# ---- one split --------------------------------------------------------------------------------------------


def split_of(run_dir: Path, name: str, root: Path, worst: int) -> dict[str, Any]:
    """Return what the page shows of one split."""
    evaluation = read_json(run_dir / f"evaluation-{name}.json")
    classes = evaluation["class_names"]
    matrix = evaluation["confusion_matrix"]
    known = {mistake["file"]: mistake.get("path") for mistake in evaluation.get("worst_mistakes") or ()}
    listed = run_dir / f"predictions-{name}.csv"
    found = _worst(listed, worst) if listed.exists() else []
    mistakes = [_with_picture(mistake, known.get(mistake.file), root) for mistake in found]
    shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
    large = len(classes) > TABLE_CLASSES
    bins = evaluation.get("calibration_bins") or ()
    return {
        "name": name,
        "evaluation": evaluation,
        "classes": classes,
        "matrix": matrix,
        "shares": shares,
        "heat_map": figures.heat_map(shares, x_label="predicted class", y_label="true class")
        if large
        else None,
        "even_log_loss": math.log(len(classes)),
        "confusions": _confusions(matrix, classes),
        "reliability": figures.reliability(bins) if any(one["count"] for one in bins) else None,
        "mistakes": mistakes,
        "num_mistakes": sum(map(sum, matrix)) - sum(matrix[number][number] for number in range(len(matrix))),
        "pictures_missing": sum(mistake.picture is None for mistake in mistakes),
    }


def _confusions(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """Return the most frequent confusions as (true, predicted, images, share of the true class)."""
    pairs = [
        (classes[row], classes[column], count, count / sum(counts))
        for row, counts in enumerate(matrix)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return heapq.nlargest(CONFUSIONS, pairs, key=lambda pair: (pair[2], pair[3]))


def _worst(path: Path, count: int) -> list[Mistake]:
    """Return the `count` most confident mistakes of a predictions file, the most confident first."""
    return heapq.nlargest(count, _mistakes(path), key=lambda mistake: mistake.probability)


def _mistakes(path: Path) -> Iterator[Mistake]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            if row["label"] != row["predicted"]:
                probability = float(row["probability"])
                image, label, predicted = (plain_cell(row[key]) for key in ("file", "label", "predicted"))
                yield Mistake(image, label, predicted, probability, row.get("path"))


def _with_picture(mistake: Mistake, path: str | None, root: Path) -> Mistake:
    try:
        picture = thumbnail(mistake.path or path or str(root / mistake.file))
    except (DataError, OSError) as error:
        return dataclasses.replace(mistake, missing=str(error))
    return dataclasses.replace(mistake, picture=picture)


def thumbnail(path: str) -> str:
    """Return an image as a small JPEG in a data URL, decoded by the same policy as for the network.

    Raises:
        DataError: The image is gone or cannot be decoded; the message is the reason.
    """
    from PIL import Image

    from tlcli.data.decode import decode
    from tlcli.data.image_files import DecodeError, read_bytes

    try:
        pixels = decode(read_bytes(path))
    except DecodeError as error:
        raise DataError(error.reason) from error
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
