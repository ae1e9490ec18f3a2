"""A run measured again: `evaluate` and `predict` compute what training measured, part by part."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.tiny import finetuned, tiny
from tlcli.cli.app import main
from tlcli.commands import evaluate as evaluating
from tlcli.commands import finetune as finetuning
from tlcli.commands.predict import Predictor
from tlcli.config.commands import EvaluateConfig, FinetuneConfig
from tlcli.data.dataset import Sample
from tlcli.data.folders import find_images
from tlcli.features.cache_decision import CachingDecision
from tlcli.metrics.evaluation import measure
from tlcli.metrics.scores import softmax
from tlcli.progress import Silent
from tlcli.runs.run import open_run
from tlcli.training import plan as planning

IMAGES = {"a": 10, "b": 10, "c": 10}
SCENARIOS = {
    "feature-extraction": {"folds": 2, "l2": "0.01"},
    "freeze": {"freeze": "3", "epochs": 2, "lr": "0.02"},
    "freeze, a head of two layers": {"freeze": "3", "epochs": 2, "lr": "0.02", "head": "mlp:8"},
    "freeze, rows in fp32": {"freeze": "3", "epochs": 2, "lr": "0.02", "cache_dtype": "fp32"},
    "freeze, mixed precision": {"freeze": "3", "epochs": 2, "lr": "0.02", "amp": "bf16"},
    "freeze, early stopping": {"freeze": "3", "epochs": 3, "lr": "0.02", "patience": 1, "ema": 0.5},
    "full": {"scenario": "full", "epochs": 2, "lr": "0.02"},
    "scratch": {"scenario": "scratch", "epochs": 2, "lr": "0.02"},
}


@pytest.fixture
def measured(monkeypatch):
    """Return the list of what is measured from now on: logits [n, C] and names of images."""
    found = []

    def measuring(logits, collection, *given, **named):
        found.append((logits.copy(), [sample.name for sample in collection.samples]))
        return measure(logits, collection, *given, **named)

    for module in (finetuning, evaluating):
        monkeypatch.setattr(module, "measure", measuring)
    return found


def run_of(folder, **options):
    fixed = {"batch_size": 8, "augment": "light"} if {"freeze", "scenario"} & options.keys() else {}
    return finetuned(tiny(FinetuneConfig, folder, **{**fixed, **options})).run_path


def evaluate(run, **options):
    config = EvaluateConfig(run=str(run), workers=2, **options)
    opened, plan = evaluating.plan_evaluate(config, Silent())
    evaluation, outcome = evaluating.evaluate(opened, plan, config, Silent())
    return evaluation.document, outcome, plan


def stored(run, split="val"):
    return json.loads((run / f"evaluation-{split}.json").read_text())


def rows_of(run):
    with (run / "predictions-val.csv").open(newline="") as file:
        return list(csv.DictReader(file))


CASES = [
    pytest.param(
        scenario, dtype, cache, marks=[] if dtype == "bf16" and cache == "always" else pytest.mark.slow
    )
    for scenario in SCENARIOS
    for dtype in ("fp32", "bf16")
    for cache in ("always", "never")
]


@pytest.mark.parametrize(("scenario", "dtype", "cache"), [*CASES, ("freeze", "fp32", "never")])
def test_what_training_measured_is_measured_again(folder, measured, scenario, dtype, cache):
    run = run_of(folder, **SCENARIOS[scenario], dtype=dtype, cache=cache)
    facts = json.loads((run / "run.json").read_text())
    frozen, trained = facts["backbone"]["num_frozen_units"], facts["scenario"] != "feature-extraction"
    assert facts["dtype"]["prefix"] == (dtype if frozen else None)
    assert facts["dtype"]["suffix"] == ("fp32" if trained else None)
    before, rows = stored(run), rows_of(run)
    document, _, _ = evaluate(run)
    (expected, names), (logits, again) = measured
    assert names == again
    assert np.array_equal(logits, expected)  # one machine, one thread a batch
    assert "stored" not in document
    assert {key: value for key, value in stored(run).items() if key in before} == before
    assert rows_of(run) == rows
    predictor = Predictor(open_run(str(run)))
    samples = [Sample(str(folder / name), name) for name in names]
    found = {item.file: dict(item.classes) for item in predictor.predict(samples, top=3)}
    for name, row in zip(names, softmax(expected), strict=True):
        predicted = [found[name][label] for label in facts["class_names"]]
        assert int(np.argmax(predicted)) == int(row.argmax())
        assert predicted == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"patience": 1, "epochs": 3}, {"amp": "bf16"}])
def test_the_epoch_that_is_kept_says_the_final_figures(folder, options):
    run = run_of(folder, **{**SCENARIOS["freeze"], "dtype": "bf16", **options})
    facts = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = facts["training"]["best_epoch"] or len(lines)
    (line,) = (line for line in lines if line["epoch"] == kept)
    assert line["val_accuracy"] == facts["metrics"]["val"]["top1_accuracy"]
    assert line["val_log_loss"] == pytest.approx(facts["metrics"]["val"]["log_loss"], rel=1e-5)


def test_rows_that_training_kept_at_the_cut_are_used_and_no_others_written(folder, measured, monkeypatch):
    run = run_of(folder, **SCENARIOS["freeze"], dtype="bf16", cache="always")
    _, outcome, plan = evaluate(run)
    assert (outcome.rows_computed, outcome.rows_reused) == (0, len(rows_of(run)))
    assert plan.store.entry is not None
    assert plan.store.entry.key == json.loads((run / "run.json").read_text())["cache_key"]
    monkeypatch.setenv("TLCLI_HOME", str(folder / "elsewhere"))
    _, outcome, plan = evaluate(run)
    assert (outcome.rows_computed, outcome.rows_reused) == (len(rows_of(run)), 0)
    assert plan.store.entry is None
    assert not (folder / "elsewhere").exists()
    trained, *others = [logits for logits, _ in measured]
    assert all(np.array_equal(logits, trained) for logits in others)


def test_a_run_that_kept_rows_before_the_cut_is_measured_the_same(folder, measured, monkeypatch):
    monkeypatch.setattr(planning, "decide", lambda *_, **__: CachingDecision("input", "forced"))
    run = run_of(folder, backbone="mobilenetv2_035", freeze="1", epochs=1, dtype="bf16")
    assert json.loads((run / "run.json").read_text())["recipe"]["caching"]["where"] == "input"
    evaluate(run)
    (expected, _), (logits, _) = measured
    assert np.array_equal(logits, expected)


# ---- what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["feature-extraction", "freeze", "full"])
def test_another_number_type_does_not_take_the_place_of_the_stored_figures(folder, caplog, scenario):
    run = run_of(folder, **SCENARIOS[scenario], dtype="fp32")
    before = (run / "evaluation-val.json").read_bytes(), (run / "predictions-val.csv").read_bytes()
    document, _, _ = evaluate(run, dtype="bf16")
    assert document["stored"] is False
    assert document["computed"] == {"device": "cpu", "prefix": "bf16", "suffix": None}
    assert "is kept: this one was computed in bf16 on cpu, the run's own in fp32 on cpu" in caplog.text
    assert before == ((run / "evaluation-val.json").read_bytes(), (run / "predictions-val.csv").read_bytes())
    document, _, _ = evaluate(run)
    assert "stored" not in document
    assert stored(run) == json.loads(json.dumps(document))


def test_other_images_or_another_device_do_not_either(folder, caplog):
    run = run_of(folder, **SCENARIOS["freeze"], dtype="fp32")
    before = stored(run)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "device": {"name": "cuda:0", "reason": "found"}}))
    assert evaluate(run)[0]["stored"] is False
    assert "the run's own in fp32 on cuda:0" in caplog.text
    (run / "run.json").write_text(json.dumps(facts))
    (folder / rows_of(run)[0]["file"]).unlink()
    document, _, _ = evaluate(run)
    assert document["stored"] is False
    assert "other images" in caplog.text
    assert stored(run) == before


def test_the_first_measurement_of_a_split_is_stored_and_the_runs_own_takes_its_place(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data / "train")
    shutil.copytree(folder, data / "val")
    shutil.copytree(folder, data / "test")
    run = run_of(data, **SCENARIOS["freeze"], dtype="fp32")
    assert "stored" not in evaluate(run, split="test", dtype="bf16")[0]
    assert stored(run, "test")["computed"]["prefix"] == "bf16"
    assert "stored" not in evaluate(run, split="test")[0]
    assert stored(run, "test")["computed"] == {"device": "cpu", "prefix": "fp32", "suffix": "fp32"}
    assert evaluate(run, split="test", dtype="bf16")[0]["stored"] is False


def test_figures_of_0_2_0_are_kept_unless_they_are_the_same(folder):
    run = run_of(folder, **SCENARIOS["freeze"], dtype="fp32")
    facts, before = json.loads((run / "run.json").read_text()), stored(run)
    del facts["dtype"]["prefix"], facts["dtype"]["suffix"]
    (run / "run.json").write_text(json.dumps(facts))
    old = {key: value for key, value in before.items() if key not in {"computed", "digest"}}
    (run / "evaluation-val.json").write_text(json.dumps({**old, "top1_accuracy": 0.123}))
    assert evaluate(run)[0]["stored"] is False
    assert stored(run)["top1_accuracy"] == 0.123
    (run / "evaluation-val.json").write_text(json.dumps(old))
    assert "stored" not in evaluate(run)[0]
    assert stored(run)["digest"] == before["digest"]


@pytest.mark.parametrize("scenario", ["feature-extraction", "freeze", "full"])
def test_the_plan_says_that_the_types_are_those_of_training(folder, run_cli, scenario):
    run = run_of(folder, **SCENARIOS[scenario], dtype="bf16")
    (line,) = (line for line in run_cli("evaluate", run).stderr.splitlines() if "computes on" in line)
    assert line.endswith(", as in training")
    assert "asked for" not in line
    assert ("up to unit 3, fp32 after it" in line) == (scenario == "freeze")
    assert "asked for" in run_cli("evaluate", run, "--dtype", "fp32").stderr


# ---- real ------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    "scenario", [("--freeze", "7"), ("--scenario", "full"), ("--scenario", "scratch"), ()]
)
@pytest.mark.parametrize("backbone", ["mobilenetv2_100.imagenet", "efficientnet_lite0.imagenet"])
def test_real_backbones_are_measured_again(real_assets, tmp_path, measured, backbone, scenario):
    run, data = tmp_path / "run", real_assets / "hymenoptera"
    options = (
        "--backbone",
        f"local-dir:{real_assets / backbone}",
        "--limit-per-class",
        "6",
        "--image-size",
        "96",
    )
    epochs = ("--epochs", "1") if scenario else ()
    assert (
        main(["finetune", str(data), *options, *scenario, *epochs, "-o", str(run), "--max-bad", "0.02"]) == 0
    )
    before = stored(run)
    assert main(["evaluate", str(run), "--max-bad", "0.02"]) == 0
    (expected, names), (logits, again) = measured
    assert names == again
    assert np.array_equal(logits.argmax(1), expected.argmax(1))
    assert np.abs(softmax(logits) - softmax(expected)).max() <= 1e-5
    assert stored(run)["top1_accuracy"] == before["top1_accuracy"]
    assert stored(run)["digest"] == before["digest"]
    samples = [
        item for item in find_images([str(data / "val")]) if item.name.removeprefix(f"{data}/") in names
    ]
    assert len(samples) == len(names)
    found = {
        item.file.removeprefix(f"{data}/"): dict(item.classes)
        for item in Predictor(open_run(str(run))).predict(samples, top=2, workers=2)
    }
    classes = json.loads((run / "run.json").read_text())["class_names"]
    for name, row in zip(names, softmax(expected), strict=True):
        predicted = [found[name][label] for label in classes]
        assert int(np.argmax(predicted)) == int(row.argmax())
        assert predicted == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"class_weights": "balanced"}, {"sampling": "balanced", "head": "mlp:8"}]
)
def test_a_head_that_was_adjusted_for_rare_classes_is_the_one_that_is_saved(
    make_images, tmp_path, measured, options
):
    folder = make_images(tmp_path / "uneven", {"a": 24, "b": 8, "c": 6})
    run = run_of(folder, **SCENARIOS["freeze"], **{"publish": "trained", "val_fraction": 0.3, **options})
    facts = json.loads((run / "run.json").read_text())
    adjustment = facts["training"]["logit_adjustment"]
    assert 0 <= adjustment["tau"] <= 1
    assert adjustment["values"][0] <= adjustment["values"][1] <= adjustment["values"][2]
    assert facts["training"]["selected_on"] == "val"
    evaluate(run)
    (expected, _), (logits, _) = measured
    assert np.array_equal(logits, expected)
