"""What a cached row is called: the entry's key from the facts that made it, the row's from the image.

Keys of caches fail by leaving something out more often than by collision, so an entry's facts (its spec) are
plain data, stored beside the rows and compared on every open; two specs can be explained against each other.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SCHEMA = 1
"""Raised whenever decoding, preprocessing, the row format or the meaning of a cut changes."""

RowKey = tuple[str, int]
"""SHA-256 of the image file's bytes (64 lower-case hex digits), and the view (0 is the plain transform)."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of plain data: sorted keys, no spaces, ASCII; tuples count as lists.

    Raises:
        TypeError: Something other than str, int, bool, None, list, tuple or a dict with str keys. Floats are
            refused, since their text and their equality are not the same everywhere: give strings.
    """
    _check_plain(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _check_plain(value: Any, name: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{name} has the key {key!r}; expected a str")
            _check_plain(item, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check_plain(item, f"{name}[{number}]")
    elif value is not None and type(value) not in (str, int, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected str, int, bool, None, list or dict")


def entry_key(spec: Mapping[str, Any]) -> str:
    """Return an entry's key, 64 hex digits: SHA-256 of its spec's canonical JSON.

    Raises:
        TypeError: The spec is not plain data; see `canonical_json`.
    """
    return hashlib.sha256(canonical_json(dict(spec)).encode("ascii")).hexdigest()


def explain(spec_a: Mapping[str, Any], spec_b: Mapping[str, Any]) -> list[str]:
    """Return the facts in which two specs differ, one line each, by dotted name; [] for equal specs."""
    facts_a, facts_b = flatten(dict(spec_a)), flatten(dict(spec_b))
    return [
        f"{name}: {facts_a.get(name, 'absent')} -> {facts_b.get(name, 'absent')}"
        for name in sorted(facts_a.keys() | facts_b.keys())
        if facts_a.get(name) != facts_b.get(name)
    ]


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every leaf of nested dicts as dotted name -> JSON text; lists and empty dicts are leaves.

    A key that holds a dot, or nothing, is quoted, so that no two leaves share a name.
    """
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = prefix + (canonical_json(key) if not key or "." in key or '"' in key else key)
        if type(item) is dict and item:
            flat.update(flatten(item, f"{name}."))
        else:
            flat[name] = canonical_json(item)
    return flat
