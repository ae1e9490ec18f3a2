"""One shard: an immutable safetensors file that holds rows, their keys and a checksum for each.

Its header is a function of (entry key, row format, number of rows, environment record). A reader computes the
header it expects and compares bytes, which refuses holes, overlaps, duplicate keys, foreign shards and wrong
sizes at once. Rows are read with pread and checked on every read. docs/cache-format.md specifies the bytes.
"""

import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from tlcli.cache.key import RowKey, canonical_json
from tlcli.machine.files import opened, publish, read_at

SHARD_SCHEMA = "tlcli.shard/1"
SUFFIX = ".safetensors"
KEY_BYTES = 36  # 32 of the image's SHA-256, 4 of the view, little-endian
TABLE_BYTES = 8 + KEY_BYTES  # a row's share of the tables before the rows
MAX_HEADER_BYTES = 65536
MAX_ROWS = 1 << 48  # no disk holds more; numbers of thousands of digits cannot even be printed
CHUNK_BYTES = 1 << 20  # longest single read of rows: what fits the processor's cache is checked at once
PASSING = (errno.EIO, errno.ESTALE)
GAP_BYTES = 64 << 10  # unwanted bytes worth reading through to save a system call
DTYPES = {"fp32": ("F32", "<f4"), "bf16": ("BF16", "<u2")}

Bytes2D = NDArray[np.uint8]


class DamagedShard(Exception):
    """A file is not a shard of its entry, or cannot be read; the text is the reason."""


@dataclass(frozen=True)
class RowFormat:
    """How one row is stored.

    Attributes:
        dtype: "fp32" (numpy float32) or "bf16" (numpy uint16 that holds the bit pattern).
        shape: Shape of one row.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "RowFormat":
        """Return the format that a spec's `row_dtype` and `row_shape` name.

        Raises:
            ValueError: They are missing or unknown.
        """
        dtype, shape = spec.get("row_dtype"), spec.get("row_shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"row_dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if not shape or type(shape) not in (list, tuple) or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"row_shape {shape!r}: expected a list of positive ints")
        return cls(dtype, tuple(shape))

    @property
    def numpy_dtype(self) -> "np.dtype[Any]":
        """Return numpy's type of one element."""
        return np.dtype(DTYPES[self.dtype][1])

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


def pack_key(key: RowKey) -> bytes:
    """Return a row key as its 36 bytes.

    Raises:
        ValueError: Not 64 lower-case hex digits and a view in [0, 2**32).
    """
    sha256, view = key
    packed = bytes.fromhex(sha256)
    if len(packed) != 32 or packed.hex() != sha256 or not 0 <= view < 1 << 32:
        raise ValueError(f"row key {key!r}: expected 64 lower-case hex digits and a view from 0")
    return packed + view.to_bytes(4, "little")


def row_checksums(keys: Bytes2D, rows: Bytes2D) -> NDArray[np.uint64]:
    """Return XXH3-64 over each row's 36 key bytes and its row bytes, uint64 [n].

    Args:
        keys: Packed row keys, uint8 [n, 36], C-contiguous.
        rows: Row bytes, uint8 [n, row_bytes], C-contiguous.
    """
    sums = np.empty(len(rows), np.uint64)
    for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
        state = xxhash.xxh3_64(key)
        state.update(row)
        sums[number] = state.intdigest()
    return sums


