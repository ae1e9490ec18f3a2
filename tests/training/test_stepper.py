"""One optimiser step, beside a plain torch loop and the closed form."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn import functional

from tests.training.recipes import recipe
from tlcli.config.commands import FinetuneConfig
from tlcli.errors import UsageError
from tlcli.training.network import Network
from tlcli.training.setting import Setting
from tlcli.training.stepper import Stepper

COUNTS = (12, 3, 1)
LABELS = torch.tensor([label for label, count in enumerate(COUNTS) for _ in range(count)])


def network(*, norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(5, 4), *([nn.BatchNorm1d(4)] if norm else [])]
        return Network(nn.Sequential(*layers), nn.Linear(4, 3))


def stepper(net, **options):
    fixed = {"weight_decay": 0.0, "label_smoothing": 0.0, "opt": "sgd", "momentum": 0.0,
             "layer_decay": 1.0}  # fmt: skip
    return Stepper(net, recipe(**{**fixed, **options}), LABELS, Setting(device=torch.device("cpu")))


def batch(count=16):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 1, 1, generator=draw), LABELS[:count]


def smoothed(labels, smoothing):
    """Targets with label smoothing, by its definition (Szegedy et al. 2016, section 7)."""
    return (1 - smoothing) * functional.one_hot(labels, 3).double() + smoothing / 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_is_that_of_a_plain_loop(smoothing, weights, passes):
    """A class weight is its image's, whatever smoothing gives to other classes, as scikit-learn has it."""
    inputs, labels = batch()
    ours, plain = network(), network()
    mine = stepper(ours, label_smoothing=smoothing, class_weights=weights, grad_accum=passes)
    mine.start_epoch(train_norm=False)
    mine.step(inputs, labels, 0.1, 0)
    per_image = -(smoothed(labels, smoothing) * plain(inputs).double().log_softmax(1)).sum(1)
    if weights == "balanced":  # n / (classes * count), scikit-learn's
        per_image = per_image * torch.tensor([16 / (3 * COUNTS[label]) for label in labels])
    loss = per_image.mean()
    loss.backward()
    assert mine.read() == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, value), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected - 0.1 * expected.grad, msg=name)


def test_a_class_without_images_does_not_change_the_weights_of_others():
    labels = torch.tensor([0] * 12 + [2] * 4)
    mine = Stepper(network(), recipe(class_weights="balanced"), labels, Setting(device=torch.device("cpu")))
    assert mine.class_weights[[0, 2]].tolist() == pytest.approx([16 / (2 * 12), 16 / (2 * 4)])
    assert mine.class_weights.isfinite().all()


