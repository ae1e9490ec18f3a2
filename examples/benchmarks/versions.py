"""Two checkouts against each other: extraction, a whole `finetune`, an epoch of `--freeze K`.

    python examples/benchmarks/versions.py OLD NEW --assets ASSETS      about 3 minutes a round on two cores

OLD and NEW are folders with tlcli's sources. Each runs its own `extract.py`, `tutorial.py` and
`freeze.py`, once a round, in turn and with the same interpreter; only what tlcli itself takes is compared.
One row a measurement goes to `--output`, and a second call continues there. Printed are the medians of NEW
/ OLD over the rounds: below 1 the new one is quicker. Expected between two versions that do the same: 0.95
to 1.05, more on a busy machine.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

FREEZE = ("--networks", "mobilenetv2", "--sets", "sign_digits.csv:128:320", "--repeats", "1")
SCRIPTS: dict[str, tuple[str, ...]] = {
    "extract": ("extract.py", "--repeats", "1"),
    "tutorial": ("tutorial.py", "--epochs", "1", "--repeats", "1"),
    "freeze": ("freeze.py", *FREEZE),
}
COLUMNS = ("round", "checkout", "what", "seconds")


def seconds_of(name: str, printed: str) -> dict[str, float]:
    """Return what tlcli took, by what it did, from what a benchmark printed."""
    if name == "extract":
        return {"extract, a picture": 1 / float(re.findall(r"tlcli (\d+)/s", printed)[0])}
    if name == "tutorial":
        return {"finetune, start to exit": float(re.findall(r"tlcli ([\d.]+) s, accuracy", printed)[0])}
    rows = [
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| mobilenetv2")
    ]
    cached, recomputed = (sum(float(row[column].split()[0]) for row in rows) for column in (3, 4))
    return {"freeze, epochs from rows": cached, "freeze, epochs recomputed": recomputed}


def run(checkout: Path, name: str, assets: Path) -> dict[str, float]:
    """Run one benchmark of a checkout."""
    script, *options = SCRIPTS[name]
    command = [sys.executable, str(checkout / "examples" / "benchmarks" / script), *options]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [*command, "--assets", str(assets)], cwd=checkout, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return seconds_of(name, done.stdout)


def report(rows: list[dict[str, str]], old: str, new: str) -> None:
    """Print the medians of both checkouts and of the ratio, which is taken round by round."""
    found = {(row["round"], row["checkout"], row["what"]): float(row["seconds"]) for row in rows}
    print(f"| what | {old}, s | {new}, s | new / old | rounds |\n|---|---|---|---|---|")
    for what in dict.fromkeys(row["what"] for row in rows):
        rounds = sorted({key[0] for key in found if key[2] == what and (key[0], new, what) in found})
        pairs = [(found[number, old, what], found[number, new, what]) for number in rounds]
        if not pairs:
            continue
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        median = statistics.median(ratios)
        print(f"| {what} | {before:.4g} | {after:.4g} | {median:.2f} ({spread}) | {len(pairs)} |")


def main() -> None:
    """Measure the rounds that are missing, and print what all of them say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--assets", type=Path, default=os.environ.get("TLCLI_REAL_ASSETS"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=Path("versions.csv"), help="measurements, one row each"
    )
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    if options.output.exists():
        with options.output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["round"], row["checkout"], row["what"].split(",")[0]) for row in rows}
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    kinds = {"extract": "extract", "tutorial": "finetune", "freeze": "freeze"}
    for number in range(options.rounds):
        for name in SCRIPTS:
            turn = list(checkouts) if number % 2 == 0 else list(reversed(checkouts))
            for label in turn:
                if (str(number), label, kinds[name]) in done:
                    continue
                for what, seconds in run(checkouts[label], name, options.assets.resolve()).items():
                    rows.append(dict(zip(COLUMNS, (str(number), label, what, f"{seconds:.6g}"), strict=True)))
                with options.output.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    report(rows, "old", "new")


if __name__ == "__main__":
    main()
