"""The whole path on handwritten digits, without a network: what `tlcli demo` shows.

    images -> recommend -> extract -> finetune -> evaluate -> predict -> report, beside raw pixels

Every step calls the function that its command calls. The digits are scikit-learn's 1,797 of 8x8 pixels; its
documentation names 13 writers, and neighbours in its order look alike. The last fifth, as it comes, is val:
a shuffled val is easier. Logistic regression on raw pixels gets 0.96 to 0.99 there (three seeds), level
with the bundled backbone's, and 0.91 here.
"""

import json
import os
import shlex
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tlcli import __version__
from tlcli.commands import evaluate as evaluation
from tlcli.commands import extract as extraction
from tlcli.commands import finetune as finetuning
from tlcli.commands import predict as prediction
from tlcli.commands import recommend as recommendation
from tlcli.commands import report as reporting
from tlcli.config.commands import (
    DemoConfig,
    EvaluateConfig,
    ExtractConfig,
    FinetuneConfig,
    PredictConfig,
    RecommendConfig,
    ReportConfig,
)
from tlcli.errors import UsageError
from tlcli.machine import files
from tlcli.metrics.evaluation import headline
from tlcli.metrics.intervals import wilson_interval
from tlcli.metrics.significance import SIGNIFICANT, SignTest, sign_test
from tlcli.progress import Progress

MARKER = ".tlcli-demo"
MARKER_SCHEMA = "tlcli.demo-folder/1"
OWN = ("images", "run")  # all that an overwriting demo deletes

BACKBONE = "bundled"
SCENARIO: Literal["feature-extraction"] = "feature-extraction"
NUM_TRAIN = 1437  # of 1,797, in scikit-learn's order
IMAGE_PIXELS = 64  # side of the written images: eight times the original
SHOWN = ("2/1437.png", "3/1438.png", "4/1439.png", "5/1440.png")  # the first of val
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C: the inverse of an l2 penalty


@dataclass(frozen=True)
class Step:
    """One step of the demo.

    Attributes:
        name: What it is called; the command's name where it has one.
        explanation: What it does and why, for people.
        command: The command that does the same, ready to be pasted; None where there is none.
    """

    name: str
    explanation: str
    command: str | None = None


@dataclass(frozen=True)
class DemoPlan:
    """What `demo` will do.

    Attributes:
        config: As given.
        steps: In order.
    """

    config: DemoConfig
    steps: tuple[Step, ...]

    @property
    def folder(self) -> Path:
        """Return the demo's folder."""
        return Path(self.config.output)

    @property
    def images_dir(self) -> Path:
        """Return the folder of the written images."""
        return self.folder / "images"

    @property
    def run_dir(self) -> Path:
        """Return the run directory."""
        return self.folder / "run"

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {
            "images_path": str(self.images_dir),
            "run_path": str(self.run_dir),
            "steps": [{"name": step.name, "command": step.command} for step in self.steps],
        }


class Listener(Protocol):
    """Is told of every step before it begins, and of what came out."""

    def step(self, number: int, step: Step) -> None:
        """Hear of step `number`, from 1, before it begins."""

    def outcome(self, text: str) -> None:
        """Hear what came out of the step."""


class SilentListener:
    """A Listener that does nothing."""

    def step(self, number: int, step: Step) -> None:
        """Ignore a step."""

    def outcome(self, text: str) -> None:
        """Ignore an outcome."""


def _command_line(program: str, name: str, *words: str | Path) -> str:
    return " ".join([program, name, *(shlex.quote(_operand(word)) for word in words)])


