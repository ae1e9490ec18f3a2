"""The page: one HTML file that refers to nothing outside itself."""

from importlib import resources
from pathlib import Path
from typing import Any

from tlcli.errors import StorageError
from tlcli.machine import files

# ---- writing ----------------------------------------------------------------------------------------------


def render(**values: Any) -> str:
    """Return the page. Everything from the run is escaped; only our own figures are markup."""
    import jinja2

    template = resources.files("tlcli.page").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3f}"
    environment.filters["printable"] = _printable
    try:
        return environment.from_string(template).render(**values)
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from error


def _printable(text: object) -> str:
    """Return `text` with control characters and bytes that are no UTF-8 as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in str(text)
    )


def write(path: Path, page: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: The disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.publish(path, [page.encode("utf-8")])
    except OSError as error:
        raise StorageError(
            f"{str(path)!r} cannot be written: {error.strerror}.",
            hint="Name another place with -o FILE.html.",
        ) from error
