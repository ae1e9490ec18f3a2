"""The adjustment against what is known: Bayes' rule for two shares of the classes, and balanced accuracy."""

import pytest
import torch
from torch.distributions import Normal

from tlcli.training.logit_adjustment import fit_adjustment

SHARES = torch.tensor([0.85, 0.1, 0.05])
MEANS = torch.tensor([-1.0, 0.5, 1.5])
TRAINED_ON = torch.repeat_interleave(torch.arange(3), (1000 * SHARES).long())


def drawn(shares, count=20_000, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(shares, count, replacement=True, generator=draw)
    return MEANS[labels] + torch.randn(count, generator=draw), labels


def log_densities(points):
    return torch.stack([Normal(mean, 1.0).log_prob(points) for mean in MEANS], dim=1)


@pytest.mark.parametrize("shares", [SHARES, torch.full((3,), 1 / 3)])
def test_what_knows_the_shares_is_corrected_by_bayes_rule_wherever_it_is_fitted(shares):
    points, labels = drawn(shares)
    found = fit_adjustment(log_densities(points) + SHARES.log(), labels, TRAINED_ON)
    assert found.tau == pytest.approx(1.0, abs=0.03)
    expected = -SHARES.log() + SHARES.log().mean()
    assert found.values.tolist() == pytest.approx((found.tau * expected).tolist(), abs=1e-5)


@pytest.mark.parametrize("owed", [0.0, 0.3, 0.7])
def test_what_training_did_already_is_not_done_again(owed):
    points, labels = drawn(SHARES, seed=1)
    found = fit_adjustment(log_densities(points) + owed * SHARES.log(), labels, TRAINED_ON)
    assert found.tau == pytest.approx(owed, abs=0.03)


def test_rare_classes_are_never_made_rarer():
    points, labels = drawn(SHARES, seed=2)
    found = fit_adjustment(log_densities(points) - SHARES.log(), labels, TRAINED_ON)
    assert found.tau == 0.0
    assert not found.values.any()


def test_balanced_accuracy_rises():
    points, labels = drawn(SHARES, seed=3)
    logits = log_densities(points) + SHARES.log()

    def balanced_accuracy(logits):
        right = logits.argmax(1) == labels
        return float(torch.stack([right[labels == label].double().mean() for label in range(3)]).mean())

    adjusted = logits + fit_adjustment(logits, labels, TRAINED_ON).values
    assert balanced_accuracy(adjusted) > balanced_accuracy(logits) + 0.1


def test_classes_with_no_image_on_either_side():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = fit_adjustment(logits, torch.tensor([0, 1] * 20), torch.tensor([0] * 9 + [1, 3]))
    assert 0 <= found.tau <= 1
    assert found.values.isfinite().all()
    even = fit_adjustment(logits, torch.tensor([0, 1] * 20), torch.arange(4).repeat(3))
    assert not even.values.any()
    assert found.document()["values"] == pytest.approx(found.values.tolist(), abs=1e-6)


def test_what_is_added_has_a_mean_of_zero_and_a_place_for_every_class():
    points, labels = drawn(SHARES, count=500, seed=4)
    logits = torch.cat([log_densities(points), torch.full((500, 1), -50.0)], dim=1)
    found = fit_adjustment(logits, labels, TRAINED_ON)
    assert found.values.shape == (4,)
    assert float(found.values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert 0 <= found.tau <= 1
    far = fit_adjustment(log_densities(points) + 3 * SHARES.log(), labels, TRAINED_ON)
    assert far.tau == 1.0
    counts = torch.bincount(TRAINED_ON).double()
    expected = -counts.log() + counts.log().mean()
    assert far.values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    one = fit_adjustment(
        torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]), torch.tensor([0] * 8 + [1])
    )
    assert one.values.diff().item() == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-5)
    lone = fit_adjustment(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0, 0, 0]))
    assert lone.values.tolist() == [0.0, 0.0]