def plan_demo(config: DemoConfig, *, program: str = "tlcli") -> DemoPlan:
    """Return the steps of the demo; nothing is written.

    Args:
        config: Where to write.
        program: How tlcli is called on this machine, for the commands to paste.

    Raises:
        UsageError: The folder exists, and is no unfinished demo, and --overwrite is not given or no demo
            made it.
        StorageError: The folder cannot be read.
    """
    _check_folder(config)
    images, run = Path(config.output) / "images", Path(config.output) / "run"
    hardware = ["--device", config.device] if config.device != "auto" else []
    hardware += ["--workers", str(config.workers)] if config.workers else []
    command = partial(_command_line, program)
    data: list[str | Path] = [images, "--backbone", BACKBONE, *hardware]
    shown = [images / "val" / name for name in SHOWN]
    steps = (
        Step(
            "images",
            "Write scikit-learn's 1,797 handwritten digits (8x8 pixels, enlarged to 64x64) as PNG files, a "
            "folder a class. The last 360 are val: they look less like the rest than a shuffled val would.",
        ),
        Step(
            "recommend",
            "Which scenario? The data set is small, and digits are not like photographs.",
            command("recommend", "--size", "small", "--similarity", "low", "--backbone", BACKBONE),
        ),
        Step(
            "extract",
            "Give every image to the frozen backbone once and keep what it says in the feature cache. "
            "The next step would do it by itself.",
            command("extract", *data),
        ),
        Step(
            "finetune",
            "Train 48 linear heads on the cached features and keep the one that cross-validation inside "
            "train prefers; val only measures. (--overwrite replaces a run that is there.)",
            command("finetune", *data, "--scenario", SCENARIO, "-o", run, "--overwrite"),
        ),
        Step(
            "evaluate",
            "Measure the run on val; --min-accuracy would turn this into a gate.",
            command("evaluate", run, *hardware),
        ),
        Step(
            "predict",
            "Name four digits the run was not trained on, with the second choice.",
            command("predict", run, *shown, "--top", "2", *hardware),
        ),
        Step("report", "Write a page about the run, with its mistakes.", command("report", run)),
        Step(
            "raw pixels",
            "For comparison, without any backbone: scikit-learn's logistic regression on the 64 raw pixel "
            "values, with the same train and val images and its C chosen inside train.",
        ),
    )
    return DemoPlan(config, steps)


def demo(plan: DemoPlan, progress: Progress, listener: Listener | None = None) -> dict[str, Any]:
    """Run the demo and return its result document.

    The folder's marker says `running` until the end, so that the same command takes up an interrupted demo.

    Args:
        plan: From `plan_demo`.
        progress: Told of every image.
        listener: Told of every step.

    Raises:
        UsageError: As `plan_demo`.
        StorageError: The folder or the feature cache cannot be written.
    """
    listener = listener or SilentListener()
    started = time.perf_counter()
    _prepare(plan)
    show = _Show(plan, progress)
    actions = (
        show.images, show.recommend, show.extract, show.finetune,
        show.evaluate, show.predict, show.report, show.raw_pixels,
    )  # fmt: skip
    seconds = {}
    for number, (step, act) in enumerate(zip(plan.steps, actions, strict=True), start=1):
        listener.step(number, step)
        begun = time.perf_counter()
        listener.outcome(act())
        seconds[step.name.replace(" ", "_")] = round(time.perf_counter() - begun, 3)
    _mark(plan.folder, "done")
    seconds["total"] = round(time.perf_counter() - started, 3)
    return {
        **show.document,
        "commands": [step.command for step in plan.steps if step.command],
        "seconds": seconds,
    }


def comparison(found: SignTest) -> dict[str, Any]:
    """Return how the backbone and raw pixels compare, for the result document."""
    return {
        "only_backbone_right": found.only_first,
        "only_raw_pixels_right": found.only_second,
        "p_value": found.p_value,
    }


def conclusion(document: dict[str, Any]) -> str:
    """Return what the comparison says, and what it does not.

    Args:
        document: With `comparison`, and `num_images.val`.
    """
    found = document["comparison"]
    ours, raw = found["only_backbone_right"], found["only_raw_pixels_right"]
    chance = f"(p = {found['p_value']:.2g} by the sign test)"
    counts = f"{ours} digits are right only with the backbone, {raw} only with raw pixels {chance}"
    if found["p_value"] >= SIGNIFICANT:
        verdict = f"{document['num_images']['val']} images do not tell the two apart"
    elif ours > raw:
        verdict = "the backbone helps here"
    else:
        verdict = "raw pixels are better here"
    return (
        f"{counts}: {verdict}. Digits are easy: small, centred, without background. With a shuffled val raw "
        "pixels alone get about 0.97, level with this backbone. Photographs are harder; try your own."
    )


