"""Sources: views are drawn fairly and reproducibly, batches come in order."""

import threading
from collections import Counter

import pytest
import torch

from tlcli.backbones.zoo import load_backbone
from tlcli.config.commands import ExtractConfig
from tlcli.data.collection import collect
from tlcli.data.image_files import read_bytes
from tlcli.errors import DataError
from tlcli.features.plan import make_extractor
from tlcli.progress import Silent
from tlcli.training import inputs
from tlcli.training.inputs import PLAIN, ImageInputs, RowInputs, loading, view_of

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

    source = RowInputs(read, KEYS, num_views=4, seed=0, device=torch.device("cpu"))
    rows = source.finish(source.load([3, 1], 0, print))
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[3.0], [1.0]]
    source.load([3, 1], PLAIN, print)
    assert asked[1] == ([3, 1], [0, 0])
    assert asked[0][1] == [view_of(KEYS[index], 0, 4, 0) for index in (3, 1)]


class Counting:
    """Gives its indices, and remembers who asked."""

    def __init__(self, bad=None):
        self.bad, self.threads = bad, set()

    def __len__(self):
        return 100

    def load(self, indices, epoch, turn):
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


def test_work_that_takes_turns_goes_on_only_while_a_batch_is_waited_for():
    class Turning(Counting):
        def load(self, indices, epoch, turn):
            self.turn = turn
            assert turn()
            return super().load(indices, epoch, turn)

    source = Turning()
    with loading(source, [[i] for i in range(40)], 0, workers=3) as stream:
        for _ in stream:
            assert not source.turn(0)  # an event, which is waited for no longer than this
    with loading(source, [[i] for i in range(40)], 0, workers=3) as stream:
        next(stream)  # those that wait for their turn are let go at the end
    assert source.turn(0)


@pytest.mark.parametrize(
    ("ahead", "read_at_turns"), [(inputs.READ_AHEAD_BYTES, [3, 3, 3, 3]), (1, [1, 2, 3, 3])]
)
def test_images_are_read_ahead_and_decoded_in_turns(tmp_path, make_images, monkeypatch, ahead, read_at_turns):
    folder = make_images(tmp_path / "images", {"a": 2, "b": 1})
    config = ExtractConfig(
        data=str(folder), backbone="test_resnet", random_init=True, image_size=32, freeze="2"
    )
    collection = collect(config, 1, Silent())
    extractor = make_extractor(load_backbone(config), config)
    keys = [found.sha256 for found in collection.fingerprints]
    source = ImageInputs(extractor, collection.samples, keys, num_views=1, seed=0)
    read, found = [], []
    monkeypatch.setattr(inputs, "READ_AHEAD_BYTES", ahead)
    monkeypatch.setattr(inputs, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    rows = source.load([0, 1, 2], 0, lambda: found.append(len(read)))
    assert rows.shape[0] == 3
    assert found == read_at_turns  # one turn an image, one for the prefix


def test_an_error_in_a_thread_is_an_error_and_leaves_no_thread():
    before = threading.active_count()
    with (
        pytest.raises(DataError),
        loading(Counting(bad=30), [[i] for i in range(60)], 0, workers=3) as stream,
    ):
        list(stream)
    assert threading.active_count() == before
