"""Where the frozen work is cached: arithmetic on given costs, and that the measurement is one of them."""

import dataclasses
import itertools
import json

import pytest
import torch

from tests.tiny import tiny
from tlcli.backbones.compute import Compute
from tlcli.backbones.zoo import load_backbone
from tlcli.cache.store import Store
from tlcli.commands.extract import plan_extract
from tlcli.config.backbone import BackboneOptions
from tlcli.config.commands import ExtractConfig
from tlcli.data.augment import AugmentPolicy
from tlcli.data.collection import collect
from tlcli.errors import DataError
from tlcli.features import cache_decision, cost_trial
from tlcli.features.cache_decision import TIE, cached, choose_place, decide, recomputed
from tlcli.features.cost_trial import (
    CUT,
    RECOMPUTE,
    CachePlace,
    CachingCosts,
    Trial,
    disk_seconds,
    measure_costs,
)
from tlcli.features.earlier import earlier_rows, rows_at
from tlcli.features.extractor import Extractor
from tlcli.features.plan import make_extractor
from tlcli.features.views import Views
from tlcli.machine import memory, paths
from tlcli.progress import Silent

POLICY = AugmentPolicy(name="test", mirror=0.5)
AT_CUT = CachePlace(where=CUT, row_bytes=100_000, rows_to_compute=4200, prefix_seconds=0.01, rest_seconds=0.0,
               write_seconds=0.0004, read_seconds=0.0001)  # fmt: skip
COSTS = CachingCosts(
    epochs=20, num_train=1000, num_val=200, num_views=4, load_seconds=0.004, view_seconds=0.001,
    prefix_seconds=0.01, step_seconds=0.002, workers=2, overlap=False, free_bytes=1 << 40, places=(AT_CUT,),
)  # fmt: skip


def costs(**changes):
    return dataclasses.replace(COSTS, **changes)


def place(**changes):
    return dataclasses.replace(AT_CUT, **changes)


# ---- arithmetic ------------------------------------------------------------------------------------------


def test_the_seconds_of_both_sides_by_hand():
    side = cached(COSTS, AT_CUT)
    steps = 20 * 0.002 * (1000 + 200 / 3)
    # 4200 rows of 1050 images, two at a time; then 20 x 1200 rows are read
    assert side.fill_seconds == pytest.approx((1050 * 0.004 + 4200 * (0.001 + 0.01)) / 2 + 4200 * 0.0004)
    assert side.train_seconds == pytest.approx(24_000 * 0.0001 / 2 + steps)
    assert side.new_bytes == 420_000_000
    other = recomputed(COSTS)
    assert other.seconds == pytest.approx(24_000 * (0.004 + 0.001 + 0.01) / 2 + steps)
    assert choose_place(COSTS).where == CUT


def test_on_a_gpu_loading_goes_on_beside_the_work():
    side = recomputed(costs(overlap=True, workers=8))
    steps = 20 * 0.002 * (1000 + 200 / 3)
    assert side.seconds == pytest.approx(max(24_000 * 0.005 / 8, 24_000 * 0.01 + steps))
    slow = recomputed(costs(overlap=True, workers=1, prefix_seconds=0.0001))
    assert slow.seconds == pytest.approx(24_000 * 0.005)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, CUT),
        ({"epochs": 2}, RECOMPUTE),  # fewer passes than views
        ({"epochs": 2, "places": (place(rows_to_compute=0),)}, CUT),  # already there
        ({"free_bytes": 400_000_000}, RECOMPUTE),  # it does not fit
        ({"places": (place(read_seconds=0.04),)}, RECOMPUTE),  # a slow disk
        ({"load_seconds": 1e-4, "view_seconds": 1e-4, "prefix_seconds": 1e-4}, RECOMPUTE),  # nothing to save
        ({"step_seconds": 10.0}, RECOMPUTE),  # of no account beside the training: no disk is used
    ],
)
def test_what_decides(changes, where):
    decision = choose_place(costs(**changes))
    assert decision.where == where
    assert decision.node is None


