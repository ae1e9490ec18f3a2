"""Extraction against the usual script and its own ceiling, and what speed costs in quality and memory.

    python examples/benchmarks/extract.py --assets ASSETS                     speed and ceiling      4 minutes
    python examples/benchmarks/extract.py --assets ASSETS --quality           linear probes         12 minutes
    python examples/benchmarks/extract.py --assets ASSETS --memory            resident memory       10 minutes

(on two cores). ASSETS holds `mobilenetv2_100.imagenet`, `imagenet_sample` and the four data sets. The
usual script is timm's own transform, a DataLoader with two workers, fp32, NCHW, inference_mode, batches of
32. Both sides run in this process, in turn; medians are printed. Expected on a CPU with bf16: at least 4
times the usual script, 0.9 of the ceiling 1 / (1 / decode + 1 / forward), a median cosine of 0.999, accuracy
pooled over the four sets not more than 0.3 points lower, and at most 64 MB more memory for 4,317 images than
for 250.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions
from tlcli.config.data import DataOptions
from tlcli.data.collection import collect
from tlcli.data.dataset import Sample
from tlcli.data.decode import decode
from tlcli.data.folders import find_images
from tlcli.data.image_files import read_bytes
from tlcli.data.split import fingerprint
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.progress import Silent


class Images(Dataset):
    """The usual data set: Pillow and timm's transform."""

    def __init__(self, samples: list[Sample], transform: object) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.samples[index].path).convert("RGB"))


def usual(samples: list[Sample], backbone: str) -> tuple[torch.Tensor, float]:
    """Return rows and seconds of the usual script (the model is loaded before the clock starts)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(backbone, pretrained=True, num_classes=0).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    started = time.perf_counter()
    loader = DataLoader(Images(samples, transform), batch_size=32, num_workers=2)
    with torch.inference_mode():
        rows = [model(images.to(device)).cpu() for images in loader]
    return torch.cat(rows), time.perf_counter() - started


def ours(samples: list[Sample], extractor: Extractor, workers: int) -> tuple[torch.Tensor, float]:
    """Return rows and seconds of filling an empty cache, hashing included."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["TLCLI_HOME"] = home
        started = time.perf_counter()
        fingerprints = fingerprint(samples, workers, Silent())
        store = FeatureStore(extractor)
        store.fill(samples, fingerprints, workers=workers, progress=Silent())
        seconds = time.perf_counter() - started
        rows, missing = store.read([found.sha256 or "" for found in fingerprints])
        assert not missing
    return rows.float(), seconds


def decode_alone(samples: list[Sample], extractor: Extractor, workers: int) -> float:
    """Return the seconds of reading, decoding and resizing on all threads."""
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = time.perf_counter()
        list(pool.map(lambda sample: extractor.view.transform(decode(read_bytes(sample.path))), samples))
        return time.perf_counter() - started


def forward_alone(count: int, extractor: Extractor, workers: int) -> float:
    """Return the seconds of the prefix on `count` images, as it is run: a batch a thread, or on a GPU."""
    images = torch.randint(
        0, 256, (extractor.batch_size, 3, *extractor.view.transform.image_size), dtype=torch.uint8
    )
    batches = -(-count // extractor.batch_size)
    if extractor.device.type != "cpu":
        extractor.rows(images).cpu()
        started = time.perf_counter()
        for _ in range(batches):
            rows = extractor.rows(images)
        rows.cpu()
        return time.perf_counter() - started
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: extractor.rows(images), range(batches)))
        return (time.perf_counter() - started) * count / (batches * extractor.batch_size)


