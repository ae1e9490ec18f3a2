"""The run directory: the only place where one is written, and read back.

    config.yaml            every option, resolved: `tlcli finetune --config RUN/config.yaml` repeats the run
    run.json               what the run is: status, versions, data, classes, backbone, head, metrics
    metrics.jsonl          one line a head of the grid, or an epoch
    checkpoints/           until the run is done: what --resume continues from (tlcli.checkpoints)
    model.safetensors      with config.json the tuned network, in timm's format
    head.safetensors       the head, where it is not the network's own linear classifier
    evaluation-SPLIT.json  predictions-SPLIT.csv  bad_images.csv  README.md  report.html

Files are written beside their name, synced and renamed. A directory can be moved. There is no pickle.
"""

import contextlib
import copy
import datetime
import json
import logging
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli import __version__
from tlcli.backbones.zoo import (
    Backbone,
    build_classifier,
    classifier_name,
    load_backbone,
    load_stored,
    timm_config,
)
from tlcli.cache import files
from tlcli.config import FinetuneConfig, from_options, long_name, read_config_file, to_options
from tlcli.errors import BackboneError, DataError, Interrupted, UsageError
from tlcli.heads import Head, head_from_state
from tlcli.linear import LinearHead
from tlcli.option_groups import BackboneOptions, Preprocess

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
NOT_STORED = (
    "output",
    "overwrite",
    "resume",
)  # so that repeating a run from its config.yaml writes beside it
# What may differ where a run is continued: none of it changes the result. Data is compared by its digest.
MAY_DIFFER = (*NOT_STORED, "data", "workers", "max_bad", "checkpoint_minutes", "tracker")


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
        UsageError: The directory exists, and neither --overwrite nor --resume is given; or it is no run; or
            --resume is given and the run is done.
        DataError: The run to continue cannot be read.
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
    if not os.path.lexists(config.output) or (path.is_dir() and not any(path.iterdir())):
        return
    is_run = (path / "run.json").is_file()
    if config.resume:
        if is_run:
            _unfinished(path)
        elif not _was_begun(path):
            raise UsageError(
                f"Output {config.output!r} is no run, so --resume does not continue it.",
                hint="Choose another -o.",
            )
    elif not config.overwrite:
        what = "a run" if is_run else "there"
        raise UsageError(
            f"Output {config.output!r} is {what} already.",
            hint="Choose another -o, add --overwrite, or continue an unfinished run with --resume.",
        )
    elif not is_run:
        raise UsageError(
            f"Output {config.output!r} is no run, so --overwrite does not delete it.",
            hint="Choose another -o.",
        )


def run_to_continue(config: FinetuneConfig) -> dict[str, Any] | None:
    """Return run.json of the run that --resume continues, or None where one begins.

    A plan takes from it what it would otherwise measure anew, and so perhaps decide otherwise.

    Raises:
        UsageError: The run is done.
        DataError: It cannot be read.
    """
    path = Path(config.output or "")
    return _unfinished(path) if config.resume and (path / "run.json").is_file() else None


def _was_begun(path: Path) -> bool:
    """Return whether a folder holds no more than a run that was killed before its run.json was there."""
    return path.is_dir() and all(files.TEMPORARY.fullmatch(item.name) for item in path.iterdir())


def _unfinished(path: Path) -> dict[str, Any]:
    """Return run.json of a run that can be continued.

    Raises:
        UsageError: It is done.
        DataError: It cannot be read.
    """
    facts = _read_facts(path, str(path))
    if facts.get("status") == "done":
        raise UsageError(
            f"Run {str(path)!r} is done; there is nothing to resume.",
            hint="Choose another -o, or add --overwrite instead of --resume.",
        )
    return facts


