"""A chosen head's corrected score: unbiased on noise, by whole groups, never by what chose the head."""

import numpy as np
import pytest
import torch

from tlcli.config.head import HeadOptions
from tlcli.heads.choice import Scores, Trials
from tlcli.heads.fit import fit_head, held_out_scores
from tlcli.heads.linear import LinearHead
from tlcli.heads.nested import RESAMPLES, bootstrapped, nested, outer_folds, part_of
from tlcli.heads.task import make_task

CPU = torch.device("cpu")


def trials(loss, *, members=None, rows=None):
    loss = torch.as_tensor(loss, dtype=torch.float64)
    correct = loss < 1
    rows = torch.arange(loss.shape[1]) if rows is None else rows
    return Trials(Scores(loss, correct), rows, torch.ones(len(loss), dtype=torch.bool))


def task_of(num_rows=60, num_classes=3, groups=None, options=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    features = torch.randn(num_rows, 8, generator=draw) + labels[:, None]
    return make_task(features, labels, num_classes, options or HeadOptions(), groups, CPU)


# ---- the bootstrap ----------------------------------------------------------------------------------------


def test_among_equally_good_members_the_bootstrap_finds_what_each_is_worth():
    """48 members of mean loss 1: the smallest mean of 40 rows is far below, the corrected one is not."""
    raw, corrected, right = [], [], []
    for seed in range(20):
        loss = np.random.default_rng(seed).normal(1.0, 0.5, (48, 40))
        found = bootstrapped(trials(loss), np.arange(40), 0)
        raw.append(loss.mean(1).min())
        corrected.append(found.log_loss.mean())
        right.append(found.correct.mean())
    assert np.mean(raw) < 0.85
    assert np.mean(corrected) == pytest.approx(1.0, abs=0.03)
    assert np.mean(right) == pytest.approx(0.5, abs=0.03)


def test_rows_of_a_group_are_drawn_together():
    """Six copies of each row are no more than the row: left apart, copies would choose for each other."""
    loss = np.random.default_rng(0).normal(1.0, 0.5, (48, 40))
    groups = np.repeat(np.arange(40), 6)
    copies = trials(np.repeat(loss, 6, 1))
    whole = bootstrapped(copies, groups, 0)
    single = bootstrapped(trials(loss), np.arange(40), 0)
    np.testing.assert_allclose(whole.log_loss, np.repeat(single.log_loss, 6))
    apart = bootstrapped(copies, np.arange(240), 0)
    assert apart.log_loss.mean() < whole.log_loss.mean() - 0.05


def test_the_bootstrap_is_the_mean_over_the_draws_that_leave_a_row_out():
    loss = np.random.default_rng(1).normal(1.0, 0.5, (3, 8))
    found = bootstrapped(trials(loss), np.arange(8), 5)
    draw, seen = np.random.default_rng(5), [[] for _ in range(8)]
    for _ in range(RESAMPLES):
        rows = draw.integers(0, 8, 8)
        member = loss[:, rows].mean(1).argmin()
        for row in set(range(8)) - set(rows.tolist()):
            seen[row].append(loss[member, row])
    assert found.log_loss == pytest.approx([np.mean(values) for values in seen])
    assert found.method == "bootstrap"


def test_where_one_member_is_clearly_best_there_is_nothing_to_correct():
    loss = np.random.default_rng(2).normal(1.0, 0.1, (5, 30)) + np.arange(5)[:, None]
    rows = torch.arange(30) * 2
    found = bootstrapped(trials(loss, rows=rows), np.arange(30), 0)
    np.testing.assert_allclose(found.log_loss, loss[0])
    assert found.rows.tolist() == rows.tolist()


# ---- nested -----------------------------------------------------------------------------------------------


def test_nested_measures_each_row_once_by_a_head_that_never_saw_its_fold():
    groups = torch.arange(60) // 2
    task = task_of(groups=groups)
    kept = []

    def fit(part):
        kept.append({tuple(row) for row in part.features.tolist()})
        assert len(part.row_weights) == len(part.folds) == len(part.groups) == len(part.labels)
        for group in part.groups.unique():
            assert part.folds[part.groups == group].unique().numel() == 1
        return LinearHead(torch.eye(3, 8), torch.zeros(3), False)

    found = nested(task, fit)
    assert sorted(found.rows.tolist()) == list(range(60))
    folds, num_folds = outer_folds(task)
    assert len(kept) == num_folds == 10
    for row in found.rows:
        assert tuple(task.features[row].tolist()) not in kept[int(folds[row])]
    logits = task.features[torch.from_numpy(found.rows), :3].double()
    labels = task.labels[torch.from_numpy(found.rows)]
    np.testing.assert_allclose(
        found.log_loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    )
    np.testing.assert_array_equal(found.correct, (logits.argmax(1) == labels).double())


def test_rows_that_always_train_stay_in_every_part():
    labels = torch.tensor([0] * 10 + [1] * 10 + [2])
    task = make_task(torch.randn(21, 4), labels, 3, HeadOptions(), None, CPU)
    folds, num_folds = outer_folds(task)
    for fold in range(num_folds):
        part = part_of(task, folds != fold, fold)
        assert 2 in part.labels
        assert len(part.labels) == 21 - int((folds == fold).sum())
        assert part.num_folds > 1


# ---- both -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "bootstrap"),
        ({"l2": "0.1", "scaling": "plain"}, "cross-validation"),
        ({"head": "mlp:4", "epochs": 3}, "nested"),
    ],
)
def test_the_method_follows_what_was_chosen(options, method):
    options = HeadOptions(**options)
    task = task_of()
    fitted = fit_head(task.features, task.labels, 3, options)
    found = held_out_scores(fitted, options)
    assert found.method == method
    assert sorted(found.rows.tolist()) == list(range(60))
    assert found.document()["num_samples"] == 60
    assert 0 <= found.correct.min() <= found.correct.max() <= 1
    if method == "cross-validation":
        assert found.document()["top1_accuracy"] == pytest.approx(fitted.cv["top1_accuracy"])
        assert found.document()["log_loss"] == pytest.approx(fitted.cv["log_loss"])


def test_without_folds_there_is_nothing_to_correct():
    fitted = fit_head(torch.randn(3, 4), torch.arange(3), 3, HeadOptions())
    assert held_out_scores(fitted, HeadOptions()) is None
    assert fitted.alone().task is None


def test_on_random_labels_the_corrected_loss_is_above_the_one_that_chose():
    raw, corrected = [], []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        features, labels = torch.randn(40, 16, generator=draw), torch.randperm(40, generator=draw) % 2
        fitted = fit_head(features, labels, 2, HeadOptions())
        raw.append(fitted.cv["log_loss"])
        corrected.append(held_out_scores(fitted, HeadOptions()).log_loss.mean())
    assert np.mean(corrected) > np.mean(raw) + 0.01
    assert np.mean(corrected) > np.log(2)  # no head knows more than chance
