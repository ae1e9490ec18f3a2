"""CSV and TSV files that list images: text to rows, with a line number for every complaint, and back.

Cells are kept exactly as written: "01" is not "1", "NA" is a class, a space at the end stays. Which files the
rows name, and whether they fit together, is looked at here too, once all rows are read.
"""

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlcli.config.data import DataOptions
from tlcli.data.dataset import SPLIT_NAMES, Dataset, Found, is_inside, make_dataset, own_classes
from tlcli.errors import DataError, UsageError
from tlcli.machine import files
from tlcli.warned import Warned
from tlcli.wording import near_misses

DELIMITERS: Mapping[str, str] = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
MAX_RECORD_CHARACTERS = 2**20  # a record is one line, or several where a quoted cell holds line breaks
MAX_PROBLEMS = 10
MAX_PROBLEM_CHARACTERS = 500
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
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


class ListingProblems:
    """Collects what is wrong with a file, to say up to MAX_PROBLEMS of it at once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: int, text: str) -> None:
        """Count a problem on line `line`."""
        self.count += 1
        if len(self.lines) < MAX_PROBLEMS:
            self.lines.append(f"line {line}: {_shortened(text)}")

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


def read_listing(path: str, options: DataOptions) -> list[Row]:
    """Return the rows of a CSV or TSV file, blank lines left out.

    Args:
        path: The file; a name that ends in .tsv or .tab has tabs between cells, any other commas.
        options: The names of the columns.

    Raises:
        DataError: The text is not UTF-8, a column is missing or named twice, or a row is too short, too long
            or cannot be parsed; with the line numbers, up to MAX_PROBLEMS of them.
        StorageError: The file cannot be read.
    """
    hint = "Give yourself permission to read it."
    with files.storage_errors("read", path, hint=hint), open(path, "rb") as raw:
        _check_encoding(path, raw.peek(4)[:4] if isinstance(raw, io.BufferedReader) else b"")
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        return _parse(path, stream, options)


def spreadsheet_cell(text: str) -> str:
    """Return `text` for a CSV file that people open: with a quotation mark before what would be a formula.

    A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@`; numbers are left alone.
    """
    return f"'{text}" if _is_formula(text) else text


def plain_cell(cell: str) -> str:
    """Return the text of which `spreadsheet_cell` made `cell`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    if not _FORMULA.match(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def check_listing_path(path: str, *, overwrite: bool) -> None:
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


def write_listing(path: str, rows: Sequence[Row], *, overwrite: bool) -> None:
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
    check_listing_path(path, overwrite=overwrite)
    for row in rows:
        if not_utf8(row.label):
            raise DataError(f"Label {row.label!r} is not UTF-8 text, so that no CSV file can hold it.")
    names = ["filename", "label", "split"] + (["group"] if any(row.group for row in rows) else [])
    cells = [[getattr(row, name) for name in names] for row in rows]
    # csv quotes a carriage return by itself only where it also ends the lines with one.
    odd = any("\r" in cell for row in cells for cell in row)
    delimiter = DELIMITERS[os.path.splitext(path)[1].lower()]
    quoting: Literal[0, 1] = csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL
    with (
        files.storage_errors("write", path, hint=files.OUTPUT_HINT),
        files.published(Path(path)) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=quoting)
        writer.writerow(names)
        writer.writerows(cells)


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


class _Lines:
    """The lines of a file, with a bound on what one record of them may hold.

    Attributes:
        num_characters: Of the lines since the reader last gave a record and set this back to 0.
    """

    def __init__(self, path: str, stream: io.TextIOWrapper) -> None:
        self.num_characters = 0
        self._path = path
        self._stream = stream
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(MAX_RECORD_CHARACTERS + 1):
            self._number += 1
            self.num_characters += len(line)
            if self.num_characters > MAX_RECORD_CHARACTERS:
                raise self._refusal(f"has more than {MAX_RECORD_CHARACTERS:,} characters.")
            if "\0" in line:
                raise self._refusal("holds a NUL byte: this is not plain UTF-8 text.")
            yield line

    def _refusal(self, what: str) -> DataError:
        return DataError(f"{self._path!r}, line {self._number} {what}", hint=_FORMAT_HINT)


def _parse(path: str, stream: io.TextIOWrapper, options: DataOptions) -> list[Row]:
    delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower(), ",")
    lines = _Lines(path, stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    problems = ListingProblems(path)
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
            lines.num_characters = 0
    except csv.Error as error:
        problems.add(line, f"{error} (is a quotation mark not closed?)")
    if header is None:
        raise DataError(f"{path!r} is empty.", hint=_FORMAT_HINT)
    problems.check("Quote cells that hold the separator or a quotation mark.")
    return rows


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM_CHARACTERS else text[:MAX_PROBLEM_CHARACTERS] + " ..."


def _columns(path: str, header: list[str], delimiter: str, options: DataOptions) -> list[int | None]:
    """Return where the filename, label, split and group columns are; None for one that is absent."""
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(
            f"{path!r}, line 1 names column {_shortened(repr(twice[0]))} twice.",
            hint="Give every column a name of its own.",
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
    header = header[:100]  # more would not be read, and comparing them all with `name` takes its time
    found = _shortened(", ".join(repr(cell) for cell in header[:20]))
    message = f"{path!r}, line 1 has no column {name!r}; it has {found}."
    for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            expected = "tabs in a .tsv file" if delimiter == "\t" else "commas in a .csv file"
            raise DataError(
                f"{path!r} has {word} between its cells, expected {expected}.",
                hint="Save it with commas as .csv, or with tabs as .tsv.",
            )
    near = near_misses(name, header, most=1, cutoff=0.5)
    flag = "--" + field.replace("_", "-")
    raise DataError(
        message,
        hint=f"Name the column with {flag} {near[0]!r}." if near else f"{_FORMAT_HINT} {flag} names it.",
    )


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


# ---- CSV --------------------------------------------------------------------------------------------------


def scan_listing(path: str, options: DataOptions, class_names: Sequence[str] | None) -> Dataset:
    """Return the data set that a CSV or TSV file lists.

    Args:
        path: The file, absolute.
        options: As given.
        class_names: Classes of a finished run, or None.

    Raises:
        DataError: The file names no images, one class, or contradicts itself.
        StorageError: The file cannot be read.
    """
    rows = read_listing(path, options)
    root = os.path.dirname(path)
    problems = ListingProblems(path)
    inside = _Containment(root, options.allow_outside_root)
    found: dict[str, tuple[Row, Found]] = {}
    ignored: Counter[str] = Counter()
    for row in rows:
        complaint = _row_complaint(row) or inside.complaint(row.filename)
        if complaint:
            problems.add(row.line, complaint)
            continue
        name = _existing_form(root, os.path.normpath(row.filename))
        split = SPLIT_NAMES[row.split.strip().lower()] if row.split.strip() else None
        item = Found(os.path.join(root, name), name, row.label, split, row.group or None)
        before = found.setdefault(item.path, (row, item))
        if before[1] is item:
            continue
        if before[1] == item:
            ignored["repeated rows"] += 1
        else:
            problems.add(row.line, _contradiction(before[0], before[1], item))
    problems.check(_csv_hint(problems))
    if not found:
        raise DataError(f"{path!r} lists no images.", hint="Expected a line an image below the header.")
    items = [item for _, item in found.values()]
    if not any(os.path.lexists(item.path) for item in items):
        raise DataError(
            f"None of the {len(items)} files that {path!r} lists is there, for example {items[0].path!r}.",
            hint="Paths are relative to the folder of the CSV file.",
        )
    text = f"Ignored {ignored['repeated rows']} repeated rows of {path!r}."
    warnings = [Warned("ignored_files", text)] if ignored else []
    names = own_classes(options, items, class_names, "Expected two or more different labels.")
    return make_dataset(Path(root), "csv", names, items, (ignored, warnings))


def _row_complaint(row: Row) -> str | None:
    if not row.filename.strip():
        return "no filename"
    if not row.label.strip():
        return f"no label for {row.filename!r}"
    if _URL.match(row.filename):
        return f"{row.filename!r} is a URL; tlcli reads files of this machine only"
    if not_utf8(row.label):
        return f"label {row.label!r} is not UTF-8 text"
    if row.split.strip() and row.split.strip().lower() not in SPLIT_NAMES:
        return f"split {row.split!r}, expected {', '.join(SPLIT_NAMES)} or nothing"
    return None


def _contradiction(row: Row, before: Found, now: Found) -> str:
    if before.label != now.label:
        return (
            f"{now.name!r} has label {now.label!r}, on line {row.line} {before.label!r} "
            "(one class an image; several are out of scope)"
        )
    if before.split != now.split:
        return (
            f"{now.name!r} is in split {now.split or 'blank'}, on line {row.line} {before.split or 'blank'}"
        )
    return f"{now.name!r} has group {now.group!r}, on line {row.line} {before.group!r}"


def _csv_hint(problems: ListingProblems) -> str | None:
    text = " ".join(problems.lines)
    if "outside the folder" in text:
        return "--allow-outside-root lets a CSV file name files anywhere on this machine."
    if "is not UTF-8" in text:
        return "Convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD.csv > NEW.csv"
    return None


class _Containment:
    """Tells whether a listed file lies below the root, links resolved; each folder is resolved once."""

    def __init__(self, root: str, allow_outside_root: bool) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.allow_outside_root = allow_outside_root
        self._real_folders: dict[str, str] = {}

    def complaint(self, filename: str) -> str | None:
        """Return why `filename` must not be read, or None."""
        if self.allow_outside_root:
            return None
        normal = os.path.normpath(filename)
        path = os.path.join(self.root, normal)
        folder = os.path.dirname(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], os.path.basename(path))
        if os.path.islink(path):
            real = os.path.realpath(path)
        above = normal.split("/")[0] == ".."
        # An absolute path is refused even below the root: such a list breaks when the folder is moved.
        if os.path.isabs(filename) or above or not is_inside(real, self.real_root):
            return f"{filename!r} lies outside the folder of the CSV file"
        return None


def _existing_form(root: str, name: str) -> str:
    """Return `name` in the Unicode form in which the file exists; systems write accents differently."""
    if name.isascii() or os.path.lexists(os.path.join(root, name)):
        return name
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, name)
        if os.path.lexists(os.path.join(root, other)):
            return other
    return name
