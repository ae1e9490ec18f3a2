"""What a disk that refuses means to the cache: a StorageError with the way on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlcli.errors import StorageError
from tlcli.machine import files

HINT = "Check the folder's permissions and disk, or set TLCLI_HOME to another folder."
FULL_HINT = (
    "Make room (`tlcli cache prune --max-size SIZE`) or set TLCLI_HOME to a larger disk, then run the same "
    "command again: it continues."
)


def cache_error(action: str, path: Path, error: OSError, num_bytes: int = 0) -> StorageError:
    """Return the StorageError that tells of an OSError in the cache; arguments as `files.storage_error`."""
    return files.storage_error(
        action,
        path,
        error,
        hint=HINT,
        full_hint=FULL_HINT,
        num_bytes=num_bytes,
        kept="finished rows are kept",
    )


@contextmanager
def cache_errors(action: str, path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError; see `cache_error`."""
    try:
        yield
    except OSError as error:
        raise cache_error(action, path, error, num_bytes) from error
