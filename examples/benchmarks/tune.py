"""What the defaults reach: `--freeze 7` beside a loop written by hand, full fine-tuning beside a hand search.

    python examples/benchmarks/tune.py --assets ASSETS                 scenario 2    4 minutes
    python examples/benchmarks/tune.py --assets ASSETS --scenario4     scenario 4    hours

(on two cores; `--quick` shows in a minute or two that either runs). ASSETS holds `mobilenetv2_100.imagenet`
and the data sets.

Scenario 2: `tlcli finetune sign_digits.csv --image-size 128 --freeze 7` with an empty cache, against a loop
as an expert writes it with timm and torch: first seven units frozen, in eval mode and under no_grad, AdamW,
one-cycle to 2e-3, label smoothing 0.1, random shifts, bf16 where the processor is fast at it, channels-last,
batches of 32, 8 epochs, a DataLoader with two workers. Each is a process, timed from its start to its exit,
in turn. Both measure the file's val images after every epoch; as the loop could do without, its time is also
given without all evaluations but the last, and that is what counts. Nothing is chosen on val: the accuracy
is the last epoch's. Expected, bars 0.985 and 1.00:

    tlcli    accuracy 1.0000, 76.1 s
    loop     accuracy 0.9968, 124.7 s, without evaluations 106.7 s
    tlcli's share of the loop's time 0.71

Scenario 4, sign_digits and neu at 96 pixels: `--freeze none` with defaults against the best of 12 points set
by hand: half of all combinations of learning rate (3), layer decay (2), epochs (2) and augmentation (2), each
value meeting every value of the others. The files' val images are the test side; of train, tlcli holds out a
fifth by content, and val accuracy there (then log loss) of one seed chooses the point. Both are then trained
with three seeds and compared on the test side. Every finished training is a line of --output, so that the
search goes on where it was stopped. --limit-per-class N makes it shorter. Expected, mean (lowest..highest),
bar 1 point:

    sign_digits    defaults 0.9979 (0.9968..0.9984); no point can be more than 0.21 points better, so the
                   search was stopped after 5 of its 12, of which the best on val has 0.9968
    neu            defaults 0.9944 (0.9926..0.9963); no point can be more than 0.56 points better: no search
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tlcli.machine.device import choose_device, fast_bf16

LOOP = """
import csv, json, sys, time
from pathlib import Path
import timm, torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

options = json.loads(sys.argv[1])
size, epochs, device = options["image_size"], options["epochs"], torch.device(options["device"])
torch.manual_seed(options["seed"])
with open(options["data"], newline="") as file:
    rows = list(csv.DictReader(file))
classes = sorted({row["label"] for row in rows})
plain = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
shifts = transforms.RandomCrop(size, padding=size // 16, padding_mode="edge")
resize = transforms.Resize((size, size))
transform = {
    "train": transforms.Compose([resize, shifts, *plain]),
    "val": transforms.Compose([resize, *plain]),
}

class Images(Dataset):
    def __init__(self, split):
        self.rows, self.transform, self.root = [], transform[split], Path(options["data"]).parent
        taken = dict.fromkeys(classes, 0)
        for row in rows:
            if row["split"] == split and (split == "val" or taken[row["label"]] < options["limit"]):
                taken[row["label"]] += 1
                self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        image = Image.open(self.root / row["filename"]).convert("RGB")
        return self.transform(image), classes.index(row["label"])

def loader(split):
    return DataLoader(
        Images(split), batch_size=32, shuffle=split == "train", drop_last=split == "train", num_workers=2,
        persistent_workers=True, pin_memory=device.type == "cuda", multiprocessing_context="fork",
    )

model = timm.create_model(options["backbone"], pretrained=True, num_classes=len(classes))
model = model.to(device, memory_format=torch.channels_last)
prefix = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:3])  # seven units
suffix = nn.Sequential(
    *model.blocks[3:], model.conv_head, model.bn2, model.global_pool, model.classifier
)
prefix.requires_grad_(False).eval()
loaders = {split: loader(split) for split in ("train", "val")}
optimizer = torch.optim.AdamW(suffix.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=2e-3, total_steps=epochs * len(loaders["train"])
)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

def logits(images):
    images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=options["bf16"]):
        with torch.no_grad():
            rows = prefix(images)
        return suffix(rows).float()

