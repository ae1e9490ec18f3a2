"""What training gains over the linear probe it starts from, and whether the better of the two is published.

    python examples/benchmarks/recipe.py --assets ASSETS              4 hours on two cores; resumable
    python examples/benchmarks/recipe.py --assets ASSETS --quick      a minute: shows that it runs
    python examples/benchmarks/recipe.py --summary                    the bars, from the rows there are

On a CPU two processes with one thread each (OMP_NUM_THREADS=1, --part 1/2 and 2/2) do more than one with two.
And, for the last bar, in a checkout of 0.2.0 with the same environment and the same --output:

    PYTHONPATH=CHECKOUT python examples/benchmarks/recipe.py --assets ASSETS --label 0.2.0

ASSETS holds `mobilenetv2_100.imagenet`, `efficientnet_lite0.imagenet` and the data sets. Every combination of
{25 images a class, up to 1,000 images} x {freeze, full} x {1, 3, default} epochs x 3 seeds at 96 pixels, on
five sets with the first backbone and on two with the second: 252 trainings, one row of --output each.
The `test` rows of a set's file are the test side (at most 600); of the rest, a fifth (at most 300) is val,
which chooses between the trained network and the probe, and the others are trained on. A seed changes all
of it. Test images are given to tlcli as val too, so that one training measures both networks on both; the
choice is then repeated with val's own images.

Bars (points are of test accuracy; a cell is a scenario with its number of epochs):

    a  before any selection, the mean gain of training over the probe is at least -2 points in every cell
    b  published minus the better of the two, pooled over all images: at least -0.5 points
    c  on no set does the 95 % interval of published minus probe lie below -1 point
    d  where training gains more than 3 points, it is what is published in at least 95 % of the runs
    e  with default epochs not worse than 0.2.0 by more than 0.3 points on average
"""

import argparse
import csv
import hashlib
import math
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SETS = {
    "sign_digits": "sign_digits_test.csv",
    "neu": "neu_surface_defects_test.csv",
    "flowers": "flowers_test.csv",
    "clothing": "clothing.csv",
    "weather": "weather.csv",
}
BACKBONES = {
    "mobilenetv2_100": ("mobilenetv2_100.imagenet", tuple(SETS)),
    "efficientnet_lite0": ("efficientnet_lite0.imagenet", ("sign_digits", "flowers")),
}
SIZES, SCENARIOS, EPOCHS, SEEDS = ("25", "1000"), ("freeze", "full"), ("3", "1", "default"), (0, 1, 2)
MOST_TEST, MOST_VAL, VAL_SHARE = 600, 300, 0.2


