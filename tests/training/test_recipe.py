"""Recipes: what is given is taken, what is not follows from the scenario and the size of the data."""

import dataclasses

import pytest

from tlcli.config.commands import FinetuneConfig
from tlcli.config.training import TrainingOptions
from tlcli.errors import UsageError
from tlcli.training.recipe import Recipe, resolve


def recipe(num_train=1_000, has_batch_norm=True, num_processes=1, **options):
    config = FinetuneConfig(**{"scenario": "full", **options})
    return resolve(config, num_train=num_train, has_batch_norm=has_batch_norm, num_processes=num_processes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 7), ("batch_size", 5), ("opt", "sgd"), ("weight_decay", 0.3), ("l1", 0.1),
        ("max_norm", 3.0), ("layer_decay", 0.5), ("sched", "step"),
        ("decay_epochs", 2.0), ("ema", 0.9), ("warmup_epochs", 1.5),
        ("mixup", 0.2), ("cutmix", 1.0), ("label_smoothing", 0.0), ("class_weights", "balanced"),
        ("sampling", "balanced"), ("drop_path", 0.2), ("norm", "frozen"), ("head_init", "random"),
        ("patience", 3), ("seed", 9), ("clip_grad", 1.0), ("clip_mode", "value"), ("grad_accum", 2),
        ("l2_sp", 0.1), ("aux_weight", 0.1), ("momentum", 0.5), ("decay_rate", 0.5),
    ],
)  # fmt: skip
def test_what_is_given_is_taken(name, value):
    assert getattr(recipe(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "text", "value"), [("lr", "0.02", 0.02), ("dropout", "0.3", 0.3)])
def test_a_single_value_is_read_from_what_may_be_a_grid(name, text, value):
    assert getattr(recipe(**{name: text}), name) == value


def test_l2_is_a_penalty_only_when_it_is_a_number():
    assert recipe().l2 == 0
    assert recipe(l2="0.5").l2 == 0.5


def test_every_training_option_is_in_the_recipe_or_elsewhere():
    elsewhere = {"amp", "checkpoint_minutes", "tracker", "publish", "select_fraction"}
    names = {field.name for field in dataclasses.fields(TrainingOptions)}
    assert names - elsewhere <= set(Recipe.__dataclass_fields__)


@pytest.mark.parametrize("name", ["lr", "dropout", "l2"])
def test_a_grid_is_refused(name):
    with pytest.raises(UsageError, match="grid"):
        recipe(**{name: "0.01,0.1"})


@pytest.mark.parametrize(
    "options",
    [
        {"refit": True},
        {"scenario": "scratch", "head_init": "probe"},
        {"scenario": "scratch", "l2_sp": 0.1},
    ],
)
def test_contradictions_are_refused(options):
    with pytest.raises(UsageError):
        recipe(**options)


def test_small_data_take_more_epochs_and_no_data_take_endless_ones():
    epochs = [recipe(num_train=count).epochs for count in (100, 1_000, 10_000, 1_000_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] <= 30
    assert epochs[-1] >= 1


def test_scratch_trains_longer_and_starts_from_a_random_head():
    scratch = recipe(scenario="scratch")
    assert scratch.epochs > recipe().epochs
    assert (scratch.head_init, scratch.norm, scratch.layer_decay) == ("random", "train", 1.0)
    assert recipe().head_init == "probe"


def test_random_weights_have_no_features_to_probe():
    assert recipe(random_init=True).head_init == "random"


def test_batch_norm_follows_the_data_only_where_batches_steps_and_data_allow_it():
    assert recipe(num_train=10_000).norm == "train"
    assert recipe(num_train=4_000).norm == "frozen"
    assert recipe(num_train=10_000, epochs=1, batch_size=64).norm == "frozen"
    assert "156 steps" in recipe(num_train=10_000, epochs=1, batch_size=64).norm_reason
    assert recipe(num_train=10_000, batch_size=4).norm == "frozen"
    assert recipe(num_train=10_000, batch_size=32, num_processes=4).norm == "frozen"
    assert "4" in recipe(batch_size=4).norm_reason
    assert recipe(num_train=100, scenario="scratch").norm == "train"


def test_a_short_training_from_a_probe_has_a_low_rate_and_one_from_random_weights_has_not():
    rates = [recipe(num_train=320, epochs=epochs).lr for epochs in (1, 2, 3, 100)]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(2 * rates[0])
    assert rates[-1] == recipe(epochs=30).usual_lr
    assert rates[0] < rates[-1] / 2
    for options in ({"random_init": True}, {"head_init": "random"}, {"scenario": "scratch"}):
        found = recipe(num_train=320, epochs=1, **options)
        assert found.lr == found.usual_lr


def test_the_rate_grows_with_the_batch_and_shrinks_without_batch_norm():
    assert recipe(batch_size=128).lr == pytest.approx(2 * recipe(batch_size=32).lr)
    assert recipe(batch_size=64, opt="sgd").lr == pytest.approx(2 * recipe(batch_size=32, opt="sgd").lr)
    assert recipe(has_batch_norm=False).lr < recipe().lr
    assert recipe(lr="auto").lr is None


def test_the_batch_is_never_larger_than_the_data_nor_smaller_than_the_processes():
    assert recipe(num_train=10).batch_size == 10
    assert recipe(num_train=1, num_processes=2).batch_size == 2


def test_what_selects_on_val_says_so():
    assert not recipe().select_on_val
    assert recipe(patience=3).select_on_val
    assert recipe(sched="plateau").select_on_val


def test_the_facts_name_what_matters():
    text = recipe(lr="auto", label_smoothing=0.2).summary()
    assert "by short trainings" in text
    assert "label smoothing 0.2" in text
    assert "linear probe" in text
