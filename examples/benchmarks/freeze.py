"""An epoch of `--freeze K` from cached rows against computing the frozen units anew; quality of cached views.

    python examples/benchmarks/freeze.py --assets ASSETS               speed         7 minutes
    python examples/benchmarks/freeze.py --assets ASSETS --quality     accuracy      a quarter of an hour

(on two cores; `--quick` shows in a minute that either runs). ASSETS holds `mobilenetv2_100.imagenet` and the
data sets; the ResNet-18, and any other network of --networks, is random, which costs the same. On a GPU at
real sizes, for example:

    --networks resnet50 vit_base_patch16_224 --sets flowers.csv:224:2048 --batch-size 256

Speed, in one process, in turn: an epoch of tlcli's training loop from the rows of V = 2 views, cached
beforehand, and one that decodes, augments and runs the frozen units (`--cache never`). Then each part alone,
over the same images in the same batches: decode (read and hash included), augment and prefix in as many
threads as the loop loads with, and the step of suffix and head in plain PyTorch, its inputs in memory, on all
threads, in the same compute type. The ceiling of the speed-up is
(decode + augment + prefix + step) / step. Speed-up, ceiling and their ratio are medians of the repeats'
own. Expected, bar 0.8:

    network, pixels, frozen units          speed-up              ceiling               ratio
    mobilenetv2, signs, 128, 4 / 9 / 14    1.26 / 1.72 / 2.42    1.25 / 1.56 / 2.43    0.98 / 1.07 / 0.95
    mobilenetv2, hymen., 224, 4 / 9 / 14   1.07 / 1.70 / 3.15    1.25 / 1.82 / 3.03    0.86 / 0.94 / 0.97
    resnet18, signs, 128, 2 / 4 / 7        1.24 / 1.39 / 1.65    1.26 / 1.39 / 1.70    0.99 / 0.99 / 0.96
    resnet18, hymen., 224, 2 / 4 / 7       1.40 / 1.77 / 2.51    1.42 / 1.72 / 2.65    0.99 / 1.02 / 0.95

Quality: `--scenario freeze --image-size 96`, all else as it is by default, with `--cache always --views 4`
and with `--cache never` (a fresh view every epoch), the same three seeds and --view-seed. Accuracy is that of
the files' val images, the only ones they hold out: nothing is chosen on them. Two intervals of the mean
difference are given: Student's over three pairs, which is wide, and a bootstrap over images, which knows
nothing of seeds. Expected, bar 0.5 points:

                   cached    live      points    over pairs        over images
    sign_digits    0.9952    0.9957    -0.05     -0.29 to +0.18    -0.32 to +0.22
    flowers        0.7801    0.7788    +0.13     -1.10 to +1.36    -1.03 to +1.26
"""

import argparse
import csv
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as tlcli does

import numpy as np
import torch
from torch import Tensor, nn

from tlcli.backbones.cut import freeze_parameters
from tlcli.backbones.units import units
from tlcli.backbones.zoo import load_backbone
from tlcli.commands.finetune import finetune, plan_finetune
from tlcli.config.commands import FinetuneConfig
from tlcli.data.collection import Collection, collect, labels_of
from tlcli.data.decode import decode
from tlcli.data.image_files import read_bytes
from tlcli.features.plan import compute_features, read_rows
from tlcli.machine import paths
from tlcli.progress import Silent
from tlcli.runs.run import open_run
from tlcli.training.inputs import ImageInputs, Inputs, RowInputs
from tlcli.training.loop import Samples, Setting, train
from tlcli.training.network import fp32_where_bf16_is_slow, make_network
from tlcli.training.plan import plan_training

DEPTHS = (0.25, 0.5, 0.8)  # early, middle, late: share of the units that is frozen
SETS = ("sign_digits.csv:128:320", "hymenoptera:224:224")
VIEWS = 2
COLUMNS = ("network", "data", "k", "cached s", "recomputed s", "decode", "augment", "prefix", "step",
           "speed-up", "ceiling", "ratio")  # fmt: skip
QUALITY_SETS = ("sign_digits.csv", "flowers.csv")
SIDES: dict[str, dict[str, Any]] = {"cached": {"cache": "always", "views": 4}, "live": {"cache": "never"}}
STUDENT_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # by degrees of freedom
RESAMPLES = 10_000


