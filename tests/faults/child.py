"""Run a piece of work in a child process that a fault may kill, and hear what it did until then."""

import json
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.injection import Fault, Injector
from tlcli.errors import TlcliError

LIMIT_SECONDS = 60  # a child that takes longer hangs


class Teller:
    """What a child says as it works; each message is out of the process when `say` returns."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._waiting: list[Any] = []

    def say(self, what: str, value: Any = None) -> None:
        self._channel.sendall(json.dumps([what, value]).encode() + b"\n")

    def adding(self, row: Any) -> None:
        """Note a row that the next published shard will hold."""
        self._waiting.append(row)

    def renamed(self, target: str) -> None:
        """Note that a file has its final name: the rows that waited for it are committed."""
        if Path(target).parent.name == "shards" and self._waiting:
            self.say("committed", self._waiting)
            self._waiting = []


Work = Callable[[Path, Teller], None]


@dataclass
class Outcome:
    """What became of a child.

    Attributes:
        ended: done, refused (with an error of tlcli), killed, bug, or hung.
        fired: Whether the fault happened.
        committed: Rows whose shard had its name when the process ended.
        problems: What it saw that must not be.
        message: Of the error that ended it.
        counts: Calls by kind, where it was not killed.
    """

    ended: str = "killed"
    fired: bool = False
    committed: list[Any] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    message: str = ""
    counts: dict[str, int] = field(default_factory=dict)


def start_child(
    work: Work, folder: Path, fault: Fault | None, ready: Callable[[], object] = lambda: None
) -> tuple[int, socket.socket]:
    """Fork a child that calls `ready`, then works under a fault; return its process id and channel."""
    ours, its = socket.socketpair()
    process_id = os.fork()
    if process_id:
        its.close()
        return process_id, ours
    try:
        ours.close()
        signal.alarm(LIMIT_SECONDS)
        logging.disable(logging.CRITICAL)
        ready()
        _work(work, folder, fault, Teller(its))
    finally:
        os._exit(0)


def _work(work: Work, folder: Path, fault: Fault | None, teller: Teller) -> None:
    injector = Injector(fault, lambda: teller.say("fired"), teller.renamed)
    injector.install()
    try:
        work(folder, teller)
        teller.say("ended", ["done", ""])
    except TlcliError as error:
        teller.say("ended", ["refused", f"{type(error).__name__}: {error}"])
    except BaseException:
        teller.say("ended", ["bug", traceback.format_exc()])
    teller.say("counts", injector.counts)


def finish_child(process_id: int, channel: socket.socket) -> Outcome:
    """Wait for a child and return what it said."""
    said = b""
    with channel:
        while piece := channel.recv(1 << 16):
            said += piece
    _, status = os.waitpid(process_id, 0)
    outcome = Outcome()
    for line in said.splitlines():
        what, value = json.loads(line)
        if what == "fired":
            outcome.fired = True
        elif what == "committed":
            outcome.committed += value
        elif what == "problem":
            outcome.problems.append(value)
        elif what == "ended":
            outcome.ended, outcome.message = value
        elif what == "counts":
            outcome.counts = value
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        outcome.ended = "hung"
    if outcome.ended in ("bug", "hung"):
        outcome.problems.append(f"{outcome.ended}: {outcome.message}")
    return outcome


def run_child(work: Work, folder: Path, fault: Fault | None = None) -> Outcome:
    """Run a piece of work in a child under a fault, to its end."""
    return finish_child(*start_child(work, folder, fault))
