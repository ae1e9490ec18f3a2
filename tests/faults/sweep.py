"""Sweep faults over the cache and the run directory, and print what became of them.

    python -m tests.faults.sweep             every fault, and true system calls where strace exists
    python -m tests.faults.sweep --sample    a fixed choice, in seconds

A fault counts once, and only when it happened.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.faults import tracing
from tests.faults.cases import SCENARIOS, Finding, Ground, Unit, all_units, memory, sample_units
from tests.faults.injection import EFFECTS

grounds: list[Ground] = []  # as the workers inherit them


def _python(unit: Unit) -> list[Finding]:
    return list(unit.run(grounds[unit.place], _folder(unit.place)))


def _traced(unit: tuple[int, str, str]) -> list[Finding]:
    place, call, effect = unit
    return list(tracing.run_all(grounds[place], call, effect, _folder(place)))


def _folder(place: int) -> Path:
    return grounds[place].folder / f"work-{os.getpid()}"


def sweep(
    folder: Path, names: Iterable[str] = (), *, sample: bool = False, strace: bool = False, jobs: int = 2
) -> Iterator[Finding]:
    """Run the cases of a lane, several at once, and yield those that fired."""
    wanted = set(names)
    if not grounds:
        chosen = [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]
        grounds.extend(Ground(scenario, folder / scenario.name) for scenario in chosen)
    if strace:
        run = _traced
        units = [
            (place, call, effect)
            for place in range(len(grounds))
            for call, effects in tracing.EFFECTS.items()
            for effect in effects.split()
        ]
    else:
        run = _python
        units = sample_units(grounds) if sample else all_units(grounds)
    gc.freeze()  # children share the pages of what is there by now
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for findings in pool.imap_unordered(run, units):
            yield from findings


def table(findings: Iterable[Finding]) -> str:
    """Return distinct faults by scenario, fault and call, and the violations among them."""
    cells: Counter[tuple[str, str, str]] = Counter()
    broken: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        effect = "twice" if finding.second else finding.first.effect
        cells[finding.scenario, effect, finding.first.call] += 1
        broken[finding.scenario, effect] += bool(finding.problems)
    calls = [call for call in EFFECTS if any(call == known for _, _, known in cells)]
    lines = []
    for scenario in dict.fromkeys(scenario for scenario, _, _ in sorted(cells)):
        lines.append(
            "".join(
                [f"\n{scenario:24}", *(f"{call:>9}" for call in calls), f"{'faults':>9}{'violations':>12}"]
            )
        )
        for effect in sorted({effect for name, effect, _ in cells if name == scenario}):
            row = [cells[scenario, effect, call] for call in calls]
            numbers = "".join(f"{number or '':>9}" for number in row)
            lines.append(f"  {effect:22}{numbers}{sum(row):>9}{broken[scenario, effect]:>12}")
    return "\n".join(lines)


def lane(name: str, findings: Iterator[Finding]) -> dict[str, object]:
    """Print the table and the violations of a lane; return its counts."""
    started = time.monotonic()
    distinct: dict[str, Finding] = {}
    for finding in findings:
        distinct[str(finding)] = finding
        if len(distinct) % 2000 == 0:
            print(f"{name}: {len(distinct)} faults, {time.monotonic() - started:.0f} s", file=sys.stderr)
    seconds = time.monotonic() - started
    violations = [finding for finding in distinct.values() if finding.problems]
    print(f"\n== {name}: each cell counts distinct faults that happened ==")
    print(table(distinct.values()))
    for finding in violations[:50]:
        print(f"\nVIOLATION {finding}", *finding.problems[:8], sep="\n    ")
    print(f"\n{name}: {len(distinct)} distinct faults, {len(violations)} violations, {seconds:.0f} s")
    kinds = sorted({f"{finding.scenario}/{finding.first.call}" for finding in distinct.values()})
    effects = sorted({finding.first.effect for finding in distinct.values()})
    return {"faults": len(distinct), "violations": len(violations), "seconds": round(seconds, 1),
            "twice": sum(finding.second is not None for finding in distinct.values()),
            "kinds": kinds, "effects": effects}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenarios", nargs="*", help="all by default: " + ", ".join(s.name for s in SCENARIOS)
    )
    parser.add_argument("--sample", action="store_true", help="a fixed choice, without strace")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--lane", choices=["python", "strace", "both"], default="both")
    parser.add_argument("--folder", type=Path, help="where to work; in memory by default, where that can be")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args()
    assert "torch" not in sys.modules, "a process that is forked for every case must be small"
    lanes = {}
    with tempfile.TemporaryDirectory(prefix="tlcli-faults-", dir=options.folder or memory()) as folder:
        common = {"names": options.scenarios, "jobs": options.jobs}
        if options.lane != "strace" or options.sample:
            found = sweep(Path(folder), sample=options.sample, **common)
            lanes["python"] = lane("patched functions", found)
        if options.lane != "python" and not options.sample:
            if tracing.available():
                lanes["strace"] = lane("strace", sweep(Path(folder), strace=True, **common))
            else:
                print("\nstrace is not installed or may not attach: true system calls are left out")
    if options.json:
        options.json.write_text(json.dumps(lanes))
    return int(any(counts["violations"] or not counts["faults"] for counts in lanes.values()))


if __name__ == "__main__":
    sys.exit(main())
