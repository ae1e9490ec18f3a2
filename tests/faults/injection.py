"""Make the n-th call of a kind fail, or end this process, by patching the functions of `os` that are called.

Nothing needs to be installed for this. `tracing.py` does the same to true system calls, where strace exists.
"""

import builtins
import errno
import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FUNCTIONS = {
    "open": ("open",),
    "read": ("pread",),  # and what `open` as a file object reads
    "write": ("write",),
    "fsync": ("fsync",),
    "close": ("close",),
    "rename": ("replace", "rename"),
    "unlink": ("unlink",),
    "mkdir": ("mkdir",),
    "rmdir": ("rmdir",),
    "scandir": ("scandir", "listdir"),
    "stat": ("stat", "lstat", "fstat"),
    "utime": ("utime",),
}
# KILL: SIGKILL before the call. TORN: half of the bytes are written, then SIGKILL. SHORT: fewer bytes than
# asked for. Else an error that the call can give. With a + every later call of the kind fails too.
EFFECTS = {
    "open": "KILL EIO ENOSPC EDQUOT EMFILE EINTR EACCES ESTALE EMFILE+ EACCES+ ENOSPC+",
    "read": "KILL EIO EINTR ESTALE SHORT SHORT+ EIO+ ESTALE+",
    "write": "KILL TORN EIO ENOSPC EDQUOT EINTR SHORT SHORT+ ENOSPC+ EDQUOT+",
    "fsync": "KILL EIO ENOSPC EDQUOT EINTR EIO+",
    "close": "KILL EIO ENOSPC EDQUOT EINTR",
    "rename": "KILL EIO ENOSPC EDQUOT EINTR EACCES ESTALE EACCES+ ENOSPC+",
    "unlink": "KILL EIO EINTR EACCES ESTALE EACCES+",
    "mkdir": "KILL EIO ENOSPC EDQUOT EINTR EACCES ENOSPC+",
    "rmdir": "KILL EIO EINTR EACCES EACCES+",
    "scandir": "KILL EIO EMFILE EINTR EACCES ESTALE EIO+",
    "stat": "KILL EIO EINTR EACCES ESTALE EIO+",
    "utime": "KILL EIO EACCES EINTR",
}
FATAL = ("KILL", "TORN")
CUTTING = ("TORN", "SHORT")


@dataclass(frozen=True)
class Fault:
    """What happens to the `nth` call (from 1) of a kind."""

    call: str
    nth: int
    effect: str

    def __str__(self) -> str:
        return f"{self.effect} at {self.call} {self.nth}"

    @property
    def fatal(self) -> bool:
        """Whether it ends the process."""
        return self.effect in FATAL

    @property
    def breaks_reading(self) -> bool:
        """Whether a shard cannot be read although it was read a second time."""
        return self.call == "read" and self.effect in ("EIO+", "ESTALE+")


class Injector:
    """Patches `os` for the rest of this process's life.

    Args:
        fault: What happens; None only counts and watches.
        fired: Called right before it happens.
        renamed: Called with the target after a rename.
    """

    def __init__(
        self, fault: Fault | None, fired: Callable[[], None], renamed: Callable[[str], None]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._fault = fault
        self._fired = fired
        self._renamed = renamed
        self._seen = 0  # calls that the fault could have happened to
        self._kill = os.kill

    def install(self) -> None:
        for call, names in FUNCTIONS.items():
            for name in names:
                setattr(os, name, self._wrapped(call, getattr(os, name)))
        io.open = builtins.open = self._reader(builtins.open)

    def _wrapped(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            length = len(args[1]) if call == "write" else args[1] if call == "read" else 0
            effect = self._effect(call, length)
            if effect is None:
                result = real(*args, **kwargs)
                if call == "rename":
                    self._renamed(os.fspath(args[1]))
                return result
            return self._disturb(effect, call, real, args, kwargs)

        return patched

    def _effect(self, call: str, length: int) -> str | None:
        """Return what happens to this call, which moves `length` bytes; None is nothing."""
        self.counts[call] += 1
        fault = self._fault
        if fault is None or fault.call != call:
            return None
        effect = fault.effect.rstrip("+")
        if effect in CUTTING and length < 2:  # cannot be cut
            return None
        self._seen += 1
        if self._seen < fault.nth or (self._seen > fault.nth and not fault.effect.endswith("+")):
            return None
        if self._seen == fault.nth:
            self._fired()
        return effect

    def _disturb(
        self, effect: str, call: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if effect in CUTTING:
            part = args[1][: len(args[1]) // 2] if call == "write" else args[1] // 2
            result = real(args[0], part, *args[2:])
            if effect == "SHORT":
                return result
        if effect in FATAL:
            self._kill(os.getpid(), signal.SIGKILL)
        if call == "close":  # Linux closes whatever it answers
            real(*args, **kwargs)
        code = getattr(errno, effect)
        raise OSError(code, os.strerror(code))

    def _reader(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return an `open` whose reads are counted; what is not read is not ours."""
        injector = self

        class Traced(io.FileIO):
            def readall(self) -> bytes:
                return injector._read(super().readall)

            def readinto(self, buffer: Any) -> int:
                return injector._read(lambda: super(Traced, self).readinto(buffer))

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            **kwargs: Any,
        ) -> Any:
            if isinstance(file, int) or set(mode) - set("rbt"):
                return real(file, mode, buffering, encoding, errors, newline, **kwargs)
            raw = Traced(os.fspath(file), "r", opener=lambda path, flags: os.open(path, flags, 0o666))
            buffered = io.BufferedReader(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opened

    def _read(self, real: Callable[[], Any]) -> Any:
        effect = self._effect("read", 0)
        if effect is None:
            return real()
        return self._disturb(effect, "read", real, (), {})
