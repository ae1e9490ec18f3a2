"""The tree, and how every end of a command becomes an exit code."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlcli import __version__
from tlcli.cli import app
from tlcli.errors import BackboneError, DataError, StorageError
from tlcli.machine.interrupts import SIGNALS

ROOT = Path(__file__).parent.parent.parent


def test_the_version(run_cli):
    result = run_cli("--version")
    assert (result.code, result.stdout) == (0, f"tlcli {__version__}\n")


def test_help_lists_the_commands_and_the_exit_codes(run_cli):
    result = run_cli("--help")
    assert result.code == 0
    for name in ("extract", "finetune", "evaluate", "predict", "recommend", "cache", "data", "backbones"):
        assert name in result.stdout
    assert "6 a check or gate failed" in re.sub(r"\s+", " ", result.stdout)
    assert "extract" in run_cli().stdout + run_cli().stderr


@pytest.mark.parametrize("arguments", [("finetun",), ("cache", "lst"), ("--jsn",)])
def test_an_unknown_command_is_a_usage_error(run_cli, arguments):
    result = run_cli(*arguments)
    assert result.code == 2
    assert result.stdout == ""
    assert arguments[-1] in result.stderr


def ending_in(monkeypatch, error):
    """Make `tlcli cache list` end in an exception."""

    def fail(self):
        raise error

    monkeypatch.setattr("tlcli.cache.store.Store.entries", fail)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DataError("data gone", hint="look"), 3, "data gone"),
        (BackboneError("no weights"), 4, "no weights"),
        (StorageError("disk full"), 5, "disk full"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 5, "/x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/z"), 5, "/x/z"),
        (MemoryError(), 5, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "Out of memory"),
        (ValueError("surprise"), 1, "Traceback"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "report it"),
    ],
)
def test_errors_become_codes_and_leave_stdout_empty(run_cli, monkeypatch, error, code, expected):
    ending_in(monkeypatch, error)
    result = run_cli("cache", "list", "--json")
    assert result.code == code
    assert result.stdout == ""
    assert expected in result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)


@pytest.mark.parametrize(("number", "code"), [(number, 128 + number) for number in SIGNALS])
def test_signals_end_with_their_code(run_cli, monkeypatch, number, code):
    handlers = {key: signal.getsignal(key) for key in SIGNALS}

    def interrupted(self):
        os.kill(os.getpid(), number)
        time.sleep(10)  # ended by the signal at once

    monkeypatch.setattr("tlcli.cache.store.Store.entries", interrupted)
    try:
        result = run_cli("cache", "list")
    finally:
        for key, handler in handlers.items():
            signal.signal(key, handler)
    assert result.code == code
    assert result.stdout == ""
    assert "Interrupted" in result.stderr


def child(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "tlcli", *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_reader_that_leaves_is_no_error_to_talk_about(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = child("recommend", "--size", "small", "--similarity", "low", "-q", *arguments, stdout=writer)
    os.close(writer)
    message = process.stderr.read().decode()
    assert (process.wait(60), message) == (128 + signal.SIGPIPE, "")


def test_no_color_on_a_terminal():
    main, terminal = os.openpty()
    environment = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    process = child("recommend", "--size", "small", "--similarity", "low", stdout=terminal, env=environment)
    assert process.wait(60) == 0
    os.close(terminal)
    text = os.read(main, 1 << 16).decode()
    os.close(main)
    assert "freeze" in text
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-9]", text)


def test_a_missing_gpu_is_a_device_error(run_cli, trained, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for command in ("extract", "finetune"):
        result = run_cli(command, trained.images, "--backbone", "test_resnet", "--random-init",
                         "--image-size", "32", "--device", "cuda", "--json")  # fmt: skip
        assert result.code == 5
        assert result.stdout == ""
        assert "--device cpu" in result.stderr


def test_weights_that_are_not_here_end_quickly_offline(run_cli, trained):
    started = time.monotonic()
    result = run_cli("finetune", trained.images, "--backbone", "resnet18.a1_in1k", "--offline", "--json")
    assert time.monotonic() - started < 10
    assert result.code == 4
    assert result.stdout == ""
    assert "resnet18" in result.stderr
    assert "bundled" in result.stderr


@pytest.mark.parametrize("command", ["extract", "finetune", "evaluate", "predict"])
def test_a_missing_argument_is_a_usage_error(run_cli, command):
    result = run_cli(command, "--json")
    assert result.code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", ["evaluate", "predict", "report"])
def test_a_run_that_does_not_exist_is_a_data_error(run_cli, tmp_path, command):
    result = run_cli(command, tmp_path / "none", *(["x.png"] if command == "predict" else []), "--json")
    assert result.code == 3
    assert result.stdout == ""
    assert "tlcli finetune" in result.stderr


def test_every_command_prints_exactly_one_document(run_cli, trained, tmp_path):
    tiny = ("--backbone", "test_resnet", "--random-init", "--image-size", "32")
    lines = [
        ("recommend", "--size", "small", "--similarity", "high"),
        ("extract", trained.images, *tiny),
        ("extract", trained.images, *tiny, "--dry-run"),
        ("finetune", trained.images, *tiny, "-o", tmp_path / "run", "--l2", "0.1"),
        ("finetune", trained.images, *tiny, "--dry-run"),
        ("evaluate", trained.run),
        ("evaluate", trained.run, "--dry-run"),
        ("predict", trained.run, trained.images / "a"),
        ("backbones", "list", "resnet18*"),
        ("backbones", "show", "test_resnet", "--random-init"),
        ("data", "check", trained.images),
        ("data", "split", trained.images),
        ("cache", "list"),
        ("cache", "verify"),
        ("cache", "prune", "--dry-run"),
        ("report", tmp_path / "run"),
    ]
    for line in lines:
        result = run_cli(*line, "--json")
        assert result.code == 0, (line, result.stderr)
        document = json.loads(result.stdout)
        name = ".".join(str(word) for word in line[: 2 if line[0] in app.GROUPS else 1])
        name += ".plan" if "--dry-run" in line and line[0] not in app.GROUPS else ""
        assert document["schema"] == f"tlcli.{name}/{2 if name in ('data.check', 'data.split') else 1}"
        assert all(set(warning) == {"code", "message"} for warning in document["warnings"])
        assert result.stdout.endswith("}\n")


@pytest.mark.parametrize("arguments", [(), ("cache",), ("data",), ("backbones",)])
def test_asking_for_nothing_shows_help(run_cli, arguments):
    result = run_cli(*arguments)
    assert result.code == 0
    assert "Usage: tlcli" in result.stdout
    assert result.stdout == run_cli(*arguments, "--help").stdout
