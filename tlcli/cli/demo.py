"""`tlcli demo`."""

import os
import shlex
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import DemoConfig

if TYPE_CHECKING:
    from tlcli.commands.demo import Step

WIDTH = 100


@command(DemoConfig, dry_run=True, examples=("tlcli demo", "tlcli demo -o digits --overwrite --json"))
def demo(out: Output, config: DemoConfig) -> None:
    """Show the whole path on handwritten digits, offline, in a minute or two."""
    from tlcli.commands import demo as library

    plan = library.plan_demo(config, program=_program())
    narrator = _Narrator(out, len(plan.steps))
    if out.dry_run:
        for number, step in enumerate(plan.steps, start=1):
            narrator.step(number, step)
        out.result("demo.plan", plan.document())
        return
    out.note(
        f"The demo runs offline, takes a minute or two and writes to {config.output} and the feature cache."
    )
    document = library.demo(plan, out.progress, narrator)
    measured = table(["", "val accuracy", "95 % interval", "images"], _accuracies(document))
    columns = ["file", "predicted", "probability", "second", "probability"]
    predicted = table(columns, [_cells(row) for row in document["predictions"]])
    out.result("demo", document, measured, "", predicted, "", f"report: {document['report_path']}")
    out.note("The commands above can be pasted to do the same by hand.")
    out.hint(f"{_program()} finetune YOUR_FOLDER --backbone {library.BACKBONE}")


def _accuracies(document: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    val, raw = document["metrics"]["val"], document["raw_pixels"]
    rows = [("tlcli, bundled backbone", val), ("logistic regression on raw pixels", raw)]
    cells = [
        (name, f"{found['top1_accuracy']:.3f}", "{low:.3f} to {high:.3f}".format(**found["interval"]),
         found["num_images"])
        for name, found in rows
    ]  # fmt: skip
    return [
        *cells,
        ("always the most frequent class", f"{val['majority_baseline']:.3f}", "-", val["num_images"]),
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    first, second = row["predictions"]
    return [
        row["file"],
        first["class_name"],
        f"{first['probability']:.4f}",
        second["class_name"],
        f"{second['probability']:.4f}",
    ]


def _program() -> str:
    """Return how to call tlcli from this shell: by its name, or where it is not on PATH by a path."""
    if shutil.which("tlcli"):
        return "tlcli"
    script = os.path.join(os.path.dirname(sys.executable), "tlcli")
    if not os.path.exists(script):
        return f"{shlex.quote(sys.executable)} -m tlcli"
    near = os.path.relpath(script)
    return shlex.quote(script if near.startswith("..") else near)


class _Narrator:
    """Tells the steps on stderr."""

    def __init__(self, out: Output, total: int) -> None:
        self._out = out
        self._total = total

    def step(self, number: int, step: "Step") -> None:
        """Print what is about to be done, and the command for it."""
        self._out.note("")
        self._out.note(textwrap.fill(f"{number}/{self._total} {step.name}. {step.explanation}", WIDTH))
        if step.command:
            self._out.note(f"    $ {step.command}")

    def outcome(self, text: str) -> None:
        """Print what came out."""
        self._out.note(textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    "))
