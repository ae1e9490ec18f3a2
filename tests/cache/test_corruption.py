"""Damaged files: each damage is found, set aside with its reason, and costs its own rows alone.

`Layout` names the regions of a shard as docs/cache-format.md does. A damage changes the bytes of one of two
shards; the other one and the rows that stayed intact must go on being used.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.cached import (
    DIM,
    ENV,
    check,
    intact_rows,
    put,
    quarantined,
    reason_of,
    row,
    row_key,
    shard_paths,
    spec,
)
from tlcli.cache.entry import Entry
from tlcli.cache.entry_files import last_used
from tlcli.cache.prune import IN_USE_SECONDS, QUARANTINE_SECONDS, execute_prune, plan_prune
from tlcli.cache.shard import DamagedShard, open_shard
from tlcli.cache.store import Store
from tlcli.errors import StorageError
from tlcli.machine import files

ROW_BYTES = 4 * DIM
DAMAGED = range(6)  # rows of the shard that is damaged
OTHERS = range(6, 9)
CHECKSUMS = "rows do not match their checksums"
HEADER = "its header is not"
NAME = "its bytes do not hash to its name"


@dataclass(frozen=True)
class Layout:
    """Where the regions of a shard begin."""

    raw: bytes

    @property
    def count(self) -> int:
        return (len(self.raw) - self.header) // (44 + ROW_BYTES)

    @property
    def header(self) -> int:
        """Return where the header ends and the checksums begin."""
        return 8 + int.from_bytes(self.raw[:8], "little")

    @property
    def regions(self) -> dict[str, slice]:
        edges = [0, 8, self.header]
        for size in (8, 32, 4, ROW_BYTES):
            edges.append(edges[-1] + size * self.count)
        names = ("length", "json", "checksum", "image_sha256", "view", "rows")
        return {name: slice(*edges[place : place + 2]) for place, name in enumerate(names)}

    def item(self, region: str, number: int) -> slice:
        """Return where the part of one row is in a table."""
        whole = self.regions[region]
        size = (whole.stop - whole.start) // self.count
        return slice(whole.start + number * size, whole.start + (number + 1) * size)


def filled(places: slice, value: int = 0):
    return lambda raw: (
        raw[: places.start] + bytes([value]) * (places.stop - places.start) + raw[places.stop :]
    )


def region_filled(name: str, value: int = 0):
    return lambda raw: filled(Layout(raw).regions[name], value)(raw)


def item_filled(name: str, number: int):
    return lambda raw: filled(Layout(raw).item(name, number))(raw)


def swapped(*names: str):
    """Exchange the parts of rows 1 and 4 in some tables."""

    def change(raw):
        new, layout = bytearray(raw), Layout(raw)
        for name in names:
            one, four = layout.item(name, 1), layout.item(name, 4)
            new[one], new[four] = raw[four], raw[one]
        return bytes(new)

    return change


def header_edited(old: str, new: str):
    """Change the header as text, keeping it well-formed, padded and of the right length."""

    def change(raw):
        layout = Layout(raw)
        text = raw[8 : layout.header].decode().rstrip(" ")
        assert old in text
        text = text.replace(old, new)
        text += " " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text.encode() + raw[layout.header :]

    return change


ALL = tuple(DAMAGED)
# Rows under keys that nobody asks for: they are missing, and what remains of them is found by `verify`.
UNSEEN = {
    "zeroed keys",
    "keys of ones",
    "views of ones",
    "everything zeroed but the header",
    "one key zeroed",
}
# name -> what is done, the rows it costs, why it was set aside; None where only --deep can see it
DAMAGES = {
    "emptied": (lambda raw: b"", ALL, "it ends at byte 0"),
    "cut in the length": (lambda raw: raw[:5], ALL, "it ends at byte 5, before byte 8"),
    "cut in the header": (lambda raw: raw[:100], ALL, "it ends at byte 100"),
    "cut after the header": (lambda raw: raw[: Layout(raw).header], ALL, "bytes instead of"),
    "cut in the tables": (lambda raw: raw[: Layout(raw).regions["view"].start], ALL, "bytes instead of"),
    "cut after a row": (lambda raw: raw[:-ROW_BYTES], ALL, "bytes instead of"),
    "cut by a byte": (lambda raw: raw[:-1], ALL, "bytes instead of"),
    "longer by a byte": (lambda raw: raw + b"\0", ALL, "bytes instead of"),
    "twice in one file": (lambda raw: raw + raw, ALL, "bytes instead of"),
    "garbage": (lambda raw: b"garbage", ALL, "it ends at byte 7"),
    "an image": (lambda raw: b"\x89PNG\r\n\x1a\n" + raw[8:], ALL, "its header claims"),
    "zeros of the same size": (lambda raw: bytes(len(raw)), ALL, HEADER),
    "zeroed header": (region_filled("json"), ALL, HEADER),
    "zeroed checksums": (region_filled("checksum"), ALL, CHECKSUMS),
    "zeroed keys": (region_filled("image_sha256"), ALL, CHECKSUMS),
    "keys of ones": (region_filled("image_sha256", 255), ALL, CHECKSUMS),
    "views of ones": (region_filled("view", 255), ALL, CHECKSUMS),
    "zeroed rows": (region_filled("rows"), ALL, CHECKSUMS),
    "everything zeroed but the header": (
        lambda raw: raw[: Layout(raw).header] + bytes(len(raw) - Layout(raw).header), ALL, CHECKSUMS),
    "one row zeroed": (item_filled("rows", 3), (3,), CHECKSUMS),
    "one checksum zeroed": (item_filled("checksum", 0), (0,), CHECKSUMS),
    "one key zeroed": (item_filled("image_sha256", 5), (5,), CHECKSUMS),
    "the end zeroed": (
        lambda raw: raw[: -2 * ROW_BYTES - 1] + bytes(2 * ROW_BYTES + 1), (3, 4, 5), CHECKSUMS),
    "rows swapped": (swapped("rows"), (1, 4), CHECKSUMS),
    "rows swapped with checksums": (swapped("rows", "checksum"), (1, 4), CHECKSUMS),
    "rows swapped with keys": (swapped("rows", "image_sha256"), (1, 4), CHECKSUMS),
    "keys swapped": (swapped("image_sha256"), (1, 4), CHECKSUMS),
    "checksums swapped": (swapped("checksum"), (1, 4), CHECKSUMS),
    "checksums swapped with keys": (swapped("checksum", "image_sha256"), (1, 4), CHECKSUMS),
    "all of two rows swapped": (swapped("rows", "image_sha256", "checksum"), (), None),
    "another environment": (header_edited("2.10.0", "2.11.0"), (), None),
    "a broken environment record": (header_edited(r"torch\":\"", r"torch\";\""), ALL, HEADER),
    "an environment record that is a list": (
        header_edited(r'"env":"{\"device\":\"cpu\",\"torch\":\"2.10.0\"}"', '"env":"[]"'), ALL, HEADER),
    "an environment record with spaces": (header_edited(r"cpu\",", r"cpu\", "), ALL, HEADER),
    "a newer format": (header_edited("tlcli.shard/1", "tlcli.shard/2"), ALL, HEADER),
    "another entry": (lambda raw: header_edited(json.loads(raw[8 : Layout(raw).header])["__metadata__"]
                                                ["entry_key"], "cd" * 32)(raw), ALL, "another entry, 'cdcd"),
    "more rows claimed": (header_edited("[6,8]", "[7,8]"), ALL, HEADER),
    "fewer rows claimed": (header_edited("[6,8]", "[5,8]"), ALL, HEADER),
    "very many rows claimed": (header_edited("[6,8]", "[900000000000,8]"), ALL, HEADER),
    "a number of rows that cannot be printed": (header_edited("[6,8]", f"[{'9' * 4299},8]"), ALL, HEADER),
    "a long header claimed": (lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:], ALL, "claims 46116860"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def without_waiting_for_the_disk():
    """Nothing here depends on it, and half the time is spent there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def two_shards(entry: Entry) -> tuple[Path, Path]:
    """Fill an entry and return the shard that will be damaged and the other one."""
    put(entry, DAMAGED)
    put(entry, OTHERS)
    first, second = shard_paths(entry)
    return (first, second) if row(0).tobytes() in first.read_bytes() else (second, first)


