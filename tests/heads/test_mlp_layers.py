"""The gradients written out for MLP heads are autograd's, and a trained stack is what a plain loop trains."""

import itertools

import pytest
import torch
from torch.nn import functional

from tlcli.config.head import HeadOptions
from tlcli.heads.mlp import ACTIVATIONS, initial_weight, keyed_generator
from tlcli.heads.mlp_layers import BACKWARD, IN_PLACE, NORM_EPSILON, Layer, loss_and_gradient
from tlcli.heads.mlp_stack import Grid, TrainingRows, train_mlps
from tlcli.progress import Silent

NETWORKS, BATCH, FAN_IN, FAN_OUT = 3, 7, 5, 4


def random_layer(activation, batch_norm, generator):
    """Return a layer whose networks differ, fp64."""
    layer = Layer(torch.zeros(FAN_OUT, FAN_IN, dtype=torch.float64), NETWORKS, activation, batch_norm)
    for value in layer.parameters.values():
        value.normal_(generator=generator)
    return layer


def written_plainly(layer, inputs, dropout, parameters):
    value = inputs @ parameters["weight"].mT
    if layer.batch_norm:
        value = value - value.mean(1, keepdim=True)
        value = value / (value.square().mean(1, keepdim=True) + NORM_EPSILON).sqrt()
        value = value * parameters["scale"][:, None] + parameters["shift"][:, None]
    else:
        value = value + parameters["bias"][:, None]
    value = value if layer.activation is None else ACTIVATIONS[layer.activation](value)
    return value if dropout is None else value * dropout


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_the_gradients_are_autograds(activation, batch_norm, drops):
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(activation, batch_norm, generator)
    inputs = torch.randn(NETWORKS, BATCH, FAN_IN, generator=generator, dtype=torch.float64)
    pull = torch.randn(NETWORKS, BATCH, FAN_OUT, generator=generator, dtype=torch.float64)
    noise = torch.rand(pull.shape, generator=generator)
    dropout = (noise >= 0.5).double() * 2 if drops and activation else None  # a last layer drops nothing
    leaves = {name: value.clone().requires_grad_() for name, value in layer.parameters.items()}
    tracked = inputs.clone().requires_grad_()
    expected = written_plainly(layer, tracked, dropout, leaves)
    gradients = torch.autograd.grad((expected * pull).sum(), [tracked, *leaves.values()])

    torch.testing.assert_close(layer.forward(inputs, 0.1, dropout), expected.detach())
    by_inputs = layer.inputs_gradient(layer.backward(pull.clone()))
    found = [by_inputs, *layer.gradients.values()]
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_every_activation_has_a_gradient():
    assert BACKWARD.keys() == ACTIVATIONS.keys()
    assert IN_PLACE.keys() < ACTIVATIONS.keys()


def test_inputs_shared_by_all_networks_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    layer = random_layer("elu", True, generator)
    rows = torch.randn(BATCH, FAN_IN, generator=generator, dtype=torch.float64)
    before = rows.clone()
    shared = layer.forward(rows.expand(NETWORKS, -1, -1), 0.1)
    assert torch.equal(rows, before)
    torch.testing.assert_close(shared, layer.forward(rows.repeat(NETWORKS, 1, 1), 0.1))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_batch_without_rows_has_no_gradient(batch_norm):
    layer = random_layer("elu", batch_norm, torch.Generator().manual_seed(0))
    running = {name: value.clone() for name, value in layer.running.items()}
    result = layer.forward(torch.zeros(NETWORKS, 0, FAN_IN, dtype=torch.float64), 0.1)
    layer.backward(torch.zeros_like(result))
    assert all(not bool(gradient.any()) for gradient in layer.gradients.values())
    assert all(torch.equal(layer.running[name], value) for name, value in running.items())


def test_batch_norm_applies_what_it_averaged():
    generator = torch.Generator().manual_seed(0)
    layer = random_layer("tanh", True, generator)
    inputs = torch.randn(NETWORKS, 50, FAN_IN, generator=generator, dtype=torch.float64)
    trained = layer.forward(inputs, 1.0)
    torch.testing.assert_close(layer.apply(inputs), trained)


def test_the_losss_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NETWORKS, BATCH, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.rand(BATCH, 6, generator=generator, dtype=torch.float64)
    targets /= targets.sum(1, keepdim=True)
    share = torch.rand(BATCH, generator=generator, dtype=torch.float64)
    expected = torch.stack(
        [functional.cross_entropy(own, targets, reduction="none") @ share for own in logits]
    )
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    loss, mine = loss_and_gradient(logits.detach(), targets, share)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(mine, gradient)


# ---- a whole training -------------------------------------------------------------------------------------


def blobs(num_rows, width, num_classes):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(num_rows) % num_classes
    centres = torch.randn(num_classes, width, generator=generator)
    features = centres[labels] + 1.5 * torch.randn(num_rows, width, generator=generator) + 3
    targets = functional.one_hot(labels, num_classes).T.float() * 0.9 + 0.1 / num_classes
    folds = torch.randint(-1, 3, (num_rows,), generator=generator)
    weights = 0.5 + torch.rand(num_rows, generator=generator)
    return TrainingRows(features, labels, targets, weights, folds)


