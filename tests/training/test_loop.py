"""The loop: resumed equals uninterrupted, whatever is switched on; and what it says is what happened."""

import contextlib
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tlcli.config.commands import FinetuneConfig
from tlcli.errors import Interrupted, UsageError
from tlcli.machine.interrupts import SIGNALS
from tlcli.progress import Silent
from tlcli.training import stepper
from tlcli.training.checkpoints import Checkpoints
from tlcli.training.continued import Continued
from tlcli.training.inputs import PLAIN
from tlcli.training.loop import Samples, network_logits, train
from tlcli.training.network import Network
from tlcli.training.recipe import resolve
from tlcli.training.setting import Setting

COUNT, WIDTH, CLASSES = 44, 6, 3


class Points:
    """Points around a centre a class, moved a little in every epoch."""

    def __init__(self, seed=0, count=COUNT, on_load=lambda: None):
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % CLASSES
        centres = 2 * torch.eye(CLASSES, WIDTH)
        self.points = centres[self.labels] + torch.randn(count, WIDTH, generator=draw)
        self.on_load = on_load
        self.loads = 0

    def __len__(self):
        return len(self.labels)

    def load(self, indices, epoch, turn):
        self.loads += 1
        self.on_load()
        values = self.points[list(indices)].clone()
        return values if epoch == PLAIN else values + 0.01 * epoch

    def finish(self, loaded):
        return loaded.view(len(loaded), WIDTH, 1, 1)

    def samples(self):
        return Samples(self, self.labels)


