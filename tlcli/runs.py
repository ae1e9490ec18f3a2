"""The run directory: the only place where one is written, and read back.

    config.yaml            every option, resolved: `tlcli finetune --config RUN/config.yaml` repeats the run
    run.json               what the run is: status, versions, data, classes, backbone, head, metrics
    metrics.jsonl          one line a head of the grid, or an epoch
    checkpoints/           until the run is done: what --resume continues from (tlcli.checkpoints)
    model.safetensors      with config.json the tuned network, in timm's format
    head.safetensors       the head, where it is not the network's own linear classifier
    evaluation-SPLIT.json  predictions-SPLIT.csv  bad_images.csv  README.md  report.html

Files are written beside their name, synced and renamed (tlcli.run_writer). A directory can be moved. There is
no pickle.
"""

import contextlib
import copy
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.backbones.zoo import (
    Backbone,
    build_classifier,
    classifier_name,
    load_backbone,
    load_stored,
    timm_config,
)
from tlcli.config import FinetuneConfig, long_name
from tlcli.errors import BackboneError, DataError, UsageError
from tlcli.heads import Head, head_from_state
from tlcli.linear import LinearHead
from tlcli.option_groups import BackboneOptions, Preprocess
from tlcli.run_writer import (
    RUN_HINT,
    RunFiles,
    check_output,
    default_run_dir,
    kept_hint,
    read_facts,
    resume_command,
    run_to_continue,
)

__all__ = [
    "Run",
    "RunWriter",
    "check_output",
    "default_run_dir",
    "model_card",
    "open_run",
    "run_to_continue",
    "versions",
]

MAX_LOGIT_DIFFERENCE = 1e-4
RUN_FACTS = {
    "status",
    "backbone",
    "preprocess",
    "class_names",
    "data",
    "dtype",
    "head",
    "options",
    "trained_on",
}


