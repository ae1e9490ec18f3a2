"""The bytes of a shard: as specified, readable by others, and refused when anything is off."""

import errno
import hashlib
import json
import os
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash

from tests.cache.cached import ENV, row_key
from tlcli.cache import shard as shards
from tlcli.cache.shard import (
    DamagedShard,
    RowFormat,
    environment_record,
    open_shard,
    pack_key,
    row_checksums,
    shard_header,
    write_shard,
)
from tlcli.machine.files import opened

KEY = "ab" * 32
FP32 = RowFormat("fp32", (3, 5))
ENV_TEXT = environment_record(ENV)


def make(folder, count=7, row_format=FP32, key=KEY, env=ENV_TEXT):
    rows = np.random.default_rng(count).integers(0, 256, (count, row_format.row_bytes), np.uint8)
    keys = np.frombuffer(b"".join(pack_key(row_key(i, i % 3)) for i in range(count)), np.uint8).reshape(
        -1, 36
    )
    name = write_shard(folder, key, row_format, env, keys, rows)
    return folder / name, keys, rows


def read_all(shard):
    pieces = list(shard.read(np.arange(len(shard.keys))))
    return np.concatenate([data for _, data, _ in pieces]), np.concatenate([good for _, _, good in pieces])


def test_a_shard_is_what_the_specification_says(tmp_path):
    path, _, rows = make(tmp_path, 2, RowFormat("fp32", (2,)), env="{}")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].decode("ascii")
    assert (8 + length) % 64 == 0
    assert header.rstrip(" ") == (
        '{"__metadata__":{"schema":"tlcli.shard/1","entry_key":"' + KEY + '","env":"{}"},'
        '"checksum":{"dtype":"U64","shape":[2],"data_offsets":[0,16]},'
        '"image_sha256":{"dtype":"U8","shape":[2,32],"data_offsets":[16,80]},'
        '"view":{"dtype":"U32","shape":[2],"data_offsets":[80,88]},'
        '"rows":{"dtype":"F32","shape":[2,2],"data_offsets":[88,104]}}'
    )
    data = raw[8 + length :]
    sums = [xxhash.xxh3_64_intdigest(pack_key(row_key(i, i)) + rows[i].tobytes()) for i in range(2)]
    assert data[:16] == struct.pack("<2Q", *sums)
    assert data[16:80].hex() == row_key(0)[0] + row_key(1)[0]
    assert data[80:88] == struct.pack("<2I", 0, 1)
    assert data[88:] == rows.tobytes()
    assert path.name == hashlib.sha256(raw).hexdigest()[:32] + ".safetensors"


@pytest.mark.parametrize("row_format", [FP32, RowFormat("bf16", (3,)), RowFormat("fp32", (1,))])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_safetensors_library_reads_it(tmp_path, row_format, count):
    import torch

    path, keys, rows = make(tmp_path, count, row_format)
    with safetensors.safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["env"]) == ENV
    assert found["rows"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[row_format.dtype]
    assert found["rows"].shape == (count, *row_format.shape)
    assert found["rows"].reshape(count, -1).view(torch.uint8).numpy().tobytes() == rows.tobytes()
    assert found["image_sha256"].numpy().tobytes() == keys[:, :32].tobytes()
    assert found["view"].tolist() == [i % 3 for i in range(count)]


def test_a_file_of_the_safetensors_library_is_no_shard(tmp_path):
    path, _, _ = make(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        safetensors.numpy.save_file(tensors, path, file.metadata())
    with pytest.raises(DamagedShard, match="not the one"):
        open_shard(path, KEY, FP32)


def test_round_trip(tmp_path):
    path, _, rows = make(tmp_path, 7)
    shard = open_shard(path, KEY, FP32)
    assert shard.row_keys() == [row_key(i, i % 3) for i in range(7)]
    assert shard.num_bytes == path.stat().st_size
    assert json.loads(shard.env) == ENV
    data, intact = read_all(shard)
    np.testing.assert_array_equal(data, rows)
    assert intact.all()
    assert shard.sound.all()
    assert shard.matches_name()


def test_publishing_twice_is_the_same_file(tmp_path):
    first, _, _ = make(tmp_path)
    first.write_bytes(b"")  # lost by the disk: publishing heals it
    second, _, _ = make(tmp_path)
    assert first == second
    assert len(list(tmp_path.iterdir())) == 1
    open_shard(first, KEY, FP32)


@pytest.mark.parametrize("chunk", [1, 100, 200, 1 << 20])
@pytest.mark.parametrize("gap", [0, 60, 1 << 20])
def test_pieces_cover_what_is_asked(tmp_path, monkeypatch, chunk, gap):
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(shards, "GAP_BYTES", gap)
    path, _, rows = make(tmp_path, 20)
    shard = open_shard(path, KEY, FP32)
    for wanted in ([0], [19], [0, 19], [3, 4, 5, 9, 9, 10, 17], [], list(range(20))):
        chosen = np.array(wanted, np.int64)
        found = np.zeros((len(wanted), FP32.row_bytes), np.uint8)
        for part, data, intact in shard.read(chosen):
            assert intact.all()
            found[part] = data
        np.testing.assert_array_equal(found, rows[chosen])


@pytest.mark.parametrize(
    ("row_kib", "rows", "pieces"),
    [
        (64, [], []),
        (64, [5], [[5]]),
        (64, [0, 1, 3, 4], [[0, 1, 3, 4]]),  # a gap of 64 KiB is read through
        (65, [0, 1, 3, 4], [[0, 1], [3, 4]]),
        (64, [0, 3], [[0], [3]]),
        (64, [0, 20], [[0], [20]]),
        (1, [0, 64, 65, 131], [[0, 64, 65], [131]]),
        (64, [14, 15, 16, 17], [[14, 15], [16, 17]]),  # a piece lies in one MiB
        (400, [0, 1, 2, 3, 4], [[0, 1], [2, 3], [4]]),
        (2000, [6, 7, 8], [[6], [7], [8]]),  # or is one row
    ],
)
def test_pieces_are_few_and_small(row_kib, rows, pieces):
    rows = np.array(rows, np.int64)
    assert [rows[part].tolist() for part in shards._pieces(rows, row_kib << 10)] == pieces


def test_long_reads_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 4 * FP32.row_bytes)
    path, _, _ = make(tmp_path, 50)
    shard = open_shard(path, KEY, FP32)
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or pread(fd, size, at))
    read_all(shard)
    assert max(sizes) <= 4 * FP32.row_bytes


