"""`tlcli data check`, `tlcli data split` and `tlcli data preview`."""

import dataclasses
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.commands import DataCheckConfig, DataPreviewConfig, DataSplitConfig
from tlcli.config.data import AugmentOptions
from tlcli.config.fields import long_name
from tlcli.errors import DataError
from tlcli.warned import warn
from tlcli.wording import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tlcli.data.audit import Audit, Finding
    from tlcli.data.dataset import Dataset
    from tlcli.data.split import Fingerprint

MAX_ITEMS = 10
SPLITS = ("train", "val", "test")


@command(
    DataCheckConfig,
    examples=("tlcli data check photos/", "tlcli data check labels.csv --max-bad 0 --json"),
)
def check(out: Output, config: DataCheckConfig) -> None:
    """Read and decode every image; exit with 3 on what would poison training."""
    from tlcli.data.audit import audit, examine
    from tlcli.data.isolate import examine_isolated
    from tlcli.data.scan import scan
    from tlcli.data.split import assign_splits, limit_per_class
    from tlcli.machine.device import torch_threads

    dataset = scan(config)
    workers = config.num_workers
    if config.isolate is not None:
        examined = examine_isolated(dataset.samples, workers, out.progress, seconds=config.isolate)
    else:
        with torch_threads(1):
            examined = examine(dataset.samples, workers, out.progress)
    fingerprints = [item.fingerprint for item in examined]
    splits = assign_splits(
        dataset.samples,
        fingerprints,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        test_fraction=config.test_fraction,
    )
    if config.limit_per_class is not None:
        kept = limit_per_class(dataset.samples, fingerprints, splits, config.limit_per_class)
        dataset = dataclasses.replace(dataset, samples=tuple(dataset.samples[index] for index in kept))
        examined, splits = [examined[index] for index in kept], [splits[index] for index in kept]
    found = audit(dataset, examined, splits, max_bad=config.max_bad, min_per_class=config.min_per_class)
    if found.errors:
        _refuse(config.data, found)
    document = {"data": config.data, **_about(dataset), **found.document()}
    out.result("data.check", document, *_check_text(found))
    _hint_finetune(out, config.data, config.allow_outside_root)


@command(
    DataSplitConfig,
    examples=("tlcli data split photos/", "tlcli data split photos/ --val-fraction 0.3 -o photos/split.csv"),
)
def split(out: Output, config: DataSplitConfig) -> None:
    """Show which images are train, val and test; they depend on content alone."""
    from tlcli.data.audit import require_usable
    from tlcli.data.image_files import BadImage
    from tlcli.data.listing import check_listing_path, write_listing
    from tlcli.data.scan import scan
    from tlcli.data.split import assign_splits, fingerprint, limit_per_class, listing_rows

    if config.output:
        check_listing_path(config.output, overwrite=config.overwrite)
    dataset = scan(config)
    for warning in dataset.warnings:
        warn(warning.code, warning.message)
    samples = dataset.samples
    fingerprints = fingerprint(samples, config.num_workers, out.progress)
    splits = assign_splits(
        samples,
        fingerprints,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        test_fraction=config.test_fraction,
    )
    kept: Sequence[int] = range(len(samples))
    if config.limit_per_class is not None:
        kept = limit_per_class(samples, fingerprints, splits, config.limit_per_class)
    bad = [
        BadImage(sample.name, sample.path, item.reason)
        for sample, item in zip(samples, fingerprints, strict=True)
        if item.reason is not None
    ]
    require_usable(dataset, splits, bad, max_bad=config.max_bad)
    if config.output:
        rows = listing_rows(dataset, splits, kept, config.output)
        write_listing(config.output, rows, overwrite=config.overwrite)
    counts = {name: dict.fromkeys(SPLITS, 0) for name in dataset.class_names}
    for index in kept:
        counts[dataset.class_names[samples[index].label or 0]][splits[index]] += 1
    document = {
        "data": config.data,
        **_about(dataset),
        "classes": [{"name": name, **found} for name, found in counts.items()],
        "num_unused": len(samples) - len(kept),
        "bad_images": [{"name": image.name, "reason": image.reason} for image in bad],
        "files": _files(dataset, splits, fingerprints, kept),
        "output": config.output,
    }
    if bad:
        text = f"{len(bad)} of these files cannot be read; `tlcli data check` names them."
        warn("images_skipped", text)
    out.result("data.split", document, _count_table(counts))
    if config.output:
        out.note(f"Wrote {len(kept)} rows to {config.output!r}.")
        outside = any(row.filename.startswith("..") for row in rows)
        if outside:
            out.note(
                f"They name images outside the folder of {config.output!r}: use it with "
                f"--allow-outside-root, or write it into {str(dataset.root)!r}."
            )
        _hint_finetune(out, config.output, outside)


