"""One case: a scenario's work disturbed once or twice, looked at, run again, and compared with a calm run."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.cache_scenarios import CACHE_SCENARIOS
from tests.faults.child import Outcome, Work, run_child
from tests.faults.injection import EFFECTS, FATAL, Fault
from tests.faults.run_scenarios import RUN_SCENARIOS

SCENARIOS = (*CACHE_SCENARIOS, *RUN_SCENARIOS)
# A kill before any other call leaves the disk as the kill before the next of these does.
CHANGING = ("write", "rename", "unlink", "mkdir", "rmdir", "utime")
NOTHING = Fault("nothing", 0, "")
Disturb = Callable[[Work, Path, Fault], Outcome]


def memory() -> Path | None:
    """Return a folder in memory, where syncing costs nothing; None is the usual place of temporary files."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else None


@dataclass(frozen=True)
class Finding:
    """A case whose faults all fired.

    Attributes:
        scenario: Its name.
        first: The first fault.
        second: What ended the rerun, if anything did.
        problems: What was wrong.
    """

    scenario: str
    first: Fault
    second: Fault | None
    problems: tuple[str, ...]

    def __str__(self) -> str:
        again = f", then {self.second}" if self.second else ""
        return f"{self.scenario}: {self.first}{again}"


class Ground:
    """A scenario, the folder it begins with, and how it ends when nothing disturbs it."""

    def __init__(self, scenario: Any, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder
        self.template = folder / "template"
        self.template.mkdir(parents=True)
        scenario.prepare(self.template)
        self.before = scenario.start(self.template)
        work = self.copy(self.template, folder / "undisturbed")
        outcome = run_child(scenario.act, work)
        self.counts = outcome.counts
        self.undisturbed = scenario.final(work)
        problems = [
            *outcome.problems,
            *scenario.look(work, self.before, outcome, NOTHING),
            *scenario.compare(work, self.undisturbed, self.before, NOTHING),
        ]
        if outcome.ended != "done" or problems:
            raise AssertionError(
                f"{scenario.name}, undisturbed: {outcome.ended} {outcome.message} {problems}"
            )

    @staticmethod
    def copy(source: Path, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(source, target, symlinks=True))

    def case(self, work: Path, fault: Fault, disturb: Disturb = run_child) -> Finding | None:
        """Run one case in a folder that is made anew; return None where the fault did not happen."""
        self.copy(self.template, work)
        outcome = disturb(self.scenario.act, work, fault)
        if not outcome.fired:
            return None
        problems = self._after(work, fault, outcome)
        problems += self._end(work, fault)
        return Finding(self.scenario.name, fault, None, tuple(problems))

    def killed_twice(
        self, work: Path, first: Fault, seconds: Iterator[Fault] | None = None
    ) -> Iterator[Finding]:
        """Kill the work, and then its rerun at each call that changes the disk."""
        crashed = work.with_name(f"{work.name}-crashed")
        self.copy(self.template, crashed)
        if not run_child(self.scenario.act, crashed, first).fired:
            return
        for second in seconds or ():
            if finding := self._second(crashed, work, first, second):
                yield finding
        if seconds is not None:
            return
        for call, effect in _fatal():
            for nth in itertools.count(1):
                finding = self._second(crashed, work, first, Fault(call, nth, effect))
                if finding is None:
                    break
                yield finding

    def _second(self, crashed: Path, work: Path, first: Fault, second: Fault) -> Finding | None:
        self.copy(crashed, work)
        outcome = run_child(self.scenario.rerun, work, second)
        if not outcome.fired:
            return None
        problems = self._after(work, second, outcome)
        problems += self._end(work, second)
        return Finding(self.scenario.name, first, second, tuple(problems))

    def _after(self, work: Path, fault: Fault, outcome: Outcome) -> list[str]:
        problems = list(outcome.problems)
        if fault.fatal != (outcome.ended == "killed"):
            problems.append(f"it {outcome.ended} {outcome.message}")
        return problems + self.scenario.look(work, self.before, outcome, fault)

    def _end(self, work: Path, fault: Fault) -> list[str]:
        outcome = run_child(self.scenario.rerun, work)
        problems = [f"the rerun says: {problem}" for problem in outcome.problems]
        if outcome.ended != "done":
            problems.append(f"the rerun {outcome.ended} {outcome.message}")
        found = self.scenario.compare(work, self.undisturbed, self.before, fault)
        return problems + [f"after the rerun: {problem}" for problem in found]


def _fatal() -> Iterator[tuple[str, str]]:
    return ((call, effect) for call in CHANGING for effect in FATAL if effect in EFFECTS[call].split())


@dataclass(frozen=True)
class Unit:
    """Cases that one process runs one after another.

    Attributes:
        place: Of the scenario's ground.
        fault: The first fault; its `nth` is 0 to run through all until it no longer fires.
        twice: Whether to kill the rerun as well, at every call.
        second: Or at this one.
    """

    place: int
    fault: Fault
    twice: bool = False
    second: Fault | None = None

    def run(self, ground: Ground, work: Path) -> Iterator[Finding]:
        fault = self.fault
        if self.second:
            yield from ground.killed_twice(work, fault, iter([self.second]))
        elif self.twice:
            yield from ground.killed_twice(work, fault)
        elif fault.nth:
            if finding := ground.case(work, fault):
                yield finding
        else:
            for nth in itertools.count(1):
                finding = ground.case(work, Fault(fault.call, nth, fault.effect))
                if finding is None:
                    break
                yield finding


def all_units(grounds: list[Ground]) -> list[Unit]:
    """Return every fault at every call, and every kill of a rerun after every kill that changes the disk."""
    units = []
    for place, ground in enumerate(grounds):
        for call, effects in EFFECTS.items():
            units += [Unit(place, Fault(call, 0, effect)) for effect in effects.split()]
        for call, effect in _fatal():
            for nth in range(1, ground.counts.get(call, 0) + 1):
                units.append(Unit(place, Fault(call, nth, effect), twice=True))
    return units


def sample_units(grounds: list[Ground]) -> list[Unit]:
    """Return a fixed choice in which every scenario meets every kind of call, and every effect occurs."""
    units = []
    for place, ground in enumerate(grounds):
        for number, (call, effects) in enumerate(EFFECTS.items()):
            count = ground.counts.get(call, 0)
            if not count:
                continue
            choice = effects.split()[1:]
            units.append(Unit(place, Fault(call, (count + 1) // 2, "KILL")))
            units.append(Unit(place, Fault(call, 1 + count // 3, choice[(place + number + 1) % len(choice)])))
            if call in CHANGING:
                first = Fault(call, 1 + count * 2 // 3, "KILL") if count > 1 else Fault(call, 1, "KILL")
                units.append(Unit(place, first, second=Fault("rename", 1 + place % 2, "KILL")))
    return units
