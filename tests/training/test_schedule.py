"""Schedules of the learning rate: their range, their warm-up, their shape and their end."""

import pytest

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
