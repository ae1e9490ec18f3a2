"""Reading `--config FILE.yaml`: options by their long names, and nothing else that YAML can hold."""

from pathlib import Path
from typing import Any

from tlcli.config.fields import long_name
from tlcli.errors import DataError, UsageError
from tlcli.wording import did_you_mean, near_misses

MAX_CONFIG_BYTES = 2**16
_CONFIG_HINT = "Write one `option: value` a line, as in `val-fraction: 0.3`."


def read_config_file(path: str | Path, known: set[str]) -> dict[str, Any]:
    """Return the options a YAML file sets, by field name.

    Args:
        path: The file; keys are long option names, with dashes or underscores.
        known: Field names the command has.

    Raises:
        UsageError: The file is not a YAML mapping of options to plain values or lists of them, or has an
            unknown key (the nearest is named).
        DataError: The file is missing, too large or cannot be read.
    """
    options: dict[str, Any] = {}
    for key, value in _load_mapping(str(path)).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = [long_name(other) for other in near_misses(name, known, most=1)]
            hint = did_you_mean(near).strip() or "See the command's --help for its options."
            raise UsageError(f"Configuration {str(path)!r} has an unknown option {str(key)!r}.", hint=hint)
        if name in options:
            raise UsageError(f"Configuration {str(path)!r} has {long_name(name)} twice.", hint=_CONFIG_HINT)
        if not all(map(_is_plain, value if isinstance(value, list) else ["" if value is None else value])):
            raise UsageError(
                f"Configuration {str(path)!r} has a value for {long_name(name)} that no option can take.",
                hint=_CONFIG_HINT,
            )
        if value is not None:
            options[name] = value
    return options


def _is_plain(value: object) -> bool:
    """Return whether a command line can hold `value`."""
    try:
        return value is not None and b"\0" not in str(value).encode("utf-8", "surrogateescape")
    except ValueError:  # half of a surrogate pair, or a number of very many digits
        return False


def _load_mapping(path: str) -> dict[Any, Any]:
    """Return what a small YAML file says; raises as `read_config_file`."""
    import yaml

    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise DataError(
                f"Configuration {path!r} has more than {MAX_CONFIG_BYTES:,} bytes.", hint=_CONFIG_HINT
            )
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Configuration {path!r} cannot be read: {error}.", hint="Name a YAML file."
        ) from error
    try:
        if refused := _refused_yaml(text):
            raise UsageError(f"Configuration {path!r} holds {refused}.", hint=_CONFIG_HINT)
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: 2001-99-99 looks like a date
        raise UsageError(f"Configuration {path!r} is not YAML: {error}", hint=_CONFIG_HINT) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"Configuration {path!r} holds a {type(loaded).__name__}, not a mapping.", hint=_CONFIG_HINT
        )
    return loaded


def _refused_yaml(text: str) -> str | None:
    """Return what `text` holds beside options with plain values or lists of them, or None.

    Looks at events, before anything is built: nesting that overflows the stack and aliases that multiply are
    refused here.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    depth = 0
    keys: list[str | None] = []  # and values: what stands directly in the mapping, by turns
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            return f"an alias on line {line}"
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
            return f"a tag on line {line}"
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            name = getattr(event, "value", None)
            if len(keys) % 2 == 0 and name is not None and name in keys[::2]:
                return f"{name!r} twice, again on line {line}"
            keys.append(name)
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > (1 if isinstance(event, yaml.MappingStartEvent) else 2):
                return f"values inside values on line {line}"
    return None
