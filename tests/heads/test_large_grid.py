"""The search of a head where a step takes seconds, against the whole grid and exact fits."""

import logging

import pytest
import torch

from tests.heads.points import make
from tlcli.config.head import HeadOptions
from tlcli.heads import large_grid
from tlcli.heads.fit import fit_head
from tlcli.heads.linear_grid import fit_linear, make_fold, scaled_rows
from tlcli.heads.task import make_task
from tlcli.progress import Silent


@pytest.fixture(autouse=True)
def small_counts_as_large(monkeypatch):
    monkeypatch.setattr(large_grid, "LARGE_WORK", 0.0)
    monkeypatch.setattr(large_grid, "SAMPLE_WORK", 4.0 * 120 * 60 * 5)


def blobs(num_rows, width, num_classes, noise=2.0):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, width, generator=generator)
    labels = torch.randperm(num_rows, generator=generator) % num_classes
    return 0.4 * centres[labels] + noise * torch.randn(num_rows, width, generator=generator), labels


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_search_is_as_good_as_the_whole_grid(num_classes):
    features, labels = blobs(4000, 60, num_classes)
    options = HeadOptions()
    found = fit_head(features[:2000], labels[:2000], num_classes, options)
    task = make_task(features[:2000], labels[:2000], num_classes, options, None, torch.device("cpu"))
    whole = fit_linear(task, options, Silent())

    def loss(head):
        return float(torch.nn.functional.cross_entropy(head.logits(features[2000:]), labels[2000:]))

    assert loss(found.head) <= 1.02 * loss(whole.head)
    assert len(found.table) < 10
    assert found.cv["num_samples"] == int((task.folds == 0).sum())


@pytest.mark.parametrize("scaling", ["plain", "standardised", "l2-normalised"])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_solution_from_anywhere_is_the_one_from_zero(scaling, num_classes):
    features, labels = make(300, 30, num_classes)
    task = make_task(features, labels, num_classes, HeadOptions(), None, torch.device("cpu"))
    inputs = scaled_rows(task, scaling)
    part, whole = (
        make_fold(task, scaling, inputs, training) for training in (task.folds != 0, task.folds > -2)
    )
    other, _ = large_grid.solved_from(task, part, 1e-1, 1e-3, None)
    zero, _ = large_grid.solved_from(task, whole, 1e-2, 1e-4, None)
    start = whole.basis.inverse(part.basis.inward(other))
    torch.testing.assert_close(
        whole.basis.logits(start, inputs), part.basis.logits(other, inputs), atol=1e-3, rtol=1e-3
    )
    warm, _ = large_grid.solved_from(task, whole, 1e-2, 1e-4, start)
    torch.testing.assert_close(
        whole.basis.logits(warm, inputs).softmax(0), whole.basis.logits(zero, inputs).softmax(0),
        atol=1e-3, rtol=0,
    )  # fmt: skip


def test_the_search_says_what_it_does_and_ends_where_the_loss_rises(caplog):
    features, labels = blobs(800, 60, 5)
    with caplog.at_level(logging.INFO, "tlcli"):
        found = fit_head(features, labels, 5, HeadOptions())
    assert "large data: a sample of the rows says scaling" in caplog.text
    losses = [row["cv_log_loss"] for row in sorted(found.table, key=lambda row: row["l2"])]
    assert min(losses) not in (losses[0], losses[-1])
    assert len({row["l2"] for row in found.table}) == len(found.table)


def test_given_penalties_are_not_searched():
    features, labels = blobs(200, 20, 3)
    found = fit_head(features, labels, 3, HeadOptions(l2="0.01,0.1"))
    assert {row["l2"] for row in found.table} == {0.01, 0.1}


def test_few_rows_are_not_searched():
    """Coordinates of their span are not features, which a fold could standardise."""
    for num_rows, large in ((40, False), (90, True)):
        features, labels = blobs(num_rows, 100, 3)
        task = make_task(features, labels, 3, HeadOptions(), None, torch.device("cpu"))
        assert large_grid.is_large(task) == large
