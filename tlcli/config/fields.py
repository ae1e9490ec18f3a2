"""What an option is: a dataclass field that becomes a flag, a key of a YAML file and a line of the help.

cli/options.py turns the fields into flags, `--config FILE.yaml` fills them by their long names, and a run
stores them in config.yaml.
"""

import dataclasses
from dataclasses import field
from typing import Any, TypeVar

from tlcli.errors import UsageError


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    envvar: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Return a dataclass field that is a `--flag`, with what its help says and its range (inclusive)."""
    return field(
        default=default,
        metadata={
            "help": help,
            "flags": flags,
            "metavar": metavar,
            "envvar": envvar,
            "minimum": minimum,
            "maximum": maximum,
        },
    )


def argument(default: Any, help: str, metavar: str) -> Any:
    """Return a dataclass field that is a positional argument."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "argument": True})


def same(group: type, name: str) -> Any:
    """Return the field `name` of an option group, to be used in another configuration."""
    base = group.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=base.default, metadata=base.metadata)


def grid(text: str, name: str, *, minimum: float, maximum: float = 1e9) -> tuple[float, ...]:
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


T = TypeVar("T")


# ---- reading and writing configurations -------------------------------------------------------------------


def long_name(field_name: str) -> str:
    """Return the option's long name without dashes in front: val_fraction -> val-fraction."""
    return field_name.replace("_", "-")


def to_options(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration as long option name -> plain value, in declaration order."""
    return {
        long_name(item.name): list(value) if isinstance(value := getattr(config, item.name), tuple) else value
        for item in dataclasses.fields(config)
        if item.name not in without
    }


def from_options(kind: type[T], options: dict[str, Any]) -> T:
    """Return a configuration from long or field names, ignoring names `kind` does not have."""
    known = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {key.replace("-", "_"): value for key, value in options.items()}
    return kind(**{key: value for key, value in values.items() if key in known})
