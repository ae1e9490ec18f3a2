"""Signs of the hand, two ways: an MLP head on a frozen backbone, against freezing eight units alone.

    python examples/experiments/handwriting_two_ways.py --assets ASSETS      10 minutes on two cores

sign_digits (1,443 train, 619 val: hand signs for the ten digits, unlike anything in ImageNet) at 96 pixels on
MobileNetV2, 3 seeds. The head sees what 18 frozen units made of the image; with `--freeze 8` ten units learn
to see hands, from activations that are cached once.

Expected, mean (lowest..highest):

    frozen, linear head      0.908 (0.908..0.910)      6 s each
    frozen, MLP head         0.908 (0.905..0.911)    121 s each: a grid of 18 MLPs on 5 folds
    --freeze 8               0.999 (0.997..1.000)     46 s each
"""

from runs import accuracies, begin, interval, seconds, spread, table

WAYS = {
    "frozen, linear head": [],
    "frozen, MLP head": ["--head", "mlp:256"],
    "--freeze 8": ["--freeze", 8],
}


def main() -> None:
    """Train the ways and print their accuracies."""
    experiment = begin(__doc__)
    rows = []
    for name, arguments in WAYS.items():
        found = experiment.finetune(
            name.strip("-").replace(", ", "-").replace(" ", "-"),
            [experiment.assets / "sign_digits.csv", "--backbone", experiment.backbone, "--image-size", 96,
             *arguments],
        )  # fmt: skip
        rows.append((name, spread(accuracies(found)), interval(found), spread(seconds(found), 0)))
    table(["way", "accuracy", "95 % interval", "seconds"], rows)


if __name__ == "__main__":
    main()
