"""Recipes: what is given is taken, what is not follows from the scenario and the size of the data."""

import dataclasses

import pytest

from tlcli.config.commands import FinetuneConfig
from tlcli.config.training import TrainingOptions
from tlcli.errors import UsageError
from tlcli.training.recipe import Recipe, rate_by_steps, resolve


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


# ---- the rules, as figures ------------------------------------------------------------------------------

COLUMNS = "scenario, images, epochs, batch, lr, usual, warm, layer_decay, weight_decay, norm"
TABLE = [
    ("freeze", 250, 30, 32, 2e-3, 2e-3, 5.0, 0.95, 0.02, "frozen"),
    ("freeze", 1_000, 13, 32, 2e-3, 2e-3, 2.6, 0.95, 0.02, "frozen"),
    ("freeze", 1_280, 10, 32, 2e-3, 2e-3, 2.0, 0.95, 0.02, "frozen"),
    ("full", 1_280, 10, 32, 1e-3, 1e-3, 2.0, 0.9, 0.02, "frozen"),
    ("scratch", 1_280, 100, 32, 2e-3, 2e-3, 5.0, 1.0, 0.05, "train"),
    ("freeze", 30_000, 8, 128, 4e-3, 4e-3, 1.6, 0.95, 0.02, "train"),
    ("full", 100, 30, 32, 1e-3, 1e-3, 20 / 3, 0.9, 0.02, "frozen"),
    ("full", 1_000, 13, 32, 1e-3, 1e-3, 2.6, 0.9, 0.02, "frozen"),
    ("full", 4_999, 8, 32, 1e-3, 1e-3, 1.6, 0.9, 0.02, "frozen"),
    ("full", 5_000, 8, 64, 2**0.5 * 1e-3, 2**0.5 * 1e-3, 1.6, 0.9, 0.02, "train"),
    ("full", 19_999, 8, 64, 2**0.5 * 1e-3, 2**0.5 * 1e-3, 1.6, 0.9, 0.02, "train"),
    ("full", 20_000, 8, 128, 2e-3, 2e-3, 1.6, 0.9, 0.02, "train"),
    ("scratch", 1_000, 120, 32, 2e-3, 2e-3, 5.0, 1.0, 0.05, "train"),
    ("scratch", 100_000, 30, 128, 4e-3, 4e-3, 5.0, 1.0, 0.05, "train"),
]


@pytest.mark.parametrize(COLUMNS, TABLE)
def test_the_recipe_of_each_scenario_by_the_size_of_the_data(
    scenario, images, epochs, batch, lr, usual, warm, layer_decay, weight_decay, norm
):
    found = recipe(num_train=images, scenario=scenario)
    assert (found.epochs, found.batch_size, found.norm) == (epochs, batch, norm)
    assert (found.layer_decay, found.weight_decay) == (layer_decay, weight_decay)
    assert (found.lr, found.usual_lr, found.warmup_epochs) == pytest.approx((lr, usual, warm))
    assert (found.label_smoothing, found.l2, found.dropout) == (0.1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-3), ({"scenario": "freeze"}, 2e-3), ({"scenario": "scratch"}, 2e-3),
        ({"opt": "sgd"}, 0.01), ({"opt": "sgd", "scenario": "freeze"}, 0.02),
        ({"opt": "momentum", "scenario": "scratch"}, 0.1), ({"opt": "lion"}, 1e-4),
        ({"opt": "sgd", "batch_size": 64}, 0.02), ({"has_batch_norm": False}, 1e-4),
    ],
)  # fmt: skip
def test_the_usual_rate_of_a_batch_of_32(options, rate):
    assert recipe(**options).usual_lr == pytest.approx(rate)