# ---- speed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network on a data set, cut at one place."""

    network: str
    freeze: int
    data: Path
    image_size: int
    num_images: int
    batch_size: int
    device: str

    def config(self, assets: Path) -> FinetuneConfig:
        """Return the options of `tlcli finetune`; the rate is small so that repeats stay finite."""
        real = self.network == "mobilenetv2"
        return FinetuneConfig(
            data=str(self.data), freeze=str(self.freeze), image_size=self.image_size, views=VIEWS,
            backbone=f"local-dir:{assets / 'mobilenetv2_100.imagenet'}" if real else self.network,
            random_init=not real, cache="always", augment="light", device=self.device, head_init="random",
            norm="train", batch_size=self.batch_size, epochs=1, lr="1e-5", max_bad=1.0,
        )  # fmt: skip


class Bench:
    """Both epochs of a case, and each part alone; every method returns seconds."""

    def __init__(self, case: Case, assets: Path) -> None:
        config = case.config(assets)
        self.workers = paths.default_workers()
        self.collection = chosen(collect(config, self.workers, Silent()), case)
        self.plan = plan_training(config, self.collection)
        assert self.plan.features is not None
        compute_features(self.plan.features, Silent())
        self.extractor, self.recipe = self.plan.extractor, self.plan.recipe
        self.device, self.batch_size = self.extractor.device, self.recipe.batch_size
        self.labels = labels_of(self.collection)
        backbone = self.extractor.backbone
        num_classes = len(self.collection.dataset.class_names)
        freeze_parameters(self.extractor.cut)
        self.network = make_network(
            self.extractor.cut.suffix, backbone.num_features, num_classes, config, dropout=self.recipe.dropout
        )
        self.setting = Setting(
            device=self.device, amp=self.plan.amp, workers=self.workers,
            unit_of={name: unit.index for unit in units(backbone.model) for name in unit.parameters},
            num_units=self.plan.num_units,
        )  # fmt: skip
        self.keys = [found.sha256 or "" for found in self.collection.fingerprints]
        self.images: list[tuple[str, Tensor]] = []
        self.views: list[Tensor] = []
        self.inputs: list[Tensor] = []

    # Epochs of the library.

    def cached(self) -> float:
        """An epoch from cached rows."""
        features, collection = self.plan.features, self.collection
        assert features is not None
        return self._epoch(
            RowInputs(
                lambda indices, views: read_rows(features, collection.select(indices), views),
                self.keys, num_views=VIEWS, seed=0, device=self.device,
            )
        )  # fmt: skip

    def recomputed(self) -> float:
        """An epoch from images, each with a view of its own, as `--cache never` trains."""
        samples = self.collection.samples
        return self._epoch(ImageInputs(self.extractor, samples, self.keys, num_views=None, seed=0))

    def _epoch(self, inputs: Inputs) -> float:
        trained = train(self.network, self.recipe, Samples(inputs, self.labels), None, self.setting)
        return float(trained.history[0]["seconds"])

    # Parts alone.

    def decode(self) -> float:
        """Read, hash and decode every image, in threads."""

        def work(places: Sequence[int]) -> list[tuple[str, Tensor]]:
            data = [read_bytes(self.collection.samples[place].path) for place in places]
            return [(sha256(one).hexdigest(), decode(one)) for one in data]

        parts, seconds = self._in_threads(work, self._batches(range(len(self.keys))))
        self.images = [image for part in parts for image in part]
        return seconds

    def augment(self) -> float:
        """Make a view of every decoded image, in threads."""

        def work(images: Sequence[tuple[str, Tensor]]) -> Tensor:
            return torch.stack([self.extractor.view(image, key, 1) for key, image in images])

        self.views, seconds = self._in_threads(work, self._batches(self.images))
        return seconds

    def prefix(self) -> float:
        """Compute the rows of every view: in threads on a CPU, as the library does."""

        def work(views: Tensor) -> Tensor:
            return torch.cat([self.extractor.rows(part) for part in views.split(self.extractor.batch_size)])

        if self.device.type == "cpu":
            rows, seconds = self._in_threads(work, self.views)
        else:
            started = time.perf_counter()
            rows = [work(views) for views in self.views]
            self._wait()
            seconds = time.perf_counter() - started
        self.inputs = [packed(part.float()) for part in rows]
        return seconds

    def step(self) -> float:
        """Train suffix and head on rows that are in memory, without the library's loop."""
        network = self.network.to(self.device).to(memory_format=torch.channels_last)
        network.train_norm = True
        network.train()
        trained = [value for value in network.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=self.recipe.weight_decay)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.plan.amp)
        on_slow_bf16 = self.device.type == "cpu" and self.plan.amp == "bf16"
        labels = self.labels.to(self.device).split(self.batch_size)
        with fp32_where_bf16_is_slow(network) if on_slow_bf16 else nullcontext():
            started = time.perf_counter()
            for inputs, wanted in zip(self.inputs, labels, strict=True):
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    logits = network(inputs)
                loss = nn.functional.cross_entropy(
                    logits.float(), wanted, label_smoothing=self.recipe.label_smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self._wait()
            seconds = time.perf_counter() - started
        network.to("cpu")
        return seconds

    def _batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [items[first : first + self.batch_size] for first in range(0, len(items), self.batch_size)]

    def _in_threads(self, work: Callable[[Any], Any], parts: Sequence[Any]) -> tuple[list[Any], float]:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            started = time.perf_counter()
            results = list(pool.map(work, parts))
            seconds = time.perf_counter() - started
        torch.set_num_threads(threads)  # the threads' own setting also set MKL's, which is everybody's
        return results, seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def packed(inputs: Tensor) -> Tensor:
    """Return maps in channels-last memory, as the training loop has them."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def chosen(collection: Collection, case: Case) -> Collection:
    """Return training images that fill whole batches, the same for each case."""
    good = [
        place for place, sample in enumerate(collection.samples)
        if collection.splits[place] == "train" and not sample.name.endswith(".gif")
    ]  # fmt: skip
    count = min(case.num_images, len(good)) // case.batch_size * case.batch_size
    if not count:
        raise SystemExit(f"{case.data.name} has fewer training images than --batch-size {case.batch_size}")
    return collection.select(sorted(random.Random(0).sample(good, count)))


def compare(case: Case, assets: Path, repeats: int) -> tuple[tuple[str, ...], float]:
    """Return a case's row of the table, and its ratio."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["TLCLI_HOME"] = home
        bench = Bench(case, assets)
        parts = (bench.decode, bench.augment, bench.prefix, bench.step)
        names = ("cached", "recomputed", "decode", "augment", "prefix", "step")
        taken: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats + 1):
            for name, measured in zip(names, (bench.cached, bench.recomputed, *parts), strict=True):
                seconds = measured()
                if repeat:  # the first pass loads kernels
                    taken[name].append(seconds)
    rounds = [dict(zip(names, values, strict=True)) for values in zip(*taken.values(), strict=True)]
    speed_ups = [found["recomputed"] / found["cached"] for found in rounds]
    ceilings = [sum(found[name] for name in names[2:]) / found["step"] for found in rounds]
    ratio = statistics.median(own / best for own, best in zip(speed_ups, ceilings, strict=True))
    data = f"{case.data.stem} {case.image_size} px n={len(bench.keys)}"
    middle = [f"{statistics.median(taken[name]):.3f}" for name in names]
    end = [f"{statistics.median(values):.2f}" for values in (speed_ups, ceilings)]
    return (case.network, data, str(case.freeze), *middle, *end, f"{ratio:.2f}"), ratio


