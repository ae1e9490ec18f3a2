"""The first signal is noted, the second ends at once, and everything is as before afterwards."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tlcli.machine.interrupts import SIGNALS, deferred

ROOT = Path(__file__).parents[2]
NUMBERS = list(SIGNALS)


class Terminated(Exception):
    """What the outer handler of SIGTERM raises here."""


@pytest.fixture(autouse=True)
def outside():
    """Handlers as the command line sets them; those of the test runner afterwards."""

    def terminate(number, frame):
        raise Terminated

    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in NUMBERS[1:]:
        signal.signal(number, terminate)
    expected = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    assert {number: signal.getsignal(number) for number in NUMBERS} == expected
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_is_noted_and_told_once(number, caplog):
    with deferred() as asked:
        assert asked() is None
        send(number)
        assert asked() == number
        assert asked() == number
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "stopping after this step; once more stops at once"


def test_nothing_is_told_without_a_signal(caplog):
    with deferred() as asked:
        assert asked() is None
    assert not caplog.records
    with pytest.raises(ZeroDivisionError), deferred():
        _ = 1 / 0


def twice(first, second):
    with deferred():
        send(first)
        send(second)


@pytest.mark.parametrize("first", NUMBERS)
def test_the_second_is_for_the_handler_outside(first):
    with pytest.raises(KeyboardInterrupt):
        twice(first, signal.SIGINT)
    with pytest.raises(Terminated):
        twice(first, signal.SIGTERM)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, lambda number, frame: None])
def test_the_second_ends_whatever_was_outside(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            twice(signal.SIGTERM, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with deferred() as asked:
            send(number)
            assert asked() is None
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_block_inside_a_block_shares_its_answer(caplog):
    with deferred() as outer:
        with deferred() as inner:
            send(signal.SIGTERM)
            assert (inner(), outer()) == (signal.SIGTERM, signal.SIGTERM)
        assert outer() == signal.SIGTERM
        with deferred() as inner:
            assert inner() == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    assert len(caplog.records) == 1
    with deferred() as asked:
        assert asked() is None


def test_elsewhere_than_in_the_main_thread_nothing_is_asked():
    found = []

    def run():
        with deferred() as asked:
            found.append(asked())

    with deferred() as asked:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        send(signal.SIGINT)
        assert asked() == signal.SIGINT
    assert found == [None]


LOOP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from tlcli.cli import app, options
from tlcli.errors import Interrupted
from tlcli.machine.interrupts import SIGNALS, deferred

def work(self):
    with deferred() as asked:
        print("ready", flush=True)
        while asked() is None or sys.argv[1] == "hangs":
            time.sleep(0.01)
        print("saved", flush=True)
        raise Interrupted(asked())

from tlcli.cache.store import Store
Store.entries = work
sys.exit(app.main(["cache", "list"]))
"""


def child(kind, *before, **options):
    return subprocess.Popen(
        [*before, sys.executable, "-c", LOOP, kind], text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_a_command_that_saves_ends_with_the_signals_code(number):
    process = child("saves")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "saved\n")
    assert "once more stops at once" in stderr
    assert "Interrupted by" in stderr


@pytest.mark.parametrize("number", NUMBERS)
def test_a_command_that_hangs_ends_at_the_second(number):
    process = child("hangs")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "once more" in process.stderr.readline()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "")
    assert "Interrupted by" in stderr


def test_under_nohup_a_hangup_is_ignored_still():
    process = child("saves", "nohup", stdin=subprocess.DEVNULL)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + signal.SIGUSR1, "saved\n")
    assert "SIGUSR1" in stderr


def test_a_terminal_that_is_gone_takes_nothing_with_it():
    main, terminal = os.openpty()

    def take_terminal():
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = child(
        "saves", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(terminal)
    assert os.read(main, 1 << 10).startswith(b"ready")
    os.close(main)
    assert process.wait(60) == 128 + signal.SIGHUP
