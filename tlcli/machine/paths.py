"""Where tlcli keeps state on disk, and every environment variable it reads.

Functions read the environment when they are called, never at import, and make no folder when only asked
for a path. What each folder holds is specified in docs/formats.md.

| variable      | type   | default                  | meaning                                             |
|---------------|--------|--------------------------|-----------------------------------------------------|
| TLCLI_HOME    | path   | $XDG_CACHE_HOME/tlcli    | the feature cache and other state                   |
| TLCLI_OFFLINE | flag   | unset                    | as --offline: never ask a hub for weights           |
| TLCLI_DEVICE  | string | auto                     | as --device: auto, cpu, cuda, cuda:0, mps           |
| TLCLI_WORKERS | int    | one per core, at most 16 | as -j/--workers: threads that decode images         |
| TLCLI_JSON    | flag   | unset                    | as --json: print one JSON document                  |

A flag is set by any value but the empty string, 0, false, no and off.
"""

import os
from pathlib import Path

from tlcli.errors import StorageError
from tlcli.machine import processes

FALSE_WORDS = {"", "0", "false", "no", "off"}


def flag(name: str) -> bool:
    """Return whether the environment variable `name` is set to something other than a word for no."""
    return os.environ.get(name, "").strip().lower() not in FALSE_WORDS


def home() -> Path:
    """Return the folder of tlcli's state: TLCLI_HOME, else $XDG_CACHE_HOME/tlcli, else ~/.cache/tlcli.

    Raises:
        StorageError: None of them is set, and this user has no home folder.
    """
    if value := os.environ.get("TLCLI_HOME"):
        return Path(value).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser().absolute() / "tlcli"
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise StorageError(
            "There is no home folder to keep the feature cache in.", hint="Set TLCLI_HOME to a folder."
        ) from error


def features_dir() -> Path:
    """Return the root of the feature cache (which need not exist yet)."""
    return home() / "features"


def offline() -> bool:
    """Return whether hubs must not be asked: TLCLI_OFFLINE or HF_HUB_OFFLINE is set."""
    return flag("TLCLI_OFFLINE") or flag("HF_HUB_OFFLINE")


def default_workers() -> int:
    """Return how many threads decode images by default: one per usable core, at most 16.

    Processes that torchrun starts on one machine share its cores.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, usable // processes.local_world_size()))
