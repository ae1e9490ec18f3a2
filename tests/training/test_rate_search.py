"""A searched learning rate is near the best of a grid, from a random head and from a probe that knows all."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.training.test_loop import CLASSES, WIDTH, Points, network, recipe, same, setting, state_of
from tlcli.config.commands import FinetuneConfig
from tlcli.config.data import DataOptions
from tlcli.data.collection import collect, labels_of
from tlcli.errors import UsageError
from tlcli.progress import Silent
from tlcli.training import backbone
from tlcli.training.loop import network_logits, train
from tlcli.training.network import Network
from tlcli.training.rate_search import RateSearch, held_out, nearest
from tlcli.training.schedule import rate_factor
from tlcli.training.stepper import Stepper

COUNT = 160


def probed(seed=0):
    """A network whose head has learnt the training points by heart, as a linear probe has."""
    net = network(seed, dropout=0.0)
    points = Points(count=COUNT)
    for parameter in net.suffix.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(net.head.parameters(), lr=0.1)
    net.eval()
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(points.points.view(-1, WIDTH, 1, 1)), points.labels)
        loss.backward()
        optimizer.step()
    for parameter in net.suffix.parameters():
        parameter.requires_grad_(True)
    return net


def final_loss(net, **options):
    trained = train(net, recipe(**options), Points(count=COUNT).samples(), None, setting())
    logits = network_logits(net, Points(1, count=300), workers=1)
    return float(nn.functional.cross_entropy(logits, Points(1, count=300).labels)), trained.lr


@pytest.mark.parametrize(
    ("start", "head_init"), [(probed, "probe"), (lambda: network(0, dropout=0.0), "random")]
)
def test_the_searched_rate_is_near_the_best_of_nine(start, head_init):
    fixed = {"epochs": 6, "norm": "frozen", "label_smoothing": 0.0, "head_init": head_init}
    rates = [10.0 ** (-5 + number / 2) for number in range(9)]
    losses = [final_loss(start(), lr=repr(rate), **fixed)[0] for rate in rates]
    found, rate = final_loss(start(), lr="auto", **fixed)
    assert found <= 1.1 * min(losses), (rate, losses)


def test_a_search_sees_a_head_that_has_not_seen_what_is_held_out(monkeypatch):
    """Else every step away from a probe that knows the held-out images by heart looks like a loss."""
    net, seen = probed(), []
    before = state_of(net)
    head = {name: torch.full_like(value, 0.25) for name, value in before.items() if name.startswith("head.")}

    def find(search, batches, held_out, whole, total_steps):
        seen.append((held_out, state_of(net)))
        return 1e-9

    monkeypatch.setattr(RateSearch, "find", find)
    asked = []

    def without(out):
        asked.append(out.tolist())
        return head

    train(
        net, recipe(lr="auto", epochs=1), Points(count=COUNT).samples(), None, setting(head_without=without)
    )
    ((out, state),) = seen
    assert asked == [out]
    assert same(state, before | head)
    assert (net.head.weight - before["head.weight"]).abs().max() < 1e-6  # put back before the training


def test_the_head_of_a_search_knows_nothing_of_what_it_is_kept_from(folder):
    collection = collect(DataOptions(data=str(folder)), 2, Silent())
    labels, count = labels_of(collection), len(collection.samples)
    features = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    features[:, 0] += 3 * labels
    config = FinetuneConfig(scenario="full", folds=2)
    probe = backbone._fit_probe(config, features, collection, Silent())
    out = torch.tensor([0, 3, count - 1])
    found = backbone._head_without(config, probe, features, collection, 0.0)(out)
    changed = features.clone()
    changed[out] = 100.0
    again = backbone._head_without(config, probe, changed, collection, 0.0)(out)
    alone = collection.select([0])
    lone = backbone._head_without(config, probe, features[:1], alone, 0.0)(torch.tensor([0]))
    assert lone["head.weight"].isfinite().all()
    assert set(found) == {"head.weight", "head.bias"}
    assert same(found, again)
    assert not torch.allclose(found["head.weight"], probe.head.weight)
    assert torch.allclose(found["head.weight"], probe.head.weight, atol=1.0)


def test_a_search_puts_network_optimiser_scaler_and_average_back(monkeypatch):
    net = network()
    stepper = Stepper(net, recipe(lr="auto", ema=0.9), Points().labels, setting())
    scaler = stepper.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    stepper._prepared.scaler = None
    before, average = state_of(net), {name: value.clone() for name, value in stepper.average.values.items()}
    points = Points()
    out, rest = held_out(points.labels, torch.Generator().manual_seed(0))

    def measure(samples):
        return network_logits(net, points, workers=1, samples=samples)

    search = RateSearch(stepper, points, points.labels, measure, 1)
    batches = [rest[:8].tolist(), rest[8:16].tolist()]
    step = Stepper.step

    def growing(self, *given, **named):
        step(self, *given, **named)
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2 * scaler.get_scale()})

    monkeypatch.setattr(Stepper, "step", growing)
    assert search.find(batches, out.tolist(), 8, 100) > 0
    assert same(state_of(net), before)
    assert not stepper.optimizer.state_dict()["state"]
    assert same(stepper.average.values, average)
    assert stepper.average.steps == 0
    assert not stepper.sums.any()
    assert scaler.get_scale() == 64.0
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("count", [1, 2, 5, 44, 5_000])
def test_what_is_held_out_is_not_trained_on(count):
    out, rest = held_out(torch.zeros(count, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert 1 <= len(out) <= 256
    if count > 1:
        assert sorted([*out.tolist(), *rest.tolist()]) == list(range(count))
    assert len(rest)


def test_what_is_held_out_is_a_function_of_what_is_drawn():
    labels = torch.zeros(50, dtype=torch.int64)
    one, again, other = (held_out(labels, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_of_rates_that_may_be_as_good_the_one_nearest_to_the_rule_is_taken():
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(50, generator=draw) + 1
    noise = torch.randn(50, generator=draw)
    noise -= noise.mean()
    error = float((noise / noise.std(correction=0)).std(correction=0)) / 49**0.5
    noise /= noise.std(correction=0)
    for share, expected in ((0.99, 1.0), (1.01, 1 / 4)):
        found = nearest({1.0: base + noise + share * error, 1 / 4: base, 4.0: base + 9, 1 / 16: base + noise})
        assert found == expected
    assert nearest({4.0: base, 1 / 4: base}) == 1 / 4
    assert nearest({4.0: base, 1.0: torch.full((50,), float("inf"))}) == 4.0
    assert nearest({2.0: torch.ones(1), 1.0: torch.full((1,), 1.1)}) == 2.0


def test_where_every_rate_diverges_that_is_said(monkeypatch):
    monkeypatch.setattr(RateSearch, "_losses_after", lambda *_given: torch.full((4,), float("inf")))
    with pytest.raises(UsageError, match="no learning rate") as caught:
        train(network(), recipe(lr="auto"), Points().samples(), None, setting())
    assert "--clip-grad" in caught.value.hint


def test_the_search_goes_on_where_the_best_rate_is_at_an_edge(monkeypatch):
    tried = []

    def loss(search, batches, held_out, whole, peak):
        tried.append(peak)
        return torch.full((4,), 1 + abs(torch.tensor(peak / base).log2().item() - wanted))

    monkeypatch.setattr(RateSearch, "_losses_after", loss)
    base = recipe(lr="auto").usual_lr * 15 / 50  # 3 epochs of 5 steps
    for wanted in (-7, -3, 0, 1, 6):
        trained = train(network(), recipe(lr="auto"), Points().samples(), None, setting())
        assert trained.lr == pytest.approx(base * 2**wanted)
        assert len(set(tried)) == len(tried)
        tried.clear()
    assert CLASSES == 3


@pytest.mark.parametrize("sign", [-1, 1])
def test_multiples_by_four_to_the_furthest_then_its_neighbours(monkeypatch, sign):
    """Where loss only falls with the rate, or only rises."""
    tried = []

    def loss(search, batches, held_out, whole, peak):
        tried.append(peak / base)
        assert len(held_out) == 9  # a fifth of 44
        assert len(batches) == 15
        return torch.full((4,), 20 + sign * torch.tensor(peak / base).log2().item())

    monkeypatch.setattr(RateSearch, "_losses_after", loss)
    base = recipe(lr="auto").usual_lr * 15 / 50
    train(network(), recipe(lr="auto"), Points().samples(), None, setting())
    expected = [1.0, 1 / 4, 4.0, 1 / 16, 16.0]
    expected += [64.0, 256.0, 128.0, 512.0] if sign < 0 else [1 / 64, 1 / 256, 1 / 512, 1 / 128]
    assert tried == pytest.approx(expected)


@pytest.mark.parametrize("norm", ["train", "frozen"])
@pytest.mark.parametrize("head_init", ["random", "probe"])
def test_a_short_training_warms_up_for_a_quarter_and_falls_like_a_cosine(monkeypatch, norm, head_init):
    steps, epochs, loads = [], [], []

    class Watched(Points):
        def load(self, indices, epoch, turn):
            loads.append(epoch)
            return super().load(indices, epoch, turn)

    def step(self, inputs, labels, rate, number, *, whole):
        steps.append((rate, number, whole))

    monkeypatch.setattr(Stepper, "step", step)
    monkeypatch.setattr(Stepper, "start_epoch", lambda self, *, train_norm: epochs.append(train_norm))
    points = Watched()
    options = recipe(lr="auto", epochs=7, sched="constant", norm=norm, head_init=head_init)
    stepper = Stepper(network(), options, points.labels, setting())
    search = RateSearch(stepper, points, points.labels, lambda samples: torch.zeros(2, CLASSES), 1)
    search._losses_after([[number] for number in range(8)], [40, 41], 5, 0.4)
    assert epochs == [norm == "train" and head_init == "random"]
    assert set(loads) == {0}
    assert [(number, whole) for _, number, whole in steps] == [(number, 5) for number in range(8)]
    rates = [rate for rate, _, _ in steps]
    short = dataclasses.replace(options, epochs=1, sched="cosine", warmup_epochs=0.25)
    assert rates == pytest.approx([0.4 * rate_factor(short, number, 8) for number in range(8)])
    assert rates[0] < rates[1] <= 0.4
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1


def test_an_option_that_cannot_be_used_is_not_taken_for_a_divergence():
    """CutMix needs maps, and says so in the first step of the search as it does in that of a training."""

    class Flat(Points):
        def finish(self, loaded):
            return loaded

    net = Network(nn.Sequential(nn.Linear(WIDTH, 8)), nn.Linear(8, CLASSES))
    with pytest.raises(UsageError, match="--cutmix needs maps"):
        train(net, recipe(lr="auto", cutmix=1.0), Flat().samples(), None, setting())


def test_a_search_in_which_one_step_gives_no_number_counts_as_diverged(monkeypatch):
    net = network()
    stepper = Stepper(net, recipe(lr="auto"), Points().labels, setting())
    search = RateSearch(stepper, Points(), Points().labels, lambda samples: torch.zeros(1, CLASSES), 1)
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    assert search._losses_after([list(range(8))], [9], 8, 0.1).tolist() == [float("inf")]
    monkeypatch.setattr("tlcli.training.rate_search.processes.gather_objects", lambda mine: [mine, False])
    with torch.no_grad():
        net.head.weight.zero_()
    # It was the other process's step.
    assert search._losses_after([list(range(8))], [9], 8, 0.1).tolist() == [float("inf")]
