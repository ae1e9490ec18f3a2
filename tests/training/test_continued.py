"""A finished run goes on with more epochs: from its own weights, and without being lost on the way."""

import json
import shutil

import pytest
import torch

from tests.tiny import finetuned, tiny
from tlcli.commands.evaluate import evaluate, plan_evaluate
from tlcli.commands.finetune import finished, plan_finetune
from tlcli.config.commands import EvaluateConfig, FinetuneConfig
from tlcli.errors import Interrupted, UsageError
from tlcli.progress import Silent
from tlcli.runs.run import open_run
from tlcli.training import backbone, continued

SCENARIOS = {
    "freeze": {"freeze": "3", "cache": "always", "views": 2},
    "freeze, recomputed": {"freeze": "3", "cache": "never"},
    "full": {"scenario": "full", "norm": "train"},
    "full, MLP": {"scenario": "full", "head": "mlp:8", "lr": "0.001"},
    "scratch": {"scenario": "scratch", "head_init": "auto"},
}


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "images", {"a": 12, "b": 12, "c": 12})


def config(folder, output, **options):
    fixed = {"folds": 2, "head_init": "probe", "batch_size": 8, "amp": "none", "augment": "light",
             "publish": "trained"}  # fmt: skip
    return tiny(FinetuneConfig, folder, output=str(output), **{**fixed, **options})


