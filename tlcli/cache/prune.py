"""Making the cache smaller: a plan first, then its execution in two phases.

Entries and compacted shards are renamed into ROOT/trash, named by a deadline, and deleted by the first prune
after it, so that whoever is reading them can finish; one who comes later computes the rows again.
"""

import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tlcli.cache.entry_files import TAG, last_used
from tlcli.cache.errors import cache_errors
from tlcli.cache.shard import Shard
from tlcli.cache.store import Store, Summary
from tlcli.cache.writer import FLUSH_BYTES
from tlcli.errors import StorageError, UsageError
from tlcli.machine import files
from tlcli.progress import Progress, Silent

GRACE_SECONDS = 600.0  # how long trash is kept
IN_USE_SECONDS = 900.0  # an entry used this recently is kept (the mark is at most 300 s old while in use)
QUARANTINE_SECONDS = 30 * 86400.0  # how long damaged shards are kept for a look at them
SMALL_BYTES = FLUSH_BYTES // 4  # smaller shards are merged


@dataclass(frozen=True)
class PruneItem:
    """One thing prune acts on: an entry, a shard, or a left-over file; `reason` says why."""

    key: str | None
    path: Path
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class PrunePlan:
    """What prune would do.

    Attributes:
        retired: Entries that go to the trash.
        kept: Entries that would go, but are in use.
        compacted: Small shards to merge, entry by entry.
        removed: Expired trash, abandoned temporaries and old quarantined files, deleted at once.
        waiting: Trash whose deadline has not come.
    """

    retired: tuple[PruneItem, ...] = ()
    kept: tuple[PruneItem, ...] = ()
    compacted: tuple[PruneItem, ...] = ()
    removed: tuple[PruneItem, ...] = ()
    waiting: tuple[PruneItem, ...] = ()

    @property
    def bytes_now(self) -> int:
        """Return the bytes that are free at once."""
        return sum(item.num_bytes for item in self.removed)

    @property
    def bytes_later(self) -> int:
        """Return the bytes that a prune after the grace period frees (merged shards count as rewritten)."""
        return sum(item.num_bytes for item in (*self.retired, *self.waiting))


