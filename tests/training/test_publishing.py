"""What is published is the better network, and what is said of it is what was measured."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from tlcli.metrics.intervals import paired_interval
from tlcli.training.publishing import Comparison, Publication, candidate, held_out, publish
from tlcli.warned import collected

LABELS = torch.tensor([0] * 16 + [1] * 4)


def logits(right, sure=2.0):
    """Logits of two classes, right where `right` says so."""
    named = torch.where(torch.as_tensor(right), LABELS, 1 - LABELS)
    return sure * torch.nn.functional.one_hot(named, 2).float()


def chosen(probe, trained, *, insist=False, **options):
    pair = candidate("probe", probe, LABELS), candidate("trained", trained, LABELS)
    return publish(Comparison(*pair, "val", **options), insist=insist)


def warnings_of(found):
    with collected() as warnings:
        found.give_warnings()
    return [(warning["code"], warning["message"]) for warning in warnings]


def first(count):
    return [number < count for number in range(20)]


def test_a_candidate_has_the_figures_of_scikit_learn():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (50,), generator=draw)
    values = torch.randn(50, 3, generator=draw)
    found = candidate("probe", values, labels)
    named = values.argmax(1)
    assert found.top1_accuracy == pytest.approx(accuracy_score(labels, named))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, named))
    assert found.log_loss == pytest.approx(log_loss(labels, values.double().softmax(1)), rel=1e-6)


def test_the_more_accurate_one_is_published_and_of_equals_the_surer():
    assert chosen(logits(first(12)), logits(first(13))).published == "trained"
    assert chosen(logits(first(13)), logits(first(12))).published == "probe"
    assert chosen(logits(first(20), 1.0), logits(first(20), 3.0)).published == "trained"
    assert chosen(logits(first(20), 3.0), logits(first(20), 1.0)).published == "probe"
    assert chosen(logits(first(12)), logits(first(12))).published == "probe"


def test_insisting_publishes_what_lost_and_says_so():
    found = chosen(logits(first(20)), logits(first(3)), insist=True)
    assert found.published == "trained"
    assert found.selected_on is None
    [(code, text)] = warnings_of(found)
    assert code == "below_probe"
    assert "0.150" in text
    assert "1.000" in text
    assert "--publish trained" in text


def test_where_classes_weigh_the_same_the_rare_one_decides():
    common, both = logits(first(16)), logits([n % 3 > 0 for n in range(16)] + [True] * 4)
    assert chosen(common, both).published == "probe"
    assert chosen(common, both, balanced=True).published == "trained"


def test_a_loss_is_a_warning_a_clear_gain_is_none_and_a_small_one_may_be_chance():
    lost = chosen(logits(first(13)), logits(first(12)))
    assert [code for code, _ in warnings_of(lost)] == ["below_probe"]
    assert "the probe is published" in warnings_of(lost)[0][1]
    near = chosen(logits(first(12)), logits(first(13)))
    assert [code for code, _ in warnings_of(near)] == ["not_better_than_probe"]
    clear = chosen(logits(first(4)), logits(first(20)))
    assert warnings_of(clear) == []
    assert clear.comparison.interval.low > 0


def test_nothing_to_compare_is_said_by_nothing():
    found = Publication("trained")
    assert found.sentence() == ""
    assert warnings_of(found) == []
    assert found.document()["gain"] is None


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_the_interval_of_a_gain_holds_it_and_turns_with_its_sign(mine, theirs, neither):
    total = mine + theirs + neither
    if not total:
        return
    found, turned = paired_interval(mine, theirs, total), paired_interval(theirs, mine, total)
    assert found.low == pytest.approx(-turned.high)
    if mine == theirs:
        assert found.low < 0 < found.high
    assert -1 <= found.low < found.high <= 1


def test_the_interval_of_a_gain_covers_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2_000):
        mine, theirs, _ = rng.multinomial(60, [0.15, 0.05, 0.8])
        found = paired_interval(int(mine), int(theirs), 60)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 2_000 <= 0.985


def test_a_gain_on_copies_of_one_image_is_no_evidence_of_more():
    pair = candidate("probe", logits(first(8)), LABELS), candidate("trained", logits(first(16)), LABELS)
    alone = Comparison(*pair, "val").interval
    assert Comparison(*pair, "val", groups=torch.arange(20)).interval == alone
    grouped = Comparison(*pair, "val", groups=torch.arange(20) // 4).interval
    assert alone.low > 0 > grouped.low
    assert grouped.num_groups == 5


def test_what_is_held_out_is_stratified_whole_groups_and_never_all_of_a_class():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2])
    groups = torch.arange(101) // 2
    groups[-1] = 1_000
    out = held_out(labels, groups, 0.2, 0)
    assert int(out[:50].sum()) in range(8, 13)
    assert int(out[50:100].sum()) in range(8, 13)
    assert not out[100]
    for group in groups.unique():
        assert out[groups == group].unique().numel() == 1
    assert torch.equal(out, held_out(labels, groups, 0.2, 0))
    assert not torch.equal(out, held_out(labels, groups, 0.2, 1))
    assert int(held_out(labels, groups, 0.5, 0).sum()) in range(40, 60)


def test_what_is_said_names_figure_images_and_gain():
    probe, trained = logits(first(12)), logits(first(17))
    found = chosen(probe, trained)
    assert found.document()["gain"] == pytest.approx(0.25)
    assert found.document()["num_images"] == 20
    interval = paired_interval(5, 0, 20)
    assert found.document()["gain_interval"] == interval.document()
    assert found.sentence().startswith("training won: accuracy 0.850, and 0.600 of")
    assert found.sentence().endswith("on 20 val images")
    balanced = chosen(probe, trained, balanced=True)
    assert "training won: balanced accuracy" in balanced.sentence()
    pair = candidate("probe", probe, LABELS), candidate("trained", trained, LABELS)
    assert Comparison(*pair, "train").figures().endswith("on 20 training images held out")


def test_without_a_comparison_nothing_is_said():
    found = Publication("trained")
    assert found.document()["num_images"] == 0
    assert (found.insisted, found.sentence(), found.selected_on) == (False, "", None)
    assert found.give_warnings() is False


def test_warnings_are_given_where_there_is_need_and_that_is_told():
    sure, chance, lost = (
        chosen(logits(first(2)), logits(first(20))),
        chosen(logits(first(12)), logits(first(13))),
        chosen(logits(first(13)), logits(first(12))),
    )
    with collected() as warnings:
        told = [found.give_warnings() for found in (sure, chance, lost)]
    assert told == [False, True, True]
    assert [warning["code"] for warning in warnings] == ["not_better_than_probe", "below_probe"]


def test_a_gain_that_may_be_chance_is_warned_of_only_beside_a_probe_and_by_accuracy():
    pair = candidate("earlier", logits(first(12)), LABELS), candidate("trained", logits(first(13)), LABELS)
    assert warnings_of(publish(Comparison(*pair, "val"), insist=False)) == []
    assert warnings_of(chosen(logits(first(12)), logits(first(13)), balanced=True)) == []
