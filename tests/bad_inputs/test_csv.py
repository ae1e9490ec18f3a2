"""CSV and TSV files that are malformed, hostile or contradict themselves: items 57 to 68, by number."""

import csv
import io
import json
import os
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs.bad_input_cases import layout_warnings, refused_alike
from tests.tiny import TINY_HEADS as TINY

Images = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path, make_images: Images) -> Path:
    return make_images(tmp_path / "data", {"ants": 8, "bees": 8})


def rows(*names: str) -> list[str]:
    """Return `filename,label` lines of the images below `root`, and more lines after them."""
    return [f"{kind}/{index:03d}.png,{kind}" for kind in ("ants", "bees") for index in range(8)] + [*names]


def listed(path: Path, *lines: str, header: str = "filename,label", end: str = "\n") -> Path:
    """Write a list as it is."""
    path.write_bytes(os.fsencode(end.join([header, *lines]) + end))
    return path


COMMANDS = (("data", "check"), ("finetune", *TINY))


def refused(run_cli: Run, data: Path, *expected: str, **options: Any) -> str:
    return refused_alike(run_cli, data, f"error: {str(data)!r}", *expected, **options)


def checked(run_cli: Run, *arguments: object) -> dict[str, Any]:
    done = run_cli("data", "check", *arguments, "--json")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_057_byte_order_mark_and_line_ends(root: Path, run_cli: Run, end: str) -> None:
    path = listed(root / "list.csv", *rows(), header="\ufefffilename,label", end=end)
    document = checked(run_cli, path)
    assert document["class_names"] == ["ants", "bees"]
    assert (document["num_images"], document["bad_images"]) == (16, [])


def test_058_other_encodings_and_separators(root: Path, run_cli: Run) -> None:
    path = root / "list.csv"
    text = "\n".join(["filename,label", *rows()])
    path.write_bytes(text.encode("utf-16"))
    refused(run_cli, path, "is UTF-16 or UTF-32 text, expected UTF-8", "iconv")
    path.write_bytes(text.encode("utf-16-le"))  # without its mark
    refused(run_cli, path, "line 1 holds a NUL byte: this is not plain UTF-8 text")
    path.write_bytes(text.replace("bees\n", "b\xe9e\n").encode("latin-1"))
    refused(run_cli, path, r"'b\udce9e' is not UTF-8 text", "iconv -f WINDOWS-1252")
    path.write_text(text.replace(",", ";"))
    refused(run_cli, path, "has semicolons between its cells, expected commas")
    path.write_text(text.replace(",", "\t"))
    refused(run_cli, path, "has tabs between its cells", "as .tsv")
    tabs = root / "list.tsv"
    tabs.write_text(text)
    refused(run_cli, tabs, "has commas between its cells, expected tabs in a .tsv file")


def test_059_missing_and_repeated_columns(root: Path, run_cli: Run) -> None:
    path = root / "list.csv"
    listed(path, *rows(), header="filename,class")
    refused(run_cli, path, "line 1 has no column 'label'; it has 'filename', 'class'", "--label-column")
    listed(path, *rows(), header="file_name,label")
    refused(run_cli, path, "Name the column with --filename-column 'file_name'")
    listed(path, *rows()[1:], header=rows()[0])
    refused(run_cli, path, "line 1 has no column 'filename'; it has 'ants/000.png', 'ants'")
    listed(path, *(f"{line},x" for line in rows()), header="filename,label,label")
    refused(run_cli, path, "line 1 names column 'label' twice", "a name of its own")


def test_060_short_and_long_rows(root: Path, run_cli: Run) -> None:
    path = listed(root / "list.csv", *rows("ants/000.png", "bees/000.png,bees,train"))
    refused(
        run_cli,
        path,
        "has 2 problems",
        "line 18: 1 cells, expected 2 as in the header",
        "line 19: 3 cells, expected 2 as in the header",
    )


# ---- where the images are ---------------------------------------------------------------------------------


