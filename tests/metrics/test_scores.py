"""Metrics against scikit-learn and scipy, and where those leave a value undefined."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from tlcli.metrics import scores


def make(num_rows=300, num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return logits, labels


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_sklearn(seed):
    logits, labels = make(seed=seed)
    result = scores.score(logits, labels)
    predictions = logits.argmax(1)
    assert result["top1_accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert result["top5_accuracy"] == pytest.approx(reference.top_k_accuracy_score(labels, logits, k=5))
    assert result["macro_f1"] == pytest.approx(reference.f1_score(labels, predictions, average="macro"))
    assert result["log_loss"] == pytest.approx(reference.log_loss(labels, scores.softmax(logits)))
    assert result["confusion_matrix"] == reference.confusion_matrix(labels, predictions).tolist()
    precision, recall, f1, support = reference.precision_recall_fscore_support(labels, predictions)
    for index, score in enumerate(result["per_class"]):
        assert score["precision"] == pytest.approx(precision[index])
        assert score["recall"] == pytest.approx(recall[index])
        assert score["f1"] == pytest.approx(f1[index])
        assert score["support"] == support[index]


def test_softmax_of_huge_logits_is_finite():
    probabilities = scores.softmax(np.array([[1e4, 0.0], [-1e4, 1e4]]))
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1.0)


def test_top_k_with_fewer_classes_is_certain_and_ties_follow_argmax():
    logits, labels = make(num_classes=3)
    result = scores.score(logits, labels)
    assert result["top5_accuracy"] == 1.0
    assert result["top5_k"] == 3
    tied = np.zeros((4, 3))
    labels = np.array([0, 0, 1, 2])
    assert scores.top_k_accuracy(tied, labels, 1) == (tied.argmax(1) == labels).mean()


def test_a_class_without_images_is_none_and_survives_strict_json():
    labels = np.array([0, 0, 1, 1])
    logits = np.eye(4)[np.array([0, 2, 1, 1])]
    result = scores.score(logits, labels)
    absent, wrongly_named = result["per_class"][3], result["per_class"][2]
    assert absent == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert wrongly_named["precision"] == 0.0
    assert wrongly_named["recall"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.f1_score(labels, logits.argmax(1), labels=[0, 1], average="macro")
    assert result["macro_f1"] == pytest.approx(expected)
    json.dumps(result, allow_nan=False)


def test_log_loss_of_a_certain_mistake_is_finite():
    loss = scores.log_loss(np.array([[1.0, 0.0]]), np.array([1]))
    assert loss == pytest.approx(-np.log(scores.SMALLEST_PROBABILITY))


def test_calibration_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [1.0, 0.0]])
    labels = np.array([0, 1, 1, 0])
    result = scores.calibration(probabilities, labels, num_bins=10)
    # bin (0.9, 1]: 3 rows, confidence 2.9 / 3, accuracy 2 / 3; bin (0.5, 0.6]: 1 row, right at 0.6
    assert result.expected_error == pytest.approx(0.75 * (2.9 / 3 - 2 / 3) + 0.25 * 0.4)
    assert sum(item["count"] for item in result.bins) == 4
    assert result.bins[0]["accuracy"] is None
    assert result.bins[-1]["count"] == 3


def test_majority_baseline_uses_the_class_of_train():
    labels = np.array([0, 0, 0, 1])
    assert scores.majority_baseline(labels) == 0.75
    assert scores.majority_baseline(labels, majority_class=1) == 0.25


def test_intervals_are_by_groups_where_there_are_groups():
    logits, labels = make(num_rows=60, num_classes=3)
    plain = scores.score(logits, labels)
    alone = scores.score(logits, labels, groups=np.arange(60))
    grouped = scores.score(np.repeat(logits, 4, 0), np.repeat(labels, 4), groups=np.repeat(np.arange(60), 4))
    assert alone == plain
    assert plain["interval"]["method"] == "wilson"
    assert plain["macro_f1_interval"]["method"] == "wilson-jackknife"
    assert "num_groups" not in plain["interval"]
    for name in ("interval", "macro_f1_interval"):
        assert grouped[name]["method"] == plain[name]["method"] + "-groups"
        assert grouped[name]["num_groups"] == 60
        # four copies of each image tell no more than the images, and the few groups tell a little less
        assert grouped[name]["low"] == pytest.approx(plain[name]["low"], abs=0.01)
        assert grouped[name]["high"] == pytest.approx(plain[name]["high"], abs=0.01)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="one row"):
        scores.score(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))
