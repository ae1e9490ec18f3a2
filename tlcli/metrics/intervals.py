"""Intervals of shares and of their differences, by groups where images come in groups."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tlcli.metrics.groups import NORMAL_QUANTILE_95, BoolArray, Dependence, FloatArray, IntArray, dependence


@dataclass(frozen=True)
class Interval:
    """A 95 % interval.

    Attributes:
        low: At most `high`.
        high: The upper end.
        method: Its name, which ends in `-groups` where it is by groups.
        num_groups: How many groups the images form; None where each is on its own.
    """

    low: float
    high: float
    method: str
    num_groups: int | None = None

    def document(self) -> dict[str, Any]:
        """Return the interval for a JSON document; `num_groups` is there only where it is by groups."""
        found = {"low": self.low, "high": self.high, "method": self.method}
        return found if self.num_groups is None else {**found, "num_groups": self.num_groups}


def share_interval(right: BoolArray | FloatArray, groups: IntArray | None = None) -> Interval:
    """Return the 95 % interval of a share of images, such as an accuracy.

    Wilson's, of the effective number of images where they come in groups (`groups.py`); it is then never
    narrower than that of as many independent images.

    Args:
        right: bool [N], N >= 1; or fp64 [N] in [0, 1], the share of several answers that are right.
        groups: int64 [N], equal for images that depend on each other; None where none do.
    """
    total, share = len(right), float(right.mean()) if len(right) else 0.0
    found = dependence(right.astype(np.float64) - share, right >= 0.5, groups)
    if found.num_groups is None and total:
        return Interval(*wilson(share, total), "wilson")
    low, high = wilson(share, total / found.design_effect, found.quantile)
    return Interval(low, high, "wilson-groups", found.num_groups)


def wilson(share: float, count: float, quantile: float = NORMAL_QUANTILE_95) -> tuple[float, float]:
    """Return the ends of Wilson's interval (1927) of a share in [0, 1] of `count` > 0 images."""
    z2 = quantile**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(share * (1 - share) * z2 / count + (z2 / (2 * count)) ** 2) / (1 + z2 / count)
    low = 0.0 if share == 0.0 else max(0.0, centre - half)
    high = 1.0 if share == 1.0 else min(1.0, centre + half)
    return low, high


def wilson_interval(successes: int, total: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion; it stays in [0, 1] and is never of width 0."""
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"expected 0 <= successes <= total and total >= 1, got {successes} of {total}")
    return Interval(*wilson(successes / total, total), "wilson")


def paired_interval(only_first: int, only_second: int, total: int) -> Interval:
    """Return the 95 % interval of the difference of two classifiers' accuracies on the same images.

    Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions": half an
    image is added to each of the four counts.

    Args:
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
        total: All images, at least 1.

    Returns:
        Of the first's accuracy minus the second's, in [-1, 1].
    """
    if total < 1 or min(only_first, only_second) < 0 or only_first + only_second > total:
        raise ValueError(f"expected counts of {total} images, got {only_first} and {only_second}")
    return _agresti_min(only_first, only_second, total, Dependence())


def difference_interval(first: BoolArray, second: BoolArray, groups: IntArray | None = None) -> Interval:
    """Return the 95 % interval of the difference of two classifiers' accuracies on the same images.

    `paired_interval`, of the effective number of images where they come in groups.

    Args:
        first: bool [N], whether the first classifier is right, N >= 1.
        second: The same for the second.
        groups: int64 [N], equal for images that depend on each other; None where none do.

    Returns:
        Of the first's accuracy minus the second's, in [-1, 1].
    """
    gain = first.astype(np.float64) - second
    found = dependence(gain - gain.mean(), gain != 0, groups)
    return _agresti_min(int((first & ~second).sum()), int((second & ~first).sum()), len(first), found)


def _agresti_min(only_first: int, only_second: int, total: int, found: Dependence) -> Interval:
    effect = found.design_effect
    first, second, count = only_first / effect + 0.5, only_second / effect + 0.5, total / effect + 2
    centre = (first - second) / count
    half = found.quantile * math.sqrt(first + second - (first - second) ** 2 / count) / count
    method = "agresti-min" if found.num_groups is None else "agresti-min-groups"
    return Interval(max(-1.0, centre - half), min(1.0, centre + half), method, found.num_groups)
