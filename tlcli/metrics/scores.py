"""What a classifier's outputs are worth: accuracies, F1, calibration, and how sure of them one may be.

Pure functions of numpy arrays. Labels and predictions are int64 [N], logits and probabilities are [N, C] with
N >= 1. Where a value is undefined (a class without images) it is None, never NaN, so that it survives JSON.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tlcli.metrics.intervals import share_interval
from tlcli.metrics.macro_f1 import macro_f1, macro_f1_interval

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
SMALLEST_PROBABILITY = 1e-12  # log loss of a certain mistake is then 27.6, not infinite
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class.

    Attributes:
        precision: Share of the images predicted as the class that are; None when none is predicted.
        recall: Share of the class's images that are predicted; None when it has none.
        f1: Harmonic mean of the two; None when the class has no images.
        support: Number of images of the class.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy differ.

    Attributes:
        expected_error: Mean of |accuracy - confidence| over the bins, weighted by their images; in [0, 1].
        bins: Equal-width bins of the top-1 probability, each with `low`, `high`, `count`, and `accuracy` and
            `confidence` (None for an empty bin): the points of a reliability diagram.
    """

    expected_error: float
    bins: tuple[dict[str, Any], ...]


def softmax(logits: FloatArray) -> FloatArray:
    """Return probabilities fp64 [N, C] of logits [N, C]."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    probabilities: FloatArray = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def top_k_accuracy(scores: FloatArray, labels: IntArray, k: int) -> float:
    """Return the share of rows whose label is among the k highest scores.

    Args:
        scores: Logits or probabilities [N, C].
        labels: int64 [N].
        k: From 1; with fewer than k classes every row counts, as if k were C. Of equal scores the first
            class ranks higher, as in argmax.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own) & earlier).sum(axis=1)
    return float((rank < k).mean())


def confusion_matrix(labels: IntArray, predictions: IntArray, num_classes: int) -> IntArray:
    """Return counts int64 [C, C]; rows are true classes, columns predicted ones."""
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def class_scores(confusion: IntArray) -> tuple[ClassScores, ...]:
    """Return the scores of every class from a confusion matrix [C, C]."""
    scores = []
    for index in range(len(confusion)):
        hits = int(confusion[index, index])
        support, predicted = int(confusion[index].sum()), int(confusion[:, index].sum())
        scores.append(
            ClassScores(
                precision=hits / predicted if predicted else None,
                recall=hits / support if support else None,
                f1=2 * hits / (support + predicted) if support else None,
                support=support,
            )
        )
    return tuple(scores)


def log_loss(probabilities: FloatArray, labels: IntArray) -> float:
    """Return the mean of -log p(label), with p clipped at 1e-12; in nats."""
    own = np.take_along_axis(np.asarray(probabilities, dtype=np.float64), labels[:, None], axis=1)
    return float(-np.log(np.clip(own, SMALLEST_PROBABILITY, 1.0)).mean())


def calibration(
    probabilities: FloatArray, labels: IntArray, *, num_bins: int = CALIBRATION_BINS
) -> Calibration:
    """Return the expected calibration error of the top-1 probability, and its bins."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    # A bin holds (low, high], so that a probability of exactly 1 has a place.
    place = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for index in range(num_bins):
        inside = place == index
        count = int(inside.sum())
        accuracy = float(correct[inside].mean()) if count else None
        mean = float(confidence[inside].mean()) if count else None
        if accuracy is not None and mean is not None:
            error += count / len(labels) * abs(accuracy - mean)
        bins.append(
            {
                "low": float(edges[index]),
                "high": float(edges[index + 1]),
                "count": count,
                "accuracy": accuracy,
                "confidence": mean,
            }
        )
    return Calibration(error, tuple(bins))


def majority_baseline(labels: IntArray, majority_class: int | None = None) -> float:
    """Return the accuracy of always naming one class.

    Args:
        labels: int64 [N] of the measured images.
        majority_class: The most frequent class of train; None for the most frequent of `labels`.
    """
    if majority_class is None:
        majority_class = int(np.bincount(labels).argmax())
    return float((labels == majority_class).mean())


def score(
    logits: FloatArray,
    labels: IntArray,
    *,
    majority_class: int | None = None,
    groups: IntArray | None = None,
) -> dict[str, Any]:
    """Return every metric of a split as plain values for a JSON document.

    Top-5 counts the top min(5, C), given as `top5_k`.

    Args:
        logits: [N, C], N >= 1.
        labels: int64 [N].
        majority_class: The most frequent class of train, for the baseline.
        groups: int64 [N], equal for images that depend on each other; intervals are then by groups.

    Raises:
        ValueError: There are no rows.
    """
    if len(labels) == 0:
        raise ValueError("metrics need at least one row")
    num_classes = logits.shape[1]
    probabilities = softmax(logits)
    predictions = logits.argmax(axis=1).astype(np.int64)
    confusion = confusion_matrix(labels, predictions, num_classes)
    right = predictions == labels
    calibrated = calibration(probabilities, labels)
    return {
        "num_images": len(labels),
        "top1_accuracy": float(right.mean()),
        "interval": share_interval(right, groups).document(),
        "majority_baseline": majority_baseline(labels, majority_class),
        "top5_accuracy": top_k_accuracy(logits, labels, 5),
        "top5_k": min(5, num_classes),
        "macro_f1": macro_f1(confusion),
        "macro_f1_interval": macro_f1_interval(confusion, labels, predictions, groups).document(),
        "log_loss": log_loss(probabilities, labels),
        "expected_calibration_error": calibrated.expected_error,
        "calibration_bins": list(calibrated.bins),
        "per_class": [
            {"precision": score.precision, "recall": score.recall, "f1": score.f1, "support": score.support}
            for score in class_scores(confusion)
        ],
        "confusion_matrix": confusion.tolist(),
    }
