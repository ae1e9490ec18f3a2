"""`tlcli evaluate`."""

from rich.table import Table

from tlcli.cli.finetune import accuracy
from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import EvaluateConfig
from tlcli.errors import CheckFailed

LARGEST_MATRIX = 20


@command(
    EvaluateConfig,
    dry_run=True,
    examples=("tlcli evaluate runs/pets", "tlcli evaluate runs/pets --split test --min-accuracy 0.9 --json"),
)
def evaluate(out: Output, config: EvaluateConfig) -> None:
    """Measure a run: accuracy with its interval, per class, calibration; a gate for scripts."""
    from tlcli.commands import evaluate as library

    run, plan = library.plan_evaluate(config, out.progress)
    facts = plan.summary()
    if (scenario := run.facts.get("scenario")) != "feature-extraction":
        facts["backbone"] = f"{run.facts['backbone']['name']}, as trained in scenario {scenario}"
    out.plan(f"Evaluate {config.run} on {config.split}", facts)
    if out.dry_run:
        out.result("evaluate.plan", plan.document())
        return
    evaluation, outcome = library.evaluate(run, plan, config, out.progress)
    out.note(outcome.summary())
    found = evaluation.document
    names = found["class_names"]
    gate = None
    if config.min_accuracy is not None:
        gate = {"min_accuracy": config.min_accuracy, "passed": found["top1_accuracy"] >= config.min_accuracy}
    found["worst_mistakes"] = found["worst_mistakes"][: config.worst]
    document = {
        "run_path": config.run, "data": config.data or run.facts["data"]["path"], "gate": gate,
        **{key: value for key, value in found.items() if key != "schema"},
    }  # fmt: skip
    summary = [
        ("top-1 accuracy", accuracy(found)),
        (f"top-{found['top5_k']} accuracy", f"{found['top5_accuracy']:.3f}"),
        ("macro F1", "{:.3f}  (95 % interval {low:.3f} to {high:.3f})".format(
            found["macro_f1"], **{k: found["macro_f1_interval"][k] for k in ("low", "high")})),
        ("log loss", f"{found['log_loss']:.3f}"),
        ("expected calibration error", f"{found['expected_calibration_error']:.3f}"),
    ]  # fmt: skip
    keys = ("class_name", "precision", "recall", "f1", "support")
    classes = table(["class", *keys[1:]], [[row[key] for key in keys] for row in found["per_class"]])
    tables: list[Table | str] = [table(["", ""], summary), "", classes]
    if len(names) <= LARGEST_MATRIX:
        matrix = [[name, *row] for name, row in zip(names, found["confusion_matrix"], strict=True)]
        tables += ["", table(["true \\ predicted", *names], matrix)]
    if found["worst_mistakes"]:
        columns = ("file", "label", "predicted", "probability")
        rows = [[item[key] for key in columns] for item in found["worst_mistakes"]]
        tables += ["", table(["worst mistakes", *columns[1:]], rows)]
    out.result("evaluate", document, *tables)
    if gate and not gate["passed"]:
        raise CheckFailed(
            f"Top-1 accuracy {found['top1_accuracy']:.4f} on {config.split} is below --min-accuracy "
            f"{config.min_accuracy:g}.",
            document=document,
        )