@pytest.mark.parametrize("found_by", ["reading", "verify", "deep"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_its_rows_alone(entry, reopen, damage, found_by):
    change, lost, reason = DAMAGES[damage]
    path, other = two_shards(entry)
    untouched = (other.read_bytes(), other.stat().st_mtime_ns, other.stat().st_ino)
    path.write_bytes(change(path.read_bytes()))
    damaged = path.read_bytes()
    reader = reopen()
    if found_by != "reading":
        reader.verify(deep=found_by == "deep")
    check(reader, [*DAMAGED, *OTHERS], missing=lost)
    if found_by == "deep":
        reason = reason or NAME
    if reason is None or (found_by == "reading" and damage in UNSEEN):
        assert not quarantined(entry)
        assert reader.damage == []
    else:
        assert [(item.name, item.read_bytes()) for item in quarantined(entry)] == [(path.name, damaged)]
        assert reason in reason_of(entry, path.name)
        (found,) = reader.damage
        assert (found.shard, found.reason) == (path.name, reason_of(entry, path.name).strip())
        assert found.rows_lost in (None, len(lost))
        assert not path.exists()
    assert (other.read_bytes(), other.stat().st_mtime_ns, other.stat().st_ino) == untouched
    put(reader, lost)
    check(reopen(), [*DAMAGED, *OTHERS])
    reopen().verify(deep=True)
    assert reopen().verify(deep=True) == []
    check(reopen(), [*DAMAGED, *OTHERS])


def overwrite(path: Path, place: int, byte: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, bytes([byte]), place)
    finally:
        os.close(fd)


def test_no_flipped_bit_of_a_shard_goes_unnoticed(entry):
    """Every bit of the file, one at a time: its rows are refused, or are those that were put."""
    put(entry, range(3))
    (path,) = shard_paths(entry)
    raw = path.read_bytes()
    header = Layout(raw).header
    for place in range(len(raw)):
        for bit in range(8):
            overwrite(path, place, raw[place] ^ 1 << bit)
            try:
                shard = open_shard(path, entry.key, entry.row_format)
            except DamagedShard:
                assert place < header
                continue
            assert not shard.matches_name()
            (piece,) = shard.read(np.arange(3))
            _, data, intact = piece
            # Only the environment record has no checksum of its own: `--deep` finds a change there.
            assert intact.sum() == (3 if place < header else 2)
            keys = shard.row_keys()
            for number in np.flatnonzero(intact).tolist():
                assert keys[number] == row_key(number)
                assert data[number].tobytes() == row(number).tobytes()
        overwrite(path, place, raw[place])
    assert path.read_bytes() == raw


def test_no_truncation_of_a_shard_goes_unnoticed(entry):
    put(entry, range(3))
    (path,) = shard_paths(entry)
    raw = path.read_bytes()
    for size in range(len(raw)):
        for tail in (b"", bytes(len(raw) - size)):
            torn = raw[:size] + tail
            path.write_bytes(torn)
            try:
                shard = open_shard(path, entry.key, entry.row_format)
            except DamagedShard:
                continue
            assert len(torn) == len(raw)
            assert size >= Layout(raw).header
            intact = np.concatenate([part for _, _, part in shard.read(np.arange(3))])
            expected = [
                all(torn[part] == raw[part] for part in (
                    Layout(raw).item(name, number) for name in ("checksum", "image_sha256", "view", "rows")))
                for number in range(3)
            ]  # fmt: skip
            assert intact.tolist() == expected


@given(
    flips=st.lists(
        st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1
    ),
    read_first=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_flipped_bits_cost_what_they_hit(tmp_path_factory, flips, read_first):
    """Bits anywhere in both shards, found by a process that opens them and by one that had them open."""
    root = tmp_path_factory.mktemp("cache")
    entry = Store(root).entry(spec())
    paths = two_shards(entry)
    reader = Store(root).entry(spec())
    if read_first:
        reader.rows()
    for second, place, bit in flips:
        raw = bytearray(paths[second].read_bytes())
        raw[int(place * len(raw))] ^= 1 << bit
        paths[second].write_bytes(raw)
    left = set().union(*(intact_rows(path, entry) for path in paths))
    numbers = [*DAMAGED, *OTHERS]
    lost = [number for number in numbers if row_key(number) not in left]
    if read_first:  # it knows the tables as they were, so it may find more, and what it finds is right
        rows, missing = reader.read([row_key(number) for number in numbers])
        assert {numbers[place] for place in missing} <= set(lost)
        for place in set(range(len(numbers))) - set(missing):
            np.testing.assert_array_equal(rows[place], row(numbers[place]))
    check(Store(root).entry(spec()), numbers, missing=lost)
    put(Store(root).entry(spec()), lost)
    check(Store(root).entry(spec()), numbers)
    shutil.rmtree(root)


# ---- more than one file -----------------------------------------------------------------------------------


def test_only_the_damaged_rows_are_told_and_computed_again(entry, reopen, caplog):
    path, _ = two_shards(entry)
    path.write_bytes(item_filled("rows", 2)(path.read_bytes()))
    reader = reopen()
    assert len(reader.rows()) == 9  # nobody has looked at the rows yet
    check(reader, DAMAGED, missing=[2])
    assert [(item.shard, item.rows_lost) for item in reader.damage] == [(path.name, 1)]
    assert "Damaged shard moved to" in caplog.text
    assert reopen().rows() == {row_key(number) for number in (0, 1, 3, 4, 5, 6, 7, 8)}


def test_a_good_copy_behind_many_damaged_ones_is_found(entry, reopen):
    for number in range(8):  # eight shards that hold row 0
        put(entry, [0, 100 + number])
    for path in shard_paths(entry)[:7]:
        path.write_bytes(path.read_bytes().replace(row(0).tobytes(), bytes(ROW_BYTES)))
    reader = reopen()
    check(reader, [0])
    assert len(reader.damage) == 7
    check(reopen(), [0, *range(100, 108)])


def test_a_shard_published_again_is_believed_by_those_who_saw_it_damaged(entry, reopen):
    """Its name is the same and its file another one."""
    path, _ = two_shards(entry)
    good = path.read_bytes()
    for region in ("checksum", "image_sha256", "rows"):
        path.write_bytes(item_filled(region, 2)(good))
        early = reopen()
        early.rows()
        put(reopen(), DAMAGED)
        assert path.read_bytes() == good
        check(early, DAMAGED)
        assert early.damage == []
        assert quarantined(entry) == []


def test_a_shard_of_another_entry_is_refused(store, entry, reopen):
    path, _ = two_shards(entry)
    other = store.entry(spec(cut="layer3"))
    put(other, [7])
    (foreign,) = shard_paths(other)
    shutil.copy(foreign, entry.shards_dir)  # beside
    shutil.copy(foreign, path)  # and in the place of one
    check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)
    for name in (foreign.name, path.name):
        assert f"belongs to another entry, '{other.key}'" in reason_of(entry, name)
    check(other, [7])


def test_a_shard_under_another_name_gives_its_rows_and_deep_verification_tells(entry, reopen):
    path, other = two_shards(entry)
    shutil.copy(other, path)
    check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)
    assert reopen().verify() == []
    (found,) = reopen().verify(deep=True)
    assert (found.shard, found.reason) == (path.name, NAME)
    check(reopen(), OTHERS)
    assert reopen().verify(deep=True) == []


def test_garbage_is_left_alone_and_never_opened(entry, reopen, tmp_path):
    path, _ = two_shards(entry)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(path, outside / path.name)
    shards = entry.shards_dir
    (shards / "notes.txt").write_text("mine")
    (shards / "x.safetensors").write_text("mine")
    (shards / path.name.upper()).write_text("mine")
    (shards / f"{path.name}.bak").write_text("mine")
    (shards / ("0" * 32 + ".safetensors")).mkdir()
    (shards / ("1" * 32 + ".safetensors")).symlink_to(outside / path.name)
    os.mkfifo(shards / ("2" * 32 + ".safetensors"))  # opening it would wait for ever
    (shards / ("3" * 32 + ".safetensors")).symlink_to(shards)
    before = sorted(shards.iterdir())
    path.unlink()
    before.remove(path)
    check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)  # what a link leads to is not read
    assert reopen().verify(deep=True) == []
    assert quarantined(entry) == []
    assert sorted(shards.iterdir()) == before
    put(reopen(), DAMAGED)
    check(reopen(), [*DAMAGED, *OTHERS])
    assert len(list(outside.iterdir())) == 1