class _Show:
    """The steps, each a method that adds to `document` and returns its outcome for people."""

    def __init__(self, plan: DemoPlan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._config = plan.config
        self._data = str(plan.images_dir)
        self._run = str(plan.run_dir)
        self._right: dict[str, bool] = {}
        self.document: dict[str, Any] = {"images_path": self._data, "run_path": self._run}

    def images(self) -> str:
        """Write the digits."""
        counts = write_digits(self._plan.images_dir, self._progress)
        self.document["num_images"] = counts
        return f"{counts['train']:,} train and {counts['val']:,} val images in {self._data}"

    def recommend(self) -> str:
        """Ask which scenario fits."""
        found = recommendation.recommend(RecommendConfig(size="small", similarity="low", backbone=BACKBONE))
        self.document["recommendation"] = {"scenario": found.scenario, "built": found.built}
        text = f"{found.scenario}: {found.reason}"
        if found.scenario != SCENARIO:
            text += f" The demo takes {SCENARIO}, the quick baseline to beat first."
        return text

    def extract(self) -> str:
        """Fill the feature cache."""
        config = ExtractConfig(
            data=self._data, backbone=BACKBONE, device=self._config.device, workers=self._config.workers
        )
        plan = extraction.plan_extract(config, self._progress)
        outcome = extraction.extract(config, plan, self._progress)
        self.document["features"] = outcome.document()
        return outcome.summary()

    def finetune(self) -> str:
        """Train the heads and write the run."""
        config = FinetuneConfig(
            data=self._data, backbone=BACKBONE, scenario=SCENARIO, output=self._run, overwrite=True,
            device=self._config.device, workers=self._config.workers,
        )  # fmt: skip
        result = finetuning.finetune(finetuning.plan_finetune(config, self._progress), self._progress)
        cv = result.document["head"]["cv"]
        return (
            f"{result.outcome.summary()}; accuracy {cv['top1_accuracy']:.3f} by cross-validation "
            "inside train, whose folds mix look-alikes: expect less on val"
        )

    def evaluate(self) -> str:
        """Measure the run."""
        config = EvaluateConfig(run=self._run, device=self._config.device, workers=self._config.workers)
        run, plan = evaluation.plan_evaluate(config, self._progress)
        found, outcome = evaluation.evaluate(run, plan, config, self._progress)
        metrics = headline(found.document)
        self.document["metrics"] = {"val": metrics}
        self._right = {
            Path(item["file"]).name: item["label"] == item["predicted"] for item in found.predictions
        }
        mistakes = found.document["num_mistakes"]
        return (
            f"{outcome.summary()}; accuracy {metrics['top1_accuracy']:.3f}, "
            f"{mistakes} of {metrics['num_images']} wrong"
        )

    def predict(self) -> str:
        """Name a few digits."""
        images = tuple(str(self._plan.images_dir / "val" / name) for name in SHOWN)
        config = PredictConfig(
            run=self._run, images=images, top=2, device=self._config.device, workers=self._config.workers
        )
        rows: list[dict[str, Any]] = []
        for item in prediction.predict(config):
            ranked = [{"class_name": name, "probability": round(value, 6)} for name, value in item.classes]
            rows.append({"file": item.file, "predictions": ranked})
        self.document["predictions"] = rows
        right = sum(row["predictions"][0]["class_name"] == Path(row["file"]).parent.name for row in rows)
        return f"{right} of {len(rows)} are right"

    def report(self) -> str:
        """Write the page."""
        written = reporting.report(ReportConfig(run=self._run))
        self.document["report_path"] = str(written.report_path)
        return f"open {written.report_path} in a browser"

    def raw_pixels(self) -> str:
        """Measure logistic regression without a backbone."""
        found, right = fit_raw_pixels()
        self.document["raw_pixels"] = found
        self.document["comparison"] = comparison(sign_test(self._right, right))
        self.document["conclusion"] = conclusion(self.document)
        return f"accuracy {found['top1_accuracy']:.3f} with C {found['C']:g}; {self.document['conclusion']}"


def write_digits(root: Path, progress: Progress) -> dict[str, int]:
    """Write scikit-learn's digits as root/train|val/CLASS/NUMBER.png and return the images of each split.

    The 8x8 values 0 to 16 become grey levels 0 to 255, enlarged eightfold by bicubic interpolation.

    Raises:
        StorageError: The files cannot be written.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_PIXELS, IMAGE_PIXELS)
    counts = {"train": 0, "val": 0}
    with _writing(root):
        for split in counts:
            for name in digits.target_names:
                (root / split / str(name)).mkdir(parents=True, exist_ok=True)
        progress.start("write images", len(levels))
        for number, (image, label) in enumerate(zip(levels, digits.target, strict=True)):
            split = "train" if number < NUM_TRAIN else "val"
            counts[split] += 1
            large = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
            large.save(root / split / str(label) / _file_name(number))
            progress.advance()
        progress.finish()
    return counts


def fit_raw_pixels() -> tuple[dict[str, Any], dict[str, bool]]:
    """Return how good logistic regression on the 64 raw pixels is, on the same train and val digits.

    C is chosen by 5-fold cross-validation inside train.

    Returns:
        Its accuracy with interval and C; and for each val file's name whether it was right.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # of scikit-learn

    digits = load_digits()
    pixels, labels = digits.data / 16, digits.target
    # Matrices this small gain nothing from threads, and on a busy machine threads that wait for each other
    # took minutes for what one does in two seconds.
    with threadpool_limits(limits=1):
        search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": list(STRENGTHS)}, cv=5)
        search.fit(pixels[:NUM_TRAIN], labels[:NUM_TRAIN])
        predicted = search.predict(pixels[NUM_TRAIN:])
    right = predicted == labels[NUM_TRAIN:]
    num_right, total = int(right.sum()), len(right)
    found = {
        "top1_accuracy": num_right / total,
        "interval": wilson_interval(num_right, total).document(),
        "num_images": total,
        "C": float(search.best_params_["C"]),
    }
    return found, {_file_name(NUM_TRAIN + index): bool(value) for index, value in enumerate(right)}


def _file_name(number: int) -> str:
    return f"{number:04d}.png"


def _operand(word: str | Path) -> str:
    """Return a word of a command line; a path that begins with a dash is no option."""
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)


