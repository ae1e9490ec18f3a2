"""A damaged cache costs time, never accuracy: the run ends as if nothing had been damaged.

Each case takes a copy of the cache that an undisturbed run left, damages it, and trains again from it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.tiny import TINY_FP32
from tlcli.commands.finetune import finetune, plan_finetune
from tlcli.config.commands import FinetuneConfig
from tlcli.machine import paths
from tlcli.progress import Silent

TINY = (*TINY_FP32, "--json")
NUM_ROWS = 48
ROW_BYTES = 4 * 96  # test_resnet gives 96 values; `undisturbed` checks it
FILES = ("evaluation-val.json", "predictions-val.csv", "model.safetensors", "metrics.jsonl")


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run, what it left in the cache, and how to repeat it."""

    config: FinetuneConfig
    home: Path
    metrics: dict
    digests: dict


def train(config: FinetuneConfig):
    return finetune(plan_finetune(config, Silent()), Silent())


def digests_of(run: Path) -> dict[str, str]:
    """Return the hashes of what a run is: its weights, its predictions and its numbers, without its times."""
    found = {}
    for name in FILES:
        if (run / name).exists():
            text = re.sub(rb'"[a-z_]*seconds": ?[0-9.e-]+', b"", (run / name).read_bytes())
            found[name] = hashlib.sha256(text).hexdigest()
    assert {"evaluation-val.json", "predictions-val.csv", "model.safetensors"} <= found.keys()
    return found


def make_undisturbed(images: Path, root: Path, **options) -> Undisturbed:
    config = FinetuneConfig(
        data=str(images), backbone="test_resnet", random_init=True, image_size=32, workers=1, dtype="fp32",
        folds=2, cache="always", output=str(root / "run"), **options,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_HOME", str(root / "home"))
        result = train(config)
    return Undisturbed(config, root / "home", result.document["metrics"], digests_of(result.run_path))


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory) -> Undisturbed:
    """Return a run of a head on frozen features, with one shard of NUM_ROWS rows."""
    root = tmp_path_factory.mktemp("undisturbed")
    made = make_undisturbed(trained.images, root, l2="0.01,1", scaling="plain")
    (shard,) = made.home.rglob("shards/*.safetensors")
    raw = shard.read_bytes()
    assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == NUM_ROWS * (44 + ROW_BYTES)
    return made


def take(undisturbed: Undisturbed) -> Path:
    """Put a copy of the undisturbed run's cache where the next run will look; return its entry's folder."""
    shutil.copytree(undisturbed.home, paths.home(), symlinks=True)
    (spec,) = paths.features_dir().glob("v1/*/*/spec.json")
    return spec.parent


def repeat(undisturbed: Undisturbed, tmp_path: Path) -> dict[str, int]:
    """Train again, check that the result is the same, and return the counts of its features."""
    result = train(dataclasses.replace(undisturbed.config, output=str(tmp_path / "again")))
    assert result.document["metrics"] == undisturbed.metrics
    assert digests_of(result.run_path) == undisturbed.digests
    return result.document["features"]


def shard_of(entry: Path) -> Path:
    (shard,) = (entry / "shards").glob("*.safetensors")
    return shard


def zeros(entry: Path) -> None:
    path = shard_of(entry)
    path.write_bytes(bytes(path.stat().st_size))


def three_rows_zeroed(entry: Path) -> None:
    path = shard_of(entry)
    path.write_bytes(path.read_bytes()[: -3 * ROW_BYTES] + bytes(3 * ROW_BYTES))


def flip(place: int):
    """Return a damage that flips a bit, at a place counted from the begin of a shard or from its end."""

    def damage(entry: Path) -> None:
        path = shard_of(entry)
        raw = bytearray(path.read_bytes())
        raw[place] ^= 16
        path.write_bytes(raw)

    return damage


def swap_rows(entry: Path) -> None:
    path = shard_of(entry)
    raw = path.read_bytes()
    path.write_bytes(raw[: -2 * ROW_BYTES] + raw[-ROW_BYTES:] + raw[-2 * ROW_BYTES : -ROW_BYTES])


def foreign_shard(entry: Path) -> None:
    """Another entry's shard in the place of this one's."""
    path = shard_of(entry)
    path.write_bytes(path.read_bytes().replace(entry.name.encode(), b"cd" * 32))


def garbage(entry: Path) -> None:
    """What is no shard, and what somebody did not finish writing."""
    shards, half = entry / "shards", shard_of(entry).read_bytes()[:1000]
    (shards / "notes.txt").write_text("mine")
    (shards / ("0" * 32 + ".safetensors")).mkdir()
    os.mkfifo(shards / ("1" * 32 + ".safetensors"))
    (shards / ("2" * 32 + ".safetensors")).write_bytes(b"garbage")
    (shards / f".tmp-00000000-1-{'0' * 32}").write_bytes(half)


