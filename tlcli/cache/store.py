"""All entries of the cache, and the room they may take.

    ROOT/CACHEDIR.TAG
    ROOT/v1/<key[:2]>/<key>/spec.json    the facts the key was made of
                            last_used    its time of change is the time of last use
                            shards/      immutable shards named by content; what they hold is the index
                            quarantine/  damaged shards, each with its reason
    ROOT/trash/<deadline>-.../           what prune took away, until the deadline

There is no journal, commit file, lock or lease. Any number of processes may read, write, verify and prune; a
Store and what comes from it belong to one thread.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.cache.entry import Entry
from tlcli.cache.entry_files import last_used, read_spec, tag_root
from tlcli.cache.errors import cache_errors
from tlcli.cache.key import SCHEMA, canonical_json, entry_key, explain
from tlcli.cache.shard import Shard
from tlcli.errors import StorageError, UsageError
from tlcli.machine import files
from tlcli.wording import size_text

KEY_NAME = re.compile(r"[0-9a-f]{64}")
MIN_FREE_BYTES = 256 << 20


class Store:
    """A folder of entries.

    Args:
        root: The folder; made when the first row is written.
        min_free_bytes: Free space that `check_space` leaves untouched.
        max_bytes: Cap on the cache's size for `check_space`; None is no cap.

    Raises:
        StorageError: `root` is not a folder, cannot be looked at, or is a folder of another user that
            everybody may write to.
    """

    def __init__(
        self, root: Path, *, min_free_bytes: int = MIN_FREE_BYTES, max_bytes: int | None = None
    ) -> None:
        self.root = Path(root)
        self.min_free_bytes = min_free_bytes
        self.max_bytes = max_bytes
        with cache_errors("use the cache folder", self.root), suppress(FileNotFoundError):
            status = os.stat(self.root)
            if not stat.S_ISDIR(status.st_mode):
                raise StorageError(
                    f"The cache folder {str(self.root)!r} is not a folder.",
                    hint="Set TLCLI_HOME to another folder.",
                )
            if status.st_mode & stat.S_IWOTH and status.st_uid != os.geteuid():
                raise StorageError(
                    f"The cache folder {str(self.root)!r} is another user's and everybody may write to it.",
                    hint="Set TLCLI_HOME to a folder of your own, or have its owner run chmod o-w on it.",
                )

    @property
    def entries_dir(self) -> Path:
        """Return the folder of this layout's entries."""
        return self.root / "v1"

    @property
    def trash_dir(self) -> Path:
        """Return the folder of what prune took away."""
        return self.root / "trash"

    def entry(self, spec: Mapping[str, Any]) -> Entry:
        """Return the entry of a spec, which need not exist yet.

        Args:
            spec: The facts that make the rows what they are: plain data, with `schema`, `row_dtype` and
                `row_shape`.

        Raises:
            StorageError: The entry's spec.json was edited, is damaged, or was written by a newer tlcli.
            TypeError: The spec is not plain data.
            ValueError: `schema`, `row_dtype` or `row_shape` is missing or unknown.
        """
        if spec.get("schema") != SCHEMA:
            raise ValueError(f"schema {spec.get('schema')!r}: expected {SCHEMA}")
        plain = json.loads(canonical_json(dict(spec)))
        entry = Entry(self.root, self.directory(entry_key(plain)), plain)
        with suppress(FileNotFoundError):
            read_spec(entry.directory)
        return entry

    def directory(self, key: str) -> Path:
        """Return the folder of an entry."""
        return self.entries_dir / key[:2] / key

    def all_keys(self) -> list[str]:
        """Return the keys of all entries, sorted; unusable ones too, such as shards without a spec.json."""
        with cache_errors("list", self.entries_dir):
            return [
                folder.name
                for group in files.subfolders(self.entries_dir)
                for folder in files.subfolders(group)
                if KEY_NAME.fullmatch(folder.name)
                and folder.name[:2] == group.name
                and ((folder / "spec.json").exists() or files.list_folder(folder / "shards"))
            ]

    def find(self, prefix: str, *, repair: bool = False) -> Entry:
        """Return the one entry whose key begins with `prefix`.

        Args:
            prefix: The key, or its beginning.
            repair: False only looks at the entry: nothing is quarantined, healed or marked as used.

        Raises:
            UsageError: No entry, or more than one.
            StorageError: Its spec.json was edited, is damaged, or was written by a newer tlcli.
        """
        found = [key for key in self.all_keys() if key.startswith(prefix.lower())] if prefix else []
        if len(found) != 1:
            problem = f"{len(found)} entries of the cache have" if found else "No entry of the cache has"
            raise UsageError(f"{problem} a key that begins with {prefix!r}.", hint="See `tlcli cache list`.")
        directory = self.directory(found[0])
        with cache_errors("read", directory / "spec.json"):
            return Entry(self.root, directory, read_spec(directory), repair=repair)

    def entries(self) -> list["Summary"]:
        """Return a summary of every entry, last used first; nothing is changed by looking."""
        summaries = [self._summary(key) for key in self.all_keys()]
        return sorted(summaries, key=lambda summary: (-summary.last_used, summary.key))

    def _summary(self, key: str) -> "Summary":
        directory = self.directory(key)
        spec: dict[str, Any] | None = None
        problem, num_rows, shards = None, 0, tuple[Shard, ...]()
        try:
            entry = self.find(key)
            spec, num_rows, shards = entry.spec, len(entry.rows()), entry.shards()
        except (StorageError, UsageError) as error:
            problem = error.message
        with cache_errors("read", directory):
            used = last_used(directory)
            return Summary(key, spec, problem, num_rows, shards, files.tree_bytes(directory), used)

    def closest(self, spec: Mapping[str, Any]) -> tuple[str, list[str]] | None:
        """Return the key of the entry that differs in the fewest facts, and these facts: why it is a miss."""
        known = [(item.key, explain(item.spec, spec)) for item in self.entries() if item.spec]
        return min(known, key=lambda item: len(item[1]), default=None)

    def num_bytes(self) -> int:
        """Return the bytes of all entries, quarantined files included and trash excluded."""
        with cache_errors("read", self.root):
            return files.tree_bytes(self.entries_dir)

    def check_space(self, num_bytes: int) -> None:
        """Refuse work whose rows would not fit, before it begins.

        Args:
            num_bytes: Predicted bytes of new rows.

        Raises:
            StorageError: The cap or the free-space reserve would be broken; the message has the numbers.
        """
        if num_bytes <= 0:
            return
        hint = "Make room (`tlcli cache prune --max-size SIZE`), or set TLCLI_HOME to a larger disk."
        need = f"The new features need {size_text(num_bytes)} in {str(self.root)!r};"
        if self.max_bytes is not None and (used := self.num_bytes()) + num_bytes > self.max_bytes:
            cap = f"{size_text(used)} are used of the cache's cap of {size_text(self.max_bytes)}."
            raise StorageError(
                f"{need} {cap}",
                hint="Make room (`tlcli cache prune --max-size SIZE`), or raise --cache-max-size.",
            )
        free = self._disk_bytes()
        if num_bytes > free:
            all_free, kept = size_text(free + self.min_free_bytes), size_text(self.min_free_bytes)
            raise StorageError(f"{need} {all_free} are free, {kept} of them kept in reserve.", hint=hint)

    def free_bytes(self) -> int:
        """Return the bytes that may still be written below cap and reserve; may be negative.

        Raises:
            StorageError: It cannot be measured.
        """
        on_disk = self._disk_bytes()
        return on_disk if self.max_bytes is None else min(on_disk, self.max_bytes - self.num_bytes())

    def _disk_bytes(self) -> int:
        """Return the bytes that the disk has free without the reserve."""
        existing = self.root
        with cache_errors("measure free space for", self.root):
            while not existing.exists():
                existing = existing.parent
            status = os.statvfs(existing)
        return status.f_bavail * status.f_frsize - self.min_free_bytes

    def check_writable(self) -> None:
        """Make the cache folder and try to write in it, so that a refusal comes before the work.

        Raises:
            StorageError: It cannot be made or written.
        """
        with cache_errors("write in the cache folder", self.root):
            tag_root(self.root)
            files.make_folder(self.entries_dir)


@dataclass(frozen=True)
class Summary:
    """One line of `tlcli cache list`.

    Attributes:
        key: Entry key.
        spec: The facts, or None when they cannot be trusted.
        problem: Why they cannot.
        num_rows: Distinct rows in valid shards.
        shards: Valid shards.
        num_bytes: All files of the entry.
        last_used: Seconds since 1970, up to TOUCH_SECONDS early.
    """

    key: str
    spec: dict[str, Any] | None
    problem: str | None
    num_rows: int
    shards: tuple[Shard, ...]
    num_bytes: int
    last_used: float
