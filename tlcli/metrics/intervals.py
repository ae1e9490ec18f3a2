"""Intervals of shares."""

import math
from dataclasses import dataclass
from typing import Any

NORMAL_QUANTILE_95 = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Interval:
    """A 95 % interval: `low` <= `high`, and the method's name."""

    low: float
    high: float
    method: str

    def document(self) -> dict[str, Any]:
        """Return the interval for a JSON document."""
        return {"low": self.low, "high": self.high, "method": self.method}


def wilson_interval(successes: int, total: int) -> Interval:
    """Return Wilson's 95 % interval of a proportion; it stays in [0, 1] and is never of width 0."""
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"expected 0 <= successes <= total and total >= 1, got {successes} of {total}")
    z2 = NORMAL_QUANTILE_95**2
    share = successes / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(share * (1 - share) * z2 / total + (z2 / (2 * total)) ** 2) / (1 + z2 / total)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Interval(low, high, "wilson")


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
    first, second, count = only_first + 0.5, only_second + 0.5, total + 2
    centre = (first - second) / count
    half = NORMAL_QUANTILE_95 * math.sqrt(first + second - (first - second) ** 2 / count) / count
    return Interval(max(-1.0, centre - half), min(1.0, centre + half), "agresti-min")
