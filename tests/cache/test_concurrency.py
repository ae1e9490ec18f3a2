"""Several processes on one entry: equal results, nothing torn, nothing locked, nobody waits for ever."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cache.actors import FACTS, KEYS, LOCKED, PARTS, ROWS, value
from tests.cache.cached import ENV, put, shard_paths, spec
from tlcli.cache.store import Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROLES = (*PARTS, "reader", "verifier", "pruner")
PATIENCE = 120.0  # seconds until a process counts as stuck; a round takes a fraction of one
NOBODY = 65534


def start(*words: object, before: tuple[str, ...] = (), **options: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(processes: dict[str, subprocess.Popen]) -> dict[str, str]:
    """Return what each printed; a process that fails or does not end is a failure of the test."""
    deadline = time.monotonic() + PATIENCE
    printed = {}
    try:
        for role, process in processes.items():
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            assert process.returncode == 0, f"{role} ended with {process.returncode}:\n{err}"
            printed[role] = out.strip()
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return printed


def rounds(folder: Path, count: int, seed: int, before: tuple[str, ...] = ()) -> dict[str, str]:
    """Let every role work in `count` roots, then run the work again and check what is there."""
    roots = [folder / f"round-{number}" for number in range(count)]
    script = HERE / "actors.py"
    printed = finish({role: start(script, role, seed, *roots, before=before) for role in ROLES})
    for root in roots:
        entry = Store(root).entry(FACTS)
        have = entry.rows()
        with entry.writer(ENV) as writer:
            for number in range(ROWS):
                if KEYS[number] not in have:
                    writer.add(KEYS[number], value(number))
        rows, missing = Store(root).entry(FACTS).read(KEYS)
        assert missing == []
        np.testing.assert_array_equal(rows, [value(number) for number in range(ROWS)])
        assert Store(root).entry(FACTS).verify(deep=True) == []
        assert not entry.quarantine_dir.exists()
        assert not list(root.rglob(".tmp-*"))
    return printed


def test_writers_a_reader_a_verifier_and_a_pruner(tmp_path):
    printed = rounds(tmp_path, 5, seed=0)
    assert int(printed["reader"]) > 0
    assert int(printed["pruner"]) > 0  # it did merge or take away something


@pytest.mark.slow
def test_many_rounds(tmp_path):
    seconds, begun, count = 150, time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        rounds(tmp_path / str(count), 20, seed=count + 1)
        shutil.rmtree(tmp_path / str(count))
        count += 1
    print(f"{20 * count} rounds of {len(ROLES)} processes in {time.monotonic() - begun:.0f} s")


# ---- no locks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import fcntl; fcntl.flock(1, fcntl.LOCK_SH)",
        "import fcntl; fcntl.lockf(1, fcntl.LOCK_EX)",
        "import fcntl; fcntl.fcntl(1, fcntl.F_GETFD)",
        "os.lockf(1, os.F_TEST, 0)",
        "os.close(os.open('x.lock', os.O_CREAT | os.O_EXCL | os.O_WRONLY))",
        "os.link('x', 'x.lock')",
    ],
)
def test_a_lock_would_be_seen(tmp_path, statement):
    code = (
        f"import os, sys; from tests.cache import actors; sys.addaudithook(actors.refuse_locks); {statement}"
    )
    process = start("-c", code, cwd=tmp_path)
    assert "a lock" in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == LOCKED


def test_no_module_of_the_cache_knows_a_lock():
    words = {
        "fcntl",
        "flock",
        "lockf",
        "LOCK_EX",
        "LOCK_SH",
        "O_EXLOCK",
        "O_SHLOCK",
        "filelock",
        "portalocker",
    }
    for path in sorted((ROOT / "tlcli" / "cache").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
        imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                   for alias in node.names}  # fmt: skip
        assert not words & (names | imports), path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_system_sees_no_lock(tmp_path):
    """What the audit hook cannot see, such as a library's own calls, the kernel does."""
    log = tmp_path / "calls"
    rounds(
        tmp_path,
        2,
        seed=7,
        before=("strace", "-f", "-qq", "-e", "trace=flock,fcntl,openat", "-o", str(log), "-A"),
    )
    text = log.read_text()
    assert "openat" in text
    assert not re.findall(r"flock\(|F_SETLK|F_SETLKW|F_OFD_SETLK|F_SETLEASE", text)


