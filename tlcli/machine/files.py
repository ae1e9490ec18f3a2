"""Files that are published whole or not at all, and the few other operations that state on disk needs.

A file is published so: unique temporary in the same folder, write, fsync, rename, fsync of the folder.
Nothing is ever changed in place, locked or mapped. Functions raise OSError; callers turn it into a
StorageError that says what they were doing with `storage_errors`.
"""

import errno
import hashlib
import math
import os
import platform
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tlcli.errors import StorageError
from tlcli.wording import size_text

STALE_SECONDS = 3600.0
"""Age after which a temporary whose writer cannot be asked is taken for abandoned."""

HOST = hashlib.sha256(platform.node().encode("utf-8", "surrogateescape")).hexdigest()[:8]
TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{32}")
OUTPUT_HINT = "Check the folder's permissions and the disk's space, or choose another name."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(
    action: str,
    path: Path | str,
    error: OSError,
    *,
    hint: str,
    full_hint: str | None = None,
    num_bytes: int = 0,
    kept: str | None = None,
) -> StorageError:
    """Return the StorageError that tells of an OSError: "Cannot <action> <path>: <reason>.".

    Args:
        action: What was tried, such as "write".
        path: What it was tried on.
        error: What the system answered.
        hint: What to do about it.
        full_hint: The same where the disk is full; None is `hint`.
        num_bytes: Bytes that were needed, named when the disk is full.
        kept: What is not lost, said when the disk is full, such as "finished rows are kept".
    """
    message = f"Cannot {action} {str(path)!r}: {error.strerror or error}."
    if error.errno not in FULL:
        return StorageError(message, hint=hint)
    needed = f"{size_text(num_bytes)} ({num_bytes} bytes) are needed" if num_bytes else None
    if told := "; ".join(part for part in (needed, kept) if part):
        message += f" {told[0].upper()}{told[1:]}."
    return StorageError(message, hint=full_hint or hint)


@contextmanager
def storage_errors(action: str, path: Path | str, *, hint: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError; see `storage_error`."""
    try:
        yield
    except OSError as error:
        raise storage_error(action, path, error, hint=hint) from error


def publish(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file durably, replacing a previous one; on any error no trace of it is left.

    A failed fsync is not tried again: the kernel may have dropped the pages and would report success. The
    mode follows the umask.
    """
    with _renamed_at_the_end(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                _write_all(fd, memoryview(chunk).cast("B"))
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a temporary path to be written by the block, and publish what it holds as `publish` does.

    For writers that want a path or write piece by piece. The mode follows the umask, whatever they set.
    """
    with _renamed_at_the_end(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        os.close(fd)
        yield temporary
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)  # the writer may have put another file there
        try:
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _renamed_at_the_end(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which it becomes at the end; on any error it is removed."""
    temporary = temporary_path(path.parent)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def temporary_path(folder: Path) -> Path:
    """Return an unused path in a folder that `stale_temporaries` finds once this process is gone."""
    return folder / f".tmp-{HOST}-{os.getpid()}-{uuid.uuid4().hex}"


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        written = os.write(fd, data)
        if written == 0:
            raise OSError(errno.EIO, "The disk takes no bytes")
        data = data[written:]


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where its file system can do that."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably; one that exists is fine."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename within the cache, durably."""
    os.replace(source, target)
    sync_folder(target.parent)
    with suppress(FileNotFoundError):  # somebody may have moved the source's folder meanwhile
        sync_folder(source.parent)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Give a descriptor for `read_at`, without following a link or waiting at a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, num_bytes: int, offset: int) -> bytes:
    """Return `num_bytes` bytes at `offset`, fewer only where the file ends."""
    data = os.pread(fd, num_bytes, offset)
    while 0 < len(data) < num_bytes:
        more = os.pread(fd, num_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def list_folder(path: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, by name; [] when it is missing or a link."""
    if path.is_symlink():
        return []
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def subfolders(path: Path) -> list[Path]:
    """Return the real folders in a folder, by name; links are left out."""
    return [Path(entry.path) for entry in list_folder(path) if entry.is_dir(follow_symlinks=False)]


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file or of all files under a folder, links not followed; 0 for what is gone."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(status.st_mode):
        return sum(tree_bytes(Path(entry.path)) for entry in list_folder(path))
    return status.st_size


def changed(path: Path) -> float:
    """Return when a file was changed, in seconds since 1970; infinity for one that is gone."""
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return math.inf


def stale_temporaries(folder: Path) -> list[Path]:
    """Return the temporaries in a folder that no writer will finish.

    One of this host is stale when its process is gone; any other when it has not changed for STALE_SECONDS,
    or has a time that far ahead, which a wrong clock gave it.
    Removing the temporary of a writer that lives after all costs it a second try, not a row.
    """
    stale = []
    for entry in list_folder(folder):
        match = TEMPORARY.fullmatch(entry.name)
        path = Path(entry.path)
        if match and (
            (match[1] == HOST and _is_dead(int(match[2]))) or abs(time.time() - changed(path)) > STALE_SECONDS
        ):
            stale.append(path)
    return stale


def _is_dead(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def touch(path: Path) -> None:
    """Set a file's time of change to now, making it when it does not exist."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666)
    try:
        os.utime(fd)
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds; what is gone already is fine."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for entry in list_folder(path):
                remove_tree(Path(entry.path))
            os.rmdir(path)
        else:
            os.unlink(path)
