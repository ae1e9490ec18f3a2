"""Checkpoints: exact, whole or absent at any moment, never trusted without their hash; any timm optimiser."""

import errno
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm.optim
import torch
from torch import nn

from tlcli.errors import BackboneError, StorageError, UsageError
from tlcli.machine import files
from tlcli.training.checkpoints import Checkpoints
from tlcli.training.optimizer_state import DTYPES, load_optimizer_state, optimizer_state

ROOT = Path(__file__).parents[2]


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(3, 4, generator=generator), "counter": torch.tensor(step)}


def save(checkpoints, *steps):
    return [checkpoints.save(step, tensors_of(step), {"step": step}) for step in steps]


def check(checkpoint, step):
    """A checkpoint must be the one of its step, whole."""
    assert (checkpoint.step, checkpoint.facts) == (step, {"step": step})
    assert checkpoint.tensors.keys() == tensors_of(step).keys()
    for name, expected in tensors_of(step).items():
        assert torch.equal(checkpoint.tensors[name], expected)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- round trip ------------------------------------------------------------------------------------------


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = {}
    for dtype in DTYPES:
        for shape in [(), (0,), (5,), (2, 0, 3), (3, 1, 7)]:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * 9
            given[f"{dtype} {shape}"] = (values > 0) if dtype == torch.bool else values.abs().to(dtype)
    given["not contiguous"] = torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1)[::2]
    given["a part"] = torch.arange(100.0)[7:11]
    given["trained"] = torch.ones(2, requires_grad=True)
    given["odd"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    given["näme/of. \n any kind"] = torch.tensor(1)
    path = Checkpoints(tmp_path).save(7, given, {})
    found = Checkpoints(tmp_path).newest()
    assert (found.step, found.path) == (7, path)
    for tensors in (found.tensors, safetensors.torch.load_file(path / "state.safetensors")):
        assert tensors.keys() == given.keys()
        for name, expected in given.items():
            expected = expected.detach()
            assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
            assert tensors[name].contiguous().view(-1).view(torch.uint8).tolist() == (
                expected.contiguous().view(-1).view(torch.uint8).tolist()
            )


def test_facts_come_back_as_they_were(tmp_path):
    facts = {"a": [1, -2.5, 0.1, 1e-320, 2**70, True, None, "ü\ud800\n"], "b": {"": {}}, "c": [],
             "odd": [math.inf, -math.inf, math.nan, -0.0]}  # fmt: skip
    Checkpoints(tmp_path).save(0, {}, facts)
    found = Checkpoints(tmp_path).newest()
    assert repr(found.facts) == repr(facts)
    assert found.tensors == {}


@pytest.mark.parametrize("facts", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": [{"b": {3}}]}, {"a": torch.ones(1)}])
def test_what_would_come_back_changed_is_refused(tmp_path, facts):
    with pytest.raises(TypeError, match="facts"):
        Checkpoints(tmp_path).save(0, {}, facts)
    with pytest.raises(TypeError, match="cannot be stored"):
        Checkpoints(tmp_path).save(0, {"x": torch.eye(2).to_sparse()}, {})
    with pytest.raises(TypeError, match="cannot be stored"):
        Checkpoints(tmp_path).save(0, {"x": torch.ones(1, dtype=torch.complex64)}, {})
    assert Checkpoints(tmp_path).newest() is None


def test_the_newest_two_are_kept_and_all_are_gone_in_the_end(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    checkpoints.clear()  # of nothing
    save(checkpoints, 1, 12, 3_000_000_000)
    assert names(tmp_path) == ["step-0000012", "step-3000000000"]
    check(checkpoints.newest(), 3_000_000_000)
    checkpoints.clear()
    assert not (tmp_path / "checkpoints").exists()
    assert checkpoints.newest() is None


def test_a_step_that_is_saved_again_replaces_the_earlier_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in range(12):
        checkpoints.save(5, {}, {"number": number})
        assert Checkpoints(tmp_path).newest().facts == {"number": number}
    assert len(names(tmp_path)) == 2
    checkpoints.save(6, {}, {"number": 99})
    assert names(tmp_path) == ["step-0000005.11", "step-0000006"]


# ---- damage ----------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def lose(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def replace_with_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "complete.json"])
@pytest.mark.parametrize("damage", [truncate, flip, lose, empty, replace_with_folder])
def test_a_damaged_one_is_skipped_named_and_removed(tmp_path, caplog, name, damage):
    _, newer = save(Checkpoints(tmp_path), 1, 2)
    before = (newer / name).read_bytes()
    damage(newer / name)
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.newest()
    if name == "complete.json" and found.step == 2:  # a change that means nothing, as of the last newline
        assert json.loads(before) == json.loads((newer / name).read_text())
        return
    check(found, 1)
    assert str(newer) in caplog.text
    assert name in caplog.text
    save(checkpoints, 2)
    check(Checkpoints(tmp_path).newest(), 2)
    assert len(names(tmp_path)) == 2
    assert not newer.exists() or (newer / name).read_bytes() == before


def test_every_flipped_bit_of_a_state_is_seen(tmp_path):
    (path,) = save(Checkpoints(tmp_path), 4)
    for name in ("state.safetensors", "state.json"):
        data = (path / name).read_bytes()
        for place in range(0, 8 * len(data), 5):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            (path / name).write_bytes(changed)
            with pytest.raises(BackboneError, match=r"None of the checkpoints .* is intact"):
                Checkpoints(tmp_path).newest()
        (path / name).write_bytes(data)
    check(Checkpoints(tmp_path).newest(), 4)


def test_the_list_of_another_step_is_damage(tmp_path):
    older, newer = save(Checkpoints(tmp_path), 1, 2)
    (newer / "complete.json").write_bytes((older / "complete.json").read_bytes())
    check(Checkpoints(tmp_path).newest(), 1)
    newer.rename(tmp_path / "aside")
    older.rename(newer)  # whole, and not of that step
    with pytest.raises(BackboneError, match="step 1"):
        Checkpoints(tmp_path).newest()


def test_partial_ones_are_cleaned_and_those_of_a_living_writer_are_not(tmp_path):
    folder = tmp_path / "checkpoints"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = folder / f".tmp-{files.HOST}-{gone.pid}-{'0' * 32}"
    alive = folder / f".tmp-{files.HOST}-{os.getppid()}-{'0' * 32}"
    for path in (dead, alive):
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
    (folder / "mine").mkdir()
    assert Checkpoints(tmp_path).newest() is None
    save(Checkpoints(tmp_path), 1)
    assert names(tmp_path) == [alive.name, "mine", "step-0000001"]


def test_a_removed_in_part_one_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 2)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    real = os.rmdir
    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(StorageError):
        save(checkpoints, 3)
    monkeypatch.setattr(os, "rmdir", real)
    check(checkpoints.newest(), 3)
    save(checkpoints, 4)
    assert names(tmp_path) == ["step-0000003", "step-0000004"]


def forge(run, tensors=None, facts=b"{}"):
    """Write files whose hashes are right."""
    import hashlib

    (path,) = save(Checkpoints(run), 9)
    complete = json.loads((path / "complete.json").read_text())
    for name, data in (("state.safetensors", tensors), ("state.json", facts)):
        if data is not None:
            (path / name).write_bytes(data)
            complete["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "complete.json").write_text(json.dumps(complete))


HEADER = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 1 << 62) + b"{}",  # claims a header of exabytes
        struct.pack("<Q", 200_000_000) + b"{" + b" " * 100,
        struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + b"\0" * 7,
        b"\x80\x04\x95cos\nsystem\n(S'touch canary'\ntR.",
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_a_forged_state_is_refused_and_not_executed(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forge(tmp_path, tensors=data)
    with pytest.raises(BackboneError, match=r"state\.safetensors"):
        Checkpoints(tmp_path).newest()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("data", [b"[]", b"", b"{", b"\xff", b"[" * 100_000])
def test_forged_facts_are_refused(tmp_path, data):
    forge(tmp_path, facts=data)
    with pytest.raises(BackboneError, match=r"state\.json"):
        Checkpoints(tmp_path).newest()


def test_a_link_is_not_followed(tmp_path):
    save(Checkpoints(tmp_path / "other"), 1)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-0000001").symlink_to(tmp_path / "other/checkpoints/step-0000001")
    assert Checkpoints(tmp_path / "run").newest() is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "replace"])
def test_a_disk_that_refuses_leaves_the_earlier_ones(tmp_path, monkeypatch, call, number):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 2)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    real = getattr(os, call)
    for nth in range(1, 9):
        calls = iter(range(1, 1000))
        message = ""
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *a, n=nth, c=calls: (refuse if next(c) == n else real)(*a))
            try:
                save(checkpoints, 3)
            except StorageError as error:
                message = f"{error.message} {error.hint}"
        assert not message or "--resume" in message
        assert not message or ("needed" in message) == (number == errno.ENOSPC)
        there = any(name.startswith("step-0000003") for name in names(tmp_path))
        check(checkpoints.newest(), 3 if there else 2)
        assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_disk_that_cannot_be_read_is_no_reason_to_remove(tmp_path, monkeypatch):
    save(Checkpoints(tmp_path), 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "opened", refuse)
        with pytest.raises(StorageError, match="Permission"):
            Checkpoints(tmp_path).newest()
    check(Checkpoints(tmp_path).newest(), 1)


