"""A recipe of full fine-tuning with ten epochs, changed by options."""

from tlcli.config.commands import FinetuneConfig
from tlcli.training.recipe import Recipe, resolve


def recipe(**options) -> Recipe:
    return resolve(FinetuneConfig(**{"scenario": "full", "epochs": 10, **options}), num_train=1_000,
                   has_batch_norm=True)  # fmt: skip
