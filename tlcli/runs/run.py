"""A finished run, opened: its facts, network and head."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.backbones.backbone import Backbone
from tlcli.backbones.zoo import load_backbone, load_stored
from tlcli.config.backbone import BackboneOptions, Preprocess
from tlcli.errors import DataError, UsageError
from tlcli.heads.head import Head, head_from_state
from tlcli.runs.continuing import resume_command
from tlcli.runs.directory import RUN_HINT, kept_hint, read_facts

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

    @property
    def trains_units(self) -> bool:
        """Return whether units of the backbone were trained, not a head alone."""
        return bool(self.facts.get("scenario", "feature-extraction") != "feature-extraction")

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
