import torch

from tests.training.recipes import recipe
from tlcli.training.inputs import generator
from tlcli.training.order import epoch_order

COUNTS = (90, 7, 3)
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))


def orders(**options):
    return [epoch_order(LABELS, recipe(**options), generator(0, "order", epoch)) for epoch in range(20)]


def test_every_image_once_in_another_order_in_every_epoch():
    for options in ({}, {"class_weights": "balanced"}):
        found = orders(**options)
        assert all(sorted(order.tolist()) == list(range(100)) for order in found)
        assert len({tuple(order.tolist()) for order in found}) == 20


def test_with_class_weights_every_batch_has_its_share_of_each_class():
    for order in orders(class_weights="balanced"):
        labels = LABELS[order]
        for size in (10, 33, 50):
            for batch in labels.split(size):
                for label, count in enumerate(COUNTS):
                    assert abs(int((batch == label).sum()) - len(batch) * count / 100) < 2


def test_rare_images_come_first_and_last_as_often_as_others_where_they_lie_evenly_apart():
    begins = torch.tensor(
        [int(torch.nonzero(LABELS[order] == 2)[0]) for order in orders(class_weights="balanced")]
    )
    assert int(begins.min()) < 8
    assert 25 < int(begins.max()) < 36


def test_balanced_sampling_draws_classes_alike():
    drawn = torch.stack([torch.bincount(LABELS[order], minlength=3) for order in orders(sampling="balanced")])
    assert (drawn.double().mean(0) - 100 / 3).abs().max() < 4


def test_an_order_is_a_function_of_what_is_drawn():
    for options in ({}, {"class_weights": "balanced"}, {"sampling": "balanced"}):
        first = epoch_order(LABELS, recipe(**options), generator(3, "order", 1))
        torch.rand(5)  # the process's own numbers have no part in it
        again = epoch_order(LABELS, recipe(**options), generator(3, "order", 1))
        assert torch.equal(first, again)
