"""Heads in closed form: sums that add, agreement with scikit-learn, degenerate data, and temperatures."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.heads.points import make
from tlcli.config.head import SCALINGS, HeadOptions
from tlcli.errors import DataError
from tlcli.heads import discriminants
from tlcli.heads.closed_form import AUTO_L2_CLOSED
from tlcli.heads.discriminants import Discriminants, Ridge, nearest_directions, nearest_means
from tlcli.heads.fit import fit_head, num_heads
from tlcli.heads.head import head_from_state
from tlcli.heads.linear import LinearHead, unit_rows
from tlcli.heads.neighbours import NeighboursHead, nearest, stored_rows
from tlcli.heads.scaled import FoldSums, scale
from tlcli.heads.sums import Sums, add_all, sum_rows
from tlcli.heads.task import make_task
from tlcli.heads.temperature import fit_temperature

KINDS = ("ridge", "lda", "ncm", "knn")
LINEAR_KINDS = ("ridge", "lda", "ncm")


def assert_close(one: Sums, two: Sums, tolerance: float = 1e-9) -> None:
    for name, value in one.about(two.shift).arrays().items():
        scale = max(1.0, float(two.arrays()[name].abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(value, two.arrays()[name], atol=tolerance * scale, rtol=0)


def scores_of(scorer, rows):
    return rows.double() @ scorer.weight.T + scorer.bias


# ---- sums -------------------------------------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 90), max_size=5),
    weighted=st.booleans(),
    unit=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_sums_add_over_any_division_into_parts(cuts, weighted, unit, seed):
    """Parts about shifts of their own, in any order, empty ones among them."""
    features, labels = make(90, 12, 3, seed=seed)
    weights = torch.rand(90, generator=torch.Generator().manual_seed(seed)) if weighted else None
    whole = sum_rows(features, labels, 4, row_weights=weights, unit=unit)
    edges = [0, *sorted(cuts), 90]
    parts = [
        sum_rows(
            features[a:b], labels[a:b], 4, row_weights=None if weights is None else weights[a:b], unit=unit
        )
        for a, b in itertools.pairwise(edges)
    ]
    assert_close(add_all(parts), whole)
    assert_close(add_all(parts[::-1]), whole)


def test_sums_are_what_they_say():
    features, labels = make(50, 8, 3)
    weights = torch.linspace(0.5, 2.0, 50)
    sums = sum_rows(features, labels, 4, row_weights=weights)
    rows, weights = features.double(), weights.double()
    assert sums.counts.tolist() == [17, 17, 16, 0]
    mean = (weights[:, None] * rows).sum(0) / weights.sum()
    torch.testing.assert_close(sums.mean + sums.shift, mean)
    expected = np.cov(rows.numpy().T, aweights=weights.numpy(), ddof=0)
    np.testing.assert_allclose(sums.covariance(), expected, atol=1e-10)
    again = Sums.from_arrays(sums.arrays())
    assert_close(again, sums)


def test_order_of_rows_changes_nothing_beyond_rounding():
    features, labels = make(120, 20, 3)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    assert_close(sum_rows(features[order], labels[order], 3), sum_rows(features, labels, 3))


def test_fp32_blocks_agree_with_fp64_products(monkeypatch):
    """A large mean and small variances, of which products about zero would leave nothing."""
    features, labels = make(9000, 60, 3)
    features = features * 1e-2 + 50.0
    exact = sum_rows(features, labels, 3)
    monkeypatch.setattr("tlcli.heads.sums.EXACT_WORK", 0)
    monkeypatch.setattr("tlcli.heads.sums.STRIP", 16)
    fast = sum_rows(features, labels, 3)
    error = (fast.covariance() - exact.covariance()).abs().max()
    assert float(error / exact.covariance().diagonal().mean()) < 1e-5


@pytest.mark.parametrize("scaling", SCALINGS)
def test_leaving_out_a_fold_is_fitting_without_it(scaling):
    features, labels = make(90, 20, 3)
    options = HeadOptions(class_weights="balanced")
    task = make_task(features, labels, 3, options, None, torch.device("cpu"))
    scaled = scale(features, (scaling,), rotate=True)[scaling]
    parts = FoldSums(task, products=True).parts(scaled)
    for fold in range(task.num_folds):
        kept = task.folds != fold
        direct = sum_rows(
            scaled.coordinates(features[kept]), labels[kept], 3, row_weights=task.row_weights[kept]
        )
        assert_close(add_all(parts[:fold] + parts[fold + 1 :]), direct, 1e-6)


# ---- against scikit-learn ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "width"), [(200, 30), (40, 60)])
@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_ridge_agrees_with_sklearn(num_rows, width, l2):
    from sklearn.linear_model import Ridge as SklearnRidge
    from sklearn.linear_model import RidgeClassifier

    features, labels = make(num_rows, width, 3)
    scores = scores_of(Ridge(sum_rows(features, labels, 3)).at(l2), features)
    targets = np.eye(3)[labels]
    theirs = SklearnRidge(alpha=l2 * num_rows).fit(features.double(), targets)
    np.testing.assert_allclose(scores, theirs.predict(features.double()), atol=1e-6)
    classifier = RidgeClassifier(alpha=l2 * num_rows).fit(features.double(), labels)
    np.testing.assert_allclose(2 * scores - 1, classifier.decision_function(features.double()), atol=1e-6)


@pytest.mark.parametrize(("num_rows", "width"), [(200, 30), (40, 60)])
@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
@pytest.mark.parametrize("balanced", [False, True])
def test_lda_agrees_with_sklearn(num_rows, width, shrinkage, balanced):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, labels = make(num_rows, width, 3)
    features, labels = features[: -num_rows // 5], labels.sort().values[: -num_rows // 5]
    counts = torch.bincount(labels).float()
    weights = (len(labels) / 3 / counts)[labels] if balanced else None
    sums = sum_rows(features, labels, 3, row_weights=weights)
    scores = scores_of(Discriminants(sums, width).at(shrinkage / (1 - shrinkage)), features)
    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=shrinkage, priors=[1 / 3] * 3 if balanced else None
    ).fit(features.double(), labels)
    expected = theirs.predict_log_proba(features.double())
    np.testing.assert_allclose(scores.log_softmax(1), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_coordinates_of_the_span_change_no_score(kind):
    features, labels = make(40, 70, 3)
    scores = []
    for rotate in (True, False):
        scaled = scale(features, ("standardised",), rotate=rotate)["standardised"]
        assert (scaled.rotation is not None) == rotate
        sums = sum_rows(scaled.coordinates(features), labels, 3)
        scorer = (Ridge(sums) if kind == "ridge" else Discriminants(sums, 70)).at(0.1)
        scores.append(scaled.head(scorer, 1.0).logits(make(40, 70, 3, seed=1)[0]))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-3)


def test_class_means_agree_with_sklearn():
    from sklearn.neighbors import NearestCentroid

    features, labels = make(150, 30, 4, spread=0.5)
    ours = scores_of(nearest_means(sum_rows(features, labels, 4, products=False)), features).argmax(1)
    np.testing.assert_array_equal(ours, NearestCentroid().fit(features, labels).predict(features))
    unit = unit_rows(features)
    ours = scores_of(nearest_directions(sum_rows(features, labels, 4, unit=True, products=False)), unit)
    means = unit_rows(torch.stack([unit[labels == label].mean(0) for label in range(4)]))
    torch.testing.assert_close(ours.float(), unit @ means.T)


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_neighbours_agree_with_sklearn(neighbours):
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = make(200, 30, 3, spread=0.7)
    train, test = features[:150], features[150:]
    head = NeighboursHead(
        stored_rows(train), labels[:150].int(), torch.ones(3), torch.full((3,), 1 / 3), torch.zeros(3),
        neighbours, 0.07, 1e-9,
    )  # fmt: skip
    model = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(train, labels[:150])
    np.testing.assert_allclose(head.logits(test).exp(), model.predict_proba(test), atol=1e-4)


def test_a_refined_solution_is_the_exact_one(monkeypatch):
    features, labels = make(400, 120, 3)
    sums = sum_rows(features, labels, 3)
    refined = Ridge(sums).at(1e-3).weight
    monkeypatch.setattr(discriminants, "REFINED_SHARE", 1e9)
    torch.testing.assert_close(refined, Ridge(sums).at(1e-3).weight, atol=1e-6, rtol=1e-4)


# ---- the grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_learns_and_reports(kind, class_weights):
    features, labels = make(340, 40, 3)
    options = HeadOptions(head=kind, class_weights=class_weights)
    fitted = fit_head(features[:160], labels[:160], 3, options)
    assert isinstance(fitted.head, NeighboursHead if kind == "knn" else LinearHead)
    logits = fitted.head.logits(features[160:])
    assert float((logits.argmax(1) == labels[160:]).float().mean()) > 0.85
    assert fitted.cv["folds"] == 5
    assert fitted.cv["num_samples"] == 160
    assert len(fitted.table) <= num_heads(options)
    chosen = next(row for row in fitted.table if {key: row[key] for key in fitted.chosen} == fitted.chosen)
    assert chosen["cv_log_loss"] == fitted.cv["log_loss"]
    loss = float(torch.nn.functional.cross_entropy(logits, labels[160:]))
    assert abs(loss - fitted.cv["log_loss"]) < 0.3  # probabilities mean something on other rows


@pytest.mark.parametrize("kind", KINDS)
def test_is_deterministic_and_survives_saving(kind):
    features, labels = make()
    one, two = (fit_head(features, labels, 3, HeadOptions(head=kind)) for _ in range(2))
    assert one.table == two.table
    again = head_from_state(two.head.document(), two.head.state())
    assert torch.equal(again.logits(features), one.head.logits(features))
    shift = torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(one.head.shifted(shift).logits(features), one.head.logits(features) + shift)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_a_permutation_of_rows_changes_nothing_beyond_rounding(kind, monkeypatch):
    features, labels = make(120, 30, 3)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    one = fit_head(features, labels, 3, HeadOptions(head=kind))
    folds = make_task(features, labels, 3, HeadOptions(), None, torch.device("cpu")).folds.numpy()
    monkeypatch.setattr("tlcli.heads.task.assign_folds", lambda *_: (folds[order.numpy()], 5))
    other = fit_head(features[order], labels[order], 3, HeadOptions(head=kind))
    assert other.chosen.pop("temperature") == pytest.approx(one.chosen.pop("temperature"), rel=1e-3)
    assert other.chosen == one.chosen
    torch.testing.assert_close(other.head.logits(features), one.head.logits(features), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_without_signal_score_like_chance(kind):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(120, 200, generator=generator)
    labels = torch.randint(0, 2, (120,), generator=generator)
    fitted = fit_head(features, labels, 2, HeadOptions(head=kind))
    assert abs(fitted.cv["top1_accuracy"] - 0.5) < 0.17
    assert 0.6 < fitted.cv["log_loss"] < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_data_is_survived(kind):
    """A class without rows, constant columns, one image a class, two images, and nothing to tell apart."""
    options = HeadOptions(head=kind)
    features, labels = make(90, 20, 3)
    features[:, 5], features[:, 6] = 0.0, 7.0
    logits = fit_head(features, labels, 4, options).head.logits(features)
    assert torch.isfinite(logits).all()
    assert (logits.argmax(1) != 3).all()
    for count in (2, 3):
        features, labels = make(count, 40, count)
        fitted = fit_head(features, labels, count, options)
        assert fitted.cv["folds"] == 0
        assert fitted.cv["top1_accuracy"] is None
        assert (fitted.head.logits(features).argmax(1) == labels).all()
    labels = torch.tensor([0, 0, 0, 1] * 5)
    probabilities = fit_head(torch.full((20, 8), 2.5), labels, 2, options).head.logits(torch.ones(1, 8))
    assert float(probabilities.softmax(1)[0, 0]) >= 0.5
    with pytest.raises(DataError, match="not finite"):
        fit_head(torch.full((20, 8), torch.nan), labels, 2, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_unit_of_the_features_does_not_matter(kind, factor):
    features, labels = make()
    one = fit_head(features, labels, 3, HeadOptions(head=kind))
    other = fit_head(features * factor, labels, 3, HeadOptions(head=kind))
    expected = one.head.logits(features).softmax(1)
    torch.testing.assert_close(other.head.logits(features * factor).softmax(1), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_the_l2_grid_is_the_one_given(kind):
    features, labels = make()
    fitted = fit_head(features, labels, 3, HeadOptions(head=kind, l2="0,0.1,2", scaling="plain"))
    assert [row["l2"] for row in fitted.table] == [0.0, 0.1, 2.0]
    if kind == "lda":
        assert [row["shrinkage"] for row in fitted.table] == pytest.approx([0, 1 / 11, 2 / 3])
    wide = fit_head(*make(30, 80, 3), 3, HeadOptions(head=kind, l2="0"))
    assert torch.isfinite(wide.head.weight).all()


def test_large_work_is_thinned_and_says_so(monkeypatch, caplog):
    features, labels = make()
    monkeypatch.setattr("tlcli.heads.closed_form.BUDGET", 1e3)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 3, HeadOptions(head="ridge"))
    assert len(fitted.table) == 3 * len(AUTO_L2_CLOSED[::2])
    assert fitted.cv["num_samples"] == 30
    assert "12 of 24 heads on 1 of 5 folds" in caplog.text
    monkeypatch.setattr("tlcli.heads.neighbours_grid.BUDGET", 0)
    monkeypatch.setattr("tlcli.heads.neighbours_grid.MIN_QUERIES", 40)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 3, HeadOptions(head="knn"))
    assert fitted.cv["num_samples"] == 40
    assert "holds out 40 of 150 rows" in caplog.text


def test_frequent_classes_may_come_first_among_class_means():
    features, labels = make(300, 30, 2, spread=0.3)
    keep = torch.cat([torch.nonzero(labels == 0)[:, 0], torch.nonzero(labels == 1)[:15, 0]])
    plain = fit_head(features[keep], labels[keep], 2, HeadOptions(head="ncm", scaling="plain"))
    assert plain.chosen["prior"] == "shares"
    even = fit_head(
        features[keep], labels[keep], 2, HeadOptions(head="ncm", scaling="plain", class_weights="balanced")
    )
    assert [row["prior"] for row in even.table] == ["equal"]


# ---- neighbours -------------------------------------------------------------------------------------------


def test_rows_of_the_same_fold_and_group_are_not_asked():
    """Copies of one image would answer for each other."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 50, generator=generator).repeat_interleave(2, 0)
    labels = torch.randint(0, 2, (30,), generator=generator).repeat_interleave(2)
    groups = torch.arange(30).repeat_interleave(2)
    fitted = fit_head(features, labels, 2, HeadOptions(head="knn"), groups=groups)
    assert fitted.cv["top1_accuracy"] < 0.8


