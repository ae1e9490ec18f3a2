"""The cross-validated scores of linear heads against scikit-learn at tol 1e-8, for every l2 of the grid.

    python examples/benchmarks/exact.py --assets ASSETS --home FOLDER

ASSETS is the folder with the real data and backbones, FOLDER takes their features. For each set, each
backbone and each scaling it holds out the folds that tlcli holds out, fits both solvers to the other rows,
and compares on the held-out ones: the mean log loss (aimed at: 2 % or 0.002 nats) and every probability
(aimed at: 0.005). scikit-learn (lbfgs in fp64, tol 1e-8) gets each fold's rows as tlcli scales them, with
the C that matches.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlcli.config.head import SCALINGS, HeadOptions
from tlcli.heads.linear import SMALLEST_DEVIATION
from tlcli.heads.linear_grid import AUTO_L2, make_fold, scaled_rows, solve_grid
from tlcli.heads.task import Task, make_task

BACKBONES = ("mobilenetv2_100.imagenet", "efficientnet_lite0.imagenet")
SETS = {
    "flowers": ("flowers", (), 20),
    "neu": ("neu_surface_defects.csv", (), 10),
    "signs": ("sign_digits", (), 5),
    "clothing": ("clothing.csv", (), 10),
}


def read(assets: Path, home: Path, name: str, backbone: str) -> tuple[Tensor, Tensor]:
    """Return features fp32 [N, D] and labels int64 [N], extracted once."""
    data, options, per_class = SETS[name]
    output = home / f"{name}-{backbone}.npz"
    if not output.exists():
        command = [sys.executable, "-m", "tlcli", "extract", str(assets / data), *options, "--backbone",
                   f"local-dir:{assets / backbone}", "--limit-per-class", str(per_class),
                   "--output", str(output), "--quiet"]  # fmt: skip
        environment = {**os.environ, "TLCLI_HOME": str(home / "cache")}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    with np.load(output) as arrays:
        train = arrays["splits"] == "train"
        features, labels = arrays["features"][train], arrays["labels"][train]
        return torch.from_numpy(features).float(), torch.from_numpy(labels).long()


def synthetic(num_rows: int, width: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return isotropic features with overlapping classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_rows) % num_classes
    centres = torch.randn(num_classes, width, generator=generator)
    return torch.randn(num_rows, width, generator=generator) + 0.3 * centres[labels], labels


def reference(rows: np.ndarray, labels: Tensor, held: np.ndarray, l2: float, num_classes: int) -> Tensor:
    """Return scikit-learn's probabilities, fp64 [C, n'], of the rows `held`."""
    from sklearn.linear_model import LogisticRegression

    strength = (2 if num_classes == 2 else 1) / (l2 * len(labels))
    model = LogisticRegression(C=strength, tol=1e-8, max_iter=100_000).fit(rows, labels)
    return torch.from_numpy(model.predict_proba(held)).T


def scaled(train: Tensor, rows: Tensor, scaling: str) -> np.ndarray:
    """Return fp64 rows scaled by the rows that a head trains on."""
    train, rows = train.double(), rows.double()
    if scaling == "l2-normalised":
        train, rows = (part / part.norm(dim=1, keepdim=True) for part in (train, rows))
    centre, deviation = train.mean(0), train.std(0, correction=0)
    divisor = torch.ones_like(deviation)
    if scaling == "standardised":
        varies = deviation > 1e-6 * centre.abs()
        typical = deviation[varies].median()
        divisor = torch.where(varies, deviation.maximum(SMALLEST_DEVIATION * typical), typical)
    divisor = divisor * (deviation / divisor).square().mean().sqrt()
    return ((rows - centre) / divisor).numpy()


def compare(task: Task, scaling: str, l2: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Return how far the scores of a scaling are off.

    Returns:
        The worst error of a log loss (relative, or as a share of 0.1 nats), its l2, the largest difference of
        a probability, and its l2.
    """
    inputs = scaled_rows(task, scaling)
    ours = torch.zeros(len(l2), dtype=torch.float64)
    theirs, apart, num_held = ours.clone(), ours.clone(), 0
    for number in range(task.num_folds):
        training = task.folds != number
        fold = make_fold(task, scaling, inputs, training)
        held = torch.nonzero(task.folds == number)[:, 0]
        train = scaled(task.features[training], task.features[training], scaling)
        test = scaled(task.features[training], task.features[held], scaling)
        weights = solve_grid(task, [fold], l2).weights[0]
        own = task.labels[held], torch.arange(len(held))
        for index, value in enumerate(l2):
            mine = fold.basis.logits(weights[index], inputs[held]).double().softmax(0)
            exact = reference(train, task.labels[training], test, value, task.num_classes)
            apart[index] = max(float(apart[index]), float((mine - exact).abs().max()))
            ours[index] -= mine[own].clamp_min(1e-300).log().sum()
            theirs[index] -= exact[own].clamp_min(1e-300).log().sum()
        num_held += len(held)
    ours, theirs = ours / num_held, theirs / num_held
    error = (ours - theirs).abs() / theirs.clamp_min(0.1)
    worst, widest = int(error.argmax()), int(apart.argmax())
    return float(error[worst]), l2[worst], float(apart[widest]), l2[widest]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--assets", type=Path, help="folder with the real data; synthetic rows alone if left out"
    )
    parser.add_argument("--home", type=Path, default=Path("exact"), help="folder that takes the features")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.home.mkdir(parents=True, exist_ok=True)
    shapes = ((60, 512, 6), (100, 128, 20), (60, 64, 2))
    cases = [(" x ".join(map(str, shape)), synthetic(*shape)) for shape in shapes]
    if options.assets:
        cases += [
            (f"{name}, {backbone.split('.')[0]}", read(options.assets, options.home, name, backbone))
            for name in SETS
            for backbone in BACKBONES
        ]
    print(f"{'set':30} {'scaling':14} log loss off by  at l2   probability off by  at l2  seconds")
    good = [0, 0]
    for name, (features, labels) in cases:
        task = make_task(features, labels, int(labels.max()) + 1, HeadOptions(), None, torch.device("cpu"))
        for scaling in SCALINGS:
            started = time.perf_counter()
            error, at, apart, there = compare(task, scaling, AUTO_L2)
            good[0], good[1] = good[0] + (error <= 0.02), good[1] + (apart <= 0.005)
            print(f"{name:30} {scaling:14} {error:12.4f}  {at:9.2g} {apart:16.4f}  {there:9.2g} "
                  f"{time.perf_counter() - started:10.1f}", flush=True)  # fmt: skip
    count = len(cases) * len(SCALINGS)
    print(f"of {count}: log loss within 2 % or 0.002 nats {good[0]}, probabilities within 0.005 {good[1]}")


if __name__ == "__main__":
    main()
