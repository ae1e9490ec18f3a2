"""Examining images in child processes: finds the one that crashes or hangs its decoder, and names it.

Everything else decodes in threads of one process, which costs nothing. There a fault in a decoder's C code
ends the whole run, and the only trace is a signal. Here each image is decoded by a child process with a limit
of time and memory; a child that dies or does not answer is replaced, and its image is bad. Threads of the
parent hand out the images, one child a thread. The children are forked from a server that has imported torch
and runs no threads, so that a new child costs milliseconds.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from tlcli.data.audit import Examined, examine_one
from tlcli.data.dataset import Sample
from tlcli.data.image_files import DecodeError, read_bytes
from tlcli.data.split import Fingerprint, digest, map_threads
from tlcli.errors import ResourceError
from tlcli.progress import Progress

MEMORY_BYTES = 4 << 30  # for one image; the largest that is allowed needs about a quarter of it


def examine_isolated(
    samples: Sequence[Sample], workers: int, progress: Progress, *, seconds: float
) -> list[Examined]:
    """Return what every image is, in order, as `examine` does but each decoded in a child process.

    A script that calls this needs the usual `if __name__ == "__main__"`, as with all of multiprocessing.

    Args:
        samples: What to read.
        workers: Number of child processes.
        progress: Told of every image.
        seconds: That one image may take.

    Raises:
        ResourceError: A child process cannot be started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    own = threading.local()
    children: list[_Child] = []

    def examine(sample: Sample) -> Examined:
        if getattr(own, "child", None) is None:
            own.child = _Child(context)
            children.append(own.child)
        found: Examined | str = own.child.examine(sample, seconds)
        if isinstance(found, Examined):
            return found
        own.child = None
        return Examined(_fingerprint(sample.path), None, found)

    try:
        return list(map_threads(examine, samples, workers, "checking", progress))
    finally:
        for child in children:
            child.end()


class _Child:
    """A process that examines one image after another."""

    def __init__(self, context: multiprocessing.context.ForkServerContext) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._connection.recv()  # it is ready: the time it took to start is nobody's
        except EOFError as error:
            raise ResourceError(
                "A child process to decode images in cannot be started.",
                hint="Use fewer --workers, or leave out --isolate.",
            ) from error

    def examine(self, sample: Sample, seconds: float) -> Examined | str:
        """Return what an image is, or why the child is dead now."""
        try:
            self._connection.send(sample)
            if self._connection.poll(seconds):
                found: Examined = self._connection.recv()
                return found
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"crashes its decoder ({how})"
        self.end()
        return f"decoding takes more than {seconds:g} s"

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """Examine what comes through `connection` until the other end closes; runs in a child process."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS does not hold a process to it
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
        with contextlib.suppress(ValueError):  # a stricter limit is set already
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(examine_one(connection.recv()))


def _fingerprint(path: str) -> Fingerprint:
    try:
        return digest(read_bytes(path))
    except DecodeError as error:
        return Fingerprint(None, 0, error.reason)
