"""The list of backbones: names, parameters, image size, licence, and whether the weights are on this machine.

Names, sizes and licences come from timm's and torchvision's registries. Parameters cannot: counting them
means building each of over a thousand networks. So they stand in catalog.csv, keyed by architecture, which
`write_catalog` makes; an architecture newer than the table is counted when it is shown.
"""

import csv
import dataclasses
import fnmatch
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from tlcli.backbones import classic, hub, specs, torchvision_zoo
from tlcli.backbones.guess import TABLE, parameter_counts
from tlcli.errors import TlcliError

logger = logging.getLogger(__name__)

Sort = Literal["name", "params", "image-size"]


@dataclass(frozen=True)
class CatalogEntry:
    """One backbone of the list.

    Attributes:
        name: As for --backbone.
        architecture: timm's name without a tag, "torchvision/NAME" or "classic/NAME".
        num_parameters: Values in the parameters of the headless network; None where not counted.
        image_size: Height and width in pixels.
        license: Licence of the weights where known.
        cached: Whether the weights are on this machine.
        pretrained: Whether there are weights; without, it is for training from scratch.
    """

    name: str
    architecture: str
    num_parameters: int | None
    image_size: tuple[int, int]
    license: str | None
    cached: bool
    pretrained: bool = True


def entries(
    pattern: str | None = None,
    *,
    cached: bool = False,
    max_parameters: float | None = None,
    image_size: int | None = None,
    sort: Sort = "name",
) -> list[CatalogEntry]:
    """Return the backbones that fit all conditions: those with pretrained weights, and the classic ones.

    Args:
        pattern: Part of a name, or a glob; case does not matter. None fits all.
        cached: Only those whose weights are on this machine.
        max_parameters: Most parameters; those of unknown size are left out.
        image_size: Only those whose own images have this side in pixels.
        sort: "name", or ascending "params" or "image-size", then by name.
    """
    found = [
        entry
        for entry in _all()
        if _fits(entry.name, pattern)
        and (entry.cached or not cached)
        and (image_size is None or image_size in entry.image_size)
        and (max_parameters is None or (entry.num_parameters or math.inf) <= max_parameters)
    ]
    keys = {
        "name": lambda entry: entry.name,
        "params": lambda entry: (entry.num_parameters or math.inf, entry.name),
        "image-size": lambda entry: (entry.image_size, entry.name),
    }
    found.sort(key=keys[sort])
    return sorted(found, key=lambda entry: entry.name != "bundled") if sort == "name" else found


def write_catalog(path: Path = TABLE) -> None:
    """Count the parameters of every architecture with pretrained weights, and write the table.

    Networks are built and run on the meta device, where tensors have shapes and no values. An architecture
    that gives no pooled vector gets 0 parameters, and is not listed.
    """
    names = sorted({name.partition(".")[0] for name in timm.list_models(pretrained=True)})
    names += [torchvision_zoo.PREFIX + name for name in torchvision_zoo.names()]
    names += [classic.PREFIX + name for name in classic.names()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["architecture", "num_parameters"])
        for name in names:
            writer.writerow([name, _count(name)])
            file.flush()


def _count(architecture: str, arguments: Mapping[str, Any] | None = None) -> int:
    """Return the parameters of a headless network, or 0 where it gives no vector for an image."""
    try:
        with torch.device("meta"):
            model = _build(architecture, arguments or {})
    except Exception as error:  # some read values while they are built; these are built for real
        logger.debug("%s: not on the meta device: %s", architecture, error)
        model = _build(architecture, arguments or {})
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *size, device=next(model.parameters()).device))
        usable = size[0] == 3 and isinstance(output, torch.Tensor) and output.ndim == 2
    except Exception as error:  # a few need values to run
        logger.debug("%s: not run: %s", architecture, error)
        usable = size[0] == 3
    return sum(parameter.numel() for parameter in model.parameters()) if usable else 0


