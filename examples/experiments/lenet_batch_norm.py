"""LeNet-5 on CIFAR-10 with batch norm after every layer, after one, and nowhere: curves in one figure.

    python examples/experiments/lenet_batch_norm.py --assets ASSETS      10 minutes on two cores

The first 1,000 training images of each class and 200 of the test images (which become val), 32 pixels,
`classic/lenet5` from random weights with tanh, as in 1998, 15 epochs without augmentation, 3 seeds. The
published experiment takes all 50,000 images. Writes curves.png: val accuracy and train loss by epoch, the
band from the lowest to the highest seed.

Expected, mean (lowest..highest):

    norm       val accuracy, epoch 3     after 15                 seconds
    every      0.444 (0.430..0.455)      0.518 (0.514..0.523)     76 (74..77)
    first      0.451 (0.444..0.457)      0.525 (0.515..0.536)     68 (66..69)
    none       0.380 (0.362..0.391)      0.491 (0.474..0.502)     46 (45..46)
"""

import statistics
from pathlib import Path

from runs import accuracies, begin, epochs, seconds, spread, table

NORMS = ("every", "first", "none")
COLOURS = ("#2f7ed8", "#e08a00", "#1f9d6b")
EARLY = 3


def draw(curves: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw the mean and the band of every variant's curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("val_accuracy", "val accuracy"), ("train_loss", "train loss")), strict=True
    ):
        for (norm, found), colour in zip(curves.items(), COLOURS, strict=True):
            by_epoch = list(zip(*found[key], strict=True))
            places = range(1, len(by_epoch) + 1)
            axes.plot(places, [statistics.mean(values) for values in by_epoch], color=colour, label=norm)
            axes.fill_between(
                places, [min(values) for values in by_epoch], [max(values) for values in by_epoch],
                color=colour, alpha=0.2, linewidth=0,
            )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.2)
    axes.legend(title="batch norm after", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train the three variants, print their accuracies and draw their curves."""
    experiment = begin(__doc__)
    data = experiment.cifar10(1000, 200)
    rows, curves = [], {}
    for norm in NORMS:
        found = experiment.finetune(
            norm,
            [data, "--backbone", "classic/lenet5", "--model-kwargs", f"norm={norm},activation=tanh",
             "--scenario", "scratch", "--epochs", 15, "--augment", "none"],
        )  # fmt: skip
        curves[norm] = {key: epochs(found, key) for key in ("val_accuracy", "train_loss")}
        early = [curve[:EARLY][-1] for curve in curves[norm]["val_accuracy"]]
        rows.append((norm, spread(early), spread(accuracies(found)), spread(seconds(found), 0)))
    table(["batch norm after", f"val accuracy, epoch {EARLY}", "at the end", "seconds"], rows)
    draw(curves, experiment.output / "curves.png")
    print(experiment.output / "curves.png")


if __name__ == "__main__":
    main()
