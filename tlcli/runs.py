"""The run directory: the only place where one is written, and read back.

    config.yaml            every option, resolved: `tlcli finetune --config RUN/config.yaml` repeats the run
    run.json               what the run is: status, versions, data, classes, backbone, head, metrics
    metrics.jsonl          one line a head of the grid, or an epoch
    model.safetensors      with config.json the tuned network, in timm's format
    head.safetensors       the head, where it is not the network's own linear classifier
    evaluation-SPLIT.json  predictions-SPLIT.csv  bad_images.csv  README.md  report.html

Files are written beside their name, synced and renamed. A directory can be moved. There is no pickle.
"""

import datetime
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli import __version__
from tlcli.backbones.zoo import Backbone, build_classifier, classifier_name, load_backbone, timm_config
from tlcli.cache import files
from tlcli.config import BackboneOptions, FinetuneConfig, Preprocess, long_name, to_options
from tlcli.errors import BackboneError, DataError, UsageError
from tlcli.heads import Head, head_from_state
from tlcli.linear import LinearHead

logger = logging.getLogger(__name__)

SCHEMA = "tlcli.run/1"
MAX_LOGIT_DIFFERENCE = 1e-4
RUN_HINT = "Expected a directory that `tlcli finetune` wrote."
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
NOT_STORED = ("output", "overwrite")  # so that repeating a run from its config.yaml writes beside it


def default_run_dir(data: str, backbone: str, scenario: str) -> Path:
    """Return runs/<data>-<backbone>-<scenario>, with -2, -3 where that is taken."""
    parts = (Path(data.rstrip("/")).stem or "data", backbone.rstrip("/").rpartition("/")[2], scenario)
    name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") or "x" for part in parts)
    base = Path("runs") / name
    number = 1
    path = base
    while os.path.lexists(path):
        number += 1
        path = base.with_name(f"{name}-{number}")
    return path


def check_output(config: FinetuneConfig) -> None:
    """Refuse a run directory that must not be written, before any work.

    Raises:
        UsageError: The directory exists, and --overwrite is not given or it is no run.
    """
    if config.output is None:
        return
    path = Path(config.output)
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    if not above.is_dir():
        raise UsageError(
            f"Output {config.output!r} cannot be made: {str(above)!r} is no folder.",
            hint="Choose another -o.",
        )
    if not os.path.lexists(config.output):
        return
    is_run = (path / "run.json").is_file()
    if not config.overwrite and not (path.is_dir() and not any(path.iterdir())):
        what = "a run" if is_run else "there"
        raise UsageError(
            f"Output {config.output!r} is {what} already.", hint="Choose another -o, or add --overwrite."
        )
    if config.overwrite and not is_run and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(
            f"Output {config.output!r} is no run, so --overwrite does not delete it.",
            hint="Choose another -o.",
        )


