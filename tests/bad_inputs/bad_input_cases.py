"""How cases are listed, and what they must leave as it was."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest


def rarely(*values: Any) -> list[Any]:
    """Return parameters that run with -m slow alone: more of what the others show."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def tree(*roots: str | Path) -> dict[bytes, tuple[int, bytes]]:
    """Return path -> mode and content of everything below the roots; of huge files only the beginning."""
    found = {}
    for root in roots:
        for folder, folders, files in os.walk(os.fsencode(root)):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                mode = os.lstat(path).st_mode
                content = b""
                if stat.S_ISREG(mode):
                    with open(path, "rb") as stream:
                        content = stream.read(2**16)
                found[path] = (mode, content)
    return found
