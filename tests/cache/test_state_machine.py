"""The cache against a dictionary: whatever happens, it gives out right rows and misses no row it must have.

The machine knows which rows intact files hold (`have`) and which were ever put (`ever`). A file's intact rows
are found by a second reader, written from docs/cache-format.md (`cached.intact_rows`). What is claimed:

- a row that is given out is the one that was put, bit for bit;
- a process that opens the cache anew gets exactly the rows of `have`;
- one that has had it open for long gets these too, and besides them only rows that were there once;
- a run computes no row of `have` again, and has every row it wants in the end;
- nothing outside the cache's folder changes.
"""

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.cache.cached import DIM, ENV, intact_rows, row, row_key, spec
from tlcli.cache.entry import Entry
from tlcli.cache.prune import IN_USE_SECONDS, execute_prune, plan_prune
from tlcli.cache.store import Store
from tlcli.cache.writer import Writer
from tlcli.errors import StorageError

CONTENTS = 8
VIEWS = 2
KEYS = [row_key(content, view) for content in range(CONTENTS) for view in range(VIEWS)]
NUMBER = {key: number for number, key in enumerate(KEYS)}
SPECS = [spec(), spec(cut="layer3")]
OTHER_ENV = {"torch": "2.11.0", "device": "cpu"}
FLUSH_BYTES = 3 * 4 * DIM  # three rows a shard

NUMBERS = st.lists(st.integers(0, len(KEYS) - 1), min_size=1, max_size=6)
PLACE = st.integers(0, 1)  # of an entry, a handle or a second item
NAMES = st.sampled_from("abcdef")
CONTENT = st.integers(0, CONTENTS - 1)
REGION = st.integers(0, 2)  # header, tables or rows
ANY = st.integers(0, 1 << 30)  # a choice whose range is known only when it is made
CALLS = st.sampled_from(["open", "write", "fsync", "replace", "mkdir", "unlink", "pread", "scandir"])