@pytest.mark.parametrize("folder", ["", "shards", "quarantine"])
def test_a_link_in_the_place_of_a_folder_is_not_written_through(entry, reopen, tmp_path, folder):
    path, _ = two_shards(entry)
    outside = tmp_path / "outside"
    (entry.directory / folder).exists() and shutil.move(entry.directory / folder, outside)
    outside.mkdir(exist_ok=True)
    link = entry.directory / folder
    link.symlink_to(outside)
    if folder == "quarantine":
        path.write_bytes(b"")
        check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)
        assert path.exists()  # it counts as missing all the same
        put(reopen(), DAMAGED)
        check(reopen(), [*DAMAGED, *OTHERS])
    else:
        before = sorted((item, item.stat().st_mtime_ns) for item in outside.rglob("*") if item.is_file())
        with pytest.raises(StorageError, match="link"):
            put(reopen(), [50])
        after = sorted((item, item.stat().st_mtime_ns) for item in outside.rglob("*") if item.is_file())
        assert after == before
    assert not (outside / path.name).exists() or folder == "shards"


@pytest.mark.parametrize("name", ["spec.json", "last_used", "CACHEDIR.TAG"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_something_else_in_the_place_of_a_file(entry, reopen, store, tmp_path, name, kind):
    """Nothing waits for a pipe, and what a link leads to is neither read nor written."""
    two_shards(entry)
    path = (store.root if name == "CACHEDIR.TAG" else entry.directory) / name
    outside = tmp_path / "outside"
    shutil.copy(path, outside)
    os.utime(outside, (5, 5))
    path.unlink()
    {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda p: p.symlink_to(outside)}[kind](path)
    os.utime(path, (0, 0), follow_symlinks=False)  # so that the mark of last use is due
    if name == "spec.json":
        with pytest.raises(StorageError, match=r"Cannot read .*spec\.json"):
            reopen()
    else:
        check(reopen(), [*DAMAGED, *OTHERS])
        put(reopen(), [50])
        check(reopen(), [50])
    assert outside.stat().st_mtime == 5


def test_missing_folders(entry, reopen):
    two_shards(entry)
    everything = [*DAMAGED, *OTHERS]
    (entry.directory / "last_used").unlink()
    check(reopen(), everything)
    for lost in (entry.shards_dir, entry.directory, entry.directory.parent, entry.root / "v1", entry.root):
        reader = reopen()
        reader.rows()
        shutil.rmtree(lost)
        for view in (reader, reopen()):
            check(view, everything, missing=everything)
            assert view.damage == []
        put(reader, everything)
        check(reopen(), everything)


def test_no_changed_bit_of_a_spec_goes_unnoticed(entry, reopen):
    put(entry, [0])
    path = entry.directory / "spec.json"
    raw = path.read_bytes()
    for place in range(len(raw)):
        for bit in range(8):
            overwrite(path, place, raw[place] ^ 1 << bit)
            with pytest.raises(StorageError, match=r"spec\.json"):
                reopen()
        overwrite(path, place, raw[place])
    for size in range(len(raw) - 1):  # all but the line's end
        path.write_bytes(raw[:size])
        with pytest.raises(StorageError, match=r"spec\.json"):
            reopen()
    path.write_bytes(raw)
    check(reopen(), [0])


# ---- half-written files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cleaner", ["writer", "verify"])
def test_half_written_files_are_never_read_and_go_when_their_writer_is_gone(entry, reopen, cleaner):
    path, _ = two_shards(entry)
    raw = path.read_bytes()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    hour = files.STALE_SECONDS + 1
    # host, process, age -> whether the next writer or verification removes it
    temporaries = {
        (files.HOST, dead.pid, 0.0): True,
        (files.HOST, dead.pid, -1e8): True,  # from the future
        (files.HOST, os.getppid(), 0.0): False,
        (files.HOST, os.getppid(), -100.0): False,
        (files.HOST, os.getppid(), hour): True,  # another process has the number by now
        ("00000000", 1, 0.0): False,
        ("00000000", 1, -100.0): False,  # the other host's clock is a little ahead
        ("00000000", 1, hour): True,
        ("00000000", 1, -hour): True,  # a wrong clock; else it would stay for ever
    }
    made = {}
    for number, ((host, process_id, age), goes) in enumerate(temporaries.items()):
        for folder in (entry.shards_dir, entry.directory):
            half = folder / f".tmp-{host}-{process_id}-{number:032x}"
            half.write_bytes(raw[: 100 * number])
            os.utime(half, (time.time() - age,) * 2)
            made[half] = goes
    path.unlink()
    check(reopen(), DAMAGED, missing=DAMAGED)
    assert all(half.exists() for half in made)
    if cleaner == "writer":
        reopen().writer(ENV)
    else:
        assert reopen().verify(deep=True) == []
    assert {half: not half.exists() for half in made} == made
    check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)


# ---- clocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1970, 2038, 2106, 2400])
def test_files_from_any_year(entry, store, reopen, year):
    """A clock that was wrong when they were written neither loses rows nor deletes what is in use."""
    two_shards(entry)
    then = (year - 1970) * 31_556_952.0
    for path in sorted(entry.root.rglob("*")):
        os.utime(path, (then, then))
    check(reopen(), [*DAMAGED, *OTHERS])
    assert last_used(entry.directory) == pytest.approx(time.time(), abs=60)
    plan = plan_prune(store, 0, 0)
    assert [item.key for item in plan.kept] == [entry.key]
    assert plan.retired == ()
    execute_prune(store, plan)
    check(reopen(), [*DAMAGED, *OTHERS])


def test_a_clock_that_goes_back(entry, store, reopen):
    """Used in what is now the future: not old, so kept, until somebody uses it and sets the mark right."""
    two_shards(entry)
    past = time.time() - 1e7
    for seconds in (past, past - 1e9, 0.0):
        plan = plan_prune(store, IN_USE_SECONDS, 0, clock=lambda now=seconds: now)
        assert [item.key for item in plan.kept] == [entry.key]
        execute_prune(store, plan, clock=lambda now=seconds: now)
    os.utime(entry.directory / "last_used", (time.time() + 1e9,) * 2)
    check(reopen(), [*DAMAGED, *OTHERS])
    assert last_used(entry.directory) == pytest.approx(time.time(), abs=60)


def test_a_damaged_shard_is_kept_for_thirty_days_from_when_it_was_found(entry, store, reopen):
    """Not from when it was written, which may be long ago."""
    path, _ = two_shards(entry)
    path.write_bytes(b"")
    os.utime(path, (0, 0))
    check(reopen(), DAMAGED, missing=DAMAGED)
    execute_prune(store, plan_prune(store))
    assert [item.name for item in quarantined(entry)] == [path.name]
    later = time.time() + QUARANTINE_SECONDS + 60
    execute_prune(store, plan_prune(store, clock=lambda: later))
    assert list(entry.quarantine_dir.iterdir()) == []


# ---- claims -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1 << 20, 1 << 40, 1 << 47, 1 << 62, 1 << 64, 10**30])
def test_claimed_rows_allocate_nothing(entry, rows):
    """Also when the whole header agrees with the claim; only the file's size does not."""
    import tracemalloc

    from tlcli.cache.shard import environment_record, shard_header

    put(entry, [0])
    (path,) = shard_paths(entry)
    path.write_bytes(
        shard_header(entry.key, entry.row_format, rows, environment_record(ENV)) + bytes(100_000)
    )
    tracemalloc.start()
    try:
        with pytest.raises(DamagedShard):
            open_shard(path, entry.key, entry.row_format)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_prune_and_show_survive_a_broken_environment_record(entry, store, reopen):
    """Its text passes as JSON in the header, and not as the JSON that it is itself."""
    path, _ = two_shards(entry)
    path.write_bytes(header_edited(r"torch\":\"", r"torch\";\"")(path.read_bytes()))
    for _ in range(2):
        execute_prune(store, plan_prune(store))
    assert [json.loads(shard.env) for shard in store.entries()[0].shards] == [ENV]
    check(reopen(), [*DAMAGED, *OTHERS], missing=DAMAGED)
    assert [item.name for item in quarantined(entry)] == [path.name]
