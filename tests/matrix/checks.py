"""One backbone through everything a user does with it: shown, head, part, all, saved, reloaded, measured."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

REFUSALS = (2, 4)  # exit codes of a usage error, and of a backbone that cannot be used
LOG_LOSS = {"fp32": 2e-3, "default": 0.05}  # relative; what evaluate may differ by
LOGITS = 1e-3  # relative to the largest; what a reload in timm may differ by

KINDS = ("head", "full", "freeze")

Run = Callable[..., tuple[int, str, str]]
"""(words of a command line) -> exit code, stdout, stderr."""


class Broken(Exception):
    """Something neither worked nor was refused before work."""


class Refused(Exception):
    """A command was refused before work."""


def write_images(folder: Path) -> None:
    """Write two classes of six images."""
    for number in range(12):
        kind = number % 2
        image = Image.new("RGB", (160, 140), (200, 60, 60 + number) if kind else (60, 60 + number, 200))
        draw = ImageDraw.Draw(image)
        for place in range(5):
            corner = 17 * (number + place) % 90
            draw.ellipse((corner, corner, corner + 30 + 4 * place, corner + 30), fill=(9 * number, 200, 30))
        target = folder / "ab"[kind] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)


def check(
    name: str,
    sizes: list[int | None],
    folder: Path,
    run: Run,
    options: tuple[str, ...],
    kinds: tuple[str, ...] = KINDS,
) -> dict[str, Any]:
    """Return what was found of a backbone with random weights.

    Args:
        name: As for --backbone.
        sizes: Image sizes to try, in order; None is the backbone's own.
        folder: Empty.
        run: Runs a command line.
        options: Types of extraction and training, --dtype X --amp Y; () for the defaults.
        kinds: What is trained.

    Raises:
        Refused: A command was refused before work.
        Broken: It ended otherwise.
    """
    write_images(folder / "data")
    backbone, shown = _shown(name, sizes, run)
    units = shown["units"]
    half = max(1, len(units) // 2)
    found = {
        "image_size": shown["image_size"],
        "units": len(units),
        "cuts": len({unit["cut"] for unit in units if unit["cut"]}),
        "saved_at_half": units[half - 1].get("saved_share"),
        "can_be_cut": all(unit["cut"] for unit in units),
    }
    dtype, amp = options[:2], options[2:]
    tolerance = LOG_LOSS["fp32" if "fp32" in options else "default"]
    trainings = {"head": ("--l2", "0.01", "--folds", "2"), "full": ("--scenario", "full", "--epochs", "1")}
    if found["can_be_cut"]:
        trainings["freeze"] = ("--freeze", str(half), "--epochs", "1")
    for kind, words in ((kind, words) for kind, words in trainings.items() if kind in kinds):
        output = folder / kind
        shared = (*backbone, *dtype, *(("--augment", "none", *amp) if kind != "head" else ()))
        try:
            document = _done(run("finetune", folder / "data", *shared, *words, "-o", output, "-q", "--json"))
            again = _done(run("evaluate", output, "-q", "--json"))
        except Refused as error:
            if output.exists():  # work was done, and is of no use
                raise Broken(f"{kind} was refused after work: {error}") from error
            raise
        _close(document["metrics"]["val"]["log_loss"], again["log_loss"], tolerance, f"evaluate of {kind}")
        _reload(output, backbone[1])
        found[f"{kind}_computes"] = json.loads((output / "run.json").read_text())["dtype"]["reason"]
    return found


def _shown(name: str, sizes: list[int | None], run: Run) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the options of the first size that the backbone takes, and its table."""
    for place, size in enumerate(sizes):
        backbone = ("--backbone", name, "--random-init", *(("--image-size", str(size)) if size else ()))
        code, stdout, stderr = run("backbones", "show", *backbone[1:], "--json")
        if code in REFUSALS and place < len(sizes) - 1:
            continue
        return backbone, _done((code, stdout, stderr))
    raise Broken("no image size was tried")


def _done(result: tuple[int, str, str]) -> dict[str, Any]:
    code, stdout, stderr = result
    if code in REFUSALS:
        lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
        raise Refused(" ".join(lines) or stderr[-500:])
    if code != 0:
        raise Broken(f"exit {code}: {stderr[-1500:]}")
    document: dict[str, Any] = json.loads(stdout)
    return document


def _close(one: float, other: float, tolerance: float, what: str) -> None:
    if not abs(one - other) <= tolerance * max(1.0, abs(one)):
        raise Broken(f"{what} gives log loss {other:.5f}, training reported {one:.5f}")


def _reload(output: Path, name: str) -> None:
    """Compare the logits of a run with those of timm or torchvision, which know nothing of tlcli."""
    import timm
    import torch

    from tlcli.runs.run import open_run

    run = open_run(str(output))
    backbone, head = run.backbone(), run.head()
    images = torch.randn(2, 3, *backbone.preprocess.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = head.logits(backbone.model(images))
        if name.startswith("torchvision/"):
            found = head.logits(_by_torchvision(name, backbone.arguments, output)(images))
        else:
            model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
            found = model(images)
            if not run.facts["head"]["stored"]["classifier"]:
                found = head.logits(found)
    difference = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not difference <= LOGITS:
        raise Broken(f"reloaded, logits differ by {difference:.2g} from {os.path.basename(output)}'s")


def _by_torchvision(name: str, arguments: dict[str, Any], output: Path) -> Any:
    """Return torchvision's network without its last layer, with a run's tensors, as the README says."""
    import torch
    import torchvision
    from safetensors.torch import load_file

    kind = name.removeprefix("torchvision/")
    if kind in {"googlenet", "inception_v3"}:
        arguments = {**arguments, "aux_logits": False, "init_weights": False, "transform_input": True}
    model = torchvision.models.get_model(kind, weights=None, **arguments)
    if kind.startswith("squeezenet"):
        model.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))
    else:
        linear = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        model.set_submodule(linear[-1], torch.nn.Identity())
    state = model.state_dict()  # with the format versions that some networks ask for
    tensors = load_file(output / "model.safetensors")
    assert state.keys() == tensors.keys()
    state.update(tensors)
    model.load_state_dict(state)
    return model.eval()
