"""Values as words and back: sizes, ages, near misses, text that may hold anything."""

import re

from tlcli.errors import UsageError


def printable(text: str) -> str:
    """Return `text` with control characters and undecodable bytes shown as escapes, safe for a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def size_text(num_bytes: float) -> str:
    """Return bytes for people, in decimal units: 1536 -> "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_age(text: str) -> float:
    """Return an age such as "30d", "12h" or "45m" in seconds.

    Raises:
        UsageError: It is no number with one of the units s, m, h, d, w.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text.strip().lower())
    if not match:
        raise UsageError(
            f"{text!r} is not an age.", hint="Write a number and s, m, h, d or w: 45m, 12h, 30d."
        )
    return float(match[1]) * AGES[match[2]]


POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Return a size such as "20GB", "500MB" or "1.5GiB" in bytes; GB is 10**9, GiB is 2**30.

    Raises:
        UsageError: It is no number with a unit.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?:([kmgt]?)(i?)b|([kmgt]))", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size.", hint="Write a number and a unit: 500MB, 20GB, 1.5GiB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** POWERS[match[2] or match[4] or ""])
