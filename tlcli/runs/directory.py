"""Where a run directory may be written, and its files, so that a kill at any moment loses nothing. No torch.

Files are written beside their name, synced and renamed. A run that is overwritten is first renamed to
.NAME.replaced-1 (-2, -3 where that is taken) beside it, and removed once the new one is done. So an
interrupted --overwrite is repeated or resumed as it is, and what it was to replace is named until then.
"""

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tlcli import __version__
from tlcli.config.commands import FinetuneConfig
from tlcli.config.fields import to_options
from tlcli.errors import DataError, Interrupted, StorageError, UsageError
from tlcli.machine import files
from tlcli.runs.continuing import (
    EARLIER,
    NOT_STORED,
    check_same,
    goes_on,
    is_done,
    keep_earlier,
    remove_earlier,
    remove_results,
    resume_command,
)
from tlcli.warned import warn

SCHEMA = "tlcli.run/1"
RUN_HINT = "Expected a directory that `tlcli finetune` wrote."
DISK_HINT = "Check the folder's permissions and the disk's space, then run it again with --resume."


def default_run_dir(data: str, backbone: str, scenario: str) -> Path:
    """Return runs/<data>-<backbone>-<scenario>, with -2, -3 where that is taken."""
    parts = (Path(data.rstrip("/")).stem or "data", backbone.rstrip("/").rpartition("/")[2], scenario)
    name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") or "x" for part in parts)
    base = Path("runs") / name
    number = 1
    path = base
    while os.path.lexists(path) or kept_runs(path):
        number += 1
        path = base.with_name(f"{name}-{number}")
    return path


def kept_runs(path: Path) -> list[Path]:
    """Return the runs that were to be replaced by one in `path` which is not done yet, oldest first."""
    found: list[Path] = []
    while os.path.lexists(kept := _kept_path(path, len(found) + 1)):
        found.append(kept)
    return found


def _kept_path(path: Path, number: int) -> Path:
    parent, name = os.path.split(os.path.abspath(path))
    return Path(parent, f".{name}.replaced-{number}")


def check_run_dir(config: FinetuneConfig) -> None:
    """Refuse a run directory that must not be written, before any work.

    Raises:
        UsageError: The directory exists, and neither --overwrite nor --resume is given; or it is no run; or
            --resume is given and the run is done and asked for no more epochs; or an interrupted --overwrite
            keeps the run that was there.
        DataError: The run to continue cannot be read.
        StorageError: The directory cannot be looked at.
    """
    if config.output is None:
        return
    path = Path(config.output)
    with _storage_errors("use", path):
        _check_output(path, config)