def _check_folder(config: DemoConfig) -> None:
    """Refuse a folder that must not be written; an unfinished demo is taken up."""
    folder = Path(config.output)
    with _writing(folder):
        if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
            return
        status = _status(folder)
    if status is None:
        raise UsageError(
            f"{config.output!r} exists, and no demo made it; it is left alone.",
            hint="Choose another folder with -o.",
        )
    if status == "done" and not config.overwrite:
        raise UsageError(
            f"{config.output!r} holds an earlier demo.",
            hint="Choose another folder with -o, or add --overwrite to replace it.",
        )


def _status(folder: Path) -> str | None:
    """Return `running` or `done` as the marker of a demo's folder says, or None where there is none."""
    marker = folder / MARKER
    if folder.is_symlink() or marker.is_symlink() or not marker.is_file():
        return None
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("schema") != MARKER_SCHEMA:
        return None
    return "running" if found.get("status") == "running" else "done"


def _prepare(plan: DemoPlan) -> None:
    """Make the folder, or empty that of an earlier demo of what the demo made."""
    _check_folder(plan.config)
    with _writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
        _mark(plan.folder, "running")
        for name in OWN:
            path = plan.folder / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)


def _mark(folder: Path, status: str) -> None:
    document = {"schema": MARKER_SCHEMA, "status": status, "tlcli_version": __version__}
    with _writing(folder):
        files.publish(folder / MARKER, [json.dumps(document).encode("ascii") + b"\n"])


def _writing(folder: Path) -> AbstractContextManager[None]:
    """Turn an OSError of the block into a StorageError about the demo's folder."""
    return files.storage_errors(
        "write the demo in", folder, hint="Choose a folder that can be written with -o."
    )
