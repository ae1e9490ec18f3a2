"""Signals as a question that long work asks itself, so that it ends between two steps.

Ctrl-C; SIGTERM; SIGUSR1 and SIGUSR2, with which batch systems announce the end of a job (`sbatch --signal`);
SIGHUP, of a terminal or connection that is gone.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tlcli.warned import warn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
MESSAGE = "stopping after this step; once more stops at once"

_active: list[Callable[[], int | None]] = []  # of the block that is active in the main thread


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Let the first of SIGNALS inside the block only be noted; the second ends it at once.

    A block inside a block shares its answer. Outside the main thread signals cannot be taken over, so there
    nothing is ever asked. A signal that is ignored outside, as SIGINT is in a background job of a shell
    and SIGHUP under nohup, stays ignored.

    Yields:
        A function that returns the number of the signal that came, or None.

    Raises:
        KeyboardInterrupt: A second signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    if _active:
        yield _active[0]
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    came: list[int] = []
    speakers: list[threading.Thread] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        if len(came) == 1:
            # A handler may run in the middle of a write to stderr, which cannot be entered again.
            speakers.append(threading.Thread(target=lambda: warn("stopping", MESSAGE)))
            speakers[0].start()
            return
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)  # the command line's own, which remembers which signal it was
        raise KeyboardInterrupt

    def stop_signal() -> int | None:
        return came[0] if came else None

    _active.append(stop_signal)
    try:
        for number in taken:
            signal.signal(number, note)
        yield stop_signal
    finally:
        for number in taken:
            signal.signal(number, before[number])
        _active.clear()
        for speaker in speakers:
            speaker.join()


def leave_terminal() -> None:
    """Let nothing be written to a terminal that is gone: every write to it would be an error."""
    for fd in (1, 2):
        try:
            os.write(fd, b"")
        except OSError:
            with contextlib.suppress(OSError):
                gone = os.open(os.devnull, os.O_WRONLY)
                os.dup2(gone, fd)
                os.close(gone)
