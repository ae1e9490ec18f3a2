"""The tiny network that tests extract, train and predict with, on the command line and from Python."""

from pathlib import Path
from typing import Any

from tlcli.commands.finetune import Result, finetune, plan_finetune
from tlcli.progress import Progress, Silent

OPTIONS: dict[str, Any] = {"backbone": "test_resnet", "random_init": True, "image_size": 32}
TINY = ("--backbone", "test_resnet", "--random-init", "--image-size", "32")
TINY_FP32 = (*TINY, "--dtype", "fp32")
TINY_HEADS = (*TINY_FP32, "--l2", "0.1", "--folds", "2")
"""As few heads as there can be."""


def tiny(kind: type, folder: Path | str, **options: Any) -> Any:
    """Return a configuration of `kind` on a folder, in fp32 and two threads."""
    return kind(**{"data": str(folder), "workers": 2, "dtype": "fp32", **OPTIONS, **options})


def finetuned(config: Any, progress: Progress | None = None) -> Result:
    """Plan a training and do it."""
    return finetune(plan_finetune(config, Silent()), progress or Silent())
