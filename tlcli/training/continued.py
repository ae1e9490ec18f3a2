"""A finished run that is trained on: its weights, and where its epochs ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tlcli.errors import BackboneError
from tlcli.heads.head import Head
from tlcli.machine import processes
from tlcli.runs.continuing import EARLIER, is_done, source
from tlcli.runs.directory import read_facts
from tlcli.runs.results import read_lines
from tlcli.runs.run import open_run


@dataclass(frozen=True)
class Continued:
    """A finished run that is trained on.

    Attributes:
        run_dir: The run; once training begins its RUN/earlier is what it was.
        epochs: Epochs it had trained.
        steps: Optimiser steps it had done.
        upto: The epoch to train to.
        history: Its epochs, as in metrics.jsonl.
        training: `training` of its run.json.
    """

    run_dir: Path
    epochs: int
    steps: int
    upto: int
    history: tuple[dict[str, Any], ...]
    training: Mapping[str, Any]

    def summary(self) -> str:
        """Return what goes on, for people."""
        epochs = (
            f"epoch {self.upto}"
            if self.upto == self.epochs + 1
            else f"epochs {self.epochs + 1} to {self.upto}"
        )
        return f"{self.run_dir} after epoch {self.epochs}: {epochs}, with a new schedule"

    def document(self) -> dict[str, Any]:
        """Return what goes on, for run.json and --json."""
        return {"after_epoch": self.epochs, "to_epoch": self.upto, "steps": self.steps}


def continued_from(run_dir: Path, facts: Mapping[str, Any] | None, upto: int | None) -> Continued | None:
    """Return the finished run that a run goes on from, or None.

    Args:
        run_dir: The run.
        facts: Its run.json; None where there is none.
        upto: The epoch to train to.

    Raises:
        DataError: The files of the finished run cannot be read.
    """
    place = source(run_dir, facts) if facts is not None else None
    if place is None or facts is None or upto is None:
        return None
    before = facts if is_done(facts) else read_facts(place, str(place))
    training = before["training"]
    history = [line for line in read_lines(place / "metrics.jsonl") if line.get("kind") == "epoch"]
    return Continued(run_dir, training["epochs"], training["steps"], upto, tuple(history), training)


def load_weights(continued: Continued, model: nn.Module) -> Head:
    """Load the weights of the finished run into the backbone, in place, and return its head.

    Args:
        continued: Its RUN/earlier has been made.
        model: The backbone, headless; its prefix, where units are frozen, has these weights already.

    Raises:
        BackboneError: The files do not fit the network.
        DataError: They cannot be read.
    """
    processes.barrier()  # the first process makes RUN/earlier
    path = continued.run_dir / EARLIER
    run = open_run(str(path))
    try:
        model.load_state_dict(run.backbone().model.state_dict())
    except RuntimeError as error:
        raise BackboneError(
            f"The weights in {str(path)!r} do not fit the network of the run: {' '.join(str(error).split())}",
            hint=f"Train from them in a new run: --backbone local-dir:{path}",
        ) from error
    return run.head()
