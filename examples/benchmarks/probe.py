"""Accuracy of `tlcli finetune` beside scikit-learn's LogisticRegression, on four real data sets.

    python examples/benchmarks/probe.py --assets ASSETS              8 minutes on two cores

Every set is used on its own split: the head is chosen and trained inside train, and val only measures. The
other side is scikit-learn on the same rows, standardised, with C of 12 values chosen by 5-fold
cross-validation inside train. Expected: hymenoptera at least 0.95, and on the other three not more than 0.5
points below scikit-learn (0.961, 0.996, 0.937 and 0.726 were found elsewhere with fp32 features and few
values of C).
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler

from tlcli.commands.finetune import finetune, plan_finetune
from tlcli.config.commands import FinetuneConfig
from tlcli.progress import Silent

SETS = ("hymenoptera", "neu_surface_defects.csv", "sign_digits.csv", "flowers.csv")


def main() -> None:
    """Run both sides on every set and print their accuracies."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=os.environ.get("TLCLI_REAL_ASSETS"))
    parser.add_argument("--backbone", help="another backbone than the MobileNetV2 of the assets")
    options = parser.parse_args()
    assets = Path(options.assets).resolve()
    backbone = options.backbone or f"local-dir:{assets / 'mobilenetv2_100.imagenet'}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TLCLI_HOME", f"{folder}/home")
        for name in SETS:
            config = FinetuneConfig(data=str(assets / name), backbone=backbone, output=f"{folder}/{name}")
            plan = plan_finetune(config, Silent())
            result = finetune(plan, Silent())
            found, seconds = result.document["metrics"]["val"], result.document["seconds"]
            collection = plan.features.collection
            rows, _ = plan.features.store.read([item.sha256 or "" for item in collection.fingerprints])
            labels = np.array([sample.label for sample in collection.samples])
            train = np.array([split == "train" for split in collection.splits])
            started = time.perf_counter()
            scaled = StandardScaler().fit(rows.numpy()[train]).transform(rows.numpy())
            probe = LogisticRegressionCV(Cs=np.logspace(-5, 0.5, 12), cv=5, max_iter=1000)
            theirs = float(
                (probe.fit(scaled[train], labels[train]).predict(scaled[~train]) == labels[~train]).mean()
            )
            taken = time.perf_counter() - started
            low, high = found["interval"]["low"], found["interval"]["high"]
            print(
                f"{name:24s} tlcli {found['top1_accuracy']:.4f} ({low:.3f} to {high:.3f}, "
                f"{found['num_images']} images, head {seconds['head']:.1f} s)  "
                f"scikit-learn {theirs:.4f} ({taken:.1f} s)  "
                f"difference {100 * (found['top1_accuracy'] - theirs):+.2f} points",
                flush=True,
            )


if __name__ == "__main__":
    main()
