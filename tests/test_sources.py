"""Sources: views are drawn fairly and reproducibly, batches come in order."""

import threading
from collections import Counter

import pytest
import torch

from tlcli.errors import DataError
from tlcli.sources import PLAIN, RowSource, loading, view_of

KEYS = [f"{number:064x}" for number in range(50)]


@pytest.mark.parametrize("num_views", [2, 4, 8])
def test_as_many_epochs_as_views_see_each_view_once(num_views):
    for key in KEYS[:10]:
        for cycle in range(3):
            epochs = range(cycle * num_views, (cycle + 1) * num_views)
            assert sorted(view_of(key, epoch, num_views, 0) for epoch in epochs) == list(range(num_views))


def test_images_of_one_epoch_are_spread_over_the_views():
    counts = Counter(view_of(key, 3, 4, 0) for key in KEYS)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 25


def test_views_are_a_function_of_seed_and_epoch():
    drawn = [[view_of(key, 1, 4, seed) for key in KEYS] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_evaluation_sees_the_plain_view_and_live_training_a_new_one_each_epoch():
    assert view_of(KEYS[0], PLAIN, 4, 0) == 0
    assert view_of(KEYS[0], 7, 1, 0) == 0
    assert [view_of(KEYS[0], epoch, None, 0) for epoch in range(3)] == [1, 2, 3]


def test_rows_are_asked_for_with_their_views():
    asked = []

    def read(indices, views):
        asked.append((list(indices), list(views)))
        return torch.tensor([[float(index)] for index in indices], dtype=torch.bfloat16)

    source = RowSource(read, KEYS, num_views=4, seed=0, device=torch.device("cpu"))
    rows = source.finish(source.load([3, 1], 0))
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[3.0], [1.0]]
    source.load([3, 1], PLAIN)
    assert asked[1] == ([3, 1], [0, 0])
    assert asked[0][1] == [view_of(KEYS[index], 0, 4, 0) for index in (3, 1)]


class Counting:
    """Gives its indices, and remembers who asked."""

    def __init__(self, bad=None):
        self.bad, self.threads = bad, set()

    def __len__(self):
        return 100

    def load(self, indices, epoch):
        self.threads.add(threading.current_thread().name)
        if self.bad in indices:
            raise DataError("gone")
        return torch.tensor(indices)

    def finish(self, loaded):
        return loaded


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_come_in_order_from_threads(workers):
    source, batches = Counting(), [[i, i + 1] for i in range(0, 100, 2)]
    before = torch.get_num_threads()
    with loading(source, batches, 0, workers=workers) as stream:
        assert [batch.tolist() for batch in stream] == batches
    assert torch.get_num_threads() == before
    assert threading.current_thread().name not in source.threads


def test_an_error_in_a_thread_is_an_error_and_leaves_no_thread():
    before = threading.active_count()
    with (
        pytest.raises(DataError),
        loading(Counting(bad=30), [[i] for i in range(60)], 0, workers=3) as stream,
    ):
        list(stream)
    assert threading.active_count() == before
