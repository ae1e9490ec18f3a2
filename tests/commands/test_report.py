"""The report page: self-contained, escaped, honest about what is missing."""

import csv
import html.parser
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tlcli.commands.report import report
from tlcli.config.commands import FinetuneConfig, ReportConfig
from tlcli.errors import DataError, UsageError
from tlcli.runs.directory import RunDirectory
from tlcli.training import recipe

EVIL = "<script>alert('x')</script>&\"{{7*7}}"


def write_measured(run_dir: Path, classes: list[str], per_class: int = 20, seed: int = 0) -> int:
    """Write a val evaluation whose predictions are right about four times in five; return its images."""
    generator = random.Random(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    rows, matrix = [], [[0] * len(classes) for _ in classes]
    for number, name in enumerate(classes):
        for index in range(per_class):
            right = generator.random() < 0.8
            guess = number if right else generator.randrange(len(classes))
            matrix[number][guess] += 1
            probability = generator.uniform(0.3, 0.99)
            rows.append((f"{name}/{index:03d}.png", name, classes[guess], f"{probability:.6f}"))
    with (run_dir / "predictions-val.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "label", "predicted", "probability"), *rows])
    total = len(classes) * per_class
    accuracy = sum(matrix[n][n] for n in range(len(classes))) / total
    evaluation = {
        "schema": "tlcli.evaluation/1",
        "split": "val",
        "num_images": total,
        "class_names": classes,
        "top1_accuracy": accuracy,
        "interval": {"low": accuracy - 0.05, "high": accuracy + 0.04, "method": "wilson"},
        "top5_accuracy": min(1.0, accuracy + 0.1),
        "top5_k": min(5, len(classes)),
        "macro_f1": accuracy - 0.01,
        "macro_f1_interval": {"low": accuracy - 0.06, "high": accuracy + 0.04, "method": "bootstrap"},
        "log_loss": 0.612,
        "expected_calibration_error": 0.043,
        "calibration_bins": [
            {
                "low": n / 10,
                "high": n / 10 + 0.1,
                "count": n,
                "confidence": n / 10 + 0.05 if n else None,
                "accuracy": n / 10 if n else None,
            }
            for n in range(10)
        ],
        "majority_baseline": 1 / len(classes),
        "per_class": [
            {"class_name": name, "precision": 0.8, "recall": 0.75, "f1": 0.77, "support": per_class}
            for name in classes
        ],
        "confusion_matrix": matrix,
        "worst_mistakes": [],
    }
    (run_dir / "evaluation-val.json").write_text(json.dumps(evaluation))
    return total


def write_run(run_dir: Path, data: Path, classes: list[str], per_class: int = 20) -> Path:
    """Write the files of a finished run of a head."""
    total = write_measured(run_dir, classes, per_class)
    grid = [
        {
            "kind": "head",
            "scaling": scaling,
            "l2": 10.0**power,
            "cv_top1_accuracy": 0.8 - 0.02 * abs(power + 2 + shift),
            "cv_log_loss": 0.5 + 0.05 * abs(power + 2 + shift),
        }
        for shift, scaling in enumerate(("plain", "standardised", "l2-normalised"))
        for power in range(-6, 3)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in grid))
    run = {
        "schema": "tlcli.run/1",
        "status": "done",
        "created": "2026-01-02T03:04:05Z",
        "tlcli_version": "0.1.0",
        "versions": {"torch": "2.10.0", "timm": "1.0.20"},
        "scenario": "feature-extraction",
        "backbone": {"name": "bundled", "architecture": "net", "license": "Apache-2.0", "source": "bundled"},
        "preprocess": {"image_size": [64, 64], "crop_pct": 1.0, "interpolation": "bicubic"},
        "class_names": classes,
        "data": {
            "path": str(data),
            "kind": "folder",
            "digest": "abc",
            "num_images": {"train": 4 * total, "val": total, "test": 0},
            "ignored": {"hidden": 2},
            "bad": 1,
        },
        "head": {
            "kind": "linear",
            "chosen": {"scaling": "plain", "l2": 0.01},
            "cv": {"top1_accuracy": 0.8, "log_loss": 0.5, "folds": 5},
        },
        "device": {"name": "cpu", "reason": "no GPU found"},
        "dtype": {"name": "bf16", "reason": "the CPU has AMX"},
        "seconds": {"features": 1.5, "head": 0.25, "total": 3.0},
        "metrics": {"val": {}},
        "trained_on": ["train"],
        "options": {},
        "cache_key": "0" * 64,
    }
    (run_dir / "run.json").write_text(json.dumps(run))
    return run_dir


def write_trained_run(run_dir: Path, data: Path, classes: list[str], **options: Any) -> Path:
    """Write the files of a finished run that trained units of the backbone."""
    config = FinetuneConfig(data=str(data), backbone="bundled", freeze="6", epochs=20, **options)
    resolved = recipe.resolve(config, num_train=240, has_batch_norm=True)
    epochs = [
        {
            "kind": "epoch",
            "epoch": number,
            "step": 8 * number,
            "lr": 1e-3 * (1 + math.cos(math.pi * number / resolved.epochs)),
            "train_loss": 0.5 + 1.5 / number,
            "train_accuracy": 0.95 - 0.6 / number,
            "val_log_loss": 0.3 + 1.2 / number + 0.01 * number,
            "val_accuracy": 0.97 - 0.4 / number - 0.002 * number,
            "seconds": 1.25,
        }
        for number in range(1, resolved.epochs + 1)
    ]
    facts = {
        "scenario": "freeze",
        "backbone": {"name": "bundled", "architecture": "net", "license": None, "source": "bundled",
                     "num_frozen_units": 6},
        "preprocess": {"image_size": [64, 64], "crop_pct": 1.0, "interpolation": "bicubic"},
        "class_names": classes,
        "data": {"path": str(data), "kind": "folder", "digest": "abc", "majority_class": 0,
                 "num_images": {"train": 240, "val": 60, "test": 0}, "ignored": {}},
        "device": {"name": "cpu", "reason": "no GPU found"},
        "dtype": {"name": "fp32", "reason": "asked for"},
        "options": {},
    }  # fmt: skip
    selected = "val" if resolved.select_on_val else None
    training = {
        "epochs": resolved.epochs,
        "steps": 8 * resolved.epochs,
        "lr": resolved.lr or 0.0012,
        "best_epoch": 9 if selected else None,
        "selected_on": selected,
        "probe": {"val_top1_accuracy": 0.72, "chosen": {"scaling": "plain", "l2": 0.01}},
    }
    with RunDirectory(run_dir, config, facts) as writer:
        writer.write_lines("metrics.jsonl", epochs)
        writer.finish(
            {
                "head": {"kind": "linear", "chosen": {}, "cv": None, "selected_on": selected, "stored": {}},
                "recipe": {
                    **resolved.document(),
                    "augmentation": {"version": 1, "mirror": "0.5", "trivial": False},
                    "num_views": None,
                    "caching": {"where": "cut", "reason": "cached at the cut: 64x8x8 bf16"},
                    "amp": "bf16",
                },
                "training": training,
                "trained_on": ["train"],
                "metrics": {"val": {}},
                "seconds": {"features": 3.0, "training": 25.0, "total": 31.0},
            }
        )
    write_measured(run_dir, classes)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path, make_images: Any) -> Path:
    """Return a finished run of three classes whose images exist."""
    data = make_images(tmp_path / "data", {"ant": 20, "bee": 20, "cat": 20})
    return write_run(tmp_path / "run", data, ["ant", "bee", "cat"])