def test_061_paths_that_leave_the_folder(
    tmp_path: Path, root: Path, make_images: Images, run_cli: Run
) -> None:
    outside = make_images(tmp_path / "outside", {"x": 3}, seed=1) / "x"
    os.symlink(outside / "001.png", root / "link.png")
    os.symlink(outside, root / "folder")
    bad = ("../outside/x/000.png", str(outside / "002.png"), "link.png", "folder/002.png", "/etc/passwd",
           str(root / "ants" / "000.png"))  # fmt: skip
    path = listed(root / "list.csv", *rows(*(f"{name},ants" for name in bad)))
    lines = [f"line {number}: {name!r} lies outside" for number, name in enumerate(bad, start=18)]
    refused(run_cli, path, "has 6 problems", "--allow-outside-root lets a CSV file", *lines)
    listed(path, *rows(*(f"{name},ants" for name in bad[:3])))
    assert checked(run_cli, path, "--allow-outside-root")["num_images"] == 19
    # A name may begin with dots, and a path may go up and come back.
    shutil.copy(outside / "000.png", root / "..dots.png")
    listed(path, *rows("..dots.png,ants", "bees/../ants/../ants/000.png,ants"))
    document = checked(run_cli, path)
    assert document["num_images"] == 17
    assert document["ignored"] == {"repeated rows": 1}


def test_062_urls(root: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *given: reached.append(given))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: reached.append(given))
    urls = ("http://127.0.0.1:9/a.png", "HTTPS://example.org/a.png", "file:///etc/passwd", "s3://b/a.png",
            "data:image/png;base64")  # fmt: skip
    path = listed(root / "list.csv", *rows(*(f"{url},ants" for url in urls)))
    text = refused(run_cli, path, "has 5 problems", "tlcli reads files of this machine only")
    assert all(f"{url!r} is a URL" in text for url in urls)
    done = run_cli("data", "check", path, "--allow-outside-root")
    assert (done.code, done.stdout) == (3, "")
    assert not reached


# ---- rows that repeat or contradict each other ------------------------------------------------------------


def test_063_repeated_rows(root: Path, run_cli: Run) -> None:
    path = listed(root / "list.csv", *rows("./ants/000.png,ants", "ants//001.png,ants", "bees/000.png,bees"))
    document = checked(run_cli, path)
    assert document["num_images"] == 16
    assert document["ignored"] == {"repeated rows": 3}
    assert layout_warnings(document) == [f"Ignored 3 repeated rows of {str(path)!r}."]


def test_064_one_image_with_two_labels(root: Path, run_cli: Run) -> None:
    path = listed(root / "list.csv", *rows("bees/../ants/000.png,bees"))
    refused(run_cli, path, "line 18: 'ants/000.png' has label 'bees', on line 2 'ants'", "one class an image")
    # Under another name it is the content that tells; training goes on with a warning.
    shutil.copy(root / "ants" / "000.png", root / "copy.png")
    listed(path, *rows("copy.png,bees"))
    done = run_cli("data", "check", path)
    assert (done.code, done.stdout) == (3, "")
    assert "1 image in more than one class" in done.stderr
    assert "'copy.png' ('bees'" in done.stderr


# ---- labels -----------------------------------------------------------------------------------------------


def test_065_labels_that_look_like_numbers(root: Path, run_cli: Run) -> None:
    numbers = {"ants": "01", "bees": "1"}
    lines = [f"{name},{numbers[label]}" for name, label in (line.split(",") for line in rows())]
    path = listed(root / "list.csv", *lines)
    document = checked(run_cli, path)
    assert document["class_names"] == ["01", "1"]
    assert [item["train"] + item["val"] for item in document["classes"]] == [8, 8]
    assert layout_warnings(document) == [
        "Classes '01', '1' differ only in case, spaces, leading zeros or Unicode form; they stay different "
        "classes."
    ]


def test_066_spaces_words_for_nothing_and_empty_labels(root: Path, run_cli: Run) -> None:
    kinds = ("NA", "null", "None", "nan", "NA ", " x", "x", "0")
    lines = [f"{line.split(',')[0]},{kinds[index % 8]}" for index, line in enumerate(rows())]
    path = listed(root / "list.csv", *lines)
    document = checked(run_cli, path)
    assert document["class_names"] == sorted(kinds)
    assert sorted(layout_warnings(document)) == [
        f"Classes {names} differ only in case, spaces, leading zeros or Unicode form; they stay different "
        "classes."
        for names in ("' x', 'x'", "'NA', 'NA '")
    ]
    listed(path, *rows("ants/000.png,", "bees/000.png,   "))
    refused(run_cli, path, "line 18: no label for 'ants/000.png'", "line 19: no label for 'bees/000.png'")


# ---- cells that attack what reads them --------------------------------------------------------------------


