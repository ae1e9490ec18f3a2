"""A small convolutional net on handwritten digits: plain, with batch norm, with separable convolutions.

    python examples/experiments/small_cnn_digits.py            12 minutes on two cores

scikit-learn's digits (1,437 train, 360 val) at 32 pixels, `classic/small-cnn` from random weights, 20 epochs,
3 seeds. A depthwise separable convolution (a filter for each channel, then 1x1 over the channels) has about
an eighth of the weights; batch norm lets the same network learn in fewer epochs.

Expected, mean (lowest..highest):

                         parameters    after epoch 5           after 20
    plain                93,248        0.481 (0.411..0.522)    0.900 (0.894..0.911)    34 s each
    batch norm           93,696        0.877 (0.850..0.928)    0.986 (0.986..0.986)    69 s each
    separable            12,192        0.378 (0.322..0.469)    0.729 (0.647..0.783)    53 s each
    separable, norm      12,640        0.755 (0.619..0.847)    0.977 (0.975..0.978)    50 s each
"""

import json

from runs import accuracies, begin, epochs, seconds, spread, table

NETWORKS = {
    "plain": "norm=none",
    "batch norm": "norm=every",
    "separable": "norm=none,separable=true",
    "separable, norm": "norm=every,separable=true",
}
FIRST = 5


def main() -> None:
    """Train each network and print its size, time and accuracy."""
    experiment = begin(__doc__, needs_assets=False)
    rows = []
    for name, options in NETWORKS.items():
        network = ["--backbone", "classic/small-cnn", "--model-kwargs", options, "--image-size", 32]
        shown = json.loads(experiment.tlcli("backbones", "show", network[1], *network[2:], "--random-init"))
        training = ["--scenario", "scratch", "--epochs", 20]
        found = experiment.finetune(name.replace(", ", "-"), [experiment.digits(), *network, *training])
        early = [curve[:FIRST][-1] for curve in epochs(found, "val_accuracy")]
        per_epoch = [sum(curve) / len(curve) for curve in epochs(found, "seconds")]
        rows.append((
            name, f"{shown['num_parameters']:,}", f"{shown['flops'] / 1e6:.1f}", spread(per_epoch, 2),
            spread(seconds(found), 1), spread(early), spread(accuracies(found)),
        ))  # fmt: skip
    table(
        [
            "network",
            "parameters",
            "MFLOPs",
            "seconds an epoch",
            "seconds",
            f"accuracy, epoch {FIRST}",
            "accuracy",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