@dataclass(frozen=True)
class Row:
    """A training; shares are of test images unless they say val."""

    label: str
    backbone: str
    data: str
    size: str
    scenario: str
    epochs: str
    seed: int
    num_train: int
    steps: int
    lr: float
    norm: str
    num_val: int
    num_test: int
    val_probe: float
    val_trained: float
    published: str
    probe: float
    trained: float
    only_trained: int
    only_probe: int
    seconds: float

    @property
    def cell(self) -> tuple[str, ...]:
        """Return what the row is a row of."""
        return (self.label, self.backbone, self.data, self.size, self.scenario, self.epochs, str(self.seed))


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a file; [] when it does not exist."""
    if not path.exists():
        return []
    kinds = {item.name: item.type for item in fields(Row)}
    with open(path, newline="") as file:
        return [Row(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]  # type: ignore[operator]


# ---- one training ---------------------------------------------------------------------------------------


def table_of(assets: Path, data: str, size: str, seed: int, folder: Path) -> tuple[Path, set[str]]:
    """Write the table of a training; return its path and the names of the test images."""

    def place(row: dict[str, str]) -> bytes:
        return hashlib.sha256(f"{seed}|{row['filename']}".encode()).digest()

    with open(assets / SETS[data], newline="") as file:
        rows = sorted(csv.DictReader(file), key=place)
    test = [row for row in rows if row["split"] == "test"][:MOST_TEST]
    rest = [row for row in rows if row["split"] != "test"]
    count = min(MOST_VAL, round(VAL_SHARE * len(rest)))
    val, pool = rest[:count], rest[count:]
    taken: dict[str, int] = defaultdict(int)
    train = []
    for row in pool:
        taken[row["label"]] += 1
        if size != "25" or taken[row["label"]] <= 25:
            train.append(row)
    train = train[:1000]
    path = folder / "table.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label", "split"])
        for part, split in ((train, "train"), (val, "val"), (test, "val")):
            writer.writerows([str(assets / row["filename"]), row["label"], split] for row in part)
    return path, {str(assets / row["filename"]) for row in test}


def trained_with(config: Any, label: str) -> dict[str, Any]:
    """Train, and return what both networks give for val's images, their labels and files, and more.

    What is between epochs is not measured: val holds the test images here, and there are many. The label says
    which code is meant, now or an older one.
    """
    found: dict[str, Any] = {}
    try:
        from tlcli.commands import finetune as command
        from tlcli.training import backbone as training

        place, name = command, "train_backbone"
    except ImportError:  # 0.2.0
        from tlcli import finetune as command  # type: ignore[no-redef, attr-defined]
        from tlcli import tuning as training  # type: ignore[no-redef, attr-defined]

        place, name = training, "tune"  # type: ignore[assignment]
    from tlcli.progress import Silent

    if (label == "now") != (name == "train_backbone"):
        raise SystemExit(f"{command.__file__} is not the code that --label {label} says: check PYTHONPATH")
    loop, whole = training.train, getattr(place, name)

    def without_val(network: Any, recipe: Any, data: Any, val: Any, setting: Any, *more: Any) -> Any:
        found.update(recipe=recipe, num_train=len(data.labels), labels=val.labels)
        return loop(network, recipe, data, None, setting, *more)

    def kept(plan: Any, config: Any, train: Any, val: Any, writer: Any, progress: Any) -> Any:
        found["files"] = [sample.path for sample in val.samples]
        found["result"] = whole(plan, config, train, val, writer, progress)
        return found["result"]

    training.train = without_val
    setattr(place, name, kept)
    try:
        command.finetune(command.plan_finetune(config, Silent()), Silent())
    finally:
        training.train = loop
        setattr(place, name, whole)
    return found


def run(options: argparse.Namespace, cell: Sequence[str], folder: Path) -> Row:
    """Return the row of one training."""
    try:
        from tlcli.config.commands import FinetuneConfig
    except ModuleNotFoundError:  # 0.2.0
        from tlcli.config import FinetuneConfig  # type: ignore[no-redef, attr-defined]

    label, backbone, data, size, scenario, epochs, seed = cell
    table, tests = table_of(options.assets, data, size, int(seed), folder)
    config = FinetuneConfig(
        data=str(table), backbone=f"local-dir:{options.assets / BACKBONES[backbone][0]}", image_size=96,
        scenario=scenario, epochs=None if epochs == "default" else int(epochs), seed=int(seed),
        output=str(folder / "run"), overwrite=True, allow_outside_root=True, checkpoint_minutes=1e6,
        device=options.device,
    )  # fmt: skip
    started = time.perf_counter()
    found = trained_with(config, label)
    seconds = time.perf_counter() - started
    result, labels, recipe = found["result"], found["labels"], found["recipe"]
    ended = result.result if hasattr(result, "result") else result.trained  # 0.2.0
    import torch

    is_test = torch.tensor([file in tests for file in found["files"]])
    published, before, after = "trained", result.logits, result.logits
    if hasattr(result, "publication"):
        from tlcli.training.publishing import Comparison, candidate, publish

        before, after = result.before, result.after
        pair = [
            candidate(name, logits[~is_test], labels[~is_test])
            for name, logits in (("probe", before), ("trained", after))
        ]
        published = publish(Comparison(*pair, "val"), insist=False).published
    probe, trained = (logits.argmax(1) == labels for logits in (before, after))
    shares = [
        round(float(right[part].double().mean()), 5)
        for part in (~is_test, is_test) for right in (probe, trained)
    ]  # fmt: skip
    return Row(
        label, backbone, data, size, scenario, epochs, int(seed), found["num_train"], ended.steps,
        float(f"{ended.lr:.3g}"), recipe.norm, int((~is_test).sum()), int(is_test.sum()),
        shares[0], shares[1], published, shares[2], shares[3],
        int((trained & ~probe & is_test).sum()), int((probe & ~trained & is_test).sum()), round(seconds, 1),
    )  # fmt: skip


def cells(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield every training, seed by seed, so that what there is says something of all of it."""
    old = options.label != "now"
    for seed in SEEDS:
        for epochs in ("default",) if old else EPOCHS:
            for backbone, (_, sets) in BACKBONES.items():
                for data in sets:
                    for size in SIZES:
                        for scenario in SCENARIOS:
                            yield options.label, backbone, data, size, scenario, epochs, str(seed)


