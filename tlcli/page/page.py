"""The page itself: one HTML file that refers to nothing outside itself, by report.html.jinja."""

from importlib import resources
from pathlib import Path
from typing import Any

from tlcli.machine import files
from tlcli.wording import printable

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
    environment.filters["printable"] = lambda value: printable(str(value))
    try:
        return environment.from_string(template).render(**values)
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from error


def write(path: Path, page: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: The disk refuses.
    """
    with files.storage_errors("write", path, hint="Name another place with -o FILE.html."):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.publish(path, [page.encode("utf-8")])
