"""Which network a run publishes: the trained one, or the linear probe it started from.

A training can end below its own starting point: too short, too fast, too few images. So the probe is epoch 0
and a candidate, and the better of the two on images that neither has seen is published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.metrics.intervals import Interval, paired_interval

Name = Literal["probe", "trained"]


@dataclass(frozen=True)
class Candidate:
    """A network that could be published, on the images that choose.

    Attributes:
        name: probe or trained.
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
class Publication:
    """What is published, and how it was chosen.

    Attributes:
        published: Name of the network in the run.
        insisted: Whether --publish decided.
        selected_on: Split whose images chose: val or train; None when nothing was chosen.
        candidates: Probe and trained network; empty when there was nothing to compare.
    """

    published: Name
    insisted: bool = False
    selected_on: Literal["train", "val"] | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def gain(self) -> float | None:
        """Return accuracy of the trained network minus the probe's; None without both."""
        if not self.candidates:
            return None
        probe, trained = self.candidates
        return trained.top1_accuracy - probe.top1_accuracy

    @property
    def interval(self) -> Interval | None:
        """Return the paired 95 % interval of `gain`."""
        if not self.candidates:
            return None
        probe, trained = (candidate.right for candidate in self.candidates)
        return paired_interval(int((trained & ~probe).sum()), int((probe & ~trained).sum()), len(probe))

    def document(self) -> dict[str, Any]:
        """Return the choice for run.json."""
        interval = self.interval
        return {
            "published": self.published,
            "sentence": self.sentence(),
            "insisted": self.insisted,
            "selected_on": self.selected_on,
            "num_images": len(self.candidates[0].right) if self.candidates else 0,
            "candidates": [candidate.document() for candidate in self.candidates],
            "gain": self.gain,
            "gain_interval": None if interval is None else interval.document(),
        }

    def sentence(self) -> str:
        """Return in one sentence what came of the training; empty when there is nothing to compare."""
        if not self.candidates or self.interval is None:
            return ""
        probe, trained = self.candidates
        images = "val images" if self.selected_on != "train" else "training images held out"
        figures = (
            f"accuracy {trained.top1_accuracy:.3f}, and {probe.top1_accuracy:.3f} of the linear probe it "
            f"started from, on {len(probe.right)} {images}"
        )
        if self.published == "probe":
            return f"training lost: {figures}; the probe is published"
        if self.insisted and trained.top1_accuracy < probe.top1_accuracy:
            return f"training lost: {figures}; the trained network is published (--publish trained)"
        return f"training won: {figures}"

    def warnings(self) -> list[tuple[str, str]]:
        """Return (code, message) of what the user should know about the choice."""
        if not self.candidates or self.interval is None:
            return []
        retry = "Try a lower --lr, more --epochs or a larger --freeze."
        probe, trained = self.candidates
        text = self.sentence().capitalize()
        if self.published == "probe" or trained.top1_accuracy < probe.top1_accuracy:
            return [("below_probe", f"{text}. {retry}")]
        if self.interval.low <= 0:
            low, high = self.interval.low, self.interval.high
            return [(
                "not_better_than_probe",
                f"{text}. A gain of {100 * (self.gain or 0):.1f} points (95 % interval {100 * low:.1f} to "
                f"{100 * high:.1f}) may be chance: --freeze all may do as well, and more val images would "
                "tell.",
            )]  # fmt: skip
        return []


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


def publish(
    candidates: Sequence[Candidate], *, selected_on: Literal["train", "val"], insist: bool, balanced: bool
) -> Publication:
    """Return the choice between the probe and the trained network.

    The more accurate one wins; of two equally accurate ones the one with the smaller log loss.

    Args:
        candidates: Probe and trained network, on the same images.
        selected_on: Split of these images.
        insist: Publish the trained network whatever it is worth.
        balanced: Compare by balanced accuracy, as a training in which classes weigh the same is meant to.
    """
    probe, trained = candidates

    def merit(found: Candidate) -> tuple[float, float]:
        return found.balanced_accuracy if balanced else found.top1_accuracy, -found.log_loss

    best: Name = "trained" if insist or merit(trained) > merit(probe) else "probe"
    return Publication(best, insist, None if insist else selected_on, (probe, trained))


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