def speed(options: argparse.Namespace) -> None:
    """Print the table of every network, data set and depth."""
    shares = DEPTHS[1:2] if options.quick else DEPTHS
    ratios = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for text in options.sets:
        name, pixels, images = text.split(":")
        for network in options.networks:
            case = Case(
                network,
                1,
                options.assets / name,
                int(pixels),
                int(images),
                options.batch_size,
                options.device,
            )
            count = len(units(load_backbone(case.config(options.assets)).model))
            for share in shares:
                row, ratio = compare(
                    replace(case, freeze=round(share * count)), options.assets, options.repeats
                )
                ratios.append(ratio)
                print("| " + " | ".join(row) + " |", flush=True)
    print(f"\nlowest ratio {min(ratios):.2f} (bar 0.80), {torch.get_num_threads()} threads")


# ---- quality --------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace, folder: Path) -> None:
    """Train both sides on every set and seed; print differences with intervals, and times."""
    os.environ["TLCLI_HOME"] = str(folder / "home")
    for name in QUALITY_SETS:
        right: dict[str, list[list[bool]]] = {side: [] for side in SIDES}
        seconds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for seed in range(options.seeds):
            for side in sorted(SIDES, reverse=bool(seed % 2)):
                run = trained(options, name, side, seed, folder)
                seconds[side].append(open_run(str(run)).facts["seconds"])
                right[side].append(hits(run))
        hit = {side: np.array(values, float) for side, values in right.items()}  # [seeds, images]
        differences = 100 * (hit["cached"] - hit["live"])
        low, high = bootstrapped(differences.mean(0))
        print(f"{name}: {differences.shape[1]} images, {options.seeds} seeds")
        for side in SIDES:
            values = ", ".join(f"{value:.4f}" for value in hit[side].mean(1))
            first, later = seconds[side][0], [found["total"] for found in seconds[side][1:]]
            times = f"first run {first['total']:.0f} s (features {first['features']:.0f} s)"
            if later:
                times += f", later runs {statistics.median(later):.0f} s"
            print(f"    {side:7s} accuracy {hit[side].mean():.4f} ({values}); {times}")
        print(f"    cached - live {differences.mean():+.2f} points (bar 0.5)")
        print(f"        over pairs:  {student(differences.mean(1))}")
        print(f"        over images: {low:+.2f} to {high:+.2f}", flush=True)


