"""Whether two classifiers differ on the same images."""

from collections.abc import Mapping
from dataclasses import dataclass

SIGNIFICANT = 0.05  # p below which two classifiers are said to differ


@dataclass(frozen=True)
class SignTest:
    """Two classifiers on the same images.

    Attributes:
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
        p_value: How likely at least so uneven a division of these images is by chance, two-sided.
    """

    only_first: int
    only_second: int
    p_value: float


def sign_test(first: Mapping[str, bool], second: Mapping[str, bool]) -> SignTest:
    """Compare two classifiers by the images on which only one of them is right (McNemar 1947, exact form).

    Args:
        first: Image -> whether the first is right.
        second: The same for the second, of the same images.
    """
    from scipy.stats import binomtest

    only_first = sum(first[name] and not second[name] for name in first)
    only_second = sum(second[name] and not first[name] for name in first)
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return SignTest(only_first, only_second, p_value)