def test_blocks_change_no_neighbour(monkeypatch):
    features, _ = make(90, 20, 3)
    rows = stored_rows(features)
    usual = nearest(rows, rows, 7)
    monkeypatch.setattr("tlcli.heads.neighbours.SIMILARITIES", 1)
    monkeypatch.setattr("tlcli.heads.neighbours.BLOCK", 13)
    for one, two in zip(nearest(rows, rows, 7), usual, strict=True):
        torch.testing.assert_close(one, two)


def test_large_heads_are_kept_in_fp16(monkeypatch):
    features, labels = make()
    usual = fit_head(features, labels, 3, HeadOptions(head="knn")).head
    monkeypatch.setattr("tlcli.heads.neighbours.SMALL_ELEMENTS", 10)
    small = fit_head(features, labels, 3, HeadOptions(head="knn")).head
    assert small.rows.dtype == torch.float16
    torch.testing.assert_close(
        small.logits(features).softmax(1), usual.logits(features).softmax(1), atol=0.03, rtol=0
    )
    assert dataclasses.replace(small).logits(features[:0]).shape == (0, 3)


# ---- temperature ------------------------------------------------------------------------------------------


def test_the_temperature_is_the_best_one():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial(truth.softmax(1), 1, generator=generator)[:, 0]
    for factor in (1e-3, 1.0, 1e4):
        found = fit_temperature(truth * factor, labels, torch.ones(4000), torch.zeros(5))
        assert found / factor == pytest.approx(1.0, rel=0.1)


def test_rows_that_are_all_right_leave_some_doubt():
    scores = torch.eye(3).repeat(4, 1)
    found = fit_temperature(scores, torch.arange(3).repeat(4), torch.ones(12), torch.zeros(3))
    confidence = float((scores / found).softmax(1).amax())
    assert 0.9 < confidence < 0.99
    assert fit_temperature(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4), torch.zeros(3)) == 1.0
    useless = fit_temperature(-scores, torch.arange(3).repeat(4), torch.ones(12), torch.zeros(3))
    torch.testing.assert_close((-scores / useless).softmax(1), torch.full((12, 3), 1 / 3), atol=1e-3, rtol=0)