# ---- processes -------------------------------------------------------------------------------------------

SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from tlcli.training.checkpoints import Checkpoints

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "close")
calls = 0

def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

def save(run, step):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    Checkpoints(run).save(step, {"weight": weight, "counter": torch.tensor(step)}, {"step": step})
"""

KILLED = """
for line in sys.stdin:
    nth, run = int(line.split()[0]), Path(line.split()[1])
    if os.fork() == 0:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        save(run, 3)
        os._exit(0)
    os.write(1, b"%d\\n" % (os.waitstatus_to_exitcode(os.wait()[1]) == 0))
"""


def child(script, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SAVE + script, *map(str, arguments)],
                            env=environment, **options)  # fmt: skip


def test_killed_before_any_operation(tmp_path, caplog):
    """SIGKILL before every single operation on files: the newest is whole, and the next save tidies."""
    process = child(KILLED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    seen = []
    save(Checkpoints(tmp_path / "before"), 1, 2)
    for nth in range(1, 200):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(nth))
        process.stdin.write(f"{nth} {run}\n")
        survived = process.stdout.readline() == "1\n"
        found = Checkpoints(run).newest()
        check(found, found.step)
        seen.append(found.step)
        assert found.step == 3 or not survived
        left = [name for name in names(run) if name.startswith(".tmp-")]
        assert len(left) <= 1
        save(Checkpoints(run), 4)
        check(Checkpoints(run).newest(), 4)
        assert len(names(run)) == 2
        if survived:
            break
    process.stdin.close()
    assert process.wait(60) == 0
    assert len(seen) > 30
    assert seen == sorted(seen)  # 2 until the rename, 3 from there
    assert set(seen) == {2, 3}
    assert not caplog.text


TWO = """
other = os.fork()
for step in range(12):
    save(Path(sys.argv[1]), step)
