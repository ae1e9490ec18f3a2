"""The four scenarios on four data sets in one table, with what the 2x2 rule would have said.

    python examples/experiments/four_scenarios.py --assets ASSETS        40 minutes on two cores

MobileNetV2 pretrained on ImageNet, 64 pixels, 3 seeds. hymenoptera is small and similar to ImageNet,
sign_digits and neu small and dissimilar, and 2,500 images of CIFAR-10 stand for large and similar; a large
and dissimilar set cannot be trained on two cores in this time. Two thirds of the units are frozen where some
are; training everything takes 6 epochs, and training from random weights 10, a fraction of what it would
need. Small images cost all scenarios accuracy: at 224 pixels a head alone reaches 0.96 on hymenoptera.

Expected, mean (lowest..highest), the mean's 95 % interval as if of one run, seconds; * is the rule's choice:

                        hymenoptera                                sign_digits
    feature-extraction  0.756 (0.752..0.758) 0.685..0.819    2 *   0.826 (0.822..0.832) 0.794..0.853    5
    freeze              0.839 (0.797..0.876) 0.770..0.887    7     0.985 (0.984..0.987) 0.973..0.992   32 *
    full                0.852 (0.837..0.869) 0.785..0.898   13     0.988 (0.985..0.992) 0.975..0.993   59
    scratch             0.599 (0.549..0.627) 0.522..0.675   20     0.794 (0.758..0.858) 0.761..0.825   99

                        neu                                        CIFAR-10, 2,500
    feature-extraction  0.956 (0.956..0.957) 0.935..0.970    4     0.596 (0.595..0.596) 0.565..0.626    6
    freeze              0.977 (0.974..0.980) 0.962..0.987   29 *   0.726 (0.723..0.731) 0.698..0.753   54
    full                0.981 (0.978..0.985) 0.966..0.990   54     0.662 (0.644..0.681) 0.632..0.691   92 *
    scratch             0.910 (0.894..0.924) 0.882..0.931   87     0.377 (0.356..0.392) 0.347..0.407  155

The rule's choice is within the interval of the best on sign_digits and neu, in half the time. On hymenoptera
it is not: at 64 pixels the pretrained features fit even photos like ImageNet's badly. And 2,500 images are
not large: in six epochs training everything loses to freezing.
"""

from runs import accuracies, begin, interval, seconds, spread, table

from tlcli.commands.recommend import recommend
from tlcli.config.commands import RecommendConfig

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
                [data, "--backbone", experiment.backbone, "--image-size", 64, "--scenario", scenario,
                 *arguments],
            )  # fmt: skip
            rows.append((
                name, f"{size}, {similarity} similarity", scenario, spread(accuracies(found)),
                interval(found), spread(seconds(found), 0), "the rule's" if scenario == rule else "",
            ))  # fmt: skip
    table(["data", "kind", "scenario", "accuracy", "95 % interval", "seconds", ""], rows)


if __name__ == "__main__":
    main()
