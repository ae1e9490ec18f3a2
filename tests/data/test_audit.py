"""The audit finds what would poison training, and what is only odd, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tlcli.config.data import DataOptions
from tlcli.data.audit import Audit, Finding, audit, examine, require_usable
from tlcli.data.image_files import BadImage
from tlcli.data.scan import scan
from tlcli.data.split import assign_splits
from tlcli.errors import DataError
from tlcli.progress import Silent

Images = Callable[..., Path]


def audited(data: Path, *, max_bad: float = 0.01, min_per_class: int = 2, **options: Any) -> Audit:
    dataset = scan(DataOptions(data=str(data), **options))
    examined = examine(dataset.samples, 2, Silent())
    prints = [item.fingerprint for item in examined]
    splits = assign_splits(dataset.samples, prints, val_fraction=0.2, split_seed=0)
    found = audit(dataset, examined, splits, max_bad=max_bad, min_per_class=min_per_class)
    assert json.loads(json.dumps(found.document())) == found.document()
    return found


def only(found: Audit, kind: str) -> Finding:
    (finding,) = [finding for finding in found.findings if finding.kind == kind]
    return finding


def kinds(found: Audit) -> list[str]:
    return [finding.kind for finding in found.findings]


def test_nothing_is_found_in_good_data(tmp_path: Path, make_images: Images) -> None:
    found = audited(make_images(tmp_path, {"a": 12, "b": 14}))
    assert found.findings == ()
    assert found.num_images == 26
    assert found.formats == {"PNG": 26}
    assert {name: sum(counts.values()) for name, counts in found.counts.items()} == {"a": 12, "b": 14}
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.png"))


def test_unreadable_images_are_named_with_the_reason(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path, {"a": 20, "b": 20})
    whole = (root / "a" / "003.png").read_bytes()
    (root / "a" / "003.png").write_bytes(whole[:-20])
    (root / "b" / "007.png").write_bytes(b"<html>404</html>")
    for max_bad, severity in ((0.01, "error"), (0.1, "warning")):
        found = audited(root, max_bad=max_bad)
        finding = only(found, "unreadable")
        assert finding.severity == severity
        assert finding.items[0].startswith("'a/003.png': truncated")
        assert "HTML" in finding.items[1]
        assert [bad.name for bad in found.bad] == ["a/003.png", "b/007.png"]
        assert bool(found.errors) == (severity == "error")


def test_a_class_without_a_usable_image_is_an_error(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path, {"a": 200, "b": 200, "c": 1})
    (root / "c" / "000.png").write_bytes(b"broken")
    found = audited(root)
    assert only(found, "class-lost").items == ("'c'",)
    assert only(found, "unreadable").severity == "warning"


def test_one_image_in_two_classes_is_an_error(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path, {"a": 10, "b": 10})
    shutil.copy(root / "a" / "003.png", root / "b" / "copy.png")
    finding = only(audited(root), "conflicting-labels")
    assert finding.severity == "error"
    assert "'a/003.png' ('a'" in finding.items[0]
    assert "= 'b/copy.png' ('b'" in finding.items[0]


def test_one_image_in_two_splits_is_an_error_and_a_copy_in_one_a_warning(
    tmp_path: Path, make_images: Images
) -> None:
    make_images(tmp_path / "train", {"a": 10, "b": 10}, seed=1)
    make_images(tmp_path / "val", {"a": 5, "b": 5}, seed=2)
    shutil.copy(tmp_path / "train/a/003.png", tmp_path / "train/a/copy.png")
    found = audited(tmp_path)
    assert kinds(found) == ["duplicates"]
    assert only(found, "duplicates").message.startswith("1 exact copy of")
    shutil.copy(tmp_path / "train/b/003.png", tmp_path / "val/b/copy.png")
    found = audited(tmp_path)
    assert kinds(found) == ["leakage", "duplicates"]
    assert "('b', train) = 'val/b/copy.png' ('b', val)" in only(found, "leakage").items[0]


def test_a_divided_group_is_an_error(tmp_path: Path, make_images: Images) -> None:
    make_images(tmp_path, {"a": 4, "b": 4})
    lines = ["filename,label,split,group"]
    for name in ("a", "b"):
        lines += [
            f"{name}/{n:03d}.png,{name},{'val' if n == 0 else 'train'},{name}{n // 2}" for n in range(4)
        ]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    finding = only(audited(tmp_path / "data.csv"), "divided-groups")
    assert finding.items == ("'a0' in train, val", "'b0' in train, val")


def test_class_sizes(tmp_path: Path, make_images: Images) -> None:
    found = audited(make_images(tmp_path, {"a": 60, "b": 3, "c": 1}), min_per_class=5)
    assert only(found, "tiny-class").items == ("'b': 1", "'c': 1")
    assert "'a'" in only(found, "imbalance").message
    assert only(found, "missing-in-val").items == ("'c'",)
    assert not found.errors


def test_the_odd_one_out_in_format_and_size_is_named(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path, {"a": 30, "b": 30}, size=(64, 48), suffix=".jpg")
    Image.new("P", (30, 30), 3).save(root / "a" / "imageNotFound.gif")
    Image.effect_noise((1000, 800), 50).convert("RGB").save(root / "b" / "huge.jpg")
    Image.effect_noise((4, 60), 50).convert("RGB").save(root / "b" / "narrow.jpg")
    found = audited(root)
    assert "typically 64x48" in only(found, "odd-format").message
    assert "'a/imageNotFound.gif'" in only(found, "odd-format").items[0]
    assert "GIF, 30x30 pixels" in only(found, "odd-format").items[0]
    assert [item.split("'")[1] for item in only(found, "odd-size").items] == ["b/huge.jpg", "b/narrow.jpg"]
    assert "'a/imageNotFound.gif'" in only(found, "blank").items[0]
    assert not found.errors


def test_mixed_formats_and_sizes_are_not_odd(tmp_path: Path, make_images: Images) -> None:
    for number, size in enumerate([(40, 30), (300, 200), (64, 64), (500, 375), (90, 160)]):
        make_images(tmp_path, {"a": 4, "b": 4}, size=size, suffix=f".{number}.jpg", seed=number)
        make_images(tmp_path, {"a": 4, "b": 4}, size=size, suffix=f".{number}.png", seed=number + 50)
    assert not {"odd-format", "odd-size"} & set(kinds(audited(tmp_path)))


def test_policies_are_noted(tmp_path: Path, make_images: Images) -> None:
    root = make_images(tmp_path, {"a": 6, "b": 6})
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    noise.convert("RGBA").save(root / "a" / "alpha.png")
    noise.convert("CMYK").save(root / "a" / "cmyk.jpg")
    frames = [noise.rotate(90 * turn) for turn in range(3)]
    frames[0].save(root / "b" / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(root / "b" / "turned.jpg", exif=exif)
    (root / "b" / "notes.txt").touch()
    found = audited(root)
    for kind in ("alpha", "cmyk", "animation", "orientation", "ignored"):
        assert only(found, kind).severity == "note"


def test_require_usable(tmp_path: Path, make_images: Images) -> None:
    dataset = scan(DataOptions(data=str(make_images(tmp_path, {"a": 3, "b": 3}))))
    splits = ["train", "train", "val"] * 2
    bad = [BadImage(sample.name, sample.path, "broken") for sample in dataset.samples]
    require_usable(dataset, splits, [], max_bad=0.0)
    require_usable(dataset, splits, bad[:1], max_bad=0.5)
    with pytest.raises(DataError, match=r"1 image of 6 \(16\.7%\)"):
        require_usable(dataset, splits, bad[:1], max_bad=0.1)
    with pytest.raises(DataError, match="No usable training image is left of 'a'"):
        require_usable(dataset, splits, bad[:2], max_bad=1.0)


@pytest.mark.real
def test_the_placeholder_among_the_ants_is_told(real_assets: Path) -> None:
    found = audited(real_assets / "hymenoptera")
    assert "imageNotFound.gif" in only(found, "odd-format").items[0]
    assert not found.errors


@pytest.mark.real
def test_flowers_hold_the_same_image_as_rose_and_tulip(real_assets: Path) -> None:
    assert len(only(audited(real_assets / "flowers"), "conflicting-labels").items) == 4