class RunWriter(RunFiles):
    """A run directory that is being written, with the network and its head; see RunFiles.

    Args:
        path: The run directory.
        config: With absolute paths.
        facts: What run.json says beside status and versions.
        resume: Continue the unfinished run in `path` in place; begin one where there is none.
        write: False in all processes but one: nothing is written or compared then.
    """

    def __init__(
        self,
        path: Path,
        config: FinetuneConfig,
        facts: Mapping[str, Any],
        resume: bool = False,
        write: bool = True,
    ) -> None:
        super().__init__(path, config, {"versions": versions(), **facts}, resume, write)

    def save_model(self, backbone: Backbone, head: Head, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Write the network and its head, after comparing what was written with what was trained.

        A linear head of a timm backbone whose classifier is one linear layer becomes that layer. Otherwise
        the network is stored without a classifier, and the head in head.safetensors.

        Args:
            backbone: Its model holds the trained weights; mode, device and type do not matter, and stay.
            head: The classifier of its pooled features, on the CPU.
            class_names: In the order of the head's outputs.

        Returns:
            Where the head is, for run.json.

        Raises:
            BackboneError: The stored network does not give the logits of the trained one.
        """
        if not self._write:
            return {"facts": head.facts(), "file": None, "classifier": None}
        trained = copy.deepcopy(backbone.model).cpu().float().eval()
        place = None
        if backbone.is_timm:
            network = build_classifier(backbone.architecture, backbone.arguments, len(class_names))
            if isinstance(head, LinearHead) and not head.normalise:
                place = classifier_name(network)
            if place is None:
                network = build_classifier(backbone.architecture, backbone.arguments, 0)
            _fill(network, trained, place, head)
            self._write_tensors("model.safetensors", network.state_dict())
            config = timm_config(backbone, len(class_names) if place else 0, class_names)
        else:
            self._write_tensors("model.safetensors", trained.state_dict())
            stored = str(self.path / "model.safetensors")
            network = load_stored(backbone.architecture, backbone.arguments, stored).model
            config = {  # timm cannot build it; kept in the same file so that every run looks alike
                "architecture": backbone.architecture,
                "num_classes": 0,
                "label_names": list(class_names),
            }
        try:
            _check_agrees(network, place, trained, head, backbone.preprocess.image_size)
        except BackboneError:
            (self.path / "model.safetensors").unlink()
            raise
        if place is None:
            self._write_tensors("head.safetensors", head.state())
        self.write_json("config.json", config)
        return {"facts": head.facts(), "file": "head.safetensors" if place is None else "model.safetensors",
                "classifier": place}  # fmt: skip

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        self.write_bytes(name, save(plain, {"format": "pt"}))


def _fill(network: nn.Module, trained: nn.Module, place: str | None, head: Head) -> None:
    """Load the trained tensors, and those of a head that becomes the classifier, into a fresh network."""
    state = dict(trained.state_dict())
    if place is not None and isinstance(head, LinearHead):
        state |= {f"{place}.weight": head.weight, f"{place}.bias": head.bias}
    network.load_state_dict(state, strict=True)


def _check_agrees(
    network: nn.Module, place: str | None, trained: nn.Module, head: Head, image_size: tuple[int, int]
) -> None:
    """Compare logits on random images, on the CPU in float32, where no device rounds on its own account."""
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = head.logits(trained(images)).cpu()
        stored = network.eval()(images)
        if place is None:
            stored = head.logits(stored).cpu()
    scale = max(1.0, float(expected.abs().max()))
    difference = float((stored - expected).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE * scale:
        raise BackboneError(
            f"The network as stored differs from the trained one by {difference:.2g} in its logits; "
            "the run is not published.",
            hint="This is a bug in tlcli or in this architecture; please report it.",
        )


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": str(timm.__version__),
    }


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        facts: run.json.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes in the order of the head's outputs."""
        return tuple(map(_as_read_here, self.facts["class_names"]))

    def backbone(self) -> Backbone:
        """Load the network of the run, headless.

        Raises:
            BackboneError: Its files are missing or damaged.
        """
        about = self.facts["backbone"]
        if about["source"] in ("torchvision", "classic"):
            weights = str(self.path / "model.safetensors")
            loaded = load_stored(about["architecture"], about["arguments"], weights)
        else:
            loaded = load_backbone(BackboneOptions(backbone=f"local-dir:{self.path}"))
        loaded.name, loaded.license, loaded.arguments = about["name"], about["license"], about["arguments"]
        stored = self.facts["preprocess"]
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        loaded.preprocess = Preprocess(**plain)
        return loaded

    def head(self) -> Head:
        """Load the head of the run.

        Raises:
            DataError: Its file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        stored = self.facts["head"]["stored"]
        path = self.path / stored["file"]
        prefix = f"{stored['classifier']}." if stored["classifier"] else ""
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise DataError(f"The run's {path.name} cannot be read: {error}.", hint=RUN_HINT) from error
        return head_from_state(stored["facts"], state)


def _as_read_here(name: str) -> str:
    """Return the name of a class as this process reads it from a folder, if its writer did not know UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that the writer could not decode
        with contextlib.suppress(UnicodeEncodeError):
            return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


def open_run(path: str | None) -> Run:
    """Return the finished run in a directory.

    Raises:
        UsageError: No run was named.
        DataError: There is no run, it is not finished, or a newer tlcli wrote it.
    """
    if not path:
        raise UsageError("RUN is missing.", hint="Name a run directory, as in runs/pets.")
    directory = Path(path).expanduser()
    facts = read_facts(directory, path)
    status = facts.get("status")
    if status not in {"running", "failed", "interrupted"} and (lost := RUN_FACTS - facts.keys()):
        raise DataError(
            f"Run {path!r} cannot be read: its run.json lacks {', '.join(sorted(lost))}.", hint=RUN_HINT
        )
    if status != "done":
        raise DataError(
            f"Run {path!r} is {status!r}, not done.",
            hint=f"{kept_hint(directory)} Continue it: {resume_command(directory)}".strip(),
        )
    return Run(directory, facts)


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the README.md of a run: what it is, how good it is, how to use it."""
    backbone, data, head = facts["backbone"], facts["data"], facts["head"]
    name = backbone["name"].rstrip("/").rpartition("/")[2]  # of a local folder without where it lies
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, tlcli]",
        f"license: {backbone['license'] or 'unknown'}",
        "---",
        "",
        f"# Classifier of {len(facts['class_names'])} classes on {name}",
        "",
        f"Made by tlcli {facts['tlcli_version']} on {facts['created'][:10]} ({facts['scenario']}).",
        "",
        f"- Classes: {', '.join(n if n.isprintable() else repr(n) for n in facts['class_names'][:50])}"
        + (" ..." if len(facts["class_names"]) > 50 else ""),
        f"- Images: {', '.join(f'{count} {name}' for name, count in data['num_images'].items() if count)}",
        f"- Backbone: {backbone['architecture']}, licence {backbone['license'] or 'not stated'}",
        "- Head: "
        + ", ".join([head["kind"], *(f"{long_name(k)} {v}" for k, v in (head["chosen"] or {}).items())]),
        *_training_line(facts),
    ]
    for name, found in facts["metrics"].items():
        if found:
            low, high = found["interval"]["low"], found["interval"]["high"]
            lines.append(
                f"- {name.replace('_', ' ').capitalize()}: top-1 accuracy {found['top1_accuracy']:.3f} "
                f"(95 % interval {low:.3f} to {high:.3f}, {found['num_images']} images; "
                f"always the most frequent class: {found['majority_baseline']:.3f})"
            )
    lines += ["", "```python", *_usage(facts), "```", ""]
    return "\n".join(lines)


def _training_line(facts: Mapping[str, Any]) -> list[str]:
    """Return how the backbone's units were trained; [] where only a head was."""
    recipe, training = facts.get("recipe"), facts.get("training")
    if not recipe or not training:
        return []
    count = facts["backbone"].get("num_frozen_units")
    augmentation = recipe.get("augmentation") or {}
    rate = training.get("lr") or recipe.get("lr")
    epochs = f"{training['epochs']} epochs"
    if training.get("best_epoch"):
        epochs += (
            f" of which epoch {training['best_epoch']} was kept (chosen on {training.get('selected_on')})"
        )
    parts = [
        f"units 1 to {count} frozen" if count else "no unit frozen",
        epochs,
        f"optimiser {recipe['opt']}" if recipe.get("opt") else "",
        f"learning rate {rate:.2g} ({recipe.get('sched', 'constant')})" if rate else "",
        f"augmentation {augmentation['name']}" if "name" in augmentation else "",
        "started from a linear probe" if recipe.get("head_init") == "probe" else "",
    ]
    return [f"- Training: {facts['scenario']}, " + ", ".join(part for part in parts if part)]


def _usage(facts: Mapping[str, Any]) -> list[str]:
    if facts["head"]["stored"]["classifier"]:
        return ["import timm", "", 'model = timm.create_model("local-dir:RUN", pretrained=True).eval()']
    return [
        "# tlcli predict RUN IMAGES",
        "# The head is in head.safetensors; model.safetensors is the backbone without it.",
    ]
