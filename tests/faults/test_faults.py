"""A fixed choice of the fault sweep (`make faults` runs all of it), and that it finds what is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # what has threads is not forked
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_nothing_is_lost_or_wrong_under_a_choice_of_faults(tmp_path):
    from tests.faults.cases import SCENARIOS
    from tests.faults.injection import EFFECTS

    done = run("-m", "tests.faults.sweep", "--sample", "--jobs", 2, "--json", tmp_path / "counts.json")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    counts = json.loads((tmp_path / "counts.json").read_text())["python"]
    assert counts["violations"] == 0
    assert counts["faults"] >= 250
    assert counts["twice"] >= 30
    met = {tuple(kind.split("/")) for kind in counts["kinds"]}
    assert {scenario for scenario, _ in met} == {scenario.name for scenario in SCENARIOS}
    assert {call for _, call in met} == set(EFFECTS)
    assert set(counts["effects"]) == {effect for effects in EFFECTS.values() for effect in effects.split()}


def test_the_sweep_finds_what_is_broken():
    done = run("-m", "tests.faults.broken")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 9
    for name, problems in found.items():
        assert problems["whole"] == [], name
        assert problems["broken"], f"{name} was not found"
