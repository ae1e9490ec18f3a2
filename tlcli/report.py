"""A run as one self-contained HTML page.

In comes a run directory and, for thumbnails, the images it was measured on, where they still exist; out goes
report.html, which refers to nothing outside itself. Nothing is computed again: the page shows what run.json,
metrics.jsonl, evaluation-<split>.json and predictions-<split>.csv say.
"""

import base64
import contextlib
import csv
import dataclasses
import heapq
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tlcli import figures
from tlcli.cache import files
from tlcli.config import ReportConfig
from tlcli.data.listing import plain_cell
from tlcli.errors import DataError, StorageError, UsageError
from tlcli.runs import open_run

SPLITS = ("val", "test", "train")
THUMBNAIL_PIXELS = 160
TABLE_CLASSES = 20  # a confusion matrix of more classes is drawn as a heat map
CONFUSIONS = 15
BEST_HEADS = 8


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        report_path: The HTML file.
        num_bytes: Its size.
        splits: The splits it shows.
        num_mistakes: Mistakes shown, over all splits.
        num_thumbnails: How many of them have their image.
    """

    report_path: Path
    num_bytes: int
    splits: tuple[str, ...]
    num_mistakes: int
    num_thumbnails: int


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


def report(config: ReportConfig) -> Report:
    """Write the report of a run.

    Raises:
        UsageError: No run is named, or the output is not a name for an HTML file.
        DataError: The run directory is missing, unfinished or unreadable.
        StorageError: The page cannot be written.
    """
    run = open_run(config.run)
    output = _output(config, run.path)
    facts = run.facts
    try:
        root = _data_root(facts)
        splits = [
            _split(run.path, name, root, config.worst)
            for name in SPLITS
            if (run.path / f"evaluation-{name}.json").exists()
        ]
        lines = _read_lines(run.path / "metrics.jsonl")
        page = _render(
            run=facts,
            name=run.path.resolve().name,
            facts=_facts(facts),
            cross_validation=facts["metrics"].get("cross_validation"),
            trained_on=facts["trained_on"],
            tuned=_tuned(facts),
            recipe=_recipe(facts),
            training=_training_figures(lines, facts),
            ringed=_chosen(facts["head"]) is not None,
            num_heads=sum(line.get("kind") == "head" for line in lines),
            best_heads=_best_heads(lines),
            splits=splits,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"Run {str(run.path)!r} holds a file this version of tlcli cannot use: {error!r}.",
            hint=f"tlcli {facts.get('tlcli_version')} wrote it; measure it again: tlcli evaluate {run.path}",
        ) from error
    _write(output, page)
    mistakes = [mistake for split in splits for mistake in split["mistakes"]]
    return Report(
        report_path=output,
        num_bytes=output.stat().st_size,
        splits=tuple(split["name"] for split in splits),
        num_mistakes=len(mistakes),
        num_thumbnails=sum(mistake.picture is not None for mistake in mistakes),
    )


# ---- reading the run --------------------------------------------------------------------------------------


def _output(config: ReportConfig, run_dir: Path) -> Path:
    output = Path(config.output).expanduser() if config.output else run_dir / "report.html"
    if output.suffix.lower() not in {".html", ".htm"} or output.is_dir():
        raise UsageError(
            f"--output {str(output)!r} is not a name for an HTML file.",
            hint="Expected a name that ends in .html.",
        )
    return output


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise DataError(f"{str(path)!r} holds a {type(document).__name__}, not an object.")
    return document


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; [] when it does not exist. A torn last line is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def _data_root(run: Mapping[str, Any]) -> Path:
    path = Path(run["data"]["path"])
    return path.parent if path.is_file() else path


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run was made of and with, as name and text; facts that a run lacks are left out."""
    data, backbone, head = run["data"], run["backbone"], run["head"]
    counts = ", ".join(f"{count:,} {split}" for split, count in data["num_images"].items() if count)
    ignored = ", ".join(f"{count} {reason}" for reason, count in (data.get("ignored") or {}).items())
    device, dtype = run.get("device") or {}, run.get("dtype") or {}
    facts = [
        ("Data", data["path"]),
        ("Images", counts),
        (
            "Left out",
            "; ".join(text for text in (_bad(data.get("bad")), ignored and f"ignored: {ignored}") if text),
        ),
        ("Classes", str(len(run["class_names"]))),
        ("Backbone", backbone["name"]),
        ("Architecture", backbone.get("architecture")),
        ("Licence of the backbone", backbone.get("license") or "not stated; ask its publisher"),
        ("Scenario", run["scenario"]),
        ("Frozen", _frozen(run)),
        ("Frozen part", ((run.get("recipe") or {}).get("caching") or {}).get("reason")),
        ("Head", _plain({"kind": head.get("kind"), **(head.get("chosen") or {})})),
        ("Cross-validation in train", _plain(head.get("cv") or {})),
        ("Preprocessing", _plain(run.get("preprocess") or {})),
        ("Device", _because(device.get("name"), device.get("reason"))),
        ("Compute type", _because(dtype.get("name"), dtype.get("reason"))),
        ("Seconds", _plain(run.get("seconds") or {})),
        ("Made", f"{run.get('created', '')} with tlcli {run.get('tlcli_version', '')}"),
        ("Versions", _plain(run.get("versions") or {})),
        ("Digest of the data", data.get("digest")),
    ]
    return [(name, str(text)) for name, text in facts if text]


def _bad(bad: Any) -> str:
    count = bad if isinstance(bad, int) else len(bad or ())
    return f"{count} unreadable (bad_images.csv)" if count else ""


def _because(what: Any, reason: Any) -> str:
    return f"{what} ({reason})" if what and reason else str(what or "")


