"""Prune takes what it said it would, in two phases, and nothing outside the cache."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cache.cached import DIM, ENV, check, put, quarantined, row, row_key, shard_paths, spec
from tlcli.cache import prune
from tlcli.cache.prune import GRACE_SECONDS, execute_prune, plan_prune
from tlcli.cache.shard import Shard
from tlcli.cache.store import Store
from tlcli.errors import StorageError

DAY = 86400.0
NOW = 1_700_000_000.0


def clock(seconds=NOW):
    return lambda: seconds


@pytest.fixture
def three(store):
    """Return entries a, b and c with 1, 2 and 3 rows, used 30, 20 and 10 days before NOW."""
    entries = []
    for number, cut in enumerate("abc"):
        entry = store.entry(spec(cut=cut))
        put(entry, range(number + 1))
        used = NOW - DAY * (30 - 10 * number)
        os.utime(entry.directory / "last_used", (used, used))
        entries.append(entry)
    return entries


def cuts(store):
    return sorted(item.spec["cut"] for item in store.entries())


def trash(store):
    return sorted(store.trash_dir.iterdir()) if store.trash_dir.exists() else []


def test_nothing_to_prune(store, three):
    assert plan_prune(Store(store.root / "nowhere"), 0, 0) == prune.PrunePlan()
    plan = plan_prune(store, clock=clock())
    assert plan == prune.PrunePlan()
    execute_prune(store, plan)
    assert cuts(store) == ["a", "b", "c"]
    assert not store.trash_dir.exists()


def test_by_age(store, three):
    plan = plan_prune(store, 15 * DAY, clock=clock())
    assert [item.key for item in plan.retired] == [three[0].key, three[1].key]
    assert "30.0 days" in plan.retired[0].reason
    assert plan.bytes_now == 0
    assert plan.bytes_later == sum(item.num_bytes for item in plan.retired) > 0
    assert cuts(store) == ["a", "b", "c"]  # a plan changes nothing
    execute_prune(store, plan, clock=clock())
    assert cuts(store) == ["c"]


def test_by_size_the_least_recently_used_go_first(store, three):
    sizes = [item.num_bytes for item in store.entries()]  # c, b, a
    keep_two = plan_prune(store, max_bytes=sizes[0] + sizes[1], clock=clock())
    assert [item.key for item in keep_two.retired] == [three[0].key]
    everything = plan_prune(store, max_bytes=0, clock=clock())
    assert [item.key for item in everything.retired] == [entry.key for entry in three]
    enough = plan_prune(store, max_bytes=sum(sizes), clock=clock())
    assert enough.retired == ()


def test_age_and_size_together(store, three):
    size = next(item.num_bytes for item in store.entries() if item.key == three[2].key)
    plan = plan_prune(store, 25 * DAY, size, clock=clock())
    assert [item.reason for item in plan.retired] == [
        "not used for 30.0 days", "the least recently used, above the size asked for",
    ]  # fmt: skip


def test_what_is_in_use_is_kept_and_named(store, three):
    for used in (NOW - 60, NOW + 5 * DAY):  # also when the clock went back
        os.utime(three[1].directory / "last_used", (used, used))
        plan = plan_prune(store, 0, 0, clock=clock())
        assert [item.key for item in plan.kept] == [three[1].key]
        assert {item.key for item in plan.retired} == {three[0].key, three[2].key}


def test_use_since_the_plan_is_seen(store, three):
    plan = plan_prune(store, 15 * DAY, clock=clock())
    os.utime(three[0].directory / "last_used", (NOW - 1, NOW - 1))
    execute_prune(store, plan, clock=clock())
    assert cuts(store) == ["a", "c"]


def test_reading_and_writing_count_as_use(store, three):
    """The order of going is that of recorded use, not of making."""
    check(Store(store.root).entry(spec(cut="a")), [0])
    put(Store(store.root).entry(spec(cut="b")), [9])
    plan = plan_prune(store, max_bytes=0)
    assert [item.key for item in plan.retired] == [three[2].key]
    assert {item.key for item in plan.kept} == {three[0].key, three[1].key}
    store.find(three[2].key).verify()  # a mere look, such as `cache list` takes, is no use
    store.entries()
    assert [item.key for item in plan_prune(store, max_bytes=0).retired] == [three[2].key]


def test_two_phases(store, three):
    reader = Store(store.root).entry(spec(cut="a"))
    reader.rows()
    with open(shard_paths(three[0])[0], "rb") as held:
        execute_prune(store, plan_prune(store, 15 * DAY, clock=clock()), clock=clock())
        assert row(0).tobytes() in held.read()
        check(reader, [0], missing=[0])
        assert len(trash(store)) == 2
        early = plan_prune(store, clock=clock(NOW + GRACE_SECONDS - 1))
        assert early.removed == ()
        assert early.bytes_later == sum(item.num_bytes for item in early.waiting) > 0
        execute_prune(store, early)
        assert len(trash(store)) == 2
        late = plan_prune(store, clock=clock(NOW + GRACE_SECONDS))
        assert late.bytes_now == early.bytes_later
        execute_prune(store, late)
        assert trash(store) == []
    put(reader, [0])
    check(Store(store.root).entry(spec(cut="a")), [0])


def test_trash_with_a_deadline_of_a_wrong_clock_goes(store, three):
    execute_prune(store, plan_prune(store, 15 * DAY, clock=clock()), clock=clock(NOW + 1000 * DAY))
    (store.trash_dir / "not-ours").write_text("")
    plan = plan_prune(store, clock=clock())
    assert len(plan.removed) == 2
    execute_prune(store, plan)
    assert [path.name for path in trash(store)] == ["not-ours"]


def test_an_entry_with_an_edited_spec_can_be_pruned(store, three):
    (three[0].directory / "spec.json").write_text("{}")
    plan = plan_prune(store, 25 * DAY, clock=clock())
    assert [item.key for item in plan.retired] == [three[0].key]


def test_small_shards_are_merged(store):
    entry = store.entry(spec())
    for number in range(5):
        put(entry, [number, 0])
    put(entry, [5], env={"torch": "2.11.0"})
    with entry.writer(ENV, flush_bytes=4 * DIM) as writer:
        writer.add(row_key(0, view=1), row(9))
    plan = plan_prune(store)
    assert len(plan.compacted) == 6  # the one of another environment stays alone
    reader = Store(store.root).entry(spec())
    check(reader, range(6))
    execute_prune(store, plan)
    assert len(shard_paths(entry)) == 2
    assert len(trash(store)) == 6
    check(reader, range(6))
    check(Store(store.root).entry(spec()), range(6))
    assert len(Store(store.root).entry(spec()).rows()) == 7
    assert plan_prune(store).compacted == ()
    assert Store(store.root).entry(spec()).verify(deep=True) == []


def test_merging_into_one_of_the_shards_keeps_it(store):
    entry = store.entry(spec())
    put(entry, [0, 1])
    put(entry, [1])
    put(entry, [1, 0])
    names = [path.name for path in shard_paths(entry)]
    execute_prune(store, plan_prune(store))
    (left,) = shard_paths(entry)
    assert left.name in names
    check(Store(store.root).entry(spec()), [0, 1])


def test_large_shards_are_left_alone(store, monkeypatch):
    entry = store.entry(spec())
    for number in range(3):
        put(entry, [number])
    monkeypatch.setattr(prune, "SMALL_BYTES", 0)
    assert plan_prune(store).compacted == ()


def test_damage_met_while_merging_is_not_thrown_away(store):
    entry = store.entry(spec())
    put(entry, [0, 1])
    put(entry, [2])
    path = next(path for path in shard_paths(entry) if row(1).tobytes() in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(row(1).tobytes(), bytes(4 * DIM)))
    execute_prune(store, plan_prune(store))
    assert path.exists()
    assert len(Store(store.root).entry(spec()).verify()) == 1
    check(Store(store.root).entry(spec()), [0, 1, 2], missing=[1])
    assert [found.name for found in quarantined(entry)] == [path.name]


def test_what_others_prune_meanwhile_is_skipped(store, three):
    for number in range(4):
        put(three[2], [10 + number])
    plan = plan_prune(store, 25 * DAY, clock=clock(NOW - 1))
    assert plan.retired
    assert plan.compacted
    shutil.rmtree(three[0].directory)
    execute_prune(store, plan)
    again = plan_prune(store, 25 * DAY, clock=clock(NOW - 1))
    shutil.rmtree(three[2].directory)
    execute_prune(store, plan)
    execute_prune(store, again)
    assert cuts(store) == ["b"]


def test_a_shard_that_vanishes_while_it_is_merged(store, monkeypatch):
    entry = store.entry(spec())
    for number in range(3):
        put(entry, [number])
    plan = plan_prune(store)
    gone = shard_paths(entry)[0]
    opened = Shard.read

    def then_gone(shard, rows):
        gone.unlink(missing_ok=True)
        return opened(shard, rows)

    monkeypatch.setattr(Shard, "read", then_gone)
    execute_prune(store, plan)
    assert len(shard_paths(entry)) == 1
    assert len(Store(store.root).entry(spec()).rows()) == 2


def test_leftovers(store, three):
    old = three[0].shards_dir / f".tmp-00000000-1-{'0' * 32}"
    old.write_bytes(b"12345")
    os.utime(old, (0, 0))
    fresh = store.root / f".tmp-00000000-1-{'1' * 32}"
    fresh.write_bytes(b"")
    damaged = three[1].quarantine_dir
    damaged.mkdir()
    for name, age in (("old", 31 * DAY), ("new", DAY)):
        (damaged / name).write_bytes(b"123")
        os.utime(damaged / name, (NOW - age,) * 2)
    plan = plan_prune(store, clock=clock())
    assert {(item.path, item.num_bytes) for item in plan.removed} == {(old, 5), (damaged / "old", 3)}
    assert plan.bytes_now == 8
    execute_prune(store, plan)
    assert fresh.exists()
    assert [path.name for path in damaged.iterdir()] == ["new"]
    execute_prune(store, plan)  # gone already


def test_only_a_tagged_folder_is_pruned(store, three, tmp_path):
    (store.root / "CACHEDIR.TAG").write_text("something else")
    with pytest.raises(StorageError, match=r"no CACHEDIR\.TAG"):
        plan_prune(store, 0)
    (store.root / "CACHEDIR.TAG").unlink()
    with pytest.raises(StorageError, match=r"no CACHEDIR\.TAG"):
        plan_prune(store, 0)


def test_links_do_not_lead_outside(store, three, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    (three[0].directory / "link").symlink_to(outside)
    execute_prune(store, plan_prune(store, 25 * DAY, clock=clock()), clock=clock())
    (store.trash_dir / f"1-{'0' * 32}").symlink_to(outside)
    execute_prune(store, plan_prune(store, clock=clock(NOW + DAY)))
    assert trash(store) == []
    assert (outside / "precious").exists()
    store.trash_dir.rmdir()
    store.trash_dir.symlink_to(outside)
    with pytest.raises(StorageError, match="is a link"):
        plan_prune(store, 25 * DAY, clock=clock())
    assert [path.name for path in outside.iterdir()] == ["precious"]


def outside_tree(tmp_path):
    """Return a folder outside the cache that looks like everything prune deletes."""
    outside = tmp_path / "outside"
    for name in (f".tmp-00000000-1-{'0' * 32}", f"{'0' * 32}.safetensors", f"1-{'0' * 32}", "precious"):
        (outside / "deep").mkdir(parents=True, exist_ok=True)
        for folder in (outside, outside / "deep"):
            (folder / name).write_bytes(b"precious")
            os.utime(folder / name, (0, 0))
    return outside


def everything(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "place", ["v1/00", "group", "entry", "shards", "quarantine", "inside", "file", "trash"]
)
def test_no_link_leads_outside(store, three, tmp_path, place):
    outside = outside_tree(tmp_path)
    entry = three[0]
    entry.quarantine_dir.mkdir()
    link = {
        "v1/00": store.entries_dir / "zz",
        "group": entry.directory.parent,
        "entry": entry.directory,
        "shards": entry.shards_dir,
        "quarantine": entry.quarantine_dir,
        "inside": entry.shards_dir / f"{'0' * 32}.safetensors",
        "file": entry.directory / f".tmp-00000000-1-{'0' * 32}",
        "trash": store.root / "trash" / f"1-{'0' * 32}",
    }[place]
    if link.exists():
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside / "precious" if place == "file" else outside)
    before = everything(outside)
    for later in (0, 2 * GRACE_SECONDS, DAY):
        now = NOW + later
        execute_prune(store, plan_prune(store, 0, 0, clock=clock(now)), clock=clock(now))
    assert everything(outside) == before
    assert not (store.root / "trash").exists() or trash(store) == []


def test_a_hard_link_keeps_its_other_name(store, three, tmp_path):
    (path,) = shard_paths(three[0])
    copy = tmp_path / "backup.safetensors"
    os.link(path, copy)
    content = copy.read_bytes()
    execute_prune(store, plan_prune(store, 25 * DAY, clock=clock()), clock=clock())
    execute_prune(store, plan_prune(store, clock=clock(NOW + DAY)))
    assert not path.exists()
    assert trash(store) == []
    assert copy.read_bytes() == content


MOUNTED = """
set -e
mount --bind "$1" "$2"
exec "$3" -c '
import sys
from tlcli.cache.prune import plan_prune
from tlcli.cache.store import Store
from tlcli.errors import StorageError
try:
    plan_prune(Store(sys.argv[1]), 0, 0)
