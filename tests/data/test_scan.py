"""Scanning: folders and CSV files to samples, whatever the names and links; complaints that help."""

import os
from pathlib import Path
from typing import Any

import pytest

from tlcli.config.data import DataOptions
from tlcli.data.dataset import Dataset
from tlcli.data.folders import find_images
from tlcli.data.scan import scan
from tlcli.errors import DataError, StorageError, UsageError


def touch(root: Path, *names: str) -> Path:
    """Create empty files: scanning looks at names alone."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def scanned(root: Path, **options: Any) -> Dataset:
    return scan(DataOptions(data=str(root), **options))


def refused(root: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        scanned(root, **options)
    return caught.value


def labels(dataset: Dataset) -> dict[str, str]:
    return {sample.name: dataset.class_names[sample.label or 0] for sample in dataset.samples}


# ---- folders ----------------------------------------------------------------------------------------------


def test_flat_folder(tmp_path: Path) -> None:
    touch(tmp_path, "class10/b.jpg", "class2/a.JPG", "class1/deep/er/c.png", "Class2/d.jfif")
    dataset = scanned(tmp_path)
    assert dataset.kind == "folder"
    assert dataset.class_names == ("Class2", "class1", "class10", "class2")  # by code point
    assert labels(dataset) == {
        "Class2/d.jfif": "Class2",
        "class1/deep/er/c.png": "class1",
        "class10/b.jpg": "class10",
        "class2/a.JPG": "class2",
    }
    assert [sample.name for sample in dataset.samples] == sorted(labels(dataset))
    assert all(sample.split is None and sample.group is None for sample in dataset.samples)
    assert all(os.path.isabs(sample.path) and os.path.exists(sample.path) for sample in dataset.samples)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_tree(tmp_path: Path, val: str) -> None:
    touch(tmp_path, "train/b/1.jpg", "train/a/1.jpg", f"{val}/a/2.jpg", "test/b/sub/3.jpg")
    dataset = scanned(tmp_path)
    assert dataset.kind == "split-folder"
    assert dataset.class_names == ("a", "b")
    assert {sample.name: sample.split for sample in dataset.samples} == {
        "train/a/1.jpg": "train",
        "train/b/1.jpg": "train",
        f"{val}/a/2.jpg": "val",
        "test/b/sub/3.jpg": "test",
    }


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "car/1.jpg", "train/1.jpg")
    assert scanned(tmp_path).class_names == ("car", "train")


def test_a_class_missing_in_val_is_fine_and_one_missing_in_train_is_not(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    assert scanned(tmp_path).class_names == ("a", "b")
    touch(tmp_path, "val/zebra/1.jpg")
    assert "'zebra'" in refused(tmp_path).message


def test_two_names_for_val_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg")
    assert "val, valid" in refused(tmp_path).message


def test_a_split_tree_with_misspelt_or_empty_train_is_no_set_of_classes(tmp_path: Path) -> None:
    touch(tmp_path / "upper", "Train/a/1.jpg", "Test/a/1.jpg")
    touch(tmp_path / "loose", "train/1.jpg", "test/1.jpg")
    for name in ("upper", "loose"):
        assert "named like splits" in refused(tmp_path / name).message


def test_images_outside_class_folders_are_told(tmp_path: Path) -> None:
    touch(tmp_path / "flat", "stray.jpg", "a/1.jpg", "b/1.jpg")
    touch(tmp_path / "tree", "train/a/1.jpg", "train/b/1.jpg", "train/stray.jpg", "extra/x/1.jpg")
    flat, tree = scanned(tmp_path / "flat"), scanned(tmp_path / "tree")
    assert flat.ignored == {"images outside class folders": 1}
    assert "images outside class folders: 1" in flat.warnings[0].message
    assert tree.ignored == {"images outside class folders": 1, "images outside train/, val/ and test/": 1}
    assert len(tree.samples) == 2


def test_litter_is_ignored_and_counted_by_reason(tmp_path: Path) -> None:
    touch(
        tmp_path, "a/1.jpg", "b/1.jpg", ".git/x.jpg", ".ipynb_checkpoints/1.jpg", "a/._1.jpg", "a/.DS_Store"
    )
    touch(tmp_path, "a/Thumbs.db", "__MACOSX/a/1.jpg", "b/desktop.ini", "a/notes.txt", "a/README", "b/x.heic")
    dataset = scanned(tmp_path)
    assert dataset.class_names == ("a", "b")
    assert dataset.ignored == {
        "dot-files and dot-folders": 4,
        "files without an image extension": 2,
        "image formats that are not supported (.heic)": 1,
        "system litter": 3,
    }
    assert len(dataset.warnings) == 1
    assert ".heic" in dataset.warnings[0].message


def test_an_empty_class_folder_is_no_class_and_moves_no_index(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "c/1.jpg")
    (tmp_path / "b").mkdir()
    dataset = scanned(tmp_path)
    assert dataset.class_names == ("a", "c")
    assert any("'b' holds no images" in warning.message for warning in dataset.warnings)


def test_empty_one_class_and_wrapped_folders_are_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "No images" in refused(tmp_path / "empty").message
    touch(tmp_path / "text", "a/1.txt")
    assert "1 files without an image extension" in refused(tmp_path / "text").message
    touch(tmp_path / "single", "a/1.jpg")
    assert "one class, 'a'" in refused(tmp_path / "single").message
    touch(tmp_path / "wrapped", "inner/a/1.jpg", "inner/b/1.jpg")
    assert str(tmp_path / "wrapped" / "inner") in (refused(tmp_path / "wrapped").hint or "")


def test_missing_data_names_the_nearest(tmp_path: Path) -> None:
    touch(tmp_path, "flowers/a/1.jpg")
    assert "flowers" in (refused(tmp_path / "flower").hint or "")
    assert "holds nothing" in (refused(tmp_path / "other" / "deep").hint or "")
    with pytest.raises(UsageError):
        scan(DataOptions())


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.zip")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "expected a folder" in refused(tmp_path / "a.jpg").message
    assert "Unpack" in (refused(tmp_path / "b.zip").hint or "")
    assert "regular" in refused(tmp_path / "pipe.csv").message


def test_symlink_loops_end_and_every_real_folder_is_listed_once(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "c/sub/1.jpg")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink("self", tmp_path / "c" / "self")
    os.symlink(tmp_path / "c", tmp_path / "a")  # sorts before the real folder
    dataset = scanned(tmp_path)
    assert labels(dataset) == {"b/1.jpg": "b", "c/sub/1.jpg": "c"}
    assert dataset.ignored == {"broken links": 1, "links to folders already listed": 2}


def test_links_out_of_the_root_are_followed_only_when_allowed(tmp_path: Path) -> None:
    outside = touch(tmp_path / "outside", "x/1.jpg", "y.jpg")
    root = touch(tmp_path / "root", "a/1.jpg", "b/1.jpg")
    os.symlink(outside / "x", root / "x")
    os.symlink(outside / "y.jpg", root / "a" / "y.jpg")
    os.symlink(root / "b" / "1.jpg", root / "a" / "inside.jpg")
    dataset = scanned(root)
    assert set(labels(dataset)) == {"a/1.jpg", "a/inside.jpg", "b/1.jpg"}
    assert dataset.ignored == {"links that leave the data folder": 2}
    assert "--allow-outside-root" in dataset.warnings[0].message
    allowed = scanned(root, allow_outside_root=True)
    assert set(labels(allowed)) == {"a/1.jpg", "a/inside.jpg", "a/y.jpg", "b/1.jpg", "x/1.jpg"}


def test_a_root_that_is_a_link_is_fine(tmp_path: Path) -> None:
    touch(tmp_path / "real", "a/1.jpg", "b/1.jpg")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert len(scanned(tmp_path / "link").samples) == 2


def test_only_regular_files_are_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "a/folder.jpg/inner.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    os.symlink("/dev/null", tmp_path / "a" / "device.jpg")
    dataset = scanned(tmp_path, allow_outside_root=True)
    assert set(labels(dataset)) == {"a/1.jpg", "b/1.jpg", "a/folder.jpg/inner.jpg"}
    assert dataset.ignored == {"not regular files": 2}


def test_odd_names_survive(tmp_path: Path) -> None:
    names = [
        b"caf\xe9.jpg",
        b"line\nbreak.jpg",
        b"[red]x[bold].jpg",
        b"\x1b[31m.jpg",
        b"\xff\xfe.jpg",
        b" .jpg",
    ]
    names.append(b"n" * 251 + b".jpg")
    for folder in (b"a", b"\xe9[bold]"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), folder))
        for name in names:
            with open(os.path.join(os.fsencode(tmp_path), folder, name), "wb"):
                pass
    dataset = scanned(tmp_path)
    assert len(dataset.samples) == 2 * len(names)
    found = {os.fsencode(sample.name) for sample in dataset.samples}
    assert found == {folder + b"/" + name for folder in (b"a", b"\xe9[bold]") for name in names}
    assert all(os.path.exists(sample.path) for sample in dataset.samples)


def test_classes_that_look_alike_are_warned_about(tmp_path: Path) -> None:
    touch(tmp_path, "Cat/1.jpg", "cat/1.jpg", "caf\u00e9/1.jpg", "cafe\u0301/1.jpg", "dog/1.jpg")
    dataset = scanned(tmp_path)
    assert len(dataset.class_names) == 5
    assert len(dataset.warnings) == 2


def test_the_order_of_the_file_system_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"{name}/{number}/{number}.jpg" for name in "zab" for number in range(5)))
    os.symlink(tmp_path / "a", tmp_path / "b" / "link")
    expected = scanned(tmp_path)
    real = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            self.entries = sorted(real(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert scanned(tmp_path) == expected


def test_deep_trees_do_not_recurse(tmp_path: Path) -> None:
    folders = [str(touch(tmp_path, "a/1.jpg", "b/1.jpg") / "a")]
    for _ in range(1200):
        folders.append(folders[-1] + "/d")
        os.mkdir(folders[-1])
    touch(Path(folders[-1]), "deep.jpg")
    try:
        assert len(scanned(tmp_path).samples) == 3
    finally:  # pytest's own cleaning recurses
        os.unlink(folders[-1] + "/deep.jpg")
        for folder in reversed(folders[1:]):
            os.rmdir(folder)


def test_a_folder_that_cannot_be_listed_stops_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    real = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"Cannot list folder .*b'"):
        scanned(tmp_path)


def test_classes_of_a_run_are_kept_and_unknown_ones_refused(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg")
    dataset = scan(DataOptions(data=str(tmp_path)), class_names=("a", "b", "c"))
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.samples[0].label == 1
    touch(tmp_path, "d/1.jpg")
    with pytest.raises(DataError, match="'d'"):
        scan(DataOptions(data=str(tmp_path)), class_names=("a", "b", "c"))


# ---- CSV --------------------------------------------------------------------------------------------------


def listed(root: Path, *lines: str, name: str = "data.csv") -> Path:
    """Write a CSV file, with an empty file for each plain image name it mentions."""
    for line in lines[1:]:
        first = line.split("," if name.endswith("csv") else "\t")[0]
        if first.endswith(".jpg") and not first.startswith(("/", "..", "http")):
            touch(root, first)
    path = root / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv_with_all_columns(tmp_path: Path) -> None:
    path = listed(
        tmp_path,
        "group,split,label,filename,more",
        "g1,train,01,x/b.jpg,",
        ",,1,a.jpg,",
        "g1,VALID,NA,c.jpg,",
        ",Test,NA,x/../d.jpg,",
        ",train,NA,e.jpg,",
    )
    touch(tmp_path, "x/b.jpg", "a.jpg", "c.jpg", "d.jpg", "e.jpg")
    dataset = scanned(path)
    assert dataset.kind == "csv"
    assert dataset.root == tmp_path
    assert dataset.class_names == ("01", "1", "NA")
    assert [(sample.name, sample.label, sample.split, sample.group) for sample in dataset.samples] == [
        ("a.jpg", 1, None, None),
        ("c.jpg", 2, "val", "g1"),
        ("d.jpg", 2, "test", None),
        ("e.jpg", 2, "train", None),
        ("x/b.jpg", 0, "train", "g1"),
    ]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "image\tkind\tfold\tpatient", "a.jpg\tx\ttrain\tp", "b.jpg\ty\tval\t", name="d.tsv"
    )
    path.write_text(path.read_text() + "c.jpg\ty\ttrain\t\n")
    named = {"filename_column": "image", "label_column": "kind"}
    assert [sample.split for sample in scanned(path, **named).samples] == [None, None, None]
    full = scanned(path, **named, split_column="fold", group_column="patient")
    assert [(sample.split, sample.group) for sample in full.samples] == [
        ("train", "p"),
        ("val", None),
        ("train", None),
    ]


def test_labels_are_kept_exactly(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "filename,label", 'a.jpg,"x, y"', "b.jpg,x ", "c.jpg,X", "d.jpg,=cmd()", "e.jpg,null"
    )
    dataset = scanned(path)
    assert dataset.class_names == ("=cmd()", "X", "null", "x ", "x, y")
    assert len(dataset.warnings) == 1


def test_problems_are_collected_with_their_lines(tmp_path: Path) -> None:
    path = listed(
        tmp_path,
        "filename,label,split",
        "a.jpg,x,train",
        "b.jpg,,train",
        ",y,train",
        "c.jpg,y,dev",
        "../up.jpg,y,",
        "/etc/passwd,y,",
        "https://example.org/a.jpg,y,",
        "a.jpg,y,train",
        "x/../a.jpg,x,val",
        "d.jpg,y,",
    )
    error = refused(path)
    assert "has 8 problems" in error.message
    for number in range(3, 11):
        assert f"line {number}: " in error.message
    assert "line 2:" not in error.message
    assert "--allow-outside-root" in (error.hint or "")


def test_at_most_ten_problems_are_shown(tmp_path: Path) -> None:
    path = listed(tmp_path, "filename,label", *(f"{number}.jpg," for number in range(30)))
    assert refused(path).message.count("line ") == 10
    assert "and 20 more" in refused(path).message


def test_repeated_rows_are_dropped_and_contradicting_ones_refused(tmp_path: Path) -> None:
    path = listed(tmp_path, "filename,label,group", "a.jpg,x,", "./a.jpg,x,", "b.jpg,y,", "b.jpg,y,")
    dataset = scanned(path)
    assert len(dataset.samples) == 2
    assert dataset.ignored == {"repeated rows": 2}
    assert "2 repeated rows" in dataset.warnings[0].message
    for row, expected in (("a.jpg,y,", "label 'y', on line 2 'x'"), ("a.jpg,x,g", "group 'g'")):
        assert (
            expected in refused(listed(tmp_path, "filename,label,group", "a.jpg,x,", row, "b.jpg,y,")).message
        )


def test_outside_files_only_when_allowed_and_urls_never(tmp_path: Path) -> None:
    touch(tmp_path / "outside", "1.jpg", "2.jpg")
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "outside" / "2.jpg", tmp_path / "root" / "link.jpg")
    os.symlink(tmp_path / "outside", tmp_path / "root" / "folder")
    absolute = tmp_path / "outside" / "1.jpg"
    path = listed(tmp_path / "root", "filename,label", f"{absolute},x", "../outside/2.jpg,y", "link.jpg,y")
    path.write_text(path.read_text() + "folder/1.jpg,x\n")
    assert "has 4 problems" in refused(path).message
    dataset = scanned(path, allow_outside_root=True)
    assert [sample.path for sample in dataset.samples][1] == str(absolute)
    assert all(os.path.exists(sample.path) for sample in dataset.samples)
    for url in ("http://x/a.jpg", "file:///etc/passwd", "s3://b/a.jpg", "data:image/png;base64"):
        error = refused(listed(tmp_path / "root", "filename,label", f"{url},x"), allow_outside_root=True)
        assert "is a URL" in error.message


def test_missing_files_are_left_to_reading_unless_all_are_missing(tmp_path: Path) -> None:
    path = listed(tmp_path, "filename,label", "a.jpg,x", "b.jpg,y")
    (tmp_path / "a.jpg").unlink()
    assert len(scanned(path).samples) == 2
    (tmp_path / "b.jpg").unlink()
    assert "None of the 2 files" in refused(path).message


def test_empty_and_one_class_lists_are_refused(tmp_path: Path) -> None:
    assert "lists no images" in refused(listed(tmp_path, "filename,label")).message
    assert "one class" in refused(listed(tmp_path, "filename,label", "a.jpg,x", "b.jpg,x")).message
    only_val = listed(tmp_path, "filename,label,split", "a.jpg,x,val", "b.jpg,y,val")
    assert "no training images" in refused(only_val).message
    unknown = listed(tmp_path, "filename,label,split", "a.jpg,x,train", "b.jpg,y,train", "c.jpg,z,test")
    assert "test split has classes that train does not have: 'z'" in refused(unknown).message


def test_accents_match_in_either_unicode_form(tmp_path: Path) -> None:
    touch(tmp_path, "cafe\u0301.jpg", "b.jpg")
    path = tmp_path / "data.csv"
    path.write_text("filename,label\ncaf\u00e9.jpg,x\nb.jpg,y\n", encoding="utf-8")
    assert all(os.path.exists(sample.path) for sample in scanned(path).samples)


def test_bytes_that_are_no_utf8_are_allowed_in_file_names_alone(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb"):
        pass
    touch(tmp_path, "b.jpg")
    path = tmp_path / "data.csv"
    path.write_bytes(b"filename,label\ncaf\xe9.jpg,x\nb.jpg,y\n")
    assert os.fsencode(scanned(path).samples[1].name) == b"caf\xe9.jpg"
    path.write_bytes(b"filename,label\nb.jpg,caf\xe9\n")
    assert "line 2: label" in refused(path).message
    assert "iconv" in (refused(path).hint or "")


# ---- images to predict ------------------------------------------------------------------------------------


def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "f/b.jpg", "f/a/c.png", "f/x.txt", "one.weird", "f/.hidden.jpg")
    monkeypatch.chdir(tmp_path)
    found = find_images(["missing.jpg", "f", "one.weird", "f/b.jpg", Path("f")])
    assert [sample.name for sample in found] == ["missing.jpg", "f/a/c.png", "f/b.jpg", "one.weird"]
    assert all(sample.label is None and os.path.isabs(sample.path) for sample in found)
    assert find_images([]) == []


# ---- real data --------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "kind", "images", "classes"),
    [
        ("hymenoptera", "split-folder", 398, 2),
        ("flowers", "folder", 4317, 5),
        ("flowers.csv", "csv", 4317, 5),
        ("sign_digits", "folder", 2062, 10),
        ("sign_digits.csv", "csv", 2062, 10),
        ("neu_surface_defects.csv", "csv", 1800, 6),
        ("neu_surface_defects/labels.csv", "csv", 1800, 6),
    ],
)
def test_real_data(real_assets: Path, name: str, kind: str, images: int, classes: int) -> None:
    dataset = scanned(real_assets / name)
    assert (dataset.kind, len(dataset.samples), len(dataset.class_names)) == (kind, images, classes)
    assert not dataset.warnings
