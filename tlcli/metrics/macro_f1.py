"""Macro F1, the mean F1 of the classes, and how sure of it one may be.

The interval is Wilson's, at an effective number of images: as many as would give a share of this size the
variance that macro F1 has. The variance is the delete-one jackknife's (Efron & Stein 1981, "The jackknife
estimate of variance"), which on classes of a few images is larger and truer than the delta method of
Takahashi et al. 2022, "Confidence interval for micro-averaged F1 and macro-averaged F1 scores". Where hardly
an image is wrong it says nothing, so the effective number is at most K^2 / sum(1 / images of a class) over
the K classes: that of a mean of K recalls. At 100 % right this alone gives the width, as Wilson's interval
has one there.
"""

from typing import Any

import numpy as np

from tlcli.metrics.groups import IntArray, dependence
from tlcli.metrics.intervals import Interval, wilson

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def macro_f1(confusion: IntArray) -> float:
    """Return the mean F1 of the classes that have images, from counts int64 [C, C]."""
    support = confusion.sum(1)
    return float(_f1(confusion.diagonal(), support, confusion.sum(0))[support > 0].mean())


def macro_f1_interval(
    confusion: IntArray,
    labels: IntArray | None = None,
    predictions: IntArray | None = None,
    groups: IntArray | None = None,
) -> Interval:
    """Return the 95 % interval of macro F1.

    Args:
        confusion: int64 [C, C], rows true classes, columns predicted ones; at least one image.
        labels: int64 [N], needed with groups.
        predictions: int64 [N], needed with groups.
        groups: int64 [N], equal for images that depend on each other; None where none do.
    """
    share, total = macro_f1(confusion), int(confusion.sum())
    parts = _parts(confusion)
    parts -= (confusion * parts).sum() / total
    variance = float((confusion * parts**2).sum()) * (total - 1) / total
    support = confusion.sum(1)
    count = float((support > 0).sum() ** 2 / (1 / support[support > 0]).sum())
    if variance > 0 and 0 < share < 1:
        count = min(count, share * (1 - share) / variance)
    if groups is None or labels is None or predictions is None:
        return Interval(*wilson(share, count), "wilson-jackknife")
    found = dependence(parts[labels, predictions], labels == predictions, groups)
    if found.num_groups is None:
        return Interval(*wilson(share, count), "wilson-jackknife")
    ends = wilson(share, count / found.design_effect, found.quantile)
    return Interval(*ends, "wilson-jackknife-groups", found.num_groups)


def _parts(confusion: IntArray) -> FloatArray:
    """Return by how much macro F1 falls without one image of each cell, fp64 [C, C].

    The image changes the F1 of its own class and of the predicted one. Without the only image of a class
    the mean is over the other classes.
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    scores = _f1(hits, support, predicted)
    own = _f1(hits, support - 1, predicted) - scores
    other = np.where(support > 0, _f1(hits, support, predicted - 1), 0.0) - scores
    changed = own[:, None] + other[None]
    np.fill_diagonal(changed, _f1(hits - 1, support - 1, predicted - 1) - scores)
    num_classes = int((support > 0).sum())
    left = np.maximum(num_classes - (support == 1), 1)
    parts: FloatArray = scores.sum() / num_classes - (scores.sum() + changed) / left[:, None]
    return parts


def _f1(hits: IntArray, support: IntArray, predicted: IntArray) -> FloatArray:
    """Return the F1 of classes from counts [C]; 0 of a class without images."""
    return np.where(support > 0, 2.0 * hits / np.maximum(support + predicted, 1), 0.0)
