"""Processes killed at any moment, and several at once: no wrong row, no published row lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cached import check, put, row_key, spec

from tlcli.cache.prune import execute_prune, plan_prune
from tlcli.cache.store import Store

WRITE = """
import os, signal, sys
from cached import ENV, row, row_key, spec
from tlcli.cache.store import Store

root, first, last, call, nth = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
assert "torch" not in sys.modules
real, calls = getattr(os, call), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(os, call, counted)
entry = Store(root).entry(spec())
have = entry.rows()
with entry.writer(ENV, flush_bytes=128) as writer:
    for number in range(first, last):
        if row_key(number) not in have:
            writer.add(row_key(number), row(number))
"""


def start(root: Path, first: int, last: int, call: str = "fsync", nth: int = 0) -> subprocess.Popen:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    arguments = [sys.executable, "-c", WRITE, str(root), str(first), str(last), call, str(nth)]
    return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize(
    ("call", "nth"), [("open", 7), ("write", 3), ("write", 4), ("fsync", 9), ("replace", 3), ("replace", 4)]
)
def test_kill_9_and_run_again(tmp_path, call, nth):
    root = tmp_path / "features"
    assert start(root, 0, 12, call, nth).wait() == -signal.SIGKILL
    store = Store(root)
    kept = store.entry(spec()).rows()
    assert len(kept) < 12
    check(store.entry(spec()), range(12), missing=[n for n in range(12) if row_key(n) not in kept])
    entry = store.entry(spec())
    put(entry, [number for number in range(12) if row_key(number) not in kept])
    check(Store(root).entry(spec()), range(12))
    assert Store(root).entry(spec()).verify(deep=True) == []
    assert not list(entry.directory.rglob(".tmp-*"))


def test_several_writers_a_reader_and_a_pruner_at_once(tmp_path):
    root = tmp_path / "features"
    writers = [start(root, first, first + 40) for first in (0, 20, 20)]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        store = Store(root)
        entry = store.entry(spec())
        numbers = range(60)
        rows, missing = entry.read([row_key(number) for number in numbers])
        for number in set(numbers) - set(missing):
            assert rows[number][0] == number
        execute_prune(store, plan_prune(store))
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    check(Store(root).entry(spec()), range(60))
    assert Store(root).entry(spec()).verify(deep=True) == []


def test_nothing_is_locked(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise AssertionError("a lock was taken")

    for name in ("flock", "lockf", "fcntl"):
        monkeypatch.setattr(fcntl, name, refuse)
    monkeypatch.setattr(os, "lockf", refuse)
    store = Store(tmp_path / "features")
    put(store.entry(spec()), range(3))
    put(store.entry(spec()), range(3, 6))
    execute_prune(store, plan_prune(store))
    check(store.entry(spec()), range(6))