def trained_plainly(rows, member, options, epochs):
    """Return the losses by epoch, on training and on held-out rows, of one network trained on all of a batch.

    Rows that are held out count 0, autograd works out the gradients, and every row is evaluated.
    """
    lr, l2, rate, fold = member
    inputs = (rows.features - rows.features.mean(0)) / rows.features.std(0, correction=0)
    sizes = (inputs.shape[1], *options.hidden_sizes, len(rows.targets))
    shapes = list(itertools.pairwise(sizes))
    kinds = [options.activation] * (len(shapes) - 1) + [None]
    weights = [
        initial_weight(*shape, options.init, kind, (options.seed, number)).requires_grad_()
        for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
    biases = [torch.zeros(fan_out, requires_grad=True) for _, fan_out in shapes]
    optimiser = torch.optim.AdamW(
        [{"params": weights, "weight_decay": l2}, {"params": biases}], lr=lr, weight_decay=0.0
    )

    def logits(value, noise=None):
        for weight, bias, kind in zip(weights, biases, kinds, strict=True):
            value = value @ weight + bias
            if kind:
                value = ACTIVATIONS[kind](value)
                if noise is not None and rate:
                    value = value * (torch.rand(value.shape, generator=noise) >= rate) / (1 - rate)
        return value

    curves = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(
            len(inputs), generator=keyed_generator(torch.device("cpu"), options.seed, epoch, 1)
        )
        noise = keyed_generator(torch.device("cpu"), options.seed, epoch, 2)
        total = weight = 0.0
        for index in order.split(options.batch_size):
            counts = rows.row_weights[index] * (rows.folds[index] != fold)
            losses = functional.cross_entropy(
                logits(inputs[index], noise), rows.targets[:, index].T, reduction="none"
            )
            loss = (losses * counts).sum() / counts.sum().clamp_min(1e-12)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total, weight = total + float(loss.detach() * counts.sum()), weight + float(counts.sum())
        with torch.no_grad():
            held_share = rows.row_weights[rows.folds == fold]
            held_share = held_share / held_share.sum()
            held_out = functional.cross_entropy(logits(inputs), rows.labels, reduction="none")[
                rows.folds == fold
            ]
        curves.append((total / weight, float(held_out @ held_share)))
    return torch.tensor(curves)


MEMBERS = [
    (0.01, 0.0, 0.0, 0),
    (0.003, 0.5, 0.3, 2),
    (0.01, 0.0, 0.5, 1),
    (0.003, 0.5, 0.0, 0),
    (0.01, 2.0, 0.3, 2),
]


def grid_of(members):
    lr, l2, dropout, fold = (torch.tensor(values) for values in zip(*members, strict=True))
    return Grid(lr, l2, dropout, fold)


@pytest.mark.parametrize("activation", ["elu", "gelu"])
@pytest.mark.parametrize("batch_size", [4, 32, 1000])  # some batches of 4 train nothing of a fold
def test_a_stack_is_what_a_plain_loop_trains(activation, batch_size):
    rows = blobs(75, 6, 4)
    options = HeadOptions(head="mlp:12,8", activation=activation, batch_size=batch_size)
    trained = train_mlps(rows, grid_of(MEMBERS), options, epochs=4, progress=Silent())
    for place, member in enumerate(MEMBERS):
        expected = trained_plainly(rows, member, options, 4)
        mine = torch.stack([trained.train_loss[:, place], trained.held_out_loss[:, place]], 1)
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_size_of_a_stack_changes_nothing(monkeypatch, at_once):
    rows = blobs(75, 6, 4)
    options = HeadOptions(head="mlp:12", batch_norm=True, batch_size=32, l1=0.001, max_norm=2.0, patience=2)
    together = train_mlps(rows, grid_of(MEMBERS), options, epochs=12, progress=Silent())
    monkeypatch.setattr("tlcli.heads.mlp_stack._networks_at_once", lambda *_: at_once)
    parted = train_mlps(rows, grid_of(MEMBERS), options, epochs=12, progress=Silent())
    assert torch.equal(together.best_epoch, parted.best_epoch)
    assert torch.equal(together.correct, parted.correct)
    for name in ("train_loss", "held_out_loss", "log_loss"):
        torch.testing.assert_close(
            getattr(together, name), getattr(parted, name), atol=1e-4, rtol=1e-3, equal_nan=True
        )


def test_a_network_that_diverges_leaves_at_once_and_alone():
    rows = blobs(75, 6, 4)
    options = HeadOptions(head="mlp:12", activation="relu")
    members = [(0.01, 0.0, 0.0, 0), (1e30, 0.0, 0.0, 0)]
    together = train_mlps(rows, grid_of(members), options, epochs=8, progress=Silent())
    alone = train_mlps(rows, grid_of(members[:1]), options, epochs=8, progress=Silent())
    assert int(torch.isfinite(together.held_out_loss[:, 1]).sum()) == 0
    assert bool(together.log_loss[1][rows.folds == 0].isinf().all())
    assert bool(together.held_out_loss[4:, 1].isnan().all())
    torch.testing.assert_close(together.held_out_loss[:, 0], alone.held_out_loss[:, 0])
