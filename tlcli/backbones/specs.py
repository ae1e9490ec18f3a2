"""What a backbone's name stands for: architecture, configuration, and where its weights are.

Nothing is built or loaded here. A hub is asked for a configuration only by hf-hub: names that are not cached.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from tlcli.backbones import hub
from tlcli.config.backbone import Origin, parse_backbone
from tlcli.errors import BackboneError, UsageError
from tlcli.wording import did_you_mean, near_misses

BUNDLED_DIR = Path(__file__).parent / "bundled"
LIST_HINT = "`tlcli backbones list PATTERN` shows the names; `bundled` always works, offline too."


@dataclass(frozen=True, kw_only=True)
class TimmSpec:
    """A timm network before it is built.

    Attributes:
        architecture: timm's name without a tag.
        cfg: timm's pretrained configuration.
        arguments: Arguments of the architecture that belong to the weights.
        find: Returns the weights file, asking a hub where needed; None where there are no weights.
        origin: Where the weights come from.
    """

    architecture: str
    cfg: dict[str, Any]
    arguments: dict[str, Any]
    find: Callable[[], Path] | None
    origin: Origin


def timm_spec(name: str, *, offline: bool = False) -> TimmSpec:
    """Return what is known of a timm network before its weights are read.

    Args:
        name: As for --backbone, but no torchvision or classic name.
        offline: Never ask a hub (as TLCLI_OFFLINE and HF_HUB_OFFLINE do).

    Raises:
        UsageError: The name is unknown.
        BackboneError: A folder or hub repository is missing or not in timm's format.
    """
    found = parse_backbone(name)
    if found.origin == "bundled":
        return _local_spec(BUNDLED_DIR, "bundled")
    if found.origin == "local-dir":
        return _local_spec(Path(found.rest).expanduser(), "local-dir")
    if found.origin == "hf-hub":
        return _hub_spec(found.rest, offline)
    return _registry_spec(name, offline)


def _registry_spec(name: str, offline: bool) -> TimmSpec:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no backbone {name!r}.", hint=_did_you_mean(name))
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        cfg = None
    if tag and cfg is None:
        tags = timm.list_models(architecture + ".*", pretrained=True)
        hint = (
            f"Known: {', '.join(tags)}." if tags else f"Write {architecture} with --random-init or --weights."
        )
        raise UsageError(f"timm has no weights {tag!r} for {architecture}.", hint=hint)
    plain = (cfg or PretrainedCfg()).to_dict()
    full = f"{architecture}.{plain['tag']}" if plain.get("tag") else architecture
    has_weights = bool(plain.get("hf_hub_id") or plain.get("url"))
    find = partial(hub.registry_weights, full, plain, offline=offline) if has_weights else None
    return TimmSpec(architecture=architecture, cfg=plain, arguments={}, find=find, origin="timm")


def _local_spec(folder: Path, origin: Origin) -> TimmSpec:
    config = folder / "config.json"
    if not config.is_file():
        what = "no such folder" if not folder.is_dir() else "it has no config.json"
        hint = "Expected timm's format: config.json and model.safetensors, as tlcli and timm write it."
        if folder.is_file():
            what = "it is a file"
            hint = f"For a weights file write --backbone ARCH --weights {shlex.quote(str(folder))}."
        if origin == "bundled":
            hint = "The installation is incomplete; install tlcli again."
        raise BackboneError(f"Backbone folder {str(folder)!r} cannot be used: {what}.", hint=hint)
    architecture, cfg, arguments = _parse_config(config)
    return TimmSpec(
        architecture=architecture,
        cfg=cfg,
        arguments=arguments,
        find=partial(hub.folder_weights, folder),
        origin=origin,
    )


def _hub_spec(repository: str, offline: bool) -> TimmSpec:
    identifier, _, revision = repository.partition("@")
    if identifier.count("/") != 1 or not all(identifier.split("/")):
        raise UsageError(f"hf-hub:{repository} is no hub repository.", hint="Expected hf-hub:ORG/NAME.")
    wanted = revision or None
    config = hub.hub_file(identifier, ("config.json",), wanted, offline=offline)
    architecture, cfg, arguments = _parse_config(config)
    find = partial(hub.hub_file, identifier, hub.HUB_WEIGHTS, wanted, offline=offline)
    return TimmSpec(architecture=architecture, cfg=cfg, arguments=arguments, find=find, origin="hf-hub")


def _parse_config(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, pretrained configuration and arguments of a config.json in timm's format."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{str(path)!r} is not readable JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        hint = "Only backbones in timm's format can be used; its config.json names an `architecture`."
        raise BackboneError(f"{str(path)!r} is not timm's: it names no architecture.", hint=hint)
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise BackboneError(
            f"{str(path)!r} names the architecture {architecture!r}, unknown to timm {timm.__version__}.",
            hint=f"{_did_you_mean(architecture)} Or update timm.",
        )
    cfg = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        raise BackboneError(f"{str(path)!r}: pretrained_cfg and model_args must be mappings.")
    known = {item.name for item in dataclasses.fields(PretrainedCfg)} - {
        "url",
        "file",
        "state_dict",
        "hf_hub_id",
    }
    cfg = {key: value for key, value in cfg.items() if key in known} | {"architecture": architecture}
    if isinstance(config.get("num_classes"), int):
        cfg["num_classes"] = config["num_classes"]
    if arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False:
        cfg["fixed_input_size"] = False
    return architecture, cfg, {key: value for key, value in arguments.items() if key != "num_classes"}


def _did_you_mean(name: str) -> str:
    from tlcli.backbones import classic, torchvision_zoo

    architecture = name.partition(".")[0]
    for zoo in (torchvision_zoo, classic):  # such as alexnet, googlenet and lenet5, which timm does not have
        if architecture.lower() in zoo.names():
            return f"Did you mean {zoo.PREFIX}{architecture.lower()}? {LIST_HINT}"
    known = timm.list_models()
    near = near_misses(architecture, known, cutoff=0.7)
    if not near:
        letters = re.sub(r"[^a-z0-9]", "", architecture.lower())
        near = [known_name for known_name in known if re.sub("_", "", known_name) == letters][:3]
    return did_you_mean(near) + LIST_HINT
