"""The rule of thumb: which of the four scenarios suits a size and a similarity.

A 2x2 table, and a rule of thumb, so every cell carries the published figures that speak for and against it.
"""

from dataclasses import dataclass
from typing import Literal

from tlcli.advice.literature import (
    BACKBONE_MATTERS,
    DISTORTION,
    FAR_IMAGES,
    FINE_GRAINED,
    SCRATCH_RARELY_WINS,
)

Size = Literal["small", "large"]
Similarity = Literal["low", "high"]


@dataclass(frozen=True)
class Rule:
    """One cell of the 2x2 table: the scenario, why, and what speaks against it."""

    scenario: str
    reason: str
    caveats: tuple[str, ...]


RULES: dict[tuple[Size, Similarity], Rule] = {
    ("small", "high"): Rule(
        "feature-extraction",
        "Freeze the whole backbone and train a new head. Few images would overfit the backbone's millions of "
        "weights, and features learnt on similar images already separate your classes.",
        (FINE_GRAINED, BACKBONE_MATTERS),
    ),
    ("small", "low"): Rule(
        "freeze",
        "Freeze the first units and train the rest. Early units see edges and textures, which every image "
        "has; late ones know the pretraining classes, which yours are not. Few images cannot train "
        "everything. Without --freeze K the first two thirds of the units are frozen.",
        (FAR_IMAGES, DISTORTION),
    ),
    ("large", "high"): Rule(
        "full",
        "Start from the pretrained weights and train everything. Enough images keep the network from "
        "overfitting, and similar pretraining data make its weights the best place to start.",
        (FINE_GRAINED, DISTORTION),
    ),
    ("large", "low"): Rule(
        "scratch",
        "Keep the architecture, re-initialise and train everything. Enough images can teach the network "
        "features of its own, where those of distant images help least.",
        (
            SCRATCH_RARELY_WINS,
            "The alternative is `full`: start from the pretrained weights and train everything. Run both, "
            "and keep the better.",
        ),
    ),
}
