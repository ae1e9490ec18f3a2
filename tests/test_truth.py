"""From the command line: what is cached is what would be computed, or it is refused; and it fits."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tlcli.cache.store import Store
from tlcli.features.extractor import Extractor
from tlcli.machine import paths

NETWORK = ("--backbone", "test_resnet", "--random-init", "--image-size", "32", "--dtype", "fp32", "-j", "2")
HEAD = ("--scaling", "plain", "--l2", "0.01,1")
TUNING = (
    *("--freeze", "2", "--epochs", "2", "--lr", "0.01", "-b", "8", "--augment", "light", "--views", "3"),
    *("--amp", "none", "--cache-dtype", "fp32"),
)  # fmt: skip


IMAGES = {"a": 10, "b": 10}


@pytest.fixture
def computed(monkeypatch):
    """Return the list of what was computed, which grows; images that are only decoded are not in it."""
    asked = []
    real = Extractor.rows
    monkeypatch.setattr(
        Extractor, "rows", lambda self, images, **more: asked.append(images) or real(self, images, **more)
    )
    return asked


def entry_of_the_cache(place=0):
    store = Store(paths.features_dir())
    return store.find(store.all_keys()[place])


def rewrite(change, **versions):
    """Write the one entry's rows again, valid in every checksum; return the keys in the order of `change`."""
    entry = entry_of_the_cache()
    keys = sorted(entry.rows())
    env = json.loads(entry.shards()[0].env) | versions
    rows = entry.read(keys)[0]
    shutil.rmtree(entry.shards_dir)
    with Store(paths.features_dir()).entry(entry.spec).writer(env) as writer:
        for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
            writer.add(key, change(number, row).astype(np.float32))
    return keys


def shards():
    return list(paths.home().rglob("*.safetensors"))


# ---- stored rows against the model -----------------------------------------------------------------------


@pytest.mark.parametrize("command", [("extract",), ("finetune", *HEAD)])
def test_verify_finds_a_wrong_row_and_prints_the_document(run_cli, folder, command):
    arguments = (*command, folder, *NETWORK)
    first = run_cli(*arguments, "--json")
    assert first.code == 0, first.stderr
    clean = run_cli(*arguments, "--cache", "verify", "--json")
    assert clean.code == 0, clean.stderr
    assert json.loads(clean.stdout)["features"]["rows_computed"] == 20
    rewrite(lambda number, row: row * (1.0 if number != 7 else 1.01))
    found = run_cli(*arguments, "--cache", "verify", "--json")
    assert found.code == 6
    document = json.loads(found.stdout)
    assert document["schema"] == f"tlcli.{command[0]}.check/1"
    assert len(document["differing"]) == 1
    assert 0.005 < document["largest_difference"] < 0.02
    assert document["features"]["rows_computed"] == 20
    assert "1 of 20 stored rows" in found.stderr
    assert document["differing"][0] in found.stderr
    assert "Traceback" not in found.stderr


def test_rows_of_other_versions_that_differ_are_computed_again(run_cli, folder):
    arguments = ("extract", folder, *NETWORK)
    assert run_cli(*arguments, "-o", "first.npz").code == 0
    rewrite(lambda number, row: 1.1 * row, torch="1.13.1")
    plan = run_cli(*arguments, "--dry-run", "--json")
    assert json.loads(plan.stdout)["rows_to_compute"] == 20
    second = run_cli(*arguments, "-o", "second.npz", "--json")
    assert second.code == 0
    assert json.loads(second.stdout)["features"]["rows_computed"] == 20
    assert f'torch: "1.13.1" -> "{torch.__version__}"' in second.stderr
    assert "computed again" in second.stderr
    with np.load("first.npz") as one, np.load("second.npz") as other:
        assert np.array_equal(one["features"], other["features"])
    third = run_cli(*arguments, "--json")
    assert json.loads(third.stdout)["features"]["rows_reused"] == 20
    assert "1.13.1" not in third.stderr


def test_rows_of_other_versions_that_agree_are_used_and_told_once(run_cli, folder):
    arguments = ("extract", folder, *NETWORK, "--json")
    assert run_cli(*arguments).code == 0
    rewrite(lambda number, row: row, timm="0.9.0")
    plain, quiet = run_cli(*arguments), run_cli(*arguments, "-q")
    for result in (plain, quiet):
        assert json.loads(result.stdout)["features"]["rows_reused"] == 20
    assert plain.stderr.count('timm: "0.9.0"') == 1
    assert quiet.stderr == ""


# ---- refused at publish ----------------------------------------------------------------------------------


def test_weights_that_change_during_extraction(run_cli, folder, monkeypatch):
    real, calls = Extractor.rows, []

    def rows(self, images, **more):
        calls.append(len(images))
        if len(calls) == 2:
            next(self.fast.module.parameters()).data[0] += 1e-6
        return real(self, images, **more)

    monkeypatch.setattr(Extractor, "rows", rows)
    result = run_cli("extract", folder, *NETWORK, "--json")
    assert (result.code, result.stdout) == (4, "")
    assert "weights changed while features were computed" in result.stderr
    assert shards() == []


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "densenet121"])
def test_a_prefix_in_train_mode(run_cli, folder, monkeypatch, backbone):
    """In train mode BatchNorm makes a row depend on its batch, and dropout on chance."""
    real, kinds = Extractor.compute_items, set()

    def compute_items(self, items, workers):
        self.fast.module.train()
        kinds.update(type(layer).__name__ for layer in self.fast.module.modules())
        return real(self, items, workers)

    monkeypatch.setattr(Extractor, "compute_items", compute_items)
    options = (
        "--backbone",
        backbone,
        "--random-init",
        "--image-size",
        "32" if backbone != "test_vit" else "160",
    )
    result = run_cli("extract", folder, *options, "--dtype", "fp32", "--json")
    assert (result.code, result.stdout) == (4, "")
    assert "train mode" in result.stderr
    assert shards() == []
    assert backbone != "densenet121" or "BatchNormAct2d" in kinds  # folded everywhere else


