"""Mixup and cutmix blend inputs and targets by the same shares."""

import pytest
import torch

from tests.training.recipes import recipe
from tlcli.errors import UsageError
from tlcli.training.inputs import generator
from tlcli.training.mixing import mix


def batch(shape=(6, 3, 8, 8)):
    inputs = torch.arange(shape[0]).float().view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return inputs, torch.eye(shape[0])


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 3, 8, 8)])
def test_mixup_blends_inputs_and_targets_alike(shape):
    inputs, targets = mix(*batch(shape), recipe(mixup=1.0), generator("a"))
    values = torch.arange(6.0)
    torch.testing.assert_close(inputs.flatten(1)[:, 0], targets @ values)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_cutmix_targets_are_shares_of_the_area():
    for seed in range(5):
        inputs, targets = mix(*batch(), recipe(cutmix=1.0), generator(seed))
        torch.testing.assert_close(inputs.mean((1, 2, 3)), targets @ torch.arange(6.0))


def test_with_both_each_is_drawn_and_the_same_draw_gives_the_same():
    options = recipe(mixup=1.0, cutmix=1.0)
    kinds = set()
    for seed in range(12):
        inputs, _ = mix(*batch(), options, generator(seed))
        again, _ = mix(*batch(), options, generator(seed))
        assert torch.equal(inputs, again)
        kinds.add(bool(torch.all(inputs == inputs.round())))
    assert kinds == {True, False}


def test_without_either_nothing_changes_and_cutmix_needs_maps():
    inputs, targets = batch()
    same = mix(inputs, targets, recipe(), generator(0))
    assert same[0] is inputs
    with pytest.raises(UsageError, match="maps"):
        mix(*batch((6, 5)), recipe(cutmix=1.0), generator(0))