def trained(options: argparse.Namespace, name: str, side: str, seed: int, folder: Path) -> Path:
    """Return the run of one side, trained unless an earlier call of this script did."""
    run = folder / f"{Path(name).stem}-{side}-{seed}"
    facts = run / "run.json"
    if facts.is_file() and '"status": "done"' in facts.read_text():
        return run
    small: dict[str, Any] = {"epochs": 1, "limit_per_class": 8} if options.quick else {}
    config = FinetuneConfig(
        data=str(options.assets / name), backbone=f"local-dir:{options.assets / 'mobilenetv2_100.imagenet'}",
        scenario="freeze", image_size=96, seed=seed, view_seed=0, device=options.device, output=str(run),
        overwrite=True, **SIDES[side], **small,
    )  # fmt: skip
    finetune(plan_finetune(config, Silent()), Silent())
    return run


def hits(run: Path) -> list[bool]:
    """Return whether each val image was recognised, in the order of the data set."""
    with (run / "predictions-val.csv").open(newline="", encoding="utf-8") as file:
        return [row["label"] == row["predicted"] for row in csv.DictReader(file)]


def student(differences: np.ndarray) -> str:
    """Return the 95 % interval of the mean of a few paired differences."""
    count = len(differences)
    if count - 1 not in STUDENT_975:
        return "too few pairs" if count < 2 else f"standard deviation {differences.std(ddof=1):.2f}"
    half = STUDENT_975[count - 1] * differences.std(ddof=1) / count**0.5
    return f"{differences.mean() - half:+.2f} to {differences.mean() + half:+.2f} (t, {count} pairs)"


def bootstrapped(per_image: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean over images, each image's difference averaged over seeds."""
    draw = np.random.default_rng(0)
    size = len(per_image)
    means = [per_image[draw.integers(0, size, size)].mean() for _ in range(RESAMPLES)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assets = os.environ.get("TLCLI_REAL_ASSETS")
    parser.add_argument("--assets", type=Path, default=assets, required=not assets)
    parser.add_argument("--quality", action="store_true", help="accuracy of cached views rather than speed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: does it run?")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="of speed, beside one that is not counted")
    parser.add_argument("--networks", nargs="+", default=["mobilenetv2", "resnet18"])
    parser.add_argument("--sets", nargs="+", default=SETS, metavar="DATA:PIXELS:IMAGES")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="pairs of --quality")
    parser.add_argument(
        "--output", type=Path, help="keeps the runs of --quality here, to go on after an interruption"
    )
    options = parser.parse_args()
    options.assets = options.assets.resolve()
    if options.quick:
        options.repeats, options.seeds, options.batch_size = 1, 2, 16
        options.sets = ["sign_digits.csv:64:48"]
    if not options.quality:
        speed(options)
    elif options.output:
        quality(options, options.output.resolve() / "quick" if options.quick else options.output.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            quality(options, Path(folder))


if __name__ == "__main__":
    main()