def test_rows_that_are_not_finite(run_cli, folder, tmp_path):
    """Finite weights whose features overflow: no check of the weights sees that."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    for name in [name for name in state if name.endswith("weight") and "layer" in name][-4:]:
        state[name] = torch.full_like(state[name], 1e30)
    save_file(state, tmp_path / "huge.safetensors")
    options = ("--backbone", "test_resnet", "--weights", tmp_path / "huge.safetensors", "--image-size", "32")
    result = run_cli("extract", folder, *options, "--dtype", "fp32", "--json")
    assert (result.code, result.stdout) == (4, ""), result.stderr
    assert "not finite" in result.stderr
    assert ".png" in result.stderr
    assert shards() == []


# ---- with the cache and without --------------------------------------------------------------------------


def metrics_of(result):
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    found = document["metrics"]["val"]
    assert 0 < found["num_images"] < 20
    return found, document["features"]


def test_pooled_metrics_do_not_depend_on_the_cache(run_cli, folder):
    arguments = ("finetune", folder, *NETWORK, *HEAD, "--json")
    never, new, cached, verified = (
        metrics_of(run_cli(*arguments, *more))
        for more in (("--cache", "never"), (), (), ("--cache", "verify"))
    )
    assert never[0] == new[0] == cached[0] == verified[0]
    assert [item[1]["rows_computed"] for item in (never, new, cached, verified)] == [20, 20, 0, 20]
    assert len(shards()) == 1


def test_metrics_of_cached_views_are_those_of_views_made_as_they_are_needed(run_cli, folder):
    """The same views of the same images, in the same order: the cache changes nothing but the time."""
    arguments = ("finetune", folder, *NETWORK, *TUNING, "--json")
    never = metrics_of(run_cli(*arguments, "--cache", "never"))
    assert shards() == []
    always = metrics_of(run_cli(*arguments, "--cache", "always"))
    cached = metrics_of(run_cli(*arguments, "--cache", "always"))
    assert always[1]["rows_computed"] > 40
    assert cached[1]["rows_computed"] == 0
    assert always[0] == cached[0]
    for name in ("top1_accuracy", "log_loss", "macro_f1"):
        assert never[0][name] == pytest.approx(cached[0][name], rel=1e-4)


# ---- size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("extract",), ("extract", *TUNING[:2]), ("finetune", *HEAD)])
def test_a_cap_refuses_before_anything_is_computed(run_cli, folder, computed, command):
    result = run_cli(*command, folder, *NETWORK, "--cache-max-size", "1kB", "--json")
    assert (result.code, result.stdout) == (5, "")
    assert "the cache's cap of 1.0 kB" in result.stderr
    assert "--cache-max-size" in result.stderr
    assert not computed
    assert not paths.home().exists()


def test_a_cap_counts_what_is_there(run_cli, folder, make_images, computed):
    assert run_cli("extract", folder, *NETWORK, "--cache-max-size", "1MB").code == 0
    used = Store(paths.features_dir()).num_bytes()
    more = make_images(folder.parent / "more", {"a": 4, "b": 4}, seed=1)
    computed.clear()
    refused = run_cli("extract", more, *NETWORK, "--cache-max-size", f"{used + 100}B")
    assert refused.code == 5
    assert not computed
    assert run_cli("extract", folder, *NETWORK, "--cache-max-size", f"{used}B").code == 0  # nothing new
    assert run_cli("extract", more, *NETWORK, "--cache-max-size", f"{2 * used}B").code == 0


def test_a_cap_of_evaluate(run_cli, trained, computed):
    refused = run_cli("evaluate", trained.run, "--cache-max-size", "1kB", "--json")
    assert (refused.code, refused.stdout) == (5, "")
    assert not computed


def test_training_that_the_cap_leaves_no_room_for_recomputes(run_cli, folder):
    """--cache auto keeps rows where they fit, and does without them where they do not."""
    arguments = ("finetune", folder, *NETWORK, *TUNING, "--epochs", "20", "--dry-run", "--json")
    for size, where in (("200GB", "cut"), ("1kB", "recompute")):
        result = run_cli(*arguments, "--cache-max-size", size)
        assert result.code == 0, result.stderr
        assert json.loads(result.stdout)["caching"]["where"] == where


@pytest.mark.parametrize("size", ["20", "much", "-1GB"])
def test_a_cap_that_is_no_size(run_cli, folder, computed, size):
    result = run_cli("extract", folder, *NETWORK, f"--cache-max-size={size}")
    assert (result.code, result.stdout) == (2, "")
    assert size in result.stderr
    assert not computed


def test_a_full_disk_refuses_before_anything_is_computed(run_cli, folder, computed, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=257 << 20, f_frsize=1))
    room = run_cli("extract", folder, *NETWORK, "--dry-run")
    assert room.code == 0  # 20 small rows fit between 257 and the reserve of 256 MiB
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=256 << 20, f_frsize=1))
    result = run_cli("extract", folder, *NETWORK, "--json")
    assert (result.code, result.stdout) == (5, "")
    assert "268.4 MB of them kept in reserve" in result.stderr
    assert not computed
    assert not paths.home().exists()
