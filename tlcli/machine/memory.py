"""How much memory is left for data, and which errors say that there was too little."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
ASSUMED_SHARE = 0.5  # of all memory, where the system does not say what is left


def available_bytes() -> int:
    """Return the bytes a process can still take without swapping, a container's limit included."""
    left = _left_on_the_machine()
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(CGROUP / limit_name), _number(CGROUP / used_name)
        if limit is not None and used is not None:
            left = min(left, max(0, limit - used))
    return left


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is used up, the machine's or a GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    texts = ("can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED", "can't start new thread")
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in texts)


def _left_on_the_machine() -> int:
    try:
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return int(ASSUMED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, as for the word `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