class RunWriter:
    """A run directory that is being written; a context manager.

    Its run.json says `running` from the start, `failed` when the block ends with an exception, `done` after
    `finish`. A run that is overwritten is kept beside it until then.
    """

    def __init__(self, path: Path, config: FinetuneConfig, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tlcli_version": __version__,
            "versions": versions(),
            **facts,
        }
        self._config = config
        self._replaced: Path | None = None

    def __enter__(self) -> "RunWriter":
        if self.path.is_dir() and any(self.path.iterdir()):
            self._replaced = self.path.with_name(f".{self.path.name}.replaced-{os.getpid()}")
            self.path.rename(self._replaced)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_yaml("config.yaml", to_options(self._config, without=NOT_STORED))
        self.write_json("run.json", self.facts)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.facts |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            self.write_json("run.json", self.facts)
            if self._replaced:
                logger.warning("the run that was to be replaced is kept in %s", self._replaced)
            return
        if self._replaced:
            shutil.rmtree(self._replaced)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Add facts to run.json and mark the run as done."""
        self.facts |= {**facts, "status": "done"}
        self.write_json("run.json", self.facts)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file durably."""
        files.publish(self.path / name, [text.encode("utf-8", "surrogateescape")])

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a JSON file durably; NaN is refused."""
        self.write_text(name, json.dumps(document, indent=2, allow_nan=False) + "\n")

    def write_lines(self, name: str, documents: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines durably."""
        self.write_text(name, "".join(json.dumps(item, allow_nan=False) + "\n" for item in documents))

    def write_yaml(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a YAML file durably."""
        import yaml

        self.write_text(name, yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True))

    def save_model(self, backbone: Backbone, head: Head, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Write the network and its head, after comparing what was written with what was trained.

        A linear head of a timm backbone whose classifier is one linear layer becomes that layer. Otherwise
        the network is stored without a classifier, and the head in head.safetensors.

        Returns:
            Where the head is, for run.json.

        Raises:
            BackboneError: The stored network does not give the logits of the trained one.
        """
        is_timm = backbone.source != "torchvision"
        network, place = backbone.model, None
        num_classes = 0
        if is_timm and isinstance(head, LinearHead) and not head.normalise:
            merged = build_classifier(backbone.architecture, backbone.arguments, len(class_names))
            place = classifier_name(merged)
            if place is not None:
                num_classes = len(class_names)
                _merge(merged, backbone, place, head)
                _check_agrees(merged, backbone, head)
                network = merged
        self._write_tensors("model.safetensors", network.state_dict())
        if place is None:
            self._write_tensors("head.safetensors", head.state())
        if is_timm:
            config = timm_config(backbone, num_classes, class_names)
        else:  # timm cannot build it; kept in the same file so that every run looks alike
            config = {
                "architecture": backbone.architecture,
                "num_classes": 0,
                "label_names": list(class_names),
            }
        self.write_json("config.json", config)
        return {"facts": head.facts(), "file": "head.safetensors" if place is None else "model.safetensors",
                "classifier": place}  # fmt: skip

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        files.publish(self.path / name, [save(plain, {"format": "pt"})])


def _merge(network: nn.Module, backbone: Backbone, place: str, head: LinearHead) -> None:
    state = dict(backbone.model.state_dict())
    state |= {f"{place}.weight": head.weight, f"{place}.bias": head.bias}
    network.load_state_dict(state, strict=True)


def _check_agrees(network: nn.Module, backbone: Backbone, head: Head) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *backbone.preprocess.image_size, generator=generator)
    with torch.inference_mode():
        device = next(backbone.model.parameters()).device
        expected = head.logits(backbone.model(images.to(device)).cpu().float())
        stored = network.eval()(images)
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
        return tuple(self.facts["class_names"])

    def backbone(self) -> Backbone:
        """Load the network of the run, headless.

        Raises:
            BackboneError: Its files are missing or damaged.
        """
        about = self.facts["backbone"]
        if about["source"] == "torchvision":
            weights = str(self.path / "model.safetensors")
            loaded = load_backbone(BackboneOptions(backbone=about["architecture"], weights=weights))
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


def open_run(path: str | None) -> Run:
    """Return the finished run in a directory.

    Raises:
        UsageError: No run was named.
        DataError: There is no run, it is not finished, or a newer tlcli wrote it.
    """
    if not path:
        raise UsageError("RUN is missing.", hint="Name a run directory, as in runs/pets.")
    directory = Path(path).expanduser()
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is no run" if directory.exists() else "does not exist"
        raise DataError(f"Run {path!r} {what}.", hint=RUN_HINT) from None
    except (OSError, ValueError) as error:
        raise DataError(f"Run {path!r} cannot be read: {error}.", hint=RUN_HINT) from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        found = facts.get("schema") if isinstance(facts, dict) else None
        raise DataError(f"Run {path!r} has schema {found!r}; this tlcli reads {SCHEMA!r}.", hint=RUN_HINT)
    if facts.get("status") not in {"running", "failed"} and (lost := RUN_FACTS - facts.keys()):
        raise DataError(
            f"Run {path!r} cannot be read: its run.json lacks {', '.join(sorted(lost))}.", hint=RUN_HINT
        )
    if facts.get("status") != "done":
        raise DataError(
            f"Run {path!r} is {facts.get('status')!r}, not done.",
            hint=f"Repeat it: tlcli finetune --config {directory / 'config.yaml'}",
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
        f"- Classes: {', '.join(facts['class_names'][:50])}"
        + (" ..." if len(facts["class_names"]) > 50 else ""),
        f"- Images: {', '.join(f'{count} {name}' for name, count in data['num_images'].items() if count)}",
        f"- Backbone: {backbone['architecture']}, licence {backbone['license'] or 'not stated'}",
        f"- Head: {head['kind']}, " + ", ".join(f"{long_name(k)} {v}" for k, v in head["chosen"].items()),
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


def _usage(facts: Mapping[str, Any]) -> list[str]:
    if facts["head"]["stored"]["classifier"]:
        return ["import timm", "", 'model = timm.create_model("local-dir:RUN", pretrained=True).eval()']
    return [
        "# tlcli predict RUN IMAGES",
        "# The head is in head.safetensors; model.safetensors is the backbone without it.",
    ]
