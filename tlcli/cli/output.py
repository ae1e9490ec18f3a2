"""The only writer to stdout and stderr.

stdout carries the result and nothing else: tables for people, or one JSON document with --json. Everything
else (plan, progress, notes, hints, errors) goes to stderr. User text is escaped before rich sees it.
"""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tlcli import warned
from tlcli.machine import processes
from tlcli.progress import Progress, Silent
from tlcli.wording import printable

SCHEMA_VERSIONS = {"data.check": 2, "data.split": 2}  # of the others: 1


class Output:
    """Where one command writes. Of several processes the first alone does; the others tell of errors only.

    Args:
        json_document: Print one JSON document on stdout instead of tables.
        quiet: Only warnings and errors on stderr.
        verbose: Debug messages too.
        dry_run: The command must stop after its plan.
    """

    def __init__(
        self,
        *,
        json_document: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        dry_run: bool = False,
    ) -> None:
        self.json = json_document
        self.main = processes.is_main()
        self.quiet = quiet = quiet or not self.main
        self.dry_run = dry_run
        self.printed = False
        # A table in a file or pipe is not wrapped, so that each of its rows stays one line.
        width = None if sys.stdout.isatty() else 4096
        self._out = _Stdout(file=sys.stdout, soft_wrap=True, highlight=False, width=width)
        self._err = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self.progress: Progress = Silent()
        # FORCE_COLOR makes rich take any file for a terminal: a bar would flood it with lines.
        if sys.stderr.isatty() and not self._err.is_dumb_terminal and not quiet and not json_document:
            self.progress = Bar(self._err)
        level = (
            logging.ERROR
            if not self.main
            else logging.WARNING
            if quiet
            else logging.DEBUG
            if verbose
            else logging.INFO
        )
        self._warnings: list[dict[str, str]] = []
        logger = logging.getLogger("tlcli")
        logger.handlers = [_Handler(self._err, self._warnings)]
        logger.setLevel(level)
        logger.propagate = False

    def result(self, name: str, document: Mapping[str, Any], *renderables: Table | str) -> None:
        """Print the result: the document with its schema as JSON, or the renderables for people.

        Args:
            name: What the document is, such as "cache.list"; the schema becomes "tlcli.cache.list/1".
            document: JSON-able values; NaN is refused. Its `warnings` are those that it has and all that
                were given before.
            *renderables: Tables, or text printed as it is.
        """
        self.printed = True
        if not self.main:
            return
        if self.json:
            warnings = warned.add(list(document.get("warnings", [])), self._warnings)
            document = {"schema": schema(name), **document, "warnings": warnings}
            self.write(json.dumps(document, indent=2, allow_nan=False))
            return
        for item in renderables:
            self._out.print(_lines(item) if isinstance(item, str) else item)

    def write(self, line: str) -> None:
        """Write one line of a stream of results (CSV, JSON lines) to stdout, at once."""
        if not self.main:
            return
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def plan(self, title: str, facts: Mapping[str, object]) -> None:
        """Print what is about to be done, on stderr."""
        if self.quiet:
            return
        self._err.print(f"[bold]{escape(printable(title))}[/bold]")
        width = max(map(len, facts), default=0)
        for key, value in facts.items():
            self._err.print(f"  [dim]{escape(key.ljust(width))}[/dim]  {escape(printable(str(value)))}")

    def note(self, text: str) -> None:
        """Print a line for the user on stderr."""
        if not self.quiet:
            self._err.print(_lines(text))

    def hint(self, text: str) -> None:
        """Print what to do next on stderr."""
        if not self.quiet:
            self._err.print(f"[dim]next:[/dim] {escape(printable(text))}")


def schema(name: str) -> str:
    """Return the schema of the document called `name`."""
    return f"tlcli.{name}/{SCHEMA_VERSIONS.get(name, 1)}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """Return a table; numbers are set to the right, None is shown as a dash, text is escaped."""
    cells = [list(row) for row in rows]
    result = Table(
        title=escape(printable(title)) if title else None, title_justify="left", box=None, pad_edge=False,
        header_style="bold", show_header=any(columns),
    )  # fmt: skip
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], int | float) for row in cells)
        result.add_column(escape(printable(column)), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        result.add_row(*(cell(value) for value in row))
    return result


def cell(value: object) -> str:
    """Return a table cell's text: floats to four digits, None as a dash, control characters made visible."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(printable(str(value)))


def _lines(text: str) -> str:
    """Return `text` for rich, its line breaks kept and all else as `printable` has it."""
    return escape("\n".join(map(printable, text.split("\n"))))


def print_error(message: str, hint: str | None = None) -> None:
    """Print an error, and what to do about it, on stderr."""
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {_lines(message)}")
    if hint:
        console.print(f"  {_lines(hint)}")


class _Stdout(Console):
    """A console that leaves it to app.py what to do when the reader of stdout is gone."""

    def on_broken_pipe(self) -> None:
        raise


class Bar:
    """A Progress drawn as a bar with rate and time left on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._unit = ""

    def start(self, stage: str, total: int | None = None, unit: str = "images") -> None:
        """Draw a new bar."""
        from rich import progress

        self.finish()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
        )
        self._unit = unit
        self._bar.add_task(escape(stage), total=total, rate="", text="")
        self._bar.start()

    def advance(self, amount: int = 1) -> None:
        """Move the bar."""
        if self._bar is not None:
            task = self._bar.tasks[0]
            rate = f"{task.speed:,.0f} {self._unit}/s" if task.speed else ""
            self._bar.update(task.id, advance=amount, rate=rate)

    def describe(self, text: str) -> None:
        """Show a text after the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, text=escape(text))

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Handler(logging.Handler):
    """Writes the library's messages to stderr and collects its warnings."""

    def __init__(self, console: Console, warnings: list[dict[str, str]]) -> None:
        super().__init__()
        self._console = console
        self._warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        text = _lines(record.getMessage())
        prefix = "[yellow]warning:[/yellow] " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + text)
        if code := getattr(record, "code", None):
            warned.add(self._warnings, [{"code": code, "message": record.getMessage()}])
