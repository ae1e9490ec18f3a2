"""The same cases by strace, which disturbs true system calls, also those that no function of `os` makes."""

import itertools
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.cases import Finding, Ground
from tests.faults.child import Outcome, Work, finish_child, start_child
from tests.faults.injection import Fault

# By architecture a call has one of these names; what begins with ? may be missing.
SYSCALLS = {
    "open": "openat",
    "read": "pread64,read",
    "write": "write",
    "fsync": "fsync",
    "close": "close",
    "rename": "?rename,?renameat,?renameat2",
    "unlink": "?unlink,?unlinkat",
    "mkdir": "?mkdir,?mkdirat",
    "rmdir": "?rmdir",
    "scandir": "getdents64",
    "stat": "?newfstatat,?fstat,?stat,?lstat,?statx",
    "utime": "utimensat",
}
EFFECTS = {
    "open": "KILL EIO EMFILE",
    "read": "KILL EIO EINTR",
    "write": "KILL EIO ENOSPC EDQUOT EINTR",
    "fsync": "KILL EIO ENOSPC",
    "close": "KILL EIO",
    "rename": "KILL EIO ENOSPC",
    "unlink": "KILL EIO",
    "mkdir": "KILL ENOSPC",
    "rmdir": "KILL EIO",
    "scandir": "KILL EIO",
    "stat": "KILL EIO",
    "utime": "KILL EIO",
}


def available() -> bool:
    """Return whether strace is installed and may attach to a process of ours."""
    if shutil.which("strace") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            disturb(lambda folder, teller: None, Path(folder), Fault("fsync", 1, "EIO"))
        except RuntimeError:
            return False
    return True


def disturb(work: Work, folder: Path, fault: Fault) -> Outcome:
    """Run a piece of work in a child whose system calls strace disturbs.

    Raises:
        RuntimeError: strace cannot attach.
    """
    log = folder.with_name(f"{folder.name}.strace")
    wait, go = os.pipe()
    # Not by a read, which would be the first to be disturbed.
    process_id, channel = start_child(work, folder, None, ready=lambda: select.select([wait], [], []))
    names = SYSCALLS[fault.call]
    what = "signal=KILL" if fault.effect == "KILL" else f"error={fault.effect}"
    tracer = subprocess.Popen(
        ["strace", "-p", str(process_id), "-o", str(log), "-e", f"trace={names}",
         "-e", f"inject={names}:{what}:when={fault.nth}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr
    said = ""
    while "attached" not in said and (line := tracer.stderr.readline()):
        said += line
    os.write(go, b"x")
    outcome = finish_child(process_id, channel)
    os.close(wait)
    os.close(go)
    tracer.stderr.close()
    tracer.wait()
    if "attached" not in said:
        raise RuntimeError(f"strace cannot attach: {said}")
    text = log.read_text(errors="replace") if log.exists() else ""
    outcome.fired = outcome.ended == "killed" if fault.fatal else "(INJECTED)" in text
    return outcome


def run_all(ground: Ground, call: str, effect: str, work: Path) -> Iterator[Finding]:
    """Disturb every call of a kind, until it no longer happens."""
    for nth in itertools.count(1):
        finding = ground.case(work, Fault(call, nth, effect), disturb)
        if finding is None:
            return
        yield finding
