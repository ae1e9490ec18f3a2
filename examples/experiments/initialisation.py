"""Why initialisation matters: gradients of a network of ten hidden layers before its first step.

    python examples/experiments/initialisation.py              5 minutes on two cores

`classic/mlp` with ten hidden layers of 128 on scikit-learn's digits at 16 pixels. Sigmoid with weights from
N(0, 1) saturates: nine tenths of the first layer's units and nearly half of the others pass less than a
hundredth of the gradient on. Its norm hides that, since the few others have large weights; the accuracy
shows it. Xavier (Glorot & Bengio 2010) keeps the variance for tanh; sigmoid, whose slope is at most a
quarter, loses four fifths of the gradient in every layer. He (2015) keeps it for ReLU and ELU. Writes
gradients.png, the norm of the loss's gradient for the weights of each layer, on one batch of 256; the
accuracy is after 10 epochs of `tlcli finetune`.

Expected, mean (lowest..highest) over 3 seeds: gradient norm of layer 1 and of layer 10, accuracy

    sigmoid, normal      2.7 (1.6..3.4)                5.7 (4.1..7)        0.306 (0.281..0.353)
    sigmoid, xavier      5.7e-06 (3.6e-06..9.9e-06)    0.44 (0.22..0.8)    0.101 (0.100..0.103)
    tanh, xavier         1.6 (1.4..1.7)                0.6 (0.51..0.65)    0.937 (0.928..0.942)
    relu, he             5.9 (4.5..6.7)                3.1 (1.9..3.8)      0.924 (0.919..0.928)
    elu, he              23 (10..31)                   7.9 (4.6..11)       0.929 (0.925..0.931)
"""

import statistics
from pathlib import Path

import torch
from runs import Experiment, accuracies, begin, spread, table
from torch.nn import functional

from tlcli.config.commands import FinetuneConfig
from tlcli.data.collection import collect
from tlcli.data.decode import decode
from tlcli.data.image_files import read_bytes
from tlcli.data.transforms import EvalTransform
from tlcli.progress import Silent
from tlcli.training.network import make_network
from tlcli.training.plan import load_trainable

VARIANTS = (("sigmoid", "normal"), ("sigmoid", "xavier"), ("tanh", "xavier"), ("relu", "he"), ("elu", "he"))
COLOURS = ("#c2503a", "#e08a00", "#7a6bd6", "#2f7ed8", "#1f9d6b")
BATCH = 256


def network_options(activation: str) -> dict[str, object]:
    """Return the network's options, by their names in Python."""
    return {
        "backbone": "classic/mlp",
        "model_kwargs": f"width=128,depth=10,activation={activation}",
        "image_size": 16,
        "scenario": "scratch",
    }


def gradient_norms(config: FinetuneConfig) -> list[float]:
    """Return the l2 norm of the loss's gradient for the weights of each layer, the head's last."""
    collection = collect(config, 1, Silent())
    backbone = load_trainable(config, "scratch")
    order = torch.randperm(len(collection.samples), generator=torch.Generator().manual_seed(config.seed))
    samples = [collection.samples[place] for place in order[:BATCH]]
    transform = EvalTransform(backbone.preprocess)
    images = torch.stack([transform(decode(read_bytes(sample.path))) for sample in samples]).float() / 255
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (backbone.preprocess.mean, backbone.preprocess.std)
    )
    network = make_network(
        backbone.model, backbone.num_features, len(collection.dataset.class_names), config,
        dropout=0.0, start=None, full=True,
    )  # fmt: skip
    labels = torch.tensor([sample.label for sample in samples])
    functional.cross_entropy(network((images - mean) / std), labels).backward()
    return [float(weight.grad.norm()) for weight in network.parameters() if weight.ndim == 2]


def draw(norms: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the geometric mean of every variant's gradient norms, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, found), colour in zip(norms.items(), COLOURS, strict=True):
        means = [statistics.geometric_mean(values) for values in zip(*found, strict=True)]
        axes.plot(range(1, len(means) + 1), means, "o-", color=colour, label=name, markersize=4)
    axes.set_yscale("log")
    axes.set_xticks(range(1, len(means) + 1))
    axes.set_xlabel("layer (the last is the head)")
    axes.set_ylabel("norm of the gradient")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def train(experiment: Experiment, activation: str, init: str) -> list[float]:
    """Return the accuracy of each seed after 10 epochs."""
    options = [
        word
        for key, value in network_options(activation).items()
        for word in (f"--{key.replace('_', '-')}", value)
    ]
    fixed = ["--init", init, "--epochs", 10, "--augment", "none"]
    return accuracies(experiment.finetune(f"{activation}-{init}", [experiment.digits(), *options, *fixed]))


def main() -> None:
    """Measure the gradients, train, print both and draw the figure."""
    experiment = begin(__doc__, needs_assets=False)
    rows, norms = [], {}
    for activation, init in VARIANTS:
        norms[f"{activation}, {init}"] = found = [
            gradient_norms(
                FinetuneConfig(
                    data=str(experiment.digits()), seed=seed, init=init, **network_options(activation)
                )
            )
            for seed in experiment.seeds
        ]
        first, tenth = ([one[place] for one in found] for place in (0, 9))
        spans = [f"{statistics.mean(some):.2g} ({min(some):.2g}..{max(some):.2g})" for some in (first, tenth)]
        rows.append((activation, init, *spans, spread(train(experiment, activation, init))))
    table(["activation", "weights", "gradient, layer 1", "layer 10", "accuracy, 10 epochs"], rows)
    draw(norms, experiment.output / "gradients.png")
    print(experiment.output / "gradients.png")


if __name__ == "__main__":
    main()
