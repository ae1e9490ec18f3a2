"""The four scenarios on four data sets in one table, with what the 2x2 rule would have said.

    python examples/experiments/four_scenarios.py --assets ASSETS        minutes not measured yet

MobileNetV2 pretrained on ImageNet, 64 pixels, 3 seeds. hymenoptera is small and similar to ImageNet,
sign_digits and neu small and dissimilar, and 2,500 images of CIFAR-10 stand for large and similar; a large
and dissimilar set cannot be trained on two cores in this time. Two thirds of the units are frozen where some
are; training everything takes 6 epochs, and training from random weights 10, a fraction of what it would
need. Small images cost all scenarios accuracy: at 224 pixels a head alone reaches 0.96 on hymenoptera.

Expected, mean (lowest..highest), with the rule's choice marked:

    not measured yet
"""

from runs import accuracies, begin, interval, seconds, spread, table

from tlcli.config import RecommendConfig
from tlcli.recommend import recommend

SCENARIOS = {
    "feature-extraction": [],
    "freeze": ["--epochs", 8],
    "full": ["--epochs", 6],
    "scratch": ["--epochs", 10],
}


def main() -> None:
    """Train every scenario on every set and print the table."""
    experiment = begin(__doc__)
    assets = experiment.assets
    sets = {
        "hymenoptera": (assets / "hymenoptera", "small", "high"),
        "sign_digits": (assets / "sign_digits.csv", "small", "low"),
        "neu": (assets / "neu_surface_defects.csv", "small", "low"),
        "CIFAR-10, 2,500": (experiment.cifar10(250, 100), "large", "high"),
    }
    rows = []
    for name, (data, size, similarity) in sets.items():
        rule = recommend(RecommendConfig(size=size, similarity=similarity)).scenario
        for scenario, arguments in SCENARIOS.items():
            found = experiment.finetune(
                f"{name.partition(',')[0]}-{scenario}",
                [
                    data,
                    "--backbone",
                    experiment.backbone,
                    "--image-size",
                    64,
                    "--scenario",
                    scenario,
                    *arguments,
                ],
            )
            rows.append((
                name, f"{size}, {similarity} similarity", scenario, spread(accuracies(found)),
                interval(found), spread(seconds(found), 0), "the rule's" if scenario == rule else "",
            ))  # fmt: skip
    table(["data", "kind", "scenario", "accuracy", "95 % interval", "seconds", ""], rows)


if __name__ == "__main__":
    main()