if other:
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_two_processes_that_save_at_once(tmp_path):
    writers = child(TWO, tmp_path)
    checkpoints = Checkpoints(tmp_path)
    last = -1
    while writers.poll() is None:
        found = checkpoints.newest()
        if found is not None:
            check(found, found.step)
            last = max(last, found.step)
    assert writers.wait(60) == 0
    check(checkpoints.newest(), 11)
    assert last >= 0
    save(checkpoints, 12)
    assert not [name for name in names(tmp_path) if name.startswith(".tmp-")]


# ---- optimisers ------------------------------------------------------------------------------------------

NOT_TRIED = {
    "bnb": "needs bitsandbytes and a GPU",
    "fused": "needs apex and a GPU",
    "adahessian": "second order, and with a random generator of its own: refused, see below",
}
OPTIMIZERS = [name for name in timm.optim.list_optimizers() if not name.startswith(tuple(NOT_TRIED))]
WRAPPED = ["lookahead_adamw", "lookahead_sgd", "lookahead_kron"]


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def train(net, optimizer, steps, lr=None):
    for step in steps:
        torch.manual_seed(1000 + step)  # kron draws from the global state, which training sets each step
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 / (1 + step + number)
        optimizer.zero_grad()
        net(torch.randn(5, 3, 4, 4)).square().mean().backward()
        optimizer.step()


