"""Reading a file of weights without trusting it: safetensors, numpy, and pickles of tensors alone.

A file is recognised by its content, never by its suffix. Nothing in it is executed: pickles go through
`torch.load(weights_only=True)`, and what that refuses is refused here, with the way to convert it. Sizes are
checked before memory is allocated: a zip with compressed records can claim a thousand times its size.
"""

import argparse
import hashlib
import json
import os
import pickle
import shlex
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tlcli.backbones.npz_file import is_npz, read_npz
from tlcli.errors import BackboneError
from tlcli.machine.memory import is_out_of_memory

StateDict = dict[str, torch.Tensor]

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)
"""Keys under which training scripts nest the tensors, best first; averaged weights win, as in timm."""
MAX_HEADER_BYTES = 10_000_000  # of a safetensors file; the largest models have a tenth of it
LOCAL_HEADER_BYTES = 30  # of each record of a zip, before its name
PICKLE = b"\x80"  # how every pickle since protocol 2 begins

CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "f = lambda o, p='': {p[:-1]: o.detach().contiguous().clone()} if torch.is_tensor(o) else "
    "{k: t for n, x in (o.state_dict() if hasattr(o, 'state_dict') else o if isinstance(o, dict) else "
    "dict(enumerate(o)) if isinstance(o, (list, tuple)) else {}).items() "
    "for k, t in f(x, f'{p}{n}.').items()}; "
    "save_file(f(d), sys.argv[1] + '.safetensors')"
)
"""A program that gathers every tensor of a file, wherever it is nested, and runs what the file may hold."""

UNSCRIPT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "d = torch.jit.load(sys.argv[1], map_location='cpu').state_dict(); "
    "save_file({k: t.contiguous().clone() for k, t in d.items()}, sys.argv[1] + '.safetensors')"
)
"""The same for a TorchScript program."""


def how_to_convert(path: str | os.PathLike[str], program: str = CONVERT) -> str:
    """Return a hint with the command that makes a safetensors file of one that is not read here."""
    return (
        f'Where you trust the file, convert it once: python -c "{program}" {shlex.quote(str(path))} '
        f"(this runs code the file may hold), and use {str(path) + '.safetensors'!r}."
    )


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Return the named tensors of a safetensors or PyTorch weights file, on the CPU.

    Tensors nested under `state_dict`, `model` and the like are unwrapped; entries that are no tensors
    (optimiser state, arguments) are left out.

    Args:
        path: A regular file: safetensors, a zip written by `torch.save`, or its older format.

    Raises:
        BackboneError: The file is missing, damaged, compressed, or holds more than tensors.
    """
    return _unwrap(read_checkpoint(path), Path(path))


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Return what a weights file holds, on the CPU: tensors and plain data, as nested.

    Args:
        path: A regular file: safetensors, a zip written by `torch.save`, its older format, or `.npz`.

    Raises:
        BackboneError: The file is missing, damaged, compressed, or holds more than tensors.
    """
    path = Path(path)
    head = _read_head(path)
    if head.startswith(b"version https://git-lfs"):
        raise BackboneError(
            f"Weights {str(path)!r} are a git-lfs pointer, not the weights themselves.",
            hint="Fetch the file with `git lfs pull`, or download it again.",
        )
    if head.startswith(b"PK\x03\x04"):
        if is_npz(path):
            return read_npz(path)
        _check_zip(path)
        return _torch_load(path)
    if _is_safetensors(head):
        return _load_safetensors(path)
    if _is_tar(path, head):
        raise BackboneError(
            f"Weights {str(path)!r} are in the tar format of PyTorch before 0.1.10, which can run code.",
            hint=how_to_convert(path),
        )
    if head.startswith(PICKLE):
        return _torch_load(path)
    raise BackboneError(
        f"Weights {str(path)!r} are neither a safetensors file nor one of torch.save.",
        hint="Expected a .safetensors, .pth, .pt or .npz file; was a web page saved in its place?",
    )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


DAMAGED = "The file was cut short or altered; get it again."