def clocks(entry: Path) -> None:
    """Everything was written in what is now the distant future."""
    for path in paths.features_dir().rglob("*"):
        os.utime(path, (6e9, 6e9))


TABLES = NUM_ROWS * (44 + ROW_BYTES)
# name -> what is done to the entry's folder, rows that are lost, why the shard is in quarantine
DAMAGES = {
    "a bit of a row": (flip(-5), 1, "checksums"),
    "a bit of a checksum": (flip(-TABLES), 1, "checksums"),
    "a bit of a key": (flip(-TABLES + 8 * NUM_ROWS), 1, None),  # of a row that nobody asks for now
    "a bit of the header": (flip(20), NUM_ROWS, "header"),
    "three rows zeroed": (three_rows_zeroed, 3, "checksums"),
    "zeros": (zeros, NUM_ROWS, "header"),
    "cut": (lambda entry: os.truncate(shard_of(entry), 5000), NUM_ROWS, "5000 bytes instead of"),
    "two rows swapped": (swap_rows, 2, "checksums"),
    "another entry's": (foreign_shard, NUM_ROWS, "another entry"),
    "a lost shard": (lambda entry: shard_of(entry).unlink(), NUM_ROWS, None),
    "a lost entry": (shutil.rmtree, NUM_ROWS, None),
    "a lost spec": (lambda entry: (entry / "spec.json").unlink(), 0, None),
    "garbage": (garbage, 0, "ends at byte 7"),
    "clocks": (clocks, 0, None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_on_a_damaged_cache_is_the_undisturbed_run(undisturbed, tmp_path, damage):
    harm, lost, reason = DAMAGES[damage]
    entry = take(undisturbed)
    harm(entry)
    features = repeat(undisturbed, tmp_path)
    assert (features["rows_computed"], features["rows_reused"]) == (lost, NUM_ROWS - lost)
    reasons = [path.read_text() for path in sorted((entry / "quarantine").glob("*.txt"))]
    assert len(reasons) == (reason is not None)
    assert all(reason in text for text in reasons)
    third = repeat(undisturbed, tmp_path / "third")
    assert (third["rows_computed"], third["rows_reused"]) == (0, NUM_ROWS)


@pytest.mark.parametrize("text", ["edited", "newer", "empty"])
def test_a_spec_that_was_edited_is_refused_until_its_folder_is_deleted(undisturbed, tmp_path, run_cli, text):
    entry = take(undisturbed)
    path = entry / "spec.json"
    facts = json.loads(path.read_text())
    texts = {
        "edited": json.dumps({**facts, "row_dtype": "bf16"}),
        "newer": json.dumps({**facts, "schema": facts["schema"] + 1}),
        "empty": "",
    }
    path.write_text(texts[text])
    before = {item: item.stat().st_mtime_ns for item in entry.rglob("*")}
    data = undisturbed.config.data
    for command in (("extract", data), ("finetune", data, "-o", tmp_path / "refused")):
        result = run_cli(*command, *TINY)
        assert result.code == 5
        assert result.stdout == ""
        assert "spec.json" in result.stderr
        assert ("newer tlcli" if text == "newer" else "Delete the folder") in result.stderr
    assert {item: item.stat().st_mtime_ns for item in entry.rglob("*")} == before
    assert path.read_text() == texts[text]
    shutil.rmtree(entry)
    assert repeat(undisturbed, tmp_path)["rows_computed"] == NUM_ROWS


def test_verify_tells_and_the_next_run_computes_what_was_lost(undisturbed, tmp_path, run_cli):
    entry = take(undisturbed)
    name = shard_of(entry).name
    flip(-5)(entry)
    found = run_cli("cache", "verify", "--json")
    assert found.code == 6
    (told,) = json.loads(found.stdout)["entries"]
    assert told["damaged"] == [{"shard": name, "reason": "rows do not match their checksums", "rows_lost": 1}]
    assert told["rows"] == NUM_ROWS - 1
    assert repeat(undisturbed, tmp_path)["rows_computed"] == 1
    assert run_cli("cache", "verify", "--deep").code == 0


def test_training_from_cached_views_meets_damage(trained, tmp_path):
    """Rows of views are read in each epoch; those that prove damaged are computed on the way."""
    made = make_undisturbed(
        trained.images, tmp_path / "made", freeze="3", epochs=2, batch_size=8, views=2,
        augment="light",
        amp="none", head_init="probe",
    )  # fmt: skip
    shutil.copytree(made.home, paths.home())
    shards = sorted(paths.features_dir().rglob("shards/*.safetensors"))
    assert len(shards) == 2  # of the plain rows and of the views
    for shard in shards:
        raw = bytearray(shard.read_bytes())
        raw[-3] ^= 1
        shard.write_bytes(raw)
    features = repeat(made, tmp_path)
    assert features["rows_computed"] == 2
    for shard in shards:
        assert "checksums" in (shard.parent.parent / "quarantine" / f"{shard.name}.txt").read_text()
    assert repeat(made, tmp_path / "third")["rows_computed"] == 0
