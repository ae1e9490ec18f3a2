"""`tlcli predict`."""

import csv
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import PredictConfig
from tlcli.warned import warn
from tlcli.wording import printable

if TYPE_CHECKING:
    from tlcli.commands.predict import Prediction


@command(
    PredictConfig,
    examples=(
        "tlcli predict runs/pets cat.jpg --top 3",
        "find photos -name '*.jpg' | tlcli predict runs/pets - --format csv",
    ),
)
def predict(out: Output, config: PredictConfig) -> None:
    """Name the classes of images; a bad image is reported and the rest predicted."""
    from tlcli.commands import predict as library

    found = []
    # stdout stays empty until an image could be used: a command that ends with an error writes nothing.
    waiting = [_csv_line(_columns(config.top))] if config.format == "csv" else []
    started = False
    for prediction in library.predict(config, sys.stdin):
        if prediction.error:
            warn("images_skipped", f"{printable(prediction.file)}: {prediction.error}")
        if config.format == "jsonl":
            waiting.append(json.dumps(_document(prediction)))
        elif config.format == "csv":
            waiting.append(_csv_line(_cells(prediction, config.top)))
        else:
            found.append(prediction)
        started = started or prediction.error is None
        if started:
            for line in waiting:
                out.write(line)
            waiting.clear()
    if config.format == "table":
        document = {
            "run_path": config.run,
            "num_images": len(found),
            "num_bad": sum(prediction.error is not None for prediction in found),
            "predictions": [_document(prediction) for prediction in found],
        }
        rows = [_cells(prediction, config.top) for prediction in found]
        out.result("predict", document, table(_columns(config.top), rows))


def _document(prediction: "Prediction") -> dict[str, Any]:
    if prediction.error:
        return {"file": prediction.file, "error": prediction.error}
    classes = [{"class_name": name, "probability": round(value, 6)} for name, value in prediction.classes]
    return {"file": prediction.file, "predictions": classes}


def _columns(top: int) -> list[str]:
    numbers = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    return [
        "file",
        *(f"{name}{number}" for number in numbers for name in ("predicted", "probability")),
        "error",
    ]


def _cells(prediction: "Prediction", top: int) -> list[str]:
    cells = [text for name, value in prediction.classes for text in (name, f"{value:.4f}")]
    return [prediction.file, *cells, *[""] * (2 * top - len(cells)), prediction.error or ""]


def _csv_line(cells: list[str]) -> str:
    from tlcli.data.listing import spreadsheet_cell

    line = io.StringIO()
    csv.writer(line).writerow(map(spreadsheet_cell, cells))  # \r\n, so that a name with either is quoted
    return line.getvalue().removesuffix("\r\n")