def plan_prune(
    store: Store,
    older_than_seconds: float | None = None,
    max_bytes: int | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> PrunePlan:
    """Return what prune would do; nothing is changed.

    Args:
        store: The cache.
        older_than_seconds: Retire entries not used for this long.
        max_bytes: Retire the least recently used entries until the rest is at most this.
        clock: Seconds since 1970.

    Raises:
        StorageError: The folder is no cache of tlcli, or cannot be read.
    """
    now = clock()
    with cache_errors("plan the pruning of", store.root):
        if not store.entries_dir.exists() and not store.trash_dir.exists():
            return PrunePlan()
        _check_tagged(store)
        summaries = store.entries()
        retired, kept = _candidates(store, summaries, now, older_than_seconds, max_bytes)
        gone = {item.key for item in retired}
        compacted = [
            PruneItem(summary.key, shard.path, shard.num_bytes, "small shard")
            for summary in summaries
            if summary.key not in gone
            for shard in _small(summary.shards)
        ]
        expired, waiting = _trash(store, now)
        removed = [*expired, *_leftovers(store, now)]
    return PrunePlan(tuple(retired), tuple(kept), tuple(compacted), tuple(removed), tuple(waiting))


def _candidates(
    store: Store,
    summaries: list[Summary],
    now: float,
    older_than_seconds: float | None,
    max_bytes: int | None,
) -> tuple[list[PruneItem], list[PruneItem]]:
    """Return the entries to retire, least recently used first, and those that are kept because of use."""
    retired: list[PruneItem] = []
    kept: list[PruneItem] = []
    total = store.num_bytes()
    for summary in reversed(summaries):
        age = max(0.0, now - summary.last_used)  # a clock that went back must not make entries old
        reason = ""
        if older_than_seconds is not None and age >= older_than_seconds:
            reason = f"not used for {age / 86400:.1f} days"
        elif max_bytes is not None and total > max_bytes:
            reason = "the least recently used, above the size asked for"
        path = store.directory(summary.key)
        if reason and age < IN_USE_SECONDS:
            reason = f"used in the last {IN_USE_SECONDS / 60:.0f} minutes"
            kept.append(PruneItem(summary.key, path, summary.num_bytes, reason))
        elif reason:
            retired.append(PruneItem(summary.key, path, summary.num_bytes, reason))
            total -= summary.num_bytes
    return retired, kept


def execute_prune(
    store: Store,
    plan: PrunePlan,
    progress: Progress | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> None:
    """Do what a plan says; what other processes changed since is skipped.

    Raises:
        StorageError: The disk refuses; what was not done is left for the next prune, and no row is lost.
    """
    progress = progress or Silent()
    progress.start("prune", len(plan.removed) + len(plan.retired) + len(plan.compacted), unit="items")
    for item in plan.removed:  # first, since merging needs space
        with cache_errors("remove", item.path):
            files.remove_tree(item.path)
        progress.advance()
    for item in plan.retired:
        with cache_errors("read", item.path):
            used = last_used(item.path)
        if clock() - used >= IN_USE_SECONDS:  # it may have been used since the plan
            _retire(store, item.path, clock())
        progress.advance()
    for key in dict.fromkeys(item.key for item in plan.compacted):
        names = {item.path.name for item in plan.compacted if item.key == key}
        _compact(store, str(key), names, clock())
        progress.advance(len(names))
    progress.finish()


def _compact(store: Store, key: str, names: set[str], now: float) -> None:
    """Publish the rows of small shards in larger ones, then retire the small ones."""
    try:
        entry = store.find(key, repair=True)
    except UsageError:  # another process retired it
        return
    entry.rows()
    small = [shard for shard in entry.shards() if shard.path.name in names]
    shape, dtype = entry.row_format.shape, entry.row_format.numpy_dtype
    for env in sorted({shard.env for shard in small}):
        group = [shard for shard in small if shard.env == env]
        with entry.writer(json.loads(env)) as writer, cache_errors("merge shards of", entry.directory):
            for shard in list(group):
                keys = shard.row_keys()
                try:
                    for part, rows, intact in shard.read(np.arange(len(keys))):
                        for row in np.flatnonzero(intact).tolist():
                            writer.add(keys[part.start + row], rows[row].view(dtype).reshape(shape))
                except FileNotFoundError:
                    group.remove(shard)
        for shard in group:  # a damaged one is left for `verify`, which quarantines it
            if shard.sound.all() and shard.path.name not in writer.published:
                _retire(store, shard.path, now)


def _retire(store: Store, path: Path, now: float) -> None:
    with cache_errors("move to the trash", path):
        files.make_folder(store.trash_dir)
        try:
            files.move(path, store.trash_dir / f"{int(now + GRACE_SECONDS)}-{uuid.uuid4().hex}")
        except FileNotFoundError:
            return


def _check_tagged(store: Store) -> None:
    """Refuse a folder that tlcli did not make, or whose parts lead elsewhere.

    Raises:
        StorageError: There is no tag, a folder is a link, or something is mounted inside.
    """
    tag = store.root / "CACHEDIR.TAG"
    tagged = tag.is_file() and tag.read_bytes().startswith(TAG[:43])
    links = [path for path in (store.entries_dir, store.trash_dir) if path.is_symlink()]
    mounted = mounted_below(store.root)
    why = "" if tagged else "it has no CACHEDIR.TAG"
    why = f"{str(links[0])!r} is a link" if links else why
    why = f"another folder is mounted at {mounted!r}" if mounted else why
    if why:
        raise StorageError(
            f"{str(store.root)!r} is not pruned: {why}.",
            hint="tlcli deletes only in a folder that it made itself; see TLCLI_HOME.",
        )


def mounted_below(root: Path, table: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return a place inside a folder where something is mounted; None also where the system has no list.

    Args:
        root: The folder.
        table: Linux's list: the fifth word of a line is the place, a blank in it as its octal code.
    """
    try:
        lines = table.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    places = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines)
    inside = os.path.join(os.path.realpath(root), "")
    return next((place for place in places if place.startswith(inside)), None)


def _small(shards: tuple[Shard, ...]) -> list[Shard]:
    """Return the shards worth merging: small, and not the only one of their environment."""
    small = [shard for shard in shards if shard.num_bytes < SMALL_BYTES]
    counts = Counter(shard.env for shard in small)
    return [shard for shard in small if counts[shard.env] > 1]


def _trash(store: Store, now: float) -> tuple[list[PruneItem], list[PruneItem]]:
    """Return the trash whose deadline has passed, and the rest."""
    expired: list[PruneItem] = []
    waiting: list[PruneItem] = []
    for entry in files.list_folder(store.trash_dir):
        if match := re.fullmatch(r"([0-9]{1,12})-[0-9a-f]{32}", entry.name):
            item = PruneItem(None, Path(entry.path), files.tree_bytes(Path(entry.path)), "trash")
            # A deadline further away than the grace period was set by a clock that was wrong.
            (waiting if 0 < int(match[1]) - now <= GRACE_SECONDS else expired).append(item)
    return expired, waiting


def _leftovers(store: Store, now: float) -> list[PruneItem]:
    """Return abandoned temporaries and old quarantined files."""
    items = []
    folders: list[tuple[str | None, Path]] = [(None, store.root)]
    for key in store.all_keys():
        directory = store.directory(key)
        folders += [(key, directory), (key, directory / "shards"), (key, directory / "quarantine")]
    for owner, folder in folders:
        found = [(path, "abandoned temporary") for path in files.stale_temporaries(folder)]
        if folder.name == "quarantine":
            found += [
                (Path(entry.path), "old damaged shard")
                for entry in files.list_folder(folder)
                if now - files.changed(Path(entry.path)) > QUARANTINE_SECONDS
            ]
        items += [PruneItem(owner, path, files.tree_bytes(path), reason) for path, reason in found]
    return items
