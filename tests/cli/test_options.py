"""Every field of a configuration is an option; flags win over variables, files and defaults."""

import dataclasses
import importlib
import json
import re

import pytest

from tlcli.cli.app import COMMANDS, GROUPS
from tlcli.config import commands as configurations
from tlcli.config.fields import long_name

TREE = {(name,): place for name, place in COMMANDS.items()} | {
    (group, name): place for group, (_, commands) in GROUPS.items() for name, place in commands.items()
}
PREFIX = {"recommend": "Recommend", "list_entries": "List"}


def config_of(words):
    group, *rest = [word.title() for word in words]
    return getattr(configurations, group + "".join(rest) + "Config")


def exists(words):
    try:
        importlib.import_module(f"tlcli.cli.{TREE[words].partition(':')[0]}")
    except ModuleNotFoundError:
        return False
    return True


WORDS = [words for words in TREE if exists(words)]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help_lists_every_option_and_ends_with_two_examples(run_cli, words):
    result = run_cli(*words, "--help")
    assert result.code == 0
    assert result.stderr == ""
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", result.stdout))
    for field in dataclasses.fields(config_of(words)):
        if field.metadata.get("argument"):
            assert field.metadata["metavar"].strip("[]") in text
        else:
            flag = (field.metadata["flags"] or [f"--{long_name(field.name)}"])[-1]
            assert flag in text, flag
    for flag in ("--json", "--quiet", "--verbose", "--offline", "--config"):
        assert flag in text
    tail = text[text.index("Examples:") :]
    assert len(re.findall(rf"\btlcli {' '.join(words)}\b", tail)) == 2
    assert run_cli(*words, "-h").stdout == result.stdout


def plan(run_cli, *arguments):
    result = run_cli("data", "split", *arguments, "--json")
    return json.loads(result.stdout) if result.code == 0 else result


IMAGES = {"a": 20, "b": 20}


def num_val(document):
    text = json.dumps(document)
    return text.count('"val"')


def test_a_flag_wins_over_a_file_and_a_file_over_the_default(run_cli, folder, tmp_path):
    file = tmp_path / "c.yaml"
    default = num_val(plan(run_cli, folder))
    file.write_text("val-fraction: 0.9\n")
    from_file = num_val(plan(run_cli, folder, "--config", file))
    assert from_file > default
    assert num_val(plan(run_cli, folder, "--config", file, "--val-fraction", "0.2")) == default
    assert num_val(plan(run_cli, "--val-fraction", "0.2", folder, "--config", file)) == default


def test_a_file_may_name_the_data(run_cli, folder, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: {folder}\nsplit_seed: 3\n")
    assert plan(run_cli, "--config", file) == plan(run_cli, folder, "--split-seed", "3")


def test_a_variable_wins_over_a_file_and_a_flag_over_a_variable(run_cli, trained, tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("device: cpu\n")
    arguments = ("evaluate", trained.run, "--dry-run", "--json")
    assert run_cli(*arguments, "--config", file).code == 0
    monkeypatch.setenv("TLCLI_DEVICE", "nonsense")
    assert run_cli(*arguments, "--config", file).code == 2
    assert run_cli(*arguments, "--config", file, "--device", "cpu").code == 0


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("val-fractoin: 0.1", 2, "val-fraction"),
        ("val-fraction: lots", 2, "val-fraction"),
        ("val-fraction: 7", 2, "0.9"),
        ("limit-per-class: 2.5", 2, "limit-per-class"),
        ("allow-outside-root: perhaps", 2, "allow-outside-root"),
        ("- a", 2, "mapping"),
        (None, 3, "cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error_with_a_message(run_cli, folder, tmp_path, text, code, expected):
    file = tmp_path / "c.yaml"
    if text:
        file.write_text(text)
    result = run_cli("data", "split", folder, "--config", file, "--json")
    assert result.code == code
    assert result.stdout == ""
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--val-fraction", "0.95"), "val-fraction"),
        (("--val-fraction", "x"), "val-fraction"),
        (("--split-seed", "-1"), "split-seed"),
        (("--workers", "0"), "workers"),
        (("--val-fractoin", "0.1"), "--val-fraction"),
        (("surplus",), "surplus"),
    ],
)
def test_values_out_of_range_and_unknown_options_are_usage_errors(run_cli, folder, arguments, expected):
    result = run_cli("data", "split", folder, *arguments, "--json")
    assert result.code == 2
    assert result.stdout == ""
    assert expected in result.stderr


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("json", True), ("0", False), ("", False)])
def test_tlcli_json_is_the_flag(run_cli, monkeypatch, value, expected):
    monkeypatch.setenv("TLCLI_JSON", value)
    result = run_cli("cache", "list")
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("{") is expected


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_reaches_the_hub_client(run_cli, monkeypatch, how):
    from tlcli.cli import cache  # noqa: F401
    from tlcli.machine import paths

    seen = []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("tlcli.cache.store.Store.entries", lambda self: seen.append(paths.offline()) or [])
    if how == "variable":
        monkeypatch.setenv("TLCLI_OFFLINE", "please")
    run_cli("cache", "list", *(["--offline"] if how == "flag" else []))
    assert seen == [True]
    monkeypatch.delenv("TLCLI_OFFLINE", raising=False)
    run_cli("cache", "list")
    assert seen == [True, False]
