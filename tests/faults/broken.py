"""Break the product on purpose, and print how many violations the sweep's cases find each time.

python tests/faults/broken.py
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.faults.cases import SCENARIOS, Ground, memory
from tests.faults.injection import Fault
from tlcli.cache import entry, shard
from tlcli.cache.shard import write_shard
from tlcli.machine import files
from tlcli.runs.directory import RunDirectory

Patch = Callable[[], AbstractContextManager[Any]]


def in_place(path: Path, chunks: Any) -> None:
    """Publish without a temporary."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for chunk in chunks:
        os.write(fd, chunk)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def published_in_place() -> Iterator[None]:
    with mock.patch.object(files, "publish", in_place), mock.patch.object(shard, "publish", in_place):
        yield


def rows_of_other_keys() -> AbstractContextManager[Any]:
    real = write_shard

    def wrong(folder: Path, key: str, row_format: Any, env: str, keys: Any, rows: Any) -> str:
        return real(folder, key, row_format, env, np.roll(keys, 1, axis=0), rows)

    return mock.patch.object(entry, "write_shard", wrong)


def shards_rewritten() -> AbstractContextManager[Any]:
    """Publish by taking all other shards away for a moment."""
    real = write_shard

    def slow(folder: Path, *rest: Any) -> str:
        others = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        for path in others:
            path.unlink()
        name = real(folder, *rest)
        for path, content in others.items():
            files.publish(path, [content])
        return name

    return mock.patch.object(entry, "write_shard", slow)


def temporaries_left() -> AbstractContextManager[Any]:
    return mock.patch.object(files, "stale_temporaries", return_value=[])


def errors_escape() -> AbstractContextManager[Any]:
    return mock.patch.object(entry, "cache_errors", side_effect=lambda *args: contextlib.nullcontext())


def no_second_read() -> AbstractContextManager[Any]:
    """Take the first error of a disk for damage."""

    def hasty(fd: int, num_bytes: int, offset: int) -> bytes:
        try:
            return files.read_at(fd, num_bytes, offset)
        except OSError as error:
            raise shard.DamagedShard("it cannot be read") from error

    return mock.patch.object(shard, "_read", hasty)


def old_run_removed_first() -> AbstractContextManager[Any]:
    real = RunDirectory._begin

    def eager(self: RunDirectory) -> None:
        shutil.rmtree(self.path)
        real(self)

    return mock.patch.object(RunDirectory, "_begin", eager)


def old_run_forgotten() -> AbstractContextManager[Any]:
    return mock.patch.object(RunDirectory, "_remove_kept", return_value=None)


BREAKS: dict[str, tuple[Patch, str, Fault]] = {
    "shards published in place": (published_in_place, "put", Fault("write", 6, "TORN")),
    "run published in place": (published_in_place, "run", Fault("write", 7, "TORN")),
    "rows of other keys": (rows_of_other_keys, "put", Fault("stat", 1, "EIO")),
    "shards rewritten": (shards_rewritten, "put", Fault("write", 9, "KILL")),
    "temporaries left": (temporaries_left, "put", Fault("write", 6, "TORN")),
    "errors escape": (errors_escape, "resume", Fault("fsync", 5, "ENOSPC")),
    "no second read": (no_second_read, "resume", Fault("read", 3, "EIO")),
    "old run removed first": (old_run_removed_first, "overwrite", Fault("mkdir", 1, "KILL")),
    "old run forgotten": (old_run_forgotten, "overwrite", Fault("write", 5, "EIO")),
}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory(prefix="tlcli-broken-", dir=memory()) as folder:
        wanted = {scenario for _, scenario, _ in BREAKS.values()}
        grounds = {s.name: Ground(s, Path(folder, s.name)) for s in SCENARIOS if s.name in wanted}
        for name, (patch, scenario, fault) in BREAKS.items():
            ground = grounds[scenario]
            whole = ground.case(Path(folder, "whole"), fault)
            with patch():
                broken = ground.case(Path(folder, "broken"), fault)
            found[name] = {"whole": whole and whole.problems, "broken": broken and broken.problems}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
