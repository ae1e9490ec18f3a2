"""Turns a configuration dataclass into the options of a command, and runs the command with it.

Precedence: flag > environment variable > --config file > default. Names, defaults, ranges and help stand in
the groups of `config` alone.
"""

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from tlcli.cli.output import Output
from tlcli.config.backbone import BackboneOptions, FeatureOptions, WeightsFileError
from tlcli.config.data import AugmentOptions, DataOptions
from tlcli.config.fields import long_name
from tlcli.config.head import HeadOptions
from tlcli.config.training import TrainingOptions
from tlcli.config.yaml_file import read_config_file
from tlcli.errors import CheckFailed, Interrupted, UsageError
from tlcli.machine import paths

PANELS = {
    DataOptions: "Data",
    BackboneOptions: "Backbone",
    FeatureOptions: "Features and hardware",
    AugmentOptions: "Augmentation",
    HeadOptions: "Head and training",
    TrainingOptions: "Training of the backbone",
}

interrupting_signal = 2  # set by the handler of app.py; SIGINT unless another came


class ReaderGone(Exception):
    """Whoever read our stdout left (| head)."""


def command(
    config_type: type, *, examples: tuple[str, str], dry_run: bool = False
) -> Callable[[Callable[[Output, Any], None]], Callable[..., None]]:
    """Make `function(out, config)` a command whose options are the fields of `config_type`.

    Args:
        config_type: A frozen dataclass of `config`.
        examples: Two command lines that end the help.
        dry_run: Whether the command plans before long work and so has --dry-run.
    """

    def decorate(function: Callable[[Output, Any], None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            if values.pop("offline") or paths.flag("TLCLI_OFFLINE"):
                os.environ["TLCLI_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
            out = Output(
                json_document=values.pop("json") or paths.flag("TLCLI_JSON"),
                quiet=values.pop("quiet"),
                verbose=values.pop("verbose"),
                dry_run=values.pop("dry_run", False),
            )
            values.pop("config")
            plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            try:
                function(out, config_type(**plain))
            except KeyboardInterrupt as stop:
                notes = getattr(stop, "__notes__", ())  # of the run that it stopped: how to continue it
                raise Interrupted(interrupting_signal, **({"hint": notes[-1]} if notes else {})) from None
            except BrokenPipeError:  # typer would end with 1, the code of a bug
                raise ReaderGone from None
            except WeightsFileError as error:
                raise _with_architecture(error) from None
            except CheckFailed as failed:
                if not out.printed:
                    out.result(f"{function.__name__}.check", failed.document)
                raise
            finally:
                out.progress.finish()

        parameters = [*_fields(config_type), *_common(config_type)]
        if dry_run:
            parameters.append(
                _parameter(
                    "dry_run", Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")], False
                )
            )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__ = function.__name__
        run.__doc__ = function.__doc__
        run.epilog = "Examples:\n\n" + "\n\n".join(examples)  # type: ignore[attr-defined]
        return run

    return decorate


def _with_architecture(error: WeightsFileError) -> WeightsFileError:
    """Return the error with the architecture that the file looks like, where it can be read safely."""
    from tlcli.backbones.weights import architecture_of

    if not os.path.isfile(error.path):
        return error
    return WeightsFileError(error.path, error.name, architecture_of(error.path))


def _fields(config_type: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(config_type)
    parameters = []
    for field in dataclasses.fields(config_type):
        about, hint = field.metadata, hints[field.name]
        default: Any = field.default
        if about.get("argument"):
            if typing.get_origin(hint) is tuple:
                hint, default = list[str], list(default)
            info = typer.Argument(help=about["help"], metavar=about["metavar"], show_default=False)
        else:
            plain = _without_none(hint)
            if len(typing.get_args(hint)) > 2 and plain is str:  # also a number, where it is made from Python
                hint = str | None
            info = typer.Option(
                *(about["flags"] or _flags(field.name, plain)),
                help=about["help"] + _range(about),
                metavar=about["metavar"],
                envvar=about["envvar"],
                rich_help_panel=_panel(config_type, field.name),
                show_default=default is not None,
            )
        parameters.append(_parameter(field.name, Annotated[hint, info], default))
    return parameters


def _common(config_type: type) -> list[inspect.Parameter]:
    known = {field.name for field in dataclasses.fields(config_type)}
    switches = {name for name, hint in typing.get_type_hints(config_type).items() if hint is bool}

    def load(ctx: typer.Context, path: str | None) -> str | None:
        if path is not None:
            if not path:
                raise UsageError("--config is empty.", hint="Leave it out, or name a YAML file.")
            options = read_config_file(path, known)
            # As the same text after a flag: a number given as it is would be rounded, 1.5 epochs to 1.
            ctx.default_map = {
                name: value
                if name in switches or name == "images"
                else ",".join(map(str, value if isinstance(value, list) else [value]))
                for name, value in options.items()
            }
        return path

    # The two variables are read by paths.flag, which takes more words for yes than typer does.
    def flag(*names: str, help: str) -> Any:
        info = typer.Option(*names, help=help, rich_help_panel="Common")
        return Annotated[bool, info]

    file = typer.Option(
        "--config", help="YAML file of options by their long names; flags win over it.", metavar="FILE",
        is_eager=True, callback=load, rich_help_panel="Common",
    )  # fmt: skip
    return [
        _parameter("config", Annotated[str | None, file], None),
        _parameter("json", flag("--json", help="Print one JSON document (env var: TLCLI_JSON)."), False),
        _parameter("quiet", flag("-q", "--quiet", help="Only warnings and errors on stderr."), False),
        _parameter("verbose", flag("-v", "--verbose", help="Say more on stderr."), False),
        _parameter(
            "offline", flag("--offline", help="Never ask a hub for weights (env var: TLCLI_OFFLINE)."), False
        ),
    ]


def _range(about: Mapping[str, Any]) -> str:
    """Return the range of an option for its help."""
    low, high = about["minimum"], about["maximum"]
    if low is None:
        return ""
    return f" ({low} or more)" if high is None else f" ({low} to {high})"


def _flags(name: str, hint: Any) -> tuple[str, ...]:
    long = long_name(name)
    return (f"--{long}/--no-{long}",) if hint is bool else (f"--{long}",)


def _panel(config_type: type, name: str) -> str:
    for base, panel in PANELS.items():
        if issubclass(config_type, base) and name in base.__annotations__:
            return panel
    return "Options"


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default
    )