def _check_same(
    path: Path, config: FinetuneConfig, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Refuse to continue a run with other options or data than it was begun with.

    Raises:
        UsageError: They differ; names the differences.
    """
    known = set(FinetuneConfig.__dataclass_fields__)
    stored = from_options(FinetuneConfig, read_config_file(path / "config.yaml", known))
    old, new = (to_options(each, without=MAY_DIFFER) for each in (stored, config))
    if changes := [f"--{name} was {old[name]}, now {new[name]}" for name in old if old[name] != new[name]]:
        raise UsageError(
            f"Run {str(path)!r} was begun with other options: {'; '.join(changes)}.",
            hint=f"Continue it with its own, {_resume_command(path)}, or begin anew with --overwrite.",
        )
    old_data, new_data = (facts.get("data") or {} for facts in (before, now))
    if old_data.get("digest") != new_data.get("digest"):
        was, found = (_counts(data) for data in (old_data, new_data))
        raise UsageError(
            f"The data is not what run {str(path)!r} was begun with: "
            + (f"{was} images, now {found}." if was != found else "images, classes or splits changed."),
            hint="Bring back the data as it was, or begin anew with --overwrite.",
        )
    # Equal options can still mean something else on another machine, or to another version.
    for name in ("device", "dtype", "recipe"):
        earlier, later = (facts.get(name) or {} for facts in (before, now))
        for key in sorted((earlier.keys() | later.keys()) - {"reason", "norm_reason"}):
            if (old_value := earlier.get(key)) != (new_value := later.get(key)):
                logger.warning("%s: %s was %s, now %s; results may differ", name, key, old_value, new_value)


def _counts(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in (data.get("num_images") or {}).items() if count)


def _resume_command(path: Path) -> str:
    config, output = shlex.quote(str(path / "config.yaml")), shlex.quote(str(path))
    return f"tlcli finetune --config {config} -o {output} --resume"


class RunWriter:
    """A run directory that is being written; a context manager.

    Its run.json says `running` from the start; when the block ends with an exception `interrupted` or
    `failed`; `done` after `finish`. A run that is overwritten is kept beside it until then.

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
        self._resume = resume
        self._write = write
        self._replaced: Path | None = None

    def __enter__(self) -> "RunWriter":
        """Begin or continue the run.

        Raises:
            UsageError: The run to continue is done, or was begun with other options or data.
            DataError: It cannot be read.
        """
        if self._resume and (self.path / "run.json").is_file():
            before = _unfinished(self.path)
            if (self.path / "config.yaml").is_file():  # else it was killed before any work
                _check_same(self.path, self._config, before, self.facts)
            created = before.get("created", self.facts["created"])
            self.facts |= {"created": created, "resumed": before.get("resumed", 0) + 1}
        elif self._write and self.path.is_dir() and any(self.path.iterdir()) and not self._resume:
            self._replaced = self.path.with_name(f".{self.path.name}.replaced-{os.getpid()}")
            self.path.rename(self._replaced)
        if self._write:
            files.make_folder(self.path)
            for left in files.stale_temporaries(self.path):
                files.remove_tree(left)
        self.write_json("run.json", self.facts)  # first, so that a folder without one is none of ours
        self.write_yaml("config.yaml", to_options(self._config, without=NOT_STORED))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._tell(error)
        elif self._replaced:
            shutil.rmtree(self._replaced)

    def _tell(self, error: BaseException) -> None:
        """Note in run.json how the block ended, and in the error how to go on."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.facts |= {"status": "interrupted"}
            hint = f"Continue it: {_resume_command(self.path)}"
            if isinstance(error, Interrupted):
                error.hint = hint
            else:
                error.add_note(hint)
        else:
            self.facts |= {"status": "failed"}
        self.facts |= {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(OSError):  # of a full disk, which `error` tells of already
            self.write_json("run.json", self.facts)
        if self._replaced:
            logger.warning("the run that was to be replaced is kept in %s", self._replaced)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Add facts to run.json and mark the run as done."""
        self.facts |= {**facts, "status": "done"}
        self.write_json("run.json", self.facts)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file durably."""
        if not self._write:
            return
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
        files.publish(self.path / name, [save(plain, {"format": "pt"})])


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
        return tuple(self.facts["class_names"])

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


def open_run(path: str | None) -> Run:
    """Return the finished run in a directory.

    Raises:
        UsageError: No run was named.
        DataError: There is no run, it is not finished, or a newer tlcli wrote it.
    """
    if not path:
        raise UsageError("RUN is missing.", hint="Name a run directory, as in runs/pets.")
    directory = Path(path).expanduser()
    facts = _read_facts(directory, path)
    status = facts.get("status")
    if status not in {"running", "failed", "interrupted"} and (lost := RUN_FACTS - facts.keys()):
        raise DataError(
            f"Run {path!r} cannot be read: its run.json lacks {', '.join(sorted(lost))}.", hint=RUN_HINT
        )
    if status != "done":
        raise DataError(
            f"Run {path!r} is {status!r}, not done.", hint=f"Continue it: {_resume_command(directory)}"
        )
    return Run(directory, facts)


def _read_facts(directory: Path, path: str) -> dict[str, Any]:
    """Return run.json.

    Args:
        directory: The run.
        path: How messages name it.

    Raises:
        DataError: There is no run, or a newer tlcli wrote it.
    """
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
    return facts


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
