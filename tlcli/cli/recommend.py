"""`tlcli recommend`."""

import dataclasses
import textwrap

from tlcli.cli.options import command
from tlcli.cli.output import Output
from tlcli.config.commands import RecommendConfig

WIDTH = 100


@command(
    RecommendConfig,
    examples=(
        "tlcli recommend --size small --similarity high",
        "tlcli recommend --size large --similarity low --backbone resnet18 --json",
    ),
)
def recommend(out: Output, config: RecommendConfig) -> None:
    """Say which scenario fits a data set, why, and the command to run."""
    from tlcli.commands import recommend as library

    found = library.recommend(config)
    situation = f"a {found.size} data set, {found.similarity} similarity to the pretraining data"
    lines = [
        f"{found.scenario}   ({situation})",
        "",
        textwrap.fill(found.reason, WIDTH),
        "",
        "What the literature says",
        *(
            textwrap.fill(caveat, WIDTH, initial_indent="- ", subsequent_indent="  ")
            for caveat in found.caveats
        ),
        "",
        "Run next",
        f"  {found.command}",
    ]
    out.result("recommend", dataclasses.asdict(found), "\n".join(lines))
