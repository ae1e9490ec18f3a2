"""What happens to a damaged shard: its intact rows are published anew, and it goes to quarantine.

quarantine/ holds each damaged shard under its own name, and beside it NAME.txt with the reason.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tlcli.cache.entry_files import make_own_folder
from tlcli.cache.index import Index
from tlcli.cache.shard import DamagedShard, RowFormat, Shard, open_shard, write_shard
from tlcli.machine import files
from tlcli.warned import warn


@dataclass(frozen=True)
class Damage:
    """A damaged shard: its file name, why, and how many of its rows are lost (None: it cannot be told)."""

    shard: str
    reason: str
    rows_lost: int | None


class Healer:
    """Takes the damaged shards of one entry out of the way.

    Args:
        directory: The entry's folder, whose name is its key.
        row_format: Type and shape of a row.
        index: Told which files to open anew.
        repair: False only looks: damage is noted, and nothing changed.

    Attributes:
        damage: What was found damaged so far.
    """

    def __init__(self, directory: Path, row_format: RowFormat, index: Index, *, repair: bool) -> None:
        self.damage: list[Damage] = []
        self._key, self._row_format, self._index, self._repair = directory.name, row_format, index, repair
        self._shards_dir, self._quarantine_dir = directory / "shards", directory / "quarantine"

    def heal(self, shard: Shard, reason: str) -> None:
        """Publish a damaged shard's intact rows anew, then move it to quarantine.

        What cannot be done (a full disk, a folder that may only be read) stays undone: the damaged rows are
        not in the index and so count as missing.
        """
        name = shard.path.name
        self._index.stale = True
        if not self._repair:
            self.damage.append(Damage(name, reason, shard.num_damaged))
            return
        try:
            # As the file is now: another process may have published its rows again under this name.
            shard = open_shard(shard.path, self._key, self._row_format)
            kept_keys, kept_rows = [shard.keys[:0]], [np.empty((0, shard.row_bytes), np.uint8)]
            for part, data, intact in shard.read(np.arange(len(shard.keys))):
                kept_keys.append(shard.keys[part][intact])
                kept_rows.append(data[intact])
            if shard.sound.any():
                keys, rows = np.concatenate(kept_keys), np.concatenate(kept_rows)
                new = write_shard(self._shards_dir, self._key, self._row_format, shard.env, keys, rows)
                if new == name:
                    self._index.forget(name)
                    return
        except FileNotFoundError:
            return
        except DamagedShard as error:
            self.quarantine(name, str(error))
        except OSError as error:
            warn("damaged_shard", f"Damaged shard {shard.path} is left in place: {error}.")
            self.damage.append(Damage(name, reason, shard.num_damaged))
        else:
            self.quarantine(name, reason, shard.num_damaged)

    def quarantine(self, name: str, reason: str, rows_lost: int | None = None) -> bool:
        """Move a damaged shard away with its reason; return whether it is out of the way."""
        self.damage.append(Damage(name, reason, rows_lost))
        if not self._repair:
            return False
        try:
            make_own_folder(self._quarantine_dir)
            files.publish(self._quarantine_dir / f"{name}.txt", [f"{reason}\n".encode()])
            files.move(self._shards_dir / name, self._quarantine_dir / name)
        except FileNotFoundError:  # another process was quicker
            return True
        except OSError as error:
            warn("damaged_shard", f"Damaged shard {name} is ignored ({reason}) but left in place: {error}.")
            return False
        self._index.forget(name)
        with suppress(OSError):
            files.touch(self._quarantine_dir / name)  # prune keeps it for 30 days from now
        warn("damaged_shard", f"Damaged shard moved to {self._quarantine_dir / name}: {reason}.")
        return True
