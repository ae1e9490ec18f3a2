"""What is done to a cache under faults, and what must be true of it afterwards.

The oracle is `values`: it knows every row that can exist. Rows are (entry, number, view).
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.child import Outcome, Teller
from tests.faults.injection import Fault
from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey
from tlcli.cache.prune import execute_prune, plan_prune
from tlcli.cache.shard import DamagedShard, open_shard
from tlcli.cache.store import Store
from tlcli.errors import StorageError
from tlcli.machine import files

DIM = 8
ROWS_A_SHARD = 4
FLUSH_BYTES = ROWS_A_SHARD * DIM * 4
ENV = {"torch": "2.10.0", "device": "cpu"}
OTHER_ENV = {"torch": "2.11.0", "device": "cpu"}
NOW = 1_750_000_000.0  # of the clock given to prune; older than the disk's own
DAY = 86400.0
ENTRIES = ("plain", "views", "old", "older")
Row = tuple[str, int, int]


def spec(name: str) -> dict[str, Any]:
    facts = {"schema": 1, "architecture": name, "cut": "all", "row_dtype": "fp32", "row_shape": [DIM]}
    return {**facts, "augment": {"flip": "0.5"}, "view_seed": 0} if name == "views" else facts


def row_key(number: int, view: int) -> RowKey:
    return hashlib.sha256(f"image {number}".encode()).hexdigest(), view


def values(row: Row) -> np.ndarray:
    """Return what a row must be; no two rows are alike."""
    digest = hashlib.sha256(repr(row).encode()).digest()
    return np.frombuffer(digest, np.uint8)[:DIM].astype(np.float32) + np.float32(row[1] / 64)


def rows_of(entry: str, numbers: Iterable[int], views: Iterable[int] = (0,)) -> list[Row]:
    views = list(views)
    return [(entry, number, view) for number in numbers for view in views]


ORACLE = {name: {row_key(n, v): (name, n, v) for n in range(24) for v in range(4)} for name in ENTRIES}


def put(entry: Entry, rows: Iterable[Row], teller: Teller | None = None, env: dict[str, str] = ENV) -> None:
    rows = list(rows)
    if not rows:
        return
    with entry.writer(env, flush_bytes=FLUSH_BYTES) as writer:
        for row in rows:
            if teller:
                teller.adding(row)
            writer.add(row_key(*row[1:]), values(row))


def fill(store: Store, rows: list[Row], teller: Teller) -> None:
    """Do what extraction does: compute what is missing, then use every row."""
    entry = store.entry(spec(rows[0][0]))
    for _ in range(3):
        known = entry.rows()
        put(entry, [row for row in rows if row_key(*row[1:]) not in known], teller)
        found, absent = entry.read([row_key(*row[1:]) for row in rows])
        for place in set(range(len(rows))) - set(absent):
            if found[place].tobytes() != values(rows[place]).tobytes():
                teller.say("problem", f"row {rows[place]} is wrong to the process that reads it")
        if not absent:
            return
    raise StorageError("Rows vanish again and again.")


def leave_temporary(folder: Path) -> None:
    """Leave what a writer that was killed leaves."""
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    (folder / f".tmp-{files.HOST}-{dead}-{'0' * 32}").write_bytes(b"half a shard")


def shard_paths(entry: Entry) -> list[Path]:
    return sorted(entry.shards_dir.glob("*.safetensors"))


class CacheScenario:
    """A piece of work on a cache, which is a folder below the one given.

    Attributes:
        name: In the table.
        mends: Whether damaged shards are there from the start.
    """

    name = ""
    mends = False
    can_retire: tuple[str, ...] = ()  # entries whose rows the work may take away

    def prepare(self, folder: Path) -> None:
        """Make what is there before the work."""

    def act(self, folder: Path, teller: Teller) -> None:
        """Work, as the process that is disturbed does; a rerun does the same once more."""
        raise NotImplementedError

    def rerun(self, folder: Path, teller: Teller) -> None:
        self.act(folder, teller)

    def store(self, folder: Path) -> Store:
        return Store(folder / "features", min_free_bytes=0)

    # ---- what must be true ----------------------------------------------------------------------------

    def start(self, folder: Path) -> set[Row]:
        """Return the rows that are there before the work and must never be lost."""
        return {row for row in self._visible(folder)[0] if row[0] not in self.can_retire}

    def look(self, folder: Path, before: set[Row], outcome: Outcome, fault: Fault) -> list[str]:
        """Return what is wrong with what a disturbed process left; changes nothing."""
        visible, problems = self._visible(folder)
        committed = {tuple(row) for row in outcome.committed}
        if fault.breaks_reading:
            visible = visible | self._set_aside(folder)
        lost = sorted((before | committed) - visible)
        return problems + [f"row {row} was committed and is lost" for row in lost]

    def final(self, folder: Path) -> dict[str, bytes]:
        """Return every file that stays, by its name in the cache."""
        return tree(folder / "features")

    def compare(
        self, folder: Path, undisturbed: dict[str, bytes], before: set[Row], fault: Fault
    ) -> list[str]:
        """Return how the end of a rerun differs from the end of work that nothing disturbed."""
        visible, problems = self._visible(folder)
        found = self.final(folder)
        problems += [f"{name} is left behind" for name in found if "/.tmp-" in f"/{name}"]
        if fault.breaks_reading:  # what could not be read is in quarantine, with the reason
            kept = visible | self._set_aside(folder)
            problems += [f"row {row} is lost" for row in sorted(before - kept)]
            parted = [name for name in found if "/quarantine/" in name and not name.endswith(".txt")]
            return problems + [f"{name} has no reason" for name in parted if f"{name}.txt" not in found]
        return problems + difference(found, undisturbed)

    def _visible(self, folder: Path) -> tuple[set[Row], list[str]]:
        """Return the rows that a reader gets, and what is wrong with them."""
        rows, problems = set(), []
        for name in ENTRIES:
            entry = self._entry(folder, name)
            if not entry.directory.exists():
                continue
            oracle = ORACLE[name]
            keys = sorted(entry.rows())
            problems += [f"{name} has the row {key}, which nobody put" for key in keys if key not in oracle]
            keys = [key for key in keys if key in oracle]
            found, absent = entry.read(keys)
            for place in set(range(len(keys))) - set(absent):
                rows.add(oracle[keys[place]])
                if found[place].tobytes() != values(oracle[keys[place]]).tobytes():
                    problems.append(f"row {oracle[keys[place]]} is wrong")
        return rows, problems

    def _entry(self, folder: Path, name: str) -> Entry:
        """Return an entry that changes nothing."""
        root = folder / "features"
        return Entry(root, self.store(folder).entry(spec(name)).directory, spec(name), repair=False)

    def _set_aside(self, folder: Path) -> set[Row]:
        """Return the rows in quarantined shards that are whole, and so were only unreadable for a while."""
        rows = set()
        for name in ENTRIES:
            entry = self._entry(folder, name)
            oracle = ORACLE[name]
            for path in sorted(entry.quarantine_dir.glob("*.safetensors")):
                try:
                    shard = open_shard(path, entry.key, entry.row_format)
                except DamagedShard:
                    continue
                for part, data, intact in shard.read(np.arange(len(shard.keys))):
                    for place, key in enumerate(shard.row_keys()[part]):
                        if intact[place] and data[place].tobytes() == values(oracle[key]).tobytes():
                            rows.add(oracle[key])
        return rows


def tree(root: Path) -> dict[str, bytes]:
    """Return every file below a folder; trash is named by its content, as its names are random."""
    found: dict[str, bytes] = {}
    trash = root / "trash"
    for item in sorted(trash.iterdir()) if trash.is_dir() else []:
        inside = {"": item.read_bytes()} if item.is_file() else tree(item)
        digest = hashlib.sha256(repr(sorted(inside.items())).encode()).hexdigest()[:16]
        number = sum(name.endswith(digest) for name in found)
        found[f"trash/{item.name.partition('-')[0]}-{number}-{digest}"] = b""
    for path in root.rglob("*"):
        if path.is_file() and trash not in path.parents:
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} should not be there" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} differs"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ),
    ]


# ---- the scenarios ----------------------------------------------------------------------------------------


class Put(CacheScenario):
    """The first rows of two entries, into a folder that does not exist."""

    name = "put"

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        store.check_space(1000)
        store.check_writable()
        fill(store, rows_of("plain", range(12)), teller)
        fill(store, rows_of("old", range(8)), teller)


class Resume(CacheScenario):
    """The rest of an entry's rows, after a run that was killed."""

    name = "resume"

    def prepare(self, folder: Path) -> None:
        store = self.store(folder)
        store.check_writable()
        entry = store.entry(spec("plain"))
        put(entry, rows_of("plain", range(8)))
        for place in (store.root, entry.directory, entry.shards_dir):
            leave_temporary(place)
        files.touch(entry.directory / "last_used")
        os.utime(entry.directory / "last_used", (NOW, NOW))

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        store.check_space(1000)
        store.check_writable()
        fill(store, rows_of("plain", range(18)), teller)


