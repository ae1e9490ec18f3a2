"""Whether two classifiers differ on the same images."""

from collections.abc import Mapping
from typing import Any

SIGNIFICANT = 0.05  # p below which two classifiers are said to differ


def compare(ours: Mapping[str, bool], raw: Mapping[str, bool]) -> dict[str, Any]:
    """Return on how many images only one of two classifiers is right, and how likely chance is to do that.

    Args:
        ours: File name -> whether the run is right.
        raw: The same for raw pixels, of the same files.
    """
    from scipy.stats import binomtest

    only_ours = sum(ours[name] and not raw[name] for name in ours)
    only_raw = sum(raw[name] and not ours[name] for name in ours)
    differing = only_ours + only_raw
    p_value = float(binomtest(only_ours, differing).pvalue) if differing else 1.0
    return {"only_backbone_right": only_ours, "only_raw_pixels_right": only_raw, "p_value": p_value}
