"""Rows to put into a cache, and the check of what comes out."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey

ENV = {"torch": "2.10.0", "device": "cpu"}
DIM = 8


def spec(**facts: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "architecture": "resnet18",
        "cut": "all",
        "preprocess": {"image_size": [224, 224], "mean": ["0.485", "0.456", "0.406"]},
        "row_dtype": "fp32",
        "row_shape": [DIM],
        **facts,
    }


def row_key(number: int, view: int = 0) -> RowKey:
    return hashlib.sha256(f"image {number}".encode()).hexdigest(), view


def row(number: int) -> np.ndarray:
    return np.arange(DIM, dtype=np.float32) + np.float32(number)


def put(entry: Entry, numbers: Any, env: dict[str, Any] = ENV) -> None:
    with entry.writer(env) as writer:
        for number in numbers:
            writer.add(row_key(number), row(number))


def check(entry: Entry, numbers: Any, missing: Any = ()) -> None:
    """What is there must be right, and just `missing` must be missing."""
    numbers = list(numbers)
    rows, absent = entry.read([row_key(number) for number in numbers])
    assert [numbers[place] for place in absent] == list(missing)
    for number, found in zip(numbers, rows, strict=True):
        expected = np.zeros(DIM, np.float32) if number in missing else row(number)
        np.testing.assert_array_equal(found, expected)


def shard_paths(entry: Entry) -> list[Path]:
    return sorted(entry.shards_dir.glob("*.safetensors"))


def quarantined(entry: Entry) -> list[Path]:
    return sorted(entry.quarantine_dir.glob("*.safetensors"))


def reason_of(entry: Entry, name: str) -> str:
    """Return why a shard is in quarantine."""
    return (entry.quarantine_dir / f"{name}.txt").read_text()


def intact_rows(path: Path, entry: Entry) -> set[RowKey]:
    """Return the rows of a file that may be given out, by docs/cache-format.md and not by the product."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + size or size > 65536 - 8:
        return set()
    try:
        claimed = json.loads(raw[8 : 8 + size])
        count, env = claimed["rows"]["shape"][0], claimed["__metadata__"]["env"]
        record = json.loads(env)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return set()
    plain = json.dumps(record, sort_keys=True, separators=(",", ":"))
    if type(count) is not int or type(record) is not dict or plain != env:
        return set()
    row_bytes = 4 * DIM
    ends = [8 * count, 40 * count, 44 * count, (44 + row_bytes) * count]
    begins = [0, *ends]
    tensors = (("checksum", "U64", [count]), ("image_sha256", "U8", [count, 32]), ("view", "U32", [count]),
               ("rows", "F32", [count, DIM]))  # fmt: skip
    header = {"__metadata__": {"schema": "tlcli.shard/1", "entry_key": entry.key, "env": env}} | {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for (name, dtype, shape), begin, end in zip(tensors, begins, ends, strict=False)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = raw[8 + size :]
    if raw[8 : 8 + size] != text or len(data) != ends[-1]:
        return set()
    found = set()
    for number in range(count):
        sha256 = data[begins[1] + 32 * number :][:32]
        view = data[begins[2] + 4 * number :][:4]
        row = data[begins[3] + row_bytes * number :][:row_bytes]
        stored = int.from_bytes(data[8 * number :][:8], "little")
        if xxhash.xxh3_64_intdigest(sha256 + view + row) == stored:
            found.add((sha256.hex(), int.from_bytes(view, "little")))
    return found
