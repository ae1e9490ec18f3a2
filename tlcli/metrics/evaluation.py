"""A measured split: every metric, and the prediction of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tlcli.data.collection import Collection, groups_of
from tlcli.metrics import scores as metrics
from tlcli.warned import warn

SCHEMA = "tlcli.evaluation/1"
STORED_MISTAKES = 100  # what the report can show; a command prints as many as it is asked for


@dataclass(frozen=True)
class Evaluation:
    """A measured split.

    Attributes:
        document: Every metric, as written to evaluation-SPLIT.json.
        predictions: One dict an image: file, path, label, predicted, probability.
    """

    document: dict[str, Any]
    predictions: list[dict[str, Any]]


def measure(
    logits: np.ndarray[Any, Any],
    collection: Collection,
    class_names: Sequence[str],
    *,
    split: str,
    majority_class: int,
    worst: int,
) -> Evaluation:
    """Return every metric of a split, with each image's prediction.

    Intervals are by groups where there are any.

    Args:
        logits: fp32 [n, C] in the order of the collection.
        collection: The images; labels index `class_names`.
        class_names: In the order of the logits.
        split: Name of the split.
        majority_class: The most frequent class of train.
        worst: How many of the most confident mistakes to list.
    """
    labels = np.array([sample.label for sample in collection.samples], np.int64)
    groups = groups_of(collection).numpy()
    found = metrics.score(logits, labels, majority_class=majority_class, groups=groups)
    present = set(labels.tolist())
    if absent := [repr(name) for index, name in enumerate(class_names) if index not in present]:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        warn("unmeasured_class", f"{split} has no samples of {', '.join(absent[:10])}{more}")
    for name, scores in zip(class_names, found["per_class"], strict=True):
        scores["class_name"] = name
    probabilities = metrics.softmax(logits)
    predictions = [
        {
            "file": sample.name,
            "path": sample.path,
            "label": class_names[label],
            "predicted": class_names[best],
            "probability": round(float(row[best]), 6),
        }
        for sample, label, row in zip(collection.samples, labels, probabilities, strict=True)
        for best in [int(row.argmax())]
    ]
    mistakes = [item for item in predictions if item["label"] != item["predicted"]]
    mistakes.sort(key=lambda item: (-item["probability"], item["file"]))
    document = {"schema": SCHEMA, "split": split, "class_names": list(class_names), **found,
                "num_mistakes": len(mistakes), "worst_mistakes": mistakes[:worst]}  # fmt: skip
    return Evaluation(document, predictions)


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the few metrics that stand in run.json and in the result of finetune."""
    names = ("top1_accuracy", "interval", "num_images", "majority_baseline", "macro_f1", "log_loss",
             "expected_calibration_error")  # fmt: skip
    return {name: found[name] for name in names}


def no_better_than_majority(found: Mapping[str, Any], *, balanced: bool) -> str | None:
    """Return a warning where a classifier could as well name one class for every image; None otherwise.

    Args:
        found: A measurement's document.
        balanced: Classes weigh the same, so that the mean recall is compared with that of one class.
    """
    share, baseline, name = found["top1_accuracy"], found["majority_baseline"], "accuracy"
    if balanced:
        recalls = [item["recall"] for item in found["per_class"] if item["support"]]
        share, baseline, name = sum(recalls) / len(recalls), 1 / len(recalls), "balanced accuracy"
    if share > baseline or share == 1.0:
        return None
    return (
        f"The {name}, {share:.3f} on {found['num_images']} images, is no better than naming one class for "
        f"all of them ({baseline:.3f}). Look at the images with `tlcli data check`; try --freeze all, "
        "another backbone, or --class-weights balanced where classes are uneven."
    )