def _build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    if architecture.startswith(torchvision_zoo.PREFIX):
        return torchvision_zoo.headless(architecture.removeprefix(torchvision_zoo.PREFIX), {})
    if architecture.startswith(classic.PREFIX):
        return classic.headless(architecture.removeprefix(classic.PREFIX))
    model: nn.Module = timm.create_model(architecture, num_classes=0, **arguments)
    return model


def _all() -> Iterator[CatalogEntry]:
    counts = parameter_counts()
    repositories, files = _cached_repositories(), _cached_files()
    try:
        spec = specs.timm_spec("bundled")
        yield _local_entry("bundled", spec)
    except TlcliError as error:
        logger.debug("bundled: %s", error)
    registered = set()
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name).to_dict()
        architecture = name.partition(".")[0]
        repository, url = str(cfg.get("hf_hub_id")), cfg.get("url")
        registered.add(repository)
        if counts.get(architecture, 1):
            here = repository in repositories or (isinstance(url, str) and url.rpartition("/")[2] in files)
            yield _entry(name, architecture, cfg, here)
    for name in torchvision_zoo.names():
        architecture = torchvision_zoo.PREFIX + name
        for place, (tag, weights) in enumerate(torchvision_zoo.weights_of(name).items()):
            size = int(weights.transforms().crop_size[0])
            here = weights.url.rpartition("/")[2] in files
            full = f"{architecture}.{tag}" if place else architecture
            licence = weights.meta.get("license")
            yield CatalogEntry(full, architecture, counts.get(architecture), (size, size), licence, here)
    for name, network in classic.NETWORKS.items():
        full, size = classic.PREFIX + name, network.image_size
        yield CatalogEntry(full, full, counts.get(full), (size, size), None, False, pretrained=False)
    for repository in sorted(repositories - registered):
        try:
            spec = specs.timm_spec(f"hf-hub:{repository}", offline=True)
        except TlcliError as error:
            logger.debug("%s in the hub cache is no backbone: %s", repository, error)
        else:
            yield _local_entry(f"hf-hub:{repository}", spec)


def _entry(name: str, architecture: str, cfg: dict[str, object], cached: bool) -> CatalogEntry:
    size = cfg.get("input_size") or (3, 224, 224)
    license = cfg.get("license")
    return CatalogEntry(
        name=name,
        architecture=architecture,
        num_parameters=parameter_counts().get(architecture),
        image_size=(int(size[1]), int(size[2])),  # type: ignore[index]
        license=str(license) if license else None,
        cached=cached,
    )


def _local_entry(name: str, spec: specs.TimmSpec) -> CatalogEntry:
    """Return the entry of a cached network, counted anew where its arguments change the architecture."""
    entry = _entry(name, spec.architecture, spec.cfg, True)
    if spec.arguments:
        entry = dataclasses.replace(entry, num_parameters=_count(spec.architecture, spec.arguments) or None)
    return entry


def with_parameters(entry: CatalogEntry) -> CatalogEntry:
    """Return `entry` with its parameters counted where the table lacks them."""
    if entry.num_parameters is not None:
        return entry
    return dataclasses.replace(entry, num_parameters=_count(entry.architecture) or None)


def _fits(name: str, pattern: str | None) -> bool:
    if not pattern:
        return True
    if any(mark in pattern for mark in "*?["):
        return fnmatch.fnmatchcase(name.lower(), pattern.lower())
    return pattern.lower() in name.lower()


def _cached_repositories() -> set[str]:
    """Return ORG/NAME of the repositories in the hub cache that have a weights file."""
    found = set()
    for folder in hub.hub_cache().glob("models--*--*"):
        if any(next(folder.glob(f"snapshots/*/{name}"), None) for name in hub.HUB_WEIGHTS):
            found.add("/".join(folder.name.split("--")[1:3]))
    return found


def _cached_files() -> set[str]:
    """Return the names of files in torch's hub folder."""
    folder = hub.checkpoints_dir()
    return {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
