"""Training from cached activations is training the frozen network: the same gradients, cut at every unit."""

import copy

import pytest
import timm
import torch
from torch.nn import functional

from tlcli.backbones import classic
from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.cut import cut_at, freeze_parameters
from tlcli.backbones.units import frozen_modules, units

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
RATES = ({"drop_rate": 0.2, "drop_path_rate": 0.2}, {"drop_rate": 0.2}, {})
TRANSFORMER = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
CLASSES = 5

# (architecture, image size, further arguments); every kind of graph, as few channels and blocks as show it
QUICK = [
    ("resnet18", 32, {"layers": (2, 2, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}),
    ("mobilenetv2_035", 32, {}),
    ("test_efficientnet", 32, {}),
    (
        "vit_tiny_patch16_224",
        32,
        {"img_size": 32, "depth": 4, "embed_dim": 48, "pos_drop_rate": 0.2, **TRANSFORMER},
    ),
    ("convnext_atto", 32, {"depths": (1, 1, 3, 1), "dims": (8, 16, 24, 32)}),
    ("densenet121", 32, {"block_config": (2, 2, 3, 2), "growth_rate": 8}),
]
SLOW = [
    ("regnety_002", 32, {}),
    ("resnet50", 64, {}),
    ("mobilenetv2_100", 64, {}),
    ("efficientnet_b0", 64, {}),
    ("vit_tiny_patch16_224", 64, {"img_size": 64, **TRANSFORMER}),
    ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, **TRANSFORMER}),
    ("inception_v3", 96, {}),
    ("densenet121", 64, {}),
    ("legacy_xception", 96, {}),
    ("mobilenetv3_small_050", 64, {}),
]


def build(name, arguments):
    """A headless network whose drop and drop-path rates are 0.2 wherever it has them."""
    torch.manual_seed(0)
    for rates in RATES:
        try:
            return stirred(timm.create_model(name, num_classes=0, **arguments, **rates))
        except TypeError as error:
            if "drop" not in str(error):
                raise
    raise AssertionError(name)


def stirred(model):
    """The network with what starts constant (norms, layer scales, biases) drawn, so that all matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.uniform_(0.5, 1.0, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def loss_of(features):
    """A classifier's loss on the features; the classifier is the same each time."""
    weight = torch.randn(CLASSES, features.shape[1], generator=torch.Generator().manual_seed(2))
    labels = torch.arange(features.shape[0]) % CLASSES
    return functional.cross_entropy(features @ weight.T / features.shape[1] ** 0.5, labels)


def uncut_step(model, num_frozen_units, images):
    """One step of the eager network, in train mode but for its frozen units: its loss and gradients."""
    parts = units(model)
    frozen = {name for unit in parts[:num_frozen_units] for name in unit.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.train()
    for name, module in model.named_modules():
        if name in frozen_modules(parts, num_frozen_units):
            module.training = False
    torch.manual_seed(7)
    loss = loss_of(model(images))
    loss.backward()
    return loss


def check_every_cut(model, size, batch=4, batches=(), least=1e-4):
    """Compare losses, gradients and BatchNorm statistics after a step, for each number of frozen units.

    And features in eval mode, exactly, for batches of other sizes. A tenth of the gradients may be below
    `least`.
    """
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    count = len(units(model))
    assert count > 3
    sizes = []
    for num_frozen_units in range(1, count):
        cut = cut_at(copy.deepcopy(model), num_frozen_units, (size, size))
        for other in batches:
            some = torch.randn(other, 3, size, size, generator=torch.Generator().manual_seed(other))
            with torch.no_grad():
                expected = model.eval()(some)
                assert torch.equal(cut.suffix.eval()(cut.prefix(some)), expected), (num_frozen_units, other)
        freeze_parameters(cut)
        with torch.no_grad():
            rows = cut.prefix(images)
        eager = copy.deepcopy(model)
        expected = uncut_step(eager, num_frozen_units, images)
        cut.suffix.train()
        torch.manual_seed(7)
        loss = loss_of(cut.suffix(rows))
        loss.backward()
        where = f"after unit {num_frozen_units}"
        torch.testing.assert_close(loss, expected, **TOLERANCE, msg=where)
        gradients = {key: value.grad for key, value in eager.named_parameters() if value.requires_grad}
        trained = {key: value for key, value in cut.suffix.named_parameters() if value.requires_grad}
        assert trained.keys() == gradients.keys(), where
        for key, parameter in trained.items():
            assert (parameter.grad is None) == (gradients[key] is None), f"{where}: {key}"
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, gradients[key], **TOLERANCE, msg=f"{where}: {key}")
                sizes.append(float(parameter.grad.abs().max()))
        statistics = dict(eager.named_buffers())
        for key, buffer in cut.suffix.named_buffers():
            if key in statistics:
                torch.testing.assert_close(buffer, statistics[key], **TOLERANCE, msg=f"{where}: {key}")
    # Or the comparison would be of nothing with nothing.
    assert sorted(sizes)[len(sizes) // 10] > least


@pytest.mark.parametrize(("name", "size", "arguments"), QUICK, ids=[row[0] for row in QUICK])
def test_a_step_from_cached_rows_has_the_gradients_of_the_uncut_network(name, size, arguments):
    check_every_cut(build(name, arguments), size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "arguments"), SLOW, ids=[row[0] for row in SLOW])
def test_a_step_from_cached_rows_has_the_gradients_of_the_uncut_network_slow(name, size, arguments):
    check_every_cut(build(name, arguments), size)


@pytest.mark.parametrize("name", ["lenet5-1998", "lenet5"])
def test_classic_networks_too(name):
    check_every_cut(classic.headless(name), 32)


def test_the_rates_act():
    """Dropout and drop-path are on in the suffix: another seed gives another loss."""
    name, size, arguments = QUICK[3]
    cut = cut_at(build(name, arguments), 2, (size, size))
    freeze_parameters(cut)
    rows = torch.randn(4, *cut.row_shape)
    losses = set()
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(float(loss_of(cut.suffix.train()(rows)).detach()))
    assert len(losses) == 3


@pytest.mark.parametrize(("name", "size", "arguments"), QUICK, ids=[row[0] for row in QUICK])
def test_frozen_means_frozen(name, size, arguments):
    """Steps of the suffix move nothing that is frozen, in no mode; cached rows stay what live ones are."""
    model = build(name, arguments)
    parts = units(model)
    num_frozen_units = len(parts) // 2
    cut = cut_at(model, num_frozen_units, (size, size))
    freeze_parameters(cut)
    images = torch.randn(4, 3, size, size)
    frozen = {key for unit in parts[:num_frozen_units] for key in (*unit.parameters, *unit.buffers)}
    with torch.no_grad():
        cached = cut.prefix(images)
    rows = cached.clone()
    before, start = (
        state_sha256(cut.prefix),
        {key: value.clone() for key, value in model.state_dict().items()},
    )
    trained = [parameter for parameter in cut.suffix.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.01)
    for mode in (True, False, True):
        cut.prefix.train(mode)
        cut.suffix.train(mode)
        optimizer.zero_grad()
        loss_of(cut.suffix(cached)).backward()
        optimizer.step()
        with torch.no_grad():
            cut.prefix(torch.randn(4, 3, size, size))
    assert state_sha256(cut.prefix) == before
    with torch.no_grad():
        assert torch.equal(cut.prefix(images), cached)
    assert torch.equal(cached, rows), "the suffix wrote into the cached rows"
    state = model.state_dict()
    moved = {key for key, value in start.items() if not torch.equal(state[key], value)}
    assert not moved & frozen
    assert len(moved) > 0.8 * len(start.keys() - frozen)
