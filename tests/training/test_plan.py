"""Scenarios that train the backbone: frozen means frozen, cached equals fresh, a run is what was trained."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.tiny import finetuned, tiny
from tlcli.backbones.units import units
from tlcli.backbones.zoo import load_backbone
from tlcli.commands.evaluate import evaluate, plan_evaluate
from tlcli.commands.finetune import plan_finetune
from tlcli.commands.predict import Predictor
from tlcli.config.commands import EvaluateConfig, FinetuneConfig
from tlcli.errors import DataError, Interrupted, UsageError
from tlcli.progress import Silent
from tlcli.runs.run import open_run

ROOT = Path(__file__).parents[2]
UNITS = 5  # of test_resnet


IMAGES = {"a": 12, "b": 12, "c": 12}


def config(folder, **options):
    fixed = {
        "folds": 2, "head_init": "probe", "epochs": 2, "batch_size": 8, "freeze": "3", "amp": "none",
        "augment": "light", "views": 2, "publish": "trained", "lr": "0.002",
    }  # fmt: skip
    return tiny(FinetuneConfig, folder, **{**fixed, **options})


def run(folder, progress=None, **options):
    return finetuned(config(folder, **options), progress)


def weights_of(result):
    return open_run(str(result.run_path)).backbone().model.state_dict()


def lines_of(result):
    return [json.loads(line) for line in (result.run_path / "metrics.jsonl").read_text().splitlines()]


# ---- the scenarios ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scenario", "frozen"),
    [
        ({"freeze": "3"}, "freeze", 3),
        ({"freeze": None, "scenario": "freeze"}, "freeze", 3),
        ({"freeze": "none", "views": None}, "full", 0),
        ({"freeze": None, "scenario": "full", "views": None}, "full", 0),
        ({"freeze": None, "scenario": "scratch", "views": None, "head_init": "auto"}, "scratch", 0),
    ],
)
def test_a_scenario_trains_its_units_and_no_others(folder, options, scenario, frozen):
    result = run(folder, **options)
    assert result.document["scenario"] == scenario
    facts = json.loads((result.run_path / "run.json").read_text())
    assert facts["backbone"]["num_frozen_units"] == frozen
    assert facts["status"] == "done"
    assert facts["recipe"] == result.document["recipe"]
    assert not (result.run_path / "checkpoints").exists()
    before = load_backbone(config(folder)).model
    after = weights_of(result)
    unit_of = {name: unit.index for unit in units(before) for name in (*unit.parameters, *unit.buffers)}
    for name, value in before.state_dict().items():
        if unit_of[name] <= frozen:
            assert torch.equal(after[name], value), name
    moved = {
        unit_of[name] for name, value in before.named_parameters() if not torch.equal(after[name], value)
    }
    assert moved == set(range(frozen + 1, UNITS + 1))
    started = [] if scenario == "scratch" else [0]
    assert [line["epoch"] for line in lines_of(result)] == [*started, 1, 2]
    json.dumps(result.document, allow_nan=False)


def test_easy_images_are_learnt(folder):
    result = run(folder, freeze="1", epochs=15, head_init="random", norm="train")
    assert result.document["metrics"]["val"]["top1_accuracy"] >= 0.8
    lines = lines_of(result)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert "train_loss" in lines[0]  # from a random head: no epoch 0


def test_two_thirds_are_frozen_without_a_number_and_that_is_said(folder):
    plan = plan_finetune(config(folder, freeze=None, scenario="freeze"), Silent())
    assert "two thirds" in " ".join(plan.notes)


def test_scratch_says_what_it_costs_and_asks_no_hub(folder):
    plan = plan_finetune(
        config(
            folder,
            backbone="resnet18",
            random_init=False,
            freeze=None,
            scenario="scratch",
            views=None,
            head_init="auto",
        ),
        Silent(),
    )
    assert [warning["code"] for warning in plan.warnings] == ["no_pretraining"]


@pytest.mark.parametrize(
    "options",
    [
        {"scenario": "full", "freeze": "3"}, {"scenario": "scratch", "freeze": "3", "head_init": "auto"},
        {"scenario": "freeze", "freeze": "all"}, {"freeze": "5"}, {"freeze": "6"}, {"freeze": "x"},
        {"opt": "nosuch"}, {"refit": True}, {"lr": "0.1,0.2"}, {"amp": "fp16"},
        {"scenario": "scratch", "freeze": None, "weights": "w.pth", "head_init": "auto"},
    ],
)  # fmt: skip
def test_contradictions_are_usage_errors_before_anything_is_written(folder, tmp_path, options):
    with pytest.raises(UsageError):
        plan_finetune(config(folder, output=str(tmp_path / "run"), **options), Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"opt": "sgd"}, {"views": 4}, {"augment": "medium"}, {"ema": 0.9}])
def test_options_of_training_are_refused_where_the_backbone_is_frozen(folder, options):
    with pytest.raises(UsageError, match="belongs to training"):
        FinetuneConfig(data=str(folder), **options)
    FinetuneConfig(data=str(folder), augment="none")


# ---- cached and live -------------------------------------------------------------------------------------


def test_cached_rows_and_recomputed_ones_train_the_same_network(folder):
    cached = run(folder, cache="always")
    live = run(folder, cache="never")
    assert cached.document["features"]["rows_computed"] > 0
    one, other = weights_of(cached), weights_of(live)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert cached.document["metrics"] == live.document["metrics"]


def test_a_second_run_computes_no_row_and_gives_the_same(folder):
    first, second = run(folder, cache="always"), run(folder, cache="always")
    assert second.document["features"]["rows_computed"] == 0
    one, other = weights_of(first), weights_of(second)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_views_later_recompute_none_of_the_old(folder):
    first = run(folder, cache="always", views=2)
    second = run(folder, cache="always", views=3)
    train, val = (first.document["num_images"][name] for name in ("train", "val"))
    assert first.document["features"]["rows_computed"] == 2 * train + val
    assert second.document["features"]["rows_computed"] == train


def test_views_and_order_follow_their_own_seeds(folder):
    plain, other_seed = run(folder, cache="always"), run(folder, cache="always", seed=1)
    assert other_seed.document["features"]["rows_computed"] == 0
    other_views = run(folder, cache="always", view_seed=1)
    assert other_views.document["features"]["rows_computed"] > 0
    heads = [weights_of(result) for result in (plain, other_seed, other_views)]
    assert not torch.equal(heads[0]["layer4.0.conv1.weight"], heads[1]["layer4.0.conv1.weight"])
    assert not torch.equal(heads[0]["layer4.0.conv1.weight"], heads[2]["layer4.0.conv1.weight"])


# ---- the run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"freeze": "none", "views": None}, {"head": "mlp:8"}])
def test_a_run_is_what_was_trained(folder, options):
    result = run(folder, **options)
    measured, _ = evaluate(
        *plan_evaluate(EvaluateConfig(run=str(result.run_path), workers=2), Silent()),
        EvaluateConfig(run=str(result.run_path), workers=2), Silent(),
    )  # fmt: skip
    val = result.document["metrics"]["val"]
    assert measured.document["log_loss"] == val["log_loss"]
    assert measured.document["num_images"] == val["num_images"]


def test_a_tuned_run_is_a_timm_network(folder):
    result = run(folder)
    network = timm.create_model(f"local-dir:{result.run_path}", pretrained=True).eval()
    predictor = Predictor(open_run(str(result.run_path)), dtype="fp32")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(predictor.extractor.normalise(images))
    torch.testing.assert_close(predictor.logits(images), expected, rtol=1e-3, atol=1e-4)


def test_the_probe_is_told_and_used(folder):
    result = run(folder)
    probe = result.document["training"]["probe"]
    assert 0 <= probe["val_top1_accuracy"] <= 1
    assert run(folder, head_init="random").document["training"]["probe"] is None


@pytest.mark.parametrize(
    ("options", "text"),
    [({"publish": "auto"}, "better on val"), ({}, "--publish trained"),
     ({"publish": "auto", "select_fraction": 0.25}, "25 % of the training images, held out")],
)  # fmt: skip
def test_the_plan_says_what_decides_which_network_is_published(folder, options, text):
    plan = plan_finetune(config(folder, **options), Silent())
    assert text in plan.summary()["publishes"]
    assert plan.document()["select_fraction"] == options.get("select_fraction", 0.0)
    assert "publishes" not in plan_finetune(config(folder, head_init="random"), Silent()).summary()


def test_what_val_selected_is_labelled(folder):
    assert run(folder, publish="auto").document["training"]["selected_on"] == "val"
    assert run(folder).document["training"]["selected_on"] is None
    assert run(folder, head_init="random").document["training"]["selected_on"] is None
    result = run(folder, patience=1, epochs=3)
    assert result.document["training"]["selected_on"] == "val"
    assert result.document["training"]["best_epoch"] >= 1


def test_bad_images_are_skipped_and_too_many_are_refused(folder):
    (folder / "a" / "bad.png").write_bytes(b"no image")
    options = {"freeze": "none", "head_init": "random", "views": None}
    result = run(folder, max_bad=0.1, **options)
    assert result.document["features"]["images_skipped"] == 1
    assert "bad.png" in (result.run_path / "bad_images.csv").read_text()
    with pytest.raises(DataError):
        run(folder, max_bad=0.0, **options)


# ---- resuming --------------------------------------------------------------------------------------------


class Stopping(Silent):
    """Ends the training at a step, as a signal would."""

    def __init__(self, step):
        self.left = step

    def describe(self, text):
        self.left -= 1
        if self.left == 0:
            raise Interrupted(15)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, step):
    options = {"cache": "always", "checkpoint_minutes": 0.0}
    whole = run(folder, output=str(tmp_path / "whole"), **options)
    output = str(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(folder, Stopping(step + 1), output=output, resume=True, **options)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    with pytest.raises(UsageError, match="weight"):
        run(folder, output=output, resume=True, weight_decay=0.5, **options)
    resumed = run(folder, output=output, resume=True, **options)
    one, other = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.document["metrics"] == whole.document["metrics"]
    with pytest.raises(UsageError, match="done"):
        run(folder, output=output, resume=True, **options)


def test_a_stored_configuration_repeats_the_run(folder, run_cli):
    result = run(folder, cache="always")
    again = run_cli("finetune", "--config", result.run_path / "config.yaml", "-o", "again", "--json")
    assert again.code == 0, again.stderr
    document = json.loads(again.stdout)
    assert document["metrics"] == result.document["metrics"]
    assert document["scenario"] == "freeze"


def test_the_plan_stops_before_training(folder, run_cli):
    options = ("--backbone", "test_resnet", "--random-init", "--image-size", "32", "--freeze", "3")
    plan = run_cli("finetune", folder, *options, "--dry-run", "--json")
    assert plan.code == 0, plan.stderr
    document = json.loads(plan.stdout)
    assert document["recipe"]["scenario"] == "freeze"
    assert document["caching"]["where"] in {"cut", "recompute"}
    assert dataclasses.asdict(config(folder))["freeze"] == "3"


# ---- several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--freeze", "3", "--cache", "always"), ("--freeze", "none")])
def test_two_processes_train_as_well_as_one(folder, tmp_path, run_cli, options):
    common = [
        "finetune", folder, "--backbone", "test_resnet", "--random-init", "--image-size", "32", "--json",
        "--epochs", "12", "--batch-size", "8", "--lr", "0.003", "--norm", "frozen", "--amp", "none", *options,
    ]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tlcli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launch, *map(str, common), "-o", str(tmp_path / "two")]
    done = subprocess.run(words, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one document: the other process prints nothing
    one = json.loads(run_cli(*common, "-o", tmp_path / "one").stdout)
    assert two["num_images"] == one["num_images"]
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert abs(two["metrics"]["val"]["top1_accuracy"] - one["metrics"]["val"]["top1_accuracy"]) <= 0.4
    measured = json.loads(run_cli("evaluate", tmp_path / "two", "--json").stdout)
    assert measured["log_loss"] == pytest.approx(two["metrics"]["val"]["log_loss"], rel=0.05)


def test_a_dry_run_times_no_batch_and_writes_nothing(tmp_path, make_images, monkeypatch, run_cli):
    """With enough images for --cache auto to measure, which writes trial rows: a mere plan leaves it open."""
    folder = make_images(tmp_path / "many", {"a": 110, "b": 110}, size=(8, 8))
    monkeypatch.setattr("tlcli.features.cache_decision.measure_costs", None)
    before = sorted(Path.cwd().parent.rglob("*"))
    words = ("--backbone", "test_resnet", "--random-init", "--image-size", "32", "--freeze", "2", "-j", "2")
    done = run_cli("finetune", folder, *words, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["caching"]["where"] == "undecided"
    assert "trial" in document["caching"]["reason"]
    assert document["rows_to_compute"] > 0
    assert "by a trial" in done.stderr
    assert sorted(Path.cwd().parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("scenario", "traces"), [("freeze", 2), ("full", 0), ("scratch", 0), ("feature-extraction", 0)]
)
def test_planning_loads_cuts_and_hashes_a_network_once(folder, tmp_path, monkeypatch, scenario, traces):
    from tlcli.backbones import cut, timm_zoo
    from tlcli.features import extractor

    calls, hashed = [], []

    def counted(module, name):
        real = getattr(module, name)

        def call(*given, **named):
            calls.append(name)
            if name == "state_sha256" and list(given[0].parameters()):  # not a prefix of nothing
                hashed.append(given[0])
            return real(*given, **named)

        monkeypatch.setattr(module, name, call)

    for module, name in ((timm_zoo, "_create"), (cut, "trace"), (extractor, "state_sha256")):
        counted(module, name)
    options = {"epochs": 1, "head_init": "probe"} if scenario in {"freeze", "full"} else {}
    config = FinetuneConfig(
        data=str(folder), backbone="test_resnet", random_init=True, image_size=32, scenario=scenario,
        output=str(tmp_path / "run"), **options,
    )  # fmt: skip
    plan_finetune(config, Silent())
    assert calls.count("_create") == 2  # the network, and the empty one that it will be saved in
    assert calls.count("trace") == traces
    assert len(hashed) == len(set(hashed)) == (0 if scenario == "scratch" else 2)  # it and its fast copy
