"""A small set of photos: fully connected net, small convolutional net, and a pretrained backbone.

    python examples/experiments/small_photo_set.py --assets ASSETS       TO MEASURE minutes on two cores

The published story (17 flower classes, 80 photos each) is 6.8 %, 15.8 % and 70 %: with few photos the network
does not decide, what it has seen before does. Here five flower classes with 80 training photos each, 1,296
val photos, 96 pixels for the backbone and 64 for the two trained from random weights (40 epochs), 3 seeds.
Guessing the most frequent class gives 0.24.

Expected, mean (lowest..highest):

    classic/mlp           TO MEASURE
    classic/small-cnn     TO MEASURE
    frozen MobileNetV2    TO MEASURE
"""

from runs import accuracies, begin, interval, seconds, spread, table


def main() -> None:
    """Train the three and print their accuracies."""
    experiment = begin(__doc__)
    scratch = ["--scenario", "scratch", "--epochs", 40, "--image-size", 64]
    networks = {
        "fully connected": ["--backbone", "classic/mlp", *scratch],
        "small CNN": ["--backbone", "classic/small-cnn", "--model-kwargs", "norm=every", *scratch],
        "pretrained, frozen": ["--backbone", experiment.backbone, "--image-size", 96],
    }
    rows = []
    for name, arguments in networks.items():
        few = [] if experiment.quick else ["--limit-per-class", 80]
        data = experiment.assets / "flowers.csv"
        found = experiment.finetune(name.replace(" ", "-").replace(",", ""), [data, *few, *arguments])
        rows.append((name, spread(accuracies(found)), interval(found), spread(seconds(found), 0)))
    table(["network", "accuracy", "95 % interval", "seconds"], rows)


if __name__ == "__main__":
    main()
