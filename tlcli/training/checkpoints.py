"""Checkpoints: whole or absent, checked by hash before they are used, never executed.

    RUN/checkpoints/step-0000123/state.safetensors    tensors
                                 state.json           facts
                                 complete.json        size and SHA-256 of the two

A checkpoint is written into a temporary folder, synced and renamed, so that a process killed at any moment
leaves the earlier ones as they were. A step that is saved again becomes step-0000123.1: the earlier one goes
only when the later one is in place.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli.errors import BackboneError, StorageError
from tlcli.machine import files
from tlcli.training.optimizer_state import DTYPES
from tlcli.warned import warn

SCHEMA = "tlcli.checkpoint/1"
FOLDER = "checkpoints"
TENSORS, FACTS, COMPLETE = "state.safetensors", "state.json", "complete.json"
KEPT = 2
NAME = re.compile(r"step-([0-9]{7,18})(?:\.([0-9]{1,9}))?")
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}  # others say nothing of the file


@dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    Attributes:
        step: Optimiser steps done.
        tensors: By name, on the CPU.
        facts: As they were saved.
        path: Its folder.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: The run directory; nothing is made in it before the first `save`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = Path(run_dir) / FOLDER
        self._damaged: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint durably, then remove all but the newest two, and what is damaged or partial.

        Args:
            step: Optimiser steps done, at least 0. The last saved of several of one step is the newest.
            tensors: Any dense tensors of the types in DTYPES, on any device.
            facts: What JSON holds: dicts with string keys, lists, strings, numbers (NaN and infinities
                too, as Python's json writes them), booleans, None.

        Returns:
            The folder of the checkpoint.

        Raises:
            StorageError: The disk refuses; the earlier checkpoints are as they were.
            TypeError: JSON does not hold the facts, or a tensor is of another type.
        """
        _check_plain(facts, "facts")
        text = json.dumps(facts).encode("ascii")
        header = _header(tensors)
        num_bytes = len(text) + len(header) + sum(tensor.nbytes for tensor in tensors.values())
        temporary = files.temporary_path(self.folder)
        try:
            files.make_folder(self.folder)
            os.mkdir(temporary)
            try:
                path = self._write(temporary, step, {TENSORS: _contents(header, tensors), FACTS: [text]})
            except BaseException:
                files.remove_tree(temporary)
                raise
            self._tidy(path)
        except OSError as error:
            raise _storage_error("write", self.folder, error, num_bytes) from error
        return path

    def newest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint, or None; what is damaged is named in a warning.

        Raises:
            BackboneError: There are checkpoints and none is intact: beginning anew without a word would
                throw away what was trained. Or a file is what its hash says and yet no state: it was not
                written by tlcli.
            StorageError: A file cannot be read for a reason that says nothing of its content.
        """
        paths: list[Path] | None = None
        reasons: list[str] = []
        while paths != (paths := self._paths()):  # again, should another process save meanwhile
            reasons.clear()
            for path in reversed(paths):
                try:
                    return _load(path)
                except _Damaged as damage:
                    warn("checkpoint_skipped", f"checkpoint {path} is skipped: {damage}")
                    self._damaged.add(path)
                    reasons.append(f"{path.name}: {damage}")
                except OSError as error:
                    raise _storage_error("read", path, error) from error
        if reasons:
            raise BackboneError(
                f"None of the checkpoints in {str(self.folder)!r} is intact. {'; '.join(reasons)}.",
                hint=f"Remove {self.folder} to train from the start.",
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints, as when a run is done.

        Raises:
            StorageError: The disk refuses.
        """
        try:
            files.remove_tree(self.folder)
        except OSError as error:
            raise _storage_error("remove", self.folder, error) from error

    def _write(self, temporary: Path, step: int, contents: Mapping[str, Any]) -> Path:
        listed = {}
        for name, chunks in contents.items():
            summed = _Summed(chunks)
            files.publish(temporary / name, summed)
            listed[name] = {"bytes": summed.num_bytes, "sha256": summed.digest.hexdigest()}
        complete = json.dumps({"schema": SCHEMA, "step": step, "files": listed}, indent=2) + "\n"
        files.publish(temporary / COMPLETE, [complete.encode("ascii")])
        number = max((again + 1 for other, again in map(_place, self._paths()) if other == step), default=0)
        while True:
            path = self.folder / (f"step-{step:07d}" + (f".{number}" if number else ""))
            try:
                files.move(temporary, path)
            except OSError as error:  # another process took the name
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                number += 1
            else:
                return path

    def _paths(self) -> list[Path]:
        """Return the folders of checkpoints, whole or not, oldest first."""
        found = [path for path in files.subfolders(self.folder) if NAME.fullmatch(path.name)]
        return sorted(found, key=_place)

    def _tidy(self, saved: Path) -> None:
        """Remove what is not needed once `saved` is in place."""
        paths = self._paths()
        whole = [path for path in paths if path not in self._damaged and (path / COMPLETE).is_file()]
        kept = {*whole[-KEPT:], saved}
        # complete.json goes first, by its name, so that one removed in part is not taken for a whole one
        for path in [*(path for path in paths if path not in kept), *files.stale_temporaries(self.folder)]:
            files.remove_tree(path)
        self._damaged.clear()