def shard_header(entry_key: str, row_format: RowFormat, num_rows: int, env: str) -> bytes:
    """Return the bytes before a shard's data: length, JSON, and spaces up to a multiple of 64.

    Args:
        entry_key: Key of the entry the shard belongs to.
        row_format: How a row is stored.
        num_rows: Rows in the shard, at least 1.
        env: Environment record, canonical JSON.
    """
    tensors = (
        ("checksum", "U64", [num_rows], 8),
        ("image_sha256", "U8", [num_rows, 32], 32),
        ("view", "U32", [num_rows], 4),
        ("rows", DTYPES[row_format.dtype][0], [num_rows, *row_format.shape], row_format.row_bytes),
    )
    header: dict[str, Any] = {"__metadata__": {"schema": SHARD_SCHEMA, "entry_key": entry_key, "env": env}}
    begin = 0
    for name, dtype, shape, num_bytes in tensors:
        end = begin + num_rows * num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    folder: Path, entry_key: str, row_format: RowFormat, env: str, keys: Bytes2D, rows: Bytes2D
) -> str:
    """Publish a shard durably and return its name; the same content gives the same file.

    Args:
        folder: The entry's `shards` folder.
        entry_key: Key of the entry.
        row_format: How a row is stored.
        env: Environment record, canonical JSON.
        keys: Packed row keys, uint8 [n, 36], C-contiguous, n >= 1.
        rows: Row bytes, uint8 [n, row_bytes], C-contiguous.

    Raises:
        OSError: The disk refuses; nothing is left behind.
        ValueError: The environment record does not fit into a header.
    """
    header = shard_header(entry_key, row_format, len(rows), env)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"environment record of {len(env)} bytes: expected less than {MAX_HEADER_BYTES}")
    tables = (
        row_checksums(keys, rows).astype("<u8").tobytes() + keys[:, :32].tobytes() + keys[:, 32:].tobytes()
    )
    chunks = (header, tables, rows.data)
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    name = digest.hexdigest()[:32] + SUFFIX
    publish(folder / name, chunks)
    return name


@dataclass
class Shard:
    """An opened shard: its tables, and which of its rows are still believed.

    Attributes:
        path: The file.
        env: Environment record, canonical JSON.
        keys: Packed row keys, uint8 [n, 36].
        checksums: XXH3-64 of each row, uint64 [n].
        row_bytes: Bytes of one row.
        rows_offset: Where the first row begins in the file.
        sound: False for rows that were found damaged, bool [n].
    """

    path: Path
    env: str
    keys: Bytes2D
    checksums: NDArray[np.uint64]
    row_bytes: int
    rows_offset: int
    sound: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.sound = np.ones(len(self.keys), bool)

    @property
    def num_bytes(self) -> int:
        """Return the size of the file."""
        return self.rows_offset + len(self.keys) * self.row_bytes

    @property
    def num_damaged(self) -> int:
        """Return how many rows were found damaged."""
        return int((~self.sound).sum())

    def row_keys(self) -> list[RowKey]:
        """Return the key of every row, in the order of the file."""
        text = self.keys[:, :32].tobytes().hex()
        views = self.keys[:, 32:].copy().view("<u4").ravel().tolist()
        return [(text[64 * row : 64 * row + 64], view) for row, view in enumerate(views)]

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[slice, Bytes2D, NDArray[np.bool_]]]:
        """Read rows in few large pieces and check each.

        Args:
            rows: Row numbers, ascending; int64 [k].

        Yields:
            Which part of `rows` this piece is; the bytes, uint8 [piece, row_bytes]; which of them are intact,
            bool [piece]. Rows that are not intact are marked in `sound`.

        Raises:
            FileNotFoundError: The shard was pruned or quarantined meanwhile.
            OSError: The shard cannot be opened (permission, too many open files).
        """
        with opened(self.path) as fd:
            for part in _pieces(rows, self.row_bytes):
                first, last = int(rows[part.start]), int(rows[part.stop - 1])
                picked = rows[part]
                size = (last - first + 1) * self.row_bytes
                try:
                    piece = _read_exactly(fd, size, self.rows_offset + first * self.row_bytes)
                except DamagedShard:
                    self.sound[picked] = False
                    yield part, np.zeros((len(picked), self.row_bytes), np.uint8), np.zeros(len(picked), bool)
                    continue
                data = np.frombuffer(piece, np.uint8).reshape(-1, self.row_bytes)
                if len(picked) != len(data):
                    data = data[picked - first]
                intact = row_checksums(self.keys[picked], data) == self.checksums[picked]
                self.sound[picked[~intact]] = False
                yield part, data, intact

    def matches_name(self) -> bool:
        """Return whether the file's content hash is its name."""
        digest = hashlib.sha256()
        offset = 0
        with opened(self.path) as fd:
            while data := _read(fd, CHUNK_BYTES, offset):
                digest.update(data)
                offset += len(data)
        return digest.hexdigest()[:32] + SUFFIX == self.path.name


