"""Entries are found, compared with their facts, and refused before work begins."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from tests.cache.cached import DIM, check, put, row_key, shard_paths, spec
from tlcli.cache.key import entry_key
from tlcli.cache.store import Store
from tlcli.errors import StorageError, UsageError


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


# ---- specs ------------------------------------------------------------------------------------------------


def test_one_entry_for_equal_facts(store):
    entry = store.entry(spec())
    assert store.entry(dict(reversed(spec().items()))).directory == entry.directory
    assert store.entry(spec(cut="layer3")).directory != entry.directory
    assert not store.root.exists()  # asking makes nothing
    put(entry, [0])
    assert json.loads((entry.directory / "spec.json").read_text()) == spec() == entry.spec
    assert entry.directory == store.root / "v1" / entry.key[:2] / entry.key
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.parametrize(
    "facts", [{"schema": 2}, {"schema": None}, {"row_dtype": "fp64"}, {"row_shape": [0]}]
)
def test_specs_that_are_none(store, facts):
    with pytest.raises(ValueError, match="expected"):
        store.entry(spec(**facts))


def test_tuples_are_lists(store):
    assert store.entry(spec(row_shape=(DIM,))).spec == spec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no facts of an entry"),
        ("[]", "no facts of an entry"),
        ("[" * 100_000, "no facts of an entry"),
        ('{"a": 1}', "no facts of an entry"),
        ('{"schema": 1, "a": 0.5}', "no facts of an entry"),
        ('{"schema": 1, "row_dtype": "fp32"}', "no facts of an entry"),
        (json.dumps(spec(cut="edited")), "do not give the entry's key"),
        (json.dumps(spec(schema=2)), r"newer tlcli \(schema 2"),
        (json.dumps(spec(schema="2")), "newer tlcli"),
    ],
)
def test_an_edited_spec_is_refused_and_never_overwritten(store, reopen, text, message):
    entry = store.entry(spec())
    put(entry, [0])
    path = entry.directory / "spec.json"
    path.write_text(text)
    for attempt in (reopen, lambda: store.find(entry.key), lambda: put(entry, [1])):
        with pytest.raises(StorageError, match=message) as error:
            attempt()
        assert error.value.hint
    assert path.read_text() == text
    (summary,) = store.entries()
    assert summary.spec is None
    assert summary.problem in str(error.value)
    assert len(shard_paths(entry)) == 1


def test_a_spec_that_cannot_be_read(store, reopen, monkeypatch):
    put(store.entry(spec()), [0])
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(StorageError, match=r"spec\.json': Permission denied"):
        reopen()


def test_a_lost_spec_is_written_again(store, reopen):
    put(store.entry(spec()), [0])
    (reopen().directory / "spec.json").unlink()
    (found,) = store.entries()
    assert "spec.json" in found.problem
    check(reopen(), [0])
    put(reopen(), [1])
    (found,) = store.entries()
    assert (found.problem, found.num_rows) == (None, 2)


def test_an_entry_that_was_only_begun_is_none(store):
    entry = store.entry(spec())
    entry.shards_dir.mkdir(parents=True)
    assert store.all_keys() == []


def test_the_cache_may_be_moved(store, tmp_path):
    put(store.entry(spec()), [0])
    store.root.rename(tmp_path / "moved")
    check(Store(tmp_path / "moved").entry(spec()), [0])


# ---- listing ----------------------------------------------------------------------------------------------


def test_entries_last_used_first(store):
    assert store.entries() == []
    for number, cut in enumerate("abcde"):
        entry = store.entry(spec(cut=cut))
        put(entry, range(number + 1))
        os.utime(entry.directory / "last_used", (1000 * number, 1000 * number))
    found = store.entries()
    assert [(item.spec["cut"], item.num_rows, item.last_used) for item in found] == [
        ("e", 5, 4000.0), ("d", 4, 3000.0), ("c", 3, 2000.0), ("b", 2, 1000.0), ("a", 1, 0.0),
    ]  # fmt: skip
    assert [len(item.shards) for item in found] == [1] * 5
    assert sum(item.num_bytes for item in found) == store.num_bytes() > 3 * 4 * DIM


def test_garbage_is_no_entry(store, tmp_path):
    put(store.entry(spec()), [0])
    key = entry_key(spec(cut="x"))
    (store.entries_dir / "zz").mkdir()
    for group in ("zz", "00"):
        shutil.copytree(store.entry(spec()).directory, store.entries_dir / group / entry_key(spec()))
    (store.entries_dir / key[:2]).mkdir(exist_ok=True)
    (store.entries_dir / key[:2] / key).symlink_to(tmp_path)
    (store.entries_dir / key[:2] / "short").mkdir()
    (store.entries_dir / "file").write_text("")
    assert len(store.all_keys()) == 1


def test_find_by_prefix(store):
    entries = [store.entry(spec(cut=str(number))) for number in range(17)]  # two share a first digit
    for entry in entries:
        put(entry, [0])
    assert store.find(entries[3].key[:20].upper()).key == entries[3].key
    first = max("0123456789abcdef", key=lambda digit: sum(entry.key[0] == digit for entry in entries))
    with pytest.raises(UsageError, match="entries of the cache have a key"):
        store.find(first)
    for nothing in ("", "xyz"):
        with pytest.raises(UsageError, match="No entry"):
            store.find(nothing)


def test_an_entry_that_vanishes_while_it_is_listed(store, monkeypatch):
    put(store.entry(spec()), [0])
    monkeypatch.setattr(store, "find", lambda key: Store(store.root).find("f" * 64))
    (summary,) = store.entries()
    assert "No entry" in str(summary.problem)
    assert (summary.num_rows, summary.shards, summary.spec) == (0, (), None)
    monkeypatch.undo()
    spec_path = store.directory(summary.key) / "spec.json"
    exists = type(spec_path).exists

    def then_gone(path):
        found = exists(path)
        if path == spec_path:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(type(spec_path), "exists", then_gone)
    with pytest.raises(StorageError, match="No such file"):
        store.find(summary.key)


def test_the_closest_entry_explains_a_miss(store):
    assert store.closest(spec()) is None
    put(store.entry(spec(cut="layer3", architecture="vgg16")), [0])
    near = store.entry(spec(cut="layer3"))
    put(near, [0])
    put(store.entry(spec(cut="layer2", architecture="vgg19")), [0])
    assert store.closest(spec()) == (near.key, ['cut: "layer3" -> "all"'])


# ---- refusals before work ---------------------------------------------------------------------------------


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a folder"):
        Store(tmp_path / "file")
    with pytest.raises(StorageError, match="Not a directory"):
        Store(tmp_path / "file" / "below")


@pytest.mark.parametrize("other", [1, -1])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_foreign_folder_that_everybody_may_write_is_refused(tmp_path, monkeypatch, mode, other):
    root = tmp_path / "features"
    root.mkdir()
    root.chmod(mode)
    Store(root)  # our own is fine
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + other)
    with pytest.raises(StorageError, match="everybody may write") as error:
        Store(root)
    assert error.value.exit_code == 5
    root.chmod(0o775)
    Store(root)


def test_check_writable(store, monkeypatch):
    store.check_writable()
    assert store.entries_dir.is_dir()
    assert (store.root / "CACHEDIR.TAG").exists()
    for code in (errno.EROFS, errno.EACCES, errno.ENOSPC):
        monkeypatch.setattr(os, "write", failing(code))
        with pytest.raises(StorageError, match="Cannot write in the cache folder"):
            store.check_writable()


def test_check_writable_below_a_file(tmp_path):
    store = Store(tmp_path / "home" / "features")
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"):
        store.check_writable()


def test_predicted_bytes_against_the_cap(store, tmp_path):
    put(store.entry(spec()), [0])
    capped = Store(store.root, max_bytes=store.num_bytes() + 1000)
    capped.check_space(999)
    capped.check_space(1000)
    with pytest.raises(StorageError, match=r"need 1.0 kB .* of the cache's cap of") as error:
        capped.check_space(1001)
    assert "prune" in str(error.value.hint)
    full = Store(store.root, max_bytes=1)
    full.check_space(0)
    full.check_space(-5)
    with pytest.raises(StorageError, match="need 1 B"):
        full.check_space(1)


def test_predicted_bytes_against_free_space(store, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=100))
    tight = Store(store.root, min_free_bytes=400)
    tight.check_space(600)  # the root does not exist: its parent is asked
    with pytest.raises(StorageError, match=r"need 601 B .*1.0 kB are free, 400 B of them kept in reserve"):
        tight.check_space(601)
    monkeypatch.setattr(os, "statvfs", failing(errno.EACCES))
    with pytest.raises(StorageError, match="measure free space"):
        tight.check_space(1)


def test_what_may_still_be_written(store, monkeypatch):
    put(store.entry(spec()), [0])
    used = store.num_bytes()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=100))
    assert Store(store.root, min_free_bytes=400).free_bytes() == 600
    assert Store(store.root, min_free_bytes=400, max_bytes=used + 500).free_bytes() == 500
    assert Store(store.root, min_free_bytes=400, max_bytes=used + 700).free_bytes() == 600
    assert Store(store.root, min_free_bytes=400, max_bytes=0).free_bytes() == -used
    assert Store(store.root, min_free_bytes=1001).free_bytes() == -1
    assert Store(store.root).free_bytes() == 1000 - 256 * 2**20


def test_trash_does_not_count_against_the_cap(store):
    put(store.entry(spec()), [0])
    store.entries_dir.rename(store.trash_dir)
    assert store.num_bytes() == 0
    Store(store.root, max_bytes=10).check_space(10)


def test_a_full_cache_is_still_read(store):
    put(store.entry(spec()), [0])
    rows, missing = Store(store.root, max_bytes=1).entry(spec()).read([row_key(0)])
    assert missing == []
    assert rows.shape == (1, DIM)
