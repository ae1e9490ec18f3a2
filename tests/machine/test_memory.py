"""What is left of the memory."""

import os

import pytest

from tlcli.machine import memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB left and no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:  8388608 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_this_machine_has_some():
    assert 0 < memory.available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_system_is_asked(machine):
    assert memory.available_bytes() == 8 * GIB


@pytest.mark.parametrize(
    ("limit", "left"), [("max", 8 * GIB), (str(3 * GIB), 2 * GIB), (str(100 * GIB), 8 * GIB), ("1024", 0)]
)
def test_a_containers_limit_counts(machine, limit, left):
    (machine / "memory.max").write_text(limit + "\n")
    (machine / "memory.current").write_text(f"{GIB}\n")
    assert memory.available_bytes() == left


def test_a_system_that_does_not_say_is_assumed_half_full(machine):
    (machine / "meminfo").unlink()
    assert 0 < memory.available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