def test_a_mixed_image_weighs_as_the_classes_it_is_mixed_of():
    mine = stepper(network(), class_weights="balanced", label_smoothing=0.1)
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([[0.25, 0.0, 0.75]])
    weight = 0.25 * 16 / 36 + 0.75 * 16 / 3
    expected = -((0.9 * target + 0.1 / 3) * logits.log_softmax(1)).sum() * weight
    assert float(mine._loss(logits, target)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_rare_classes_do_not_win_everything_where_they_weigh_more(smoothing):
    """Separable points, 60 to 1: torch's own weights with smoothing name the rare class for all of them."""
    labels = torch.tensor([0] * 300 + [1] * 5)
    points = torch.zeros(305, 5, 1, 1)
    points[:, 0, 0, 0] = labels * 2.0 - 1
    net = Network(nn.Flatten(), nn.Linear(5, 2))
    fixed = recipe(class_weights="balanced", label_smoothing=smoothing, opt="adam", weight_decay=0.0)
    mine = Stepper(net, fixed, labels, Setting(device=torch.device("cpu")))
    mine.start_epoch(train_norm=False)
    for number in range(200):
        mine.step(points, labels, 0.1, number)
    assert torch.equal(net.eval()(points).argmax(1), labels)


@pytest.mark.parametrize(("count", "passes"), [(13, 4), (16, 5), (3, 8), (9, 4)])
def test_no_pass_is_left_with_one_image(count, passes):
    sizes = []
    net = network(norm=True)
    net.head.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    mine = stepper(net, grad_accum=passes, norm="frozen")
    mine.start_epoch(train_norm=count // passes > 1)
    mine.step(*batch(count), 0.1, 0)
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == min(passes, count)


def test_parts_of_a_batch_weigh_by_their_images(monkeypatch):
    """Two processes with 11 and 5 of 16 images: the mean of their gradients is that of the batch."""
    inputs, labels = batch()
    whole = network()
    functional.cross_entropy(whole(inputs), labels).backward()
    gradients = []
    nets = [network(), network()]
    steppers = [stepper(net) for net in nets]
    monkeypatch.setattr("tlcli.training.stepper.processes.world_size", lambda: 2)
    for part, net, mine in zip((slice(0, 11), slice(11, 16)), nets, steppers, strict=True):
        mine._prepared.step = lambda: None
        mine._prepared.zero_grad = lambda: None
        mine.start_epoch(train_norm=False)
        mine.step(inputs[part], labels[part], 0.1, 0, whole=16)
        gradients.append([value.grad for value in net.parameters()])
    for one, other, expected in zip(*gradients, whole.parameters(), strict=True):
        torch.testing.assert_close((one + other) / 2, expected.grad)


@pytest.mark.parametrize("norm", [True, False])
def test_statistics_of_processes_are_averaged_where_batch_norm_follows_the_data(monkeypatch, norm):
    mine = stepper(network(norm=True))
    averaged = []
    monkeypatch.setattr("tlcli.training.stepper.processes.average", averaged.append)
    for world, expected in ((1, 0), (2, int(norm))):
        monkeypatch.setattr("tlcli.training.stepper.processes.world_size", lambda world=world: world)
        averaged.clear()
        mine.start_epoch(train_norm=norm)
        mine.step(*batch(), 0.1, 0)
        assert len(averaged) == expected


# ---- fp16 -----------------------------------------------------------------------------------------------


def scaled(net, **options):
    """A stepper with the loss scaler of fp16, which works on a CPU as well."""
    mine = stepper(net, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mine._prepared = AcceleratedOptimizer(mine.optimizer, scaler=scaler)
    mine.accelerator._optimizers[:] = [mine._prepared]
    mine.accelerator.scaler = scaler
    mine.accelerator.state._mixed_precision = "fp16"
    mine.accelerator.native_amp = True
    return mine, scaler


@pytest.mark.parametrize(("mode", "limit"), [("norm", 0.01), ("value", 0.001)])
def test_clipping_under_a_loss_scale_bounds_the_true_gradient(mode, limit):
    net = network()
    before = torch.cat([value.detach().flatten() for value in net.parameters()])
    mine, _ = scaled(net, clip_grad=limit, clip_mode=mode)
    mine.start_epoch(train_norm=False)
    for number in range(2):  # the second step must find the scaler as a new one
        mine.step(*batch(), 1.0, number)
    moved = torch.cat([value.detach().flatten() for value in net.parameters()]) - before
    size = moved.norm() if mode == "norm" else moved.abs().max()
    assert 0 < float(size) <= 2 * limit * 1.0001


@pytest.mark.parametrize("under_scale", [False, True])
@pytest.mark.parametrize(
    ("mode", "clip"),
    [("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)],
)
def test_a_clipped_step_is_that_of_a_plain_loop(under_scale, mode, clip):
    """A limit that some gradients are above and some below, and a penalty that is clipped with the loss."""
    limit, options = (0.2, 0.05)[mode == "value"], {"clip_mode": mode, "l2": "0.01"}
    ours, plain = network(), network()
    mine = stepper(ours, clip_grad=limit, **options)
    if under_scale:
        mine, _ = scaled(ours, clip_grad=limit, **options)
    mine.start_epoch(train_norm=False)
    inputs, labels = batch()
    mine.step(inputs, labels, 0.1, 0)
    weights = plain.suffix[1].weight.square().sum() + plain.head.weight.square().sum()
    (functional.cross_entropy(plain(inputs), labels) + 0.005 * weights).backward()
    sizes = torch.cat([value.grad.flatten().abs() for value in plain.parameters()])
    assert sizes.min() < 0.05 < sizes.max()
    assert sizes.norm() > 0.2
    clip(plain.parameters(), limit)
    for (name, value), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected - 0.1 * expected.grad, msg=name)


def test_a_skipped_step_moves_nothing_and_is_not_averaged():
    net = network()
    mine, scaler = scaled(net, ema=0.9, l1=0.1, max_norm=0.01)
    mine.start_epoch(train_norm=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    bad = batch()[0]
    bad[0] = float("inf")
    mine.step(bad, LABELS, 0.1, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert mine.average.steps == 0
    assert scaler.get_scale() < 1024
    mine.reset()
    mine.step(*batch(), 0.1, 1)
    assert mine.average.steps == 1
    assert float(net.head.weight.detach().norm(dim=1).max()) <= 0.0101


# ---- BatchNorm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1, "norm": "train"}, {"batch_size": 4, "grad_accum": 4, "norm": "train"},
     {"batch_size": 1, "scenario": "scratch"}, {"batch_size": 7, "grad_accum": 4, "scenario": "scratch"}],
)  # fmt: skip
def test_batch_norm_on_one_image_is_refused_before_training(options):
    with pytest.raises(UsageError, match="one image"):
        recipe(**options)


def test_without_batch_norm_one_image_is_a_batch():
    from tlcli.training.recipe import resolve

    config = FinetuneConfig(scenario="full", batch_size=1, norm="train")
    assert resolve(config, num_train=10, has_batch_norm=False).batch_size == 1


# ---- what a stepper is made of ---------------------------------------------------------------------------


def test_l2_sp_pulls_the_backbone_to_where_it_began_and_not_the_head():
    inputs, labels = batch()
    ours, plain = network(), network()
    places = {"1.weight": 1, "1.bias": 1}
    options = {"weight_decay": 0.0, "label_smoothing": 0.0, "opt": "sgd", "momentum": 0.0, "layer_decay": 1.0}
    mine = Stepper(
        ours, recipe(l2_sp=0.5, **options), LABELS,
        Setting(device=torch.device("cpu"), unit_of=places, num_units=1),
    )  # fmt: skip
    mine.start_epoch(train_norm=False)
    start = {name: value.detach().clone() for name, value in plain.named_parameters()}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(3):
        mine.step(inputs, labels, 0.1, number)
        optimizer.zero_grad()
        pull = sum(
            (value - start[name]).square().sum()
            for name, value in plain.named_parameters() if name.startswith("suffix")
        )  # fmt: skip
        (functional.cross_entropy(plain(inputs), labels) + 0.25 * pull).backward()
        optimizer.step()
    for (name, value), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_an_optimiser_that_cannot_be_saved_is_refused_before_the_first_step(monkeypatch):
    def refusing(_optimizer):
        raise UsageError("keeps a generator", hint="Use another.")

    monkeypatch.setattr("tlcli.training.stepper.optimizer_state", refusing)
    with pytest.raises(UsageError, match="generator"):
        stepper(network())


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_tracker_is_told_the_recipe_and_closed(monkeypatch, tracker):
    told, closed = [], []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda _self, name, config: told.append((name, config)))
    options = recipe(patience=None, clip_grad=2.0)
    mine = Stepper(network(), options, LABELS, Setting(device=torch.device("cpu"), tracker=tracker))
    mine.accelerator.trackers = [SimpleNamespace(finish=lambda: closed.append(tracker))]
    mine.close()
    assert closed == [tracker]
    if tracker == "none":
        assert not told
        return
    ((name, config),) = told
    assert name == "tlcli"
    assert (config["clip_grad"], config["epochs"], config["opt"]) == (2.0, 10, "adamw")
    assert "patience" not in config


def test_what_an_epoch_adds_up_to():
    """Loss times images, right answers and images, over batches of two sizes, each in two passes."""
    inputs, labels = batch()
    net = network()
    mine = stepper(net, grad_accum=2)
    mine.start_epoch(train_norm=False)
    with torch.no_grad():
        logits = net(inputs)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    right = logits.argmax(1) == labels
    assert 0 < int(right.sum()) < 16
    for number, part in enumerate((slice(0, 11), slice(11, 16))):
        mine.step(inputs[part], labels[part], 0.0, number)  # at a rate of 0 the network stays
    assert not mine.sums.any()
    assert mine.read() == pytest.approx(float(expected[11:].mean()), rel=1e-5)
    assert mine.sums.tolist() == pytest.approx([float(expected.sum()), int(right.sum()), 16], rel=1e-5)
    assert mine.read() == 0.0


def test_side_branches_add_their_loss_by_its_weight():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.body = nn.Flatten(), nn.Linear(5, 4)

        def forward(self, rows):
            return self.body(self.flat(rows)).relu()

    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Network(Tapped(), nn.Linear(4, 3), branches={"body": nn.Linear(4, 3)})

    inputs, labels = batch()
    ours, plain = made(), made()
    mine = stepper(ours, aux_weight=0.3)
    mine.start_epoch(train_norm=False)
    mine.step(inputs, labels, 0.1, 0)
    plain.train()
    logits, side = plain(inputs)
    loss = functional.cross_entropy(logits, labels)
    (loss + 0.3 * functional.cross_entropy(side, labels)).backward()
    assert mine.read() == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, value), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected - 0.1 * expected.grad, msg=name)


def test_a_closed_stepper_leaves_a_network_as_any_other():
    net = network(norm=True)
    mine = stepper(net, amp="none")
    mine.start_epoch(train_norm=True)
    mine.step(*batch(), 0.1, 0)
    net.head.weight.grad = torch.ones(3, 4)
    mine.close()
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not {"_is_accelerate_prepared", "forward"} & vars(net).keys()


def test_trackers_write_where_the_setting_says(tmp_path):
    mine = Stepper(
        network(), recipe(), LABELS, Setting(device=torch.device("cpu"), log_dir=str(tmp_path / "logs"))
    )
    assert mine.accelerator.project_dir == str(tmp_path / "logs")


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_nothing_of_accelerate_is_left_in_a_closed_stepper_s_network(amp):
    net = network()
    before = set(vars(net))
    mine = Stepper(net, recipe(), LABELS, Setting(device=torch.device("cpu"), amp=amp))
    assert set(vars(net)) > before
    assert mine.accelerator.mixed_precision == {"none": "no"}.get(amp, amp)
    mine.close()
    assert set(vars(net)) == before


def test_channels_last_is_the_memory_format_of_weights_where_it_is_asked_for():
    for wanted in (True, False):
        net = Network(nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.Flatten()), nn.Linear(4, 3))
        Stepper(net, recipe(), LABELS, Setting(device=torch.device("cpu"), channels_last=wanted))
        assert net.suffix[0].weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_a_loss_that_is_no_number_is_said_with_its_step_and_rate():
    mine = stepper(network())
    inputs, labels = batch()
    mine.start_epoch(train_norm=False)
    mine.step(inputs, labels, 0.1, 0)
    mine.step(inputs * float("nan"), labels, 0.25, 41)
    with pytest.raises(
        UsageError, match=r"The loss is nan at step 42, learning rate 0.25: training diverged"
    ):
        mine.read()


def test_what_is_reset_is_forgotten():
    mine = stepper(network())
    mine.start_epoch(train_norm=False)
    for _ in range(2):
        mine.step(*batch(), 0.1, 0)
        mine.read()
    mine.step(*batch(), 0.1, 0)
    assert mine.is_due()
    assert mine.sums[2] == 32
    mine.network.head.weight.grad = torch.ones(3, 4)
    mine.reset()
    assert mine.network.head.weight.grad is None
    assert not mine.is_due()
    assert mine.sums.tolist() == [0.0, 0.0, 0.0]
    assert mine.read() == 0.0
    assert mine.sums[2] == 0
