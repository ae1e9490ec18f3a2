"""The sign test against its closed form."""

from math import comb

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
