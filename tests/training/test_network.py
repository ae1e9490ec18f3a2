"""The trained network: what is frozen stays, heads are those of `heads`, branches speak in training."""

import copy

import pytest
import timm
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from tlcli.backbones.cut import cut_at
from tlcli.config.head import HeadOptions
from tlcli.heads.linear import LinearHead
from tlcli.training.network import (
    MlpClassifier,
    Network,
    fp32_where_bf16_is_slow,
    make_network,
    smoothed_scale,
)


@pytest.fixture
def cut():
    torch.manual_seed(0)
    return cut_at(timm.create_model("test_resnet", num_classes=0), 2, (32, 32))


def rows_of(cut):
    with torch.no_grad():
        return cut.prefix(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def test_frozen_norms_keep_their_statistics_and_trained_ones_do_not(cut):
    network = make_network(cut.suffix, 96, 3, HeadOptions(), dropout=0.0)
    before = {name: value.clone() for name, value in network.named_buffers()}
    network.train_norm = False
    network.train()
    network(rows_of(cut))
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    network.train_norm = True
    network.train()
    network(rows_of(cut))
    assert any(not torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_it_starts_from_the_head_it_is_given(cut):
    features = cut.suffix.eval()(rows_of(cut))
    width = features.shape[1]
    head = LinearHead(torch.randn(3, width), torch.randn(3), False)
    network = make_network(cut.suffix, width, 3, HeadOptions(), dropout=0.5, start=head).eval()
    torch.testing.assert_close(network(rows_of(cut)), head.logits(features))
    assert torch.equal(network.trained_head().weight, head.weight)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu", "tanh"])
def test_an_mlp_head_is_saved_as_it_predicts(batch_norm, activation):
    torch.manual_seed(0)
    options = HeadOptions(head="mlp:8,6", batch_norm=batch_norm, activation=activation)
    classifier = MlpClassifier((5, 8, 6, 3), options, dropout=0.3)
    classifier.train()
    for _ in range(3):
        classifier(3 * torch.randn(16, 5) + 1)
    features = torch.randn(7, 5)
    with torch.no_grad():
        expected = classifier.eval()(features)
    torch.testing.assert_close(classifier.head().logits(features), expected, rtol=1e-4, atol=1e-5)


def test_an_mlp_starts_from_a_fitted_one():
    options = HeadOptions(head="mlp:8", batch_norm=True)
    fitted = MlpClassifier((5, 8, 3), HeadOptions(head="mlp:8", seed=4), dropout=0.0).head()
    network = make_network(nn.Identity(), 5, 3, options, dropout=0.1, start=fitted).eval()
    features = torch.randn(7, 5)
    torch.testing.assert_close(network(features), fitted.logits(features))


def test_two_networks_of_one_seed_are_equal():
    one, other = (make_network(nn.Identity(), 5, 3, HeadOptions(seed=1), dropout=0.0) for _ in range(2))
    assert torch.equal(one.head.weight, other.head.weight)
    another = make_network(nn.Identity(), 5, 3, HeadOptions(seed=2), dropout=0.0)
    assert not torch.equal(one.head.weight, another.head.weight)


def test_side_branches_give_logits_in_training_alone():
    suffix = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    network = Network(suffix, nn.Linear(5, 3), branches={"0": nn.Linear(6, 3)})
    outputs = network.train()(torch.randn(2, 4))
    assert [tuple(output.shape) for output in outputs] == [(2, 3), (2, 3)]
    assert network.eval()(torch.randn(2, 4)).shape == (2, 3)


def test_the_suffix_keeps_the_backbones_names(cut):
    network = make_network(cut.suffix, 96, 3, HeadOptions(), dropout=0.0)
    own = {name for name, _ in timm.create_model("test_resnet", num_classes=0).named_parameters()}
    assert set(network.backbone_names().values()) <= own


def test_frozen_units_do_not_move_in_training(cut):
    network = make_network(cut.suffix, 96, 3, HeadOptions(), dropout=0.0)
    prefix = copy.deepcopy({**dict(cut.prefix.named_parameters()), **dict(cut.prefix.named_buffers())})
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        network(rows_of(cut)).sum().backward()
        optimizer.step()
    now = {**dict(cut.prefix.named_parameters()), **dict(cut.prefix.named_buffers())}
    assert all(torch.equal(value, prefix[name]) for name, value in now.items())


def test_layers_that_bf16_slows_down_compute_in_fp32_and_are_left_as_they_were():
    plain, strided = (nn.Conv2d(4, 4, 3, stride=stride, groups=4) for stride in (1, 2))
    net, inputs = nn.Sequential(plain, strided), torch.randn(1, 4, 9, 9)
    expected = strided(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        with fp32_where_bf16_is_slow(net):
            assert torch.equal(strided(inputs), expected)
            assert plain(inputs).dtype == torch.bfloat16
        assert strided(inputs).dtype == torch.bfloat16
    assert "forward" not in vars(strided)


# ---- the scale that training starts from ------------------------------------------------------------------


@pytest.mark.parametrize("sure", [0.5, 2.0, 20.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.3])
def test_the_scale_is_where_the_smoothed_loss_is_smallest(sure, smoothing):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (60,), generator=draw)
    logits = sure * (nn.functional.one_hot(labels, 4) + 0.5 * torch.randn(60, 4, generator=draw))

    def loss(factor):
        return float(nn.functional.cross_entropy(factor * logits.double(), labels, label_smoothing=smoothing))

    best = minimize_scalar(loss, bounds=(1e-6, 1.0), method="bounded", options={"xatol": 1e-8})
    found = smoothed_scale(logits, labels, smoothing)
    assert 0 < found <= 1
    assert loss(found) <= best.fun * (1 + 1e-4)


def test_without_smoothing_nothing_is_scaled():
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert smoothed_scale(logits, torch.tensor([0, 1]), 0.0) == 1.0


@pytest.mark.parametrize("options", [{}, {"head": "mlp:8"}])
def test_scaled_logits_give_the_same_answers(cut, options):
    net = make_network(cut.suffix, 96, 3, HeadOptions(**options), dropout=0.0).eval()
    with torch.no_grad():
        before = net(rows_of(cut))
        net.scale_logits(0.25)
        torch.testing.assert_close(net(rows_of(cut)), 0.25 * before)
        features = cut.suffix(rows_of(cut))
    torch.testing.assert_close(net.trained_head().logits(features), 0.25 * before)
