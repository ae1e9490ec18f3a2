"""Rows to put into a cache, and the check of what comes out."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

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
