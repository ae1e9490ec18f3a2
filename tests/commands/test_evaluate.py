"""Measuring a run: the numbers are the ones a direct computation gives, on the images asked for."""

import csv
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tlcli.commands.evaluate import evaluate, plan_evaluate
from tlcli.commands.predict import Predictor
from tlcli.config.commands import EvaluateConfig
from tlcli.data.decode import decode
from tlcli.data.image_files import read_bytes
from tlcli.errors import BackboneError, DataError, UsageError
from tlcli.progress import Silent
from tlcli.runs.run import open_run


def measure(run, data=None, **options):
    """Return document, predictions and features of an evaluation."""
    config = EvaluateConfig(run=str(run), data=str(data) if data else None, workers=2, **options)
    opened, plan = plan_evaluate(config, Silent())
    found, features = evaluate(opened, plan, config, Silent())
    return found.document, found.predictions, features


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained.run, tmp_path / "run")


def probabilities_of(run, paths):
    """Return softmax outputs [n, C] and class names, computed image by image."""
    predictor = Predictor(open_run(str(run)), dtype="fp32")
    images = [predictor.extractor.view.transform(decode(read_bytes(path))) for path in paths]
    return predictor.logits(torch.stack(images)).softmax(1).numpy(), predictor.class_names


def test_the_numbers_equal_a_direct_computation(trained, run):
    document, predictions, _ = measure(run, worst=1000)
    probabilities, names = probabilities_of(run, [item["path"] for item in predictions])
    labels = np.array([names.index(item["label"]) for item in predictions])
    best = probabilities.argmax(1)
    count = len(labels)
    assert document["num_images"] == count
    assert document["top1_accuracy"] == pytest.approx(float((best == labels).mean()))
    assert 0 < document["top1_accuracy"] < 1  # so that the mistakes below are tested
    assert document["log_loss"] == pytest.approx(
        float(-np.log(probabilities[np.arange(count), labels]).mean()), rel=1e-4
    )
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (labels, best), 1)
    assert document["confusion_matrix"] == matrix.tolist()
    scores = []
    for number, row in enumerate(document["per_class"]):
        hits, guessed, there = matrix[number, number], matrix[:, number].sum(), matrix[number].sum()
        assert row["class_name"] == names[number]
        assert row["support"] == there
        assert row["precision"] == pytest.approx(hits / guessed if guessed else 0.0)
        assert row["recall"] == pytest.approx(hits / there)
        scores.append(2 * hits / (guessed + there))
    assert document["macro_f1"] == pytest.approx(np.mean(scores))
    share, z = document["top1_accuracy"], 1.959963984540054
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    assert document["interval"]["low"] == pytest.approx(centre - spread, abs=1e-6)
    assert document["interval"]["high"] == pytest.approx(centre + spread, abs=1e-6)
    majority = json.loads((run / "run.json").read_text())["data"]["majority_class"]
    assert document["majority_baseline"] == pytest.approx(float((labels == majority).mean()))
    assert [item["predicted"] for item in predictions] == [names[i] for i in best]
    assert [item["probability"] for item in predictions] == pytest.approx(probabilities.max(1), abs=1e-5)
    mistakes = document["worst_mistakes"]
    assert len(mistakes) == document["num_mistakes"] == int((best != labels).sum())
    assert [m["probability"] for m in mistakes] == sorted((m["probability"] for m in mistakes), reverse=True)
    assert all(item["label"] != item["predicted"] for item in mistakes)


