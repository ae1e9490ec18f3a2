"""A run as one self-contained HTML page.

In comes a run directory and, for thumbnails, the images it was measured on, where they still exist; out goes
report.html, which refers to nothing outside itself. Nothing is computed again: the page shows what run.json,
metrics.jsonl, evaluation-<split>.json and predictions-<split>.csv say.
"""

from dataclasses import dataclass
from pathlib import Path

from tlcli.config.commands import ReportConfig
from tlcli.errors import DataError, UsageError
from tlcli.page.curves import best_heads, chosen_head, training_figures
from tlcli.page.facts import facts_of, recipe_of, training_of
from tlcli.page.page import render, write
from tlcli.page.splits import data_root, split_of
from tlcli.runs.results import read_lines
from tlcli.runs.run import open_run

SPLITS = ("val", "test", "train")


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        report_path: The HTML file.
        num_bytes: Its size.
        splits: The splits it shows.
        num_mistakes: Mistakes shown, over all splits.
        num_thumbnails: How many of them have their image.
    """

    report_path: Path
    num_bytes: int
    splits: tuple[str, ...]
    num_mistakes: int
    num_thumbnails: int


def report(config: ReportConfig) -> Report:
    """Write the report of a run.

    Raises:
        UsageError: No run is named, or the output is not a name for an HTML file.
        DataError: The run directory is missing, unfinished or unreadable.
        StorageError: The page cannot be written.
    """
    run = open_run(config.run)
    output = _output(config, run.path)
    facts = run.facts
    try:
        root = data_root(facts)
        splits = [
            split_of(run.path, name, root, config.worst)
            for name in SPLITS
            if (run.path / f"evaluation-{name}.json").exists()
        ]
        lines = read_lines(run.path / "metrics.jsonl")
        page = render(
            run=facts,
            name=run.path.resolve().name,
            facts=facts_of(facts),
            warnings=[warning["message"] for warning in facts.get("warnings", [])],
            cross_validation=facts["metrics"].get("cross_validation"),
            trained_on=facts["trained_on"],
            trained=training_of(facts),
            recipe=recipe_of(facts),
            training=training_figures(lines, facts),
            ringed=chosen_head(facts["head"]) is not None,
            num_heads=sum(line.get("kind") == "head" for line in lines),
            best_heads=best_heads(lines),
            splits=splits,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"Run {str(run.path)!r} holds a file this version of tlcli cannot use: {error!r}.",
            hint=f"tlcli {facts.get('tlcli_version')} wrote it; measure it again: tlcli evaluate {run.path}",
        ) from error
    write(output, page)
    mistakes = [mistake for split in splits for mistake in split["mistakes"]]
    return Report(
        report_path=output,
        num_bytes=output.stat().st_size,
        splits=tuple(split["name"] for split in splits),
        num_mistakes=len(mistakes),
        num_thumbnails=sum(mistake.picture is not None for mistake in mistakes),
    )


# ---- reading the run --------------------------------------------------------------------------------------


def _output(config: ReportConfig, run_dir: Path) -> Path:
    output = Path(config.output).expanduser() if config.output else run_dir / "report.html"
    if output.suffix.lower() not in {".html", ".htm"} or output.is_dir():
        raise UsageError(
            f"--output {str(output)!r} is not a name for an HTML file.",
            hint="Expected a name that ends in .html.",
        )
    return output
