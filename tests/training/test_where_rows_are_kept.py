"""Where rows are kept is measured, and changes nothing that is trained: one rule of views, the same bits."""

import json

import pytest
import torch

from tests.tiny import finetuned, tiny
from tlcli.commands.finetune import plan_finetune
from tlcli.config.commands import FinetuneConfig
from tlcli.data.collection import collect
from tlcli.features.cache_decision import CachingDecision
from tlcli.features.cost_trial import CUT, RECOMPUTE
from tlcli.progress import Silent
from tlcli.runs.run import open_run
from tlcli.training import plan

IMAGES = {"a": 8, "b": 8}
NEVER, ALWAYS = "never", "always"
PLACES = [  # backbone, K, options, where rows could be kept before the cut
    pytest.param("test_resnet", 3, {"dtype": "fp32"}, (), marks=pytest.mark.slow),
    ("test_resnet", 3, {"dtype": "bf16"}, ()),
    pytest.param("mobilenetv2_035", 1, {"dtype": "fp32"}, ("input",), marks=pytest.mark.slow),
    ("mobilenetv2_035", 1, {"dtype": "bf16"}, ("input",)),
    pytest.param(
        "mobilenetv2_035",
        13,
        {"dtype": "fp32", "cache_dtype": "fp32"},
        ("blocks.3.3.add",),
        marks=pytest.mark.slow,
    ),
    pytest.param("mobilenetv2_035", 13, {"dtype": "bf16"}, ("blocks.3.3.add",), marks=pytest.mark.slow),
    ("mobilenetv2_035", 13, {"dtype": "bf16", "amp": "bf16"}, ("blocks.3.3.add",)),
]


def trained(folder, monkeypatch, where, **options):
    """Return weights, facts and lines of a training whose rows are kept as `where` says."""
    forced = where not in {NEVER, ALWAYS}
    if forced:
        monkeypatch.setattr(plan, "decide", lambda *_, **__: CachingDecision(where, "forced"))
    fixed = {
        "epochs": 2,
        "batch_size": 8,
        "amp": "none",
        "augment": "light",
        "head_init": "probe",
        "folds": 2,
        "publish": "trained",
    }
    config = tiny(FinetuneConfig, folder, **{**fixed, "cache": "auto" if forced else where, **options})
    result = finetuned(config)
    facts = json.loads((result.run_path / "run.json").read_text())
    lines = [json.loads(line) for line in (result.run_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    network = open_run(str(result.run_path)).backbone().model.state_dict()
    head = (result.run_path / "model.safetensors").read_bytes()
    return network, head, facts, lines


@pytest.mark.parametrize(("backbone", "k", "options", "places"), PLACES)
def test_every_decision_trains_the_same_weights(folder, monkeypatch, backbone, k, options, places):
    options = {**options, "backbone": backbone, "freeze": str(k)}
    expected, expected_head, facts, expected_lines = trained(folder, monkeypatch, NEVER, **options)
    assert facts["recipe"]["caching"]["where"] == RECOMPUTE
    assert facts["recipe"]["num_views"] == plan.DEFAULT_VIEWS
    for where in (ALWAYS, *places):
        weights, head, facts, lines = trained(folder, monkeypatch, where, **options)
        assert facts["recipe"]["caching"]["where"] == (CUT if where == ALWAYS else where)
        assert facts["recipe"]["num_views"] == plan.DEFAULT_VIEWS
        assert all(torch.equal(weights[name], value) for name, value in expected.items()), where
        assert head == expected_head, where
        assert lines == expected_lines, where


def test_a_place_where_nothing_can_be_kept_falls_back_to_the_cut(folder, monkeypatch):
    _, _, facts, _ = trained(folder, monkeypatch, "nowhere", freeze="3")
    assert facts["recipe"]["caching"]["where"] == CUT
    assert "nowhere" in facts["recipe"]["caching"]["reason"]


@pytest.mark.parametrize(
    ("options", "num_views"),
    [
        ({"freeze": "3"}, plan.DEFAULT_VIEWS),
        ({"freeze": "3", "views": 3}, 3),
        ({"freeze": "3", "augment": "none"}, 1),
        ({"scenario": "full"}, None),
        ({"scenario": "full", "views": 3}, 3),
        ({"scenario": "scratch", "head_init": "auto"}, None),
    ],
)
@pytest.mark.parametrize("cache", ["auto", NEVER, ALWAYS])
def test_the_number_of_views_is_a_rule_of_data_and_scenario(folder, monkeypatch, options, num_views, cache):
    for where in (RECOMPUTE, CUT):
        monkeypatch.setattr(plan, "decide", lambda *_, where=where, **__: CachingDecision(where, "forced"))
        config = tiny(FinetuneConfig, folder, **{"augment": "light", "cache": cache, **options})

        found = plan_finetune(config, Silent())
        assert found.training is not None
        assert found.training.num_views == num_views
        assert found.document()["num_views"] == num_views


def test_a_continued_run_keeps_the_views_it_began_with(folder, monkeypatch):
    """0.2.0 took a new view each epoch where it recomputed."""

    config = tiny(FinetuneConfig, folder, freeze="3", augment="light")
    recipe = {"num_views": None, "caching": {"where": RECOMPUTE, "reason": "quicker"}}
    found = plan.plan_training(config, collect(config, 2, Silent()), {"recipe": recipe})
    assert found.num_views is None
    assert found.caching is not None
    assert found.caching.where == RECOMPUTE
