"""What an option is: a dataclass field that becomes a flag, a key of a YAML file and a line of the help.

cli/options.py turns the fields into flags, `--config FILE.yaml` fills them by their long names, and a run
stores them in config.yaml.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar, Unpack

from tlcli.errors import UsageError
from tlcli.machine import paths

LARGEST = 2**63 - 1  # what a generator takes as its seed; numbers beyond are of no use to any option

T = TypeVar("T")


class About(TypedDict, total=False):
    """What an option says of itself, beside its default and its help.

    Attributes:
        flags: Its names on the command line, where it has others than its own.
        metavar: What stands for the value in the help.
        envvar: The environment variable that is read where no flag is given.
        minimum: Smallest number that is taken.
        maximum: Largest number that is taken.
        parse: (text, the option's name) -> the value that the text stands for, kept by `Options`; raises
            UsageError. Not called for None.
    """

    flags: tuple[str, ...]
    metavar: str
    envvar: str
    minimum: float
    maximum: float
    parse: Callable[[str, str], Any]


def option(default: Any, help: str, **about: Unpack[About]) -> Any:
    """Return a dataclass field that is a `--flag`."""
    unset = {"flags": (), "metavar": None, "envvar": None, "minimum": None, "maximum": None, "parse": None}
    return field(default=default, metadata={"help": help, **unset, **about})


def argument(default: Any, help: str, metavar: str) -> Any:
    """Return a dataclass field that is a positional argument."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "argument": True})


def same(group: type, name: str) -> Any:
    """Return the field `name` of an option group, to be used in another configuration."""
    base = group.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=base.default, metadata=base.metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every group of options and every configuration is: values that were checked and parsed once.

    A group that has something to check beyond the ranges of its fields defines `check`. A configuration made
    of several groups runs the check of each, whatever it defines itself.
    """

    def __post_init__(self) -> None:
        """Check and parse every value.

        Raises:
            UsageError: A value is empty, out of range or cannot be read, or values contradict each other.
        """
        parsed: dict[str, Any] = {}
        object.__setattr__(self, "_parsed", parsed)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _check_value(item, value)
            parse = item.metadata.get("parse")
            parsed[item.name] = value if parse is None or value is None else parse(value, option_name(item))
        for group in reversed(type(self).__mro__):
            if check := vars(group).get("check"):
                check(self)

    def parsed(self, name: str) -> Any:
        """Return what the text of the field `name` stands for: None where it is None."""
        return vars(self)["_parsed"][name]


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a number out of range, NaN and infinity among them, and empty text.

    Empty text is what an unset variable of a script leaves: `--weights "$WEIGHTS"` would silently use others.

    Raises:
        UsageError: The value is one of these.
    """
    about = item.metadata
    if isinstance(value, int | float):
        low, high = about.get("minimum"), about.get("maximum")
        low, high = -LARGEST if low is None else low, LARGEST if high is None else high
        if not low <= value <= high:
            raise UsageError(
                f"{option_name(item)} {value} is out of range.",
                hint=f"Expected a number from {low} to {high}.",
            )
    if "" in (value if isinstance(value, list | tuple) else [value]):
        raise UsageError(
            f"{option_name(item)} is empty; expected {about['help'][0].lower()}{about['help'][1:]}",
            hint="Leave it out, or check the variable that it comes from.",
        )


class HasWorkers:
    """For configurations with the field `workers`."""

    workers: int | None

    @property
    def num_workers(self) -> int:
        """Return the number of threads that decode images: as given, or one per core."""
        return self.workers or paths.default_workers()


class HasCacheLimit:
    """For configurations with the field `cache_max_size`, which `parse_size` parses."""

    @property
    def cache_max_bytes(self) -> int:
        """Return the size in bytes that the cache must not grow beyond."""
        return int(vars(self)["_parsed"]["cache_max_size"])


# ---- reading and writing configurations -------------------------------------------------------------------


def option_name(item: dataclasses.Field[Any]) -> str:
    """Return what a message calls an option: `--val-fraction`, or `DATA` for an argument."""
    return str(item.metadata["metavar"]) if item.metadata.get("argument") else f"--{long_name(item.name)}"


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