def lines_of(run):
    """Return the epochs that were trained; the probe is epoch 0 and stays where it is."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if not line["epoch"]] in ([], [0])
    return [line for line in lines if line["epoch"]]


def facts_of(run):
    return json.loads((run / "run.json").read_text())


def weights_of(run):
    found = open_run(str(run))
    return {**found.backbone().model.state_dict(), **found.head().state()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits_of(run):
    model, head = open_run(str(run)).backbone().model, open_run(str(run)).head()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return head.logits(model.eval()(images))


class Stopping(Silent):
    """Ends the training at a step, as a signal would."""

    def __init__(self, step):
        self.left = step

    def describe(self, text):
        self.left -= 1
        if self.left == 0:
            raise Interrupted(15)


@pytest.mark.parametrize("options", SCENARIOS.values(), ids=SCENARIOS)
def test_more_epochs_go_on_from_the_weights_with_a_new_schedule(folder, tmp_path, monkeypatch, options):
    run = tmp_path / "run"
    finetuned(config(folder, run, epochs=2, **options))
    first, before, logits = lines_of(run), facts_of(run), logits_of(run)
    starts = []
    real = backbone.train

    def train(network, *rest):
        own = {name: value.clone() for name, value in network.suffix.state_dict().items()}
        starts.append((own, open_run(str(run / "earlier")).backbone().model.state_dict()))
        return real(network, *rest)

    monkeypatch.setattr(backbone, "train", train)
    plan = plan_finetune(config(folder, run, epochs=5, resume=True, **options), Silent())
    assert plan.summary()["continues"] == f"{run} after epoch 2: epochs 3 to 5, with a new schedule"
    expected = {"after_epoch": 2, "to_epoch": 5, "steps": before["training"]["steps"]}
    assert plan.document()["continued"] == expected
    assert "from the run's weights" in plan.summary()["recipe"]
    result = finetuned(config(folder, run, epochs=5, resume=True, **options))
    ((suffix, stored),) = starts
    assert all(torch.equal(value, stored[name]) for name, value in suffix.items() if name in stored)
    assert any(name in stored for name in suffix)
    lines, facts = lines_of(run), facts_of(run)
    assert lines[:2] == first
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    steps = [line["step"] for line in lines]
    assert steps == [steps[0] * number for number in range(1, 6)]
    assert lines[2]["lr"] > 2 * lines[1]["lr"]  # the first schedule had come to its end
    assert facts["status"] == "done"
    assert facts["continued"] == result.document["continued"] == expected
    assert (facts["recipe"]["epochs"], facts["training"]["epochs"]) == (3, 5)
    assert facts["training"]["probe"] == before["training"]["probe"]
    assert not torch.equal(logits_of(run), logits)
    assert not (run / "earlier").exists()
    assert not (run / "checkpoints").exists()
    assert "continued after epoch 2" in (run / "README.md").read_text()
    # And once more.
    finetuned(config(folder, run, epochs=6, resume=True, **options))
    assert [line["epoch"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]


def test_a_head_that_is_continued_is_that_of_the_run(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for options in (SCENARIOS["full"], SCENARIOS["full, MLP"]):
        finetuned(config(folder, run, epochs=1, overwrite=run.exists(), **options))
        expected = logits_of(run)
        found = []

        def train(network, *rest, found=found):
            images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                found.append(network.eval()(images))
            raise Interrupted(15)

        monkeypatch.setattr(backbone, "train", train)
        with pytest.raises(Interrupted):
            finetuned(config(folder, run, epochs=2, resume=True, **options))
        monkeypatch.undo()
        assert torch.allclose(found[0], expected, atol=1e-5)
        shutil.rmtree(run)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_run_that_goes_on_is_kept_and_resumed_bit_for_bit(folder, tmp_path, step):
    options = {**SCENARIOS["freeze"], "checkpoint_minutes": 0.0, "l2_sp": 0.01, "patience": 9}
    whole, run = tmp_path / "whole", tmp_path / "run"
    for path in (whole, run):
        finetuned(config(folder, path, epochs=2, **options))
    measured = EvaluateConfig(run=str(run), split="train", workers=2, device="cpu")
    evaluate(*plan_evaluate(measured, Silent()), measured, Silent())
    before = weights_of(run)
    finetuned(config(folder, whole, epochs=4, resume=True, **options))
    given = config(folder, run, epochs=4, resume=True, **options)
    with pytest.raises(Interrupted):
        finetuned(given, Stopping(step + 1))
    assert facts_of(run)["status"] == "interrupted"
    assert not (run / "evaluation-train.json").exists()  # of other weights
    assert same(weights_of(run / "earlier"), before)
    kept = EvaluateConfig(run=str(run / "earlier"), workers=2)
    evaluate(*plan_evaluate(kept, Silent()), kept, Silent())
    for other in (3, 5, None):
        with pytest.raises(UsageError, match=f"--epochs was 4, now {other}"):
            finetuned(config(folder, run, epochs=other, resume=True, **options))
    finetuned(given)
    assert same(weights_of(run), weights_of(whole))
    without = [[{**line, "seconds": 0} for line in lines_of(path)] for path in (run, whole)]
    assert without[0] == without[1]
    assert not (run / "earlier").exists()


def test_an_interruption_before_the_first_step_loses_nothing(folder, tmp_path, monkeypatch):
    run, options = tmp_path / "run", SCENARIOS["freeze"]
    finetuned(config(folder, run, epochs=1, **options))
    before = weights_of(run)

    def fail(*arguments):
        raise RuntimeError("no power")

    given = config(folder, run, epochs=2, resume=True, **options)
    for place in (continued, backbone):
        with monkeypatch.context() as patch:
            patch.setattr(place, "open_run" if place is continued else "train", fail)
            with pytest.raises(RuntimeError, match="no power"):
                finetuned(given)
        assert same(weights_of(run / "earlier"), before)
    finetuned(given)
    assert [line["epoch"] for line in lines_of(run)] == [1, 2]


def test_what_is_finished_is_told_and_what_was_changed_refused(folder, tmp_path):
    run, options = tmp_path / "run", SCENARIOS["freeze"]
    result = finetuned(config(folder, run, epochs=2, **options))

    def again(**changes):
        return finished(config(folder, run, **{"resume": True, "epochs": 2, **options, **changes}), Silent())

    document = again()
    for name in ("metrics", "head", "training", "recipe", "num_images", "class_names", "warnings", "seconds"):
        assert document[name] == json.loads(json.dumps(result.document[name])), name
    assert document["features"]["rows_computed"] == 0
    assert again(epochs=1)["metrics"] == document["metrics"]
    assert again(epochs=None)["metrics"] == document["metrics"]
    assert again(epochs=3) is None
    assert again(resume=False) is None
    with pytest.raises(UsageError, match="--weight-decay was None, now"):
        again(weight_decay=0.5)
    next((folder / "a").iterdir()).unlink()
    with pytest.raises(UsageError, match="The data is not what run"):
        again()
    with pytest.raises(UsageError, match="The data is not what run"):
        finetuned(config(folder, run, epochs=3, resume=True, **options))
    assert facts_of(run)["status"] == "done"


def test_on_the_command_line_a_finished_run_succeeds_again(folder, tmp_path, run_cli):
    words = ("finetune", folder, "--backbone", "test_resnet", "--random-init", "--image-size", "32")
    words = (*words, "--dtype", "fp32", "--l2", "0.1", "--folds", "2", "-o")
    first = run_cli(*words, tmp_path / "head", "--resume")
    again = run_cli(*words, tmp_path / "head", "--resume")
    assert (first.code, again.code) == (0, 0)
    assert again.stdout == first.stdout
    assert "the run is finished; nothing to do\n" in again.stderr
    assert f"--backbone local-dir:{tmp_path}/head" in again.stderr
    changed = run_cli(*words, tmp_path / "head", "--resume", "--seed", "5")
    assert changed.code == 2
    assert "--seed was 0, now 5" in changed.stderr
    words = (*words[:-1], "--freeze", "3", "-b", "8", "--amp", "none", "-o", tmp_path / "run")
    first = json.loads(run_cli(*words, "--epochs", "1", "--resume", "--json").stdout)
    done = run_cli(*words, "--epochs", "1", "--resume", "--json")
    assert "nothing to do (more --epochs would continue it)" in done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "tlcli.finetune/1"
    assert document["metrics"] == first["metrics"]
    assert document.keys() == first.keys()
    dry = run_cli(*words, "--epochs", "1", "--resume", "--json", "--dry-run")
    assert json.loads(dry.stdout)["schema"] == "tlcli.finetune.plan/1"
    more = run_cli(*words, "--epochs", "2", "--resume")
    assert more.code == 0, more.stderr
    assert f"{tmp_path}/run after epoch 1: epoch 2, with a new schedule" in more.stderr
    assert "epoch 2/2" in more.stderr
    assert "after epoch 1, with a new schedule" in more.stdout
