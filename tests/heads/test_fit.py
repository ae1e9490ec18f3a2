"""The grid of linear heads: folds, the choice, and bad input."""

import logging

import numpy as np
import pytest
import torch

from tests.heads.points import make
from tlcli.config.head import SCALINGS, HeadOptions
from tlcli.data.folds import assign_folds
from tlcli.errors import DataError
from tlcli.heads.choice import Scores, choose_member
from tlcli.heads.fit import fit_head
from tlcli.heads.head import head_from_state
from tlcli.heads.linear import LinearHead
from tlcli.heads.linear_grid import AUTO_L2
from tlcli.warned import collected


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_the_unit_of_the_features_does_not_matter(factor):
    features, labels = make()
    one = fit_head(features, labels, 3, HeadOptions())
    other = fit_head(features * factor, labels, 3, HeadOptions())
    assert one.chosen == other.chosen
    torch.testing.assert_close(
        one.head.logits(features), other.head.logits(features * factor), atol=2e-2, rtol=1e-2
    )


def test_fit_head_learns_and_reports():
    features, labels = make(240, 40, 3)
    fitted = fit_head(features[:160], labels[:160], 3, HeadOptions())
    assert isinstance(fitted.head, LinearHead)
    accuracy = (fitted.head.logits(features[160:]).argmax(1) == labels[160:]).float().mean()
    assert accuracy > 0.85
    assert len(fitted.table) == 48
    assert {row["scaling"] for row in fitted.table} == set(SCALINGS)
    assert fitted.cv["folds"] == 5
    assert fitted.cv["num_samples"] == 160
    assert abs(fitted.cv["top1_accuracy"] - float(accuracy)) < 0.15
    chosen = next(row for row in fitted.table if {key: row[key] for key in fitted.chosen} == fitted.chosen)
    assert chosen["cv_log_loss"] == fitted.cv["log_loss"]