def test_an_earlier_place_is_taken_where_its_rows_are_cheaper_than_the_rest():
    early = place(where="stem", row_bytes=10_000, prefix_seconds=0.009, rest_seconds=0.0002,
                  write_seconds=4e-5, read_seconds=1e-5)  # fmt: skip
    slow = place(read_seconds=0.01, write_seconds=0.01)
    decision = choose_place(costs(places=(slow, early)))
    assert (decision.where, decision.node) == ("stem", "stem")
    assert choose_place(costs(places=(AT_CUT, dataclasses.replace(early, rest_seconds=0.002)))).where == CUT
    assert choose_place(costs(places=(AT_CUT, early), free_bytes=100_000_000)).where == "stem"
    tie = choose_place(costs(places=(AT_CUT, early)))
    assert tie.where == "stem"  # a little quicker or slower, and a tenth of the bytes


def test_the_choice_is_never_more_than_the_tie_slower_than_the_best_that_fits():
    for epochs, views, prefix, read, free in itertools.product(
        (1, 3, 30), (1, 4), (1e-4, 1e-2), (1e-5, 1e-3, 1e-1), (0, 1 << 40)
    ):
        rows = 1000 * views + 200
        early = place(where="early", row_bytes=30_000, rows_to_compute=rows, prefix_seconds=prefix / 3,
                      rest_seconds=prefix, read_seconds=read / 3)  # fmt: skip
        at_cut = place(rows_to_compute=rows, prefix_seconds=prefix, read_seconds=read)
        decision = choose_place(
            costs(
                epochs=epochs, num_views=views, prefix_seconds=prefix, free_bytes=free, places=(at_cut, early)
            )
        )
        assert {option.where for option in decision.options} == {CUT, "early", RECOMPUTE}
        best, *_ = decision.options
        assert best.where == decision.where
        assert best.fits
        quickest = min(option.seconds for option in decision.options if option.fits)
        assert best.seconds <= (1 + TIE) * quickest


def test_it_is_told_with_its_numbers():
    text = choose_place(COSTS).reason
    assert text.startswith("caching at the cut: 27 s to fill + 44 s reading and training (420.0 MB)")
    assert "recomputing would take 223 s" in text
    text = choose_place(costs(free_bytes=0)).reason
    assert text.startswith("recomputing in each epoch: 223 s")
    assert "caching at the cut needs 420.0 MB, more than is free" in text
    document = choose_place(COSTS).document()
    json.dumps(document, allow_nan=False)
    assert document["where"] == CUT
    assert [option["where"] for option in document["options"]] == [CUT, RECOMPUTE]
    assert document["costs"]["places"][0]["row_bytes"] == 100_000


# ---- measurement -----------------------------------------------------------------------------------------


