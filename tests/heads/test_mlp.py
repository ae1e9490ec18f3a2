"""MLP heads: batching changes nothing, and each kind of regularisation does what it says."""

import pytest
import torch

from tlcli.config.head import HeadOptions
from tlcli.heads.fit import fit_head
from tlcli.heads.head import head_from_state
from tlcli.heads.mlp import MlpHead, initial_weight
from tlcli.heads.mlp_stack import Grid, TrainingRows, train_mlps
from tlcli.progress import Silent


def rings(num_rows=240, width=6, seed=0):
    """Return two classes no linear head can tell apart: near and far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 2
    direction = torch.nn.functional.normalize(torch.randn(num_rows, width, generator=generator), dim=1)
    radius = 1.0 + 2.0 * labels + 0.2 * torch.randn(num_rows, generator=generator)
    return direction * radius[:, None] * 5 + 2, labels


def rows_for(features, labels, folds=None):
    targets = torch.nn.functional.one_hot(labels, 2).T.float()
    folds = torch.full_like(labels, -1) if folds is None else folds
    return TrainingRows(features, labels, targets, torch.ones(len(labels)), folds)


def grid_for(members, fold=-2):
    lr, l2, dropout = (torch.tensor(values) for values in zip(*members, strict=True))
    return Grid(lr, l2, dropout, torch.full((len(members),), fold))


QUICK = {"head": "mlp:16,8", "epochs": 40, "lr": "0.01", "dropout": "0,0.2", "batch_size": 64}


@pytest.mark.parametrize("extra", [{}, {"batch_norm": True}, {"activation": "tanh", "init": "xavier"}])
def test_learns_what_a_linear_head_cannot(extra):
    features, labels = rings(400)
    linear = fit_head(features[:240], labels[:240], 2, HeadOptions())
    fitted = fit_head(features[:240], labels[:240], 2, HeadOptions(**QUICK, **extra))
    test, expected = features[240:], labels[240:]
    assert (linear.head.logits(test).argmax(1) == expected).float().mean() < 0.85
    assert (fitted.head.logits(test).argmax(1) == expected).float().mean() > 0.9
    assert fitted.cv["top1_accuracy"] > 0.85
    assert len(fitted.table) == 4
    assert 1 <= fitted.chosen["epochs"] <= 40
    assert fitted.curve[0]["cv_loss"] > fitted.curve[-1]["cv_loss"]


def test_a_network_comes_out_the_same_alone_and_in_company():
    features, labels = rings(100)
    options = HeadOptions(head="mlp:16", batch_norm=True, batch_size=32)
    members = [(0.01, 0.0, 0.0), (0.001, 0.5, 0.5), (0.003, 0.1, 0.2)]
    rows = rows_for(features, labels)
    together = train_mlps(rows, grid_for(members), options, epochs=5, progress=Silent())
    for index, member in enumerate(members):
        alone = train_mlps(rows, grid_for([member]), options, epochs=5, progress=Silent())
        for mine, theirs in zip(alone.heads[0].weights, together.heads[index].weights, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_is_a_function_of_the_seed():
    features, labels = rings(80)
    outputs = [
        fit_head(features, labels, 2, HeadOptions(**QUICK, seed=seed)).head.logits(features)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_held_out_rows_have_no_influence():
    features, labels = rings(100)
    folds = torch.arange(100) % 5
    options = HeadOptions(head="mlp:8", batch_norm=True, batch_size=32)
    grid = grid_for([(0.01, 0.0, 0.0)], fold=2)
    one = train_mlps(rows_for(features, labels, folds), grid, options, epochs=4, progress=Silent())
    flipped = torch.where(folds == 2, 1 - labels, labels)
    other = train_mlps(rows_for(features, flipped, folds), grid, options, epochs=4, progress=Silent())
    torch.testing.assert_close(one.train_loss, other.train_loss)
    assert not torch.equal(one.held_out_loss, other.held_out_loss)


def test_stops_early_and_keeps_the_best_epoch():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 30, generator=generator), torch.arange(60) % 2
    folds = torch.arange(60) % 3
    options = HeadOptions(head="mlp:32", patience=3)
    grid = grid_for([(0.01, 0.0, 0.0)], fold=0)
    trained = train_mlps(rows_for(features, labels, folds), grid, options, epochs=60, progress=Silent())
    curve = trained.held_out_loss[:, 0]
    stopped = int(torch.isfinite(curve).sum())
    assert stopped < 60
    best = int(trained.best_epoch[0])
    assert stopped == best + 3
    held = trained.log_loss[0][folds == 0].mean()
    torch.testing.assert_close(held, curve[best - 1])


def test_l1_makes_real_zeros_and_max_norm_holds():
    features, labels = rings(100)
    rows, grid = rows_for(features, labels), grid_for([(0.01, 0.0, 0.0)])
    sparse = train_mlps(rows, grid, HeadOptions(head="mlp:16", l1=0.01), epochs=60, progress=Silent())
    assert float((sparse.heads[0].weights[0] == 0).float().mean()) > 0.2
    bound = train_mlps(rows, grid, HeadOptions(head="mlp:16", max_norm=0.5), epochs=20, progress=Silent())
    unscaled = bound.heads[0].weights[0] * features.std(0, correction=0)
    assert float(unscaled.norm(dim=1).max()) <= 0.5 + 1e-4


def test_l2_shrinks():
    features, labels = rings(100)
    members = [(0.01, 0.0, 0.0), (0.01, 5.0, 0.0)]
    trained = train_mlps(
        rows_for(features, labels),
        grid_for(members),
        HeadOptions(head="mlp:16"),
        epochs=40,
        progress=Silent(),
    )
    free, shrunk = (head.weights[0].norm() for head in trained.heads)
    assert shrunk < 0.8 * free


def test_initial_weights_have_the_stated_variance():
    he = initial_weight(400, 300, "he", "elu", (0, 0))
    xavier = initial_weight(400, 300, "xavier", "tanh", (0, 0))
    assert float(he.var()) == pytest.approx(2 / 400, rel=0.05)
    assert float(xavier.var()) == pytest.approx(2 / 700, rel=0.05)


def test_survives_saving():
    features, labels = rings(80)
    head = fit_head(features, labels, 2, HeadOptions(**QUICK)).head
    assert isinstance(head, MlpHead)
    again = head_from_state(head.document(), head.state())
    assert torch.equal(again.logits(features), head.logits(features))


def test_two_images_are_enough():
    features, labels = rings(2)
    fitted = fit_head(features, labels, 2, HeadOptions(**QUICK))
    assert fitted.cv["top1_accuracy"] is None
    assert torch.isfinite(fitted.head.logits(features)).all()


def test_a_diverging_learning_rate_loses():
    features, labels = rings(100)
    fitted = fit_head(features, labels, 2, HeadOptions(head="mlp:16", lr="0.01,10", dropout="0", l2="0"))
    assert fitted.chosen["lr"] == pytest.approx(0.01)
