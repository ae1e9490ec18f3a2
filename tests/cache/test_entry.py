"""What was put is what is read, whatever happened to the files in between."""

import errno
import os
import shutil

import numpy as np
import pytest

from tests.cache.cached import DIM, ENV, check, put, quarantined, row, row_key, shard_paths, spec
from tlcli.cache import entry_files, index
from tlcli.cache.shard import environment_record
from tlcli.errors import BackboneError, StorageError
from tlcli.machine import files


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def damage_row(entry, number):
    """Change one byte of the stored row of `number`."""
    path = next(path for path in shard_paths(entry) if row(number).tobytes() in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(row(number).tobytes(), b"\0" * 4 * DIM))
    return path


# ---- put and get ------------------------------------------------------------------------------------------


def test_round_trip_through_another_process_view(entry, reopen):
    assert entry.rows() == set()
    put(entry, range(20))
    for view in (entry, reopen()):
        assert view.rows() == {row_key(number) for number in range(20)}
        check(view, [3, 19, 3, 0, 77, 5], missing=[77])
        check(view, [])


def test_views_are_rows_of_their_own(entry, reopen):
    with entry.writer(ENV) as writer:
        for view in (0, 1, 65_536):
            writer.add(row_key(1, view), row(view))
    rows, missing = reopen().read([row_key(1, 65_536), row_key(1, 2), row_key(1, 1), row_key(1)])
    assert missing == [1]
    np.testing.assert_array_equal(rows, [row(65_536), np.zeros(DIM), row(1), row(0)])


@pytest.mark.parametrize("row_shape", [[5], [2, 3, 4]])
def test_bf16_patterns_and_maps(store, row_shape):
    entry = store.entry(spec(row_dtype="bf16", row_shape=row_shape))
    pattern = np.arange(np.prod(row_shape), dtype=np.uint16).reshape(row_shape) + 0x3F80
    with entry.writer(ENV) as writer:
        writer.add(row_key(0), pattern)
    rows, missing = entry.read([row_key(0), row_key(1)])
    assert rows.dtype == np.uint16
    assert missing == [1]
    np.testing.assert_array_equal(rows[0], pattern)


def test_out_is_filled_in_place_and_checked(entry):
    put(entry, range(3))
    out = np.full((2, DIM), 7, np.float32)
    rows, missing = entry.read([row_key(2), row_key(9)], out)
    assert rows is out
    assert missing == [1]
    np.testing.assert_array_equal(out, [row(2), np.zeros(DIM)])
    for wrong in (out[:1], out.astype(np.float64), np.asfortranarray(out), out[:, :4]):
        with pytest.raises(ValueError, match="out is"):
            entry.read([row_key(2), row_key(9)], wrong)


def test_the_writer_copies(entry, reopen):
    buffer = row(0)
    with entry.writer(ENV) as writer:
        writer.add(row_key(0), buffer)
        buffer += 100
        writer.add(row_key(1), np.asarray(row(1))[::1])
    check(reopen(), [0, 1])


def test_a_row_added_twice_is_stored_once_and_publishing_twice_is_idempotent(entry, reopen):
    put(entry, [0, 1, 1, 0])
    put(reopen(), [0, 1])
    assert len(shard_paths(entry)) == 1
    put(entry, [1, 0])  # another order is another shard, and the same rows
    check(reopen(), [0, 1])
    assert len(reopen().rows()) == 2


def test_rows_of_other_writers_appear(entry, reopen):
    put(entry, [0])
    other = reopen()
    check(entry, [0, 1], missing=[1])
    put(other, [1])
    check(entry, [0, 1])
    assert entry.rows() == {row_key(0), row_key(1)}


def test_rows_of_environments_that_are_not_trusted_are_missing(entry, reopen):
    other = {**ENV, "torch": "1.0"}
    put(entry, [0, 1])
    put(entry, [1, 2], other)
    reader = reopen()
    reader.trust({environment_record(other)})
    check(reader, [0, 1, 2], missing=[0])
    put(entry, [3])
    check(reader, [1, 2, 3], missing=[3])
    reader.trust({environment_record(ENV)})
    check(reader, [0, 1, 2, 3], missing=[2])
    assert len(reader.shards()) == 3  # what is not trusted is neither damaged nor moved
    assert reader.damage == []