def network(seed=0, dropout=0.2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        suffix = nn.Sequential(
            nn.Conv2d(WIDTH, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten()
        )
        return Network(suffix, nn.Linear(8, CLASSES), dropout=dropout)


def recipe(**options):
    fixed = {"scenario": "full", "epochs": 3, "batch_size": 8, "norm": "train", "lr": "0.02"}
    return resolve(FinetuneConfig(**{**fixed, **options}), num_train=COUNT, has_batch_norm=True)


def setting(folder=None, **options):
    checkpoints = Checkpoints(folder) if folder else None
    fixed = {"device": torch.device("cpu"), "workers": 2, "checkpoints": checkpoints,
             "unit_of": {"0.weight": 1, "0.bias": 1}, "num_units": 2}  # fmt: skip
    return Setting(**{**fixed, **options})


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(options, folder=None, net=None, points=None, **setting_options):
    net = net or network()
    points = points or Points()
    trained = train(net, options, points.samples(), Points(1).samples(), setting(folder, **setting_options))
    return net, trained


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


# ---- what it does ----------------------------------------------------------------------------------------


def test_it_learns_and_says_how():
    histories = []
    net, trained = run(recipe(epochs=12), on_epoch=lambda rows: histories.append(len(rows)))
    first, last = trained.history[0], trained.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert last["val_accuracy"] > 0.7
    assert histories == list(range(1, 13))
    assert trained.steps == 12 * (COUNT // 8) == last["step"]
    assert trained.best_epoch is None
    assert not net.training
    logits = network_logits(net, Points(1), workers=2)
    found = nn.functional.cross_entropy(logits, Points(1).labels)
    assert float(found) == pytest.approx(last["val_log_loss"], rel=1e-5)


def test_a_network_that_was_trained_before_trains_as_a_new_one_does_with_amp_too():
    net, _ = run(recipe(), amp="bf16")
    net.load_state_dict(network().state_dict())
    _, again = run(recipe(), net=net, amp="bf16")
    _, fresh = run(recipe(), amp="bf16")
    assert without_seconds(again.history) == without_seconds(fresh.history)
    net.eval()
    assert net(torch.ones(1, WIDTH, 1, 1)).dtype == torch.float32  # and nothing of AMP is left behind


def test_a_seed_is_a_result_and_threads_are_not():
    nets = [run(recipe(seed=seed), workers=workers)[0] for seed, workers in ((1, 1), (1, 3), (2, 1))]
    assert same(state_of(nets[0]), state_of(nets[1]))
    assert not same(state_of(nets[0]), state_of(nets[2]))


def test_the_global_random_state_does_not_matter():
    torch.manual_seed(1)
    one = state_of(run(recipe())[0])
    torch.manual_seed(2)
    assert same(one, state_of(run(recipe())[0]))


def test_accumulated_passes_are_one_batch_where_nothing_looks_at_the_batch():
    states = []
    for passes in (1, 2, 4):
        net = network(dropout=0.0)
        net.suffix[3].p = 0.0
        states.append(state_of(run(recipe(norm="frozen", grad_accum=passes, opt="sgd"), net=net)[0]))
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_frozen_norm_keeps_statistics_and_a_probed_head_keeps_them_for_an_epoch():
    before = network().suffix[1].running_mean.clone()
    assert torch.equal(run(recipe(norm="frozen"))[0].suffix[1].running_mean, before)
    one_epoch = run(recipe(epochs=1, head_init="probe"))[0]
    assert torch.equal(one_epoch.suffix[1].running_mean, before)
    two = run(recipe(epochs=2, head_init="probe"))[0]
    assert not torch.equal(two.suffix[1].running_mean, before)
    assert not torch.equal(run(recipe(epochs=1, head_init="random"))[0].suffix[1].running_mean, before)


def test_frozen_parameters_do_not_move():
    net = network()
    net.suffix[0].requires_grad_(False)
    before = net.suffix[0].weight.clone()
    run(recipe(weight_decay=0.5, l1=0.1, l2="0.1", max_norm=0.1), net=net)
    assert torch.equal(net.suffix[0].weight, before)


def test_l1_gives_real_zeros():
    net, _ = run(recipe(l1=1.0, epochs=5))
    assert int((net.suffix[0].weight == 0).sum()) > 10


def test_clipping_bounds_a_step():
    net = network()
    before = state_of(net)
    run(recipe(epochs=1, opt="momentum", lr="1", clip_grad=1e-6, weight_decay=0.0), net=net)
    moved = (net.head.weight.detach() - before["head.weight"]).abs().max()
    assert 0 < float(moved) < 1e-4
    run(recipe(epochs=1, clip_grad=1e-6, clip_mode="value"))


def test_balanced_sampling_and_weights_raise_the_rare_class():
    points = Points()
    points.labels = torch.tensor([0] * (COUNT - 4) + [1] * 2 + [2] * 2)
    plain, sampled, weighted = (
        network_logits(run(recipe(epochs=6, **options), points=points)[0], points, workers=1)
        .softmax(1)[:, 0]
        .mean()
        for options in ({}, {"sampling": "balanced"}, {"class_weights": "balanced"})
    )
    assert float(sampled) < float(plain)
    assert float(weighted) < float(plain)


def test_every_sample_is_seen_at_most_once_an_epoch_and_in_another_order_in_the_next():
    seen = []

    class Watched(Points):
        def load(self, indices, epoch, turn):
            seen.append((epoch, tuple(indices)))
            return super().load(indices, epoch, turn)

    run(recipe(epochs=2), points=Watched())
    epochs = [
        list(itertools.chain.from_iterable(part for number, part in sorted(seen) if number == epoch))
        for epoch in (0, 1)
    ]
    assert all(len(set(order)) == len(order) == 40 for order in epochs)
    assert epochs[0] != epochs[1]


def test_early_stopping_keeps_the_best_weights():
    options = recipe(epochs=30, patience=2, lr="0.5", sched="constant", opt="sgd", label_smoothing=0.0)
    net, trained = run(options)
    losses = [row["val_log_loss"] for row in trained.history]
    assert trained.best_epoch == losses.index(min(losses)) + 1
    assert len(losses) == trained.best_epoch + 2 or len(losses) == 30
    logits = network_logits(net, Points(1), workers=1)
    assert float(nn.functional.cross_entropy(logits, Points(1).labels)) == pytest.approx(
        min(losses), rel=1e-5
    )


def wrong():
    """Samples whose labels are wrong: the better a network learns, the worse it does on them."""
    points = Points(1)
    return Samples(points, (points.labels + 1) % CLASSES)


def test_a_training_that_only_gets_worse_on_val_stops_after_its_patience():
    trained = train(network(), recipe(epochs=30, patience=3), Points().samples(), wrong(), setting())
    assert trained.best_epoch < 20
    assert len(trained.history) == trained.best_epoch + 3


def test_a_plateau_lowers_the_rate():
    options = recipe(epochs=25, sched="plateau")
    trained = train(network(), options, Points().samples(), wrong(), setting())
    rates = [row["lr"] for row in trained.history]
    assert min(rates) < max(rates) <= 0.02
    assert rates[-1] == min(rates)


def test_the_average_is_what_is_measured_and_kept():
    net, trained = run(recipe(ema=0.9))
    other, _ = run(recipe())
    assert not same(state_of(net), state_of(other))
    logits = network_logits(net, Points(1), workers=1)
    loss = float(nn.functional.cross_entropy(logits, Points(1).labels))
    assert loss == pytest.approx(trained.history[-1]["val_log_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9}, {"opt": "sgd"}, {"sampling": "balanced", "mixup": 0.2}, {"l1": 0.01}]
)
def test_a_searched_rate_learns_and_the_search_leaves_no_trace(options):
    many = Points(count=300)  # of few no rate is surely better than the rule's
    net, trained = run(recipe(lr="auto", epochs=8, **options), points=many)
    assert 1e-5 < trained.lr < 10
    # A short training does not see what a strong l1 does in a long one: auto gives 0.57 there, 0.002 gives
    # 0.86.
    assert trained.history[-1]["val_accuracy"] > (0.5 if "l1" in options else 0.6)
    again, other = run(recipe(lr=repr(trained.lr), epochs=8, **options), points=many)
    assert same(state_of(net), state_of(again))
    assert without_seconds(trained.history) == without_seconds(other.history)


def test_a_diverging_training_says_so():
    with pytest.raises(UsageError, match="diverged") as caught:
        run(recipe(lr="9", opt="momentum", momentum=0.999, l2="9", epochs=90, sched="constant"))
    assert "--lr" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divergence_that_shows_on_val_first_says_so_and_keeps_the_last_state(tmp_path, monkeypatch, value):
    """The loss of the last step was a number; the weights it left give none."""
    calls = []

    def logits(network, inputs, **options):
        calls.append(len(calls))
        found = network_logits(network, inputs, **options)
        return found if len(calls) < 3 else found * value

    monkeypatch.setattr("tlcli.training.loop.network_logits", logits)
    with pytest.raises(UsageError, match=r"on val is nan after epoch 3.*diverged") as caught:
        run(recipe(epochs=5), tmp_path, checkpoint_seconds=0)
    assert "--lr" in caught.value.hint
    assert Checkpoints(tmp_path).newest().facts["epoch"] >= 2


@pytest.mark.parametrize("steps", [3, 16])
def test_how_often_losses_are_read_changes_nothing(monkeypatch, tmp_path, steps):
    diverging = recipe(lr="9", opt="momentum", momentum=0.999, l2="9", epochs=90, sched="constant")
    found = []
    for every in (1, steps):
        monkeypatch.setitem(stepper.READ_STEPS, "cpu", every)
        net, trained = run(recipe(lr="auto"), tmp_path / str(every), checkpoint_seconds=0)
        with pytest.raises(UsageError) as caught:
            run(diverging)
        found.append((state_of(net), without_seconds(trained.history), trained.lr, caught.value.message))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_mixed_precision_learns_as_well():
    _, trained = run(recipe(epochs=12), amp="bf16")
    assert trained.history[-1]["val_accuracy"] > 0.7


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_data_smaller_than_a_batch_is_one_batch(count):
    points = Points(count=count)
    options = recipe(norm="frozen", class_weights="balanced")
    trained = train(network(), options, points.samples(), None, setting())
    assert trained.steps == 3
    assert "val_accuracy" not in trained.history[0]


# ---- what it tells --------------------------------------------------------------------------------------


class Told(Silent):
    """What a training told while it ran."""

    def __init__(self):
        self.calls = []

    def start(self, stage, total=None, unit="images"):
        self.calls.append((stage, total))

    def advance(self, amount=1):
        self.calls.append(amount)

    def describe(self, text):
        self.calls.append(text)

    def finish(self):
        self.calls.append("finished")

    @property
    def amounts(self):
        return [call for call in self.calls if isinstance(call, int | float)]


def test_progress_counts_images_from_where_a_checkpoint_is(tmp_path):
    told, again = Told(), Told()
    run(recipe(epochs=2), tmp_path, progress=told, checkpoint_seconds=0)
    assert told.calls[0] == ("training", 80)
    assert told.calls[-1] == "finished"
    assert told.amounts == [0, *[8] * 10]
    texts = [call for call in told.calls if isinstance(call, str) and call != "finished"]
    assert [text.split("  ")[0] for text in texts] == ["epoch 1"] * 5 + ["epoch 2"] * 5
    losses = [float(text.split()[3]) for text in texts]
    assert all(0.3 < loss < 3 for loss in losses), texts
    run(recipe(epochs=2), tmp_path, progress=again)
    assert again.calls[0] == ("training", 80)
    assert again.amounts == [80]


def test_the_running_figures_are_those_of_the_epoch_so_far():
    told = Told()
    _, trained = run(recipe(epochs=2, mixup=0.0), progress=told)
    texts = [call for call in told.calls if isinstance(call, str) and call != "finished"]
    for row, text in zip(trained.history, (texts[4], texts[9]), strict=True):
        figures = f"loss {row['train_loss']:.3f}  accuracy {row['train_accuracy']:.3f}"
        assert text == f"epoch {row['epoch']}  {figures}"


def test_trackers_are_told_every_figure_of_an_epoch_at_its_step(monkeypatch):
    told = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: told.append((step, values)))
    _, trained = run(recipe(epochs=2))
    assert [step for step, _ in told] == [5, 10]
    for row, (_, values) in zip(trained.history, told, strict=True):
        assert values == {name: value for name, value in row.items() if name != "kind"}


def test_an_epoch_begins_with_nothing_summed(monkeypatch):
    sums, start = [], stepper.Stepper.start_epoch

    def noted(self, *, train_norm):
        sums.append(self.sums.tolist())
        start(self, train_norm=train_norm)

    monkeypatch.setattr(stepper.Stepper, "start_epoch", noted)
    run(recipe(epochs=3))
    assert sums == [[0.0, 0.0, 0.0]] * 3


def test_a_resumed_training_says_where_and_a_new_one_nothing(tmp_path, caplog):
    with caplog.at_level("INFO", logger="tlcli"):
        run(recipe(epochs=2), tmp_path, checkpoint_seconds=0)
        assert not [text for text in caplog.messages if "resumed" in text]
        assert "learning rate" not in caplog.text
        run(recipe(epochs=2), tmp_path)
    assert "resumed at step 10, epoch 2 of 2" in caplog.messages
    lines = [text for text in caplog.messages if text.startswith("epoch ")]
    assert len(lines) == 2
    assert all(" val 0." in text for text in lines)
    assert lines[1].startswith("epoch 2/2  loss ")


def test_a_found_rate_is_said(caplog):
    with caplog.at_level("INFO", logger="tlcli"):
        _, trained = run(recipe(epochs=1, lr="auto"))
    assert f"learning rate {trained.lr:.2g}, found by short trainings" in caplog.messages


def test_what_a_training_gives_back():
    net, trained = run(recipe(epochs=1))
    assert trained.share_of_zeros is None
    assert all(0 <= row["seconds"] < 600 for row in trained.history)
    assert 0 < trained.seconds < 600
    assert trained.lr == 0.02
    net, trained = run(recipe(epochs=5, l1=1.0))
    weights = [net.suffix[0].weight, net.head.weight]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert trained.share_of_zeros == pytest.approx(zeros, abs=1e-6)
    net = network()
    train(net, recipe(epochs=1), Points().samples(), None, setting())
    assert not net.training
    assert not {"forward", "_is_accelerate_prepared"} & vars(net).keys()


def test_a_finished_training_that_goes_on_numbers_its_epochs_on(caplog):
    earlier = ({"kind": "epoch", "epoch": 7, "step": 35, "train_loss": 0.1},)
    continued = Continued(Path("run"), 7, 35, 9, earlier, {})
    points, val = Points(), Points(1).samples()
    with caplog.at_level("INFO", logger="tlcli"):
        options = recipe(epochs=2, patience=3)
        trained = train(network(), options, points.samples(), val, setting(), continued)
    assert [row["epoch"] for row in trained.history] == [7, 8, 9]
    assert [row["step"] for row in trained.history] == [35, 40, 45]
    assert trained.steps == 45
    assert trained.best_epoch in (8, 9)  # patience counts from the epochs before, or it would have stopped
    assert [text.split()[1] for text in caplog.messages if text.startswith("epoch")] == ["8/9", "9/9"]
    fresh = train(network(), options, Points().samples(), val, setting())
    assert fresh.history[0]["train_loss"] != trained.history[1]["train_loss"]  # other draws than epoch 1


def test_steps_are_numbered_on_and_know_their_batch(monkeypatch):
    seen = []
    step = stepper.Stepper.step

    def noted(self, inputs, labels, rate, number, *, whole):
        seen.append((number, whole))
        step(self, inputs, labels, rate, number, whole=whole)

    monkeypatch.setattr(stepper.Stepper, "step", noted)
    continued = Continued(Path("run"), 7, 35, 9, (), {})
    train(network(), recipe(epochs=2, batch_size=7), Points().samples(), None, setting(), continued)
    assert seen == [(number, 7) for number in range(35, 47)]


@pytest.mark.parametrize(("amp", "wanted"), [("bf16", True), ("none", False)])
def test_slow_kernels_are_avoided_only_where_bf16_is_used(monkeypatch, amp, wanted):
    entered = []

    @contextlib.contextmanager
    def noted(network):
        entered.append(network)
        yield

    monkeypatch.setattr("tlcli.training.loop.fp32_where_bf16_is_slow", noted)
    net, _ = run(recipe(epochs=1), amp=amp)
    assert entered == ([net] if wanted else [])


def test_logits_forget_what_a_network_kept_in_eval_mode():
    class Keeping(nn.Module):
        """Computes its bias once in eval mode, as some attention layers of timm do."""

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(WIDTH))
            self.kept = None

        def train(self, mode=True):
            if mode:
                self.kept = None
            return super().train(mode)

        def forward(self, inputs):
            if self.kept is None:
                self.kept = self.bias.detach().clone()
            return inputs.flatten(1) + self.kept

    net = Keeping()
    before = network_logits(net, Points(), workers=1)
    net.bias.data += 1.0
    assert torch.equal(network_logits(net, Points(), workers=1), before + 1.0)
    assert not net.training
    some = network_logits(net, Points(), workers=1, samples=[5, 3])
    assert torch.equal(some, (before + 1.0)[[5, 3]])


# ---- several processes: what one of them does -------------------------------------------------------------


@pytest.fixture
def first_of_two(monkeypatch):
    """This process is the first of two, and the other gives the same, unless `given` says otherwise."""
    given = []
    monkeypatch.setattr("tlcli.machine.processes.world_size", lambda: 2)
    monkeypatch.setattr("tlcli.machine.processes.start", lambda device: None)
    monkeypatch.setattr(
        "tlcli.machine.processes.gather_objects",
        lambda mine: [mine, given[0] if given and (mine is None or isinstance(mine, int)) else mine],
    )
    return given


@pytest.mark.parametrize("count", [1, 2, 9])
def test_logits_of_two_processes_are_those_of_one(monkeypatch, count):
    net, points = network(dropout=0.0).eval(), Points(count=count)
    expected = network_logits(net, points, workers=1)
    shares = []
    monkeypatch.setattr("tlcli.machine.processes.world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("tlcli.machine.processes.rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            "tlcli.machine.processes.gather_objects",
            lambda mine: shares.append(mine) or [torch.zeros(1, 3)] * 2,
        )
        with contextlib.suppress(RuntimeError):
            network_logits(net, points, workers=1)
    assert [len(share) for share in shares] == [(count + 1) // 2, count // 2]
    assert len(shares) == 2
    for order in ([0, 1], [1, 0]) if count % 2 == 0 else ([0, 1],):
        monkeypatch.setattr(
            "tlcli.machine.processes.gather_objects", lambda mine, order=order: [shares[n] for n in order]
        )
        found = network_logits(net, points, workers=1)
        wanted = expected if order == [0, 1] else expected.view(-1, 2, 3).flip(1).reshape(-1, 3)
        torch.testing.assert_close(found, wanted)


def test_a_signal_to_the_other_process_stops_this_one_at_the_same_step(tmp_path, first_of_two):
    class Signalled(Silent):
        steps = 0

        def advance(self, amount=1):
            self.steps += 1
            if self.steps == 4:
                first_of_two.append(15)

    with pytest.raises(Interrupted) as caught:
        run(recipe(norm="frozen"), tmp_path, progress=Signalled())
    assert caught.value.exit_code == 128 + 15
    assert Checkpoints(tmp_path).newest().step == 3


def test_figures_of_an_epoch_are_sums_over_processes(first_of_two):
    trained = train(network(), recipe(norm="frozen"), Points().samples(), None, setting())
    assert all(0 < row["train_accuracy"] <= 1 for row in trained.history)


def test_the_other_process_counts_in_what_is_said_of_an_epoch(monkeypatch, first_of_two):
    alone = train(network(), recipe(norm="frozen", epochs=1), Points().samples(), None, setting())
    other = torch.tensor([100.0, 0.0, 40.0])  # loss, correct, images
    monkeypatch.setattr(
        "tlcli.machine.processes.gather_objects",
        lambda mine: [mine, other if isinstance(mine, torch.Tensor) else mine],
    )
    both = train(network(), recipe(norm="frozen", epochs=1), Points().samples(), None, setting())
    (mine,), (found,) = alone.history, both.history
    assert found["train_loss"] == pytest.approx((20 * mine["train_loss"] + 100) / 60)
    assert found["train_accuracy"] == pytest.approx(mine["train_accuracy"] / 3)


def test_each_process_takes_its_part_of_every_batch(monkeypatch, first_of_two):
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("tlcli.machine.processes.rank", lambda rank=rank: rank)
        seen = []

        class Watched(Points):
            def load(self, indices, epoch, turn):
                seen.append(tuple(indices))  # noqa: B023 (read before the next turn)
                return super().load(indices, epoch, turn)

        train(
            network(),
            recipe(norm="frozen", epochs=1, batch_size=7),
            Watched().samples(),
            None,
            setting(workers=1),
        )
        parts.append(seen)
    assert [len(part) for part in parts[0]] == [4] * 6
    assert [len(part) for part in parts[1]] == [3] * 6
    assert len({image for part in parts for batch in part for image in batch}) == 42


def test_only_the_first_process_saves_and_tells(monkeypatch, tmp_path, first_of_two, caplog):
    monkeypatch.setattr("tlcli.machine.processes.rank", lambda: 1)
    told = []
    with caplog.at_level("INFO", logger="tlcli"):
        run_options = setting(tmp_path, checkpoint_seconds=0, on_epoch=lambda rows: told.append(rows))
        train(network(), recipe(norm="frozen", epochs=1), Points().samples(), None, run_options)
    assert Checkpoints(tmp_path).newest() is None
    assert told == []
    assert not [text for text in caplog.messages if text.startswith("epoch")]


def test_fewer_images_than_processes_are_refused(first_of_two):
    with pytest.raises(UsageError, match="A batch of 1 images cannot be divided over 2 processes"):
        train(network(), recipe(), Points(count=1).samples(), None, setting())


# ---- resuming --------------------------------------------------------------------------------------------

EVERYTHING = {
    "ema": 0.9, "mixup": 0.4, "label_smoothing": 0.1, "patience": 5, "sched": "plateau", "l2_sp": 0.1,
    "clip_grad": 1.0, "sampling": "balanced", "grad_accum": 2,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"opt": "sgd", "sched": "one-cycle"}, {"lr": "auto"}, EVERYTHING])
@pytest.mark.parametrize("stop_at", [1, 4, 5, 7, 14])
def test_resumed_equals_uninterrupted(tmp_path, options, stop_at):
    options = recipe(**options)
    expected, whole = run(options, checkpoint_seconds=1e9, folder=tmp_path / "whole")

    class Killed(Exception):
        pass

    class Dying(Silent):
        steps = 0

        def describe(self, text):
            self.steps += 1
            if self.steps == stop_at + 1:  # as by SIGKILL: nothing is saved any more
                raise Killed

    with pytest.raises(Killed):
        run(options, tmp_path / "run", checkpoint_seconds=0.0, progress=Dying())
    assert Checkpoints(tmp_path / "run").newest().step == stop_at
    # All weights come from the checkpoint, but for those that L2-SP pulls towards.
    net, resumed = run(options, tmp_path / "run", net=network(seed=0 if options.l2_sp else 5), workers=3)
    assert same(state_of(net), state_of(expected))
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert resumed.lr == whole.lr


def test_nothing_is_saved_before_it_is_time_and_nowhere_without_a_folder(tmp_path):
    run(recipe(epochs=1), tmp_path)
    assert Checkpoints(tmp_path).newest() is None
    _, trained = run(recipe(epochs=1), checkpoint_seconds=0)
    assert trained.steps == 5


def test_a_training_that_has_diverged_is_not_saved(tmp_path, monkeypatch):
    """Losses are looked at every so many steps only, but always before a checkpoint."""
    monkeypatch.setitem(stepper.READ_STEPS, "cpu", 1_000)
    points = Points()
    points.points[5] = float("nan")
    with pytest.raises(UsageError, match="diverged"):
        run(recipe(epochs=1, norm="frozen"), tmp_path, points=points, checkpoint_seconds=0)
    found = Checkpoints(tmp_path).newest()
    assert found is None or all(value.isfinite().all() for value in found.tensors.values())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(recipe(epochs=1), tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(UsageError, match="weight_decay"):
        run(recipe(epochs=1, weight_decay=0.4), tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_state_and_ends_with_its_code(tmp_path, number):
    assert threading.current_thread() is threading.main_thread()

    class Signalling(Silent):
        steps = 0

        def advance(self, amount=1):
            self.steps += 1
            if self.steps == 4:  # the first call reports what a checkpoint has done
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(recipe(), tmp_path, progress=Signalling())
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path).newest().step == 3
    net, _ = run(recipe(), tmp_path)
    assert same(state_of(net), state_of(run(recipe())[0]))