def config(folder, **options):
    return tiny(ExtractConfig, folder, **{"freeze": "3", **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for number in range(cache_decision.FEW_IMAGES):
        path = root / "ab"[number % 2]
        path.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (number, 100, 255 - number)).save(path / f"{number:03d}.png")
    return root


@pytest.fixture
def collection(folder):
    return collect(config(folder), 2, Silent())


def made(folder, **options):
    chosen = config(folder, **options)
    return make_extractor(load_backbone(chosen), chosen, views=Views(POLICY))


def test_measuring_leaves_nothing_behind_and_changes_nothing(folder, collection):
    extractor = made(folder)
    model = extractor.backbone.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    folders = sorted(paths.home().parent.iterdir())
    decision = decide(extractor, collection, epochs=5, num_views=3, workers=2)
    assert sorted(paths.home().parent.iterdir()) == folders
    assert not paths.home().exists()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    found = decision.costs
    assert (found.epochs, found.num_views, found.workers) == (5, 3, 2)
    assert found.num_train + found.num_val == cache_decision.FEW_IMAGES
    assert found.places[0].rows_to_compute == 3 * found.num_train + found.num_val
    assert found.places[0].row_bytes == extractor.row_bytes
    for name in ("load_seconds", "view_seconds", "prefix_seconds", "step_seconds"):
        assert getattr(found, name) > 0, name
    assert all(item.read_seconds > 0 and item.write_seconds > 0 for item in found.places)
    assert decision.where in {RECOMPUTE, *(item.where for item in found.places)}
    assert decision.where in json.dumps(decision.document(), allow_nan=False)


def test_a_full_disk_means_recomputing(folder, collection, monkeypatch):
    monkeypatch.setattr(Store, "free_bytes", lambda _: -5)
    monkeypatch.setattr(cost_trial, "disk_seconds", None)
    decision = decide(made(folder), collection, epochs=50, num_views=1, workers=2)
    assert decision.where == RECOMPUTE
    assert "more than is free" in decision.reason


def test_rows_that_are_cached_cost_nothing_more(folder, collection):
    extractor = made(folder)
    chosen = config(folder, workers=2)
    from tlcli.features.plan import compute_features, plan_features

    plan = plan_features(collection, extractor, cache="auto", workers=2, max_bad=0.0, num_views=2)
    compute_features(plan, Silent())
    assert plan_extract(chosen, Silent()).rows_to_compute == 0
    decision = decide(extractor, collection, epochs=1, num_views=2, workers=2)
    assert decision.costs.places[0].rows_to_compute == 0


def test_a_place_that_cannot_be_had_is_not_chosen(folder, collection, monkeypatch):
    extractor = made(folder)
    best = place(where="nowhere", row_bytes=1, prefix_seconds=0.0, read_seconds=0.0, write_seconds=0.0)
    monkeypatch.setattr(cache_decision, "measure_costs", lambda *_: costs(places=(AT_CUT, best)))
    assert choose_place(costs(places=(AT_CUT, best))).where == "nowhere"
    assert decide(extractor, collection, epochs=20, num_views=4, workers=2).where == CUT


def test_a_place_that_is_chosen_can_be_had(folder, collection):
    """Where rows at the cut are larger than the images, the images are a place."""
    extractor = made(folder, backbone="mobilenetv2_035", freeze="1")
    earlier = earlier_rows(extractor)
    places = measure_costs(
        Trial(extractor, Compute()), collection, [range(1)] * 200, 2, earlier=earlier
    ).places
    assert [item.where for item in places] == [CUT, "input"]
    assert places[1].row_bytes == 2 * 3 * 32 * 32 < places[0].row_bytes
    found = rows_at(extractor, "input", earlier)
    assert found.extractor.cut.row_shape == (3, 32, 32)
    assert places[1].rest_seconds == places[0].prefix_seconds - places[1].prefix_seconds > 0
    assert rows_at(extractor, "nowhere") is None


def test_few_images_are_not_measured(folder, collection, monkeypatch):
    monkeypatch.setattr(cache_decision, "measure_costs", None)
    few = collection.select(range(20))
    extractor = made(folder)
    decision = decide(extractor, few, epochs=10, num_views=4, workers=2)
    assert (decision.where, decision.costs) == (CUT, None)
    assert "too few to measure" in decision.reason
    assert decide(extractor, few, epochs=2, num_views=4, workers=2).where == RECOMPUTE
    monkeypatch.setattr(Store, "free_bytes", lambda _: 1000)
    assert decide(extractor, few, epochs=10, num_views=4, workers=2).where == RECOMPUTE
    json.dumps(decision.document())


def test_images_that_cannot_be_decoded_are_an_error(tmp_path):
    for number in range(cache_decision.FEW_IMAGES):
        path = tmp_path / "images" / "ab"[number % 2]
        path.mkdir(exist_ok=True, parents=True)
        (path / f"{number:03d}.png").write_text(f"no image {number}")
    bad = collect(config(tmp_path / "images"), 2, Silent())
    with pytest.raises(DataError, match="can be decoded"):
        decide(made(tmp_path), bad, epochs=2, num_views=2, workers=2)


def test_what_does_not_fit_the_memory_is_read_from_the_disk(tmp_path, monkeypatch):
    backbone = load_backbone(BackboneOptions(backbone="test_resnet", random_init=True, image_size=32))
    spec = Extractor(backbone, freeze="2", device="cpu", dtype="fp32").spec
    forgotten = []
    monkeypatch.setattr(cost_trial, "_drop_from_page_cache", forgotten.append)
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    write, read = disk_seconds(store, spec, 1 << 20)
    assert write > 0
    assert read > 0
    assert not forgotten
    disk_seconds(store, spec, 1 << 30)
    assert len(forgotten) == 1
    assert list(tmp_path.iterdir()) == []
