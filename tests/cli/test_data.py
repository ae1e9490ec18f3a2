"""`tlcli data check`, `split` and `preview`, as a user and as a script see them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Images = Callable[..., Path]
Run = Callable[..., Any]


def test_check_of_good_data(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "[red]bees": 20})
    done = run_cli("data", "check", root)
    assert done.code == 0
    assert "[red]bees" in done.stdout
    assert "40 images" in done.stdout
    assert "tlcli finetune" in done.stderr
    document = json.loads(run_cli("data", "check", root, "--json").stdout)
    assert document["schema"] == "tlcli.data.check/2"
    assert document["num_images"] == 40
    assert document["class_names"] == ["[red]bees", "ants"]
    assert document["bad_images"] == []


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_check_of_poisonous_data(
    tmp_path: Path, make_images: Images, run_cli: Run, extra: tuple[str, ...]
) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "bees": 20})
    shutil.copy(root / "ants" / "001.png", root / "bees" / "copy.png")
    for number in range(12):
        (root / "ants" / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff no")
    done = run_cli("data", "check", root, *extra)
    assert done.code == 3
    assert done.stdout == ""
    assert "1 image in more than one class" in done.stderr
    assert "'bees/copy.png'" in done.stderr
    assert done.stderr.count("/broken") == 10
    assert "and 2 more" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_of_a_few_shot_subset(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "bees": 20})
    document = json.loads(run_cli("data", "check", root, "--limit-per-class", 3, "--json").stdout)
    assert [item["train"] for item in document["classes"]] == [3, 3]


@pytest.mark.parametrize("command", ["check", "split"])
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ((), 2, "DATA is missing"),
        (("nowhere",), 3, "There is no 'nowhere'"),
        (("--no-such",), 2, "No such option"),
    ],
)
def test_wrong_use(run_cli: Run, command: str, arguments: tuple[str, ...], code: int, expected: str) -> None:
    done = run_cli("data", command, *arguments)
    assert (done.code, done.stdout) == (code, "")
    assert expected in done.stderr


def test_split_shows_counts_and_files(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 40, "bees": 60})
    done = run_cli("data", "split", root)
    assert done.code == 0
    assert done.stdout.split()[:3] == ["class", "train", "val"]
    document = json.loads(run_cli("data", "split", root, "--json").stdout)
    assert document["schema"] == "tlcli.data.split/2"
    assert sum(item["val"] for item in document["classes"]) == [
        item["split"] for item in document["files"]
    ].count("val")
    assert len(document["files"]) == 100
    assert set(document["files"][0]) == {"name", "label", "split", "group", "sha256"}


def test_the_written_split_is_data_with_the_same_split(
    tmp_path: Path, make_images: Images, run_cli: Run
) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "bees": 20})
    output = root / "split.csv"
    first = run_cli("data", "split", root, "-o", output, "--val-fraction", 0.4)
    assert first.code == 0
    assert f"tlcli finetune {output} --backbone" in first.stderr
    again = run_cli("data", "split", output)
    assert again.stdout == first.stdout
    refused = run_cli("data", "split", root, "-o", output)
    assert (refused.code, refused.stdout) == (2, "")
    assert run_cli("data", "split", root, "-o", output, "--overwrite", "--limit-per-class", 2).code == 0
    assert "4" in run_cli("data", "split", output).stdout


def test_a_split_written_elsewhere_says_what_it_needs(
    tmp_path: Path, make_images: Images, run_cli: Run
) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "bees": 20})
    done = run_cli("data", "split", root, "-o", tmp_path / "split.csv")
    assert "--allow-outside-root" not in done.stderr  # the images lie below the folder of the list
    (tmp_path / "lists").mkdir()
    done = run_cli("data", "split", root, "-o", tmp_path / "lists" / "split.csv")
    assert "--allow-outside-root" in done.stderr
    assert run_cli("data", "check", tmp_path / "lists" / "split.csv").code == 3
    assert run_cli("data", "check", tmp_path / "lists" / "split.csv", "--allow-outside-root").code == 0


def test_split_stops_on_too_many_unreadable_files(tmp_path: Path, make_images: Images, run_cli: Run) -> None:
    root = make_images(tmp_path / "data", {"ants": 20, "bees": 20})
    (root / "ants" / "000.png").write_bytes(b"")
    done = run_cli("data", "split", root)
    assert (done.code, done.stdout) == (3, "")
    assert "'ants/000.png': empty file" in done.stderr
    done = run_cli("data", "split", root, "--max-bad", 0.1)
    assert done.code == 0
    assert "1 of these files cannot be read" in done.stderr


def test_preview_writes_a_picture_and_says_what_it_shows(
    tmp_path: Path, make_images: Images, run_cli: Run
) -> None:
    root = make_images(tmp_path / "data", {"ants": 8, "[red]bees": 8})
    (root / "ants" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    output = tmp_path / "p.png"
    options = ("--images", 20, "--samples", 2, "--image-size", 16, "-o", output)
    done = run_cli("data", "preview", root, *options, "--augment", "medium", "--mirror", 0)
    assert done.code == 0
    assert str(output) in done.stdout
    assert "rotation to 10 degrees" in done.stdout
    assert "mirror" not in done.stdout
    assert "--augment medium --mirror 0" in done.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    refused = run_cli("data", "preview", root, *options)
    assert (refused.code, refused.stdout) == (2, "")
    assert "--overwrite" in refused.stderr
    document = json.loads(run_cli("data", "preview", root, *options, "--overwrite", "--json").stdout)
    assert document["schema"] == "tlcli.data.preview/1"
    assert document["augment"]["preset"] == "light"
    assert document["output"] == str(output)
    assert document["num_views"] == 3
    assert {item["label"] for item in document["images"]} == {"ants", "[red]bees"}
    broken = [item["name"] for item in document["bad_images"]]
    assert broken in ([], ["ants/broken.jpg"])  # the hash may have sent it to val


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ((), 2, "DATA is missing"),
        (("nowhere",), 3, "There is no 'nowhere'"),
        (("nowhere", "-o", "p.gif"), 2, "no PNG"),
        (("nowhere", "-o", "missing/p.png"), 5, "no folder"),
        (("nowhere", "--augment", "heavy"), 2, "heavy"),
        (("nowhere", "--mirror", 2), 2, "mirror"),
    ],
)
def test_wrong_use_of_preview(run_cli: Run, arguments: tuple[Any, ...], code: int, expected: str) -> None:
    done = run_cli("data", "preview", *arguments)
    assert (done.code, done.stdout) == (code, "")
    assert expected in done.stderr


@pytest.mark.real
def test_real_data(real_assets: Path, run_cli: Run) -> None:
    done = run_cli("data", "check", real_assets / "hymenoptera")
    assert done.code == 0
    assert "imageNotFound.gif" in done.stdout
    assert run_cli("data", "check", real_assets / "flowers").code == 3
    assert run_cli("data", "split", real_assets / "neu_surface_defects" / "labels.csv").code == 0
    done = run_cli("data", "preview", real_assets / "hymenoptera", "--images", 250, "--samples", 1)
    assert done.code == 2
    done = run_cli("data", "preview", real_assets / "hymenoptera", "--images", 12, "--augment", "strong")
    assert done.code == 0
