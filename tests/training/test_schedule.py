"""Schedules of the learning rate: their range, their warm-up, their shape and their end."""

import math

import pytest
import torch

from tests.training.recipes import recipe
from tlcli.training.schedule import Plateau, rate_factor


def factors(steps_per_epoch=10, **options):
    options = recipe(**options)
    return [rate_factor(options, step, steps_per_epoch) for step in range(options.epochs * steps_per_epoch)]


@pytest.mark.parametrize("sched", ["cosine", "constant", "step", "exponential", "plateau", "one-cycle"])
def test_a_schedule_stays_in_its_range_and_warms_up(sched):
    values = factors(sched=sched, warmup_epochs=2.0)
    assert all(0 < value <= 1 for value in values)
    assert values[0] < 0.2
    assert max(values) == pytest.approx(1.0)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_schedules_end_where_they_should():
    assert factors(sched="cosine")[-1] < 0.01
    assert factors(sched="one-cycle")[-1] < 0.01
    assert factors(sched="constant", warmup_epochs=0.0) == [1.0] * 100
    assert factors(sched="exponential", decay_rate=0.2)[-1] == pytest.approx(0.2, rel=0.1)


def test_steps_fall_at_the_epochs_asked_for():
    values = factors(sched="step", decay_epochs=4.0, decay_rate=0.1, warmup_epochs=0.0)
    assert values[39] == 1
    assert values[40] == pytest.approx(0.1)
    assert values[80] == pytest.approx(0.01)


def test_one_cycle_rises_for_three_tenths():
    values = factors(sched="one-cycle")
    assert values.index(max(values)) == 30


def test_a_plateau_lowers_the_rate_after_its_patience():
    plateau, options = Plateau(), recipe(sched="plateau", decay_epochs=1.0, decay_rate=0.5)
    seen = []
    for loss in (1.0, 0.9, 0.95, 0.94, 0.93, 0.8):
        plateau.update(loss, options)
        seen.append(plateau.factor)
    assert seen == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    other = Plateau()
    for loss in (1.0, 2.0, 3.0, 4.0):
        other.update(loss, recipe())
    assert other.factor == 1.0


# ---- against formulas ------------------------------------------------------------------------------------


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def of_torch(steps, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 70])
def test_cosine_is_torchs(steps):
    kinds = torch.optim.lr_scheduler
    expected = of_torch(steps, lambda optimizer: kinds.CosineAnnealingLR(optimizer, steps, eta_min=1e-3))
    assert factors(steps, sched="cosine", epochs=1, warmup_epochs=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 40])
def test_one_cycle_rises_from_a_25th_and_falls_to_a_thousandth(steps):
    rise = max(1, round(0.3 * steps))
    expected = [
        cosine(1 / 25, 1, step / rise) if step < rise else cosine(1, 1e-3, (step - rise) / (steps - rise))
        for step in range(steps)
    ]
    assert factors(steps, sched="one-cycle", epochs=1) == pytest.approx(expected)


@pytest.mark.parametrize("sched", ["constant", "cosine", "exponential"])
@pytest.mark.parametrize(("epochs", "warm"), [(2, 1), (4, 2), (1, 1), (3, 9)])
def test_warm_up_rises_evenly_to_the_peak_and_leaves_one_step_at_least(sched, epochs, warm):
    values, steps = factors(sched=sched, epochs=epochs, warmup_epochs=float(warm)), 10 * epochs
    rise = min(10 * warm, steps - 1)
    assert values[:rise] == pytest.approx([(step + 1) / (rise + 1) for step in range(rise)])
    assert values[rise] == 1.0
    if sched == "exponential":
        rest = [recipe().decay_rate ** ((step - rise) / (steps - rise)) for step in range(rise, steps)]
        assert values[rise:] == pytest.approx(rest)


def test_a_loss_that_stays_the_same_is_no_better():
    plateau, options = Plateau(), recipe(sched="plateau", decay_epochs=2.0, decay_rate=0.5)
    for loss in (1.0, 1.0, 1.0, 1.0):
        plateau.update(loss, options)
    assert (plateau.factor, plateau.waited) == (0.5, 0)
    plateau.update(0.5, options)
    plateau.update(0.6, options)
    assert (plateau.best, plateau.waited) == (0.5, 1)
    plateau.update(0.4, options)
    assert (plateau.best, plateau.waited, plateau.factor) == (0.4, 0, 0.5)


@pytest.mark.parametrize("sched", ["cosine", "constant", "step", "exponential", "plateau", "one-cycle"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_end_of_a_training_has_a_rate_too(sched, steps):
    """It is asked for after the last step, by the line of the last epoch."""
    options = recipe(sched=sched, epochs=1)
    assert 0 < rate_factor(options, steps, steps) <= 1


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_one_cycle_has_ended_after_its_last_step(steps):
    ended = rate_factor(recipe(sched="one-cycle", epochs=1), steps, steps)
    assert ended == pytest.approx(1e-3)
