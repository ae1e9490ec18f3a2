"""Files are published whole or not at all, and nothing outside is touched."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tlcli.cache.errors import cache_error, cache_errors
from tlcli.errors import StorageError
from tlcli.machine import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(code, calls=None):
    def fail(*args, **kwargs):
        if calls is not None:
            calls.append(args)
        raise OSError(code, os.strerror(code))

    return fail


def test_publish_replaces_and_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for text in (b"old", b"new"):
            files.publish(tmp_path / "file", [text[:1], memoryview(text)[1:]])
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["file"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    files.publish(tmp_path / "file", [b"0123456789"])
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_disk_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match="takes no bytes"):
        files.publish(tmp_path / "file", [b"x"])
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "close"])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, call):
    files.publish(tmp_path / "file", [b"old"])
    calls = []
    monkeypatch.setattr(os, call, failing(errno.EIO, calls))
    with pytest.raises(OSError, match="Input/output"):
        files.publish(tmp_path / "file", [b"new"])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    assert len(calls) == 1  # a failed fsync is never tried again


def test_folders_that_cannot_be_synced_are_fine_only_when_their_system_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folder(tmp_path)


def test_make_folder(tmp_path, monkeypatch):
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        files.make_folder(tmp_path / "file")
    mkdir = os.mkdir

    def race(path):
        mkdir(path)
        mkdir(path)

    monkeypatch.setattr(os, "mkdir", race)
    files.make_folder(tmp_path / "raced")
    assert (tmp_path / "raced").is_dir()


def test_short_reads_are_continued_until_the_file_ends(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"0123456789")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    with files.opened(tmp_path / "file") as fd:
        assert files.read_at(fd, 8, 1) == b"12345678"
        assert files.read_at(fd, 99, 1) == b"123456789"
        assert files.read_at(fd, 5, 10) == b""


def test_links_are_never_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"12345")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "file").symlink_to(outside / "precious")
    assert files.list_folder(inside / "link") == []
    assert files.subfolders(inside) == []
    assert files.tree_bytes(inside) < 5 + 4096
    with pytest.raises(OSError, match="symbolic"), files.opened(inside / "file"):
        pass
    with pytest.raises(OSError, match="symbolic"):
        files.touch(inside / "file")
    files.remove_tree(inside)
    assert not inside.exists()
    assert names(outside) == ["precious"]


def test_what_is_gone_is_fine(tmp_path):
    gone = tmp_path / "gone"
    assert files.list_folder(gone) == []
    assert files.tree_bytes(gone) == 0
    assert files.changed(gone) == float("inf")
    files.remove_tree(gone)


def test_move_within_a_folder_that_vanishes(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x")
    replace = os.replace

    def then_gone(source, target):
        replace(source, target)
        os.rmdir(tmp_path / "a")

    monkeypatch.setattr(os, "replace", then_gone)
    files.move(tmp_path / "a" / "file", tmp_path / "b" / "file")
    assert names(tmp_path / "b") == ["file"]


def temporary(folder: Path, host: str, process_id: int, age: float = 0.0) -> Path:
    path = folder / f".tmp-{host}-{process_id}-{'0' * 32}"
    path.write_bytes(b"")
    if age:
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_only_temporaries_without_a_writer_are_stale(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = {
        temporary(tmp_path, files.HOST, dead.pid),
        temporary(tmp_path, "00000000", os.getpid(), age=2 * files.STALE_SECONDS),
        temporary(tmp_path, files.HOST, os.getpid(), age=2 * files.STALE_SECONDS),
    }
    temporary(tmp_path, "11111111", dead.pid)
    temporary(tmp_path, "22222222", os.getpid())
    temporary(tmp_path, files.HOST, os.getppid())
    (tmp_path / ".tmp-of-somebody-else").write_bytes(b"")
    assert set(files.stale_temporaries(tmp_path)) == stale


def test_a_process_of_another_user_is_alive(monkeypatch):
    monkeypatch.setattr(os, "kill", failing(errno.EPERM))
    assert not files._is_dead(1)


def test_errors_name_path_reason_and_bytes(tmp_path):
    full, denied = (OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EACCES))
    with pytest.raises(StorageError) as error, cache_errors("write", tmp_path, 2_000_000):
        raise full
    assert error.value.__cause__ is full
    for part in ("Cannot write", str(tmp_path), "No space left", "2.0 MB (2000000 bytes) are needed"):
        assert part in error.value.message
    assert "prune" in str(error.value.hint)
    error = cache_error("read", tmp_path, denied)
    assert error.message == f"Cannot read {str(tmp_path)!r}: Permission denied."
    assert "TLCLI_HOME" in str(error.hint)


def test_a_file_that_others_write_is_published_whole(tmp_path, monkeypatch):
    """Writers that replace what they are given, or set a mode of their own, change nothing."""
    before = os.umask(0o027)
    try:
        with files.published(tmp_path / "a") as temporary:
            assert temporary.parent == tmp_path
            temporary.unlink()
            temporary.write_bytes(b"new")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    with pytest.raises(ZeroDivisionError), files.published(tmp_path / "a") as temporary:
        temporary.write_bytes(b"%d" % (1 // 0))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="error"), files.published(tmp_path / "a") as temporary:
        temporary.write_bytes(b"lost")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_full_disk_needs_and_keeps_is_said(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for num_bytes, kept, end in (
        (0, None, "device."),
        (0, "all is kept", "device. All is kept."),
        (2_000_000, None, "device. 2.0 MB (2000000 bytes) are needed."),
        (2_000_000, "all is kept", "device. 2.0 MB (2000000 bytes) are needed; all is kept."),
    ):
        error = files.storage_error("write", tmp_path, full, hint="h", num_bytes=num_bytes, kept=kept)
        assert error.message.endswith(end)
        assert error.hint == "h"
