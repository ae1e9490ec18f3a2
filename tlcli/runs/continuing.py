"""What going on with a run means: with which options and data, and what is kept of it meanwhile. No torch.

An unfinished run goes on as it was begun. A finished one whose backbone was trained goes on with more epochs;
until those are done it is kept whole in RUN/earlier, so that nothing is lost by an interruption.
"""

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcli.config.commands import FinetuneConfig
from tlcli.config.fields import from_options, to_options
from tlcli.config.yaml_file import read_config_file
from tlcli.errors import UsageError
from tlcli.machine import files
from tlcli.warned import warn

EARLIER = "earlier"
CHECKPOINTS = "checkpoints"
# What tells of a finished run, and would be untrue of one that goes on.
RESULTS = re.compile(
    r"(model|head)\.safetensors|config\.json|README\.md|report\.html|bad_images\.csv"
    r"|(evaluation|predictions)-\w+\.\w+"
)
NOT_STORED = (
    "output",
    "overwrite",
    "resume",
)  # so that repeating a run from its config.yaml writes beside it
# What may differ where a run is continued: none of it changes the result. Data is compared by its digest.
MAY_DIFFER = (*NOT_STORED, "data", "workers", "max_bad", "checkpoint_minutes", "tracker", "cache_max_size")


def resume_command(path: Path) -> str:
    """Return the command line that continues a run."""
    config, output = shlex.quote(str(path / "config.yaml")), shlex.quote(str(path))
    return f"tlcli finetune --config {config} -o {output} --resume"


def is_done(facts: Mapping[str, Any]) -> bool:
    """Return whether a run is finished, by its run.json."""
    return facts.get("status") == "done"


def planned_epochs(facts: Mapping[str, Any]) -> int | None:
    """Return the epochs up to which a run was to train its backbone; None where it trained a head alone."""
    recipe = facts.get("recipe")
    if not recipe:
        return None
    return int((facts.get("continued") or {}).get("after_epoch", 0)) + int(recipe["epochs"])


def goes_on(config: FinetuneConfig, facts: Mapping[str, Any]) -> bool:
    """Return whether a finished run is asked for more epochs than it has."""
    epochs = planned_epochs(facts)
    return is_done(facts) and None not in (config.epochs, epochs) and (config.epochs or 0) > (epochs or 0)


def source(path: Path, facts: Mapping[str, Any]) -> Path | None:
    """Return the directory of the finished run that a run goes on from; None where it goes on from none.

    Args:
        path: The run.
        facts: Its run.json: of a finished run, or of one that has begun to go on.
    """
    if is_done(facts):
        return path
    return path / EARLIER if facts.get("continued") else None


# ---- what must not have changed ---------------------------------------------------------------------------


def check_same(path: Path, config: FinetuneConfig, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other options or data than it was begun with.

    Args:
        path: The run.
        config: The options now.
        before: run.json of the run.
        now: What run.json would say of a new run.

    Raises:
        UsageError: They differ; names the differences.
    """
    check_options(path, config, before)
    check_data(path, before, now)
    # Equal options can still mean something else on another machine, or to another version.
    for name in ("device", "dtype") if is_done(before) else ("device", "dtype", "recipe"):
        earlier, later = (facts.get(name) or {} for facts in (before, now))
        for key in sorted((earlier.keys() | later.keys()) - {"reason", "norm_reason"}):
            old_value, new_value = (_decided(facts.get(key)) for facts in (earlier, later))
            if old_value != new_value:
                text = f"{name}: {key} was {old_value}, now {new_value}; results may differ"
                warn("continued_elsewhere", text)


def check_options(path: Path, config: FinetuneConfig, before: Mapping[str, Any]) -> None:
    """Refuse other options than those of the run; of a finished one the number of epochs may differ.

    Raises:
        UsageError: They differ; names the differences.
    """
    known = set(FinetuneConfig.__dataclass_fields__)
    stored = from_options(FinetuneConfig, read_config_file(path / "config.yaml", known))
    without: tuple[str, ...] = MAY_DIFFER
    if is_done(before) and planned_epochs(before) is not None:
        without += ("epochs",)
    old, new = (to_options(each, without=without) for each in (stored, config))
    if before.get("continued") and "epochs" in old:  # config.yaml is written after run.json
        old["epochs"] = (before.get("options") or {}).get("epochs", old["epochs"])
    if changes := [f"--{name} was {old[name]}, now {new[name]}" for name in old if old[name] != new[name]]:
        hint = f"Continue it with its own, {resume_command(path)}, or begin anew with --overwrite."
        if is_done(before):
            hint = "It is done. Choose another -o, or begin anew with --overwrite."
        raise UsageError(f"Run {str(path)!r} was begun with other options: {'; '.join(changes)}.", hint=hint)


def check_data(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse other data than that of the run.

    Raises:
        UsageError: It differs; says how.
    """
    old_data, new_data = (facts.get("data") or {} for facts in (before, now))
    if old_data.get("digest") == new_data.get("digest"):
        return
    was, found = (_counts(data) for data in (old_data, new_data))
    what = f"{was} images, now {found}" if was != found else "images, classes or splits changed"
    old_names, new_names = (set(facts.get("class_names") or ()) for facts in (before, now))
    changes = [f"class {name!r} is gone" for name in sorted(old_names - new_names)]
    changes += [f"class {name!r} is new" for name in sorted(new_names - old_names)]
    raise UsageError(
        f"The data is not what run {str(path)!r} was begun with: {'; '.join([what, *changes[:10]])}.",
        hint="Bring back the data as it was, or begin anew with --overwrite.",
    )


def _decided(value: Any) -> Any:
    """Return what was decided, of the caching without its reason and costs."""
    return value.get("where", value) if isinstance(value, Mapping) else value


def _counts(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in (data.get("num_images") or {}).items() if count)


# ---- what is kept of a finished run -----------------------------------------------------------------------


def keep_earlier(path: Path) -> None:
    """Keep the files of a finished run in RUN/earlier, whole or not at all.

    Checkpoints that are left of it go: what goes on must not take them for its own.

    Raises:
        OSError: The disk refuses; the run is as it was.
    """
    for name in (CHECKPOINTS, EARLIER):
        files.remove_tree(path / name)
    temporary = files.temporary_path(path)
    os.mkdir(temporary)
    try:
        for entry in files.list_folder(path):
            if entry.is_file(follow_symlinks=False):
                _copy(Path(entry.path), temporary / entry.name)
        files.sync_folder(temporary)
        files.move(temporary, path / EARLIER)
    except BaseException:
        files.remove_tree(temporary)
        raise


def _copy(old: Path, new: Path) -> None:
    """Give a file a second name; copy it where the file system has no such thing. Files are never changed."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copyfile(old, new, follow_symlinks=False)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())


def remove_results(path: Path) -> None:
    """Remove what is true of the earlier run alone; RUN/earlier has it."""
    for entry in files.list_folder(path):
        if RESULTS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            files.remove_tree(Path(entry.path))


def remove_earlier(path: Path) -> None:
    """Remove RUN/earlier, once the run is done; what the disk refuses goes when it goes on again."""
    with contextlib.suppress(OSError):
        files.remove_tree(path / EARLIER)