def in_child(work: Callable[[], None], call: str = "", nth: int = 0) -> int:
    """Run `work` in a child that is killed at its n-th call of os.<call>; return how it ended."""
    process_id = os.fork()
    if process_id == 0:
        code = 1
        try:
            if nth:
                real, left = getattr(os, call), [nth]

                def counted(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                setattr(os, call, counted)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def add_rows(writer: Writer, numbers) -> None:
    for number in numbers:
        writer.add(KEYS[number], row(number))


def put(entry: Entry, numbers, env=ENV) -> None:
    with entry.writer(env, flush_bytes=FLUSH_BYTES) as writer:
        add_rows(writer, numbers)


def get(entry: Entry, numbers) -> tuple[set[int], set[int]]:
    """Return which rows came, each of them right, and which did not."""
    rows, places = entry.read([KEYS[number] for number in numbers])
    missing = {numbers[place] for place in places}
    for place, number in enumerate(numbers):
        expected = np.zeros(DIM, np.float32) if place in places else row(number)
        assert rows[place].tobytes() == expected.tobytes(), "a wrong row was given out"
    return set(numbers) - missing, missing


def extract(entry: Entry, wanted: list[int]) -> set[int]:
    """Do what a run does: compute what is missing, read, compute what proves damaged; return the computed."""
    known = entry.rows()
    computed = {number for number in wanted if KEYS[number] not in known}
    put(entry, sorted(computed))
    for _ in range(len(wanted) + 1):  # a file found damaged now may have given its other rows before
        _, lost = get(entry, wanted)
        if not lost:
            return computed
        assert not lost & computed
        put(entry, sorted(lost))
        computed |= lost
    raise AssertionError("there is no end to it")


def num_rows(raw: bytes) -> int:
    return max(0, (len(raw) - 8 - int.from_bytes(raw[:8], "little")) // (44 + 4 * DIM))


def position(raw: bytes, region: int, at: int) -> int:
    """Return a place in a region of a shard's bytes."""
    rows = len(raw) - num_rows(raw) * 4 * DIM
    edges = (0, max(0, rows - 44 * num_rows(raw)), rows, len(raw))
    return edges[region] + at % max(1, edges[region + 1] - edges[region])


class CacheMachine(RuleBasedStateMachine):
    """Two entries, two long-lived handles of each, and a data set; entries are told apart by their place."""

    folder = Path()  # set by the test
    examples = 0
    steps = 0

    @initialize()
    def begin(self):
        CacheMachine.examples += 1
        self.around = self.folder / str(CacheMachine.examples)
        self.root = self.around / "features"
        (self.around / "outside").mkdir(parents=True)
        (self.around / "outside" / "precious").write_bytes(b"precious")
        self.outside = self.look_outside()
        self.have: list[set[int]] = [set(), set()]
        self.ever: list[set[int]] = [set(), set()]
        self.images = dict(zip("abcd", range(4), strict=True))
        self.writing: tuple[int, Writer, list[int]] | None = None
        self.handles = [[self.open(0), self.open(0)], [self.open(1), self.open(1)]]
        for place in range(2):
            put(self.handles[place][0], range(place, 10))
            self.keep(place, range(place, 10))

    def open(self, place: int) -> Entry:
        return Store(self.root).entry(SPECS[place])

    def look_outside(self):
        found = []
        for path in sorted(self.around.rglob("*")):
            if self.root not in (path, *path.parents):
                status = path.lstat()
                found.append((path, status.st_mode, status.st_size, status.st_mtime_ns, status.st_nlink))
        return found

    # ---- rows ---------------------------------------------------------------------------------------------

    def keep(self, place: int, numbers) -> None:
        self.have[place] |= set(numbers)
        self.ever[place] |= set(numbers)

    def check_opened_long_ago(self, place: int, handle: int, numbers) -> None:
        given, missing = get(self.handles[place][handle], numbers)
        assert not missing & self.have[place], "a published row was not found"
        assert given <= self.ever[place], "a row was found that was never put"

    def check_opened_now(self, place: int, numbers) -> None:
        given, _ = get(self.open(place), numbers)
        assert given == set(numbers) & self.have[place]

    @rule(place=PLACE, handle=PLACE, numbers=NUMBERS, other_env=st.booleans())
    def put_rows(self, place, handle, numbers, other_env):
        put(self.handles[place][handle], numbers, OTHER_ENV if other_env else ENV)
        self.keep(place, numbers)

    @rule(place=PLACE, handle=PLACE, numbers=NUMBERS)
    def get_rows(self, place, handle, numbers):
        self.check_opened_long_ago(place, handle, numbers)

    @rule(place=PLACE, numbers=NUMBERS)
    def get_rows_anew(self, place, numbers):
        self.check_opened_now(place, numbers)

    @rule(place=PLACE, handle=PLACE)
    def reopen(self, place, handle):
        self.handles[place][handle] = self.open(place)

    @precondition(lambda self: self.writing is None)
    @rule(place=PLACE, handle=PLACE)
    def a_second_writer_begins(self, place, handle):
        writer = self.handles[place][handle].writer(ENV, flush_bytes=FLUSH_BYTES)
        self.writing = (place, writer, [])

    @precondition(lambda self: self.writing is not None)
    @rule(numbers=NUMBERS, last=st.booleans())
    def the_second_writer_goes_on(self, numbers, last):
        place, writer, waiting = self.writing
        for number in numbers:
            before = writer.rows_written
            add_rows(writer, [number])
            if number not in waiting:
                waiting.append(number)
            if writer.rows_written > before:
                self.keep(place, waiting)
                waiting.clear()
        if last:
            writer.flush()
            self.keep(place, waiting)
            self.writing = None

    @rule(place=PLACE, numbers=NUMBERS, again=NUMBERS)
    def another_process(self, place, numbers, again):
        have = self.have[place] | set(numbers)

        def work():
            entry = self.open(place)
            put(entry, numbers)
            given, _ = get(entry, again)
            assert given == set(again) & have

        assert in_child(work) == 0
        self.keep(place, numbers)

    # ---- a data set ---------------------------------------------------------------------------------------

    def change_images(self, change: str, name: str, new: str, content: int) -> None:
        if change == "add or edit":
            self.images[name] = content
        elif name in self.images:
            value = self.images.pop(name)
            if change == "rename":
                self.images[new] = value

    @rule(
        changes=st.lists(
            st.tuples(st.sampled_from(["add or edit", "rename", "delete"]), NAMES, NAMES, CONTENT), max_size=6
        ),
        place=PLACE,
        handle=PLACE,
        views=st.integers(1, VIEWS),
    )
    def run_on_changed_images(self, changes, place, handle, views):
        for change in changes:
            self.change_images(*change)
        wanted = sorted({VIEWS * content + view for content in self.images.values() for view in range(views)})
        computed = extract(self.handles[place][handle], wanted)
        assert not computed & self.have[place], "a row was computed again for nothing"
        self.keep(
            place, computed
        )  # others may come from a file that was opened before its header was damaged

    # ---- death --------------------------------------------------------------------------------------------

    @rule(place=PLACE, numbers=NUMBERS, call=CALLS, nth=st.integers(1, 12))
    def kill_a_writer(self, place, numbers, call, nth):
        code = in_child(lambda: put(self.open(place), numbers), call, nth)
        assert code in (0, -signal.SIGKILL)
        published = self.intact(place)
        assert self.have[place] <= published <= self.have[place] | set(numbers)
        if code == 0:
            assert published >= set(numbers)
        self.keep(place, published)

    @rule(place=PLACE, deep=st.booleans(), call=CALLS, nth=st.integers(1, 12))
    def kill_a_verifier(self, place, deep, call, nth):
        assert in_child(lambda: self.open(place).verify(deep=deep) and None, call, nth) in (
            0,
            -signal.SIGKILL,
        )
        assert self.intact(place) == self.have[place]

    @rule(call=CALLS, nth=st.integers(1, 20), ahead=st.sampled_from([0.0, 1e5]))
    def kill_a_pruner(self, call, nth, ahead):
        def work():
            store = Store(self.root)
            then = time.time() + ahead
            execute_prune(
                store, plan_prune(store, 3600.0 if ahead else None, clock=lambda: then), clock=lambda: then
            )

        assert in_child(work, call, nth) in (0, -signal.SIGKILL)
        for place in range(2):
            left = self.intact(place)
            retired = ahead and not self.directory(place).exists()
            assert left == (set() if retired else self.have[place])
            self.have[place] = left

    # ---- maintenance --------------------------------------------------------------------------------------

    @rule(place=PLACE, deep=st.booleans())
    def verify(self, place, deep):
        self.open(place).verify(deep=deep)
        anew = self.open(place)
        assert {NUMBER[key] for key in anew.rows()} == self.have[place]
        assert anew.verify(deep=deep) == []
        quarantine = self.directory(place) / "quarantine"
        for path in quarantine.glob("*.safetensors"):
            assert (quarantine / f"{path.name}.txt").read_text().strip()

    @rule()
    def compact(self):
        """Merge small shards; entries are kept."""
        store = Store(self.root)
        execute_prune(store, plan_prune(store))
        for place in range(2):
            assert self.intact(place) == self.have[place]

    @rule(
        ahead=st.sampled_from([-1e6, 0.0, 600.0, 1000.0, 1e5]),
        older=st.sampled_from([None, 3600.0]),
        empty=st.booleans(),
    )
    def prune(self, ahead, older, empty):
        store = Store(self.root)
        now = time.time() + ahead
        expected = set()
        for place in range(2):
            directory = self.directory(place)
            if (directory / "spec.json").exists() or any(directory.glob("shards/*")):
                mark = directory / "last_used"
                age = now - (mark if mark.exists() else directory).stat().st_mtime
                if age >= IN_USE_SECONDS and (empty or (older is not None and age >= older)):
                    expected.add(place)
        plan = plan_prune(store, older, 0 if empty else None, clock=lambda: now)
        assert {item.key for item in plan.retired} == {self.directory(place).name for place in expected}
        execute_prune(store, plan, clock=lambda: now)
        for place in expected:
            assert not self.directory(place).exists()
            self.have[place] = set()
        for place in range(2):
            assert self.intact(place) == self.have[place]

    # ---- damage -------------------------------------------------------------------------------------------

    def directory(self, place: int) -> Path:
        return self.handles[place][0].directory

    def shards(self, place: int) -> list[Path]:
        names = sorted((self.directory(place) / "shards").glob("*.safetensors"))
        return [path for path in names if path.is_file() and not path.is_symlink()]

    def intact(self, place: int) -> set[int]:
        """Return the rows that intact files hold."""
        handle = self.handles[place][0]
        return {NUMBER[key] for path in self.shards(place) for key in intact_rows(path, handle)}

    def damage(self, place: int, choice: int, change: Callable[[bytes], bytes]) -> None:
        """Change a shard in place and note what is lost; a change that would undo earlier damage is not made.

        A disk does not repair a file, and who has read its damaged tables would not look at it again.
        """
        if paths := self.shards(place):
            path = paths[choice % len(paths)]
            raw = path.read_bytes()
            path.write_bytes(change(raw))
            left = self.intact(place)
            if left <= self.have[place]:
                self.have[place] = left
            else:
                path.write_bytes(raw)

    @rule(place=PLACE, choice=ANY, region=REGION, at=ANY, bit=st.integers(0, 7))
    def flip_a_bit(self, place, choice, region, at, bit):
        def change(raw):
            flipped = bytearray(raw)
            if raw:
                flipped[min(position(raw, region, at), len(raw) - 1)] ^= 1 << bit
            return bytes(flipped)

        self.damage(place, choice, change)

    @rule(place=PLACE, choice=ANY, region=REGION, at=ANY, size=st.integers(1, 300))
    def zero_some_bytes(self, place, choice, region, at, size):
        def change(raw):
            begin = position(raw, region, at)
            return raw[:begin] + bytes(min(size, len(raw) - begin)) + raw[begin + size :]

        self.damage(place, choice, change)

    @rule(place=PLACE, choice=ANY, size=ANY)
    def truncate(self, place, choice, size):
        self.damage(place, choice, lambda raw: raw[: size % (len(raw) + 1)])

    @rule(place=PLACE, choice=ANY, first=ANY, second=ANY, keys=st.booleans())
    def swap_two_rows(self, place, choice, first, second, keys):
        """Swap rows, alone or with their keys; the checksums stay."""

        def change(raw):
            count = num_rows(raw)
            if count < 2:
                return raw
            a, b = first % count, second % count
            begin = len(raw) - count * 4 * DIM
            places = [(begin, 4 * DIM)]
            if keys:
                places += [(begin - 4 * count, 4), (begin - 36 * count, 32)]
            swapped = bytearray(raw)
            for start, size in places:
                one, two = (slice(start + n * size, start + (n + 1) * size) for n in (a, b))
                swapped[one], swapped[two] = raw[two], raw[one]
            return bytes(swapped)

        self.damage(place, choice, change)

    @rule(place=PLACE, choice=ANY)
    def copy_a_shard_of_the_other_entry(self, place, choice):
        if paths := self.shards(1 - place):
            path = paths[choice % len(paths)]
            target = self.directory(place) / "shards" / path.name
            if self.shards(place) and not os.path.lexists(target):
                shutil.copy(path, target)
                self.keep(place, self.intact(place))  # it may be one that was copied from here

    @rule(place=PLACE, choice=ANY)
    def lose_a_shard(self, place, choice):
        if paths := self.shards(place):
            paths[choice % len(paths)].unlink()
            self.have[place] = self.intact(place)

    @rule(place=PLACE, name=st.sampled_from(["spec.json", "last_used", "quarantine", "shards", ""]))
    def lose_a_part(self, place, name):
        path = self.directory(place) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        self.have[place] = self.intact(place)

    @rule(place=PLACE, kind=st.sampled_from(["file", "folder", "fifo", "link", "dead link"]), digit=PLACE)
    def leave_garbage(self, place, kind, digit):
        shards = self.directory(place) / "shards"
        path = shards / f"{str(digit) * 32}.safetensors"
        if not shards.exists() or path.exists() or path.is_symlink():
            return
        if kind == "file":
            path.write_bytes(b"garbage")
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(self.around / "outside" / ("precious" if kind == "link" else "nothing"))

    @rule(place=PLACE, used=st.sampled_from([-1e6, 1e6]))
    def set_the_clock(self, place, used):
        mark = self.directory(place) / "last_used"
        if mark.exists():
            os.utime(mark, (time.time() + used,) * 2)

    @rule(place=PLACE, text=st.sampled_from(["", "{}", '{"schema":2}', "\0" * 40]), handle=PLACE)
    def edit_the_spec(self, place, text, handle):
        """Nothing can be done with the entry until the spec is put back, and nothing is done to it."""
        path = self.directory(place) / "spec.json"
        if not path.exists():
            return
        good = path.read_bytes()
        path.write_text(text)
        before = self.shards(place)
        for attempt in (lambda: self.open(place), lambda: put(self.handles[place][handle], [0])):
            with pytest.raises(StorageError):
                attempt()
        assert path.read_text() == text
        assert self.shards(place) == before
        path.write_bytes(good)

    # ---- always -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_outside_changes(self):
        CacheMachine.steps += 1
        if hasattr(self, "outside"):
            assert self.look_outside() == self.outside

    def teardown(self):
        """End with a run in each entry, which needs no cleaning and leaves nothing to be found."""
        if not hasattr(self, "handles"):
            return
        for place in range(2):
            for handle in range(2):
                self.check_opened_long_ago(place, handle, list(range(len(KEYS))))
            self.check_opened_now(place, list(range(len(KEYS))))
            assert not extract(self.open(place), list(range(len(KEYS)))) & self.have[place]
            self.open(place).verify(deep=True)
            anew = self.open(place)
            assert anew.verify(deep=True) == []
            assert anew.rows() == set(KEYS)
            assert not list(self.directory(place).rglob(".tmp-*"))
        self.nothing_outside_changes()
        shutil.rmtree(self.around)


def check_model(tmp_path, monkeypatch, *, max_examples: int, steps: int) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(CacheMachine, "folder", tmp_path)
    monkeypatch.setattr(CacheMachine, "examples", 0)
    monkeypatch.setattr(CacheMachine, "steps", 0)
    logging.disable()
    try:
        run_state_machine_as_test(
            CacheMachine,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        logging.disable(logging.NOTSET)


def test_the_cache_is_a_dictionary(tmp_path, monkeypatch):
    check_model(tmp_path, monkeypatch, max_examples=30, steps=30)


@pytest.mark.slow
def test_the_cache_is_a_dictionary_for_long(tmp_path, monkeypatch, capsys):
    """`TLCLI_MODEL_EXAMPLES=5000 pytest -m slow tests/cache/test_state_machine.py` looks further."""
    examples = int(os.environ.get("TLCLI_MODEL_EXAMPLES", "1000"))
    started = time.perf_counter()
    check_model(tmp_path, monkeypatch, max_examples=examples, steps=50)
    with capsys.disabled():
        seconds = time.perf_counter() - started
        print(f"\n{CacheMachine.examples} examples, {CacheMachine.steps} steps, {seconds:.0f} s")
