"""Linear heads against scikit-learn, at every l2, and what their solutions must not depend on."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.heads.points import make, scaled
from tlcli.config.head import SCALINGS, HeadOptions
from tlcli.heads import linear_grid
from tlcli.heads.linear import unit_rows
from tlcli.heads.linear_grid import AUTO_L2, cross_validate
from tlcli.heads.logistic import TOLERANCE, solve
from tlcli.heads.spaces import Problems, make_spaces
from tlcli.heads.task import make_task
from tlcli.progress import Silent

LOW_L2 = [1e-6, 1e-4, 1e-2, 1.0]
SHAPES = [(150, 40), (30, 60), (55, 60), (400, 300), (350, 500)]


def fold_of(features, labels, scaling="plain", weights=None):
    """Return the fold that trains on all rows, and what its basis is made of."""
    task = task_of(features, labels, int(labels.max()) + 1)
    if weights is not None:
        task = dataclasses.replace(task, row_weights=weights)
    inputs = linear_grid.scaled_rows(task, scaling)
    return linear_grid.make_fold(task, scaling, inputs, torch.ones(len(labels), dtype=torch.bool)), inputs


def problems(folds, num_classes, l2, smoothing=0.0):
    return Problems(folds, num_classes, torch.tensor(l2, dtype=torch.float64), smoothing)


def task_of(features, labels, num_classes, **options):
    return make_task(features, labels, num_classes, HeadOptions(**options), None, torch.device("cpu"))


def sklearn_probabilities(rows, labels, held, l2, sample_weight=None):
    from sklearn.linear_model import LogisticRegression

    strength = (2.0 if int(labels.max()) == 1 else 1.0) / (l2 * len(labels))
    # At l2 1e-6 the default solver is 0.007 off by itself with tol 1e-8.
    model = LogisticRegression(C=strength, tol=1e-12, max_iter=100_000, solver="newton-cg")
    return model.fit(rows, labels, sample_weight).predict_proba(held)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_held_out_scores_are_scikit_learns_at_every_l2(scaling, num_rows, width, num_classes):
    features, labels = make(num_rows + 40, width, num_classes)
    train, held = slice(40, None), slice(0, 40)
    fold, _ = fold_of(features[train], labels[train], scaling)
    inputs = unit_rows(features) if scaling == "l2-normalised" else features
    solved = solve(problems([fold], num_classes, LOW_L2), tolerance=1e-4 if num_rows < 100 else TOLERANCE)
    assert solved.converged.all()
    for index, l2 in enumerate(LOW_L2):
        outputs = fold.basis.logits(solved.weights[0, index], inputs[held]).T.double().softmax(1)
        exact = sklearn_probabilities(
            scaled(features[train], features[train], scaling),
            labels[train],
            scaled(features[train], features[held], scaling),
            l2,
        )
        assert np.abs(outputs.numpy() - exact).max() < 5e-3
        own = np.arange(40), labels[held].numpy()
        ours, theirs = -np.log(outputs.numpy()[own]).mean(), -np.log(exact[own]).mean()
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.002)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_a_head_is_its_solution(scaling, num_rows, width):
    features, labels = make(num_rows, width, 3)
    fold, inputs = fold_of(features, labels, scaling)
    weights = solve(problems([fold], 3, [1e-3])).weights[0, 0]
    head = fold.basis.head(weights, normalise=scaling == "l2-normalised")
    torch.testing.assert_close(
        head.logits(features), fold.basis.logits(weights, inputs).T, atol=2e-3, rtol=1e-3
    )
    on_rows = fold.basis.coordinates.values @ fold.basis.inward(weights).T
    torch.testing.assert_close(head.logits(features), on_rows.float(), atol=2e-3, rtol=1e-3)


def test_a_column_that_hardly_varies_is_not_blown_up():
    features, labels = make(60, 20, 3)
    for column in (torch.zeros(60).index_fill(0, torch.tensor(7), 1e-3), torch.full((60,), 5.0)):
        features[:, 4] = column
        basis = fold_of(features, labels, "standardised")[0].basis
        size = float(basis.factor[4] / basis.coordinates.divisor[4])
        others = basis.factor / basis.coordinates.divisor
        assert size <= 21 * float(others.median())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("width", [50, 100])
def test_held_out_rows_shape_nothing(scaling, width):
    """Whatever the held-out rows of a fold are, its heads stay the same."""
    features, labels = make(60, width, 3)
    task = task_of(features, labels, 3)
    other = features.clone()
    other[task.folds == 0] = 50.0 * features[task.folds == 0].flip(1)
    relabelled = torch.where(task.folds == 0, (labels + 1) % 3, labels)
    changed = dataclasses.replace(task, features=other, labels=relabelled)
    found = []
    for each in (task, changed):
        inputs = linear_grid.scaled_rows(each, scaling)
        fold = linear_grid.make_fold(each, scaling, inputs, each.folds != 0)
        weights = linear_grid.solve_grid(each, [fold], (1e-5, 1e-2)).weights[0]
        found.append(fold.basis.logits(weights.flatten(0, 1), inputs[task.folds != 0]).softmax(0))
    torch.testing.assert_close(*found, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("num_rows", "width"), [(60, 100), (500, 60)])
def test_a_score_does_not_depend_on_its_companions(num_rows, width):
    features, labels = make(num_rows, width, 3)
    task = task_of(features, labels, 3)
    values = (1e-5, *AUTO_L2)
    whole = cross_validate(task, SCALINGS, values, task.num_folds, Silent()).log_loss.mean(1)
    for index in (0, 1, 8, 16):
        for number, scaling in enumerate(SCALINGS):
            alone = cross_validate(task, (scaling,), values[index : index + 1], task.num_folds, Silent())
            assert float(alone.log_loss.mean()) == pytest.approx(
                float(whole[number * len(values) + index]), rel=0.01, abs=0.001
            )


@pytest.mark.parametrize("num_classes", [2, 4])
def test_row_weights_are_scikit_learns(num_classes):
    features, labels = make(120, 20, num_classes)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(0)) + 0.1
    weights[:10] = 0.0
    fold, _ = fold_of(features, labels, weights=weights)
    solved = solve(problems([fold], num_classes, [1e-2]), tolerance=1e-4).weights[0, 0]
    rows = scaled(features, features, "plain")
    exact = sklearn_probabilities(rows, labels, rows, 1e-2, (weights / weights.mean()).numpy())
    ours = fold.basis.logits(solved, features).T.softmax(1)
    np.testing.assert_allclose(ours, exact, atol=1e-3)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_smoothed_targets_reach_the_stationary_point(num_classes):
    features, labels = make(120, 20, num_classes)
    fold, _ = fold_of(features, labels)
    solved = solve(problems([fold], num_classes, [1e-2], smoothing=0.2), tolerance=1e-5).weights[0, 0]
    rows = scaled(features, features, "plain")
    size = float((features.double() - features.double().mean(0)).square().mean().sqrt())
    weight, bias = fold.basis.unscaled(solved)
    weight, bias = weight.double() * size, bias + weight.double() @ features.double().mean(0)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    outputs = rows @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(outputs, labels, label_smoothing=0.2)
    loss = loss + 0.5e-2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert float(gradient.abs().max()) < 1e-4


def test_folds_of_different_sizes_are_solved_side_by_side():
    features, labels = make(90, 30, 3)
    parts = [slice(0, 70), slice(0, 20), slice(5, 90)]
    folds = [fold_of(features[part], labels[part])[0] for part in parts]
    together = solve(problems(folds, 3, LOW_L2))
    for number, part in enumerate(parts):
        alone = solve(problems([fold_of(features[part], labels[part])[0]], 3, LOW_L2))
        for index in range(len(LOW_L2)):
            one = folds[number].basis.logits(together.weights[number, index], features).softmax(0)
            two = folds[number].basis.logits(alone.weights[0, index], features).softmax(0)
            torch.testing.assert_close(one, two, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("num_rows", "num_classes"), [(400, 2), (400, 5), (330, 3)])
def test_products_in_bf16_change_no_solution(monkeypatch, num_rows, num_classes):
    features, labels = make(num_rows, 500 if num_rows < 400 else 330, num_classes)
    grid = torch.logspace(-4, 1, 24).tolist()
    fold, _ = fold_of(features, labels, "standardised")
    assert fold.basis.rest
    usual = solve(problems([fold], num_classes, grid))
    monkeypatch.setattr("tlcli.heads.spaces.SMALL_ELEMENTS", 0)
    monkeypatch.setattr("tlcli.heads.spaces.fast_bf16", lambda _: (True, ""))
    low = solve(problems([fold], num_classes, grid))
    assert low.converged.all()
    assert (low.decrement <= TOLERANCE).all()
    for index in range(len(grid)):
        one, two = (fold.basis.logits(found.weights[0, index], features) for found in (usual, low))
        torch.testing.assert_close(one.softmax(0), two.softmax(0), atol=2e-2, rtol=0)


def test_a_hessian_that_cannot_be_factored_is_done_without():
    features, labels = make(30, 60, 3)
    fold, _ = fold_of(features, labels)
    space = make_spaces(problems([fold], 3, [1e-2]))[0]
    assert space.hessian(torch.full((3, 30), 0.01), 1e-2) is not None
    assert space.hessian(torch.full((3, 30), -1.0), 1e-2) is None
