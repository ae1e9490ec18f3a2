"""The sign test against its closed form, and by groups against every combination of signs."""

from itertools import product
from math import comb

import numpy as np
import pytest

from tlcli.metrics.significance import sign_test


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (9, 2), (2, 9), (40, 21)])
def test_p_is_the_binomial_tail_of_both_sides(first, second):
    """Of n images on which one is right, chance gives each of the two half: two tails of Binomial(n, 1/2)."""
    images = [f"{side}{number}" for side, count in (("f", first), ("s", second)) for number in range(count)]
    both = {"both right": True, "both wrong": False}
    found = sign_test(
        {name: name[0] == "f" for name in images} | both, {name: name[0] == "s" for name in images} | both
    )
    n, larger = first + second, max(first, second)
    tail = sum(comb(n, k) for k in range(larger, n + 1)) / 2**n
    assert (found.only_first, found.only_second) == (first, second)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail) if n else 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_by_groups_p_is_the_share_of_all_signs_of_the_groups(seed):
    rng = np.random.default_rng(seed)
    names = [f"{number}.png" for number in range(24)]
    groups = dict(zip(names, rng.integers(0, 7, 24).tolist(), strict=True))
    del groups["3.png"], groups["4.png"]  # on their own
    first, second = (dict(zip(names, (rng.random(24) < share).tolist(), strict=True)) for share in (0.8, 0.5))
    net = {}
    for name in names:
        key = groups.get(name, name)
        net[key] = net.get(key, 0) + first[name] - second[name]
    sums = [
        abs(sum(s * g for s, g in zip(signs, net.values(), strict=True)))
        for signs in product((1, -1), repeat=len(net))
    ]
    expected = np.mean([value >= abs(sum(net.values())) for value in sums])
    found = sign_test(first, second, groups)
    assert found.p_value == pytest.approx(expected)
    assert (found.only_first, found.only_second) == (
        sum(first[n] and not second[n] for n in names), sum(second[n] and not first[n] for n in names),
    )  # fmt: skip


def test_by_groups_copies_of_an_image_are_one_piece_of_evidence():
    first = {f"{number}": number < 30 for number in range(40)}
    second = dict.fromkeys(first, False)
    groups = {name: int(name) // 10 for name in first}
    assert sign_test(first, second).p_value < 1e-8
    assert sign_test(first, second, groups).p_value == pytest.approx(2 / 2**3)
