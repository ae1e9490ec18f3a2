"""Where state lives, and the environment variables."""

import os
import re
from pathlib import Path

import pytest

from tlcli.machine import paths


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", False), ("0", False), ("false", False), ("No", False), (" off ", False), ("1", True), ("x", True)],
)
def test_a_flag_is_set_by_any_word_that_is_not_no(monkeypatch, value, expected):
    monkeypatch.setenv("TLCLI_JSON", value)
    assert paths.flag("TLCLI_JSON") is expected


def test_home_prefers_tlcli_then_xdg_then_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TLCLI_HOME", "relative")
    assert paths.home() == tmp_path_of_cwd() / "relative"
    monkeypatch.delenv("TLCLI_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.home() == tmp_path / "tlcli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.home() == tmp_path / ".cache" / "tlcli"
    assert paths.features_dir() == paths.home() / "features"


def tmp_path_of_cwd() -> Path:
    return Path.cwd()


def test_asking_for_a_path_makes_no_folder():
    assert not paths.features_dir().exists()
    assert not paths.home().exists()


def test_offline_by_either_variable(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not paths.offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert paths.offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TLCLI_OFFLINE", "yes")
    assert paths.offline()


def test_workers_are_between_one_and_sixteen(monkeypatch):
    assert 1 <= paths.default_workers() <= 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert paths.default_workers() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert paths.default_workers() == 1


def test_the_table_lists_every_variable_that_is_read():
    """Only variables of the table may be read anywhere in the package, and all of them are."""
    package = Path(paths.__file__).parents[1]
    named = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"\"(TLCLI_[A-Z]+)\"", path.read_text(encoding="utf-8"))
    }
    assert named == set(re.findall(r"^\| (TLCLI_[A-Z]+)", paths.__doc__ or "", re.M))