def _check_output(path: Path, config: FinetuneConfig) -> None:
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    if not above.is_dir():
        raise UsageError(
            f"Output {config.output!r} cannot be made: {str(above)!r} is no folder.",
            hint="Choose another -o.",
        )
    is_run = (path / "run.json").is_file()
    if not os.path.lexists(path) or _was_begun(path):
        if (kept := kept_runs(path)) and not (config.overwrite or config.resume):
            raise UsageError(
                f"Output {config.output!r} is that of an --overwrite that was interrupted;"
                f" the run it was to replace is {str(kept[-1])!r}.",
                hint="Add --overwrite to replace it, move it back, or choose another -o.",
            )
    elif config.resume:
        if not is_run:
            raise UsageError(
                f"Output {config.output!r} is no run, so --resume does not continue it.",
                hint="Choose another -o.",
            )
        _continuable(path, config)
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
        UsageError: The run is done, and asked for no more epochs.
        DataError: It cannot be read.
        StorageError: The directory cannot be looked at.
    """
    path = Path(config.output or "")
    with _storage_errors("use", path):
        return _continuable(path, config) if config.resume and (path / "run.json").is_file() else None


def _was_begun(path: Path) -> bool:
    """Return whether a folder is empty, or holds no more than a run that was killed before its run.json."""
    return path.is_dir() and all(files.TEMPORARY.fullmatch(item.name) for item in path.iterdir())


def _continuable(path: Path, config: FinetuneConfig) -> dict[str, Any]:
    """Return run.json of a run that can be continued.

    Raises:
        UsageError: It is done, and asked for no more epochs.
        DataError: It cannot be read.
    """
    facts = read_facts(path, str(path))
    if is_done(facts) and not goes_on(config, facts):
        kept = "".join(f" The run it replaced is still in {str(run)!r}." for run in kept_runs(path))
        raise UsageError(
            f"Run {str(path)!r} is done; there is nothing to resume.{kept}",
            hint="Choose another -o, or add --overwrite instead of --resume.",
        )
    return facts


def read_facts(directory: Path, path: str) -> dict[str, Any]:
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
        raise DataError(f"Run {path!r} {what}.", hint=kept_hint(directory) or RUN_HINT) from None
    except (OSError, ValueError) as error:
        raise DataError(f"Run {path!r} cannot be read: {error}.", hint=RUN_HINT) from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        found = facts.get("schema") if isinstance(facts, dict) else None
        raise DataError(f"Run {path!r} has schema {found!r}; this tlcli reads {SCHEMA!r}.", hint=RUN_HINT)
    return facts


def kept_hint(path: Path) -> str:
    """Return where the run is that an unfinished one was to replace; "" where there is none."""
    kept = kept_runs(path)
    return f"The run that was to be replaced is kept in {str(kept[-1])!r}." if kept else ""


def _storage_errors(action: str, path: Path) -> contextlib.AbstractContextManager[None]:
    return files.storage_errors(action, path, hint=DISK_HINT)


class RunDirectory:
    """A run directory that is being written; a context manager.

    Its run.json says `running` from the start; when the block ends with an exception `interrupted` or
    `failed`; `done` after `finish`. A run that is overwritten is kept beside it until then.

    Args:
        path: The run directory.
        config: With absolute paths.
        facts: What run.json says beside schema, status, date and tlcli's version.
        resume: Continue the run in `path` in place; begin one where there is none. A finished run that goes
            on with more epochs is kept in RUN/earlier until those are done.
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
            **facts,
        }
        self._config = config
        self._resume = resume
        self._goes_on = False  # from a finished run
        self.writes = write

    def __enter__(self) -> Self:
        """Begin or continue the run; where that fails, a run to be overwritten is back in its place.

        Raises:
            UsageError: The run to continue is done, or was begun with other options or data.
            DataError: It cannot be read.
            StorageError: The directory cannot be written.
        """
        with _storage_errors("write", self.path):
            if self._resume and (self.path / "run.json").is_file():
                before = _continuable(self.path, self._config)
                self._goes_on = is_done(before)
                if (self.path / "config.yaml").is_file():  # else it was killed before any work
                    check_same(self.path, self._config, before, self.facts)
                created = before.get("created", self.facts["created"])
                self.facts |= {"created": created, "resumed": before.get("resumed", 0) + 1}
            if self.writes:
                self._begin()
        return self

    def _begin(self) -> None:
        with contextlib.suppress(OSError):  # a replaced run whose removal was interrupted; it can wait
            for left in files.stale_temporaries(self.path.parent):
                files.remove_tree(left)
        aside = None
        try:
            if self.path.is_dir() and not self._resume and not _was_begun(self.path):
                kept = _kept_path(self.path, len(kept_runs(self.path)) + 1)
                os.replace(self.path, kept)
                aside = kept
                files.sync_folder(kept.parent)
            files.make_folder(self.path)
            for left in files.stale_temporaries(self.path):
                files.remove_tree(left)
            if self._goes_on:
                keep_earlier(self.path)
            self.write_json("run.json", self.facts)  # first, so that a folder without one is none of ours
            if self.facts.get("continued"):
                remove_results(self.path)
            self.write_yaml("config.yaml", to_options(self._config, without=NOT_STORED))
        except BaseException:
            if aside:
                self._put_back(aside)
            raise

    def _put_back(self, aside: Path) -> None:
        """Undo `_begin`: nothing of the new run is worth keeping yet."""
        try:
            files.remove_tree(self.path)
            os.replace(aside, self.path)
        except OSError:
            self._warn_of_kept_runs()

    def _warn_of_kept_runs(self) -> None:
        for kept in kept_runs(self.path):
            warn("replaced_run_kept", f"the run that was to be replaced is kept in {kept}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._note_end(error)
        elif self.writes and self.facts["status"] == "done":
            self._remove_kept()
            remove_earlier(self.path)

    def _remove_kept(self) -> None:
        """Remove the runs that this one replaced; each goes out of sight whole, and then file by file."""
        for kept in reversed(kept_runs(self.path)):
            gone = files.temporary_path(kept.parent)
            try:
                os.replace(kept, gone)
                files.remove_tree(gone)
            except OSError as error:
                left = gone if os.path.lexists(gone) else kept
                text = f"the replaced run in {left} could not be removed: {error.strerror}"
                warn("replaced_run_left", text)

    def _note_end(self, error: BaseException) -> None:
        """Note in run.json how the block ended, and in the error how to go on."""
        if isinstance(error, Interrupted | KeyboardInterrupt):
            self.facts |= {"status": "interrupted"}
            hint = f"Continue it: {resume_command(self.path)}"
            if isinstance(error, Interrupted):
                error.hint = hint
            else:
                error.add_note(hint)
        else:
            self.facts |= {"status": "failed"}
        self.facts |= {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(StorageError):  # of a full disk, which `error` tells of already
            self.write_json("run.json", self.facts)
        if self.writes:
            self._warn_of_kept_runs()
            if self.facts.get("continued"):
                warn("replaced_run_kept", f"the run as it was is kept in {self.path / EARLIER}")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Add facts to run.json and mark the run as done.

        Raises:
            StorageError: The disk refuses; the run is not done.
        """
        self.facts |= {**facts, "status": "done"}
        self.write_json("run.json", self.facts)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file durably.

        Raises:
            StorageError: The disk refuses; an earlier file of the name is as it was.
        """
        if not self.writes:
            return
        with _storage_errors("write", self.path / name):
            files.publish(self.path / name, [content])

    def write_text(self, name: str, text: str) -> None:
        """Write a text file durably."""
        self.write_bytes(name, text.encode("utf-8", "surrogateescape"))

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