@pytest.mark.parametrize(("scenario", "enough"), [("freeze", 100), ("full", 50)])
def test_the_rate_is_a_share_of_the_usual_one_until_there_are_enough_steps(scenario, enough):
    for steps in (1, enough // 2, enough - 1, enough, enough + 1, 3 * enough):
        found = recipe(num_train=32 * steps, epochs=1, batch_size=32, scenario=scenario)
        assert found.lr == pytest.approx(found.usual_lr * min(1, steps / enough))
        assert recipe(num_train=32, epochs=steps, batch_size=32, scenario=scenario).lr == pytest.approx(
            found.lr
        )


def test_what_goes_on_from_a_scratch_run_has_the_whole_rate():
    assert rate_by_steps(3, "scratch", "run") == 1.0
    assert rate_by_steps(3, "full", "random") == 1.0
    assert rate_by_steps(25, "full", "run") == 0.5


def test_one_process_unless_told():
    assert resolve(FinetuneConfig(scenario="full"), num_train=3, has_batch_norm=True).batch_size == 3
    assert resolve(FinetuneConfig(scenario="full"), num_train=1, has_batch_norm=False).batch_size == 1


def test_warm_up_takes_a_fifth_at_most_five_epochs_and_twenty_steps_where_epochs_are_short():
    warm = {
        epochs: recipe(num_train=32_000, epochs=epochs, batch_size=32).warmup_epochs for epochs in (1, 10, 60)
    }
    assert warm == pytest.approx({1: 0.2, 10: 2.0, 60: 5.0})
    assert recipe(num_train=320, epochs=8, batch_size=32).warmup_epochs == pytest.approx(
        2.0
    )  # 20 of 80 steps
    assert recipe(num_train=96, epochs=8, batch_size=32).warmup_epochs == pytest.approx(4.0)  # half of all
    assert recipe(num_train=96, epochs=1, batch_size=32).warmup_epochs == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "norm", "why"),
    [
        ({"num_train": 5_000, "epochs": 4, "batch_size": 50}, "train", "batches of 50 from 5000 images"),
        ({"num_train": 4_999, "epochs": 9, "batch_size": 50}, "frozen", "4999 training images are too few"),
        ({"num_train": 5_000, "epochs": 3, "batch_size": 50}, "train", "from 5000"),
        ({"num_train": 5_000, "epochs": 1, "batch_size": 17}, "frozen", "294 steps are too few"),
        ({"num_train": 9_600, "epochs": 1, "batch_size": 32}, "train", "from 9600"),
        ({"num_train": 9_000, "epochs": 9, "batch_size": 16}, "train", "batches of 16"),
        ({"num_train": 9_000, "epochs": 9, "batch_size": 15}, "frozen", "batches of 15 are too small"),
        ({"num_train": 9_000, "epochs": 9, "batch_size": 32, "grad_accum": 2}, "train", "batches of 16"),
        ({"num_train": 9_000, "epochs": 9, "batch_size": 32, "grad_accum": 3}, "frozen", "batches of 10"),
        ({"num_train": 90, "norm": "train"}, "train", "asked for"),
        ({"num_train": 90, "scenario": "scratch"}, "train", "no pretrained statistics"),
    ],
)  # fmt: skip
def test_when_batch_norm_follows_the_data_and_why(options, norm, why):
    found = recipe(**options)
    assert found.norm == norm
    assert why in found.norm_reason


def test_passes_of_one_image_are_refused_where_batch_norm_would_follow_them():
    for options in (
        {"batch_size": 1},
        {"batch_size": 4, "grad_accum": 4},
        {"batch_size": 3, "num_processes": 2},
    ):
        with pytest.raises(UsageError, match="passes of one image"):
            recipe(norm="train", **options)
        assert recipe(norm="frozen", **options).norm == "frozen"
        assert recipe(norm="train", has_batch_norm=False, **options).norm == "train"
    assert recipe(norm="train", batch_size=4, grad_accum=2).norm == "train"


def test_plateau_waits_two_epochs_and_steps_come_at_thirds():
    assert recipe(sched="plateau").decay_epochs == 2.0
    assert recipe(sched="step", epochs=9).decay_epochs == 3.0
    assert recipe(epochs=7, sched="exponential").decay_epochs == pytest.approx(7 / 3)


def test_a_zero_is_a_value_that_is_given():
    found = recipe(weight_decay=0.0, layer_decay=1.0, warmup_epochs=0.0, label_smoothing=0.0)
    assert (found.weight_decay, found.warmup_epochs, found.label_smoothing) == (0.0, 0.0, 0.0)


def test_both_balanced_options_are_balanced():
    assert not recipe().balanced
    assert recipe(class_weights="balanced").balanced
    assert recipe(sampling="balanced").balanced


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (
            {},
            ["13 epochs of batch 32, adamw, learning rate 0.001, cosine", "layer decay 0.9", "decay 0.02"],
            ["short trainings"],
        ),
        ({"layer_decay": 1.0, "label_smoothing": 0.0, "head_init": "random"}, ["from a random head"],
         ["layer decay", "label smoothing"]),
        ({"epochs": 1, "batch_size": 8, "sched": "step"}, ["1 epoch of batch 8", "step"], ["1 epochs"]),
    ],
)  # fmt: skip
def test_the_summary_names_what_is_done_and_nothing_else(options, present, absent):
    text = recipe(**options).summary()
    assert all(part in text for part in present)
    assert not any(part in text for part in absent)
