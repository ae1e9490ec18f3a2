"""stdout carries the result alone; user text reaches the terminal as text."""

import io
import json
import logging

import pytest
from rich.console import Console

from tlcli.cli import output
from tlcli.cli.output import Output, cell, table
from tlcli.warned import warn
from tlcli.wording import printable


@pytest.fixture(autouse=True)
def handlers():
    logger = logging.getLogger("tlcli")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def shown(renderable):
    stream = io.StringIO()
    Console(file=stream, width=500).print(renderable)
    return stream.getvalue()


def test_a_document_has_its_schema_and_is_alone(capsys):
    out = Output(json_document=True)
    out.plan("title", {"a": 1})
    out.note("note")
    out.hint("tlcli next")
    warn("leakage", "careful")
    warn("leakage", "careful")
    out.result("cache.list", {"entries": ["\udcff\n"]}, "text for people")
    captured = capsys.readouterr()
    warnings = [{"code": "leakage", "message": "careful"}]
    document = {"schema": "tlcli.cache.list/1", "entries": ["\udcff\n"], "warnings": warnings}
    assert json.loads(captured.out) == document
    for text in ("title", "note", "tlcli next", "careful"):
        assert text in captured.err
    assert "text for people" not in captured.out + captured.err


def test_nan_is_no_json():
    with pytest.raises(ValueError, match="JSON"):
        Output(json_document=True).result("x", {"value": float("nan")})


def test_quiet_keeps_warnings_only(capsys):
    out = Output(quiet=True)
    out.plan("title", {"a": 1})
    out.note("note")
    out.hint("next")
    warn("leakage", "careful")
    logging.getLogger("tlcli.x").info("information")
    logging.getLogger("tlcli.x").warning("log warning")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: careful\nwarning: log warning\n"


@pytest.mark.parametrize(("verbose", "expected"), [(False, False), (True, True)])
def test_details_come_with_verbose(capsys, verbose, expected):
    Output(verbose=verbose)
    logging.getLogger("tlcli.x").debug("detail")
    logging.getLogger("tlcli.x").info("information")
    err = capsys.readouterr().err
    assert ("detail" in err) is expected
    assert "information" in err


MARKUP = "[red]x[/red] [/] [bold"


def test_user_text_is_not_markup(capsys):
    out = Output()
    out.plan(MARKUP, {MARKUP: MARKUP})
    out.note(MARKUP)
    warn("leakage", MARKUP)
    out.hint(MARKUP)
    logging.getLogger("tlcli.x").warning("%s", MARKUP)
    output.print_error(MARKUP, MARKUP)
    out.result("x", {}, MARKUP, table([MARKUP], [[MARKUP]], title=MARKUP))
    captured = capsys.readouterr()
    assert captured.err.count(MARKUP) == 9
    assert captured.out.count(MARKUP) == 4


def test_cells():
    assert cell(None) == "-"
    assert cell(0.123456) == "0.1235"
    assert cell(12) == "12"
    assert cell("a\nb\x1b[31m\udcff") == r"a\nb\x1b\[31m\udcff".replace(r"\[", "[")


def test_printable_shows_controls_and_keeps_letters():
    assert printable("Käse 猫.jpg") == "Käse 猫.jpg"
    assert printable("a\tb\r\u202e\x00") == r"a\tb\r\u202e\x00"


def test_a_table_in_a_pipe_keeps_each_row_on_one_line():
    text = shown(table(["file", "n"], [["x" * 300, 1], ["y", 22]]))
    assert len(text.splitlines()) == 3
    assert text.splitlines()[2].endswith("22")


def test_a_wide_table_is_not_wrapped(capsys):
    Output().result("x", {}, table(["file"], [["word " * 100]]))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_bar_without_a_terminal():
    assert type(Output().progress).__name__ == "Silent"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_drawn_on_a_terminal_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    out = Output()
    out.progress.start("computing [features]", 10)
    out.progress.advance(4)
    out.progress.finish()
    out.progress.advance()  # after the end: ignored
    out.progress.finish()
    assert type(Output(quiet=True).progress).__name__ == "Silent"
    assert type(Output(json_document=True).progress).__name__ == "Silent"
