"""Intervals of shares and differences: references, what must hold for any data, and how often they cover."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tlcli.metrics.intervals import difference_interval, paired_interval, share_interval, wilson_interval


def test_wilson_agrees_with_scipy():
    for successes, total in ((0, 10), (10, 10), (147, 153), (1, 1), (50, 100)):
        ours = wilson_interval(successes, total)
        theirs = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
        assert ours.low == pytest.approx(theirs.low, abs=1e-12)
        assert ours.high == pytest.approx(theirs.high, abs=1e-12)
        assert 0.0 <= ours.low < ours.high <= 1.0


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, total):
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, total)


# ---- by groups -------------------------------------------------------------------------------------------


def blocks(num_groups=20, size=10):
    return np.repeat(np.arange(num_groups), size)


@st.composite
def grouped(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    outcomes = st.lists(st.booleans(), min_size=len(groups), max_size=len(groups))
    return groups, np.array(draw(outcomes)), np.array(draw(outcomes))


def test_images_on_their_own_keep_wilsons_interval():
    right = np.arange(50) % 7 > 0
    expected = wilson_interval(int(right.sum()), 50)
    assert share_interval(right) == expected
    assert share_interval(right, np.arange(50)[::-1]) == expected
    assert "num_groups" not in expected.document()


@pytest.mark.parametrize("wrong", [1, 4, 10])
def test_groups_that_agree_count_as_one_image_each_by_students_quantile(wrong):
    """About 20 independent images are left, and the ends x solve |p - x| = t sqrt(x(1 - x) / 20)."""
    right = np.repeat(np.arange(20) >= wrong, 10)
    found, share, quantile = share_interval(right, blocks()), 1 - wrong / 20, stats.t.ppf(0.975, 19)
    for end in (found.low, found.high):
        assert abs(share - end) == pytest.approx(quantile * math.sqrt(end * (1 - end) / 20), rel=0.03)
    assert found.method == "wilson-groups"
    assert found.document()["num_groups"] == 20


def test_all_right_in_groups_is_worth_as_many_images_as_groups():
    found = share_interval(np.ones(200, bool), blocks())
    quantile = stats.t.ppf(0.975, 19)
    assert found.high == 1.0
    assert found.low == pytest.approx(20 / (20 + quantile**2))  # Wilson's lower end at 20 of 20


@settings(max_examples=200, deadline=None)
@given(grouped())
def test_by_groups_an_interval_is_valid_never_narrower_and_does_not_depend_on_order(given):
    groups, right, other = given
    plain, found = share_interval(right), share_interval(right, groups)
    assert 0 <= found.low <= right.mean() <= found.high <= 1
    assert found.high - found.low >= plain.high - plain.low - 1e-12 > 0
    turned = share_interval(~right, groups)
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((found.low, found.high), abs=1e-9)
    order = np.random.default_rng(0).permutation(len(groups))
    moved = share_interval(right[order], 5 - 3 * groups[order])
    assert (moved.low, moved.high) == pytest.approx((found.low, found.high), abs=1e-9)
    gain, alone = difference_interval(right, other, groups), difference_interval(right, other)
    assert -1 <= gain.low <= gain.high <= 1
    assert gain.high - gain.low >= min(2.0, alone.high - alone.low) - 1e-12 or gain.num_groups is not None
    swapped = difference_interval(other, right, groups)
    assert (-swapped.high, -swapped.low) == pytest.approx((gain.low, gain.high), abs=1e-9)


def test_a_difference_of_images_on_their_own_is_agresti_and_mins():
    first, second = np.arange(40) % 4 > 0, np.arange(40) % 3 > 0
    expected = paired_interval(int((first & ~second).sum()), int((second & ~first).sum()), 40)
    assert difference_interval(first, second) == expected
    assert difference_interval(first, second, np.arange(40)) == expected


@pytest.mark.parametrize(
    ("correlation", "share"), [(0.0, 0.98), (0.3, 0.9), (0.6, 0.95), (1.0, 0.5), (1.0, 0.9)]
)
def test_by_groups_an_interval_covers(correlation, share):
    rng, covered, groups = np.random.default_rng(0), 0, blocks()
    for _ in range(1000):
        chance = np.full(20, share)
        if correlation == 1:
            chance = rng.random(20) < share
        elif correlation:
            scale = (1 - correlation) / correlation
            chance = rng.beta(share * scale, (1 - share) * scale, 20)
        found = share_interval(rng.random(200) < np.repeat(chance, 10), groups)
        covered += found.low <= share <= found.high
    assert covered >= 930


def test_by_groups_a_difference_covers():
    rng, covered, groups = np.random.default_rng(0), 0, blocks()
    for _ in range(1000):
        first, second = (np.repeat(rng.random(20) < share, 10) for share in (0.8, 0.7))
        found = difference_interval(first, second, groups)
        covered += found.low <= 0.1 <= found.high
    assert covered >= 930
