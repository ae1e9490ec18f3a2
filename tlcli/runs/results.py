"""Results beside a run: evaluations and predictions by split, and the lines of metrics.jsonl."""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

from tlcli.data.collection import Collection
from tlcli.data.listing import spreadsheet_cell
from tlcli.errors import DataError
from tlcli.features.extractor import Extractor
from tlcli.machine import files
from tlcli.metrics.evaluation import Evaluation
from tlcli.runs.directory import DISK_HINT

PARTS = ("prefix", "suffix")


def add_circumstances(evaluation: Evaluation, collection: Collection, extractor: Extractor) -> None:
    """Say in an evaluation what it was computed in and from: the device, the number types, the images."""
    evaluation.document["computed"] = {"device": str(extractor.device), **extractor.number_types}
    evaluation.document["digest"] = collection.digest()


def why_kept(run_dir: Path, split: str, found: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return why an evaluation must not take the place of the stored one of its split; "" where it may.

    The first of a split is stored, later ones where they are of the same images and computed as the run was.

    Args:
        run_dir: Of the run.
        split: What was measured.
        found: The document of the evaluation.
        facts: run.json.
    """
    path = run_dir / f"evaluation-{split}.json"
    if not path.exists():
        return ""
    stored = read_json(path)
    if "digest" not in stored or "prefix" not in facts["dtype"]:  # of 0.2.0, which stored neither
        same = all(stored.get(name) == found[name] for name in ("num_images", "top1_accuracy"))
        return "" if same else "this one has other figures"
    if found["digest"] != stored["digest"]:
        return "this one is of other images"
    own = {"device": facts["device"]["name"], **{name: facts["dtype"][name] for name in PARTS}}
    if found["computed"] == own:
        return ""
    return f"this one was computed in {_words(found['computed'])}, the run's own in {_words(own)}"


def _words(computed: dict[str, Any]) -> str:
    parts = " and ".join(dict.fromkeys(computed[name] for name in PARTS if computed[name]))
    return f"{parts} on {computed['device']}"


def write_evaluation(run_dir: Path, split: str, evaluation: Evaluation) -> None:
    """Write evaluation-SPLIT.json and predictions-SPLIT.csv (with texts as `spreadsheet_cell` has them)."""
    text = json.dumps(evaluation.document, indent=2, allow_nan=False) + "\n"
    table = io.StringIO()
    writer = csv.DictWriter(
        table, ["file", "label", "predicted", "probability"], lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    for item in evaluation.predictions:
        texts = {name: spreadsheet_cell(item[name]) for name in ("file", "label", "predicted")}
        writer.writerow({**item, **texts})
    for name, content in ((f"evaluation-{split}.json", text), (f"predictions-{split}.csv", table.getvalue())):
        with files.storage_errors("write", run_dir / name, hint=DISK_HINT):
            files.publish(run_dir / name, [content.encode("utf-8", "surrogateescape")])


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: It cannot be read, or holds no object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise DataError(f"{str(path)!r} holds a {type(document).__name__}, not an object.")
    return document


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; [] when it does not exist. A torn last line is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines
