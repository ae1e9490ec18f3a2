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


def boxes(alpha, size, count=300):
    """Yield what CutMix changed of maps whose values say from which image they are, and the share kept."""
    for seed in range(count):
        inputs, targets = mix(*batch((2, 1, *size)), recipe(cutmix=alpha), generator("box", seed))
        order = targets[0, 1] > 0
        yield inputs[0, 0] == 1.0, float(targets[0, 0]) if order else 1.0


def test_cutmix_cuts_one_rectangle_of_the_images_form_around_a_centre_anywhere():
    touched, insides = torch.zeros(20, 40), []
    for changed, kept in boxes(1.0, (20, 40), 1200):
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        if not len(rows):
            continue
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        assert bool(changed[top:bottom, left:right].all())  # one rectangle, without a hole
        assert float((bottom - top) * (right - left)) == pytest.approx(800 * (1 - kept), abs=1e-3)
        touched += changed
        if top > 0 and left > 0 and bottom < 20 and right < 40:  # not clipped
            insides.append((float(bottom - top), float(right - left)))
    # A side is drawn for both axes alike: twice as wide as high, but for the rounding of each edge.
    assert len(insides) > 20
    assert all(abs(wide - 2 * high) <= 3 for high, wide in insides)
    assert sum(wide - 2 * high for high, wide in insides) / len(insides) == pytest.approx(0.0, abs=0.5)
    assert int((touched == 0).sum()) == 0  # corners as well
    # Centres are drawn evenly: as often left as right, and above as below.
    for one, other in ((touched[:10], touched[10:]), (touched[:, :20], touched[:, 20:])):
        assert float(one.sum() / other.sum()) == pytest.approx(1.0, abs=0.25)


def test_the_sides_of_a_box_are_the_root_of_the_share_that_is_cut():
    """Beta(alpha, alpha) is nearly always a half where alpha is large."""
    sides = [
        (int(changed.any(1).sum()), int(changed.any(0).sum()))
        for changed, _ in boxes(1e6, (50, 100), 400) if is_inside(changed)
    ]  # fmt: skip
    assert len(sides) > 5
    for high, wide in sides:
        assert high == pytest.approx(50 * 0.5**0.5, abs=1.1)
        assert wide == pytest.approx(100 * 0.5**0.5, abs=1.1)


def is_inside(changed):
    edge = changed.clone()
    edge[1:-1, 1:-1] = False
    return bool(changed.any()) and not bool(edge.any())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_draws_its_share_from_the_beta_distribution(alpha):
    options = recipe(mixup=alpha)
    shares = []
    for seed in range(2000):
        _, targets = mix(*batch((2, 1)), options, generator("beta", seed))
        if targets[0, 1] > 0:
            shares.append(float(targets[0, 0]))
    expected = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha))
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.04)
    spread = torch.tensor(shares).var()
    assert float(spread) == pytest.approx(float(expected.variance), rel=0.12)


def test_a_tiny_alpha_gives_shares_too():
    """Gamma draws of a tiny concentration are as good as 0, both of them."""
    found = [
        mix(*batch((2, 1)), recipe(mixup=1e-5), generator("tiny", seed))[1][0].tolist() for seed in range(60)
    ]
    assert [0.5, 0.5] in found
    assert all(sum(targets) == 1.0 for targets in found)


def test_cutmix_and_mixup_are_drawn_as_often():
    options = recipe(mixup=1.0, cutmix=1.0)
    mixed = 0
    for seed in range(400):
        inputs, _ = mix(*batch((2, 1, 8, 8)), options, generator("which", seed))
        mixed += bool((inputs[0] != inputs[0].round()).any())
    # In half of the draws the order of two changes nothing.
    assert mixed / 200 == pytest.approx(0.5, abs=0.15)
