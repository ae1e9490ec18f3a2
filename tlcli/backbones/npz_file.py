"""Arrays of numpy from an `.npz` file that is not trusted: no pickles, and no sizes that are not there."""

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from tlcli.errors import BackboneError

MOST_INFLATED = 4
"""How many times its size a compressed file may claim to hold; weights hardly get smaller."""
HEADER_BYTES = 10_000
UNSOUND = (
    *(
        ValueError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ),
)
NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")  # those that torch has too


def is_npz(path: Path) -> bool:
    """Return whether a zip holds arrays of numpy and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> dict[str, torch.Tensor]:
    """Return the arrays of numbers in an `.npz` file as tensors, by name; other arrays are left out.

    Raises:
        BackboneError: The file is damaged, or claims more than it holds.
    """
    import numpy as np

    try:
        names = _check(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except UNSOUND as error:
        raise BackboneError(
            f"Weights {str(path)!r} are not a sound .npz file: {error}.",
            hint="The file was cut short or altered; get it again.",
        ) from error


def _check(path: Path) -> list[str]:
    """Return the names of the arrays of numbers; sizes that are not there raise ValueError."""
    size, numbers = path.stat().st_size, []
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        if len({member.filename for member in members}) < len(members):
            raise ValueError("an array is there twice")
        if claimed > MOST_INFLATED * size:
            raise ValueError(f"its arrays claim {claimed:,} bytes of {size:,}")
        for member in members:
            shape, dtype = _header(archive, member)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(
                    f"array {member.filename!r} claims the shape {list(shape)}, more than it has"
                )
            if dtype.str[1:] in NUMBERS and dtype.isnative:
                numbers.append(member.filename.removesuffix(".npy"))
    return numbers


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], Any]:
    """Return shape and type as an array's own header states them."""
    import numpy as np

    with archive.open(member) as file:
        start = io.BytesIO(file.read(HEADER_BYTES))
    version = np.lib.format.read_magic(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(start, max_header_size=HEADER_BYTES)
    return shape, dtype
