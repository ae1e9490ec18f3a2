"""The smallest member of every family: each module of timm's models, each classifier module of torchvision.

    python -m tests.matrix.members     measures them again and writes members.csv, in minutes

Smallest is by FLOPs at the member's own image size, of the members with the fewest parameters. Stubs of
timm's own tests (`test_*`) do not count.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

TABLE = Path(__file__).parent / "members.csv"
TRIED = 6  # of each family; more parameters hardly ever go with fewer FLOPs
EASY_SIZE = 256  # pixels; larger networks are tried with smaller images where they take them


@dataclass(frozen=True)
class Member:
    """A row of the table.

    Attributes:
        family: Module of timm.models, or "torchvision/MODULE".
        name: As for --backbone.
        gflops: Of one image, in 10^9.
        image_size: Side of the member's own images, in pixels.
    """

    family: str
    name: str
    gflops: float
    image_size: int


def members() -> list[Member]:
    """Return the table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [
            Member(row["family"], row["name"], float(row["gflops"]), int(row["image_size"]))
            for row in csv.DictReader(file)
        ]


def families() -> dict[str, list[str]]:
    """Return family -> names of its members, of what is installed."""
    from torchvision import models

    from tlcli.backbones import torchvision_zoo

    found = defaultdict(list)
    for name in timm.list_models():
        if not name.startswith("test_"):
            found[timm.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    for name in torchvision_zoo.names():
        module = models.get_model_builder(name).__module__.rpartition(".")[2]
        found[f"torchvision/{module}"].append(f"torchvision/{name}")
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def smallest(family: str, names: list[str]) -> Member:
    """Return the member with the fewest FLOPs."""
    built = [(*_parameters(name), name) for name in names]
    built.sort(key=lambda item: item[0])
    found = []
    for _, size, name in built[:TRIED]:
        found.append(Member(family, name, round(_flops(name, size) / 1e9, 3), size))
    return min(found, key=lambda member: member.gflops)


def _build(name: str) -> torch.nn.Module:
    if name.startswith("torchvision/"):
        from torchvision import models

        return models.get_model(name.removeprefix("torchvision/"), weights=None)
    return timm.create_model(name)


def _parameters(name: str) -> tuple[int, int]:
    """Return the parameters and the side of the images."""
    try:
        with torch.device("meta"):
            model = _build(name)
    except Exception:  # some read values while they are built
        model = _build(name)
    if name.startswith("torchvision/"):
        from torchvision import models

        weights = models.get_model_weights(name.removeprefix("torchvision/")).DEFAULT
        size = int(weights.transforms().crop_size[0])
    else:
        size = int(model.pretrained_cfg.get("input_size", (3, 224, 224))[1])
    return sum(parameter.numel() for parameter in model.parameters()), size


def _flops(name: str, size: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = _build(name).eval().requires_grad_(False)
                with counter, torch.no_grad():
                    model(torch.zeros(1, 3, size, size))
        except Exception:  # some need values to run
            continue
        return counter.get_total_flops()
    return sys.maxsize


def main() -> None:
    """Write the table."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", "name", "gflops", "image_size"])
        for family, names in families().items():
            member = smallest(family, names)
            writer.writerow([member.family, member.name, member.gflops, member.image_size])
            file.flush()
            print(
                f"{family}: {member.name}, {member.gflops} GFLOPs at {member.image_size} pixels", flush=True
            )


if __name__ == "__main__":
    main()
