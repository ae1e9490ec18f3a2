"""Parameter groups, penalties and the average of the weights do what their formulas say."""

import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.training.recipes import recipe
from tlcli.errors import UsageError
from tlcli.training.optimizer import (
    Average,
    Penalties,
    Places,
    check_optimizer,
    make_optimizer,
    metric,
    parameter_groups,
    set_rate,
    undecayed_names,
)

# ---- groups ----------------------------------------------------------------------------------------------


def test_units_further_from_the_head_learn_slower_and_vectors_do_not_decay():
    network = nn.ModuleDict({"early": nn.Linear(2, 2), "late": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    units = {"early.weight": 1, "early.bias": 1, "late.weight": 2, "late.bias": 2}
    network["early"].bias.requires_grad_(False)
    groups = parameter_groups(network, Places(units, 2), recipe(layer_decay=0.5, weight_decay=0.1))
    found = {
        id(value): (group["scale"], group["weight_decay"]) for group in groups for value in group["params"]
    }
    assert found[id(network["early"].weight)] == (0.25, 0.1)
    assert found[id(network["late"].weight)] == (0.5, 0.1)
    assert found[id(network["late"].bias)] == (0.5, 0.0)
    assert found[id(network["head"].weight)] == (1.0, 0.1)
    assert id(network["early"].bias) not in found


def test_the_rate_of_a_group_is_scaled():
    network = nn.Linear(2, 2)
    optimizer = make_optimizer(
        parameter_groups(network, Places({"weight": 1}, 1), recipe(layer_decay=0.5)), recipe()
    )
    set_rate(optimizer, 0.1)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.05, 0.1]


@pytest.mark.parametrize("name", ["sgd", "momentum", "rmsprop", "adagrad", "adam", "adamw", "lion", "nadam"])
def test_the_optimisers_of_the_text_books_lower_a_loss(name):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 1), torch.randn(32, 4)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    options = recipe(opt=name, weight_decay=0.0)
    optimizer = make_optimizer(parameter_groups(layer, Places(), options), options)
    losses = []
    for _ in range(60):
        set_rate(optimizer, 0.05)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", ["adamx", "", "adahessian"])
def test_an_unknown_optimiser_is_refused_with_the_nearest(name):
    with pytest.raises(UsageError, match="optimiser") as caught:
        check_optimizer(name)
    assert "adam" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "spared", "decayed"),
    [
        ("vit_tiny_patch16_224", {"cls_token", "pos_embed"}, {"blocks.0.attn.qkv.weight"}),
        ("swin_tiny_patch4_window7_224", {"layers.0.blocks.0.attn.relative_position_bias_table"},
         {"layers.0.blocks.0.attn.qkv.weight"}),
        ("xcit_nano_12_p16_224", {"cls_token", "pos_embed.token_projection.weight"},
         {"blocks.0.attn.qkv.weight"}),
    ],
)  # fmt: skip
def test_decay_spares_what_timm_spares(name, spared, decayed):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    found = undecayed_names(model)
    assert spared <= found
    groups = parameter_groups(model, Places(undecayed=found), recipe(weight_decay=0.1))
    decay = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    of = {key: decay[id(value)] for key, value in model.named_parameters()}
    assert all(of[key] == 0.0 for key in spared)
    assert all(of[key] == 0.1 for key in decayed)


def test_decay_spares_the_embeddings_of_torchvision_which_says_nothing():
    with torch.device("meta"):
        models = [torchvision.models.vit_b_32(), torchvision.models.swin_t()]
    assert {"class_token", "encoder.pos_embedding"} <= undecayed_names(models[0])
    assert "features.1.0.attn.relative_position_bias_table" in undecayed_names(models[1])
    assert not undecayed_names(torchvision.models.resnet18())


# ---- penalties and the average ---------------------------------------------------------------------------


