"""Heads in closed form on many rows: seconds and memory of each, from features to the chosen head.

    python examples/benchmarks/closed_form.py                      50,000 x 2,048, 100 and 1,000 classes
    python examples/benchmarks/closed_form.py --features FILE ...  accuracies on features of `tlcli extract`

Without files the features are synthetic: not negative, correlated, with classes that overlap. Each head is
fitted in a process of its own, whose memory beyond that of the features is printed. Held-out figures are on
rows that no head has seen: 5,000 more synthetic ones; of a FILE (.safetensors) the rows of its test split, of
its val split where it has none, or 30 % of its rows where it has neither.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.fit import fit_head

HEADS = ("ridge", "lda", "ncm", "knn")
TEST_ROWS = 5_000
Rows = tuple[Tensor, Tensor]


def synthetic(num_rows: int, num_classes: int, width: int) -> Rows:
    """Return features with the look of pooled activations, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    centres = torch.randn(num_classes, 256, generator=generator)
    mixing = torch.randn(256, width, generator=generator) / 16
    features = torch.empty(num_rows, width)
    for start in range(0, num_rows, 4096):
        here = labels[start : start + 4096]
        latent = centres[here] + 5.0 * torch.randn(len(here), 256, generator=generator)
        noise = 0.3 * torch.randn(len(here), width, generator=generator)
        features[start : start + 4096] = (latent @ mixing + noise).relu_()
    return features, labels


def read(path: Path) -> tuple[Rows, Rows]:
    """Return the training rows and the others of a file that `tlcli extract` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        features, labels = file.get_tensor("features").float(), file.get_tensor("labels").long()
        splits = json.loads((file.metadata() or {}).get("splits", "[]"))
    held = "test" if "test" in splits else "val"
    out = torch.tensor([split == held for split in splits])
    if not out.any():
        out = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.3
    return (features[~out], labels[~out]), (features[out], labels[out])


def peak() -> float:
    """Return the largest memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(kind: str, source: Path | tuple[int, int, int], threads: int) -> str:
    """Return a line of the table: one head fitted to rows that are made or read here."""
    torch.set_num_threads(threads)
    if isinstance(source, Path):
        (features, labels), (others, truth) = read(source)
        num_classes = int(torch.cat([labels, truth]).max()) + 1
    else:
        num_rows, width, num_classes = source
        features, labels = synthetic(num_rows + TEST_ROWS, num_classes, width)
        others, truth = features[num_rows:], labels[num_rows:]
        features, labels = features[:num_rows], labels[:num_rows]
    before, started, used = peak(), time.perf_counter(), time.process_time()
    fitted = fit_head(features, labels, num_classes, HeadOptions(head=kind))
    seconds, used = time.perf_counter() - started, time.process_time() - used
    memory = peak() - before
    logits = fitted.head.logits(others)
    accuracy = float((logits.argmax(1) == truth).float().mean())
    loss = float(torch.nn.functional.cross_entropy(logits, truth))
    chosen = ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in fitted.chosen.items()
    )
    cv = fitted.cv
    return (
        f"| {kind} | {len(labels)} | {seconds:.1f} | {used:.1f} | {memory:.2f} | {cv['top1_accuracy']:.4f} | "
        f"{accuracy:.4f} | {loss:.3f} | {cv['num_samples']} | {chosen} |"
    )


def main() -> None:
    """Print a table a source."""
    parser = argparse.ArgumentParser(description="Seconds, memory and accuracy of heads in closed form.")
    parser.add_argument("--features", type=Path, nargs="+", default=[])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--heads", nargs="+", default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    sources = options.features or [(options.rows, options.width, count) for count in options.classes]
    heads = options.heads or (("linear", "mlp:64", *HEADS) if options.features else HEADS)
    for source in sources:
        print(f"\n{source.stem if options.features else source}, {options.threads} threads\n")
        print("| head | rows | seconds | CPU s | GB more | cv | held out | log loss | measured on | chosen |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for kind in heads:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(measure, (kind, source, options.threads)), flush=True)


if __name__ == "__main__":
    main()
