"""Where and how a training runs, and what it is told to whom: nothing that changes what comes out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli.backbones.compute import Amp
from tlcli.progress import Progress, Silent
from tlcli.training.checkpoints import Checkpoints


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how training runs; nothing here changes what comes out, but for `amp` and `device`.

    Attributes:
        device: Where the network is trained.
        amp: Compute type under automatic mixed precision.
        channels_last: The memory format of maps and weights.
        workers: Threads that load.
        unit_of: Backbone parameter name -> unit, from 1.
        num_units: Units of the backbone.
        undecayed: Backbone parameters that decay spares beside vectors.
        checkpoints: Where states go; None saves none.
        checkpoint_seconds: Between two of them, beside those at the end of an epoch.
        progress: Told of every image.
        head_without: Returns the head's part of the network's state, had its probe not seen some training
            samples; None where no probe saw any.
        on_epoch: Called by the first process with one dict an epoch, all of them so far.
        tracker: Name of one of accelerate's trackers, or none.
        log_dir: Where a tracker may write.
    """

    device: torch.device
    amp: Amp = "none"
    channels_last: bool = True
    workers: int = 1
    unit_of: dict[str, int] = field(default_factory=dict)
    num_units: int = 0
    undecayed: frozenset[str] = frozenset()
    checkpoints: Checkpoints | None = None
    checkpoint_seconds: float = 300.0
    progress: Progress = field(default_factory=Silent)
    head_without: Callable[[Tensor], dict[str, Tensor]] | None = None
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda _history: None
    tracker: str = "none"
    log_dir: Path | None = None
