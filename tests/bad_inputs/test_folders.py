"""Folders that are missing, odd, hostile or changing: items 37 to 56 of the list of bad inputs, by number."""

import contextlib
import csv
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs.bad_input_cases import layout_warnings, refused_alike, tree
from tests.tiny import TINY_HEADS as TINY

Images = Callable[..., Path]
Run = Callable[..., Any]


def checked(run_cli: Run, *arguments: object) -> tuple[dict[str, Any], str]:
    """Return the document of `data check` and what it wrote on stderr."""
    done = run_cli("data", "check", *arguments, "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@contextlib.contextmanager
def without_root_rights() -> Iterator[None]:
    """Take from this thread, and those it starts, the right of root to read everything."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this thread
    rights = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    before = list(rights)
    rights[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[:] = before
        assert libc.capset(header, rights) == 0


# ---- what is there at all ---------------------------------------------------------------------------------


def test_037_path_missing(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    make_images(tmp_path / "flowers", {"ants": 2, "bees": 2})
    nearest = f"Did you mean {str(tmp_path / 'flowers')!r}?"
    refused_alike(run_cli, tmp_path / "flower", f"There is no {str(tmp_path / 'flower')!r}", nearest)
    refused_alike(run_cli, tmp_path / "flowrs" / "train", nearest)
    refused_alike(run_cli, tmp_path / "zzz", "holds nothing of a name like 'zzz'")


def test_038_path_is_a_file(tmp_path: Path, run_cli: Run) -> None:
    for name, expected in (("cat.jpg", "expected a folder or a file that ends in .csv"), ("a.zip", "Unpack")):
        (tmp_path / name).write_bytes(b"x")
        refused_alike(run_cli, tmp_path / name, repr(str(tmp_path / name)), expected)
    os.mkfifo(tmp_path / "list.csv")
    refused_alike(run_cli, tmp_path / "list.csv", "neither a folder nor a regular file")


def test_039_empty_dataset(tmp_path: Path, run_cli: Run) -> None:
    (tmp_path / "empty").mkdir()
    refused_alike(run_cli, tmp_path / "empty", "No images in", "one folder a class")
    (tmp_path / "hollow" / "ants").mkdir(parents=True)
    (tmp_path / "hollow" / "bees").mkdir()
    (tmp_path / "hollow" / "bees" / "notes.txt").write_text("x")
    refused_alike(run_cli, tmp_path / "hollow", "No images in", "ignored: 1 files without an image extension")


def test_040_one_class_only(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    # There is no way to state that one class is meant: a classifier of one class has nothing to learn.
    root = make_images(tmp_path / "data", {"ants": 4})
    refused_alike(run_cli, root, "has one class, 'ants'", "needs two or more")
    make_images(tmp_path / "above" / "data", {"ants": 4, "bees": 4})
    refused_alike(run_cli, tmp_path / "above", f"Did you mean {str(tmp_path / 'above' / 'data')!r}?")


# ---- classes ----------------------------------------------------------------------------------------------


def test_041_empty_class_folder(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "cats": 8})
    (root / "bees").mkdir()
    document, _ = checked(run_cli, root)
    assert document["class_names"] == ["ants", "cats"]  # no index is lost to the empty folder
    assert "Folder 'bees' holds no images: no class is made of it." in layout_warnings(document)
    assert "'bees' holds no images" in run_cli("data", "split", root).stderr


def test_042_class_of_train_missing_in_val(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = tmp_path / "data"
    make_images(root / "train", {"class1": 8, "class10": 8, "class2": 8})
    make_images(root / "val", {"class2": 4, "class1": 4}, seed=1)
    document, _ = checked(run_cli, root)
    (missing,) = (item for item in document["findings"] if item["kind"] == "missing-in-val")
    assert missing["items"] == ["'class10'"]
    done = run_cli("finetune", root, *TINY, "-o", tmp_path / "run", "--json")
    assert done.code == 0, done.stderr
    assert "val has no samples of 'class10'" in done.stderr
    # Train's list, in the order of code points, is the one that is kept.
    assert json.loads((tmp_path / "run" / "run.json").read_text())["class_names"] == [
        "class1", "class10", "class2",
    ]  # fmt: skip
    found = json.loads(run_cli("evaluate", tmp_path / "run", "--json").stdout)
    scores = {row["class_name"]: row for row in found["per_class"]}
    assert [(name, row["support"]) for name, row in scores.items()] == [
        ("class1", 4), ("class10", 0), ("class2", 4),
    ]  # fmt: skip
    assert (scores["class10"]["recall"], scores["class10"]["f1"]) == (None, None)  # not 0, and not NaN
    assert found["macro_f1"] == pytest.approx((scores["class1"]["f1"] + scores["class2"]["f1"]) / 2)
    shown = run_cli("evaluate", tmp_path / "run")
    assert "val has no samples of 'class10'" in shown.stderr
    (row,) = re.findall(r"^class10 .*", shown.stdout, re.MULTILINE)[:1]
    assert row.split()[2:] == ["-", "-", "0"]


def test_043_extra_class_in_val(tmp_path: Path, make_images: Images, run_cli: Run, trained: Any) -> None:
    root = tmp_path / "data"
    make_images(root / "train", {"ants": 4, "bees": 4})
    make_images(root / "val", {"ants": 2, "zebra": 2}, seed=1)
    refused_alike(
        run_cli, root, "The val split has classes that train does not have: 'zebra'", "'ants', 'bees'"
    )
    other = make_images(tmp_path / "other", {"a": 2, "zebra": 2})
    before = tree(Path.cwd(), trained.run)
    done = run_cli("evaluate", trained.run, other)
    assert (done.code, done.stdout) == (3, "")
    assert "has classes the run does not know: 'zebra'" in done.stderr
    assert "The run's classes are 'a', 'b', 'c'" in done.stderr
    assert tree(Path.cwd(), trained.run) == before


def test_044_indices_come_from_the_saved_class_list(tmp_path: Path, run_cli: Run, trained: Any) -> None:
    """Without the first class, a loader that numbers the folders it sees would call b 0 and c 1."""
    data = shutil.copytree(trained.images, tmp_path / "images")
    whole = json.loads(run_cli("evaluate", trained.run, data, "--json").stdout)
    shutil.rmtree(data / "a")
    part = json.loads(run_cli("evaluate", trained.run, data, "--json").stdout)
    assert whole["class_names"] == part["class_names"] == ["a", "b", "c"]
    assert part["confusion_matrix"] == [[0, 0, 0], *whole["confusion_matrix"][1:]]
    assert sum(map(sum, part["confusion_matrix"])) == 32


# ---- what is no image of the data set ---------------------------------------------------------------------


def test_045_folders_of_other_programs(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "bees": 8})
    for name in (".ipynb_checkpoints", ".git", "__MACOSX", "ants/.ipynb_checkpoints", "bees/@eaDir"):
        make_images(root, {name: 2}, seed=3)
    document, _ = checked(run_cli, root)
    assert document["class_names"] == ["ants", "bees"]
    assert document["num_images"] == 16
    assert document["ignored"] == {"dot-files and dot-folders": 3, "system litter": 2}
    shown = run_cli("data", "check", root).stdout
    assert "Ignored dot-files and dot-folders: 3" in shown
    assert "Ignored system litter: 2" in shown


def test_046_files_of_other_programs(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "bees": 8})
    for name in ("._000.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (root / "ants" / name).write_bytes(b"\0\5\x16\7")
    (root / "._bees").write_bytes(b"\0\5\x16\7")
    document, _ = checked(run_cli, root)
    assert (document["num_images"], document["bad_images"]) == (16, [])
    assert document["ignored"] == {"dot-files and dot-folders": 3, "system litter": 2}


# ---- links ------------------------------------------------------------------------------------------------


def test_047_symlink_loop(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "bees": 8})
    os.symlink(root, root / "ants" / "up")
    os.symlink("self", root / "bees" / "self")
    os.symlink(root / "ants", root / "aunts")
    document, _ = checked(run_cli, root)
    assert document["num_images"] == 16
    assert document["class_names"] == ["ants", "bees"]
    assert document["ignored"] == {"broken links": 1, "links to folders already listed": 2}


def test_048_symlink_that_leaves_the_root(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "bees": 8})
    outside = make_images(tmp_path / "outside", {"more": 4}, seed=1)
    os.symlink(outside / "more", root / "bees" / "more")
    os.symlink(outside / "more" / "000.png", root / "ants" / "one.png")
    document, _ = checked(run_cli, root)
    assert document["num_images"] == 16
    assert document["ignored"] == {"links that leave the data folder": 2}
    assert "--allow-outside-root" in layout_warnings(document)[0]
    allowed = json.loads(run_cli("data", "split", root, "--allow-outside-root", "--json").stdout)
    assert len(allowed["files"]) == 21
    shutil.rmtree(root / "ants")
    shutil.rmtree(root / "bees")
    os.symlink(outside, root / "ants")
    os.symlink(outside, root / "bees")
    refused_alike(run_cli, root, "2 links that leave the data folder", "--allow-outside-root follows them")


# ---- names ------------------------------------------------------------------------------------------------


def test_049_unicode_forms(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = tmp_path / "data"
    make_images(root / "train", {composed: 8, "tea": 8})
    make_images(root / "val", {decomposed: 4, "tea": 4}, seed=1)
    document, _ = checked(run_cli, root)
    assert document["class_names"] == [composed, "tea"]
    assert [item["val"] for item in document["classes"]] == [4, 4]
    # Two folders of train are two classes still: what differs on disk is not mixed behind one's back.
    make_images(root / "train", {decomposed: 8}, seed=2)
    document, _ = checked(run_cli, root)
    assert len(document["class_names"]) == 3
    assert any("differ only in case" in warning for warning in layout_warnings(document))


HOSTILE_CLASSES = (b"[bold red]a\x1b[31m\n\t<script>&", b"caf\xe9", b"=1+1")


def is_clean(text: str) -> bool:
    """Return whether a terminal would show `text` as it is."""
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_050_hostile_names_are_escaped_everywhere(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    plain = make_images(tmp_path / "plain", {"0": 12, "1": 12, "2": 12})
    root = tmp_path / "data"
    for number, name in enumerate(HOSTILE_CLASSES):
        shutil.copytree(os.fsencode(plain / str(number)), os.path.join(os.fsencode(root), name))
    first = os.path.join(os.fsencode(root), HOSTILE_CLASSES[0])
    os.rename(os.path.join(first, b"000.png"), os.path.join(first, b"\x1b]0;title\x07[link]\xff.png"))
    bad = os.path.join(first, b"\x1b[2Jbad\n.png")
    Path(os.fsdecode(bad)).write_bytes(b"no image")
    names = sorted(os.fsdecode(name) for name in HOSTILE_CLASSES)
    run = tmp_path / "run\x1b[31m[red]"

    def shown(*arguments: object) -> str:
        done = run_cli(*arguments)
        assert done.code == 0, done.stderr
        assert is_clean(done.stdout), done.stdout
        assert is_clean(done.stderr), done.stderr
        return str(done.stdout)

    def document(*arguments: object) -> Any:
        text = shown(*arguments, "--json")
        assert text.isascii()
        return json.loads(text)

    allow = ("--max-bad", "0.2")
    for command in ("check", "split"):
        table = shown("data", command, root, *allow)
        # One row, in which nothing was taken for markup or a line break.
        assert r"[bold red]a\x1b[31m\n\t<script>&" in table
        assert r"caf\udce9" in table
        assert document("data", command, root, *allow)["class_names"] == names
    done = run_cli("data", "split", root, *allow, "-o", root / "split.csv")
    assert (done.code, done.stdout) == (3, "")
    assert is_clean(done.stderr)
    assert r"'caf\udce9' is not UTF-8 text" in done.stderr
    assert not (root / "split.csv").exists()
    done = run_cli("finetune", root, *TINY, *allow, "-o", run)
    assert done.code == 0, done.stderr
    assert is_clean(done.stdout + done.stderr)
    assert r"run\x1b[31m[red]" in done.stdout
    with open(run / "bad_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        assert [row["file"] for row in csv.DictReader(stream)] == [os.path.relpath(os.fsdecode(bad), root)]
    assert document("evaluate", run)["class_names"] == names
    assert r"[bold red]a\x1b[31m\n\t<script>&" in shown("evaluate", run)
    assert is_clean((run / "README.md").read_text(encoding="utf-8"))
    images = os.fsdecode(first)
    assert r"\x1b]0;title\x07[link]\udcff.png" in shown("predict", run, images)
    files = {item["file"] for item in document("predict", run, images)["predictions"]}
    assert files == {os.path.join(images, name) for name in os.listdir(images)}
    assert document("report", run)["splits"] == ["val"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert is_clean(page)
    assert "<script>" not in page
    assert r"[bold red]a\x1b[31m\n\t&lt;script&gt;&amp;" in page
    done = run_cli("extract", root, *TINY[:6], "-o", tmp_path / "no" / os.fsdecode(b"\x1b[31m.csv"))
    assert (done.code, done.stdout) == (2, "")
    assert is_clean(done.stderr)


def test_051_names_that_differ_in_case_alone(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"Cat": 8, "cat": 8})
    if len(os.listdir(root)) == 1:
        pytest.skip("the file system takes Cat and cat for one name")
    shutil.copy(make_images(tmp_path / "more", {"x": 1}, seed=1) / "x" / "000.png", root / "cat" / "A.png")
    shutil.copy(make_images(tmp_path / "more", {"x": 1}, seed=2) / "x" / "000.png", root / "cat" / "a.png")
    document, _ = checked(run_cli, root)
    assert document["class_names"] == ["Cat", "cat"]
    assert document["num_images"] == 18
    (warning,) = layout_warnings(document)
    assert warning.startswith("Classes 'Cat', 'cat' differ only in case")


def test_052_very_long_names_and_paths(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"a" * 255: 8, "bees": 8})
    os.rename(root / "bees" / "000.png", root / "bees" / ("b" * 251 + ".png"))
    deep = root / "bees"
    while len(str(deep)) < 3000:
        deep /= "d" * 200
    deep.mkdir(parents=True)
    os.rename(root / "bees" / "001.png", deep / "001.png")
    document, _ = checked(run_cli, root)
    assert (document["num_images"], document["bad_images"]) == (16, [])
    # Beyond PATH_MAX a folder can be made from within alone, and nothing can be opened by its path.
    here = os.open(deep, os.O_RDONLY)
    made = [here]
    try:
        for _ in range(8):
            os.mkdir("d" * 200, dir_fd=made[-1])
            made.append(os.open("d" * 200, os.O_RDONLY, dir_fd=made[-1]))
        done = run_cli("data", "check", root)
        assert (done.code, done.stdout) == (3, "")
        assert "longer than the system allows" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        for folder in reversed(made):
            if folder != made[-1]:
                os.rmdir("d" * 200, dir_fd=folder)
        for folder in made:
            os.close(folder)


# ---- what is no regular or readable file ------------------------------------------------------------------


def test_053_pipes_sockets_and_devices(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 30, "bees": 30})
    os.mkfifo(root / "ants" / "pipe.png")
    os.symlink("/dev/zero", root / "ants" / "zero.png")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root / "bees"):
        listener.bind("socket.png")  # relative: such a path has room for some hundred bytes
    document, _ = checked(run_cli, root, "--allow-outside-root")
    assert document["num_images"] == 60
    assert document["ignored"] == {"not regular files": 3}
    # A list names them outright: they are bad images, and never opened.
    names = [f"{kind}/{index:03d}.png" for kind in ("ants", "bees") for index in range(30)]
    names += ["ants/pipe.png", "bees/socket.png"]
    lines = [f"{name},{name.split('/')[0]}" for name in names]
    (root / "list.csv").write_text("\n".join(["filename,label", *lines]))
    document, _ = checked(run_cli, root / "list.csv", "--max-bad", "0.1")
    assert [(item["name"], item["reason"]) for item in document["bad_images"]] == [
        ("ants/pipe.png", "not a regular file"),
        ("bees/socket.png", "not a regular file"),
    ]


def test_054_unreadable_files_and_folders(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 30, "bees": 30})
    (root / "ants" / "000.png").chmod(0)
    with without_root_rights():
        document, _ = checked(run_cli, root, "--max-bad", "0.1")
        assert document["bad_images"] == [{"name": "ants/000.png", "reason": "permission denied"}]
        done = run_cli("data", "check", root)
        assert (done.code, done.stdout) == (3, "")
        assert "'ants/000.png': permission denied" in done.stderr
        (root / "bees").chmod(0)
        try:
            done = run_cli("data", "check", root)
        finally:
            (root / "bees").chmod(0o755)
    # A folder that cannot be listed may hide any number of images, a whole class here: that is no bad image.
    assert (done.code, done.stdout) == (5, "")
    assert f"Cannot list folder {str(root / 'bees')!r}: Permission denied" in done.stderr
    assert "permission to read" in done.stderr


# ---- size and change --------------------------------------------------------------------------------------

SCAN = """
import sys
from tlcli.data.scan import scan
from tlcli.config.data import DataOptions

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

before = kilobytes("VmRSS")
found = scan(DataOptions(data=sys.argv[1]))
print(len(found.samples), kilobytes("VmHWM") - before)
"""


def bytes_per_file(root: Path, count: int) -> float:
    """Return the growth of a child's peak memory per file, while it scans `count` files in one folder."""
    for name, number in (("ants", 1), ("bees", count - 1)):
        (root / name).mkdir(parents=True)
        for index in range(number):
            os.mknod(root / name / f"{index:07d}.png")
    done = subprocess.run([sys.executable, "-c", SCAN, root], capture_output=True, text=True, check=True)
    found, kilobytes = map(int, done.stdout.split())
    assert found == count
    return 1024 * kilobytes / count


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_055_many_files_in_one_folder(tmp_path: Path, run_cli: Run) -> None:
    assert bytes_per_file(tmp_path / "data", 20_000) < 1000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_055_a_million_files_in_one_folder(tmp_path: Path, run_cli: Run) -> None:
    assert bytes_per_file(tmp_path / "data", 1_000_000) < 800
    done = run_cli("data", "check", tmp_path / "data")
    assert (done.code, done.stdout) == (3, "")
    assert "1000000 images of 1000000 (100.0%) cannot be used" in done.stderr
    assert len(done.stderr) < 10_000


def test_056_files_that_change_during_the_scan(
    tmp_path: Path, make_images: Images, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a folder held when it was listed counts: added files wait, removed ones are bad images."""
    root = make_images(tmp_path / "data", {"ants": 30, "bees": 30})
    spare = make_images(tmp_path / "spare", {"x": 1}, seed=9) / "x" / "000.png"
    listed: list[Path] = []
    real = os.scandir

    def change_the_first_folder_before_the_second_is_listed(path: str) -> Any:
        if Path(path).parent == root:
            if listed:
                (listed[0] / "007.png").unlink()
                shutil.copy(spare, listed[0] / "added.png")
            listed.append(Path(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", change_the_first_folder_before_the_second_is_listed)
        document, _ = checked(run_cli, root, "--max-bad", "0.1")
    assert len(listed) == 2
    assert document["num_images"] == 60
    assert document["bad_images"] == [{"name": f"{listed[0].name}/007.png", "reason": "file not found"}]
    document, _ = checked(run_cli, root)
    assert (document["num_images"], document["bad_images"]) == (60, [])