def made(name, net):
    return timm.optim.create_optimizer_v2(net, name, lr=0.01, weight_decay=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS + WRAPPED)
def test_an_optimizer_continues_bit_for_bit(tmp_path, name):
    through, before, after = network(), network(), network()
    with torch.compiler.set_stance("force_eager"):
        train(through, made(name, through), range(6))
        optimizer = made(name, before)
        train(before, optimizer, range(3))
        tensors, facts = optimizer_state(optimizer)
        Checkpoints(tmp_path).save(3, tensors, facts)
        after.load_state_dict(before.state_dict())
        again = made(name, after)
        found = Checkpoints(tmp_path).newest()
        load_optimizer_state(again, found.tensors, found.facts)
        train(after, again, range(3, 6))
    for expected, value in zip(through.state_dict().values(), after.state_dict().values(), strict=True):
        assert torch.equal(expected, value)
    expected, value = (optimizer_state(one)[1]["state"] for one in (optimizer, again))
    assert type(expected) is type(value)


def test_saving_before_the_first_step_and_hyperparameters_that_changed(tmp_path):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5, betas=(0.1, 0.2))
    optimizer.param_groups[0]["lr"] = 1e-9
    tensors, facts = optimizer_state(optimizer)
    assert tensors == {}
    json.dumps(facts)
    fresh = torch.optim.AdamW(net.parameters())
    load_optimizer_state(fresh, tensors, facts)
    assert fresh.param_groups[0]["lr"] == 1e-9
    assert fresh.param_groups[0]["betas"] == (0.1, 0.2)


def test_a_loaded_state_is_a_copy(tmp_path):
    net = network()
    optimizer = made("adamw", net)
    train(net, optimizer, range(1))
    tensors, facts = optimizer_state(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    fresh = made("adamw", network())
    load_optimizer_state(fresh, kept, facts)
    train(net, fresh, range(3))
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)


def test_what_cannot_be_restored_is_refused_by_name():
    net = network()
    with pytest.raises(UsageError, match=r"Adahessian.*generator") as caught:
        optimizer_state(made("adahessian", net))
    assert "--opt" in caught.value.hint
    optimizer = made("sgd", net)
    train(net, optimizer, range(1))
    tensors, facts = optimizer_state(optimizer)
    with pytest.raises(UsageError, match="is not the SGD"):
        load_optimizer_state(made("adamw", net), tensors, facts)
    with pytest.raises(UsageError, match="SGD does not take"):
        load_optimizer_state(torch.optim.SGD(list(net.parameters())[:2]), tensors, facts)
    with pytest.raises(BackboneError, match="damaged"):
        load_optimizer_state(made("sgd", net), {}, facts)
    optimizer.state[next(net.parameters())]["odd"] = object()
    with pytest.raises(UsageError, match="a object"):
        optimizer_state(optimizer)


def test_a_state_that_is_cast_on_the_way_in_is_refused():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    train(net, optimizer, range(1))
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    tensors, facts = optimizer_state(optimizer)
    with pytest.raises(UsageError, match="exactly"):
        load_optimizer_state(torch.optim.SGD(net.parameters(), momentum=0.9), tensors, facts)


def test_the_excluded_ones_are_known():
    for prefix in NOT_TRIED:
        assert any(name.startswith(prefix) for name in timm.optim.list_optimizers())
    assert len(OPTIMIZERS) > 80
