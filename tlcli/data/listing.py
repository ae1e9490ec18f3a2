"""CSV and TSV files that list images: text to rows, with a line number for every complaint, and back.

Cells are kept exactly as written: "01" is not "1", "NA" is a class, a space at the end stays. Which files the
rows name, and whether they fit together, is the business of scan.py.
"""

import codecs
import contextlib
import csv
import difflib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tlcli.errors import DataError, StorageError, UsageError
from tlcli.option_groups import DataOptions

DELIMITERS: Mapping[str, str] = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
MAX_LINE_CHARACTERS = 2**20
MAX_PROBLEMS = 10
_FORMAT_HINT = (
    "Expected UTF-8 text: a header line `filename,label` (also `split` and `group` if you like), "
    "then a line an image."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file, as written.

    Attributes:
        line: Number of the line it begins on, from 1.
        filename: The path, relative to the file's folder; bytes that are no UTF-8 as surrogate escapes.
        label: The class.
        split: Empty when blank or when there is no such column.
        group: Empty when blank or when there is no such column.
    """

    line: int
    filename: str
    label: str
    split: str
    group: str


class Problems:
    """Collects what is wrong with a file, to say up to MAX_PROBLEMS of it at once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: int, text: str) -> None:
        """Count a problem on line `line`."""
        self.count += 1
        if len(self.lines) < MAX_PROBLEMS:
            self.lines.append(f"line {line}: {text}")

    def check(self, hint: str | None = None) -> None:
        """Raise what was collected.

        Raises:
            DataError: There was a problem.
        """
        if not self.count:
            return
        more = f"\n  and {self.count - len(self.lines)} more" if self.count > len(self.lines) else ""
        noun = "problem" if self.count == 1 else "problems"
        raise DataError(
            f"{self.source!r} has {self.count} {noun}:\n  " + "\n  ".join(self.lines) + more, hint=hint
        )


def read_rows(path: str, options: DataOptions) -> list[Row]:
    """Return the rows of a CSV or TSV file, blank lines left out.

    Args:
        path: The file; a name that ends in .tsv or .tab has tabs between cells, any other commas.
        options: The names of the columns.

    Raises:
        DataError: The text is not UTF-8, a column is missing or named twice, or a row is too short, too long
            or cannot be parsed; with the line numbers, up to MAX_PROBLEMS of them.
        StorageError: The file cannot be read.
    """
    try:
        with open(path, "rb") as raw:
            _check_encoding(path, raw.peek(4)[:4] if isinstance(raw, io.BufferedReader) else b"")
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
            return _parse(path, stream, options)
    except OSError as error:
        raise StorageError(f"{path!r} cannot be read: {error.strerror}.") from error


def check_output(path: str, *, overwrite: bool) -> None:
    """Refuse a CSV or TSV file that must not be written, before the work that it would hold.

    Raises:
        UsageError: The file exists and must not be replaced, or its name does not end in .csv or .tsv.
    """
    if os.path.splitext(path)[1].lower() not in DELIMITERS:
        raise UsageError(
            f"Output {path!r} has no known format.", hint="Expected a name ending in .csv or .tsv."
        )
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"Output {path!r} exists.", hint="Choose another name, or add --overwrite.")


def write_rows(path: str, rows: Sequence[Row], *, overwrite: bool) -> None:
    """Write rows as CSV or TSV that `read_rows` gives back, durably and all at once.

    Args:
        path: The file; .tsv and .tab give tabs, any other name commas.
        rows: What to write, in order; the group column is left out when no row has a group.
        overwrite: Whether an existing file may be replaced.

    Raises:
        UsageError: The file exists and must not be replaced, or its name does not end in .csv or .tsv.
        DataError: A label is not UTF-8 text.
        StorageError: The file cannot be written.
    """
    check_output(path, overwrite=overwrite)
    for row in rows:
        if not_utf8(row.label):
            raise DataError(f"Label {row.label!r} is not UTF-8 text, so that no CSV file can hold it.")
    names = ["filename", "label", "split"] + (["group"] if any(row.group for row in rows) else [])
    cells = [[getattr(row, name) for name in names] for row in rows]
    # csv quotes a carriage return by itself only where it also ends the lines with one.
    odd = any("\r" in cell for row in cells for cell in row)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            delimiter = DELIMITERS[os.path.splitext(path)[1].lower()]
            writer = csv.writer(
                stream,
                delimiter=delimiter,
                lineterminator="\n",
                quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL,
            )
            writer.writerow(names)
            writer.writerows(cells)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise StorageError(f"{path!r} cannot be written: {error.strerror}.") from error