def test_the_numbers_are_finetunes_and_are_written_to_the_run(trained, run):
    before = json.loads((run / "evaluation-val.json").read_text())
    document, predictions, features = measure(run)
    stored = json.loads((run / "evaluation-val.json").read_text())
    assert stored == json.loads(json.dumps(document))
    assert stored["top1_accuracy"] == before["top1_accuracy"]
    assert stored["confusion_matrix"] == before["confusion_matrix"]
    assert stored["selected_on"] is None
    with (run / "predictions-val.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [item["file"] for item in predictions]
    assert features.rows_computed == len(rows)  # this home's cache was empty
    assert measure(run)[2].rows_computed == 0


def test_features_of_a_tuned_network_are_cached_only_when_asked(make_tuned, tmp_path):
    run = make_tuned()
    store = Path(os.environ["TLCLI_HOME"]) / "features"
    plain, predictions, features = measure(run)
    assert features.entry_key is None
    assert not store.exists()
    assert measure(run)[2].rows_computed == len(predictions)
    asked, _, features = measure(run, cache="always")
    assert features.entry_key is not None
    assert features.rows_computed == len(predictions)
    assert measure(run, cache="always")[2].rows_computed == 0
    assert asked["confusion_matrix"] == plain["confusion_matrix"]
    assert asked["log_loss"] == pytest.approx(plain["log_loss"], rel=1e-6)
    assert set(plain) == set(measure(shutil.copytree(run, tmp_path / "moved"))[0])


def test_the_documents_of_tuned_runs_have_the_fields_of_others(make_tuned, run):
    assert list(measure(make_tuned())[0]) == list(measure(run)[0])


def test_a_split_that_chose_the_epoch_is_said_to_have(make_tuned, caplog):
    run = make_tuned(selected_on="val", best_epoch=2)
    with caplog.at_level("WARNING", logger="tlcli"):
        assert measure(run)[0]["selected_on"] == "val"
    assert "chosen on val" in caplog.text
    assert measure(run, split="train")[0]["selected_on"] == "train"


def test_train_is_measured_with_a_warning_label(run):
    document, predictions, _ = measure(run, split="train")
    assert document["selected_on"] == "train"
    assert len(predictions) + measure(run)[0]["num_images"] == 48
    assert (run / "evaluation-train.json").exists()


def test_the_runs_own_data_by_name_is_the_runs_own_data(trained, run, tmp_path):
    """Measured whole it would include the images the run was trained on."""
    (tmp_path / "link").symlink_to(trained.images)
    expected = measure(run)[0]
    for name in (trained.images, f"{trained.images}/", tmp_path / "link"):
        assert measure(run, name)[0]["num_images"] == expected["num_images"]


def test_other_data_is_measured_whole(run, tmp_path, make_images):
    other = make_images(tmp_path / "other", {"a": 5, "c": 4}, seed=9)
    before = (run / "evaluation-val.json").read_bytes()
    document, predictions, _ = measure(run, other)
    assert document["num_images"] == 9
    assert document["class_names"] == ["a", "b", "c"]
    assert {item["label"] for item in predictions} == {"a", "c"}
    assert [row["support"] for row in document["per_class"]] == [5, 0, 4]
    assert (run / "evaluation-val.json").read_bytes() == before  # the run keeps its own


def test_other_data_with_splits_is_measured_on_the_split(run, tmp_path, make_images):
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        make_images(tmp_path / "tree" / split, {"a": count, "b": count, "c": count}, seed=count)
    assert measure(run, tmp_path / "tree")[0]["num_images"] == 9
    assert measure(run, tmp_path / "tree", split="test")[0]["num_images"] == 6


def test_classes_that_the_run_does_not_know_are_refused(run, tmp_path, make_images):
    other = make_images(tmp_path / "other", {"a": 2, "zebra": 2})
    with pytest.raises(DataError, match="zebra"):
        measure(run, other)


def test_a_split_without_images_is_a_data_error(run):
    with pytest.raises(DataError, match="no test images"):
        measure(run, split="test")


def test_data_that_moved_away_is_named(run, tmp_path):
    facts = json.loads((run / "run.json").read_text())
    facts["data"]["path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="gone") as caught:
        measure(run)
    assert "give DATA" in caught.value.hint


def test_a_moved_run_measures_the_same(trained, run, tmp_path):
    expected = measure(run)[0]
    assert measure(run.rename(tmp_path / "moved"))[0] == expected


def test_bad_images_are_skipped_and_counted(run, tmp_path, make_images):
    other = make_images(tmp_path / "other", {"a": 5, "b": 5})
    (other / "a/000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be used"):
        measure(run, other)
    document, predictions, _ = measure(run, other, max_bad=0.2)
    assert (document["num_images"], document["num_skipped"]) == (9, 1)
    assert "a/000.png" not in {item["file"] for item in predictions}


def test_a_class_without_usable_images_can_still_be_measured(run, tmp_path, make_images):
    other = make_images(tmp_path / "other", {"a": 5, "b": 1})
    (other / "b/000.png").write_bytes(b"no image")
    assert measure(run, other, max_bad=0.5)[0]["num_images"] == 5


def test_a_gate_on_what_the_run_was_trained_on_is_refused(trained, run, caplog):
    facts = json.loads((run / "run.json").read_text())
    facts["trained_on"] = ["train", "val"]
    (run / "run.json").write_text(json.dumps(facts))
    for data in (None, trained.images):
        with pytest.raises(UsageError, match="trained on val"):
            measure(run, data, min_accuracy=0.5)
    with caplog.at_level("WARNING", logger="tlcli"):
        assert measure(run)[0]["selected_on"] == "train"
    assert "was trained on val" in caplog.text


def test_other_data_passes_the_gate_of_a_refitted_run(run, tmp_path, make_images):
    facts = json.loads((run / "run.json").read_text())
    facts["trained_on"] = ["train", "val"]
    (run / "run.json").write_text(json.dumps(facts))
    other = make_images(tmp_path / "other", {"a": 3, "b": 3}, seed=9)
    measure(run, other, min_accuracy=0.5)


def test_a_truncated_network_is_named(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((BackboneError, DataError), match="model"):
        measure(run)


def test_a_run_that_cannot_be_written_can_be_measured(run, monkeypatch):
    def refuse(path, chunks):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tlcli.machine.files.publish", refuse)
    document, _, _ = measure(run, cache="never")
    assert document["stored"] is False
    assert document["num_images"] > 0
