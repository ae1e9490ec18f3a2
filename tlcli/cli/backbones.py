"""`tlcli backbones list` and `tlcli backbones show`."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlcli.cli.options import command
from tlcli.cli.output import Output, table
from tlcli.config.backbone import BackboneOptions
from tlcli.config.commands import BackbonesListConfig, BackbonesShowConfig
from tlcli.errors import BackboneError, UsageError

if TYPE_CHECKING:
    from tlcli.backbones.backbone import Backbone
    from tlcli.backbones.costs import UnitCosts


@command(
    BackbonesListConfig,
    examples=("tlcli backbones list 'resnet*' --max-params 30", "tlcli backbones list --cached"),
)
def list_backbones(out: Output, config: BackbonesListConfig) -> None:
    """List the backbones that have pretrained weights, and the classic networks, which have none."""
    from tlcli.backbones import catalog

    found = catalog.entries(
        config.pattern,
        cached=config.cached,
        max_parameters=None if config.max_params is None else config.max_params * 1e6,
        image_size=config.image_size,
        sort=config.sort,
    )
    shown = [catalog.with_parameters(entry) for entry in (found[: config.limit] if config.limit else found)]
    document = {
        "total": len(found),
        "backbones": [
            {
                "name": entry.name,
                "architecture": entry.architecture,
                "num_parameters": entry.num_parameters,
                "image_size": list(entry.image_size),
                "license": entry.license,
                "cached": entry.cached,
                "pretrained": entry.pretrained,
            }
            for entry in shown
        ],
    }
    rows = [
        [
            entry.name,
            None if entry.num_parameters is None else f"{entry.num_parameters / 1e6:>8.1f} M",
            _size(entry.image_size),
            entry.license or ("unknown" if entry.pretrained else "none needed"),
            ("yes" if entry.cached else "no") if entry.pretrained else "no weights",
        ]
        for entry in shown
    ]
    out.result(
        "backbones.list", document, table(["name", "parameters", "image size", "license", "cached"], rows)
    )
    if not found:
        out.note("No backbone fits. PATTERN is a part of a name or a glob such as 'resnet*'.")
    elif len(shown) < len(found):
        out.note(f"{len(shown)} of {len(found)} shown; --limit 0 shows all.")
    if shown:
        out.hint(f"tlcli backbones show {shown[0].name}")


@command(
    BackbonesShowConfig,
    examples=(
        "tlcli backbones show resnet18 --random-init",
        "tlcli backbones show classic/lenet5 --model-kwargs norm=every,activation=tanh",
    ),
)
def show(out: Output, config: BackbonesShowConfig) -> None:
    """Show a backbone unit by unit: shapes, parameters, work, and bytes of a cached row."""
    if not config.backbone:
        raise UsageError("No backbone is named.", hint="Try: tlcli backbones show bundled")
    from tlcli.backbones.costs import unit_costs
    from tlcli.backbones.work import WORTH_A_WORD
    from tlcli.backbones.zoo import load_backbone

    options = BackboneOptions(
        backbone=config.backbone,
        weights=config.weights,
        weights_key=config.weights_key,
        random_init=config.random_init or (config.backbone.startswith("classic/") and not config.weights),
        model_kwargs=config.model_kwargs,
        image_size=config.image_size,
    )
    try:
        backbone = load_backbone(options)
    except BackboneError as error:
        if options.random_init or options.weights:
            raise
        hint = "This table does not depend on the weights: --random-init shows it without."
        raise BackboneError(error.message, hint=f"{error.hint or ''} {hint}".strip()) from error
    costs = unit_costs(backbone.model, backbone.preprocess.image_size)
    document = _document(backbone, costs)
    columns = ["unit", "name", "output", "parameters", "FLOPs", "cached row", "bytes/image", "saved"]
    out.result("backbones.show", document, _facts(document), table(columns, _rows(costs)))
    if any(row.saved_share is not None and row.saved_share < WORTH_A_WORD for row in costs):
        out.note(
            "saved: the share of the work of this unit and all before it that --freeze caches. Below 100%, "
            "the network can only be cut earlier, and the rest is computed again in each epoch."
        )
    if costs[0].cut is None:
        out.note("This network cannot be traced: it can be frozen as a whole (--freeze all) only.")
    quoted = shlex.quote(backbone.name)
    if backbone.origin == "classic":
        given = f" --model-kwargs {shlex.quote(config.model_kwargs)}" if config.model_kwargs else ""
        out.hint(f"tlcli finetune DATA --backbone {quoted}{given} --scenario scratch")
    else:
        out.hint(f"tlcli extract DATA --backbone {quoted} --freeze {max(1, len(costs) * 2 // 3)}")


def _document(backbone: "Backbone", costs: "list[UnitCosts]") -> dict[str, Any]:
    preprocess = backbone.preprocess
    return {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "source": backbone.origin,
        "pretrained": backbone.pretrained,
        "license": backbone.license,
        "arguments": backbone.arguments,
        "image_size": list(preprocess.image_size),
        "crop_pct": preprocess.crop_pct,
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_features": backbone.num_features,
        "num_parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "flops": sum(row.flops for row in costs),
        "units": [
            {
                "index": row.unit.index,
                "name": row.unit.name,
                "output_shape": None if row.output_shape is None else list(row.output_shape),
                "num_parameters": row.unit.num_parameters,
                "flops": row.flops,
                "flops_share": row.flops_share,
                "cut": None if row.cut is None else row.cut.node,
                "row_shape": None if row.cut is None else list(row.cut.row_shape),
                "row_bytes": row.row_bytes,
                "saved_share": row.saved_share,
            }
            for row in costs
        ],
    }


def _facts(document: Mapping[str, Any]) -> str:
    facts = document
    return "\n".join(
        [
            f"{facts['name']}: {facts['architecture']}, {facts['source']}, "
            f"license {facts['license'] or 'unknown'}"
            if facts["source"] != "classic"
            else f"{facts['name']}: no pretrained weights; "
            + ", ".join(f"{key} {_plain(value)}" for key, value in facts["arguments"].items()),
            f"{facts['num_parameters']:,} parameters, {facts['flops'] / 1e9:.3g} GFLOPs an image, "
            f"{facts['num_features']} features",
            f"images {_size(facts['image_size'])}, crop {facts['crop_pct']:.4g}, {facts['interpolation']}, "
            f"mean {_numbers(facts['mean'])}, std {_numbers(facts['std'])}",
            "",
        ]
    )


def _rows(costs: "list[UnitCosts]") -> list[list[object]]:
    return [
        [
            row.unit.index,
            row.unit.name,
            _shape(row.output_shape),
            f"{row.unit.num_parameters:>11,}",
            f"{row.flops_share:>6.1%}",
            _shape(row.cut.row_shape) if row.cut else None,
            None if row.row_bytes is None else f"{row.row_bytes:>11,}",
            None if row.saved_share is None else f"{row.saved_share:>5.0%}",
        ]
        for row in costs
    ]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