# ---- a cache that may only be read -----------------------------------------------------------------------

READ_ONLY = """
import os, sys
from pathlib import Path
import numpy.testing  # while Python's own files can be read
from tests.cache.cached import check, put, spec
from tlcli.cache.store import Store
from tlcli.errors import StorageError

root, user = Path(sys.argv[1]), int(sys.argv[2])
if user:  # root may write anywhere
    os.setgid(user)
    os.setuid(user)
try:
    (root / "probe").touch()
except OSError:
    pass
else:
    raise SystemExit("the cache can be written")
entry = Store(root).entry(spec())
check(entry, range(6))
damaged = Store(root).entry(spec(cut="damaged"))
check(damaged, range(6), missing=[2])
assert damaged.damage
assert len(Store(root).entries()) == 2
for refused in (Store(root).check_writable, lambda: put(entry, [7])):
    try:
        refused()
    except StorageError as error:
        print(error.message)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder that another user may enter; pytest's own are ours alone."""
    folder = Path(tempfile.mkdtemp(prefix="tlcli-test-"))
    folder.chmod(0o755)
    yield folder / "features"
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def snapshot(root: Path) -> dict[str, tuple]:
    """Return all that a write would change."""
    found = {}
    for path in sorted((root, *root.rglob("*"))):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, data)
    return found


def test_a_read_only_cache_is_used_and_left_as_it_is(shared):
    store = Store(shared)
    put(store.entry(spec()), range(6))
    damaged = store.entry(spec(cut="damaged"))
    put(damaged, range(6))
    (path,) = shard_paths(damaged)
    content = path.read_bytes()
    place = content.index(np.arange(2, 10, dtype=np.float32).tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    for entry in (store.entry(spec()), damaged):
        os.utime(entry.directory / "last_used", (1, 1))  # so old that use would renew it
    for each in (shared, *shared.rglob("*")):
        each.chmod(0o555 if each.is_dir() else 0o444)
    before = snapshot(shared)
    process = start("-c", READ_ONLY, shared, 0 if os.geteuid() else NOBODY)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "Cannot write in the cache folder" in out
    assert "Cannot write features to" in out
    assert snapshot(shared) == before


# ---- umask -----------------------------------------------------------------------------------------------

MASKED = """
import os, sys
from tests.cache.cached import put, spec
from tlcli.cache.prune import execute_prune, plan_prune
from tlcli.cache.store import Store

os.umask(int(sys.argv[2], 8))
store = Store(sys.argv[1])
entry = store.entry(spec())
put(entry, range(3))
put(entry, range(3, 6))
put(store.entry(spec(cut="damaged")), [0])
path = next(store.entry(spec(cut="damaged")).shards_dir.iterdir())
path.write_bytes(path.read_bytes()[:-1])
store.entry(spec(cut="damaged")).rows()
execute_prune(store, plan_prune(store))
"""


@pytest.mark.parametrize(("umask", "folder", "file"), [("077", 0o700, 0o600), ("002", 0o775, 0o664)])
def test_the_umask_is_honoured(tmp_path, umask, folder, file):
    """A cache shared by a group can be read and written by it; a private one by nobody else."""
    root = tmp_path / "features"
    process = start("-c", MASKED, root, umask)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    process.communicate()
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    names = {path.name for path in found}
    assert {"CACHEDIR.TAG", "spec.json", "last_used", "shards", "quarantine", "trash"} <= names
    assert {mode for path, mode in found.items() if path.is_dir()} == {folder}
    assert {mode for path, mode in found.items() if path.is_file()} == {file}
