"""Collecting new rows of an entry until it is time to publish them."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcli.cache.key import RowKey
from tlcli.cache.shard import KEY_BYTES, Bytes2D, RowFormat, pack_key
from tlcli.errors import BackboneError
from tlcli.warned import warn

FLUSH_BYTES = 32 << 20
FLUSH_SECONDS = 30.0


class Writer:
    """Collects rows and publishes them as shards; a context manager for one thread.

    Leaving the block publishes what is left, also when an exception or Ctrl-C ends it, so that finished work
    is kept; not after the disk or the guard refused.

    Attributes:
        published: Names of the shards written so far.
        rows_written: Rows in them.
    """

    def __init__(
        self,
        row_format: RowFormat,
        publish: Callable[[Bytes2D, Bytes2D], str],
        guard: Callable[[], None] | None,
        flush_bytes: int,
        timer: tuple[float, Callable[[], float]],
    ) -> None:
        self.published: list[str] = []
        self.rows_written = 0
        self._format = row_format
        self._publish = publish
        self._guard = guard
        self._flush_seconds, self._clock = timer
        capacity = max(1, flush_bytes // row_format.row_bytes)
        self._rows = np.empty((capacity, row_format.row_bytes), np.uint8)
        self._keys = np.empty((capacity, KEY_BYTES), np.uint8)
        self._waiting: set[RowKey] = set()
        self._since = 0.0
        self._refused = False

    def add(self, key: RowKey, row: NDArray[Any], name: str | None = None) -> None:
        """Take a row (it is copied), and publish when it is time.

        Args:
            key: SHA-256 of the image's bytes in hex, and the view.
            row: [*row_shape]; float32 for "fp32", uint16 bit patterns for "bf16".
            name: The image's name for messages.

        Raises:
            BackboneError: The row is not finite.
            StorageError: It was time to publish, and the disk refused; shards published before are kept.
            ValueError: The key, the type or the shape is wrong.
        """
        row_format = self._format
        packed = pack_key(key)
        if row.shape != row_format.shape or row.dtype != row_format.numpy_dtype:
            raise ValueError(
                f"row is {row.dtype} {row.shape}: expected {row_format.numpy_dtype} {row_format.shape}"
            )
        finite = (row & 0x7F80) != 0x7F80 if row_format.dtype == "bf16" else np.isfinite(row)
        if not finite.all():
            raise BackboneError(
                f"The features of {name or 'the image with SHA-256 ' + key[0]}, view {key[1]}, are not finite"
                f" ({int((~finite).sum())} of {row.size} values); they are not cached.",
                hint="Try --dtype fp32; if that does not help, the backbone's weights are broken.",
            )
        if key in self._waiting:
            return
        if not self._waiting:
            self._since = self._clock()
        count = len(self._waiting)
        self._keys[count] = np.frombuffer(packed, np.uint8)
        self._rows[count] = np.ascontiguousarray(row).reshape(-1).view(np.uint8)
        self._waiting.add(key)
        if count + 1 == len(self._rows) or self._clock() - self._since >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Publish the rows that wait, durably.

        Raises:
            StorageError: The disk refused; the message has the bytes needed.
        """
        count = len(self._waiting)
        if not count:
            return
        try:
            if self._guard is not None:
                self._guard()
            self.published.append(self._publish(self._keys[:count], self._rows[:count]))
        except Exception:
            self._refused = True
            raise
        self.rows_written += count
        self._waiting.clear()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        except KeyboardInterrupt as interrupt:
            error = interrupt
            raise
        finally:
            if error is not None and not self._refused:
                self._keep()

    def _keep(self) -> None:
        """Publish what waits although an exception is on its way."""
        try:
            self.flush()
        except Exception as error:
            warn("rows_not_kept", f"{len(self._waiting)} finished rows could not be kept: {error}")
