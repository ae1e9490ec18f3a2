"""Which network a run publishes: the trained one, or the linear probe it started from.

A training can end below its own starting point: too short, too fast, too few images. So the probe is epoch 0
and a candidate, and the better of the two on images that neither has seen is published.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.metrics.intervals import Interval, difference_interval
from tlcli.warned import warn

Name = Literal["probe", "trained", "earlier"]
WORDS = {"probe": "the linear probe it started from", "earlier": "the run it went on from"}


@dataclass(frozen=True)
class Candidate:
    """A network that could be published, on the images that choose.

    Attributes:
        name: probe, earlier (the finished run that went on) or trained.
        top1_accuracy: Share of images that it names rightly.
        balanced_accuracy: Mean of that share over the classes that have images.
        log_loss: Mean negative log probability of the right class, in nats.
        right: bool [N], which images it names rightly.
    """

    name: Name
    top1_accuracy: float
    balanced_accuracy: float
    log_loss: float
    right: Tensor

    def document(self) -> dict[str, Any]:
        """Return the figures for run.json."""
        return {
            "name": self.name, "top1_accuracy": self.top1_accuracy,
            "balanced_accuracy": self.balanced_accuracy, "log_loss": self.log_loss,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same images.

    Attributes:
        start: What training started from.
        trained: What came of it.
        selected_on: Split of the images.
        balanced: Whether balanced accuracy decides, as where classes weigh the same in training.
        groups: int64 [N], equal for images that depend on each other; None where none do.
    """

    start: Candidate
    trained: Candidate
    selected_on: Literal["train", "val"]
    balanced: bool = False
    groups: Tensor | None = None

    @property
    def won(self) -> bool:
        """Return whether training made it better; of two equally accurate ones the log loss decides."""
        return self._merit(self.trained) > self._merit(self.start)

    @property
    def gain(self) -> float:
        """Return the accuracy of the trained network minus that of the start."""
        return self.trained.top1_accuracy - self.start.top1_accuracy

    @property
    def interval(self) -> Interval:
        """Return the paired 95 % interval of `gain`, by groups where there are any."""
        groups = None if self.groups is None else self.groups.numpy()
        return difference_interval(self.trained.right.cpu().numpy(), self.start.right.cpu().numpy(), groups)

    def _merit(self, found: Candidate) -> tuple[float, float]:
        return found.balanced_accuracy if self.balanced else found.top1_accuracy, -found.log_loss

    def figures(self) -> str:
        """Return both accuracies for people."""
        images = "val images" if self.selected_on == "val" else "training images held out"
        kind, (after, _), (before, _) = (
            "balanced accuracy" if self.balanced else "accuracy",
            self._merit(self.trained),
            self._merit(self.start),
        )
        return (
            f"{kind} {after:.3f}, and {before:.3f} of {WORDS[self.start.name]}, on {len(self.start.right)} "
            f"{images}"
        )


@dataclass(frozen=True)
class Publication:
    """What is published, and how it was chosen.

    Attributes:
        published: Name of the network in the run.
        insisted: Whether --publish decided.
        comparison: The networks it was chosen of; None when there was nothing to compare.
    """

    published: Name
    insisted: bool = False
    comparison: Comparison | None = None

    @property
    def selected_on(self) -> Literal["train", "val"] | None:
        """Return the split whose images chose; None when nothing was chosen."""
        return None if self.comparison is None or self.insisted else self.comparison.selected_on

    def document(self) -> dict[str, Any]:
        """Return the choice for run.json."""
        found = self.comparison
        return {
            "published": self.published,
            "sentence": self.sentence(),
            "insisted": self.insisted,
            "selected_on": self.selected_on,
            "num_images": len(found.start.right) if found else 0,
            "candidates": [found.start.document(), found.trained.document()] if found else [],
            "gain": found.gain if found else None,
            "gain_interval": found.interval.document() if found else None,
        }

    def sentence(self) -> str:
        """Return in one sentence what came of the training; empty when there is nothing to compare."""
        found = self.comparison
        if found is None:
            return ""
        if found.won:
            return f"training won: {found.figures()}"
        published = {
            "probe": "the probe is published", "earlier": "the run stays as it was",
            "trained": "the trained network is published (--publish trained)",
        }[self.published]  # fmt: skip
        return f"training lost: {found.figures()}; {published}"

    def give_warnings(self) -> bool:
        """Warn of a training that lost, or whose gain may be chance; return whether there was need."""
        found = self.comparison
        if found is None:
            return False
        text = self.sentence().capitalize()
        if not found.won:
            advice = f"{text}. Try a lower --lr, more --epochs or a larger --freeze."
            if found.start.name == "earlier":
                warn("below_earlier", advice)
            else:
                warn("below_probe", advice)
        elif found.interval.low <= 0 and found.start.name == "probe" and not found.balanced:
            low, high = found.interval.low, found.interval.high
            warn(
                "not_better_than_probe",
                f"{text}. A gain of {100 * found.gain:.1f} points (95 % interval {100 * low:.1f} to "
                f"{100 * high:.1f}) may be chance: --freeze all may do as well, and more val images would "
                "tell.",
            )
        else:
            return False
        return True


def candidate(name: Name, logits: Tensor, labels: Tensor) -> Candidate:
    """Return a network's figures.

    Args:
        name: probe or trained.
        logits: fp32 [N, C].
        labels: int64 [N].
    """
    right = logits.argmax(1) == labels
    recalls = [float(right[labels == label].double().mean()) for label in sorted(set(labels.tolist()))]
    return Candidate(
        name, float(right.double().mean()), sum(recalls) / len(recalls),
        float(functional.cross_entropy(logits.double(), labels)), right,
    )  # fmt: skip


def publish(comparison: Comparison, *, insist: bool) -> Publication:
    """Return the choice between what training started from and what came of it.

    Args:
        comparison: Both, on the same images.
        insist: Publish the trained network whatever it is worth.
    """
    best: Name = "trained" if insist or comparison.won else comparison.start.name
    return Publication(best, insist, comparison)


def held_out(labels: Tensor, groups: Tensor, share: float, seed: int) -> Tensor:
    """Return which training images are held out to choose, bool [N].

    Stratified; images of one group stay together, and of a class that lies in one group only none is held
    out.

    Args:
        labels: int64 [N].
        groups: int64 [N], equal for images that must stay together.
        share: Of the images, in (0, 0.5].
        seed: Changes which.
    """
    from tlcli.data.folds import assign_folds

    folds, _ = assign_folds(labels.numpy(), groups.numpy(), max(2, round(1 / share)), seed)
    return torch.from_numpy(folds == 0)