found, training, evaluating = [], [], []
for epoch in range(epochs):
    started = time.perf_counter()
    suffix.train()
    for images, labels in loaders["train"]:
        loss = criterion(logits(images), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    training.append(time.perf_counter() - started)
    started = time.perf_counter()
    suffix.eval()
    right = 0
    with torch.no_grad():
        for images, labels in loaders["val"]:
            right += int((logits(images).argmax(1).cpu() == labels).sum())
    evaluating.append(time.perf_counter() - started)
    found.append(right / len(loaders["val"].dataset))
print(json.dumps({"accuracy": found, "training": training, "evaluating": evaluating}))
"""

RATES, LAYER_DECAYS, EPOCHS, AUGMENTS = (5e-4, 1e-3, 3e-3), (0.8, 1.0), (10, 20), ("light", "medium")
POINTS = [
    {"--lr": rate, "--layer-decay": decay, "--epochs": epochs, "--augment": augment}
    for (i, rate), (j, decay), (k, epochs), (m, augment) in product(
        *map(enumerate, (RATES, LAYER_DECAYS, EPOCHS, AUGMENTS))
    )
    if (i + j + k + m) % 2 == 0
]
SEARCHED = {"sign_digits": "sign_digits.csv", "neu": "neu_surface_defects.csv"}


def backbone_of(assets: Path) -> str:
    """Return the name of the real pretrained backbone."""
    return f"local-dir:{assets / 'mobilenetv2_100.imagenet'}"


def tlcli(words: list[object], home: Path) -> dict[str, Any]:
    """Return the JSON document of a command in a process of its own."""
    command = [sys.executable, "-m", "tlcli", *map(str, words), "--json", "-q"]
    environment = {**os.environ, "TLCLI_HOME": str(home)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


# ---- scenario 2 -----------------------------------------------------------------------------------------


def ours(options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Return accuracy and seconds of tlcli with what it does by default."""
    words: list[object] = [options.assets / "sign_digits.csv", "--backbone", backbone_of(options.assets)]
    words += ["--image-size", options.image_size, "--freeze", 7, *(["--seed", seed] if seed else [])]
    if options.device != "auto":
        words += ["--device", options.device]
    if options.quick:
        words += ["--epochs", 1, "--limit-per-class", 8]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        document = tlcli(["finetune", *words, "-o", f"{folder}/run"], Path(folder) / "home")
        seconds = time.perf_counter() - started
        recipe = json.loads(Path(folder, "run", "run.json").read_text())["recipe"]
    part, accuracy = document["seconds"], document["metrics"]["val"]["top1_accuracy"]
    print(
        f"    tlcli    accuracy {accuracy:.4f}, {seconds:.1f} s (features {part['features']:.1f}, training "
        f"{part['training']:.1f}); {recipe['epochs']} epochs, caching at: {recipe['caching']['where']}",
        flush=True,
    )
    return accuracy, seconds


def by_hand(options: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """Return the loop's accuracy, its seconds, and those without all evaluations but the last."""
    device = choose_device(options.device).device
    settings = {
        "data": str(options.assets / "sign_digits.csv"), "backbone": backbone_of(options.assets),
        "image_size": options.image_size, "epochs": 1 if options.quick else 8, "seed": seed,
        "limit": 8 if options.quick else 10**9, "device": str(device), "bf16": fast_bf16(device)[0],
    }  # fmt: skip
    command = [sys.executable, "-c", LOOP, json.dumps(settings)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    found = json.loads(done.stdout)
    without = seconds - sum(found["evaluating"][:-1])
    print(
        f"    loop     accuracy {found['accuracy'][-1]:.4f}, {seconds:.1f} s, without evaluations "
        f"{without:.1f} s; {statistics.median(found['training']):.1f} s an epoch",
        flush=True,
    )
    return found["accuracy"][-1], seconds, without


def scenario2(options: argparse.Namespace) -> None:
    """Run both sides in turn and print medians; each repeat has another seed."""
    own, hand = [], []
    for repeat in range(options.repeats):
        print(f"repeat {repeat + 1}", flush=True)
        if repeat % 2:
            hand.append(by_hand(options, repeat))
            own.append(ours(options, repeat))
        else:
            own.append(ours(options, repeat))
            hand.append(by_hand(options, repeat))
    accuracy, seconds = (statistics.median(values) for values in zip(*own, strict=True))
    theirs, whole, without = (statistics.median(values) for values in zip(*hand, strict=True))
    share = statistics.median(mine[1] / other[2] for mine, other in zip(own, hand, strict=True))
    print(
        f"tlcli {accuracy:.4f} (bar 0.985) in {seconds:.1f} s; loop {theirs:.4f} in {whole:.1f} s, ", end=""
    )
    print(f"{without:.1f} s without evaluations; share of the time {share:.2f} (bar 1.00)")


# ---- scenario 4 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A data set, and the trainings on it that are finished.

    Attributes:
        name: Of the data set.
        table: Its CSV file, val images as test.
        options: The command line.
        folder: For the cache and runs, which are not kept.
    """

    name: str
    table: Path
    options: argparse.Namespace
    folder: Path

    def trained(self, point: dict[str, object], seed: int) -> dict[str, Any]:
        """Return a training's line of the output file, trained unless it is there."""
        words = ["--freeze", "none", "--image-size", self.options.image_size, "--seed", seed]
        words += [word for pair in {**point, **self._limits()}.items() for word in pair]
        key = {"data": self.name, "words": list(map(str, words))}
        for line in finished(self.options.output):
            if key.items() <= line.items():
                return line
        run = self.folder / "run"
        document = tlcli(
            ["finetune", self.table, "--backbone", backbone_of(self.options.assets), "--allow-outside-root",
             "--device", self.options.device, *words, "-o", run, "--overwrite"],
            self.folder / "home",
        )  # fmt: skip
        measured = tlcli(
            ["evaluate", run, "--split", "test", "--device", self.options.device], self.folder / "home"
        )
        val = document["metrics"]["val"]
        line = {
            **key, "val": val["top1_accuracy"], "val_log_loss": val["log_loss"],
            "test": measured["top1_accuracy"], "num_val": val["num_images"],
            "num_test": measured["num_images"], "seconds": document["seconds"]["total"],
        }  # fmt: skip
        with self.options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"    {self.name} {' '.join(key['words'])}: val {line['val']:.4f}, {line['seconds']:.0f} s",
            flush=True,
        )
        return line

    def _limits(self) -> dict[str, object]:
        """Return the options that make every training shorter."""
        limit = self.options.limit_per_class
        limits: dict[str, object] = {"--limit-per-class": limit} if limit else {}
        return {**limits, "--epochs": 1} if self.options.quick else limits

    def run(self) -> None:
        """Search, compare and print."""
        points = POINTS[:2] if self.options.quick else POINTS
        defaults = [self.trained({}, seed) for seed in range(self.options.seeds)]
        tried = [(point, self.trained(point, 0)) for point in points]
        best, line = max(tried, key=lambda pair: (pair[1]["val"], -pair[1]["val_log_loss"]))
        chosen = [self.trained(best, seed) for seed in range(self.options.seeds)]
        print(f"{self.name}: {len(points)} points, val {line['num_val']} images, test {line['num_test']}")
        print(f"    chosen: {' '.join(f'{key} {value}' for key, value in best.items())}")
        means = {}
        for way, lines in (("defaults", defaults), ("best of search", chosen)):
            values = [found["test"] for found in lines]
            means[way] = statistics.mean(values)
            seconds = statistics.median(found["seconds"] for found in lines)
            print(
                f"    {way:15s} test {means[way]:.4f} ({min(values):.4f}..{max(values):.4f}), {seconds:.0f} s"
            )
        difference = 100 * (means["best of search"] - means["defaults"])
        print(f"    defaults are {difference:.2f} points worse (bar 1.00)", flush=True)


def finished(path: Path) -> list[dict[str, Any]]:
    """Return the trainings of an output file; a line that was cut short is none."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def with_test_side(table: Path, target: Path) -> None:
    """Write a data set's CSV file anew: its val images are test, and none is val."""
    with table.open(newline="", encoding="utf-8") as source, target.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["filename", "label", "split"])
        writer.writeheader()
        for row in csv.DictReader(source):
            split = "test" if row["split"] == "val" else row["split"]
            writer.writerow(
                {"filename": table.parent / row["filename"], "label": row["label"], "split": split}
            )


def scenario4(options: argparse.Namespace) -> None:
    """Search on every data set."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            table = Path(folder) / f"{name}.csv"
            with_test_side(options.assets / SEARCHED[name], table)
            Search(name, table, options, Path(folder)).run()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assets = os.environ.get("TLCLI_REAL_ASSETS")
    parser.add_argument("--assets", type=Path, default=assets, required=not assets)
    parser.add_argument("--scenario4", action="store_true", help="defaults of full against a hand search")
    parser.add_argument("--quick", action="store_true", help="tiny settings: does it run?")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1, help="of scenario 2")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison in scenario 4")
    parser.add_argument("--sets", nargs="+", default=list(SEARCHED), choices=list(SEARCHED))
    parser.add_argument("--limit-per-class", type=int, help="training images of a class, in scenario 4")
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/tune.jsonl"), help="finished trainings of scenario 4"
    )
    options = parser.parse_args()
    options.assets, options.output = options.assets.resolve(), options.output.resolve()
    options.image_size = 96 if options.scenario4 else 128
    if options.quick:
        options.image_size, options.seeds, options.limit_per_class = 64, 2, 8
    if options.scenario4:
        scenario4(options)
    else:
        scenario2(options)


if __name__ == "__main__":
    main()
