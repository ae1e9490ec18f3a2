"""What a plan says is what will be done: each statement is compared with the plan's own facts."""

import json
import re

import pytest

from tests.tiny import finetuned
from tlcli.backbones.initialise import BATCH_NORMS
from tlcli.backbones.units import units
from tlcli.commands.extract import plan_extract
from tlcli.commands.finetune import plan_finetune
from tlcli.config.commands import ExtractConfig, FinetuneConfig
from tlcli.progress import Silent

BACKBONES = ("test_resnet", "test_vit", "test_convnext")  # with BatchNorm, and two without
SCENARIOS = {
    "feature-extraction": {},
    "freeze, cached": {"freeze": "1", "cache": "always"},
    "freeze, recomputed": {"freeze": "1", "cache": "never"},
    "freeze, one unit left": {"freeze": "-1", "cache": "always"},
    "full from a probe": {"scenario": "full", "head_init": "probe"},
    "full": {"scenario": "full"},
    "scratch": {"scenario": "scratch"},
}
ASKED = {"device": "cpu", "dtype": "fp32", "norm": "train"}


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "images", {"a": 12, "b": 12})


def planned(folder, backbone, options):
    given = {"data": str(folder), "workers": 2, "backbone": backbone, "random_init": True, "image_size": 32}
    if options.get("freeze") == "-1":
        count = plan_finetune(FinetuneConfig(**given, scenario="full"), Silent()).training.num_units
        options = {**options, "freeze": str(count - 1)}
    return plan_finetune(FinetuneConfig(**given, epochs=2, **options), Silent())


def trained_units_have_batch_norm(plan):
    model, frozen = plan.extractor.backbone.model, plan.extractor.cut.num_frozen_units
    trained = {name for unit in units(model) if unit.index > frozen for name in unit.parameters}
    return any(
        f"{name}.weight" in trained
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("options", SCENARIOS.values(), ids=SCENARIOS)
def test_every_statement_is_true(folder, backbone, options):
    plan = planned(folder, backbone, options)
    said, document = plan.summary(), plan.document()
    text = json.dumps(said)
    # Nobody asked for anything.
    assert "asked for" not in text + json.dumps(document)
    # Frozen is said of what stays frozen alone.
    frozen = re.findall(r"(\d+) units? frozen", text)
    cached = plan.features is not None and plan.scenario in ("feature-extraction", "freeze")
    assert frozen == ([str(document["num_frozen_units"])] if cached else [])
    assert said["scenario"] == document["scenario"] == plan.scenario
    assert said["run"] == document["run_path"]
    counts = document["num_images"]
    assert said["images"].startswith(f"{counts['train']} train, {counts['val']} val in 2 classes")
    # The probe, its features and its number type are named where there is one, and nowhere else.
    training = plan.training
    probe = training is not None and training.recipe.head_init == "probe"
    assert ("from the linear probe" in text) == probe
    assert ("probe" in said) == (probe and plan.scenario != "freeze")
    assert ("features" in said) == cached
    if training is None:
        assert "trains" not in said
        return
    first, last = document["num_frozen_units"] + 1, document["num_units"]
    units = f"unit {last}" if first == last else f"units {first} to {last}"
    assert said["trains"].startswith(f"{units} of {last} and the head, ")
    has_norm = trained_units_have_batch_norm(plan)
    assert ("BatchNorm" in said) == has_norm
    assert ("hold no BatchNorm" in document["recipe"]["norm_reason"]) == (not has_norm)
    if has_norm:
        assert said["BatchNorm"].startswith(f"{document['recipe']['norm']} in trained units")
    assert said["recipe"].startswith(f"{document['recipe']['epochs']} epochs of batch")
    assert ("caching" in said) == (plan.scenario == "freeze")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_was_asked_for_is_said_to_be(folder, backbone):
    plan = planned(folder, backbone, {**ASKED, "freeze": "1", "cache": "always"})
    said = plan.summary()
    assert said["computes on"].startswith("cpu (asked for); fp32")
    assert said["computes on"].endswith("asked for")
    if backbone == "test_resnet":
        assert said["BatchNorm"] == "train in trained units: asked for"
    else:
        assert "BatchNorm" not in said
        assert "--norm train changes nothing: the trained units hold no BatchNorm" in plan.notes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "linear, at most 48 in one job, chosen by cross-validation of up to 5 folds"),
        ({"l2": "0.1,1", "folds": 3}, "linear, at most 6 in one job, chosen by cross-validation of up to 3"),
        ({"l2": "0.1", "scaling": "plain"}, "linear, measured by cross-validation"),
        ({"head": "mlp:4", "lr": "0.01", "l2": "0.1", "dropout": "0,0.5"}, "mlp 4, at most 2 in one job"),
    ],
)
def test_the_heads_that_are_announced_are_tried(folder, options, expected):
    plan = planned(folder, "test_resnet", options)
    assert plan.summary()["heads"].startswith(expected)
    result = finetuned(plan.config)
    lines = (result.run_path / "metrics.jsonl").read_text().splitlines()
    tried = sum(json.loads(line)["kind"] == "head" for line in lines)
    assert tried == int((re.findall(r"at most (\d+)", expected) or ["1"])[0])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("freeze", [None, "all", "1"])
def test_extract_says_what_it_freezes(folder, backbone, freeze):
    given = {"data": str(folder), "workers": 2, "backbone": backbone, "random_init": True, "image_size": 32}
    plan = plan_extract(ExtractConfig(**given, **({"freeze": freeze} if freeze else {})), Silent())
    said, document = plan.summary(), plan.document()
    count = document["num_frozen_units"]
    assert said["backbone"] == f"{backbone}, {count} unit{'s' * (count > 1)} frozen"
    assert "asked for" not in json.dumps(said)
    assert f"{document['rows_to_compute']} to compute" in said["features"]