def speed(assets: Path, backbone: str, repeats: int, workers: int) -> None:
    """Print images/s of both sides and of the parts."""
    samples = find_images([assets / "imagenet_sample"])
    extractor = Extractor(load_backbone(BackboneOptions(backbone=backbone)))
    print(f"{len(samples)} images of {assets.name}/imagenet_sample; {extractor.reason}; {workers} workers")
    seconds: dict[str, list[float]] = {name: [] for name in ("usual", "tlcli", "decode", "forward")}
    ours(samples[:32], extractor, workers)
    for repeat in range(repeats):
        expected, taken = usual(samples, backbone)
        seconds["usual"].append(taken)
        rows, taken = ours(samples, extractor, workers)
        seconds["tlcli"].append(taken)
        seconds["decode"].append(decode_alone(samples, extractor, workers))
        seconds["forward"].append(forward_alone(len(samples), extractor, workers))
        rates = {name: len(samples) / values[-1] for name, values in seconds.items()}
        print(f"  repeat {repeat + 1}: " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    ratio = statistics.median(a / b for a, b in zip(seconds["usual"], seconds["tlcli"], strict=True))
    parts = zip(seconds["decode"], seconds["forward"], seconds["tlcli"], strict=True)
    together = (lambda d, f: d + f) if extractor.device.type == "cpu" else max
    share = statistics.median(together(d, f) / t for d, f, t in parts)
    cosine = torch.nn.functional.cosine_similarity(rows, expected).median()
    print(f"speed-up over the usual script  {ratio:.2f}   (bar 4)")
    print(f"share of the ceiling            {share:.2f}   (bar 0.9)")
    print(f"median cosine of rows           {cosine:.4f} (bar 0.999)")


def quality(assets: Path, backbone: str, workers: int) -> None:
    """Print the accuracy of linear probes on the usual rows and on ours, on the same splits."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.preprocessing import StandardScaler

    extractor = Extractor(load_backbone(BackboneOptions(backbone=backbone)))
    right = {"usual": 0, "tlcli": 0}
    total = 0
    cosines = []
    for name in ("hymenoptera", "neu_surface_defects.csv", "sign_digits.csv", "flowers.csv"):
        collection = collect(DataOptions(data=str(assets / name)), workers, Silent())
        samples = list(collection.samples)
        labels = torch.tensor([sample.label for sample in samples]).numpy()
        train = torch.tensor([split == "train" for split in collection.splits]).numpy()
        rows = {"usual": usual(samples, backbone)[0], "tlcli": ours(samples, extractor, workers)[0]}
        cosines.append(torch.nn.functional.cosine_similarity(rows["usual"], rows["tlcli"]))
        accuracy = {}
        for side, values in rows.items():
            scaled = StandardScaler().fit(values[train]).transform(values)
            probe = LogisticRegressionCV(Cs=[1e-4, 1e-3, 1e-2, 1e-1], cv=5, max_iter=2000)  # of train alone
            hits = int(
                (probe.fit(scaled[train], labels[train]).predict(scaled[~train]) == labels[~train]).sum()
            )
            right[side] += hits
            accuracy[side] = hits / int((~train).sum())
        total += int((~train).sum())
        median = cosines[-1].median()
        print(
            f"{name:26s} usual {accuracy['usual']:.4f}  tlcli {accuracy['tlcli']:.4f}  cosine {median:.4f}",
            flush=True,
        )
    difference = 100 * (right["tlcli"] - right["usual"]) / total
    print(f"pooled over {total} test images: {difference:+.2f} points (bar -0.3)")
    print(f"median cosine of all rows: {torch.cat(cosines).median():.4f} (bar 0.999)")


def memory(assets: Path, backbone: str) -> None:
    """Print the peak resident memory of `tlcli extract` on 250 and on all images of flowers."""
    lines = (assets / "flowers.csv").read_text().splitlines()
    for freeze in ("all", "4"):
        peaks = []
        for count in (250, len(lines) - 1):
            with tempfile.TemporaryDirectory() as folder:
                listing = Path(folder) / "flowers.csv"
                step = (len(lines) - 1) // count
                listing.write_text("\n".join([lines[0], *lines[1::step][:count]]) + "\n")
                (Path(folder) / "flowers").symlink_to(assets / "flowers")
                code = (
                    "import resource, sys; from tlcli.cli.app import main; code = main(sys.argv[1:]);"
                    "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
                )
                command = [sys.executable, "-c", code, "extract", str(listing), "--backbone", backbone,
                           "--freeze", freeze, "--allow-outside-root", "-q"]  # fmt: skip
                environment = {**os.environ, "TLCLI_HOME": f"{folder}/home"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                summary, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
                code, peak = last.split()
                assert code == "0", done.stderr
                peaks.append(int(peak) / 1024)
                print(
                    f"freeze {freeze:3s} {count:5d} images: peak {peaks[-1]:.0f} MB ({summary})", flush=True
                )
        print(f"freeze {freeze:3s} growth {peaks[1] - peaks[0]:.0f} MB (bar 64)")


def main() -> None:
    """Run what was asked."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=os.environ.get("TLCLI_REAL_ASSETS"), required=False)
    parser.add_argument("--backbone", help="another timm backbone than the MobileNetV2 of the assets")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    assets = Path(options.assets).resolve()
    backbone = options.backbone or f"local-dir:{assets / 'mobilenetv2_100.imagenet'}"
    if options.quality:
        quality(assets, backbone, options.workers)
    elif options.memory:
        memory(assets, backbone)
    else:
        speed(assets, backbone, options.repeats, options.workers)


if __name__ == "__main__":
    main()
