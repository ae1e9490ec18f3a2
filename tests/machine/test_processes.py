"""Several processes of one job: nothing to do for one, the same answers in all of several."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import TINY_FP32
from tlcli.errors import DataError
from tlcli.machine import paths, processes
from tlcli.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]


def test_one_process_is_all_there_is():
    assert (processes.world_size(), processes.rank(), processes.local_rank()) == (1, 0, 0)
    assert processes.is_main()
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather_objects("a") == ["a"]
    assert processes.from_main("a") == "a"
    processes.barrier()
    processes.raise_together(None)
    with pytest.raises(DataError, match="mine"):
        processes.raise_together(DataError("mine"))


def test_ranks_left_over_in_the_environment_of_one_process_count_for_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (processes.rank(), processes.local_rank()) == (0, 0)


def test_shares_are_the_whole_and_cores_are_shared(monkeypatch):
    alone = paths.default_workers()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert paths.default_workers() == 1 <= alone
    items = list(range(10))
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert processes.is_main() == (rank == 0)
        shares.append(processes.share(items))
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def torchrun(script, *arguments, count=2):
    """Run a script in several processes; return what it exits with."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, *script, *map(str, arguments)],
        env=environment,
        timeout=240,
        capture_output=True,
        text=True,
    )


TOGETHER = """
import json, pathlib, sys
from tlcli.machine import processes
from tlcli.errors import DataError, UsageError

rank = processes.rank()
found = {"gathered": processes.gather_objects({"rank": rank}), "main": processes.from_main(f"from {rank}")}
processes.barrier()
try:
    processes.raise_together(DataError("a bad image", hint="look") if rank == 1 else None)
except DataError as error:
    found["error"] = [error.message, error.hint]
pathlib.Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
if rank == 1:
    sys.exit(0)
try:
    processes.gather_objects(None)  # the other is gone
except Exception as error:
    pathlib.Path(sys.argv[1], "gone.json").write_text(json.dumps(type(error).__name__))
"""


def test_several_processes_give_the_same_answers_and_end_together(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = torchrun([script], tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1], done.stderr
    assert found[0]["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert found[0]["main"] == "from 0"
    assert found[0]["error"] == ["a bad image", "look"]
    assert json.loads((tmp_path / "gone.json").read_text()) == "ResourceError"


TINY = (*TINY_FP32, "--freeze", "2", "--augment", "light")


@pytest.mark.slow
def test_extract_in_two_processes_gives_the_rows_of_one(tmp_path, make_images, run_cli, monkeypatch):
    folder = make_images(tmp_path / "images", {"a": 20, "b": 20})
    for place in (3, 4, 5):
        (folder / f"a/{place:03d}.png").write_bytes(b"no image %d" % place)
    common = ["extract", folder, *TINY, "--views", "3", "--max-bad", "0.2", "--json", "-o"]
    done = torchrun(["-m", "tlcli"], *common, tmp_path / "two.npz")
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one document: the other process prints nothing
    assert len(two["bad_images"]) == 3  # of both processes
    assert two["features"]["rows_reused"] == 0
    shards = len(list(paths.home().rglob("*.safetensors")))
    assert shards == 4  # each process wrote one for view 0 and one for the others
    again = torchrun(["-m", "tlcli"], *common, tmp_path / "again.npz")
    assert json.loads(again.stdout)["features"]["rows_computed"] == 0
    monkeypatch.setenv("TLCLI_HOME", str(tmp_path / "other"))
    one = json.loads(run_cli(*common, tmp_path / "one.npz").stdout)
    assert one["features"]["rows_computed"] == two["features"]["rows_computed"]
    assert one["bad_images"] == two["bad_images"]
    with np.load(tmp_path / "one.npz") as first, np.load(tmp_path / "two.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first)
    never = torchrun(["-m", "tlcli"], *common, tmp_path / "never.npz", "--cache", "never")
    assert never.returncode == 0, never.stderr
    assert json.loads(never.stdout)["features"]["rows_computed"] == two["features"]["rows_computed"]


FAILS = """
import os, signal, sys
from tlcli.features.extractor import Extractor
from tlcli.machine import processes
from tlcli.errors import StorageError
from tlcli.cli.app import main

real = Extractor.compute_items
def compute_items(self, items, workers):
    for number, batch in enumerate(real(self, items, workers)):
        if processes.rank() == 1 and number == 1:
            raise StorageError("The disk of rank 1 is full.")
        yield batch
Extractor.compute_items = compute_items
code = main(sys.argv[2:])
open(os.path.join(sys.argv[1], f"code-{processes.rank()}"), "w").write(str(code))
sys.exit(code)
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_code_and_keeps_the_rows(tmp_path, make_images, run_cli):
    folder = make_images(tmp_path / "images", {"a": 60, "b": 60})
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = torchrun([script], tmp_path, "extract", folder, *TINY, "-j", "1")
    assert done.returncode != 0
    assert "The disk of rank 1 is full." in done.stderr
    assert done.stdout == ""
    codes = [(tmp_path / f"code-{rank}").read_text() for rank in range(2)]
    assert codes == ["5", "5"]
    found = json.loads(run_cli("extract", folder, *TINY, "--json").stdout)["features"]
    assert found["rows_reused"] >= 60
    assert found["rows_reused"] + found["rows_computed"] == 120


SIGNALLED = """
import os, signal, sys
from tlcli.cli.app import main
from tlcli.machine import processes
from tlcli.training.loop import _Loop

real = _Loop._save_or_stop
def save_or_stop(self, number):
    if processes.rank() == 1 and self.counters.step == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    real(self, number)
_Loop._save_or_stop = save_or_stop
code = main(sys.argv[2:])
open(os.path.join(sys.argv[1], f"code-{processes.rank()}"), "w").write(str(code))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(tmp_path, make_images, run_cli):
    folder = make_images(tmp_path / "images", {"a": 20, "b": 20})
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    words = [
        "finetune",
        folder,
        *TINY_FP32,
        "--freeze",
        "2",
        "--epochs",
        "3",
        "-b",
        "8",
        "-o",
        tmp_path / "run",
    ]
    done = torchrun([script], tmp_path, *words)
    assert done.returncode != 0
    codes = [(tmp_path / f"code-{rank}").read_text() for rank in range(2)]
    assert codes == [str(128 + signal.SIGUSR1)] * 2, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert Checkpoints(tmp_path / "run").newest().step == 3  # all hear of it after the next step