class _Damaged(Exception):
    """A checkpoint that is not whole; the text says what is wrong."""


class _Summed:
    """Chunks that are counted and hashed while they are written."""

    def __init__(self, chunks: Any) -> None:
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self._chunks = chunks

    def __iter__(self) -> Iterator[memoryview]:
        for chunk in self._chunks:
            view = memoryview(chunk)
            self.digest.update(view)
            self.num_bytes += view.nbytes
            yield view


def _place(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2] or 0)


def _storage_error(action: str, path: Path, error: OSError, num_bytes: int = 0) -> StorageError:
    return files.storage_error(
        f"{action} checkpoint", path, error,
        hint="Check the folder's permissions and disk, then continue with --resume.",
        full_hint="Make room, then continue the run with --resume.",
        num_bytes=num_bytes, kept="earlier checkpoints are kept",
    )  # fmt: skip


def _check_plain(value: Any, where: str) -> None:
    """Refuse what JSON would give back as something else, such as a tuple."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; expected strings")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_plain(item, f"{where}.{number}")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where} is a {type(value).__name__}; expected what JSON holds")


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes before the data of a safetensors file; tensors of large elements come first."""
    header: dict[str, Any] = {}
    begin = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise TypeError(f"tensor {name!r} is {tensor.layout} of {tensor.dtype}, which cannot be stored")
        place = [begin, begin + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _contents(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, so that no second copy of all tensors is made."""
    yield header
    for name in _order(tensors):
        if tensors[name].numel():
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield plain.view(torch.uint8).numpy().data


def _load(path: Path) -> Checkpoint:
    """Return a checkpoint after comparing its files with its list; the bytes that were hashed are used.

    Raises:
        _Damaged: They differ, or there is no list.
        BackboneError: They do not differ, and are no state all the same.
        OSError: A file cannot be read for a reason that says nothing of its content.
    """
    step, _ = _place(path)
    name = COMPLETE
    try:
        complete = json.loads(_read(path / COMPLETE, 1 << 20))
        if complete["schema"] != SCHEMA or complete["step"] != step:
            raise _Damaged(f"its {COMPLETE} is of {complete['schema']!r}, step {complete['step']!r}")
        listed = [(complete["files"][each]["bytes"], complete["files"][each]["sha256"], each)
                  for each in (TENSORS, FACTS)]  # fmt: skip
        found = {}
        for num_bytes, sha256, name in listed:
            found[name] = _read(path / name, num_bytes)
            if len(found[name]) != num_bytes:
                raise _Damaged(f"its {name} ends after {len(found[name])} of {num_bytes} bytes")
            if hashlib.sha256(found[name]).hexdigest() != sha256:
                raise _Damaged(f"its {name} is not the one that was written")
    except OSError as error:
        if error.errno not in DAMAGE:
            raise
        raise _Damaged(f"its {name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"its {COMPLETE} is not a list of files") from error
    return Checkpoint(step, *_parsed(path, found[TENSORS], found[FACTS]), path)


def _read(path: Path, num_bytes: int) -> bytes:
    """Return at most `num_bytes` bytes of a file, whatever its list claims that it holds; never of a link."""
    with files.opened(path) as fd:
        return files.read_at(fd, min(num_bytes, os.fstat(fd).st_size), 0)


def _parsed(path: Path, state: bytes, text: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = TENSORS
    try:
        tensors = load(state)
        name = FACTS
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError(f"it holds a {type(facts).__name__}")
    except (ValueError, KeyError, RuntimeError, RecursionError, SafetensorError) as error:
        raise BackboneError(
            f"Checkpoint {str(path / name)!r} cannot be loaded: {error}.",
            hint=f"It was not written by tlcli; remove {path} to continue from an earlier one.",
        ) from error
    return tensors, facts