def _read_head(path: Path) -> bytes:
    """Return the first bytes of a regular file; raise BackboneError where there is none."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            hint = (
                "For a folder in timm's format, use --backbone local-dir:PATH."
                if stat.S_ISDIR(mode)
                else None
            )
            raise BackboneError(f"Weights {str(path)!r} are {kind}; a file is expected.", hint=hint)
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise BackboneError(
            f"Weights {str(path)!r} cannot be read: {error.strerror or error}.",
            hint="Check the path and its permissions.",
        ) from error
    if not head:
        raise BackboneError(f"Weights {str(path)!r} are an empty file.", hint="Get the file again.")
    return head


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{"


def _is_tar(path: Path, head: bytes) -> bool:
    return head[257:262] == b"ustar" or (path.suffix == ".tar" and head[:1] not in (b"\x80", b"P"))


def _load_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_header(path)
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, OSError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BackboneError(
            f"Weights {str(path)!r} are not a sound safetensors file: {error}.",
            hint=DAMAGED,
        ) from error


def _check_header(path: Path) -> None:
    """Refuse a safetensors header that is longer than its file or names a tensor twice."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > size - 8:
            raise BackboneError(
                f"Weights {str(path)!r} are damaged: the header claims {header_bytes:,} bytes of {size:,}.",
                hint=DAMAGED,
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise BackboneError(
                f"Weights {str(path)!r} are not a sound safetensors file: the header has {header_bytes:,} "
                f"bytes; at most {MAX_HEADER_BYTES:,} are expected.",
                hint=DAMAGED,
            )
        header = file.read(header_bytes)
    try:
        json.loads(header, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:
        raise BackboneError(
            f"Weights {str(path)!r} are not a sound safetensors file: its header is unreadable ({error}).",
            hint=DAMAGED,
        ) from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; readers differ in which of two equal names they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _check_zip(path: Path) -> None:
    """Refuse a torch zip whose records are compressed, overlap or claim more than the file holds."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BackboneError(
            f"Weights {str(path)!r} are a damaged zip: {error}.",
            hint=DAMAGED,
        ) from error
    if any("/code/" in record.filename for record in records):
        raise BackboneError(
            f"Weights {str(path)!r} are a TorchScript program, not a state dict.",
            hint=how_to_convert(path, UNSCRIPT),
        )
    if what := _odd_record(records, size):
        raise BackboneError(
            f"Weights {str(path)!r} were not written by torch.save: {what}; the file has {size:,} bytes.",
            hint="PyTorch stores its records uncompressed, one after another; get the original file.",
        )


def _odd_record(records: list[zipfile.ZipInfo], size: int) -> str | None:
    """Return what is wrong with the records of a zip, in the order of their places, or None."""
    names = set()
    ends = [record.header_offset for record in records[1:]] + [size]
    for record, end in zip(records, ends, strict=True):
        if record.compress_type != zipfile.ZIP_STORED:
            return f"record {record.filename!r} is compressed"
        if record.filename in names:
            return f"record {record.filename!r} is there twice"
        if record.header_offset + LOCAL_HEADER_BYTES + record.file_size > end:
            return f"record {record.filename!r} claims {record.file_size:,} bytes, more than there are for it"
        names.add(record.filename)
    return None


def _torch_load(path: Path) -> Any:
    """Load a pickle of tensors; anything more than plain data is refused by torch's restricted unpickler."""
    try:
        plain = torch.serialization.safe_globals(_plain_data())
        with plain, warnings.catch_warnings(action="ignore"):  # they are addressed to programmers
            return torch.load(path, map_location=_stored(path), weights_only=True)
    except BackboneError:
        raise
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"Weights {str(path)!r} hold more than tensors{_foreign(path)}, and loading them could run code.",
            hint=how_to_convert(path),
        ) from error
    except Exception as error:  # a damaged or foreign file can fail anywhere in the unpickler
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            f"Weights {str(path)!r} are no safetensors or torch.save file, or are damaged: {reason}",
            hint="Expected a .safetensors, .pth or .pt file with a state dict.",
        ) from error


def _plain_data() -> list[Any]:
    """Return what a checkpoint may name beside tensors, as `safe_globals` takes it.

    timm's own training checkpoints carry their arguments as a Namespace, and training loops keep their best
    accuracy as a numpy number. Both are plain data: building them runs nothing of the file.
    """
    import numpy as np

    # numpy's own function, under the names that numpy 2 and numpy 1 give it in a pickle.
    build = np.float64().__reduce__()[0]  # numpy._core.multiarray.scalar
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    kinds = {type(np.dtype(code)) for code in (*np.typecodes["AllInteger"], *np.typecodes["Float"], "?")}
    return [argparse.Namespace, np.dtype, *kinds, *((build, name) for name in names)]


def _stored(path: Path) -> Callable[[Any, str], Any]:
    """Return a map_location that keeps storages on the CPU, and refuses more bytes of them than the file has.

    A storage is mapped before it is filled, so that what a pickle claims takes no memory.
    """
    size, claimed = path.stat().st_size, 0

    def place(storage: Any, _location: str) -> Any:  # torch.UntypedStorage, whatever its stubs say
        nonlocal claimed
        claimed += storage.nbytes()
        if claimed > size:
            raise BackboneError(
                f"Weights {str(path)!r} are damaged: their tensors claim {claimed:,} bytes of {size:,}.",
                hint=DAMAGED,
            )
        return storage

    return place


def _foreign(path: Path) -> str:
    """Return which globals of a zip pickle torch does not allow, as part of a sentence."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the scanner reads zips only, and not every damaged one
        return ""
    return f" ({some(names)})" if names else ""


def _unwrap(loaded: Any, path: Path) -> StateDict:
    """Return the mapping of names to tensors inside a checkpoint."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        nested = next(
            (loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping) and loaded[key]), None
        )
        if nested is None or len(tensors) > len(nested):
            if tensors and all(isinstance(key, str) for key in tensors):
                return tensors
            break
        loaded = nested
    kind = type(loaded).__name__
    found = f" with the keys {some([str(key) for key in loaded])}" if isinstance(loaded, Mapping) else ""
    raise BackboneError(
        f"Weights {str(path)!r} hold no state dict: a {kind}{found}.",
        hint="Expected a mapping of names to tensors, bare or under `state_dict` or `model`.",
    )


def some(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Return up to `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
