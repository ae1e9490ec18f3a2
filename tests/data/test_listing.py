"""CSV and TSV text: what spreadsheets write is read, what cannot be read is told with its line."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcli.config.data import DataOptions
from tlcli.data.listing import MAX_RECORD_CHARACTERS, Row, read_listing, write_listing
from tlcli.errors import DataError, StorageError, UsageError

OPTIONS = DataOptions()


def rows(path: Path, content: bytes, options: DataOptions = OPTIONS) -> list[Row]:
    path.write_bytes(content)
    return read_listing(str(path), options)


def test_bom_crlf_blank_lines_quotes_and_a_missing_last_newline(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbffilename,label\r\n\r\n"a,1.jpg","say ""x"""\r\n"two\nlines.jpg",y\r\nb.jpg,z'
    assert rows(tmp_path / "a.csv", content) == [
        Row(3, "a,1.jpg", 'say "x"', "", ""),
        Row(4, "two\nlines.jpg", "y", "", ""),
        Row(6, "b.jpg", "z", "", ""),
    ]


def test_tabs_between_cells_of_a_tsv(tmp_path: Path) -> None:
    assert rows(tmp_path / "a.TSV", b"filename\tlabel\na,b.jpg\tx\n") == [Row(2, "a,b.jpg", "x", "", "")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("filename,label\n".encode("utf-16"), "UTF-16"),
        ("filename,label\n".encode("utf-16-be"), "NUL"),
        ("filename,label\n".encode("utf-32"), "UTF-16 or UTF-32"),
        (b"\x1f\x8b\x08", "compressed"),
        (b"PK\x03\x04", "compressed"),
        (b"filename;label\na.jpg;x\n", "has semicolons between"),
        (b"filename\tlabel\n", "has tabs between"),
        (b"filename\nx\n", "line 1 has no column 'label'"),
        (b"a.jpg,cat\nb.jpg,dog\n", "it has 'a.jpg', 'cat'"),
        (b"filename,label,label\n", "line 1 names column 'label' twice"),
        (b"filename,label\na.jpg\n", "line 2: 1 cells, expected 2"),
        (b"filename,label\na.jpg,x\nb.jpg,x,y\n", "line 3: 3 cells"),
        (b'filename,label\n"a.jpg,x\nb.jpg,y\n', "line 2: unexpected end"),
        (b'filename,label\n"a"b.jpg,x\n', "line 2: "),
        (b"filename,label\na\0.jpg,x\n", "line 2 holds a NUL"),
        (b"filename,label\n" + b"a" * (MAX_RECORD_CHARACTERS + 1), "line 2 has more than"),
        (b'filename,label\n"' + b"a\n" * 200_000, "larger than field limit"),
    ],
)
def test_what_cannot_be_read_says_why_and_where(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "a.csv", content)
    assert expected in caught.value.message
    assert caught.value.hint


def test_several_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: .*\n.*line 4: "):
        rows(tmp_path / "a.csv", b"filename,label\na\nb,x\nc,x,y\n")


def test_a_near_column_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "a.csv", b"file_name,label\n")
    assert caught.value.hint == "Name the column with --filename-column 'file_name'."
    with pytest.raises(DataError, match="no column 'fold'"):
        rows(tmp_path / "a.csv", b"filename,label\n", DataOptions(split_column="fold"))


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        read_listing(str(tmp_path / "missing.csv"), OPTIONS)


CELLS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udce9\n\r\",;'\t "),
    max_size=20,
)
LABELS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=10)


@given(cells=st.lists(st.tuples(CELLS, LABELS, st.sampled_from(["", "train", "val"]), LABELS), max_size=6))
@settings(deadline=None)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, cells: list[tuple[str, str, str, str]]
) -> None:
    path = str(tmp_path_factory.mktemp("csv") / f"a{suffix}")
    written = [Row(0, *row) for row in cells]
    write_listing(path, written, overwrite=False)
    read = [(row.filename, row.label, row.split, row.group) for row in read_listing(path, OPTIONS)]
    assert read == cells


def test_an_existing_file_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_listing(str(path), [Row(0, "a.jpg", "x", "train", "")], overwrite=False)
    assert list(csv.reader(path.open())) == [["filename", "label", "split"], ["a.jpg", "x", "train"]]
    with pytest.raises(UsageError, match="exists"):
        write_listing(str(path), [], overwrite=False)
    write_listing(str(path), [], overwrite=True)
    assert path.read_text() == "filename,label,split\n"
    assert [item.name for item in tmp_path.iterdir()] == ["a.csv"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format"):
        write_listing(str(tmp_path / "a.txt"), [], overwrite=False)
    with pytest.raises(StorageError, match="Cannot write"):
        write_listing(str(tmp_path / "no" / "a.csv"), [], overwrite=False)
    with pytest.raises(DataError, match="not UTF-8"):
        write_listing(str(tmp_path / "a.csv"), [Row(0, "a.jpg", "\udce9", "", "")], overwrite=False)
    assert not list(tmp_path.iterdir())
