"""The state of a training between two steps, as a checkpoint and back.

Weights, the optimiser's memory and counters are all there is: the randomness of a step is a function of
(seed, step), the order of samples one of (seed, epoch), so a resumed training is bit-identical on a CPU.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tlcli.errors import BackboneError, UsageError
from tlcli.machine.memory import is_out_of_memory
from tlcli.training.checkpoints import Checkpoint, Checkpoints
from tlcli.training.optimizer_state import load_optimizer_state, optimizer_state
from tlcli.training.schedule import Plateau
from tlcli.training.selection import Selection
from tlcli.training.stepper import Stepper

# Of a resumed recipe: a rate that was searched for is in the checkpoint, and words change no training.
ALLOWED_TO_DIFFER = ("lr", "norm_reason")


@dataclass
class Counters:
    """How far a training is.

    Attributes:
        lr: Peak learning rate; 0 until a search has found it.
        step: Optimiser steps done.
        epoch: Epochs done.
        history: One dict an epoch, as in metrics.jsonl.
    """

    lr: float
    step: int = 0
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """All that changes in a training.

    Attributes:
        counters: How far it is.
        stepper: Network, optimiser, averages, sums of the epoch.
        selection: What val has decided so far.
        num_train: Training samples, which must be as many when it is continued.
    """

    counters: Counters
    stepper: Stepper
    selection: Selection
    num_train: int

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint.

        Raises:
            StorageError: The disk refuses.
        """
        stepper, selection, counters = self.stepper, self.selection, self.counters
        state, about = optimizer_state(stepper.optimizer)
        tensors = {f"network.{name}": value for name, value in stepper.network.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        tensors |= {f"best.{name}": value for name, value in selection.best.items()}
        if stepper.average:
            tensors |= {f"average.{name}": value for name, value in stepper.average.values.items()}
        scaler = stepper.accelerator.scaler
        facts = {
            "recipe": self._recipe(),
            "step": counters.step, "epoch": counters.epoch, "lr": counters.lr, "history": counters.history,
            "sums": stepper.sums.tolist(),
            "best_epoch": selection.best_epoch, "best_loss": selection.best_loss,
            "plateau": vars(selection.plateau),
            "average_steps": stepper.average.steps if stepper.average else 0,
            "optimizer": about,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }  # fmt: skip
        checkpoints.save(counters.step, tensors, facts)

    def restore(self, checkpoints: Checkpoints) -> bool:
        """Continue from the newest intact checkpoint; return whether there was one.

        Raises:
            UsageError: It is of another training.
            BackboneError: It is not a state of this training, or all checkpoints are damaged.
        """
        found = checkpoints.newest()
        if found is None:
            return False
        try:
            self._take(found)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise BackboneError(
                f"Checkpoint {str(found.path)!r} is not a state of this training: {error!r}.",
                hint=f"It was not written by tlcli; remove {found.path} to continue from an earlier one.",
            ) from error
        return True

    def _recipe(self) -> dict[str, Any]:
        return {**self.stepper.recipe.document(), "num_train": self.num_train}

    def _take(self, found: Checkpoint) -> None:
        facts, mine = found.facts, self._recipe()
        different = [
            name for name, value in mine.items()
            if name not in ALLOWED_TO_DIFFER and facts["recipe"].get(name) != value
        ]  # fmt: skip
        if different:
            name = different[0]
            raise UsageError(
                f"The checkpoint is of another training: {name} was {facts['recipe'].get(name)!r}, now "
                f"{mine[name]!r}.",
                hint="Resume with the options the run was started with.",
            )
        stepper, selection, counters = self.stepper, self.selection, self.counters
        stepper.network.load_state_dict(_part(found, "network."))
        load_optimizer_state(stepper.optimizer, _part(found, "optimizer."), facts["optimizer"])
        selection.best = {name: value.to(stepper.device) for name, value in _part(found, "best.").items()}
        if stepper.average:
            for name, value in _part(found, "average.").items():
                stepper.average.values[name].copy_(value)
            stepper.average.steps = facts["average_steps"]
        counters.step, counters.epoch = int(facts["step"]), int(facts["epoch"])
        counters.lr, counters.history = float(facts["lr"]), facts["history"]
        stepper.sums = torch.tensor(facts["sums"], dtype=torch.float64)
        selection.best_epoch, selection.best_loss = facts["best_epoch"], facts["best_loss"]
        selection.plateau = Plateau(**facts["plateau"])
        if facts["scaler"] is not None and stepper.accelerator.scaler is not None:
            stepper.accelerator.scaler.load_state_dict(facts["scaler"])


def _part(found: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)
    }
