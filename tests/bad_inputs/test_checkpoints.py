"""Items 69 to 82 of the bad inputs: weights, backbone folders and runs of untrusted origin.

Each goes through the command line. A file that is refused is not executed, not changed, and leaves neither a
result on stdout nor rows in the cache. What memory a lying header takes is measured in a child process whose
address space is limited.
"""

import argparse
import collections
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file

from tests.bad_inputs.bad_input_cases import rarely
from tlcli.machine import paths

ROOT = Path(__file__).parent.parent.parent
ARCHITECTURE = "test_resnet"
TINY = ("--backbone", ARCHITECTURE, "--image-size", "32", "--dtype", "fp32")
CONVERT = "weights_only=False"  # of the hint that says how to convert a file one trusts


def state_of(seed=1, num_classes=0):
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=num_classes).state_dict()


@pytest.fixture(scope="module")
def state():
    return state_of()


@pytest.fixture
def images(tmp_path, make_images):
    return make_images(tmp_path / "images", {"a": 3, "b": 3})


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


class Canary:
    """Unpickling it runs a command that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def content_of(folder):
    """Return what every file below a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(run_cli, images, tmp_path, canary):
    """Return a function that runs a command which must refuse what it is given."""

    def run(*words, expected, code=4):
        before = content_of(tmp_path)
        result = run_cli(*words, "--json")
        assert (result.code, result.stdout) == (code, ""), result.stderr
        assert "error: " in result.stderr
        assert "Traceback" not in result.stderr
        for text in expected:
            assert text in result.stderr, result.stderr
        assert not canary.exists()
        assert content_of(tmp_path) == before
        assert not list(paths.home().rglob("*.safetensors"))
        return result.stderr

    def run_weights(path, *expected):
        return run("extract", images, *TINY, "--weights", path, expected=(str(path), *expected))

    run.weights = run_weights
    return run


@pytest.fixture
def accepted(run_cli, images):
    """Return a function that extracts with a weights file, which must work; gives the document and stderr."""

    def run(path, *options):
        result = run_cli("extract", images, *TINY, "--weights", path, *options, "--json")
        assert result.code == 0, result.stderr
        return json.loads(result.stdout), result.stderr

    return run


def backbone_folder(path, state, **changes):
    """Write a backbone folder in timm's format."""
    path.mkdir()
    cfg = {"input_size": [3, 32, 32], "crop_pct": 1.0, "num_classes": 0, **changes.pop("cfg", {})}
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "pretrained_cfg": cfg, **changes}
    (path / "config.json").write_text(json.dumps(config))
    if state is not None:
        save_file(state, path / "model.safetensors")
    return path


# ---- 69 to 72: pickles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["weights", "backbone folder", "run"])
@pytest.mark.parametrize("kind", ["zip", *rarely("legacy")])
def test_069_pickle_that_runs_a_command(refused, trained, tmp_path, images, canary, state, kind, place):
    bad = {"state_dict": state, "extra": Canary(canary)}
    path = tmp_path / "weights.pth"
    if place == "backbone folder":
        path = backbone_folder(tmp_path / "folder", None) / "pytorch_model.bin"
    elif place == "run":
        run = shutil.copytree(trained.run, tmp_path / "run")
        (run / "model.safetensors").unlink()
        path = run / "pytorch_model.bin"  # what timm's format may hold as well
    torch.save(bad, path, _use_new_zipfile_serialization=kind == "zip")
    expected = (str(path), "could run code", CONVERT)
    if place == "weights":
        assert "posix.system" in refused.weights(path, *expected) or kind == "legacy"
    elif place == "backbone folder":
        refused("extract", images, "--backbone", f"local-dir:{path.parent}", expected=expected)
    else:
        refused("predict", run, images, expected=expected)
    torch.load(path, weights_only=False)  # the trap is real
    assert canary.exists()


