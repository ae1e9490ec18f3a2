"""The design effect against its definition, on data where it is known."""

import numpy as np
import pytest
from scipy import stats

from tlcli.metrics.groups import NORMAL_QUANTILE_95, PRIOR_GROUPS, dependence


def of(right, groups):
    return dependence(right - right.mean(), right, groups)


def test_without_groups_nothing_changes():
    right = np.arange(30) % 3 > 0
    for groups in (None, np.arange(30)):
        found = of(right, groups)
        assert (found.design_effect, found.quantile, found.num_groups) == (1.0, NORMAL_QUANTILE_95, None)


@pytest.mark.parametrize("size", [2, 5, 20])
def test_images_that_agree_within_groups_have_the_size_as_effect(size):
    """The variance of a mean of 12 groups, estimated without bias, is 12 / 11 of the plain one."""
    right = np.repeat(np.arange(12) % 3 > 0, size)
    found = of(right, np.repeat(np.arange(12), size))
    weight = PRIOR_GROUPS / (PRIOR_GROUPS + 4)  # of 12 groups, 4 are wrong
    assert found.design_effect == pytest.approx(size * ((1 - weight) * 12 / 11 + weight))
    assert found.quantile == pytest.approx(stats.t.ppf(0.975, 11))
    assert found.num_groups == 12


def test_groups_that_all_have_the_same_share_keep_only_the_prior():
    """The variance between groups is 0, so the estimate is its least, 1, and one group of doubt is left."""
    right = np.tile(np.arange(10) % 2 > 0, 20)
    found = of(right, np.repeat(np.arange(20), 10))
    weight = PRIOR_GROUPS / (PRIOR_GROUPS + 20)
    assert found.design_effect == pytest.approx((1 - weight) * 1 + weight * 10)


def test_uneven_groups_have_the_degrees_of_freedom_of_their_effective_number():
    sizes = np.array([40, *[1] * 20])
    found = of(np.arange(60) % 2 > 0, np.repeat(np.arange(21), sizes))
    assert found.quantile == pytest.approx(stats.t.ppf(0.975, 60**2 / (1600 + 20) - 1))


def test_a_single_group_says_next_to_nothing():
    found = of(np.arange(10) > 3, np.zeros(10, int))
    assert found.design_effect == pytest.approx(10)
    assert found.quantile == pytest.approx(stats.t.ppf(0.975, 1))