class Views(CacheScenario):
    """More images, and augmented views in an entry of their own; then one more view."""

    name = "views"

    def prepare(self, folder: Path) -> None:
        store = self.store(folder)
        put(store.entry(spec("plain")), rows_of("plain", range(6)))

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        fill(store, rows_of("plain", range(8)), teller)
        fill(store, rows_of("views", range(8), (1, 2)), teller)
        fill(store, rows_of("views", range(8), (1, 2, 3)), teller)


class Prune(CacheScenario):
    """Two entries retired, trash whose time has come, abandoned temporaries and old quarantined files."""

    name = "prune"
    can_retire = ("old", "older")

    def prepare(self, folder: Path) -> None:
        store = self.store(folder)
        store.check_writable()
        for name, age, count in (("plain", 1, 3), ("views", 2, 4), ("old", 40, 6), ("older", 60, 9)):
            entry = store.entry(spec(name))
            put(entry, rows_of(name, range(count), (1,) if name == "views" else (0,)))
            files.touch(entry.directory / "last_used")
            os.utime(entry.directory / "last_used", (NOW - age * DAY,) * 2)
        entry = store.entry(spec("plain"))
        entry.quarantine_dir.mkdir()
        for name, age in (("a", 50), ("b", 45), ("c", 3)):
            for suffix in (".safetensors", ".safetensors.txt"):
                path = entry.quarantine_dir / f"{name * 32}{suffix}"
                path.write_bytes(b"damaged")
                os.utime(path, (NOW - age * DAY,) * 2)
        for place in (store.root, entry.directory, entry.shards_dir, entry.quarantine_dir):
            leave_temporary(place)
        store.trash_dir.mkdir()
        for number, wait in enumerate((-5000, -40, 300)):
            item = store.trash_dir / f"{int(NOW + wait)}-{number:032x}"
            if number == 1:
                shutil.copy(shard_paths(entry)[0], item)
            else:
                shutil.copytree(store.entry(spec("old")).directory, item)

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        execute_prune(store, plan_prune(store, 30 * DAY, clock=lambda: NOW), clock=lambda: NOW)