@pytest.mark.parametrize(
    "name", ["weights.pth", "weights.safetensors", "model.safetensors", "head.safetensors",
             "state.safetensors", "config.yaml"],
)  # fmt: skip
def test_070_raw_pickle_under_another_name(
    refused, run_cli, trained, make_tuned, unfinished, tmp_path, images, canary, name
):
    raw = pickle.dumps({"weight": Canary(canary)})
    code, expected = 4, [name]
    if name.startswith("weights"):
        words = ("extract", images, *TINY, "--weights", tmp_path / name)
        (tmp_path / name).write_bytes(raw)
        expected += [CONVERT] if name.endswith("pth") else []
    elif name == "model.safetensors":
        run = shutil.copytree(trained.run, tmp_path / "run")
        (run / name).write_bytes(raw)
        words = ("predict", run, images)
    elif name == "head.safetensors":  # of a run, so that the data code holds
        run, code = make_tuned(hidden=(5,)), 3
        (run / name).write_bytes(raw)
        words = ("evaluate", run)
    elif name == "state.safetensors":
        run = shutil.copytree(unfinished.run, tmp_path / "run")
        forge_checkpoint(run, raw)
        result = run_cli(*unfinished.words, "-o", run, "--resume", "--json")
        assert (result.code, result.stdout) == (4, ""), result.stderr
        assert name in result.stderr
        assert not canary.exists()
        assert len(list((run / "checkpoints").iterdir())) == 2
        return
    else:
        run = shutil.copytree(unfinished.run, tmp_path / "run")
        (run / name).write_text(f"seed: !!python/object/apply:os.system ['touch {canary}']\n")
        words, code = (*unfinished.words, "-o", run, "--resume"), 2
    refused(*words, expected=expected, code=code)
    pickle.loads(raw)  # the trap is real
    assert canary.exists()


def test_071_legacy_tar(refused, tmp_path, canary):
    data = pickle.dumps(Canary(canary))
    for name in ("weights.pth", "weights.tar", "weights.safetensors"):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member in ("sys_info", "pickle", "storages", "tensors"):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        refused.weights(tmp_path / name, "tar format", CONVERT)


@pytest.mark.parametrize("kind", ["namespace", "numpy scalar", "another class"])
def test_072_namespace_or_numpy_scalar_inside(refused, accepted, tmp_path, state, kind):
    # A Namespace and a numpy number are plain data, and training checkpoints carry them, so that they are let
    # through, other than the list of faults has it. Building them runs no code of the file.
    path = tmp_path / "weights.pth"
    extra = {
        "namespace": argparse.Namespace(lr=0.1, model="x"),
        "numpy scalar": np.float64(0.5),
        "another class": collections.UserDict(a=1),
    }[kind]
    torch.save({"state_dict": state, "extra": extra}, path)
    if kind != "another class":
        document, _ = accepted(path)
        assert document["features"]["rows_computed"] == 6
    else:
        refused.weights(path, "could run code", CONVERT, "UserDict")


# ---- 73 and 74: bombs and lying headers ----------------------------------------------------------------

GIB = 1 << 30
GROWTH_BYTES = 96 << 20

CHILD = """
import contextlib, io, json, resource, sys
from tlcli.cli.app import main

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*words, "--json"])
    return code, out.getvalue(), err.getvalue()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

show = ("backbones", "show", "test_resnet", "--image-size", "32", "--weights")
good, *bad = sys.argv[1:]
found = {"good": [*run(*show, good), 0]}
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmSize"))
for number, path in enumerate(bad):
    if number == 1:  # the first reserves what it claims, and touches none of it
        limit = size + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = peak()
    words = (*show, path)
    if path.endswith(".dir"):
        words = ("backbones", "show", "local-dir:" + path)
    found[path] = [*run(*words), peak() - before]
print(json.dumps(found))
""".replace("HEADROOM", str(384 << 20))


