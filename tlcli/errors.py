"""Every error tlcli raises on purpose, and the exit code each one ends the command with.

    TlcliError
    ├── UsageError       2   the command line contradicts itself or names what does not exist
    ├── DataError        3   images, folders, CSV files or run directories that cannot be used
    ├── BackboneError    4   a backbone or its weights cannot be found, loaded or trusted
    ├── ResourceError    5   device, memory, disk or permission
    │   ├── DeviceError      the asked-for device is missing or out of memory
    │   └── StorageError     a folder cannot be written, read or trusted, or the disk is full
    ├── CheckFailed      6   a gate or verification failed; carries the document to print
    └── Interrupted    130   128 + the number of the signal, with the state saved

Anything else that escapes is a bug: a traceback and exit code 1. A message says what happened, with the
path or value; what was expected; and what to do next.
"""

import signal
from collections.abc import Mapping
from typing import Any


class TlcliError(Exception):
    """Base of every error a user can cause or meet.

    Args:
        message: What happened, with the path or value, and what was expected.
        hint: What to type or change next; printed on a line of its own.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TlcliError):
    """The command line or configuration contradicts itself or names what does not exist."""

    exit_code: int = 2


class DataError(TlcliError):
    """Images, a folder, a CSV file or a run directory cannot be used."""

    exit_code: int = 3


class BackboneError(TlcliError):
    """A backbone or its weights cannot be found, loaded or trusted."""

    exit_code: int = 4


class ResourceError(TlcliError):
    """The machine cannot do what was asked: device, memory, disk or permission."""

    exit_code: int = 5


class DeviceError(ResourceError):
    """The asked-for device is missing or out of memory."""


class StorageError(ResourceError):
    """A folder cannot be written, read or trusted, or the disk is full."""


class CheckFailed(TlcliError):
    """A gate or verification failed; the document is still printed.

    Args:
        message: Which check failed, with the value found and the value asked for.
        document: The result document of the command, as without the gate.
        hint: What to do next.
    """

    exit_code: int = 6

    def __init__(self, message: str, *, document: Mapping[str, Any], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.document = document


class Interrupted(TlcliError):
    """A signal ended the command after its state was saved.

    Args:
        signal_number: Such as 2 for SIGINT, 15 for SIGTERM; the exit code is 128 more.
        hint: How to continue.
    """

    def __init__(self, signal_number: int, *, hint: str = "The same command continues it.") -> None:
        known = {item.value: item.name for item in signal.Signals}
        name = known.get(signal_number, str(signal_number))
        super().__init__(f"Interrupted by {name}; finished work is kept.", hint=hint)
        self.exit_code = 128 + signal_number