def test_labels_without_signal_score_like_chance():
    """Held-out rows must not leak into what scores them."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(120, 200, generator=generator)
    labels = torch.randint(0, 2, (120,), generator=generator)
    fitted = fit_head(features, labels, 2, HeadOptions())
    assert abs(fitted.cv["top1_accuracy"] - 0.5) < 0.17
    assert fitted.cv["log_loss"] > 0.65


def test_is_deterministic():
    features, labels = make()
    first, second = (fit_head(features, labels, 3, HeadOptions()) for _ in range(2))
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.table == second.table


def test_head_survives_saving():
    features, labels = make()
    for head in (
        fit_head(features, labels, 3, HeadOptions()).head,
        LinearHead(torch.ones(3, 40), torch.zeros(3), True),
    ):
        again = head_from_state(head.document(), head.state())
        assert torch.equal(again.logits(features), head.logits(features))
    with pytest.raises(DataError, match="unknown kind"):
        head_from_state({"kind": "forest"}, {})
    with pytest.raises(DataError, match="lacks 'bias'"):
        head_from_state({"kind": "linear", "normalise": False}, {"weight": torch.ones(2, 2)})


def test_class_weights_help_the_rare_class():
    features, labels = make(300, 30, 2, spread=0.6)
    keep = torch.cat([torch.nonzero(labels == 0)[:, 0], torch.nonzero(labels == 1)[:12, 0]])
    rest = torch.nonzero(labels == 1)[12:, 0]
    recall = {}
    for weights in ("none", "balanced"):
        fitted = fit_head(features[keep], labels[keep], 2, HeadOptions(class_weights=weights))
        recall[weights] = float((fitted.head.logits(features[rest]).argmax(1) == 1).float().mean())
    assert recall["balanced"] > recall["none"]


def test_label_smoothing_lowers_confidence():
    features, labels = make(150, 40, 3, spread=6.0)
    confidence = [
        float(
            fit_head(features, labels, 3, HeadOptions(l2="0.0001", label_smoothing=smoothing))
            .head.logits(features).softmax(1).amax(1).mean()
        )
        for smoothing in (0.0, 0.3)
    ]  # fmt: skip
    assert confidence[0] > 0.98
    assert confidence[1] == pytest.approx(0.8, abs=0.05)


# ---- the choice -------------------------------------------------------------------------------------------


def test_a_plain_layer_wins_within_one_standard_error():
    loss = torch.tensor([[0.9, 0.1, 0.5, 0.7], [0.8, 0.1, 0.5, 0.7], [0.9, 0.9, 0.9, 0.9]]).double()
    scores = Scores(loss, loss < 0.6)
    assert choose_member(scores, torch.tensor([True, False, True])) == 0
    assert choose_member(scores, torch.tensor([False, False, True])) == 1
    assert choose_member(scores, torch.tensor([True, True, True])) == 1


# ---- folds ------------------------------------------------------------------------------------------------


def test_folds_are_stratified():
    labels = np.repeat([0, 1, 2], [50, 23, 7])
    folds, count = assign_folds(labels, np.arange(80), 5, seed=0)
    assert count == 5
    for label in range(3):
        sizes = np.bincount(folds[labels == label], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= 1


def test_folds_keep_groups_whole_and_depend_on_the_seed():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    groups = rng.integers(0, 90, 300)
    folds, _ = assign_folds(labels, groups, 5, seed=0)
    for group in range(90):
        assert len(set(folds[groups == group])) <= 1
    assert np.bincount(folds).min() > 40
    assert not np.array_equal(folds, assign_folds(labels, groups, 5, seed=1)[0])


def test_a_class_in_one_group_always_trains():
    labels = np.array([0] * 10 + [1] * 10 + [2])
    folds, count = assign_folds(labels, np.arange(21), 5, seed=0)
    assert count == 5
    assert folds[-1] == -1
    assert (folds[:-1] >= 0).all()


def test_tiny_data_gets_fewer_folds_and_says_so(caplog):
    features, labels = make(6, 40, 2)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 2, HeadOptions())
    assert fitted.cv["folds"] == 3
    assert "3 folds instead of 5" in caplog.text


def test_two_images_are_enough(caplog):
    features, labels = make(2, 40, 2)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 2, HeadOptions())
    assert fitted.cv["folds"] == 0
    assert fitted.cv["top1_accuracy"] is None
    assert (fitted.head.logits(features).argmax(1) == labels).all()
    assert "too few images" in caplog.text


# ---- degenerate and bad input -----------------------------------------------------------------------------


def test_constant_features_give_the_prior():
    labels = torch.tensor([0, 0, 0, 1] * 5)
    fitted = fit_head(torch.full((20, 8), 2.5), labels, 2, HeadOptions())
    probabilities = fitted.head.logits(torch.full((1, 8), 2.5)).softmax(1)
    assert float(probabilities[0, 0]) == pytest.approx(0.75, abs=0.01)


def test_a_constant_column_and_a_class_without_rows_are_survived():
    features, labels = make(90, 20, 3)
    features[:, 5], features[:, 6] = 0.0, 7.0
    fitted = fit_head(features, labels, 4, HeadOptions())
    outputs = fitted.head.logits(features)
    assert outputs.shape == (90, 4)
    assert torch.isfinite(outputs).all()
    assert (outputs.argmax(1) != 3).all()


def test_no_penalty_on_separable_data_ends():
    features, labels = make(40, 60, 2, spread=8.0)
    fitted = fit_head(features, labels, 2, HeadOptions(l2="0"))
    assert torch.isfinite(fitted.head.weight).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_row(bad):
    features, labels = make()
    features[17, 3] = bad
    with pytest.raises(DataError, match="row 17"):
        fit_head(features, labels, 3, HeadOptions())


@pytest.mark.parametrize("head", ["linear", "mlp:8", "ridge", "lda", "ncm", "knn"])
@pytest.mark.parametrize("factor", [1e30, 1e20, 1e-20, 1e-30])
def test_features_near_the_ends_of_fp32_are_learnt(head, factor):
    features, labels = make(120, 20, 3)
    options = HeadOptions(
        head=head, **({"epochs": 15, "lr": "0.01", "dropout": "0"} if head == "mlp:8" else {})
    )
    usual = fit_head(features, labels, 3, options)
    extreme = fit_head(features * factor, labels, 3, options)
    assert usual.cv["top1_accuracy"] > 0.8
    assert extreme.cv["top1_accuracy"] == pytest.approx(usual.cv["top1_accuracy"], abs=0.03)
    torch.testing.assert_close(
        extreme.head.logits(features * factor).softmax(1), usual.head.logits(features).softmax(1),
        atol=0.02, rtol=0,
    )  # fmt: skip


def test_features_beyond_what_a_head_holds_are_refused():
    features, labels = make(30, 10, 3)
    with pytest.raises(DataError, match="The largest feature is"):
        fit_head(features * (3e38 / float(features.abs().max())), labels, 3, HeadOptions())


def test_what_can_teach_nothing_is_told():
    features, labels = make(30, 10, 3)
    cases = {
        "constant_features": (torch.full_like(features, 2.0), labels),
        "one_class": (features, torch.ones_like(labels)),
        "unmeasured_head": (features[:3], labels[:3]),
    }
    for code, (values, truth) in cases.items():
        with collected() as warnings:
            fitted = fit_head(values, truth, 3, HeadOptions())
        assert code in [warning["code"] for warning in warnings]
        assert torch.isfinite(fitted.head.logits(values)).all()
    with collected() as warnings:
        fit_head(features, labels, 3, HeadOptions(l2="0.01,0.1,1"))
    assert not {warning["code"] for warning in warnings} & set(cases)


def test_what_is_no_matrix_of_features_is_refused():
    features, labels = make()
    with pytest.raises(DataError, match=r"\[N, D\]"):
        fit_head(features.view(150, 40, 1, 1), labels, 3, HeadOptions())
    with pytest.raises(DataError, match=r"\[N, D\]"):
        fit_head(features, labels[:10], 3, HeadOptions())
    with pytest.raises(DataError, match="two classes"):
        fit_head(features, labels * 0, 1, HeadOptions())
    with pytest.raises(DataError, match=r"0\.\.1"):
        fit_head(features, labels, 2, HeadOptions())


# ---- how the work is divided changes no result ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tlcli.heads.spaces.SMALL_ELEMENTS", 0),
        ("tlcli.heads.conjugate_gradients.CACHE_ELEMENTS", 64),
        ("tlcli.heads.linear_grid.FEW_OUTPUTS", 0),
        ("tlcli.heads.logistic.BATCH_BYTES", 200_000),
    ],
)
def test_blocks_and_batches_change_no_result(monkeypatch, name, value):
    features, labels = make(90, 100, 3)
    features[:, 3] = 0.0
    features[5] = features[4]  # ranks then differ between scalings
    usual = fit_head(features, labels, 3, HeadOptions())
    monkeypatch.setattr(name, value)
    other = fit_head(features, labels, 3, HeadOptions())
    assert other.chosen == usual.chosen
    for one, two in zip(usual.table, other.table, strict=True):
        # The tolerance determines weakly penalised heads less well: there 1e-4 is little curvature's worth.
        close = 2e-3 if one["l2"] > 5e-3 else 2e-2
        assert one["cv_log_loss"] == pytest.approx(two["cv_log_loss"], abs=close)
    one, two = (fitted.head.logits(features) for fitted in (usual, other))
    if name.endswith("SMALL_ELEMENTS"):
        # The one case that goes to bf16 products, which processors round differently; what the solver's
        # tolerance leaves open shows in large logits first, so probabilities are compared.
        torch.testing.assert_close(two.softmax(1), one.softmax(1), atol=5e-3, rtol=0)
    else:
        torch.testing.assert_close(two, one, atol=5e-3, rtol=5e-3)


def test_large_work_is_thinned_keeps_both_ends_and_says_what_it_drops(monkeypatch, caplog):
    features, labels = make()
    for budget, count in ((1e8, 6), (5e7, 4)):
        monkeypatch.setattr("tlcli.heads.linear_grid.CPU_BUDGET", budget)
        caplog.clear()
        with caplog.at_level(logging.INFO, "tlcli"):
            fitted = fit_head(features, labels, 3, HeadOptions())
        tried = sorted({row["l2"] for row in fitted.table})
        assert len(tried) == count
        assert tried[0] == AUTO_L2[0]
        assert tried[-1] == AUTO_L2[-1]
        dropped = [value for value in AUTO_L2 if value not in tried]
        assert f"tries {count} of 16 l2 values, without " in caplog.text
        assert ", ".join(f"{value:.2g}" for value in dropped) in caplog.text
    fixed = fit_head(features, labels, 3, HeadOptions(l2="0.01,0.02,0.1"))
    assert len(fixed.table) == 9


def test_the_grid_goes_on_where_its_smallest_l2_is_best(caplog):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 48, generator=generator)
    labels = torch.arange(700) % 100
    features = centres[labels] + 0.8 * torch.randn(700, 48, generator=generator)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 100, HeadOptions(scaling="plain"))
    tried = sorted(row["l2"] for row in fitted.table)
    assert len(tried) > 16
    assert tried[0] < 1e-4
    assert "is at the end of the grid: it goes on to" in caplog.text
    assert tried[0] <= fitted.chosen["l2"] < 1e-4
    assert "penalty_at_edge" not in caplog.text
    assert fitted.cv["log_loss"] == min(row["cv_log_loss"] for row in fitted.table)


def test_a_penalty_at_the_edge_of_a_given_grid_is_told():
    features, labels = make()
    with collected() as warnings:
        fit_head(features, labels, 3, HeadOptions(l2="1,10"))
        fit_head(features, labels, 3, HeadOptions(l2="0.1"))
    assert [warning["code"] for warning in warnings] == ["penalty_at_edge"]
    assert "smallest that was tried" in warnings[0]["message"]
    assert "--l2 1e-02,1e-01,1" in warnings[0]["message"]


def test_l2_0_is_its_limit_and_says_so(caplog):
    features, labels = make(60, 100, 3)
    with caplog.at_level(logging.INFO, "tlcli"):
        fitted = fit_head(features, labels, 3, HeadOptions(l2="0"))
    assert "it is the limit, l2 1e-08" in caplog.text
    assert fitted.chosen["l2"] == 1e-8
    limit = fit_head(features, labels, 3, HeadOptions(l2="1e-8"))
    assert fitted.table == limit.table
    assert fitted.cv["top1_accuracy"] > 0.5


def test_class_weights_choose_by_the_weighted_loss_and_report_both():
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((270,), 0), torch.full((18,), 1), torch.full((12,), 2)])
    centres = torch.randn(3, 64, generator=generator)
    features = 0.35 * centres[labels] + torch.randn(300, 64, generator=generator)
    fitted = fit_head(features, labels, 3, HeadOptions(class_weights="balanced"))
    losses = [row["cv_weighted_log_loss"] for row in fitted.table if row["scaling"] != "l2-normalised"]
    assert fitted.cv["weighted_log_loss"] <= min(losses) + 1e-9 or fitted.chosen["scaling"] == "l2-normalised"
    assert fitted.cv["weighted_log_loss"] > fitted.cv["log_loss"]
    plain = fit_head(features, labels, 3, HeadOptions())
    assert "weighted_log_loss" not in plain.cv
    assert "cv_weighted_log_loss" not in plain.table[0]


def test_a_head_that_diverged_never_wins():
    loss = torch.tensor([[0.5, 0.5], [float("nan"), 0.1], [0.7, 0.7]], dtype=torch.float64)
    scores = Scores(loss, torch.ones(3, 2, dtype=torch.bool))
    assert choose_member(scores, torch.ones(3, dtype=torch.bool)) == 0


def test_a_head_that_stopped_short_is_told(caplog, monkeypatch):
    features, labels = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    monkeypatch.setattr("tlcli.heads.conjugate_gradients.MAX_ITERATIONS", 1)
    with caplog.at_level("WARNING", logger="tlcli"):
        fit_head(features, labels, 2, HeadOptions(l2="0.0001"))
    assert "stopped short" in caplog.text
