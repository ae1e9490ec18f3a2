"""`tlcli cache`: streams, documents and exit codes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tlcli.cache.entry import Entry
from tlcli.cache.store import Store
from tlcli.machine import paths

SPEC = {
    "schema": 1, "architecture": "resnet18", "backbone": "timm/resnet18", "cut": "all",
    "preprocess": {"image_size": [224, 224]}, "compute_dtype": "bf16", "row_dtype": "fp32", "row_shape": [4],
}  # fmt: skip


def fill(count: int = 3, first: int = 0, **facts: object) -> Entry:
    entry = Store(paths.features_dir()).entry({**SPEC, **facts})
    with entry.writer({"torch": "2.10.0", "device": "cpu"}) as writer:
        for number in range(first, first + count):
            writer.add((f"{number:064x}", 0), np.full(4, number, np.float32))
    return entry


def age(entry: Entry, days: float) -> None:
    mark = entry.directory / "last_used"
    then = mark.stat().st_mtime - days * 86400
    os.utime(mark, (then, then))


def damage(entry: Entry) -> Path:
    path = next(entry.shards_dir.iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    return path


@pytest.mark.parametrize("command", [("list",), ("verify",), ("prune",), ("prune", "--max-size", "0B")])
def test_an_empty_cache_is_fine(run_cli, command):
    result = run_cli("cache", *command)
    assert result.code == 0
    assert "empty" in result.stdout or "nothing to prune" in result.stdout
    document = run_cli("cache", *command, "--json")
    assert document.code == 0
    assert json.loads(document.stdout)["schema"] == f"tlcli.cache.{command[0]}/1"
    assert not paths.features_dir().exists()


def test_list(run_cli):
    entry = fill()
    age(fill(1, cut={"node": "layer3"}, backbone=None), 3)
    text = run_cli("cache", "list")
    assert text.code == 0
    for part in (entry.key[:12], "timm/resnet18", "4 fp32", "just now", "3 days ago", "layer3", "2 entries"):
        assert part in text.stdout
    assert "tlcli cache show" in text.stderr
    document = json.loads(run_cli("cache", "list", "--json").stdout)
    first, second = document["entries"]
    assert (first["key"], first["rows"], first["shards"], first["problem"]) == (entry.key, 3, 1, None)
    assert (second["backbone"], second["cut"]) == ("resnet18", "layer3")
    assert document["bytes"] == first["bytes"] + second["bytes"]


def test_list_names_an_entry_it_cannot_trust(run_cli):
    (fill().directory / "spec.json").write_text("{}")
    result = run_cli("cache", "list", "--json")
    assert result.code == 0
    (found,) = json.loads(result.stdout)["entries"]
    assert "damaged or was edited" in found["problem"]
    assert found["backbone"] is None
    assert "spec.json" in run_cli("cache", "list").stdout


def test_show(run_cli):
    entry = fill()
    text = run_cli("cache", "show", entry.key[:6])
    assert text.code == 0
    for part in (entry.key, "preprocess.image_size", "[224,224]", "torch 2.10.0", "device cpu"):
        assert part in text.stdout
    document = json.loads(run_cli("cache", "show", entry.key, "--json").stdout)
    assert document["spec"] == SPEC
    assert document["rows"] == 3
    assert document["shards"][0]["env"] == {"torch": "2.10.0", "device": "cpu"}
    damage(entry)
    (entry.shards_dir / ("0" * 32 + ".safetensors")).write_bytes(b"")
    found = run_cli("cache", "show", entry.key)
    assert "1 damaged shards" in found.stdout
    assert "cache verify" in found.stderr


@pytest.mark.parametrize("arguments", [(), ("zzz",), ("",)])
def test_show_without_an_entry_is_a_usage_error(run_cli, arguments):
    fill()
    result = run_cli("cache", "show", *arguments)
    assert result.code == 2
    assert result.stdout == ""
    assert ("KEY is empty" if arguments == ("",) else "tlcli cache list") in result.stderr


def test_verify(run_cli):
    entry = fill()
    assert run_cli("cache", "verify", "--deep").code == 0
    name = damage(entry).name
    result = run_cli("cache", "verify", entry.key[:8], "--json")
    assert result.code == 6
    document = json.loads(result.stdout)
    assert document["ok"] is False
    (found,) = document["entries"]
    assert found["damaged"] == [
        {"shard": name, "reason": "rows do not match their checksums", "rows_lost": 1}
    ]
    assert found["rows"] == 2
    again = run_cli("cache", "verify")
    assert again.code == 0
    assert "ok" in again.stdout


def test_verify_tells_of_an_edited_spec(run_cli):
    entry = fill()
    fill(2, cut="layer1")
    (entry.directory / "spec.json").write_text("{}")
    result = run_cli("cache", "verify")
    assert result.code == 6
    assert "spec.json" in result.stdout
    assert "1 of 2 cache entries" in result.stderr


def test_prune_plans_and_prunes(run_cli):
    old, new = fill(), fill(2, cut="layer1")
    age(old, 40)
    planned = run_cli("cache", "prune", "--older-than", "30d", "--dry-run", "--json")
    assert planned.code == 0
    document = json.loads(planned.stdout)
    assert document["dry_run"] is True
    assert [item["key"] for item in document["retired"]] == [old.key]
    assert document["freed_now_bytes"] == 0
    assert document["freed_later_bytes"] == document["retired"][0]["bytes"]
    assert old.directory.exists()
    text = run_cli("cache", "prune", "--older-than", "30d")
    assert text.code == 0
    assert "40.0 days" in text.stdout
    assert "after 10 minutes" in text.stdout
    assert not old.directory.exists()
    kept = run_cli("cache", "prune", "--max-size", "0B")
    assert "used in the last 15 minutes" in kept.stdout
    assert new.directory.exists()


def test_prune_tells_everything_and_empties_the_trash_later(run_cli):
    old, used = fill(), fill(2, cut="layer1")
    fill(1, cut="layer1", first=9)
    age(old, 40)
    planned = json.loads(run_cli("cache", "prune", "--max-size", "0B", "--dry-run", "--json").stdout)
    assert old.directory.exists()
    result = run_cli("cache", "prune", "--max-size", "0B", "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert document == {**planned, "dry_run": False}
    assert document["schema"] == "tlcli.cache.prune/1"
    assert [item["key"] for item in document["retired"]] == [old.key]
    assert [item["key"] for item in document["kept_in_use"]] == [used.key]
    assert [item["key"] for item in document["merged_shards"]] == [used.key] * 2
    assert document["grace_seconds"] == 600
    assert document["retired"][0]["reason"] == "the least recently used, above the size asked for"
    trash = paths.features_dir() / "trash"
    assert len(list(trash.iterdir())) == 3
    waiting = json.loads(run_cli("cache", "prune", "--json").stdout)
    assert (waiting["removed_files"], waiting["freed_now_bytes"]) == (0, 0)
    for path in trash.iterdir():
        path.rename(trash / f"1-{path.name.partition('-')[2]}")
    freed = json.loads(run_cli("cache", "prune", "--json").stdout)
    assert freed["removed_files"] == 3
    assert freed["freed_now_bytes"] == waiting["freed_later_bytes"] > document["retired"][0]["bytes"]
    assert list(trash.iterdir()) == []
    assert len(used.rows()) == 3


def test_prune_refuses_a_folder_that_is_no_cache(run_cli):
    """What somebody put under TLCLI_HOME by mistake is not deleted."""
    old = fill()
    age(old, 40)
    (paths.features_dir() / "CACHEDIR.TAG").unlink()
    result = run_cli("cache", "prune", "--older-than", "1d", "--json")
    assert (result.code, result.stdout) == (5, "")
    assert "CACHEDIR.TAG" in result.stderr
    assert len(old.rows()) == 3


@pytest.mark.parametrize("command", [("list",), ("verify",), ("prune", "--max-size", "0B")])
def test_a_folder_of_another_user_that_everybody_may_write(run_cli, monkeypatch, command):
    entry = fill()
    paths.features_dir().chmod(0o777)
    if os.geteuid() == 0:
        os.chown(paths.features_dir(), 65534, 65534)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    result = run_cli("cache", *command)
    assert (result.code, result.stdout) == (5, "")
    assert "everybody may write" in result.stderr
    assert "chmod o-w" in result.stderr
    assert entry.directory.exists()


def test_shards_whose_spec_was_lost_are_listed_and_pruned(run_cli):
    entry = fill()
    (entry.directory / "spec.json").unlink()
    (found,) = json.loads(run_cli("cache", "list", "--json").stdout)["entries"]
    assert "spec.json" in found["problem"]
    age(entry, 40)
    assert run_cli("cache", "prune", "--older-than", "30d").code == 0
    assert not entry.directory.exists()


@pytest.mark.parametrize("option", [("--older-than", "soon"), ("--max-size", "20")])
def test_prune_refuses_what_it_cannot_read(run_cli, option):
    result = run_cli("cache", "prune", *option)
    assert result.code == 2
    assert result.stdout == ""
    assert option[1] in result.stderr


def test_a_cache_folder_that_is_a_file(run_cli):
    paths.home().mkdir(parents=True)
    paths.features_dir().write_text("")
    result = run_cli("cache", "list")
    assert result.code == 5
    assert result.stdout == ""
    assert "not a folder" in result.stderr
