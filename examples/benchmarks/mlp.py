"""The grid of MLP heads on synthetic features: how long it takes, and what it chooses.

    python examples/benchmarks/mlp.py                             the default grid, at most 100 epochs
    python examples/benchmarks/mlp.py --epochs 2 --against OLD    beside another checkout of tlcli, in turn

The default grid is 12 members (3 learning rates x 2 l2 x 2 dropout rates) on 5 folds, 60 networks, for each
of four shapes with and without batch norm. Seconds are processor time of one thread, the final network
included. A few epochs are enough for the ratio; the choice of a whole training takes all of them.

`--against` runs this script with each checkout's sources, interleaved, each fit in a process of its own, and
prints medians, their ratio (OLD / own: above 1 this checkout is quicker), the largest difference between the
two tables' cross-validated log losses, and whether the two chose the same member and epochs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {  # rows, features, classes, head
    "100 x 1280, 5 classes, mlp:512": (100, 1280, 5, "mlp:512"),
    "300 x 1280, 5 classes, mlp:512": (300, 1280, 5, "mlp:512"),
    "2,000 x 1280, 10 classes, mlp:512": (2000, 1280, 10, "mlp:512"),
    "1,400 x 512, 10 classes, mlp:1024,256": (1400, 512, 10, "mlp:1024,256"),
}


def synthetic(num_rows: int, num_classes: int, width: int) -> tuple[Any, Any]:
    """Return features with the look of pooled activations, and labels (as heads.py does)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latent = 256
    labels = torch.randperm(num_rows, generator=generator) % num_classes
    scale = torch.arange(1, latent + 1).float().pow(-0.5)
    centres = torch.randn(num_classes, latent, generator=generator)
    points = (torch.randn(num_rows, latent, generator=generator) + 0.35 * centres[labels]) * scale
    mixing = torch.randn(latent, width, generator=generator)
    noise = 0.3 * torch.randn(num_rows, width, generator=generator)
    return torch.relu(0.4 * points @ mixing + noise), labels


def fit(shape: str, batch_norm: bool, epochs: int) -> dict[str, Any]:
    """Return the seconds a grid takes, the member it chooses and its table."""
    import torch

    from tlcli.config.head import HeadOptions
    from tlcli.heads.fit import fit_head

    torch.set_num_threads(1)
    num_rows, width, num_classes, head = SHAPES[shape]
    features, labels = synthetic(num_rows, num_classes, width)
    options = HeadOptions(head=head, batch_norm=batch_norm, epochs=epochs)
    started = time.process_time()
    fitted = fit_head(features, labels, num_classes, options)
    return {"seconds": time.process_time() - started, "chosen": fitted.chosen, "table": fitted.table}


def fit_with(checkout: Path, shape: str, batch_norm: bool, epochs: int) -> dict[str, Any]:
    """Return `fit` by the sources of a checkout, in a process of its own."""
    command = [sys.executable, __file__, "--one", shape, "--epochs", str(epochs)]
    command += ["--batch-norm"] if batch_norm else []
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between the log losses of two tables; infinite where one has none."""
    pairs = [(a["cv_log_loss"], b["cv_log_loss"]) for a, b in zip(one["table"], other["table"], strict=True)]
    finite = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return max(finite) if all((a is None) == (b is None) for a, b in pairs) else float("inf")


def row_of(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """Return what the fits of both checkouts say; `before` may be empty."""
    new = statistics.median(found["seconds"] for found in after)
    chosen = str(after[0]["chosen"])
    if not before:
        return ["", f"{new:.1f}", "", "", chosen]
    old = statistics.median(found["seconds"] for found in before)
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(before, after, strict=True))
    same = before[0]["chosen"] == after[0]["chosen"]
    chosen += ", equal" if same else f", was {before[0]['chosen']}"
    return [f"{old:.1f}", f"{new:.1f}", f"{ratio:.2f}", f"{difference(before[0], after[0]):.0e}", chosen]


def main() -> None:
    """Time every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100, help="most epochs")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", type=Path, help="folder with other sources of tlcli")
    parser.add_argument("--one", choices=SHAPES, help="one shape alone, printed as JSON")
    parser.add_argument("--batch-norm", action="store_true", help="with --one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(fit(options.one, options.batch_norm, options.epochs)))
        return
    own = Path(__file__).resolve().parents[2]
    print("| shape | batch norm | old, s | new, s | old / new | difference | chosen |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for batch_norm in (False, True):
        for shape in SHAPES:
            before, after = [], []
            for _ in range(options.rounds):
                if options.against:
                    before.append(fit_with(options.against.resolve(), shape, batch_norm, options.epochs))
                after.append(fit_with(own, shape, batch_norm, options.epochs))
            row = [shape, "yes" if batch_norm else "no", *row_of(before, after)]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