def deflated(path):
    """A small zip whose one tensor unpacks to 256 MB."""
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, plain)
    chunk = bytes(1 << 20)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as to,
    ):
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data.pkl"):
                data = with_number(data, 1, GIB // 16)
            if record.filename.endswith("data/0"):
                with to.open(record.filename, "w") as file:
                    for _ in range(GIB // 4 >> 20):
                        file.write(chunk)
            else:
                to.writestr(record.filename, data)


def with_number(data, number, wanted):
    """Return a pickle whose storage claims another number of elements."""
    old = b"K" + bytes([number])
    place = data.index(old, data.index(b"cpuq"))
    return data[:place] + b"\x8a\x08" + struct.pack("<q", wanted) + data[place + len(old) :]


def stored_number(path):
    """A sound zip whose pickle claims a storage of four gigabytes."""
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data.pkl"):
                data = with_number(data, 1, GIB)
            target.writestr(record.filename, data)


def legacy_number(path):
    """The older format, with a storage of four gigabytes in the pickle and in the data."""
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, plain, _use_new_zipfile_serialization=False)
    data = plain.getvalue()
    place = data.index(b"cpu")
    number = data.index(b"K\x01N", place)
    claimed = data[:number] + b"\x8a\x08" + struct.pack("<q", GIB) + data[number + 2 :]
    end = claimed.rindex(struct.pack("<q", 1))
    path.write_bytes(claimed[:end] + struct.pack("<q", GIB) + claimed[end + 8 :])


def central(data):
    """Return where the entries of a zip's central directory begin."""
    return [match.start() for match in re.finditer(rb"PK\x01\x02", data)]


def directory_sizes(path):
    """A zip whose directory claims four gigabytes for its last tensor."""
    torch.save({f"{n}": torch.zeros(1000) for n in range(3)}, path)
    data = bytearray(path.read_bytes())
    for place in central(data):
        if b"data/2" in data[place + 46 : place + 80]:
            data[place + 20 : place + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    path.write_bytes(data)


def overlapping_records(path):
    """A zip of 4 MB in which a thousand names share one record."""
    torch.save({f"{n}": torch.zeros(2) for n in range(1000)} | {"big": torch.zeros(1 << 20)}, path)
    data = bytearray(path.read_bytes())
    entries = {bytes(data[place + 46 : place + 46 + struct.unpack_from("<H", data, place + 28)[0]]): place
               for place in central(data)}  # fmt: skip
    (big,) = (place for name, place in entries.items() if name.endswith(b"data/1000"))
    for name, place in entries.items():
        if b"/data/" in name:
            data[place + 16 : place + 28] = data[big + 16 : big + 28]  # checksum and sizes
            data[place + 42 : place + 46] = data[big + 42 : big + 46]  # where it begins
    path.write_bytes(data)


def a_name_twice(path):
    """A zip that holds one record twice: readers differ in which they take."""
    torch.save({"weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, bytes(16))


def safetensors_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def long_header(path, header_bytes=GIB, size=None):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", header_bytes) + b'{"a":1}')
        file.truncate(size or 1000)


PLACE = b'"shape":[2],"data_offsets":[0,8]}'
TWICE = b'{"a":{"dtype":"F32",' + PLACE + b',"a":{"dtype":"I32",' + PLACE + b"}"

ZIPS = {
    "number in the older format": (legacy_number, "claim 4,294,967,296 bytes"),  # the first, see CHILD
    "deflated": (deflated, "is compressed"),
    "directory sizes": (directory_sizes, "more than there are for it"),
    "overlapping records": (overlapping_records, "more than there are for it"),
    "record twice": (a_name_twice, "is there twice"),
    "number in the pickle": (stored_number, "does not match expected size"),
}


def headed(header, num_bytes=8):
    return lambda path: safetensors_file(path, header, bytes(num_bytes))


TWO = tensor([2], 0, 8)
HEADERS = {
    "header beyond the file": (long_header, "header claims 1,073,741,824 bytes"),
    "header of exabytes": (lambda path: long_header(path, 1 << 62), "header claims"),
    "header of a gigabyte": (lambda path: long_header(path, GIB, GIB + 100), "10,000,000 are expected"),
    "tensor of terabytes": (headed({"a": tensor([1 << 40], 0, 1 << 42)}), "sound"),
    "shape that overflows": (headed({"a": tensor([1 << 32, 1 << 32], 0, 0)}), "sound"),
    "shape beyond its data": (headed({"a": tensor([1 << 30], 0, 8)}), "sound"),
    "overlapping offsets": (headed({"a": TWO, "b": tensor([2], 4, 12)}, 12), "sound"),
    "hole between tensors": (headed({"a": TWO, "b": tensor([2], 12, 20)}, 20), "sound"),
    "bytes after the tensors": (headed({"a": TWO}, 900), "sound"),
    "negative offset": (headed({"a": tensor([2], -8, 0)}), "sound"),
    "name twice": (headed(TWICE), "'a' is there twice"),
    "nested": (headed(b'{"a":' * 50_000), "sound"),
    "not text": (headed(b'{"\xff\xfe":1}'), "sound"),
}

CONFIGS = {
    "image size": ({"input_size": [3, 30_000, 30_000]}, "images of 30000x30000 pixels"),
    "tiny crop": ({"crop_pct": 1e-7}, "a crop of 1e-07"),
    "no deviation": ({"std": [0, 0, 0]}, "the deviation"),
    "no size": ({"input_size": "large"}, "describes no transform"),
    "mean of two": ({"mean": [0.5, 0.5]}, "describes no transform"),
    "size of text": ({"input_size": [3, "a", "b"]}, "describes no transform"),
}


@pytest.fixture(scope="module")
def limited(tmp_path_factory, state):
    """What a child of little memory says of each trap: name -> (code, stdout, stderr, growth in bytes)."""
    folder = tmp_path_factory.mktemp("traps")
    good = folder / "good.safetensors"
    save_file(state, good)
    places = {}
    for name, (make, _) in (ZIPS | HEADERS).items():
        places[name] = folder / f"{name}.weights"
        make(places[name])
    for name, (cfg, _) in CONFIGS.items():
        places[name] = backbone_folder(folder / f"{name}.dir", state, cfg=cfg)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CHILD, str(good), *map(str, places.values())]
    done = subprocess.run(words, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"][0] == 0, found["good"]
    return {name: (places[name], *found[str(path)]) for name, path in places.items()}


def check_limited(limited, name, text):
    path, code, out, err, growth = limited[name]
    assert (code, out) == (4, ""), err
    assert str(path) in err
    assert text in err
    assert "Traceback" not in err
    assert "emory" not in err  # it was seen through, rather than tried
    assert growth < GROWTH_BYTES


@pytest.mark.parametrize("name", ZIPS)
def test_073_zip_bomb(limited, name):
    check_limited(limited, name, ZIPS[name][1])


@pytest.mark.parametrize("name", [*HEADERS, *CONFIGS])
def test_074_lying_header_and_names_twice(limited, name):
    check_limited(limited, name, (HEADERS | CONFIGS)[name][1])


# ---- 75 and 76: damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth"])
def test_075_truncated(refused, tmp_path, state, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    data = path.read_bytes()
    for kept in (0, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        refused.weights(path)


@pytest.mark.parametrize("where", ["hub cache", "weights", "checkpoint"])
def test_076_bit_flips(refused, accepted, run_cli, unfinished, tmp_path, images, state, where):
    if where == "hub cache":  # its files are named by their SHA-256
        full = state_of(num_classes=1000)
        data = save(full)
        folder = Path(os.environ["HF_HOME"]) / "hub" / "models--timm--test_resnet.r160_in1k"
        commit = "0123456789abcdef0123456789abcdef01234567"
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        link = folder / "snapshots" / commit / "model.safetensors"
        for path in (blob, link, folder / "refs" / "main"):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(blob)
        (folder / "refs" / "main").write_text(commit)
        words = ("extract", images, "--backbone", "test_resnet.r160_in1k", "--image-size", "32", "--dry-run")
        assert run_cli(*words).code == 0
        blob.write_bytes(flipped(data, len(data) // 2))
        refused(*words, expected=("does not match its hash", "not on this machine"))
    elif where == "weights":
        # No hash is known of a file on disk: what becomes infinite is refused, and every other flip makes
        # other weights, whose rows are never taken for those of the intact file.
        path = tmp_path / "weights.safetensors"
        state = dict(state)
        name = next(key for key, value in state.items() if value.numel() > 100)
        save_file(state, path)
        data, keys = path.read_bytes(), set()
        place = data.index(state[name].numpy().tobytes())
        for bit in (0, 5, 22, 31):  # of the mantissa and the sign
            path.write_bytes(flipped(data, place + bit // 8, bit % 8))
            keys.add(accepted(path, "--dry-run")[0]["cache_key"])
        path.write_bytes(data)
        keys.add(accepted(path, "--dry-run")[0]["cache_key"])
        assert len(keys) == 5
        path.write_bytes(
            data[:place] + struct.pack("<I", 0x7F800001) + data[place + 4 :]
        )  # all of the exponent
        refused.weights(path, "NaN or infinite", name)
    else:
        run = shutil.copytree(unfinished.run, tmp_path / "run")
        newest = sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors"
        newest.write_bytes(flipped(newest.read_bytes(), 5000))
        resumed = run_cli(*unfinished.words, "-o", run, "--resume", "--json")
        assert resumed.code == 0, resumed.stderr
        assert f"{newest.parent} is skipped: its state.safetensors is not the one" in resumed.stderr
        assert (run / "model.safetensors").read_bytes() == unfinished.expected


def flipped(data, place, bit=0):
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


# ---- 77 to 80: another network -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", *rarely("_orig_mod.", "module._orig_mod.model.")])
def test_077_prefixes_are_stripped_and_named(accepted, tmp_path, state, prefix):
    save_file(state, tmp_path / "plain.safetensors")
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "wrapped.safetensors")
    plain, _ = accepted(tmp_path / "plain.safetensors")
    wrapped, said = accepted(tmp_path / "wrapped.safetensors")
    assert wrapped["cache_key"] == plain["cache_key"]
    assert wrapped["features"]["rows_reused"] == 6
    assert f"Removed the prefix {prefix!r}" in said


@pytest.mark.parametrize("share", [0.0, 0.9, *rarely(0.5)])
def test_078_too_few_matching_names(refused, tmp_path, state, share):
    names = sorted(state)
    kept = names[: int(share * len(names))]
    other = {f"strange/{name}": value for name, value in state.items() if name not in kept}
    save_file({**{name: state[name] for name in kept}, **other}, tmp_path / "weights.safetensors")
    refused.weights(
        tmp_path / "weights.safetensors", "fit only", "95% are expected", "strange/", ARCHITECTURE
    )
    if not share:  # a file that holds the wanted names below another entry is not half a match either
        torch.save({"epoch": 1, "state_dict": {"strange": torch.zeros(1)}}, tmp_path / "weights.pth")
        refused.weights(tmp_path / "weights.pth", "fit only 0%")


@pytest.mark.parametrize("kind", ["shape", "architecture", "backbone folder"])
def test_079_wrong_shape_or_architecture(refused, tmp_path, images, state, kind):
    path = tmp_path / "weights.safetensors"
    if kind == "shape":
        wrong = {name: value.new_zeros([size + 1 for size in value.shape]) for name, value in state.items()}
        save_file(wrong, path)
        refused.weights(path, "another shape", "in the file", "in the network", "tlcli backbones list")
    elif kind == "architecture":
        save_file(timm.create_model("test_vit").state_dict(), path)
        refused.weights(path, "fit only 0%", "tlcli backbones list")
    else:
        folder = backbone_folder(
            tmp_path / "folder", timm.create_model("test_vit", num_classes=0).state_dict()
        )
        refused("extract", images, "--backbone", f"local-dir:{folder}", expected=("model.safetensors", "fit"))


@pytest.mark.parametrize("bad", [float("nan"), *rarely(float("inf"), float("-inf"))])
def test_080_values_that_are_not_finite(refused, trained, tmp_path, images, state, bad):
    wrong = {name: value.clone() for name, value in state.items()}
    name = next(key for key, value in wrong.items() if value.ndim == 4)
    wrong[name].view(-1)[3] = bad
    save_file(wrong, tmp_path / "weights.safetensors")
    refused.weights(tmp_path / "weights.safetensors", name, "1 values that are NaN or infinite")
    folder = backbone_folder(tmp_path / "folder", wrong)
    words = ("extract", images, "--backbone", f"local-dir:{folder}")
    refused(*words, expected=("model.safetensors", name, "NaN or infinite"))


def test_080_another_number_of_classes(accepted, refused, tmp_path, images, state):
    # A backbone is used without its classifier, so that one of any size is left out rather than asked about.
    for count in (0, 3, 1000):
        save_file(state_of(num_classes=count) | state, tmp_path / f"{count}.safetensors")
    keys = {accepted(tmp_path / f"{n}.safetensors", "--dry-run")[0]["cache_key"] for n in (0, 3, 1000)}
    assert len(keys) == 1
    # In timm's format the number is part of the configuration, and must be the one of the file.
    folder = backbone_folder(
        tmp_path / "folder", state_of(num_classes=3), num_classes=5, cfg={"num_classes": 5}
    )
    expected = ("model.safetensors", "do not fit")
    refused("extract", images, "--backbone", f"local-dir:{folder}", expected=expected)


# ---- 81 and 82: tensors of other kinds -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "bad indices"])
def test_081_sparse_tensors(refused, tmp_path, state, kind):
    name = next(key for key, value in state.items() if value.ndim == 4)
    sparse = state[name].to_sparse()
    if kind == "bad indices":  # far outside of the shape: reading them would leave the memory of the tensor
        indices = torch.full_like(sparse.indices(), 1 << 40)
        sparse = torch.sparse_coo_tensor(indices, sparse.values(), sparse.shape, check_invariants=False)
    torch.save({**state, name: sparse}, tmp_path / "weights.pth")
    refused.weights(tmp_path / "weights.pth", "indices" if kind == "bad indices" else f"{name!r} is sparse")


@pytest.mark.parametrize(
    "kind", ["quantised", "int32", "meta", "expanded", *rarely("int8", "uint8", "float8", "complex")]
)
def test_082_quantised_and_empty_tensors(refused, tmp_path, images, state, kind):
    name = next(key for key, value in state.items() if value.ndim == 4)
    weight = state[name]
    odd = {
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "float8": lambda: weight.to(torch.float8_e4m3fn),
        "complex": lambda: weight.to(torch.complex64),
        "meta": lambda: weight.to("meta"),
        "expanded": lambda: torch.zeros(1).expand(weight.shape),
    }.get(kind, lambda: (weight * 100).to(getattr(torch, kind, None)))()
    said = {"meta": "meta device", "expanded": "few are stored"}.get(kind, "quantised")
    torch.save({**state, name: odd}, tmp_path / "weights.pth")
    refused.weights(tmp_path / "weights.pth", name, said)
    folder = backbone_folder(tmp_path / "folder", None)
    torch.save({**state, name: odd}, folder / "pytorch_model.bin")
    expected = ("pytorch_model.bin", name, said)
    refused("extract", images, "--backbone", f"local-dir:{folder}", expected=expected)


# ---- folders of untrusted origin: what else a file of theirs could lead to -----------------------------


@pytest.mark.parametrize(
    "key", ["checkpoint_path", *rarely("pretrained", "pretrained_cfg_overlay", "name", "features_only")]
)
def test_a_configuration_cannot_name_other_weights(refused, tmp_path, images, canary, state, key):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": state, "extra": Canary(canary)}, other)
    value = {"checkpoint_path": str(other), "pretrained_cfg_overlay": {"file": str(other)}}.get(key, True)
    folder = backbone_folder(tmp_path / "folder", state, model_args={key: value})
    words = ("extract", images, "--backbone", f"local-dir:{folder}")
    refused(*words, expected=("model_args", repr(key)))


@pytest.mark.parametrize("key", ["file", *rarely("url", "hf_hub_id", "state_dict", "custom_load", "source")])
def test_a_configuration_cannot_redirect_the_loading(run_cli, tmp_path, images, canary, state, key):
    other = tmp_path / "other.pth"
    torch.save({"state_dict": state, "extra": Canary(canary)}, other)
    value = {"file": str(other), "url": other.as_uri(), "custom_load": True}.get(key, "hf-hub")
    folder = backbone_folder(tmp_path / "folder", state, cfg={key: value})
    plain = backbone_folder(tmp_path / "plain", state)
    found = [
        run_cli("extract", images, "--backbone", f"local-dir:{place}", "--dry-run", "--json")
        for place in (folder, plain)
    ]
    assert [one.code for one in found] == [0, 0], found[0].stderr
    assert len({json.loads(one.stdout)["cache_key"] for one in found}) == 1  # the folder's own weights
    assert not canary.exists()


# ---- runs that are continued ---------------------------------------------------------------------------


def forge_checkpoint(run, data, name="state.safetensors"):
    """Replace a file of every checkpoint of a run, its hash too."""
    for path in (run / "checkpoints").iterdir():
        complete = json.loads((path / "complete.json").read_text())
        (path / name).write_bytes(data)
        complete["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "complete.json").write_text(json.dumps(complete))


@pytest.mark.parametrize(
    "facts", [{}, {"epoch": "x"}, *rarely({"recipe": 3}, {"recipe": {}}, {"optimizer": None})]
)
def test_facts_of_a_checkpoint_that_are_no_state(run_cli, unfinished, tmp_path, facts):
    run = shutil.copytree(unfinished.run, tmp_path / "run")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    known = json.loads((newest / "state.json").read_text()) if facts else {}
    forge_checkpoint(run, json.dumps({**known, **facts}).encode(), "state.json")
    result = run_cli(*unfinished.words, "-o", run, "--resume", "--json")
    assert result.code in (2, 4), result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(list((run / "checkpoints").iterdir())) == 2
