"""Whether `--lr auto` finds a learning rate that is worth its name: beside nine rates, on five data sets.

    python examples/benchmarks/rates.py --assets ASSETS        an hour on two cores; goes on where it was
    python examples/benchmarks/rates.py --assets ASSETS --quick

`--freeze 7` and full fine-tuning of the MobileNetV2 at 96 pixels, 25 images a class, 8 epochs, from the
linear probe: with `--lr auto`, with the rule's rate, and with nine rates from 1e-5 to 1e-1. The final loss is
that of val's images (the table's test side) under the trained network, whether it would be published or not;
the loss of the last epoch's training images stands beside it.

Bar: the loss under `--lr auto` is at most 1.1 times the smallest of the nine on four of the five sets.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SETS = {
    "sign_digits": "sign_digits.csv",
    "neu": "neu_surface_defects.csv",
    "flowers": "flowers.csv",
    "clothing": "clothing.csv",
    "weather": "weather.csv",
}
RATES = ("1e-05", "3e-05", "0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03", "0.1")
SCENARIOS = {"freeze": ("--freeze", "7"), "full": ("--freeze", "none")}
COLUMNS = ("data", "scenario", "lr", "found", "val_loss", "val_accuracy", "train_loss")


def table_of(assets: Path, data: str, folder: Path) -> Path:
    """Write the set's table with its test rows as val; return the path."""
    path = folder / f"{data}.csv"
    with open(assets / SETS[data], newline="") as file, open(path, "w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["filename", "label", "split"])
        for row in csv.DictReader(file):
            split = "val" if row["split"] in {"val", "test"} else "train"
            writer.writerow([assets / row["filename"], row["label"], split])
    return path


def train(options: argparse.Namespace, cell: tuple[str, str, str], folder: Path) -> dict[str, str]:
    """Return the row of one training; one that diverges has an infinite loss."""
    data, scenario, rate = cell
    table, run = table_of(options.assets, data, folder), folder / "run"
    words: list[object] = [
        "finetune", table, "--backbone", f"local-dir:{options.assets / 'mobilenetv2_100.imagenet'}",
        "--image-size", 96, "--limit-per-class", 25, "--epochs", 8, *SCENARIOS[scenario],
        "--publish", "trained",
        "--allow-outside-root", "-o", run, "--overwrite", "--json", "-q",
    ]  # fmt: skip
    words += [] if rate == "rule" else ["--lr", rate]
    done = subprocess.run(
        [sys.executable, "-m", "tlcli", *map(str, words)], capture_output=True,
        text=True, env={**os.environ, "TLCLI_HOME": str(options.home)}, check=False,
    )  # fmt: skip
    row = dict.fromkeys(COLUMNS, "inf") | {"data": data, "scenario": scenario, "lr": rate, "found": ""}
    if done.returncode:
        if "diverged" not in done.stderr:
            raise SystemExit(done.stderr)
        return row
    document = json.loads(done.stdout)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    row |= {"found": f"{document['training']['lr']:.3g}", "train_loss": f"{last['train_loss']:.4f}"}
    val = document["metrics"]["val"]
    return row | {"val_loss": f"{val['log_loss']:.4f}", "val_accuracy": f"{val['top1_accuracy']:.4f}"}


def summary(rows: list[dict[str, str]]) -> None:
    """Print the losses of every set beside the best of the nine rates."""
    for scenario in SCENARIOS:
        within = 0
        for data in SETS:
            some = {row["lr"]: row for row in rows if (row["data"], row["scenario"]) == (data, scenario)}
            if not {*RATES, "auto"} <= some.keys():
                continue
            best = min(RATES, key=lambda rate: float(some[rate]["val_loss"]))
            low = float(some[best]["val_loss"])
            ratio = float(some["auto"]["val_loss"]) / low
            within += ratio <= 1.1
            least = min(float(some[rate]["train_loss"]) for rate in RATES)
            text = f"{scenario:6}  {data:12} best {best:>6} loss {low:.3f}; auto {some['auto']['found']:>8} "
            text += f"{float(some['auto']['val_loss']):.3f}, {ratio:.2f} times; train loss "
            text += f"{float(some['auto']['train_loss']) / least:.2f} times"
            if "rule" in some:
                text += (
                    f"; the rule {some['rule']['found']:>8} {float(some['rule']['val_loss']) / low:.2f} times"
                )
            print(text)
        print(f"{scenario}: within 1.1 times on {within} of {len(SETS)} sets (bar 4)")


def main() -> None:
    """Do the trainings that are missing, then print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("rates.csv"), help="a row a training")
    parser.add_argument("--home", type=Path, help="of the cache; a temporary folder unless given")
    parser.add_argument("--quick", action="store_true", help="two trainings")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    if options.output.exists():
        with open(options.output, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["data"], row["scenario"], row["lr"]) for row in rows}
    cells = [
        (data, scenario, rate) for scenario in SCENARIOS for data in SETS for rate in ("auto", "rule", *RATES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        options.home = options.home or Path(folder, "home")
        for cell in [cell for cell in cells if cell not in done][: 2 if options.quick else None]:
            row = train(options, cell, Path(folder))
            rows.append(row)
            is_new = not options.output.exists()
            with open(options.output, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
            print(" ".join(row.values()), flush=True)
    summary(rows)


if __name__ == "__main__":
    main()