def test_067_formula_cells(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    """They are text; files that people open in a spreadsheet have a quotation mark before them."""
    root = make_images(tmp_path / "data", {"=cmd()": 12, "-1": 12})
    make_images(root, {"'=x": 12}, seed=1)  # in the colour of the first class, so that there are mistakes
    (root / "=cmd()").rename(root / "@sum")
    kinds = {"@sum": "=cmd()", "-1": "-1", "'=x": "'=x"}
    lines = [f"{folder}/{index:03d}.png,{kind}" for folder, kind in kinds.items() for index in range(12)]
    (root / "+bad.png").write_bytes(b"no image")
    path = listed(root / "list.csv", *lines, "+bad.png,=cmd()")
    run = tmp_path / "run"
    done = run_cli("finetune", path, *TINY, "--max-bad", "0.1", "-o", run, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["class_names"] == sorted(kinds.values())

    def read(text: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(text)))

    written = {"=cmd()": "'=cmd()", "-1": "-1", "'=x": "''=x"}  # a number is no formula
    predictions = read((run / "predictions-val.csv").read_text())
    assert {row["label"] for row in predictions} == set(written.values())
    assert {row["predicted"] for row in predictions} <= set(written.values())
    assert {row["file"].split("/")[0] for row in predictions} == {"'@sum", "'-1", "''=x"}
    assert read((run / "bad_images.csv").read_text())[0]["file"] == "'+bad.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        answered = read(run_cli("predict", run, "@sum", "--format", "csv").stdout)
    assert {row["file"] for row in answered} == {f"'@sum/{index:03d}.png" for index in range(12)}
    assert {row["predicted"] for row in answered} <= set(written.values())
    output = tmp_path / "features.csv"
    assert run_cli("extract", path, *TINY[:5], "--max-bad", "0.1", "-o", output).code == 0
    assert {row["label"] for row in read(output.read_text())} == set(written.values())
    # The report reads the predictions back: its names are the data's own, and it finds the images.
    found = json.loads(run_cli("report", run, "--json").stdout)
    assert found["num_thumbnails"] == found["num_mistakes"] > 0
    page = (run / "report.html").read_text()
    assert "true <b>=cmd()</b>" in page or "true <b>&#39;=x</b>" in page
    assert "&#39;=cmd()" not in page
    assert "&#39;&#39;=x" not in page
    # A split is data for tlcli, not for people: there the labels must stay what they are.
    split = root / "split.csv"
    done = run_cli("data", "split", path, "--max-bad", "0.1", "-o", split)
    assert done.code == 0, done.stderr
    assert {row["label"] for row in read(split.read_text())} == set(kinds.values())
    assert {row["filename"].split("/")[0] for row in read(split.read_text())} == {"."}
    assert json.loads(run_cli("data", "split", split, "--max-bad", "0.1", "--json").stdout)[
        "class_names"
    ] == sorted(kinds.values())


def peak_bytes(function: Callable[[], None]) -> int:
    """Return the most memory that Python held at a time while `function` ran, beyond what it held before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_068_huge_cells_and_nul_bytes(root: Path, run_cli: Run) -> None:
    path = listed(root / "list.csv", *rows("ants/0\0.png,ants"))
    refused(run_cli, path, "line 18 holds a NUL byte")
    hint = "Expected UTF-8 text"
    checks = COMMANDS[:1]

    def in_little_memory(*expected: str) -> None:
        assert peak_bytes(lambda: refused(run_cli, path, *expected, commands=checks)) < 20 * 2**20

    for beginning, line in ((b"filename,label\nants/", 2), (b'filename,label\n"ants/', 2), (b"", 1)):
        path.write_bytes(beginning)
        os.truncate(path, 2**30)  # nothing but NUL after the beginning; on disk it is a hole
        in_little_memory(f"line {line} has more than 1,048,576 characters", hint)
    # The same in lines that are short, for a quoted cell runs on over their ends; and in very many cells.
    path.write_bytes(b'filename,label\n"' + b"a\n" * 2**22)
    in_little_memory("line 2: field larger than field limit")
    path.write_bytes(b"filename,label\n" + b'"\n",' * 2**19)
    in_little_memory("has more than 1,048,576 characters")
    # ListingProblems about them are short, and made in a moment.
    path.write_text("filename,label\n" + f"http://{'a' * 100_000},ants\n" * 20)
    assert len(refused(run_cli, path, "has 20 problems", commands=checks)) < 10_000
    path.write_text(",".join(f"c{number}" for number in range(100_000)) + "\n")
    assert len(refused(run_cli, path, "line 1 has no column 'filename'", commands=checks)) < 2_000