def test_wrong_rows_are_refused(entry):
    writer = entry.writer(ENV)
    for wrong in (np.zeros(DIM), np.zeros(DIM + 1, np.float32), np.zeros((1, DIM), np.float32)):
        with pytest.raises(ValueError, match="row is"):
            writer.add(row_key(0), wrong)
    with pytest.raises(ValueError, match="row key"):
        writer.add(("ab", 0), row(0))
    with pytest.raises(TypeError, match="float"):
        entry.writer({"version": 1.5})


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_that_are_not_finite_are_refused_by_name(store, value, dtype):
    entry = store.entry(spec(row_dtype=dtype))
    bad = row(0)
    bad[2] = value
    good = row(0)
    if dtype == "bf16":
        bad, good = ((array.view(np.uint32) >> 16).astype(np.uint16) for array in (bad, good))
    with (  # noqa: PT012
        pytest.raises(BackboneError, match=r"cat/1.jpg, view 3, are not finite \(1 of 8"),
        entry.writer(ENV) as writer,
    ):
        writer.add(row_key(0), good)
        writer.add(row_key(1, 3), bad, name="cat/1.jpg")
    assert entry.rows() == {row_key(0)}  # finished work is kept
    with pytest.raises(BackboneError, match=row_key(1)[0]):
        entry.writer(ENV).add(row_key(1), bad)


# ---- when rows are published ------------------------------------------------------------------------------


def test_flush_by_bytes_and_by_time(entry, reopen):
    clock = Clock()
    writer = entry.writer(ENV, flush_bytes=3 * 4 * DIM, flush_seconds=30, clock=clock)
    for number in range(3):
        assert reopen().rows() == set()
        writer.add(row_key(number), row(number))
    assert len(reopen().rows()) == 3  # full
    clock.now = 100
    writer.add(row_key(3), row(3))
    clock.now = 129
    writer.add(row_key(4), row(4))
    assert len(reopen().rows()) == 3
    clock.now = 130
    writer.add(row_key(5), row(5))
    check(reopen(), range(6))
    assert writer.rows_written == 6
    assert len(writer.published) == len(shard_paths(entry)) == 2
    writer.flush()
    assert writer.rows_written == 6


def test_one_row_larger_than_the_buffer(entry, reopen):
    with entry.writer(ENV, flush_bytes=1) as writer:
        writer.add(row_key(0), row(0))
        assert len(reopen().rows()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_work_is_kept(entry, reopen, error):
    with pytest.raises(error), entry.writer(ENV) as writer:  # noqa: PT012
        writer.add(row_key(0), row(0))
        raise error
    check(reopen(), [0])


@pytest.mark.parametrize("flush_bytes", [4 * DIM, 1 << 20])  # in the middle, and when the block ends
def test_ctrl_c_while_publishing_publishes_again(entry, reopen, monkeypatch, flush_bytes):
    fsync, calls = os.fsync, []

    def interrupt(fd):
        calls.append(fd)
        if len(calls) == 1:
            raise KeyboardInterrupt
        fsync(fd)

    put(entry, [5])
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt), entry.writer(ENV, flush_bytes=flush_bytes) as writer:
        writer.add(row_key(0), row(0))
    check(reopen(), [0, 5])
    assert len(list(entry.shards_dir.iterdir())) == 2


def test_a_full_disk_keeps_what_was_published(entry, reopen, monkeypatch, caplog):
    put(entry, [0])
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match=rf"No space left.*\({2 * 4 * DIM} bytes\) are needed") as error:
        put(entry, [1, 2])
    assert error.value.exit_code == 5
    monkeypatch.undo()
    assert not caplog.records  # the refused rows were not tried a second time
    assert [path.name for path in entry.shards_dir.iterdir()] == [shard_paths(entry)[0].name]
    check(reopen(), [0, 1, 2], missing=[1, 2])
    put(entry, [1, 2])
    check(reopen(), [0, 1, 2])


def test_rows_that_cannot_be_kept_after_an_interruption_are_told(entry, monkeypatch, caplog):
    with pytest.raises(KeyboardInterrupt), entry.writer(ENV) as writer:  # noqa: PT012
        writer.add(row_key(0), row(0))
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        raise KeyboardInterrupt
    assert "1 finished rows could not be kept" in caplog.text