def not_utf8(text: str) -> bool:
    """Return whether `text` holds bytes that were no UTF-8 (as surrogate escapes)."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _check_encoding(path: str, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise DataError(
            f"{path!r} is UTF-16 or UTF-32 text, expected UTF-8.",
            hint="Convert it: iconv -f UTF-16 -t UTF-8 OLD.csv > NEW.csv",
        )
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise DataError(f"{path!r} is compressed, expected plain text.", hint="Unpack it first.")


def _lines(path: str, stream: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE_CHARACTERS + 1):
        number += 1
        if len(line) > MAX_LINE_CHARACTERS:
            raise DataError(
                f"{path!r}, line {number} has more than {MAX_LINE_CHARACTERS:,} characters.",
                hint=_FORMAT_HINT,
            )
        if "\0" in line:
            raise DataError(
                f"{path!r}, line {number} holds a NUL byte: this is not plain UTF-8 text.", hint=_FORMAT_HINT
            )
        yield line


def _parse(path: str, stream: io.TextIOWrapper, options: DataOptions) -> list[Row]:
    delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower(), ",")
    reader = csv.reader(_lines(path, stream), delimiter=delimiter, strict=True)
    problems = Problems(path)
    rows: list[Row] = []
    header: list[str] | None = None
    columns: list[int | None] = []
    line = 1
    try:
        for cells in reader:
            if not cells:
                pass
            elif header is None:
                header = cells
                columns = _columns(path, header, delimiter, options)
            elif len(cells) != len(header):
                problems.add(line, f"{len(cells)} cells, expected {len(header)} as in the header")
            else:
                rows.append(Row(line, *("" if at is None else cells[at] for at in columns)))
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(line, f"{error} (is a quotation mark not closed?)")
    if header is None:
        raise DataError(f"{path!r} is empty.", hint=_FORMAT_HINT)
    problems.check("Quote cells that hold the separator or a quotation mark.")
    return rows


def _columns(path: str, header: list[str], delimiter: str, options: DataOptions) -> list[int | None]:
    """Return where the filename, label, split and group columns are; None for one that is absent."""
    for number, name in enumerate(header):
        if name in header[:number]:
            raise DataError(
                f"{path!r}, line 1 names column {name!r} twice.", hint="Give every column a name of its own."
            )
    wanted = {
        "filename_column": options.filename_column,
        "label_column": options.label_column,
        "split_column": options.split_column,
        "group_column": options.group_column,
    }
    return [_column(path, header, delimiter, field, name) for field, name in wanted.items()]


def _column(path: str, header: list[str], delimiter: str, field: str, name: str) -> int | None:
    if name in header:
        return header.index(name)
    default = DataOptions.__dataclass_fields__[field].default
    if field in ("split_column", "group_column") and name == default:
        return None
    found = ", ".join(repr(cell) for cell in header[:20])
    message = f"{path!r}, line 1 has no column {name!r}; it has {found}."
    for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            expected = "tabs in a .tsv file" if delimiter == "\t" else "commas in a .csv file"
            raise DataError(
                f"{path!r} has {word} between its cells, expected {expected}.",
                hint="Save it with commas as .csv, or with tabs as .tsv.",
            )
    near = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
    flag = "--" + field.replace("_", "-")
    raise DataError(
        message,
        hint=f"Name the column with {flag} {near[0]!r}." if near else f"{_FORMAT_HINT} {flag} names it.",
    )