except StorageError as error:
    print(error.message)
' "$4"
"""


def test_a_mounted_folder_is_not_deleted(store, three, tmp_path):
    outside = outside_tree(tmp_path)
    inside = three[0].directory / "with a blank"
    inside.mkdir()
    table = tmp_path / "mountinfo"
    line = "36 35 98:0 / {} rw,noatime master:1 - ext3 /dev/root rw\n"
    for place, expected in (
        ("/", None),
        (str(store.root), None),
        (f"{store.root}-other/x", None),
        (str(inside).replace(" ", "\\040"), str(inside)),
    ):
        table.write_text(line.format("/proc") + line.format(place))
        assert prune.mounted_below(store.root, table) == expected
    assert prune.mounted_below(store.root, tmp_path / "no such list") is None
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*words, outside, inside, sys.executable, store.root],
        env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:  # where a process may mount at all
        assert f"mounted at {str(inside)!r}" in done.stdout
    assert (outside / "precious").exists()


def test_shards_without_a_spec_can_be_pruned(store, three):
    """Else they would count against the cap for ever, and only a hand could delete them."""
    (three[0].directory / "spec.json").unlink()
    check(Store(store.root).entry(spec(cut="a")), [0])
    os.utime(three[0].directory / "last_used", (NOW - 30 * DAY,) * 2)
    plan = plan_prune(store, 25 * DAY, clock=clock())
    assert [item.key for item in plan.retired] == [three[0].key]
    execute_prune(store, plan, clock=clock())
    assert not three[0].directory.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_refusals_of_the_disk(store, three, monkeypatch, code):
    plan = plan_prune(store, 15 * DAY, clock=clock())

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=rf"trash.*{os.strerror(code)}"):
        execute_prune(store, plan)
    monkeypatch.undo()
    assert cuts(store) == ["a", "b", "c"]


def test_a_full_disk_while_merging_loses_nothing(store, monkeypatch):
    entry = store.entry(spec())
    for number in range(3):
        put(entry, [number])
    plan = plan_prune(store)

    def fail(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="full"):
        execute_prune(store, plan)
    monkeypatch.undo()
    check(Store(store.root).entry(spec()), range(3))
    assert len(shard_paths(entry)) == 3


def test_maps_survive_merging(store):
    entry = store.entry(spec(row_dtype="bf16", row_shape=[2, 3]))
    rows = np.arange(18, dtype=np.uint16).reshape(3, 2, 3)
    for number in range(3):
        with entry.writer(ENV) as writer:
            writer.add(row_key(number), rows[number])
    execute_prune(store, plan_prune(store))
    found, missing = entry.read([row_key(number) for number in range(3)])
    assert missing == []
    np.testing.assert_array_equal(found, rows)