def open_shard(path: Path, entry_key: str, row_format: RowFormat) -> Shard:
    """Return a shard after checking its header and size; its rows are checked when they are read.

    Raises:
        DamagedShard: It is not a whole shard of this entry.
        FileNotFoundError: It is gone.
        OSError: It cannot be opened (permission, too many open files).
    """
    with opened(path) as fd:
        length = int.from_bytes(_read_exactly(fd, 8, 0), "little")
        if 8 + length > MAX_HEADER_BYTES:
            raise DamagedShard(f"its header claims {length} bytes; less than {MAX_HEADER_BYTES} are allowed")
        header = _read_exactly(fd, 8 + length, 0)
        num_rows, env = _claims(header, entry_key)
        if header != shard_header(entry_key, row_format, num_rows, env):
            raise DamagedShard("its header is not the one its entry and number of rows ask for")
        offset = len(header)
        expected = offset + num_rows * (TABLE_BYTES + row_format.row_bytes)
        if (actual := os.fstat(fd).st_size) != expected:
            raise DamagedShard(f"it has {actual} bytes instead of {expected}")
        tables = _read_exactly(fd, num_rows * TABLE_BYTES, offset)
    checksums = np.frombuffer(tables, "<u8", num_rows).astype(np.uint64)
    sha256 = np.frombuffer(tables, np.uint8, 32 * num_rows, 8 * num_rows).reshape(num_rows, 32)
    view = np.frombuffer(tables, np.uint8, 4 * num_rows, 40 * num_rows).reshape(num_rows, 4)
    keys = np.concatenate([sha256, view], axis=1)
    return Shard(path, env, keys, checksums, row_format.row_bytes, offset + num_rows * TABLE_BYTES)


def _claims(header: bytes, entry_key: str) -> tuple[int, str]:
    """Return the number of rows and the environment record that a header names.

    Raises:
        DamagedShard: It is not the header of a shard of this entry.
    """
    try:
        claimed = json.loads(header[8:])
        num_rows, env = claimed["rows"]["shape"][0], claimed["__metadata__"]["env"]
        owner = claimed["__metadata__"]["entry_key"]
        plain = type(env) is str and environment_record(json.loads(env)) == env
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedShard("its header is not that of a shard") from error
    if owner != entry_key:
        raise DamagedShard(f"it belongs to another entry, {str(owner)[:64]!r}")
    if type(num_rows) is not int or not 1 <= num_rows < MAX_ROWS or not plain:
        raise DamagedShard("its header is not that of a shard")
    return num_rows, env


def environment_record(env: Mapping[str, Any]) -> str:
    """Return an environment record (library versions, device) as it is stored in a shard's header."""
    return canonical_json(dict(env))


def _read(fd: int, num_bytes: int, offset: int) -> bytes:
    """Read, a second time after an error of the disk: it may pass, and what is read is checked anyway."""
    try:
        return read_at(fd, num_bytes, offset)
    except OSError as error:
        if error.errno not in PASSING:
            raise
    try:
        return read_at(fd, num_bytes, offset)
    except OSError as error:
        raise DamagedShard(f"it cannot be read: {error.strerror}") from error


def _read_exactly(fd: int, num_bytes: int, offset: int) -> bytes:
    data = _read(fd, num_bytes, offset)
    if len(data) != num_bytes:
        raise DamagedShard(f"it ends at byte {offset + len(data)}, before byte {offset + num_bytes}")
    return data


def _pieces(rows: NDArray[np.int64], row_bytes: int) -> Iterator[slice]:
    """Divide ascending row numbers where a piece would span too many bytes or a gap is not worth reading."""
    chunk = rows // max(1, CHUNK_BYTES // row_bytes)
    apart = (np.diff(rows) - 1) * row_bytes > GAP_BYTES
    breaks = np.flatnonzero(apart | (np.diff(chunk) != 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            yield slice(start, stop)
