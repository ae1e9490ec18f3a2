"""What the processes of test_concurrency.py do: `python actors.py ROLE SEED ROOT...`, one root after another.

A round is over when every writer has left its mark in the root's parent. Locks of any kind end the process.
"""

import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np

from tests.cache.cached import ENV, row_key, spec
from tlcli.cache.key import RowKey
from tlcli.cache.prune import GRACE_SECONDS, IN_USE_SECONDS, execute_prune, plan_prune
from tlcli.cache.store import Store
from tlcli.machine.files import TEMPORARY

ROWS = 60
SIZE = 4096  # floats in a row: 16 kB, so that a torn row would be seen
PARTS = {"writer-0": (0, 40), "writer-1": (20, 60), "writer-2": (20, 60)}
FACTS = spec(row_shape=[SIZE])
KEYS: list[RowKey] = [row_key(number) for number in range(ROWS)]
LOCKED = 97


def value(number: int) -> np.ndarray:
    return np.arange(SIZE, dtype=np.float32) + np.float32(number)


def write(root: Path, role: str) -> None:
    entry = Store(root).entry(FACTS)
    numbers = list(range(*PARTS[role]))
    random.shuffle(numbers)
    have = entry.rows()
    with entry.writer(ENV, flush_bytes=5 * 4 * SIZE) as writer:
        for number in numbers:
            if KEYS[number] not in have:
                writer.add(KEYS[number], value(number))
    (root.parent / f"{root.name}-{role}").touch()


def read(root: Path) -> int:
    """Every row that is given out is right; one that is not there is zeros and is named."""
    order = random.sample(range(ROWS), ROWS)
    rows, missing = Store(root).entry(FACTS).read([KEYS[number] for number in order])
    for place, number in enumerate(order):
        expected = np.zeros(SIZE, np.float32) if place in missing else value(number)
        assert np.array_equal(rows[place], expected), f"a wrong row {number}"
    return ROWS - len(missing)


def verify(root: Path) -> int:
    """Nothing is ever damaged, only absent."""
    entry = Store(root).entry(FACTS)
    assert entry.verify(deep=True) == []
    return len(entry.rows())


def prune(root: Path, turn: int) -> int:
    """Merge small shards and delete what was merged at once; in one turn take the entry itself away."""
    store = Store(root)
    if turn == 3:
        ahead = time.time() + IN_USE_SECONDS + 1
        plan = plan_prune(store, max_bytes=0, clock=lambda: ahead)
        execute_prune(store, plan, clock=lambda: ahead)
        return len(plan.retired)
    plan = plan_prune(store)
    execute_prune(store, plan, clock=lambda: time.time() - GRACE_SECONDS - 1)
    return len(plan.compacted) + len(plan.removed)


def refuse_locks(event: str, arguments: tuple) -> None:
    """End the process at what could be a lock: fcntl's, or a file made exclusively under a fixed name."""
    locked = event in {"fcntl.flock", "fcntl.lockf", "fcntl.fcntl", "os.lockf", "msvcrt.locking"}
    if event == "open" and isinstance(arguments[2], int):
        path, _, flags = arguments
        locked |= bool(flags & (getattr(os, "O_EXLOCK", 0) | getattr(os, "O_SHLOCK", 0)))
        name = os.path.basename(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        locked |= bool(flags & os.O_EXCL) and not TEMPORARY.fullmatch(name)
    if event in {"os.link", "os.symlink"}:
        locked = True
    if locked:
        os.write(2, f"a lock: {event} {arguments}\n".encode())
        os._exit(LOCKED)


def main() -> None:
    role, seed, *roots = sys.argv[1:]
    assert "torch" not in sys.modules
    random.seed(f"{role} {seed}")
    sys.addaudithook(refuse_locks)
    done = 0
    for text in roots:
        root = Path(text)
        if role in PARTS:
            write(root, role)
            continue
        turn = 0
        while True:
            over = all((root.parent / f"{root.name}-{writer}").exists() for writer in PARTS)
            done += (
                prune(root, turn) if role == "pruner" else {"reader": read, "verifier": verify}[role](root)
            )
            turn += 1
            if over and turn > 4:
                break
    print(re.sub(r"\D", "", role) or done)


if __name__ == "__main__":
    main()
