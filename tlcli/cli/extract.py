"""`tlcli extract`."""

import dataclasses
import shlex

from tlcli.cli.options import command
from tlcli.cli.output import Output
from tlcli.config.backbone import BackboneOptions, FeatureOptions
from tlcli.config.commands import ExtractConfig
from tlcli.config.data import AugmentOptions, DataOptions
from tlcli.config.fields import long_name


@command(
    ExtractConfig,
    dry_run=True,
    examples=(
        "tlcli extract photos/ --backbone resnet50.a1_in1k",
        "tlcli extract photos/ --backbone bundled --freeze 3 --views 4",
    ),
)
def extract(out: Output, config: ExtractConfig) -> None:
    """Compute the frozen part's features once, into the cache, and export them on request."""
    from tlcli.commands import extract as library

    plan = library.plan_extract(config, out.progress)
    out.plan("Extract features", plan.summary())
    if out.dry_run:
        out.result("extract.plan", plan.document())
        return
    outcome = library.extract(config, plan, out.progress)
    document = {
        **plan.document(),
        "features": outcome.document(),
        "output": config.output,
        "bad_images": [{"file": image.name, "reason": image.reason} for image in outcome.bad_images],
    }
    text = outcome.summary() + (f"\nwrote {config.output}" if config.output else "")
    out.result("extract", document, text)
    frozen = plan.store.extractor.cut.num_frozen_units
    if frozen:
        out.hint(shlex.join(["tlcli", "finetune", str(config.data), *_changed(config)]))


def _changed(config: ExtractConfig) -> list[str]:
    """Return the options a later command needs to find the same images and rows."""
    arguments = []
    groups: tuple[type, ...] = (BackboneOptions, DataOptions, FeatureOptions)
    if config.freeze not in {None, "all"}:
        arguments += ["--freeze", str(config.freeze)]
        groups += (AugmentOptions,)
    for field in (field for group in groups for field in dataclasses.fields(group)):
        value = getattr(config, field.name)
        if value == field.default or field.name in {"data", "freeze", "cache", "workers"}:
            continue
        name = f"--{long_name(field.name)}"
        arguments += [name] if value is True else [name, str(value)]
    return arguments
