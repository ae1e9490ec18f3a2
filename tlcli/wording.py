"""Values as words and back: sizes, ages, near misses, text that may hold anything."""

import difflib
import re
from collections.abc import Iterable, Sequence

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


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 tensor", "12 tensors"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def images_text(num_images: int, num_groups: int | None) -> str:
    """Return images for people: "200 images in 20 groups", or "200 images" where they are in none (None)."""
    images = counted(num_images, "image")
    return images if num_groups is None else f"{images} in {counted(num_groups, 'group')}"


def near_misses(word: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the names that `word` may have been meant for, the nearest first; capitals do not count.

    Args:
        word: What was written.
        known: What could have been.
        most: How many to return at the most.
        cutoff: How alike they must be, 0 to 1, as `difflib` measures it.
    """
    by_letters: dict[str, str] = {}
    for name in known:
        by_letters.setdefault(name.lower(), name)
    found = difflib.get_close_matches(word.lower(), by_letters, n=most, cutoff=cutoff)
    return [by_letters[letters] for letters in found]


def did_you_mean(near: Sequence[str]) -> str:
    """Return a question that ends in a space, for a hint that goes on; "" where there is nothing to ask."""
    return f"Did you mean {', '.join(near)}? " if near else ""


# ---- words to values: `name` is the option, for the message -----------------------------------------------

AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_age(text: str, name: str) -> float:
    """Return an age such as "30d", "12h" or "45m" in seconds.

    Raises:
        UsageError: It is not a number with one of the units s, m, h, d, w.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text.strip().lower())
    if not match:
        raise UsageError(
            f"{name} {text!r} is not an age.",
            hint="Use a number and a unit (s, m, h, d or w), such as 45m, 12h or 30d.",
        )
    return float(match[1]) * AGES[match[2]]


def parse_size(text: str, name: str) -> int:
    """Return a size such as "20GB", "500MB" or "1.5GiB" in bytes; GB is 10**9, GiB is 2**30.

    Raises:
        UsageError: It is not a number with a unit.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?:([kmgt]?)(i?)b|([kmgt]))", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(
            f"{name} {text!r} is not a size.", hint="Use a number and a unit, such as 500MB, 20GB or 1.5GiB."
        )
    return int(float(match[1]) * (1024 if match[3] else 1000) ** POWERS[match[2] or match[4] or ""])


def parse_numbers(text: str, name: str, *, minimum: float, maximum: float = 1e9) -> tuple[float, ...]:
    """Return the numbers of a comma-separated grid, in order.

    Raises:
        UsageError: A value is not a number in [minimum, maximum].
    """
    values = []
    for part in str(text).split(","):
        try:
            value = float(part)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise UsageError(
                f"{name} {text!r}: {part.strip()!r} is not a number from {minimum:g} to {maximum:g}.",
                hint=f"Write numbers with commas between, as in {name} 0.001,0.01.",
            )
        values.append(value)
    return tuple(values)


def parse_device(text: str, name: str = "--device") -> tuple[str, int]:
    """Return the kind of a device (auto, cpu, cuda or mps) and its number, 0 where none is given.

    Raises:
        UsageError: It is not a device's name.
    """
    kind, colon, number = text.partition(":")
    numbered = kind == "cuda" and re.fullmatch(r"[0-9]{1,9}", number)
    if kind not in {"auto", "cpu", "cuda", "mps"} or (colon and not numbered):
        raise UsageError(f"{name} {text!r} is not a device.", hint="Expected auto, cpu, cuda, cuda:0 or mps.")
    return kind, int(number or 0)