@command(
    DataPreviewConfig,
    examples=(
        "tlcli data preview photos/",
        "tlcli data preview labels.csv --augment medium --mirror 0 --rotate 20 -o rotated.png",
    ),
)
def preview(out: Output, config: DataPreviewConfig) -> None:
    """Draw augmented training images as one PNG picture, to judge an augmentation by eye."""
    from tlcli.data.preview import check_picture_path, draw_sheet, make_preview, num_views, write_picture
    from tlcli.machine.device import torch_threads

    check_picture_path(config)
    with torch_threads(1):
        made = make_preview(config, config.num_workers, out.progress)
    write_picture(draw_sheet(made, config.data or ""), config.output)
    policy = made.policy
    document = {
        "data": config.data,
        "output": config.output,
        "num_train": made.num_train,
        "augment": {
            "preset": policy.name,
            "reason": policy.reason,
            "description": policy.describe(),
            **policy.values(),
        },
        "view_seed": config.view_seed,
        "image_size": config.image_size,
        "num_views": num_views(config) + 1,
        "images": [{"name": row.name, "label": row.label, "sha256": row.sha256} for row in made.rows],
        "bad_images": [{"name": image.name, "reason": image.reason} for image in made.bad_images],
    }
    for image in made.bad_images:
        warn("images_skipped", f"{image.name!r} is left out: {image.reason}")
    out.result(
        "data.preview",
        document,
        f"augment {policy.name} ({policy.reason}): {policy.describe()}",
        f"{len(made.rows)} training images, each plain and in {num_views(config)} augmented views: "
        + printable(config.output),
    )
    given = [
        f"--{long_name(field.name)} {getattr(config, field.name)}"
        for field in dataclasses.fields(AugmentOptions)
        if getattr(config, field.name) != field.default
    ]
    _hint_finetune(out, config.data, config.allow_outside_root, given)


def _files(
    dataset: "Dataset", splits: "Sequence[str]", fingerprints: "Sequence[Fingerprint]", kept: "Sequence[int]"
) -> list[dict[str, Any]]:
    return [
        {
            "name": dataset.samples[index].name,
            "label": dataset.class_names[dataset.samples[index].label or 0],
            "split": splits[index],
            "group": dataset.samples[index].group,
            "sha256": fingerprints[index].sha256,
        }
        for index in kept
    ]


def _hint_finetune(
    out: Output, data: str | None, allow_outside_root: bool, augmentation: "Sequence[str] | None" = None
) -> None:
    words = ["tlcli finetune", shlex.quote(data or "")]
    if allow_outside_root:
        words.append("--allow-outside-root")
    words.append("--backbone resnet50.a1_in1k")
    if augmentation is not None:  # what makes finetune train the backbone, on augmented images
        words += ["--scenario freeze", *augmentation]
    out.hint(" ".join(words))


def _about(dataset: "Dataset") -> dict[str, Any]:
    return {
        "kind": dataset.kind,
        "class_names": list(dataset.class_names),
        "ignored": dict(dataset.ignored),
    }


def _count_table(counts: dict[str, dict[str, int]]) -> Any:
    """Return classes by split, with a sum below; splits without images are left out."""
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    shown = [name for name in SPLITS if total[name]]
    rows = [[name, *(found[split] for split in shown)] for name, found in counts.items()]
    return table(["class", *shown], [*rows, ["(all)", *(total[split] for split in shown)]])


def _check_text(found: "Audit") -> list[Any]:
    formats = ", ".join(f"{count} {name}" for name, count in found.formats.items())
    lines = ["", f"{found.num_images} images, {found.num_bytes / 1e6:.1f} MB: {formats}"]
    lines += [_finding_text(finding) for finding in found.findings]
    if not any(finding.severity == "warning" for finding in found.findings):
        lines.append("Nothing to complain about.")
    return [_count_table({name: dict(counts) for name, counts in found.counts.items()}), "\n".join(lines)]


def _finding_text(finding: "Finding") -> str:
    lines = [f"{finding.severity}: {finding.message}"]
    lines += [f"    {item}" for item in finding.items[:MAX_ITEMS]]
    if len(finding.items) > MAX_ITEMS:
        lines.append(f"    and {len(finding.items) - MAX_ITEMS} more")
    return "\n".join(lines)


def _refuse(data: str | None, found: "Audit") -> None:
    """Raise what would poison training; stdout stays empty, so that everything is in the message.

    Raises:
        DataError: Always.
    """
    for finding in found.findings:
        if finding.severity == "warning":
            warn(finding.warned.code, _finding_text(finding).removeprefix("warning: "))
    parts = [_finding_text(finding).removeprefix("error: ") for finding in found.errors]
    raise DataError(
        f"{data!r} would poison training:\n  " + "\n  ".join("\n".join(parts).splitlines()),
        hint="Remove or correct these images, and check again.",
    )
