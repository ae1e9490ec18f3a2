"""Linear heads on many rows, features and classes: seconds, memory, and how good the choice is.

    python examples/benchmarks/large.py                       50,000 x 2,048, 1,000 classes
    python examples/benchmarks/large.py --rows 10000 --width 512 --classes 100 --exact

Synthetic features with the look of pooled activations and classes that overlap. It prints the time from
features to the chosen head and the memory beyond that of the features. `--exact` then fits five l2, a factor
of the square root of ten apart around the chosen one, until the decrement is 2e-4, and prints the log loss of
each on rows that no head saw, and that of the chosen head on the training rows beside the exact one.
"""

import argparse
import resource
import time

import torch
from torch import Tensor

from tlcli.config.head import HeadOptions
from tlcli.heads.fit import fit_head
from tlcli.heads.large_grid import solved_from
from tlcli.heads.linear_grid import make_fold, scaled_rows
from tlcli.heads.task import make_task

TEST_ROWS = 5000


def synthetic(num_rows: int, width: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return features fp32 [N, D], made in blocks, and labels int64 [N]."""
    generator = torch.Generator().manual_seed(0)
    latent = 256
    labels = torch.randperm(num_rows, generator=generator) % num_classes
    centres = torch.randn(num_classes, latent, generator=generator)
    scale = torch.arange(1, latent + 1).float().pow(-0.3)
    mixing = torch.randn(latent, width, generator=generator)
    features = torch.empty(num_rows, width)
    for first in range(0, num_rows, 5000):
        own = labels[first : first + 5000]
        points = (torch.randn(len(own), latent, generator=generator) + 0.2 * centres[own]) * scale
        noise = 0.3 * torch.randn(len(own), width, generator=generator)
        features[first : first + 5000] = torch.relu(0.3 * points @ mixing + noise)
    return features, labels


def peak() -> float:
    """Return the largest memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def loss(outputs: Tensor, labels: Tensor) -> float:
    """Return the mean log loss in nats."""
    return float(torch.nn.functional.cross_entropy(outputs, labels))


def exact(features: Tensor, labels: Tensor, tests: tuple[Tensor, Tensor], chosen: dict[str, float]) -> None:
    """Print what exact fits around the chosen l2 are worth."""
    num_classes = int(labels.max()) + 1
    task = make_task(features, labels, num_classes, HeadOptions(), None, torch.device("cpu"))
    scaling = str(chosen["scaling"])
    fold = make_fold(task, scaling, scaled_rows(task, scaling), torch.ones_like(labels, dtype=torch.bool))
    weights = None
    for step in (2, 1, 0, -1, -2):
        l2 = float(chosen["l2"]) * 10.0 ** (step / 2)
        started = time.perf_counter()
        weights, decrement = solved_from(task, fold, l2, 2e-4, weights)
        head = fold.basis.head(weights, normalise=scaling == "l2-normalised")
        train, test = loss(head.logits(features), labels), loss(head.logits(tests[0]), tests[1])
        seconds = time.perf_counter() - started
        print(
            f"  exact l2 {l2:9.2e}: train {train:.4f}, held out {test:.4f}, {seconds:.0f} s, {decrement:.0e}"
        )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--exact", action="store_true", help="fit five l2 to convergence as well")
    options = parser.parse_args()
    features, labels = synthetic(options.rows + TEST_ROWS, options.width, options.classes)
    tests = features[options.rows :].clone(), labels[options.rows :]
    features, labels = features[: options.rows].clone(), labels[: options.rows]
    before, started = peak(), time.perf_counter()
    fitted = fit_head(features, labels, options.classes, HeadOptions())
    seconds = time.perf_counter() - started
    chosen = f"{fitted.chosen['scaling']}, l2 {fitted.chosen['l2']:.3g}"
    print(
        f"{options.rows} x {options.width}, {options.classes} classes: {seconds:.0f} s, peak {peak():.2f} GB"
    )
    print(f"  {before:.2f} GB before, {chosen}, {len(fitted.table)} heads tried")
    train, test = loss(fitted.head.logits(features), labels), loss(fitted.head.logits(tests[0]), tests[1])
    print(f"  chosen: train {train:.4f}, held out {test:.4f}, cross-validation {fitted.cv['log_loss']:.4f}")
    if options.exact:
        exact(features, labels, tests, fitted.chosen)


if __name__ == "__main__":
    main()