def test_the_guard_refuses_rows(entry, reopen):
    def changed():
        raise BackboneError("weights changed")

    with pytest.raises(BackboneError, match="changed"), entry.writer(ENV, guard=changed) as writer:
        writer.add(row_key(0), row(0))
    assert reopen().rows() == set()
    calls = []
    with entry.writer(ENV, guard=lambda: calls.append(1), flush_bytes=4 * DIM) as writer:
        for number in range(3):
            writer.add(row_key(number), row(number))
    assert len(calls) == 3


def test_an_entry_pruned_under_the_writer_is_made_again(entry, store, reopen, monkeypatch):
    writer = entry.writer(ENV)
    writer.add(row_key(0), row(0))
    writer.flush()
    writer.add(row_key(1), row(1))
    shutil.rmtree(entry.directory)
    writer.flush()
    check(reopen(), [0, 1], missing=[0])
    replace = os.replace

    def vanish(source, target):
        if str(target).endswith(".safetensors"):
            monkeypatch.undo()
            shutil.rmtree(entry.directory)
        replace(source, target)

    monkeypatch.setattr(os, "replace", vanish)
    put(entry, [2])
    check(reopen(), [2])
    monkeypatch.setattr(os, "replace", failing(errno.ENOENT))
    with pytest.raises(StorageError, match="No such file"):
        put(entry, [3])


def test_abandoned_temporaries_are_removed_by_the_next_writer(entry):
    put(entry, [0])
    stale = [folder / f".tmp-00000000-1-{'0' * 32}" for folder in (entry.directory, entry.shards_dir)]
    for path in stale:
        path.write_bytes(b"x")
        os.utime(path, (0, 0))
    entry.writer(ENV)
    assert not any(path.exists() for path in stale)


def test_the_umask_holds(store):
    before = os.umask(0o027)
    try:
        entry = store.entry(spec())
        put(entry, [0])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in shard_paths(entry)} == {0o640}
    assert store.root.stat().st_mode & 0o777 == 0o750


# ---- damage -----------------------------------------------------------------------------------------------


def test_a_pruned_shard_is_missing(entry, reopen):
    put(entry, [0])
    put(entry, [1])
    reader = reopen()
    assert len(reader.rows()) == 2
    path = next(path for path in shard_paths(entry) if row(1).tobytes() in path.read_bytes())
    path.unlink()
    check(reader, [0, 1], missing=[1])
    assert reader.damage == []
    shutil.rmtree(entry.directory)
    check(reader, [0, 1], missing=[0, 1])
    assert not entry.directory.exists()


def test_a_shard_that_vanishes_between_listing_and_opening(entry, reopen, monkeypatch):
    put(entry, [0])
    monkeypatch.setattr(index, "open_shard", failing(errno.ENOENT))
    check(reopen(), [0], missing=[0])


def test_rows_that_moved_to_another_shard_are_found(entry, reopen):
    put(entry, [0, 1])
    reader = reopen()
    check(reader, [0])
    old = shard_paths(entry)
    put(entry, [1, 0, 2])
    old[0].unlink()
    check(reader, [0, 1, 2])


@pytest.mark.parametrize("errors", [1, 2])
def test_a_passing_read_error_loses_nothing(entry, reopen, monkeypatch, errors):
    put(entry, range(4))
    reader = reopen()
    reader.rows()
    pread, calls = os.pread, []

    def soon_better(fd, size, offset):
        calls.append(1)
        if len(calls) <= errors:
            raise OSError(errno.EIO, "bad sector")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", soon_better)
    check(reader, range(4))
    assert quarantined(entry) == []
    assert len(shard_paths(entry)) == 1


def test_an_unreadable_shard_is_quarantined(entry, reopen, monkeypatch):
    put(entry, range(4))
    reader = reopen()
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    check(reader, range(4), missing=range(4))
    monkeypatch.undo()
    assert len(quarantined(entry)) == 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_what_cannot_be_opened_is_an_error_and_not_damage(entry, reopen, monkeypatch, code):
    put(entry, [0])
    reader = reopen()
    monkeypatch.setattr(os, "open", failing(code))
    with pytest.raises(StorageError, match=os.strerror(code)):
        reader.rows()
    monkeypatch.undo()
    check(reader, [0])
    assert quarantined(entry) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_used_without_its_damaged_rows(
    entry, reopen, monkeypatch, caplog, code
):
    put(entry, range(3))
    put(entry, range(3, 6))
    put(entry, range(6, 9))
    damage_row(entry, 1)
    torn = next(path for path in shard_paths(entry) if row(4).tobytes() in path.read_bytes())
    torn.write_bytes(torn.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in entry.directory.rglob("*") if path.is_file()}
    os.utime(entry.directory / "last_used", (0, 0))
    refuse = failing(code)
    opening = os.open
    monkeypatch.setattr(os, "open", lambda p, f, *m: refuse() if f & os.O_CREAT else opening(p, f, *m))
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    reader = reopen()
    for _ in range(2):
        check(reader, range(9), missing=[1, 3, 4, 5])
    assert reader.rows() == {row_key(number) for number in (0, 2, 6, 7, 8)}
    assert "left in place" in caplog.text
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in entry.directory.rglob("*") if path.is_file()} == before
    check(reopen(), range(9), missing=[1, 3, 4, 5])
    assert len(quarantined(entry)) == 2


