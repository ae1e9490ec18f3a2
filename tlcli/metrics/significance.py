"""Whether two classifiers differ on the same images."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def sign_test(
    first: Mapping[str, bool], second: Mapping[str, bool], groups: Mapping[str, Hashable] | None = None
) -> SignTest:
    """Compare two classifiers by the images on which only one of them is right.

    By chance, what a group's images give to one classifier might as well be the other's, the whole group at
    once: the exact distribution of the sum of these gains under random signs (Fisher 1935). Where every image
    is on its own this is the exact form of McNemar's test (1947).

    Args:
        first: Image -> whether the first is right.
        second: The same for the second, of the same images.
        groups: Image -> its group; None, or left out for an image, where it is on its own.
    """
    gains = {name: int(first[name]) - int(second[name]) for name in first}
    net: dict[Any, int] = {}
    for name, gain in gains.items():
        key = ("group", groups[name]) if groups is not None and name in groups else ("image", name)
        net[key] = net.get(key, 0) + gain
    wins, losses = (sum(gain == side for gain in gains.values()) for side in (1, -1))
    return SignTest(wins, losses, _two_sided(np.array(list(net.values()), np.int64)))


def _two_sided(gains: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Return how likely random signs of `gains` int64 [G] give a sum at least as far from 0."""
    from scipy.stats import binom

    sizes, observed = np.abs(gains[gains != 0]), abs(int(gains.sum()))
    if not len(sizes):
        return 1.0
    # chances[i]: that gains of the absolute sum i go to the first.
    alone = int((sizes == 1).sum())
    chances = np.asarray(binom.pmf(np.arange(alone + 1), alone, 0.5))
    for size in sizes[sizes > 1]:
        moved = np.zeros(len(chances) + size)
        moved[: len(chances)] += chances / 2
        moved[size:] += chances / 2
        chances = moved
    sums = 2 * np.arange(len(chances)) - sizes.sum()
    return float(min(1.0, chances[np.abs(sums) >= observed].sum()))