class Page(html.parser.HTMLParser):
    """Collects elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action"}
        ]

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(run_dir: Path, **options: Any) -> str:
    return report(ReportConfig(run=str(run_dir), **options)).report_path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(run_dir: Path) -> None:
    text = page_of(run_dir)
    page = Page(text)
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[\w+/=\s]+", "", text))
    assert "script" not in page.tags
    assert {"link", "iframe", "object"}.isdisjoint(page.tags)


def test_the_page_has_every_part(run_dir: Path) -> None:
    page = Page(page_of(run_dir))
    for words in (
        *("Top-1 accuracy", "95 % interval", "60 images", "Majority-class baseline", "Confusion matrix"),
        *("Calibration", "Most confident mistakes", "Most frequent confusions", "Apache-2.0", "no GPU found"),
        *("cross-validation accuracy by l2", "cross-validation log loss by l2", "feature-extraction"),
        *("1 unreadable (bad_images.csv)", "2 hidden", "scaling plain, l2 0.01"),
    ):
        assert words in page.words
    assert page.tags.count("svg") == 3


def test_mistakes_are_the_most_confident_ones_with_their_images(run_dir: Path) -> None:
    with (run_dir / "predictions-val.csv").open() as file:
        wrong = [row for row in csv.DictReader(file) if row["label"] != row["predicted"]]
    wrong.sort(key=lambda row: -float(row["probability"]))
    assert len(wrong) > 3
    written = report(ReportConfig(run=str(run_dir), worst=3))
    text = written.report_path.read_text(encoding="utf-8")
    assert (written.num_mistakes, written.num_thumbnails) == (3, 3)
    assert re.findall(r'alt="([^"]*)"', text) == [row["file"] for row in wrong[:3]]


def test_images_that_are_gone_are_said_to_be_gone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    written = report(ReportConfig(run=str(run_dir)))
    assert written.num_mistakes > 0
    assert written.num_thumbnails == 0
    assert "no longer at its path" in written.report_path.read_text(encoding="utf-8")


def test_a_damaged_image_does_not_stop_the_report(run_dir: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"\x89PNG no more")
    assert report(ReportConfig(run=str(run_dir))).num_thumbnails == 0


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path / EVIL.replace("/", "_"), [EVIL, "bee"])
    text = page_of(run)
    assert "<script" not in text
    assert "{{7*7}}" in Page(text).words  # shown, neither run as HTML nor as a template


def test_a_name_that_is_no_unicode_is_shown_escaped(run_dir: Path) -> None:
    with (run_dir / "predictions-val.csv").open("ab") as file:
        file.write(b"ant/caf\xe9.png,ant,bee,0.999\n")
    assert "caf\\udce9.png" in page_of(run_dir)


def test_many_classes_are_drawn_as_a_heat_map(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(40)]
    text = page_of(write_run(tmp_path / "run", tmp_path, names, per_class=3))
    assert "predicted class" in text
    assert '<table class="confusion">' not in text


def test_the_same_run_gives_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    for path in (first, second):
        report(ReportConfig(run=str(run_dir), output=str(path)))
    assert first.read_bytes() == second.read_bytes()


def test_the_best_heads_are_listed_by_log_loss(run_dir: Path) -> None:
    heads = [
        {"kind": "head", "lr": n, "dropout": 0.5, "cv_top1_accuracy": n / 20, "cv_log_loss": n / 10}
        for n in range(20)
    ]
    random.Random(0).shuffle(heads)
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, heads)))
    text = page_of(run_dir)
    assert "Best heads of 20" in text
    assert re.findall(r"<tr><td>(\d+)</td><td>0.5</td>", text) == [str(n) for n in range(8)]


def test_epochs_become_curves(run_dir: Path) -> None:
    lines = [
        {"kind": "epoch", "epoch": n, "train_loss": 1 / n, "val_accuracy": 1 - 1 / n} for n in range(1, 9)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "ep')
    words = Page(page_of(run_dir)).words
    assert "Training: loss by epoch" in words
    assert "Training: accuracy by epoch" in words


def test_a_trained_backbone_has_curves_its_whole_recipe_and_the_probe_beside_it(
    tmp_path: Path, make_images: Any
) -> None:
    data = make_images(tmp_path / "data", {"ant": 20, "bee": 20, "cat": 20})
    run = write_trained_run(tmp_path / "run", data, ["ant", "bee", "cat"])
    text = page_of(run)
    page = Page(text)
    for words in ("accuracy by epoch", "loss by epoch", "learning rate by epoch"):
        assert f"Training: {words}" in page.words
    assert page.tags.count("svg") == 4
    for words in (
        *("Linear probe", "72.0 %", "linear probe, val", "units 1 to 6", "cached at the cut: 64x8x8 bf16"),
        *("Nothing was chosen on these images", "train accuracy", "val log loss"),
    ):
        assert words in page.words
    document = json.loads((run / "run.json").read_text())["recipe"]
    shown = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    names = {*document, *document["augmentation"]} - {"augmentation", "version", "caching"}
    assert set(shown) == {name.replace("_", " ") for name in names}
    assert (shown["mirror"], shown["num views"], shown["trivial"]) == ("0.5", "a new one every epoch", "no")
    assert float(shown["lr"]) == pytest.approx(document["lr"], rel=1e-3)
    assert shown["clip grad"] == "off"
    assert "ringed" not in page.words
    assert "Best heads" not in page.words


def test_a_rate_that_was_searched_for_is_shown(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", tmp_path, ["ant", "bee"], lr="auto")
    assert "<dt>lr</dt><dd>0.0012 (found by short trainings)</dd>" in page_of(run)


def test_an_epoch_chosen_on_val_is_ringed_and_said_to_flatter(tmp_path: Path) -> None:
    chosen = page_of(write_trained_run(tmp_path / "chosen", tmp_path, ["ant", "bee"], patience=3))
    plain = page_of(write_trained_run(tmp_path / "plain", tmp_path, ["ant", "bee"]))
    rings = [text.count("stroke-width: 1.4") for text in (chosen, plain)]
    assert rings[0] > rings[1]
    words = Page(chosen).words
    assert "Epoch 9 of 20 was kept because it did best on these images" in words
    assert "Everything was chosen inside train" not in words


def test_a_run_from_scratch_has_no_probe_and_nothing_frozen(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", tmp_path, ["ant", "bee"])
    facts = json.loads((run / "run.json").read_text())
    facts["scenario"] = "scratch"
    facts["backbone"]["num_frozen_units"] = 0
    facts["training"]["probe"] = facts["recipe"]["caching"] = None
    (run / "run.json").write_text(json.dumps(facts))
    words = Page(page_of(run)).words
    assert "linear probe" not in words.lower()
    assert "Frozen" in words
    assert "nothing" in words


def test_epochs_that_diverged_leave_gaps_not_errors(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", tmp_path, ["ant", "bee"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[3:]:
        line |= {"train_loss": None, "val_log_loss": None}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Training: loss by epoch" in Page(page_of(run)).words


def test_a_penalty_of_zero_and_a_value_that_is_not_finite_are_drawn_around(run_dir: Path) -> None:
    values = [(0.0, 0.7), (0.01, 0.8), (1.0, float("nan")), (10.0, None)]
    lines = [
        {"kind": "head", "scaling": "plain", "l2": l2, "cv_top1_accuracy": value} for l2, value in values
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "cross-validation accuracy by l2" in page_of(run_dir)


def test_a_run_without_an_evaluation_says_so(run_dir: Path) -> None:
    (run_dir / "evaluation-val.json").unlink()
    assert "has no evaluation" in Page(page_of(run_dir)).words


def test_after_a_refit_cross_validation_is_the_measure(run_dir: Path) -> None:
    (run_dir / "evaluation-val.json").unlink()
    run = json.loads((run_dir / "run.json").read_text())
    run["trained_on"] = ["train", "val"]
    interval = {"low": 0.7, "high": 0.9, "method": "wilson"}
    scores = {"top1_accuracy": 0.812, "interval": interval, "num_images": 90, "majority_baseline": 0.4}
    run["metrics"] = {"val": None, "cross_validation": scores}
    (run_dir / "run.json").write_text(json.dumps(run))
    words = Page(page_of(run_dir)).words
    assert "Estimated by cross-validation" in words
    assert "81.2 %" in words
    assert "has no evaluation" not in words


def test_a_split_that_was_trained_on_is_said_to_be_no_measure(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "trained_on": ["train", "val"]}))
    assert "trained on these images" in Page(page_of(run_dir)).words


def test_an_existing_report_is_replaced_and_nothing_else_is_left(run_dir: Path) -> None:
    before = set(run_dir.iterdir())
    for _ in range(2):
        report(ReportConfig(run=str(run_dir)))
    assert set(run_dir.iterdir()) - before == {run_dir / "report.html"}


# ---- refusals ---------------------------------------------------------------------------------------------


def test_no_run_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="RUN is missing"):
        report(ReportConfig())


@pytest.mark.parametrize("place", ["gone", "."])
def test_a_folder_that_is_no_run_is_a_data_error(place: str) -> None:
    with pytest.raises(DataError, match=r"does not exist|is no run"):
        report(ReportConfig(run=place))


def test_an_output_that_is_no_page_is_refused(run_dir: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"precious")
    with pytest.raises(UsageError, match="not a name for an HTML file"):
        report(ReportConfig(run=str(run_dir), output=str(photo)))
    assert photo.read_bytes() == b"precious"


def test_an_unfinished_run_is_refused(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "status": "running"}))
    with pytest.raises(DataError, match="'running', not done"):
        report(ReportConfig(run=str(run_dir)))


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"schema": "tlcli.run/1", "status": "done", "data": 3}'])
def test_a_damaged_run_is_a_data_error_not_a_bug(run_dir: Path, text: str) -> None:
    (run_dir / "run.json").write_text(text)
    with pytest.raises(DataError):
        report(ReportConfig(run=str(run_dir)))


@pytest.mark.parametrize("key", ["per_class", "confusion_matrix", "top1_accuracy", "log_loss"])
def test_a_damaged_evaluation_is_a_data_error_not_a_bug(run_dir: Path, key: str) -> None:
    path = run_dir / "evaluation-val.json"
    evaluation = json.loads(path.read_text())
    del evaluation[key]
    path.write_text(json.dumps(evaluation))
    with pytest.raises(DataError, match="cannot use"):
        report(ReportConfig(run=str(run_dir)))


# ---- the command line -------------------------------------------------------------------------------------


def test_the_command_prints_the_path(run_dir: Path, run_cli: Any) -> None:
    result = run_cli("report", run_dir)
    assert result.code == 0
    assert result.stdout.startswith(str(run_dir / "report.html"))


def test_the_command_gives_json(run_dir: Path, run_cli: Any) -> None:
    result = run_cli("report", run_dir, "--json", "--worst", 2)
    document = json.loads(result.stdout)
    assert document["schema"] == "tlcli.report/1"
    assert document["splits"] == ["val"]
    assert document["num_mistakes"] == document["num_thumbnails"] == 2
    assert document["num_bytes"] == Path(document["report_path"]).stat().st_size


def test_the_command_refuses_a_missing_run_with_an_empty_stdout(run_cli: Any) -> None:
    result = run_cli("report", "runs/gone")
    assert (result.code, result.stdout) == (3, "")
    assert "runs/gone" in result.stderr