def test_l1_makes_zeros_and_max_norm_bounds_rows():
    layer = nn.Linear(3, 2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.05, -0.3, 2.0], [3.0, 4.0, 0.0]]))
        layer.bias.fill_(9.0)
    optimizer = make_optimizer(parameter_groups(layer, Places(), recipe()), recipe(opt="sgd"))
    set_rate(optimizer, 0.1)
    Penalties(recipe(l1=1.0), {}).project(optimizer)
    torch.testing.assert_close(layer.weight, torch.tensor([[0.0, -0.2, 1.9], [2.9, 3.9, 0.0]]))
    assert float(layer.weight[0, 0].detach()) == 0.0
    Penalties(recipe(max_norm=1.0), {}).project(optimizer)
    assert float(layer.weight.detach().norm(dim=1).max()) <= 1 + 1e-6
    assert layer.bias.tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {"lr": 0.05}), ("adam", {"lr": 0.05}), ("rmsprop", {"lr": 0.003}), ("sgd", {"lr": 0.05}),
     ("adagrad", {"lr": 0.3})],
)  # fmt: skip
def test_l1_rests_where_the_penalised_loss_is_smallest(name, options):
    """A quadratic whose minimum under l1 is known: soft thresholding, whatever metric the optimiser has."""
    target = torch.tensor([[0.5, -0.2, 0.03, -0.01, 2.0]])
    layer = nn.Linear(5, 1, bias=False)
    fixed = recipe(opt=name, weight_decay=0.0, l1=0.05)
    optimizer = make_optimizer(parameter_groups(layer, Places(), fixed), fixed)
    penalties = Penalties(fixed, dict(layer.named_parameters()))
    for step in range(800):
        set_rate(optimizer, options["lr"] * (1 - step / 800))
        optimizer.zero_grad()
        (0.5 * (layer.weight - target).square().sum()).backward()
        optimizer.step()
        penalties.project(optimizer)
    wanted = target.sign() * (target.abs() - 0.05).clamp_min(0)
    torch.testing.assert_close(layer.weight.detach(), wanted, atol=0.01, rtol=0)
    assert (layer.weight[0, 2:4] == 0).all()
    assert penalties.share_of_zeros() == pytest.approx(0.4)


def test_l1_and_l2_spare_what_decay_spares():
    layer = nn.Linear(2, 2)
    places = Places(undecayed=frozenset({"weight"}))
    fixed = recipe(l1=1.0, l2="1.0", opt="sgd")
    optimizer = make_optimizer(parameter_groups(layer, places, fixed), fixed)
    set_rate(optimizer, 1.0)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalties = Penalties(fixed, dict(layer.named_parameters()), places.undecayed)
    penalties.add_gradients()
    penalties.project(optimizer)
    assert not any(parameter.grad.any() for parameter in layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.named_parameters())


def test_l2_and_l2_sp_add_their_gradients():
    layer = nn.Linear(2, 2)
    start = {"weight": torch.ones(2, 2)}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Penalties(recipe(l2="0.5", l2_sp=2.0), dict(layer.named_parameters()), start=start).add_gradients()
    torch.testing.assert_close(layer.weight.grad, 0.5 * layer.weight + 2.0 * (layer.weight - 1))
    assert not layer.bias.grad.any()


def test_the_average_follows_and_settles():
    layer = nn.BatchNorm1d(2)
    average = Average(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(5.0)
        layer.num_batches_tracked.fill_(3)
    average.update(layer)
    assert 1 < float(average.values["weight"][0]) < 5
    assert int(average.values["num_batches_tracked"]) == 3
    for _ in range(200):
        average.update(layer)
    assert float(average.values["weight"][0]) == pytest.approx(5.0, abs=1e-3)
    assert math.isfinite(float(average.values["running_var"][0]))


def test_the_average_keeps_less_in_its_first_steps():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    average, expected = Average(layer, 0.5), 0.0
    for step in range(1, 12):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update(layer)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
        assert float(average.values["weight"]) == pytest.approx(expected, rel=1e-5)


# ---- one by one ------------------------------------------------------------------------------------------


def optimizer_of(name, momentum=0.9):
    options = recipe(opt=name, momentum=momentum)
    return make_optimizer(parameter_groups(nn.Linear(2, 2), Places(), options), options)


def test_sgd_is_nesterovs_where_there_is_momentum_and_other_optimisers_stay_what_they_are():
    group = optimizer_of("sgd", 0.7).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.7, True)
    group = optimizer_of("sgd", 0.0).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.0, False)
    assert not optimizer_of("momentum", 0.7).param_groups[0]["nesterov"]
    assert "Adam" in type(optimizer_of("adam", 0.0)).__name__
    assert "RMS" in type(optimizer_of("rmsprop", 0.0)).__name__


def test_an_optimiser_is_refused_when_it_is_made_too():
    with pytest.raises(UsageError, match="is not an optimiser") as caught:
        optimizer_of("adamx")
    assert "adam" in caught.value.hint