class Compact(CacheScenario):
    """Small shards of two entries and two environments merged; some rows are in two shards."""

    name = "compact"

    def prepare(self, folder: Path) -> None:
        store = self.store(folder)
        store.check_writable()
        for numbers, env in ((range(14), ENV), (range(14, 24), OTHER_ENV)):
            put(store.entry(spec("plain")), rows_of("plain", numbers), env=env)
        for numbers in (range(4), range(2, 8), range(6, 7)):
            put(store.entry(spec("old")), rows_of("old", numbers))

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        execute_prune(store, plan_prune(store, clock=lambda: NOW), clock=lambda: NOW)

    def final(self, folder: Path) -> dict[str, bytes]:
        """Leave out the order of rows in merged shards, and trash: a second merge begins with the first's."""
        files_there = super().final(folder)
        found = {
            name: content
            for name, content in files_there.items()
            if not name.startswith("trash/") and not name.endswith(".safetensors")
        }
        for name in ENTRIES:
            entry = self._entry(folder, name)
            found[f"{name} rows"] = repr(sorted(entry.rows())).encode()
            found[f"{name} shards"] = repr(
                sorted((len(shard.keys), shard.env) for shard in entry.shards())
            ).encode()
        return found


def damage(store: Store) -> None:
    """Damage three of an entry's shards, each in another way."""
    flipped, cut, zeroed = shard_paths(store.entry(spec("plain")))[:3]
    content = bytearray(flipped.read_bytes())
    content[-DIM * 4 * 3] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-5])
    zeroed.write_bytes(bytes(zeroed.stat().st_size))


