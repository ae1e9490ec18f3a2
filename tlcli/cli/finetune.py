"""`tlcli finetune`."""

import shlex
from typing import Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import FinetuneConfig
from tlcli.wording import counted, images_text


@command(
    FinetuneConfig,
    dry_run=True,
    examples=(
        "tlcli finetune photos/ --backbone resnet50.a1_in1k",
        "tlcli finetune photos/ --backbone resnet50.a1_in1k --freeze 10 --views 4 -o runs/tuned --json",
    ),
)
def finetune(out: Output, config: FinetuneConfig) -> None:
    """Train a classifier in one of the four scenarios and write a run."""
    from tlcli.commands import finetune as library

    if document := library.finished(config, out.progress):
        _tell_finished(out, document)
        return
    plan = library.plan_finetune(config, out.progress, dry_run=out.dry_run)
    for note in plan.notes:
        out.note(note)
    out.plan("Finetune", plan.summary())
    if out.dry_run:
        out.result("finetune.plan", plan.document())
        return
    result = library.finetune(plan, out.progress)
    if plan.features is not None:
        out.note(result.outcome.summary())
    out.result("finetune", result.document, table(["", ""], _rows(result.document)))
    run = shlex.quote(str(result.run_path))
    out.hint(f"tlcli evaluate {run}    tlcli report {run}")


_PUBLISHED = {
    "probe": "the linear probe",
    "trained": "the trained network",
    "earlier": "the run as it was before",
}


def _tell_finished(out: Output, document: dict[str, Any]) -> None:
    """Print the result of a run that --resume has nothing to do for, as when it was finished."""
    run = shlex.quote(document["run_path"])
    if "training" in document:
        out.note("the run is finished; nothing to do (more --epochs would continue it)")
    else:
        out.note("the run is finished; nothing to do")
    if out.dry_run:
        out.result("finetune.plan", {key: document[key] for key in ("scenario", "run_path", "num_images")})
        return
    out.result("finetune", document, table(["", ""], _rows(document)))
    out.hint(f"tlcli evaluate {run}    to train on from it in a new run: --backbone local-dir:{run}")


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    head, seconds = document["head"], document["seconds"]
    rows = [("run", document["run_path"]), ("scenario", document["scenario"])]
    if "training" not in document:
        rows.append(("head", f"{head['kind']}: {_values(head['chosen'])}"))
    for name, found in document["metrics"].items():
        if found:
            rows.append((f"{name.replace('_', ' ')} accuracy", accuracy(found)))
    cv = head["cv"]
    if cv and cv["top1_accuracy"] is not None and "cross_validation" not in document["metrics"]:
        rows.append(("cross-validation", _cross_validation(cv)))
    if training := document.get("training"):
        if training["probe"] and training["probe"]["val_top1_accuracy"] is not None:
            rows.append(("linear probe before", f"{training['probe']['val_top1_accuracy']:.3f} on val"))
        publication = training["publication"]
        if publication["sentence"]:
            rows.append(("published", _PUBLISHED[publication["published"]]))
            rows.append(("compared", publication["sentence"]))
        rows.append(
            ("trained", f"{counted(training['epochs'], 'epoch')}, {counted(training['steps'], 'step')}")
        )
        if training.get("share_of_zeros") is not None:
            rows.append(("zeros", f"{100 * training['share_of_zeros']:.1f} % of the trained weights"))
        if adjustment := training.get("logit_adjustment"):
            values = adjustment["values"]
            rows.append(
                (
                    "logit adjustment",
                    f"tau {adjustment['tau']:.2f}: {min(values):+.2f} for the most frequent class to "
                    f"{max(values):+.2f} for the rarest",
                )
            )
        if continued := document.get("continued"):
            rows.append(("continued", f"after epoch {continued['after_epoch']}, with a new schedule"))
        if training["selected_on"]:
            rows.append(("selected on", _selected_on(training)))
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    return [*rows, ("seconds", f"{seconds['total']:.1f} ({parts})")]


def _cross_validation(cv: dict[str, Any]) -> str:
    text = f"{cv['top1_accuracy']:.3f} on {cv['num_samples']} train images"
    corrected = cv.get("corrected")
    if not corrected or corrected["method"] == "cross-validation":
        return text
    return f"{text}, {corrected['top1_accuracy']:.3f} corrected for the choice of the head"


def _selected_on(training: dict[str, Any]) -> str:
    if training["selected_on"] == "train":
        return "training images held out"
    several = training["best_epoch"] is not None or training.get("logit_adjustment")
    much = "therefore optimistic" if several else "optimistic by the choice between two"
    return f"{training['selected_on']}, whose accuracy is {much}"


def _values(chosen: dict[str, Any]) -> str:
    texts = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in chosen.values())
    return ", ".join(f"{key} {text}" for key, text in zip(chosen, texts, strict=True))


def accuracy(found: dict[str, Any]) -> str:
    """Return an accuracy with its interval, number of images and baseline, for people."""
    low, high = found["interval"]["low"], found["interval"]["high"]
    images = images_text(found["num_images"], found["interval"].get("num_groups"))
    return (
        f"{found['top1_accuracy']:.3f}  (95 %: {low:.3f} to {high:.3f}, {images}; "
        f"always the most frequent class {found['majority_baseline']:.3f})"
    )
