"""Devices and compute types, with their reasons; never a silent fall-back."""

import pytest
import torch

from tlcli.errors import DeviceError, UsageError
from tlcli.machine.device import choose_device, choose_dtype, fast_bf16, torch_threads


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_cpu_where_there_is_nothing_else(no_gpu):
    choice = choose_device("auto")
    assert choice.device == torch.device("cpu")
    assert "no GPU" in choice.reason


def test_auto_prefers_cuda_then_mps(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device().device.type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    choice = choose_device()
    assert choice.device == torch.device("cuda", 0)
    assert "a GPU" in choice.reason


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, number in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device().device == torch.device("cuda", number)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_missing_device_is_an_error(no_gpu, name):
    with pytest.raises(DeviceError, match=name) as caught:
        choose_device(name)
    assert "--device cpu" in caught.value.hint


def test_a_gpu_beyond_the_last_is_an_error(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").device == torch.device("cuda", 1)
    assert choose_device("cuda").device == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="2 CUDA devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:x", "cuda:-1", "", "CUDA"])
def test_what_is_no_device_is_a_usage_error(no_gpu, name):
    with pytest.raises(UsageError, match="not a device"):
        choose_device(name)


def test_dtype_follows_the_processor_and_says_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    slow = choose_dtype("auto", cpu)
    assert (slow.name, slow.dtype) == ("fp32", torch.float32)
    assert "no bf16" in slow.reason
    forced = choose_dtype("bf16", cpu)
    assert forced.dtype == torch.bfloat16
    assert "though" in forced.reason
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_dtype("auto", cpu).name == "bf16"
    assert choose_dtype("bf16", cpu).reason == "asked for"
    assert choose_dtype("fp32", cpu).name == "fp32"
    assert fast_bf16(torch.device("mps"))[0] is False


def test_threads_are_restored_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        _ = 1 / (torch.get_num_threads() - before - 1)
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