def test_two_processes_healing_the_same_shard(entry, reopen, monkeypatch):
    put(entry, range(3))
    damage_row(entry, 1)
    first, second = reopen(), reopen()
    first.rows(), second.rows()
    check(first, range(3), missing=[1])
    check(second, range(3), missing=[1])  # its shard is gone: the healed one is found
    put(entry, [5])
    torn = shard_paths(entry)[0]
    torn.write_bytes(b"")
    third = reopen()
    monkeypatch.setattr(files, "move", failing(errno.ENOENT))  # somebody else moves it first
    third.rows()
    assert len(third.damage) == 1


def test_a_shard_that_vanishes_while_it_is_healed(entry, reopen, monkeypatch):
    put(entry, range(3))
    path = damage_row(entry, 1)
    reader = reopen()
    reader.rows()
    opened, calls = files.opened, []

    def then_gone(target):
        calls.append(target)
        if len(calls) == 2:
            path.unlink()
        return opened(target)

    monkeypatch.setattr("tlcli.cache.shard.opened", then_gone)
    check(reader, range(3), missing=[1])  # the others were read before it went


# ---- verify -----------------------------------------------------------------------------------------------


def test_verify_meets_errors_and_vanishing_shards(entry, reopen, monkeypatch):
    put(entry, range(3))
    put(entry, range(3, 6))
    verifier = reopen()
    verifier.rows()
    shard_paths(entry)[0].unlink()
    scan = verifier._scan
    monkeypatch.setattr(verifier, "_scan", lambda: True)
    assert verifier.verify() == []
    monkeypatch.setattr(verifier, "_scan", scan)
    read, calls = os.pread, []

    def late(fd, size, offset):
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError(errno.EIO, "bad sector")
        return read(fd, size, offset)

    verifier.rows()
    monkeypatch.setattr(os, "pread", late)
    assert verifier.verify(deep=True) == []  # the error passed: the shard was read again whole
    assert quarantined(entry) == []


def test_looking_changes_nothing(entry, store):
    put(entry, range(3))
    put(entry, range(3, 6))
    damage_row(entry, 1)
    torn = next(path for path in shard_paths(entry) if row(4).tobytes() in path.read_bytes())
    torn.write_bytes(b"")
    os.utime(entry.directory / "last_used", (5, 5))
    before = sorted(entry.directory.rglob("*"))
    looker = store.find(entry.key)
    check(looker, range(6), missing=[1, 3, 4, 5])
    assert {item.shard for item in looker.damage} == {path.name for path in shard_paths(entry)}
    assert sorted(entry.directory.rglob("*")) == before
    assert entry_files.last_used(entry.directory) == 5


# ---- last use ---------------------------------------------------------------------------------------------


def test_the_mark_of_last_use(entry, reopen):
    assert entry_files.last_used(entry.directory) == 0
    check(entry, [0], missing=[0])
    assert not entry.directory.exists()  # reading makes nothing
    put(entry, [0])
    mark = entry.directory / "last_used"
    now = mark.stat().st_mtime
    os.utime(mark, (now - 100, now - 100))
    reopen().read([row_key(0)])
    assert mark.stat().st_mtime == pytest.approx(now - 100)  # recent enough
    for wrong in (now - 1000, now + 1000):  # old, or from a clock that went back
        os.utime(mark, (wrong, wrong))
        reopen().read([row_key(0)])
        assert mark.stat().st_mtime == pytest.approx(now, abs=60)
    mark.unlink()
    assert entry_files.last_used(entry.directory) == pytest.approx(now, abs=60)
