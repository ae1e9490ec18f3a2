"""What the trained part computes in: whatever a network cannot take is found and left out before training."""

import copy

import pytest
import torch
from torch import nn

from tlcli.backbones.compute import Compute, choose_compute
from tlcli.backbones.cut import Cut, Frozen
from tlcli.errors import BackboneError

CPU = torch.device("cpu")


class Views(nn.Module):
    """Views maps as tokens, which channels-last memory does not allow."""

    def forward(self, maps):
        return maps.view(maps.shape[0], -1)


class MixesTypes(nn.Module):
    """Adds what autocast made bf16 to an fp32 sum, in an operation that autocast does not know."""

    def forward(self, maps):
        return torch.zeros(maps.shape).index_add(0, torch.arange(len(maps)), maps)


def cut_of(*layers):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), *layers, nn.Flatten())
    return Cut(Frozen(), model, "input", 0, (3, 8, 8))


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize(("layers", "channels_last"), [((), True), ((Views(),), False)])
def test_memory_format(amp, layers, channels_last):
    found = choose_compute(cut_of(*layers), (8, 8), amp, CPU)
    assert (found.amp, found.channels_last) == (amp, channels_last)
    assert ("contiguous memory" in found.note) is not channels_last


def test_contiguous_memory_where_there_is_no_convolution():
    cut = Cut(Frozen(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), "input", 0, (3, 8, 8))
    assert choose_compute(cut, (8, 8), "none", CPU) == Compute("none", channels_last=False)


def test_a_convolution_whose_backward_pass_ends_the_process_is_kept_from_channels_last_memory():
    """timm's gernet_s has one such; a segmentation fault or a heap error, without an exception."""
    cut = cut_of(nn.Conv2d(8, 8, 1, stride=2))
    found = choose_compute(cut, (224, 224), "none", CPU)
    assert not found.channels_last
    assert "contiguous memory" in found.note
    assert choose_compute(cut_of(nn.Conv2d(8, 8, 1)), (8, 8), "none", CPU).channels_last


def test_a_number_type_that_does_not_run_gives_way_to_fp32_with_a_note():
    found = choose_compute(cut_of(MixesTypes()), (8, 8), "bf16", CPU)
    assert found.amp == "none"
    assert "bf16 does not suit this network" in found.note
    assert "fp32" in found.note
    assert not choose_compute(cut_of(MixesTypes()), (8, 8), "none", CPU).note


def test_a_network_that_cannot_be_trained_is_refused_with_what_works():
    class Refuses(nn.Module):
        def forward(self, maps):
            raise RuntimeError("no such kernel")

    with pytest.raises(BackboneError, match="no such kernel") as caught:
        choose_compute(cut_of(Refuses()), (8, 8), "bf16", CPU)
    assert "--freeze all" in caught.value.hint


def test_memory_that_runs_out_is_not_taken_for_a_number_type():
    class TooLarge(nn.Module):
        def forward(self, maps):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        choose_compute(cut_of(TooLarge()), (8, 8), "bf16", CPU)


def test_the_network_and_the_random_state_stay_as_they_were():
    cut = cut_of()
    before, modes = copy.deepcopy(cut.suffix.state_dict()), [part.training for part in cut.suffix.modules()]
    state = torch.get_rng_state()
    choose_compute(cut, (8, 8), "bf16", CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in cut.suffix.modules()] == modes
    assert all(parameter.grad is None for parameter in cut.suffix.parameters())
    for name, value in cut.suffix.state_dict().items():
        assert torch.equal(value, before[name]), name
