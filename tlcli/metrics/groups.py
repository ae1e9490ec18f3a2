"""How much less images tell where they come in groups: copies of one image, photographs of one patient.

Images of a group are right or wrong together more often than independent ones, so that N of them are worth
N divided by the design effect: the variance of a figure by groups over that with independent images. With
few groups this ratio is itself uncertain, and most of all where nearly all images are right. Three things
allow for that:

- The variance by groups is divided by the share of it that residuals keep where a group's images agree.
- The ratio is drawn towards that of groups whose images all agree, by the weight of one group against the
  groups that hold a hit, or those that hold a miss where these are fewer.
- Intervals take Student's quantile, with the effective number of groups, N^2 / sum of squared sizes, less
  one as its degrees of freedom.

Sources: Kish 1965, "Survey Sampling" (design effect); Korn & Graubard 1998, "Confidence intervals for
proportions with small expected number of positive counts estimated from survey data" (an effective sample
size in an interval for independent data, and Student's quantile); Dean & Pagano 2015, "Evaluating confidence
interval methods for binomial proportions in clustered surveys" (Wilson's among them). The plain percentile
bootstrap over groups covers too little with 20 groups and has width 0 where all images are right;
`examples/benchmarks/intervals.py` compares the two.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
NORMAL_QUANTILE_95 = 1.959963984540054  # two-sided 95 %
PRIOR_GROUPS = 1.0  # weight of the largest design effect, in groups


@dataclass(frozen=True)
class Dependence:
    """What the groups of a sample take from it.

    Attributes:
        design_effect: At least 1: variance of a figure over its variance with independent images.
        quantile: Two-sided 95 % quantile to use in place of the normal one, at least 1.96.
        num_groups: None where every image is a group of its own, or no groups are known.
    """

    design_effect: float = 1.0
    quantile: float = NORMAL_QUANTILE_95
    num_groups: int | None = None


def dependence(residuals: FloatArray, hits: BoolArray, groups: IntArray | None) -> Dependence:
    """Return how much the images of a sample depend on each other, for one figure.

    Args:
        residuals: fp64 [N], each image's part in the figure less the mean part; they sum to 0.
        hits: bool [N], the outcome behind the figure, such as whether an image is named rightly. Groups with
            hits and groups with misses are counted; the fewer of the two say how well the design effect is
            known.
        groups: int64 [N], equal for images that depend on each other; None where none do.
    """
    if groups is None:
        return Dependence()
    _, of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of).astype(np.float64)
    total, squares = float(sizes.sum()), float((sizes**2).sum())
    if squares == total:
        return Dependence()
    largest = squares / total
    independent = float((residuals**2).sum())
    effect = largest
    kept = float((sizes**2 * (1 - 2 * sizes / total + squares / total**2)).sum()) / squares
    if independent > 0 and kept > 1e-9:
        by_groups = float((np.bincount(of, residuals) ** 2).sum()) / kept
        with_hits, with_misses = (np.bincount(of, side) > 0 for side in (hits, ~hits))
        known = float(min(with_hits.sum(), with_misses.sum()))
        weight = PRIOR_GROUPS / (PRIOR_GROUPS + known)
        effect = (1 - weight) * max(1.0, by_groups / independent) + weight * largest
    return Dependence(effect, _student_quantile(max(1.0, total**2 / squares - 1)), len(sizes))


def _student_quantile(degrees: float) -> float:
    """Return the two-sided 95 % quantile of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))