@pytest.mark.parametrize("error", [ValueError("no package"), ImportError(), AssertionError("not here")])
def test_one_that_cannot_be_made_is_refused(monkeypatch, error):
    def failing(*_given, **_named):
        raise error

    monkeypatch.setattr("timm.optim.create_optimizer_v2", failing)
    with pytest.raises(UsageError, match=f"adamw cannot be used: {str(error) or 'ImportError'}"):
        optimizer_of("adamw")


def test_a_parameter_without_a_gradient_gets_none_and_the_next_one_its_penalty():
    layer = nn.Bilinear(2, 2, 2, bias=False)
    other = nn.Linear(2, 2, bias=False)
    other.weight.grad = torch.zeros(2, 2)
    trained = {"a": layer.weight, "b": other.weight}
    Penalties(recipe(l2="1.0", l2_sp=1.0), trained, start={"a": layer.weight}).add_gradients()
    assert layer.weight.grad is None
    torch.testing.assert_close(other.weight.grad, other.weight.detach())


def test_max_norm_is_of_each_row_and_lengthens_none():
    layer = nn.Conv2d(2, 3, 1, bias=False)
    with torch.no_grad():
        rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 0.0]])
        layer.weight.copy_(rows.view(3, 2, 1, 1))
    optimizer = make_optimizer(parameter_groups(layer, Places(), recipe()), recipe(opt="sgd"))
    Penalties(recipe(max_norm=2.0), {}).project(optimizer)
    expected = torch.tensor([[0.3, 0.4], [1.2, 1.6], [0.0, 0.0]])
    torch.testing.assert_close(layer.weight.detach().view(3, 2), expected)


def test_of_no_weights_no_share_is_zero():
    assert Penalties(recipe(l1=1.0), {}).share_of_zeros() == 0.0
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        layer.bias.zero_()
    assert Penalties(recipe(l1=1.0), dict(layer.named_parameters())).share_of_zeros() == 0.25


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.Adam(weights, lr=1.0, eps=0.3),
        lambda weights: torch.optim.Adam(weights, lr=1.0, amsgrad=True),
        lambda weights: torch.optim.RMSprop(weights, lr=1.0, alpha=0.5, eps=0.2),
        lambda weights: torch.optim.Adagrad(weights, lr=1.0, eps=0.1),
        lambda weights: torch.optim.SGD(weights, lr=1.0),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_metric_is_the_step_of_the_optimiser_itself_under_an_even_gradient(make, steps):
    weight = nn.Parameter(torch.zeros(3))
    gradient, optimizer = torch.tensor([0.5, -2.0, 1e-3]), make([weight])
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    found = metric(optimizer.state.get(weight, {}), optimizer.param_groups[0])
    torch.testing.assert_close((before - weight.detach()), gradient * found, rtol=1e-4, atol=1e-6)


def test_momentum_lengthens_the_steps_by_what_they_add_up_to():
    weight = nn.Parameter(torch.zeros(2))
    for optimizer, start in (
        (torch.optim.SGD([weight], lr=1e-3, momentum=0.75), 1.0),
        (torch.optim.RMSprop([weight], lr=1e-3, alpha=0.5, momentum=0.75), 0.5),
    ):
        for _ in range(200):
            before = weight.detach().clone()
            weight.grad = torch.full((2,), 2.0)
            optimizer.step()
        moved = (before - weight.detach()) / 1e-3 / 2.0
        found = torch.as_tensor(metric(optimizer.state[weight], optimizer.param_groups[0]))
        torch.testing.assert_close(moved, found.expand(2), rtol=0.02, atol=0)
        assert float(found.max()) == pytest.approx(4 * start, rel=0.02)


def test_the_metric_of_states_that_are_not_like_adams():
    second = torch.tensor([4.0])
    assert metric({}, {"betas": (0.9, 0.99), "eps": 1e-8}) == 1.0  # before its first step
    assert metric({"exp_avg_sq": second}, {}) == 1.0  # another's idea of it
    grouped = metric({"exp_avg_sq": second}, {"betas": (0.9, 0.5), "eps": 0.0, "step": 1})
    assert float(grouped) == pytest.approx((0.5 / 4.0) ** 0.5)
    uncounted = metric({"exp_avg_sq": second}, {"betas": (0.9, 0.5), "eps": 1e-8})
    assert float(uncounted) == pytest.approx(0.5)
    unknown = metric({"exp_avg_sq": second, "step": None}, {"betas": (0.9, 0.5), "step": 3})
    assert float(unknown) == pytest.approx(0.5)
