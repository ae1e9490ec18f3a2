"""Macro F1 and its interval: against scikit-learn, left-out images counted one by one, and coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score

from tlcli.metrics.intervals import wilson, wilson_interval
from tlcli.metrics.macro_f1 import macro_f1, macro_f1_interval


def reference(labels, named):
    """scikit-learn's, over the classes that have images."""
    return f1_score(labels, named, labels=np.unique(labels), average="macro", zero_division=0)


def jackknife(labels, named):
    """The delete-one variance by leaving out one image after the other."""
    count = len(labels)
    left = [reference(np.delete(labels, i), np.delete(named, i)) for i in range(count)]
    return (count - 1) / count * float(((left - np.mean(left)) ** 2).sum())


def draw(rng, total, classes, accuracy):
    labels = rng.integers(0, classes, total)
    wrong = (labels + rng.integers(1, classes, total)) % classes
    return labels, np.where(rng.random(total) < accuracy, labels, wrong)


@pytest.mark.parametrize(
    ("total", "classes", "accuracy"), [(40, 3, 0.7), (60, 12, 0.6), (25, 2, 0.8), (80, 5, 0.5)]
)
def test_the_width_is_that_of_the_jackknife_left_out_image_by_image(total, classes, accuracy):
    labels, named = draw(np.random.default_rng(1), total, classes, accuracy)
    counts = confusion_matrix(labels, named, labels=range(classes))
    share, variance = reference(labels, named), jackknife(labels, named)
    assert macro_f1(counts) == pytest.approx(share)
    support = counts.sum(1)[counts.sum(1) > 0]
    bound = len(support) ** 2 / (1 / support).sum()
    found = macro_f1_interval(counts)
    expected = wilson(share, min(bound, share * (1 - share) / variance))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_at_100_percent_right_it_has_the_width_of_wilsons_interval(classes):
    found = macro_f1_interval(np.eye(classes, dtype=int) * 6)
    expected = wilson_interval(6 * classes, 6 * classes)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    rare = macro_f1_interval(np.diag([6 * classes - 2, *[2] * (classes - 1)]))
    assert rare.high == 1.0
    assert rare.low < found.low  # a class of two images says little, however many the others have


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 6), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_it_is_an_interval_around_the_score_whatever_the_counts(rows):
    counts = np.array(rows)
    if not counts.sum():
        return
    found, share = macro_f1_interval(counts), macro_f1(counts)
    assert 0 <= found.low <= share + 1e-12
    assert share - 1e-12 <= found.high <= 1
    assert found.low < found.high
    order = np.random.default_rng(0).permutation(len(counts))
    moved = macro_f1_interval(counts[order][:, order])
    assert (moved.low, moved.high) == pytest.approx((found.low, found.high))


def test_groups_of_one_image_change_nothing_and_copies_add_nothing():
    labels, named = draw(np.random.default_rng(2), 60, 3, 0.8)
    counts = confusion_matrix(labels, named)
    plain = macro_f1_interval(counts)
    assert macro_f1_interval(counts, labels, named, np.arange(60)) == plain
    labels, named, groups = (np.repeat(values, 5) for values in (labels, named, np.arange(60)))
    found = macro_f1_interval(5 * counts, labels, named, groups)
    assert found.method == "wilson-jackknife-groups"
    assert found.num_groups == 60
    assert found.low == pytest.approx(plain.low, abs=0.02)
    assert found.high == pytest.approx(plain.high, abs=0.02)


@pytest.mark.parametrize(("total", "classes", "accuracy"), [(50, 5, 0.8), (100, 20, 0.7), (30, 2, 0.95)])
def test_it_covers_where_the_percentile_bootstrap_did_not(total, classes, accuracy):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        labels, named = draw(rng, total, classes, accuracy)
        counts = np.bincount(labels * classes + named, minlength=classes**2).reshape(classes, classes)
        found = macro_f1_interval(counts)
        covered += found.low <= accuracy <= found.high  # the macro F1 of even classes and even mistakes
    assert covered >= 920


def test_it_covers_by_groups():
    rng, covered, groups = np.random.default_rng(0), 0, np.repeat(np.arange(20), 10)
    labels = groups % 2
    for _ in range(500):
        named = np.where(np.repeat(rng.random(20) < 0.9, 10), labels, 1 - labels)
        counts = np.bincount(labels * 2 + named, minlength=4).reshape(2, 2)
        found = macro_f1_interval(counts, labels, named, groups)
        covered += found.low <= 0.9 <= found.high
    assert covered >= 465
