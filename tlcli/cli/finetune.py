"""`tlcli finetune`."""

import shlex
from typing import Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config import FinetuneConfig


@command(
    FinetuneConfig,
    dry_run=True,
    examples=(
        "tlcli finetune photos/ --backbone resnet50.a1_in1k",
        "tlcli finetune labels.csv --backbone bundled --head mlp:256 -o runs/mlp --json",
    ),
)
def finetune(out: Output, config: FinetuneConfig) -> None:
    """Train a classifier on a backbone's features and write a run."""
    from tlcli import extract
    from tlcli import finetune as library

    plan = library.plan_finetune(config, out.progress)
    out.plan("Finetune", plan.facts())
    if out.dry_run:
        out.result("finetune.plan", plan.document())
        return
    result = library.finetune(plan, out.progress)
    out.note(extract.summary(result.features))
    out.result("finetune", result.document, table(["", ""], _rows(result.document)))
    run = shlex.quote(str(result.run_path))
    out.hint(f"tlcli evaluate {run}    tlcli report {run}")


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    head, seconds = document["head"], document["seconds"]
    chosen = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in head["chosen"].items())  # fmt: skip
    rows = [("run", document["run_path"]), ("head", f"{head['kind']}: {chosen}")]
    for name, found in document["metrics"].items():
        if found:
            rows.append((f"{name.replace('_', ' ')} accuracy", accuracy(found)))
    cv = head["cv"]
    if cv["top1_accuracy"] is not None and "cross_validation" not in document["metrics"]:
        rows.append(("cross-validation", f"{cv['top1_accuracy']:.3f} on {cv['num_samples']} train images"))
    parts = f"features {seconds['features']:.1f}, head {seconds['head']:.1f}"
    return [*rows, ("seconds", f"{seconds['total']:.1f} ({parts})")]


def accuracy(found: dict[str, Any]) -> str:
    """Return an accuracy with its interval, number of images and baseline, for people."""
    low, high = found["interval"]["low"], found["interval"]["high"]
    return (
        f"{found['top1_accuracy']:.3f}  (95 %: {low:.3f} to {high:.3f}, {found['num_images']} images; "
        f"always the most frequent class {found['majority_baseline']:.3f})"
    )
