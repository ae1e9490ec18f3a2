"""A run that was interrupted, for the items about continuing one."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tlcli.progress import Silent


@dataclass(frozen=True)
class Unfinished:
    """A run that was interrupted in its second epoch; tests take a copy.

    Attributes:
        images: Its data.
        run: Its directory, with two checkpoints.
        words: The command line that began it, without -o.
        expected: The weights that it would have ended with, as model.safetensors.
    """

    images: Path
    run: Path
    words: tuple[str, ...]
    expected: bytes


class Stopping(Silent):
    """Ends the training at a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.left = step

    def describe(self, text: str) -> None:
        from tlcli.errors import Interrupted

        self.left -= 1
        if self.left == 0:
            raise Interrupted(15)


@pytest.fixture(scope="session")
def unfinished(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Unfinished:
    """Return the interrupted run; resuming it saves no further checkpoints until the end of an epoch."""
    from tlcli.commands.finetune import finetune, plan_finetune
    from tlcli.config.commands import FinetuneConfig
    from tlcli.errors import Interrupted

    root = tmp_path_factory.mktemp("unfinished")
    images = shutil.copytree(trained.images, root / "images")
    options = {
        "backbone": "test_resnet", "random_init": True, "image_size": 32, "dtype": "fp32", "amp": "none",
        "freeze": "3", "head_init": "random", "epochs": 2, "batch_size": 8, "lr": "0.003", "cache": "always",
        "augment": "none", "seed": 3,
    }  # fmt: skip
    words = ["finetune", str(images)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    fixed: dict[str, Any] = {"data": str(images), "workers": 1, **options}

    def config(name: str) -> FinetuneConfig:
        return FinetuneConfig(**fixed, output=str(root / name), checkpoint_minutes=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_HOME", str(root / "home"))
        finetune(plan_finetune(config("whole"), Silent()), Silent())
        with pytest.raises(Interrupted):
            finetune(plan_finetune(config("run"), Silent()), Stopping(7))
    assert len(os.listdir(root / "run" / "checkpoints")) == 2
    expected = (root / "whole" / "model.safetensors").read_bytes()
    return Unfinished(images, root / "run", tuple(words), expected)
