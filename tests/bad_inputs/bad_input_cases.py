"""How cases are listed, and what they must leave as it was."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TINY_HEADS


def rarely(*values: Any) -> list[Any]:
    """Return parameters that run with -m slow alone: more of what the others show."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def refused_alike(
    run_cli: Callable[..., Any],
    data: Path,
    *expected: str,
    code: int = 3,
    commands: tuple[tuple[str, ...], ...] = (("data", "check"), ("finetune", *TINY_HEADS)),
) -> str:
    """Check that looking at the data and training on it are refused alike, and leave everything as it was.

    Returns:
        What the last command wrote on stderr.
    """
    for command in commands:
        before = tree(Path.cwd(), data.parent)
        done = run_cli(*command, data)
        assert (done.code, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        for text in expected:
            assert text in done.stderr
        assert tree(Path.cwd(), data.parent) == before
    return str(done.stderr)


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


def layout_warnings(document: dict[str, Any]) -> list[str]:
    """Return what a document of `data check` or `data split` warns of about the layout of the data."""
    codes = {"ignored_files", "empty_class_folder", "similar_class_names"}
    return [warning["message"] for warning in document["warnings"] if warning["code"] in codes]