def _plain(values: Mapping[str, Any]) -> str:
    """Return a small mapping as text: `scaling plain, l2 0.01`."""
    return ", ".join(
        f"{str(name).replace('_', ' ')} {_text(value)}"
        for name, value in values.items()
        if value is not None and not isinstance(value, dict)
    )


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(item, int) for item in value) else " ").join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


# ---- one split --------------------------------------------------------------------------------------------


def _split(run_dir: Path, name: str, root: Path, worst: int) -> dict[str, Any]:
    """Return what the page shows of one split."""
    evaluation = _read_json(run_dir / f"evaluation-{name}.json")
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

    from tlcli.data.decode import DecodeError, decode, read_bytes

    try:
        pixels = decode(read_bytes(path))
    except DecodeError as error:
        raise DataError(error.reason) from error
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ---- how the backbone was trained -------------------------------------------------------------------------


def _tuned(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page says of a run that trained units of the backbone; None for a head alone."""
    training = run.get("training")
    if not training:
        return None
    best = training.get("best_epoch")
    return {
        "probe": (training.get("probe") or {}).get("val_top1_accuracy"),
        "selected_on": training.get("selected_on"),
        "best_epoch": best,
        "epochs": training["epochs"],
    }


def _frozen(run: Mapping[str, Any]) -> str | None:
    if run["scenario"] == "feature-extraction":
        return None  # the scenario's name says it
    count = run["backbone"].get("num_frozen_units")
    return f"units 1 to {count}" if count else "nothing"


def _recipe(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every value of the training as name and text; [] for a head alone."""
    recipe = dict(run.get("recipe") or {})
    recipe.pop("caching", None)  # among the facts
    augmentation = recipe.pop("augmentation", None) or {}
    settings = {**recipe, **{name: value for name, value in augmentation.items() if name != "version"}}
    found = {name: _setting(name, value) for name, value in settings.items()}
    if "lr" in recipe and recipe["lr"] is None:
        found["lr"] = f"{_text(run['training']['lr'])} (range test)"
    return [(name.replace("_", " "), text) for name, text in found.items()]


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "a new one every epoch" if name == "num_views" else "off"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else _text(value)


# ---- curves of the training -------------------------------------------------------------------------------


def _training_figures(lines: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (title, SVG) of the grid of heads, or of the epochs."""
    head, tuned = run["head"], _tuned(run) or {}
    heads = [line for line in lines if line.get("kind") == "head" and "l2" in line and "scaling" in line]
    epochs = [line for line in lines if "epoch" in line]
    found = []
    for key, title in (("cv_top1_accuracy", "accuracy"), ("cv_log_loss", "log loss")):
        if drawn := _grid_lines(heads, key):
            svg = figures.curves(
                drawn,
                x_label="l2 penalty",
                y_label=f"cross-validation {title}",
                log_x=True,
                mark=_chosen(head),
            )
            found.append((f"Heads: cross-validation {title} by l2 and scaling", svg))
    best, probe = tuned.get("best_epoch"), tuned.get("probe")
    for word, title, chosen in (
        ("accuracy", "accuracy", "val accuracy"),
        ("loss", "loss", "val log loss"),
        ("lr", "learning rate", None),
    ):
        if drawn := _epoch_lines(epochs, word):
            svg = figures.curves(
                drawn,
                x_label="epoch",
                y_label=title,
                mark=(chosen, float(best)) if chosen and best else None,
                level=("linear probe, val", float(probe)) if word == "accuracy" and probe else None,
            )
            found.append((f"Training: {title} by epoch", svg))
    return found


def _best_heads(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the best heads of the grid by cross-validation log loss: column names and rows of text."""
    heads = [line for line in lines if line.get("kind") == "head" and _finite(line.get("cv_log_loss"))]
    best = heapq.nsmallest(BEST_HEADS, heads, key=lambda head: head["cv_log_loss"])
    keys = [key for key in dict.fromkeys(key for head in best for key in head) if key != "kind"]
    names = [key.replace("cv_", "").replace("_", " ") for key in keys]
    return names, [[_text(head.get(key)) for key in keys] for head in best]


def _chosen(head: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the scaling and l2 of the chosen head, or None for a head without them."""
    chosen = head.get("chosen") or {}
    return (str(chosen["scaling"]), float(chosen["l2"])) if {"scaling", "l2"} <= set(chosen) else None


def _grid_lines(heads: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    lines = defaultdict(list)
    for head in heads:
        if _finite(head.get(key)):
            lines[str(head["scaling"])].append((float(head["l2"]), float(head[key])))
    return dict(lines)


def _epoch_lines(epochs: Sequence[Mapping[str, Any]], word: str) -> dict[str, list[tuple[float, float]]]:
    """Return a line for every value of the epochs whose name ends in `word`."""
    lines = defaultdict(list)
    for epoch in epochs:
        for key, value in epoch.items():
            if key.endswith(word) and _finite(value):
                lines[key.replace("_", " ")].append((float(epoch["epoch"]), float(value)))
    return dict(lines)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- writing ----------------------------------------------------------------------------------------------


def _render(**values: Any) -> str:
    """Return the page. Everything from the run is escaped; only our own figures are markup."""
    import jinja2

    template = resources.files("tlcli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3f}"
    environment.filters["printable"] = _printable
    try:
        return environment.from_string(template).render(**values)
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from error


def _printable(text: object) -> str:
    """Return `text` with control characters and bytes that are no UTF-8 as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in str(text)
    )


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.publish(path, [page.encode("utf-8")])
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error.strerror}.",
            hint="Name another place with -o FILE.html.",
        ) from error
