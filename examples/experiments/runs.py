"""What the experiments share: trainings as `tlcli finetune` command lines, repeated over seeds, and a table.

Every training is a process of its own, and its command line is printed, so that it can be repeated by hand.
Its JSON document is kept in the output folder: an experiment that was stopped goes on where it was, and one
that is finished prints its table again at once. `--quick` takes one seed, one epoch and few images; that
shows that everything runs, and no figure worth reading.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.commands.demo import write_digits
from tlcli.metrics.intervals import wilson_interval
from tlcli.progress import Silent

QUICK = ("--epochs", "1", "--limit-per-class", "8")


@dataclass(frozen=True)
class Experiment:
    """Where an experiment works, and how often it repeats each training.

    Attributes:
        output: Folder for runs, cache, data and figures.
        seeds: Of the repeats.
        quick: Whether to train as little as possible.
        assets: Folder of the real data sets and backbone; None where the experiment needs none.
    """

    output: Path
    seeds: tuple[int, ...]
    quick: bool
    assets: Path | None = None

    @property
    def backbone(self) -> str:
        """Return the name of the real pretrained backbone."""
        assert self.assets is not None
        return f"local-dir:{self.assets / 'mobilenetv2_100.imagenet'}"

    def finetune(self, name: str, arguments: Sequence[object]) -> list[dict[str, Any]]:
        """Train once a seed, and return the JSON documents.

        Args:
            name: Of the runs and documents, without the seed.
            arguments: Of `tlcli finetune`, without output and seed.
        """
        found = []
        for seed in self.seeds:
            kept = self.output / f"{name}-{seed}.json"
            if not kept.exists():
                run = self.output / "runs" / f"{name}-{seed}"
                words = ["finetune", *arguments, *(QUICK if self.quick else ())]
                kept.write_text(self.tlcli(*words, "--seed", seed, "-o", run, "--overwrite"))
            found.append(json.loads(kept.read_text()))
        return found

    def tlcli(self, *words: object) -> str:
        """Run a command with --json, and return its document; ends the experiment where it fails."""
        command = ["tlcli", *map(str, words), "--json", "-q"]
        print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
        environment = {**os.environ, "TLCLI_HOME": str(self.output / "home")}
        done = subprocess.run(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=environment, check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout

    def digits(self) -> Path:
        """Write scikit-learn's 1,797 handwritten digits as pictures, once, and return their folder."""
        folder = self.output / "digits"
        if not folder.exists():
            write_digits(folder, Silent())
        return folder

    def cifar10(self, train_per_class: int, val_per_class: int) -> Path:
        """Unpack the first images of each class of CIFAR-10, once; its test images become val."""
        assert self.assets is not None
        folder = self.output / f"cifar10-{train_per_class}-{val_per_class}"
        limits = {"train": train_per_class, "test": val_per_class}
        if not folder.exists():
            with tarfile.open(self.assets / "cifar10_jpeg.tar.xz") as archive:
                taken: dict[str, int] = {}
                for member in archive:
                    split, _, name = member.name.partition("/")
                    kind = member.name.rpartition("/")[0]
                    if member.isfile() and taken.setdefault(kind, 0) < limits[split]:
                        taken[kind] += 1
                        path = folder.with_suffix(".part") / split.replace("test", "val") / name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(archive.extractfile(member).read())
            folder.with_suffix(".part").rename(folder)
        return folder


def begin(description: str | None, *, needs_assets: bool = True) -> Experiment:
    """Return the experiment that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    name = Path(sys.argv[0]).stem
    if needs_assets:
        assets = os.environ.get("TLCLI_REAL_ASSETS")
        parser.add_argument("--assets", type=Path, default=assets, required=not assets)
    parser.add_argument("--output", type=Path, default=Path("experiments") / name)
    parser.add_argument("--seeds", type=int, default=3, help="how often each training is repeated")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, few images: does it run?")
    options = parser.parse_args()
    output = options.output / "quick" if options.quick else options.output
    output.mkdir(parents=True, exist_ok=True)
    return Experiment(
        output.resolve(),
        seeds=(0,) if options.quick else tuple(range(options.seeds)),
        quick=options.quick,
        assets=options.assets.resolve() if needs_assets else None,
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return `mean (lowest..highest)`."""
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low}..{high})"


def accuracies(documents: Sequence[dict[str, Any]]) -> list[float]:
    """Return the val accuracy of each run."""
    return [document["metrics"]["val"]["top1_accuracy"] for document in documents]


def seconds(documents: Sequence[dict[str, Any]]) -> list[float]:
    """Return the wall time of each run, from reading the data to the written run."""
    return [document["seconds"]["total"] for document in documents]


def interval(documents: Sequence[dict[str, Any]]) -> str:
    """Return the 95 % interval of the mean accuracy, as if of one run: seeds share their images."""
    count = documents[0]["metrics"]["val"]["num_images"]
    found = wilson_interval(round(statistics.mean(accuracies(documents)) * count), count)
    return f"{found.low:.3f} to {found.high:.3f}"


def epochs(documents: Sequence[dict[str, Any]], key: str) -> list[list[float]]:
    """Return one value of every epoch of training, a list a run: `val_accuracy`, `train_loss`, ...

    What training started from, which a run writes as epoch 0, is left out.
    """
    curves = []
    for document in documents:
        lines = (Path(document["run_path"]) / "metrics.jsonl").read_text().splitlines()
        rows = [line for line in map(json.loads, lines) if line["kind"] == "epoch" and line["epoch"]]
        curves.append([row[key] for row in rows])
    return curves


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown, which is readable as it is."""
    cells = [[str(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
