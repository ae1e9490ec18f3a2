"""Any bytes given as a list, a configuration or an option's value are read or refused, never a traceback.

Each property runs with a few examples by default and with many when marked slow, the same ones every time.
"""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlcli.config.commands import FinetuneConfig
from tlcli.config.data import DataOptions
from tlcli.config.model_kwargs import parse_arguments
from tlcli.config.yaml_file import MAX_CONFIG_BYTES, read_config_file
from tlcli.data.listing import Row, plain_cell, read_listing, spreadsheet_cell
from tlcli.data.scan import scan
from tlcli.errors import DataError, TlcliError, UsageError

Run = Callable[..., Any]

FEW = settings(
    max_examples=100, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
MANY = settings(FEW, max_examples=20_000)

KNOWN = {field.name for field in dataclasses.fields(FinetuneConfig)}

CSV_PIECES = [
    b"filename", b"label", b"split", b"group", b"train", b"val", b"a.png", b"b.png", b"x", b"y", b",", b",",
    b"\t", b";", b'"', b'"', b"'", b"\n", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\xff\xfe", b"../", b"/", b"..", b"http://", b"=1", b" ", b"\xc3\xa9", b"e\xcc\x81",
    b"\x1b[31m", b"\\", b"\xe2\x80\xa8", b"\x0c", b"\x1c",
]  # fmt: skip
YAML_PIECES = [
    b"seed", b"val-fraction", b"val_fraction", b"data", b"l2", b"head", b"no-such", b": ", b": ", b":", b"\n",
    b"\n", b"\n  ", b"- ", b"? ", b"[", b"]", b"{", b"}", b",", b"&a ", b"*a", b"<<", b"=", b"!!int ",
    b"!!float ", b"!!timestamp ", b"!!python/name:os.system ", b"!", b"'", b'"', b"|", b">", b"#",
    b"%YAML 9.9\n", b"---\n", b"...\n", b"2001-99-99", b"0x_", b"0b_", b"._", b"1e400", b".nan", b"1:60:3",
    b"9" * 5000, b"null", b"~", b"yes", b"\\ud800", b"\\0", b"\t", b"\0",
    b"\xff", b"\xc3\xa9", b"\xef\xbb\xbf", b"@", b"`", b"\xc2\x85",
]  # fmt: skip
VALUE_PIECES = [
    "mlp:", "linear", "8", ",", ":", "-", "[", "]", "(", "{", "'", '"', "=", "depth", "norm", "1e400", "nan",
    "inf", "0x1f", "True", "none", "\0", "\udcff", "9" * 5000, " ", "1_0", "\u0661", "\u00b2", "#", "\n",
    "\\", "*",
]  # fmt: skip


def some(pieces: list[Any], joined: Any) -> Any:
    return st.lists(st.sampled_from(pieces), max_size=40).map(joined.join)


CSV_BYTES = st.binary(max_size=200) | some(CSV_PIECES, b"") | some(CSV_PIECES, b"").map(
    lambda rest: b"filename,label,split,group\na.png,x,,\nb.png,y,,\n" + rest
)  # fmt: skip
YAML_BYTES = st.binary(max_size=200) | some(YAML_PIECES, b"") | some(YAML_PIECES, b"").map(
    lambda rest: b"seed: " + rest
)  # fmt: skip
VALUES = st.text(max_size=20) | some(VALUE_PIECES, "")


def outcome(call: Callable[[], Any]) -> tuple[Any, TlcliError | None]:
    """Return what `call` gives, or how it refuses."""
    try:
        return call(), None
    except (UsageError, DataError) as error:
        return None, error


def few_and_many(strategy: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of one example two tests: of few, and slow of many."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("size", ["few", pytest.param("many", marks=pytest.mark.slow)])
        def test(size: str, tmp_path: Path) -> None:
            def one(example: Any) -> None:
                function(tmp_path, example)

            (FEW if size == "few" else MANY)(given(strategy)(one))()

        test.__name__ = function.__name__
        return test

    return decorate


@few_and_many(CSV_BYTES)
def test_any_bytes_as_a_list(folder: Path, content: bytes) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    for name in ("list.csv", "list.tsv"):
        path = folder / name
        path.write_bytes(content)
        rows, error = outcome(lambda path=path: read_listing(str(path), DataOptions()))
        if error is None:
            assert all(isinstance(row, Row) for row in rows)
            dataset, error = outcome(lambda path=path: scan(DataOptions(data=str(path))))
        if error is not None:
            assert isinstance(error, DataError)
            assert str(path) in error.message
            assert len(error.message) < 20_000
        else:
            assert len(dataset.samples) <= len(rows)
            assert {sample.label for sample in dataset.samples} == set(range(len(dataset.class_names)))
            assert all(sample.path.startswith(f"{folder}/") for sample in dataset.samples)


@few_and_many(YAML_BYTES)
def test_any_bytes_as_a_configuration(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    options, error = outcome(lambda: read_config_file(path, KNOWN))
    if error is not None:
        assert str(path) in error.message
        return
    assert set(options) <= KNOWN
    for value in options.values():
        for part in value if isinstance(value, list) else [value]:
            assert not isinstance(part, list | dict | None)
            assert "\0" not in str(part)


@few_and_many(VALUES)
def test_any_text_as_an_options_value(folder: Path, text: str) -> None:
    for name in ("head", "l2", "lr", "dropout", "freeze", "scaling"):
        _, error = outcome(lambda name=name: FinetuneConfig(**{name: text}))
        assert error is None or error.hint
    arguments, error = outcome(lambda: parse_arguments(text))
    assert error is None or error.hint
    json.dumps(arguments, allow_nan=False)  # part of the cache's key


@few_and_many(st.text(st.characters(codec="utf-8") | st.sampled_from("=+-@\t\r'0123456789.e"), max_size=8))
def test_what_is_escaped_for_a_spreadsheet_is_read_back(folder: Path, text: str) -> None:
    cell = spreadsheet_cell(text)
    assert plain_cell(cell) == text
    assert cell == text or cell == f"'{text}"
    if cell.startswith(("=", "@", "\t=", "\r")):
        float(cell)  # raises where it is no number


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (b"seed: 1\nseed: 2\n", 2, "'seed' twice, again on line 2"),
        (b"val-fraction: 0.3\nval_fraction: 0.2\n", 2, "has val-fraction twice"),
        (b"seed: {a: 1}\n", 2, "values inside values on line 1"),
        (b"l2: [0.1, [1]]\n", 2, "values inside values on line 1"),
        (b"l2: [0.1, null]\n", 2, "a value for l2 that no option can take"),
        (b"a: &a [x]\nl2: *a\n", 2, "an alias on line 2"),
        (b"seed: !!int '3'\n", 2, "a tag on line 1"),
        (b"seed: 2001-99-99\n", 2, "is not YAML: month must be in 1..12"),
        (b"seed: 0x_\n", 2, "is not YAML"),
        (b"seed: " + b"9" * 5000 + b"\n", 2, "is not YAML: Exceeds the limit"),
        (b'data: "a\\0b"\n', 2, "a value for data that no option can take"),
        (b'data: "a\\ud800b"\n', 2, "a value for data that no option can take"),
        (b"seed: 1.5\n", 2, "'--seed'"),
        (b"seed: true\n", 2, "'--seed'"),
        (b"max-bad: .nan\n", 2, "--max-bad"),
        (b"- seed\n- 3\n", 2, "holds a list, not a mapping"),
        (b"data: caf\xe9\n", 3, "cannot be read: 'utf-8' codec"),
        (b"#" * (MAX_CONFIG_BYTES + 1), 3, "has more than 65,536 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_configuration_that_cannot_be_meant(
    tmp_path: Path, run_cli: Run, content: bytes, code: int, expected: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    done = run_cli("finetune", tmp_path, "--config", path)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    "merges": "a0: &a0 {k: v}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)),
    "brackets": "seed: " + "[" * 60_000,
    "braces": "{a: " * 15_000,
    "dashes": "- " * 30_000,
    "sixties": "seed: 1" + ":59" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_that_would_grow_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"config\.yaml"):
            read_config_file(path, KNOWN)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_configuration_without_an_end(run_cli: Run) -> None:
    done = run_cli("finetune", "--config", "/dev/zero")
    assert (done.code, done.stdout) == (3, "")
    assert "has more than 65,536 bytes" in done.stderr