class Heal(CacheScenario):
    """Damaged shards met while rows are used: intact rows kept, the others computed again."""

    name = "heal"
    mends = True

    def prepare(self, folder: Path) -> None:
        store = self.store(folder)
        store.check_writable()
        put(store.entry(spec("plain")), rows_of("plain", range(16)))
        damage(store)

    def act(self, folder: Path, teller: Teller) -> None:
        fill(self.store(folder), rows_of("plain", range(16)), teller)

    def compare(
        self, folder: Path, undisturbed: dict[str, bytes], before: set[Row], fault: Fault
    ) -> list[str]:
        """Compare after a verification; a damaged shard may have been replaced instead of moved away.

        Its rows computed again have its name, where it could not be moved at first.
        """
        store = self.store(folder)
        for key in store.all_keys():
            store.find(key, repair=True).verify(deep=True)
        problems = super().compare(folder, undisturbed, before, fault)
        if fault.fatal or not problems:
            return problems
        found = self.final(folder)
        replaced = {
            name
            for name in undisturbed
            if name not in found
            and name.partition(".safetensors")[0].replace("/quarantine/", "/shards/") + ".safetensors"
            in found
        }
        return [p for p in problems if p.partition(" is missing")[0] not in replaced]


class Verify(Heal):
    """All rows of all entries checked, and whole shards by their names."""

    name = "verify"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        entry = self.store(folder).entry(spec("old"))
        put(entry, rows_of("old", range(8)))
        first = shard_paths(entry)[0]
        first.rename(first.with_name("0" * 32 + first.suffix))

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        for key in store.all_keys():
            store.find(key, repair=True).verify(deep=True)


class Survey(Resume):
    """Listing, explaining and planning, which must change nothing."""

    name = "survey"

    def act(self, folder: Path, teller: Teller) -> None:
        store = self.store(folder)
        store.entries()
        store.closest(spec("older"))
        store.num_bytes()
        plan_prune(store, 30 * DAY, 1000, clock=lambda: NOW)

    def look(self, folder: Path, before: set[Row], outcome: Outcome, fault: Fault) -> list[str]:
        problems = super().look(folder, before, outcome, fault)
        return problems + difference(self.final(folder), self._untouched)

    def start(self, folder: Path) -> set[Row]:
        self._untouched = self.final(folder)
        return super().start(folder)

    def compare(
        self, folder: Path, undisturbed: dict[str, bytes], before: set[Row], fault: Fault
    ) -> list[str]:
        return difference(self.final(folder), self._untouched)


CACHE_SCENARIOS = (Put(), Resume(), Views(), Prune(), Compact(), Heal(), Verify(), Survey())
