"""Every numbered bad input has a test of its number, or a reason why it has none."""

import ast
import re
from pathlib import Path

NUMBERS = {*range(1, 83), *range(119, 145)}
"""Images, folders, CSV files, checkpoints (1 to 82); resuming, command line, environment (119 to 144).

Those between are faults of the cache and the disk, which tests/cache and tests/faults cover.
"""

LEFT_OUT: dict[int, str] = {}
"""Number -> why no test bears it."""


def numbers_tested():
    """Return the numbers that the names of the tests beside this one begin with."""
    found = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = node.name if isinstance(node, ast.FunctionDef) else ""
            if match := re.match(r"test_((?:\d{3}_(?:and_)?)+)", name):
                found |= {int(number) for number in re.findall(r"\d{3}", match[1])}
    return found


def test_every_item_has_a_test_or_a_reason():
    missing = sorted(NUMBERS - numbers_tested() - LEFT_OUT.keys())
    assert not missing, f"no test bears the numbers {missing}"
    assert not numbers_tested() & LEFT_OUT.keys()
    assert not LEFT_OUT.keys() - NUMBERS
    assert all(len(reason) > 20 for reason in LEFT_OUT.values())
