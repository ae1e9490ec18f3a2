"""How the library tells how far it is, without knowing who listens.

The library calls `start`, `advance` and `finish`; the command line draws bars on a terminal (cli/output.py)
and nothing elsewhere. Messages go through the `tlcli` logger: INFO is for the user, DEBUG for -v.
"""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage at a time."""

    def start(self, stage: str, total: int | None = None, unit: str = "images") -> None:
        """Begin `stage` with `total` units of work (None when unknown)."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` units as done."""

    def describe(self, text: str) -> None:
        """Say how the stage goes, such as the last epoch's loss."""

    def finish(self) -> None:
        """End the stage."""


class Silent:
    """A Progress that tells nobody."""

    def start(self, stage: str, total: int | None = None, unit: str = "images") -> None:
        """Ignore the start of a stage."""

    def advance(self, amount: int = 1) -> None:
        """Ignore finished work."""

    def describe(self, text: str) -> None:
        """Ignore how a stage goes."""

    def finish(self) -> None:
        """Ignore the end of a stage."""
