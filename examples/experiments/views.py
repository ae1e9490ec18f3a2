"""Augmentation from the cache: V = 1, 2, 4 and 8 cached views against a new view every epoch.

    python examples/experiments/views.py --assets ASSETS          minutes not measured yet

sign_digits (1,443 train, 619 val) at 64 pixels on MobileNetV2, 8 of 18 units frozen, 8 epochs, 3 seeds that
share their views (`--view-seed`). With cached views the first run computes the views that are not there
yet (V = 4 finds the two of V = 2), the later ones none; without a cache every epoch decodes, augments and
runs the frozen units again.

Expected, mean (lowest..highest); seconds of the first run, and of those that find the cache filled:

    V = 1    not measured yet
    V = 2    not measured yet
    V = 4    not measured yet
    V = 8    not measured yet
    live     not measured yet
"""

from runs import accuracies, begin, epochs, seconds, spread, table

VIEWS = (1, 2, 4, 8, None)


def main() -> None:
    """Train with each number of views and print accuracy and time."""
    experiment = begin(__doc__)
    rows = []
    for number in VIEWS:
        how = ["--cache", "always", "--views", number] if number else ["--cache", "never"]
        found = experiment.finetune(
            f"views-{number or 'live'}",
            [experiment.assets / "sign_digits.csv", "--backbone", experiment.backbone, "--image-size", 64,
             "--freeze", 8, "--epochs", 8, "--augment", "light", *how],
        )  # fmt: skip
        total = seconds(found)
        per_epoch = [sum(curve) / len(curve) for curve in epochs(found, "seconds")]
        rows.append((
            f"V = {number}" if number else "live", spread(accuracies(found)), f"{total[0]:.0f}",
            spread(total[1:] or total, 0), spread(per_epoch, 1),
        ))  # fmt: skip
    table(["views", "accuracy", "seconds, first run", "seconds, later runs", "seconds an epoch"], rows)


if __name__ == "__main__":
    main()
