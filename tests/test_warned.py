"""Warnings have documented codes, and there is no other way to give one."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlcli.warned import CODES, Warned, collected, warn

ROOT = Path(__file__).parents[1]
GIVING = {"warn", "Warned"}  # functions whose first argument is a code
BARE = {"warning", "warn", "warn_explicit"}  # methods that warn without one


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "tlcli").rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def bare(tree: ast.AST) -> list[int]:
    """Return the lines that warn without a code."""
    return [
        node.lineno for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in BARE
    ]  # fmt: skip


def codes(tree: ast.AST) -> set[str]:
    """Return the codes that are given, as they are written."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in GIVING:
            first = node.args[0]
            parts = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            found |= {str(part.value) for part in parts if isinstance(part, ast.Constant)}
    return found


def test_nothing_warns_without_a_code() -> None:
    found = {name: lines for name, tree in trees() if (lines := bare(tree)) and name != "tlcli/warned.py"}
    assert not found


@pytest.mark.parametrize(
    "line", ["logger.warning('x')", "out.warn('x')", "Thread(target=logger.warning)", "warnings.warn('x')"]
)
def test_a_bare_warning_is_found(line: str) -> None:
    assert bare(ast.parse(line)) == [1]


def test_every_code_is_given_somewhere_and_every_code_that_is_given_has_a_meaning() -> None:
    from tlcli.data import audit

    given = set().union(*(codes(tree) for _, tree in trees()))
    assert given <= set(CODES)
    # Those of `data check` are made from the kinds of its findings.
    source = Path(audit.__file__).read_text(encoding="utf-8")
    kinds = re.findall(r'Finding\(\s*(?:"error" if above else )?"warning",\s*"([a-z-]+)"', source)
    of_findings = {audit.Finding("warning", kind, "").warned.code for kind in kinds if kind != "scan"}
    assert len(of_findings) >= 7
    assert of_findings <= set(CODES)
    assert set(CODES) == given | of_findings


def test_codes_are_snake_case_and_documented_as_they_are() -> None:
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in CODES)
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    section = text.partition("## Warnings")[2].partition("\n## ")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)) == CODES


def test_a_code_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="'odd' is not a code"):
        warn("odd", "text")
    with pytest.raises(ValueError, match="not a code"):
        Warned("odd", "text").document()


def test_the_record_has_the_code_and_the_message_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    warn("leakage", "100 %s {}")
    (record,) = caplog.records
    assert record.name.startswith("tlcli.")
    assert (record.levelname, record.getMessage()) == ("WARNING", "100 %s {}")
    assert record.__dict__["code"] == "leakage"


def test_collected_takes_what_the_loggers_do_not_let_through_once_and_in_order() -> None:
    logger = logging.getLogger("tlcli")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with collected([{"code": "odd_format", "message": "before"}]) as outer:
            warn("leakage", "a")
            with collected() as inner:
                warn("images_skipped", "b")
                warn("leakage", "a")
            warn("leakage", "c")
    finally:
        logger.setLevel(level)
    warn("leakage", "afterwards")
    leak = [{"code": "leakage", "message": text} for text in "ac"]
    skipped = {"code": "images_skipped", "message": "b"}
    assert outer == [{"code": "odd_format", "message": "before"}, leak[0], skipped, leak[1]]
    assert inner == [skipped, leak[0]]