def rewrite(path, change):
    """Change the header as JSON, keeping it well-formed and padded."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = change(raw[8 : 8 + length].decode().rstrip(" ")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace(KEY, "cd" * 32), "another entry, 'cdcd"),
        (lambda text: text.replace(KEY, "e" * 70), f"another entry, '{'e' * 64}'$"),
        (lambda text: text.replace(KEY, "00" * 32), "another entry, '0000"),
        (lambda text: text.replace('"U64"', '"I64"'), "not the one"),
        (lambda text: text.replace("shard/1", "shard/2"), "not the one"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[7,5,3]'), "not the one"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[6,3,5]'), "not the one"),
        (lambda text: text.replace('"F32"', '"I32"'), "not the one"),
        (lambda text: text.replace('"rows":{', '"rows":{"x":1,'), "not the one"),
        (
            lambda text: text[:-1] + ',"rows":{"dtype":"F32","shape":[7,3,5],"data_offsets":[308,728]}}',
            "not the",
        ),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[0,3,5]'), "not that of a shard"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[true,3,5]'), "not that of a shard"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[7.0,3,5]'), "not that of a shard"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":[]'), "not that of a shard"),
        (lambda text: text.replace('"shape":[7,3,5]', '"shape":7'), "not that of a shard"),
        (lambda text: text.replace('"env":"', '"env":1,"x":"'), "not that of a shard"),
        (lambda text: text.replace('"__metadata__"', '"metadata"'), "not that of a shard"),
        (lambda text: "[]", "not that of a shard"),
        (lambda text: "[" * 20_000, "not that of a shard"),
        (lambda text: text[:-1], "not that of a shard"),
        (lambda text: text + " " * 70_000, "claims"),
        (
            lambda text: text.replace('"shape":[7,3,5]', '"shape":[' + "9" * 5000 + ",3,5]"),
            "not that of a shard",
        ),
    ],
)
def test_a_header_that_differs_is_refused(tmp_path, change, reason):
    path, _, _ = make(tmp_path)
    rewrite(path, change)
    with pytest.raises(DamagedShard, match=reason):
        open_shard(path, KEY, FP32)


@pytest.mark.parametrize("env", ['{"b":1,"a":2}', '{"a": 1}', "[]", "1"])
def test_an_environment_record_that_is_not_canonical_is_refused(tmp_path, env):
    path, _, _ = make(tmp_path, env=env)
    with pytest.raises(DamagedShard, match="not that of a shard"):
        open_shard(path, KEY, FP32)


@pytest.mark.parametrize("more", [b"", b"x"])
def test_a_file_of_another_size_is_refused(tmp_path, more):
    path, _, _ = make(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + more if more else path.read_bytes()[:-1])
    with pytest.raises(DamagedShard, match=f"has {size + (1 if more else -1)} bytes instead of {size}"):
        open_shard(path, KEY, FP32)


def test_a_lying_length_is_refused_before_allocation(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(DamagedShard, match="claims 4611686018427387904 bytes"):
        open_shard(path, KEY, FP32)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_error_costs_only_its_piece(tmp_path, monkeypatch, code):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 2 * FP32.row_bytes)
    path, _, _ = make(tmp_path)
    shard = open_shard(path, KEY, FP32)
    pread = os.pread

    def fail(fd, size, offset):
        if offset == shard.rows_offset + 2 * FP32.row_bytes:
            raise OSError(code, os.strerror(code))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    _, intact = read_all(shard)
    assert intact.tolist() == shard.sound.tolist() == [True, True, False, False, True, True, True]
    assert shard.num_damaged == 2
    monkeypatch.setattr(os, "pread", lambda *_: fail(0, 0, shard.rows_offset + 2 * FP32.row_bytes))
    with pytest.raises(DamagedShard, match="cannot be read"):
        shard.matches_name()


def test_other_read_errors_are_not_damage(tmp_path, monkeypatch):
    path, _, _ = make(tmp_path)
    shard = open_shard(path, KEY, FP32)

    def fail(*_):
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="no memory"):
        read_all(shard)


def test_a_file_that_shrinks_after_opening_loses_rows_only(tmp_path):
    path, _, _ = make(tmp_path)
    shard = open_shard(path, KEY, FP32)
    path.write_bytes(path.read_bytes()[:-1])
    _, intact = read_all(shard)
    assert not intact.any()  # one piece; none of them is wrong


def test_a_large_environment_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="environment record"):
        make(tmp_path, env="x" * 70_000)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_environment_record(tmp_path):
    def record(length):
        return environment_record({"x": "y" * length})

    spare = 65536 - len(shard_header(KEY, FP32, 7, record(60_000)))
    path, _, _ = make(tmp_path, env=record(60_000 + spare))
    assert len(shard_header(KEY, FP32, 7, record(60_000 + spare))) == 65536
    assert open_shard(path, KEY, FP32).env == record(60_000 + spare)
    with pytest.raises(ValueError, match="environment record"):
        make(tmp_path, env=record(60_000 + spare + 64))
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 65529) + raw[8:] + b" ")
    with pytest.raises(DamagedShard, match="claims 65529 bytes"):
        open_shard(path, KEY, FP32)


def test_every_damaged_byte_of_a_row_is_seen(tmp_path):
    """A checksum may become larger or smaller."""
    path, _, _ = make(tmp_path)
    raw = path.read_bytes()
    for place in range(len(raw) - 7 * FP32.row_bytes, len(raw), 13):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        shard = open_shard(path, KEY, FP32)
        read_all(shard)
        assert shard.num_damaged == 1


def test_the_smallest_row():
    row_format = RowFormat.from_spec({"row_dtype": "bf16", "row_shape": [1]})
    assert (row_format.shape, row_format.row_bytes) == ((1,), 2)


@pytest.mark.parametrize(
    "facts",
    [
        {"row_dtype": "fp16", "row_shape": [2]},
        {"row_shape": [2]},
        {"row_dtype": "fp32"},
        {"row_dtype": "fp32", "row_shape": []},
        {"row_dtype": "fp32", "row_shape": [0]},
        {"row_dtype": "fp32", "row_shape": [True]},
        {"row_dtype": "fp32", "row_shape": "22"},
        {"row_dtype": ["fp32"], "row_shape": [2]},
    ],
)
def test_unknown_row_formats_are_refused(facts):
    with pytest.raises(ValueError, match="row_"):
        RowFormat.from_spec(facts)


@pytest.mark.parametrize(
    "key",
    [("ab", 0), ("ab" * 33, 0), ("AB" * 32, 0), ("ab" * 32 + " ", 0), ("ab" * 32, -1),
     ("ab" * 32, 1 << 32), ("ab" * 32, 2 << 32), ("ab" * 32, (1 << 32) + 1), ("zz" * 32, 0), ("ab " * 32, 0)],
)  # fmt: skip
def test_malformed_row_keys_are_refused(key):
    with pytest.raises(ValueError):  # noqa: PT011
        pack_key(key)


def test_the_largest_view_is_packed():
    assert pack_key(("ab" * 32, (1 << 32) - 1)) == b"\xab" * 32 + b"\xff" * 4


@pytest.mark.parametrize("digit", "0f")
def test_a_shard_knows_its_name(tmp_path, digit):
    path, _, _ = make(tmp_path)
    assert open_shard(path, KEY, FP32).matches_name()
    renamed = path.rename(path.with_name(digit * 32 + path.suffix))
    assert not open_shard(renamed, KEY, FP32).matches_name()


def test_the_end_of_a_short_file_is_told(tmp_path):
    (tmp_path / "short").write_bytes(bytes(60))
    with opened(tmp_path / "short") as fd:
        assert shards._read_exactly(fd, 30, 30) == bytes(30)
        with pytest.raises(DamagedShard, match="it ends at byte 60, before byte 81"):
            shards._read_exactly(fd, 50, 31)


def test_checksums_cover_every_bit_of_key_and_row():
    keys, rows = np.zeros((1, 36), np.uint8), np.zeros((1, 8), np.uint8)
    seen = {int(row_checksums(keys, rows)[0])}
    for array in (keys, rows):
        for place in range(array.shape[1]):
            array[0, place] = 1
            seen.add(int(row_checksums(keys, rows)[0]))
            array[0, place] = 0
    assert len(seen) == 1 + 36 + 8


def test_rows_without_keys_have_no_checksum():
    with pytest.raises(ValueError, match="zip"):
        row_checksums(np.zeros((1, 36), np.uint8), np.zeros((2, 8), np.uint8))


def test_header_alignment():
    for count in (1, 99, 12345):
        assert len(shard_header(KEY, FP32, count, "{}")) % 64 == 0
