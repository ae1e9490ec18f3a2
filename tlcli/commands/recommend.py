"""Which of the four scenarios fits a data set, why, and what the literature warns of.

The rule is the 2x2 table of size and similarity. It is a rule of thumb, so every answer carries the
published figures that speak for and against it. No image is read and nothing heavy is imported.
"""

import shlex
from dataclasses import dataclass

from tlcli.advice.rules import RULES, Similarity, Size
from tlcli.config.commands import RecommendConfig
from tlcli.errors import UsageError

WORDS = (
    "Type tlcli recommend --size small|large --similarity low|high. small: up to about 20,000 images, or "
    "fewer than 100 a class; high: your images look like the pretraining data (for ImageNet, everyday "
    "photographs)."
)


@dataclass(frozen=True)
class Recommendation:
    """A scenario for a data set.

    Attributes:
        scenario: feature-extraction, freeze, full or scratch.
        size: The data set's size, as given.
        similarity: Its similarity to the pretraining data, as given.
        reason: Why this scenario.
        caveats: What the literature says for and against, each with its source.
        built: Always true: every scenario is there. Documents of schema 1 have the field.
        command: The command to run next.
    """

    scenario: str
    size: Size
    similarity: Similarity
    reason: str
    caveats: tuple[str, ...]
    built: bool
    command: str


def recommend(config: RecommendConfig) -> Recommendation:
    """Return the scenario for a data set of the given size and similarity.

    Raises:
        UsageError: The size or the similarity is missing.
    """
    if config.size is None or config.similarity is None:
        missing = [
            name
            for name, value in (("--size", config.size), ("--similarity", config.similarity))
            if value is None
        ]
        raise UsageError(
            f"{' and '.join(missing)} missing: the recommendation follows from both.",
            hint=WORDS,
        )
    rule = RULES[config.size, config.similarity]
    return Recommendation(
        scenario=rule.scenario,
        size=config.size,
        similarity=config.similarity,
        reason=rule.reason,
        caveats=rule.caveats,
        built=True,
        command=f"tlcli finetune DATA --backbone {shlex.quote(config.backbone)} --scenario {rule.scenario}",
    )