# ---- the bars -------------------------------------------------------------------------------------------


def published_of(row: Row) -> float:
    """Return the test accuracy of what was published."""
    return row.trained if row.published == "trained" else row.probe


def gain_interval(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Return published minus probe in points, and its paired 95 % interval, over all images of some rows."""
    mine = sum(row.only_trained for row in rows if row.published == "trained")
    theirs = sum(row.only_probe for row in rows if row.published == "trained")
    total = sum(row.num_test for row in rows)
    half = 1.96 * math.sqrt(max(0.0, mine + theirs - (mine - theirs) ** 2 / total)) / total
    share = (mine - theirs) / total
    return 100 * share, 100 * (share - half), 100 * (share + half)


def summary(rows: Sequence[Row]) -> None:
    """Print every bar from the rows there are."""
    now = [row for row in rows if row.label == "now"]
    print(f"{len(now)} of 252 trainings; points of test accuracy\n")
    print("a  training minus its probe, before any selection; bar -2")
    for scenario in SCENARIOS:
        for epochs in EPOCHS:
            some = [row for row in now if (row.scenario, row.epochs) == (scenario, epochs)]
            gains = [100 * (row.trained - row.probe) for row in some]
            if gains:
                lost = sum(gain < 0 for gain in gains)
                print(
                    f"     {scenario:6}  {epochs:7} epochs  mean {statistics.mean(gains):+6.2f}  lowest "
                    f"{min(gains):+6.2f}  below the probe {lost} of {len(gains)}"
                )
    total = sum(row.num_test for row in now)
    short = [(max(row.trained, row.probe) - published_of(row)) * row.num_test for row in now]
    print(f"b  published minus the better one, pooled: {-100 * sum(short) / total:+.2f}; bar -0.5")
    print("c  published minus probe by set, with its paired 95 % interval; bar: none wholly below -1")
    for data in SETS:
        if some := [row for row in now if row.data == data]:
            share, low, high = gain_interval(some)
            print(f"     {data:12} {share:+6.2f}  ({low:+.2f} to {high:+.2f})")
    gained = [row for row in now if row.trained - row.probe > 0.03]
    kept = sum(row.published == "trained" for row in gained)
    print(f"d  published where training gains more than 3 points: {kept} of {len(gained)}; bar 95 %")
    before = {row.cell[1:]: row for row in rows if row.label != "now"}
    pairs = [(row, before[row.cell[1:]]) for row in now if row.cell[1:] in before]
    if pairs:
        print("e  default epochs: published, and trained, minus 0.2.0; bar -0.3")
        for name, value in (("published", published_of), ("trained", lambda row: row.trained)):
            gains = [100 * (value(row) - old.trained) for row, old in pairs]
            print(f"     {name:9} {statistics.mean(gains):+.2f} over {len(pairs)} pairs")


def main() -> None:
    """Do the trainings that are missing, then print the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--output", type=Path, default=Path("recipe.csv"), help="a row a training")
    parser.add_argument("--label", default="now", help="of the code that is measured; another than now: old")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="of the trainings, for N processes at once"
    )
    parser.add_argument("--quick", action="store_true", help="two trainings")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    options = parser.parse_args()
    done = {row.cell for row in rows_of(options.output)}
    number, count = map(int, options.part.split("/"))
    mine = list(cells(options))[number - 1 :: count]
    wanted = [] if options.summary else [cell for cell in mine if cell not in done]
    folder = Path(tempfile.mkdtemp())
    try:
        for cell in wanted[:2] if options.quick else wanted:
            row = run(options, cell, folder)
            is_new = not options.output.exists()
            with open(options.output, "a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow([item.name for item in fields(Row)])
                writer.writerow([getattr(row, item.name) for item in fields(Row)])
            print(
                f"{' '.join(cell[1:])}: probe {row.probe:.4f}, trained {row.trained:.4f}, "
                f"{row.published} published, {row.seconds:.0f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    summary(rows_of(options.output))


if __name__ == "__main__":
    main()
