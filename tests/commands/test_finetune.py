"""From data to run: the numbers are right, repeatable, and cost no more than they must."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.tiny import finetuned, tiny
from tlcli.cli.app import main
from tlcli.commands.finetune import finetune, plan_finetune
from tlcli.commands.predict import Predictor
from tlcli.config.commands import FinetuneConfig
from tlcli.errors import BackboneError, CheckFailed, DataError, UsageError
from tlcli.heads.fit import fit_head
from tlcli.machine import paths
from tlcli.progress import Silent
from tlcli.runs.run import open_run

IMAGES = {"a": 12, "b": 12, "c": 12}


def config(folder, **options):
    return tiny(FinetuneConfig, folder, **{"l2": "0.01,1", "folds": 3, **options})


def run(folder, **options):
    return finetuned(config(folder, **options))


def plan(folder, **options):
    return plan_finetune(config(folder, **options), Silent())


def facts_of(result):
    return json.loads((result.run_path / "run.json").read_text())


def counts(result):
    return tuple(
        result.document["features"][key] for key in ("rows_reused", "rows_computed", "images_skipped")
    )


# ---- the result ------------------------------------------------------------------------------------------


def test_the_document_has_the_fixed_fields(folder):
    result = run(folder)
    document = result.document
    assert document["scenario"] == "feature-extraction"
    assert Path(document["run_path"]) == result.run_path
    val = document["metrics"]["val"]
    assert val["interval"]["low"] <= val["top1_accuracy"] <= val["interval"]["high"]
    assert val["num_images"] == document["num_images"]["val"]
    assert 0 < val["majority_baseline"] < 1
    assert counts(result) == (0, 36, 0)
    assert document["seconds"]["total"] >= document["seconds"]["head"] > 0
    json.dumps(document, allow_nan=False)
    assert facts_of(result)["metrics"] == document["metrics"]
    assert str(result.run_path) == "runs/images-test_resnet-feature-extraction"


def test_easy_images_are_learnt(folder):
    assert run(folder).document["metrics"]["val"]["top1_accuracy"] >= 0.8


def test_two_runs_with_one_seed_are_equal_and_the_second_computes_nothing(folder):
    first, second = run(folder), run(folder)
    assert counts(second) == (36, 0, 0)
    assert first.document["metrics"] == second.document["metrics"]
    assert first.document["head"] == second.document["head"]
    assert second.run_path.name.endswith("-2")
    for name in ("model.safetensors", "predictions-val.csv"):
        if (first.run_path / name).exists():
            assert (first.run_path / name).read_bytes() == (second.run_path / name).read_bytes()


def test_a_cache_changes_nothing_but_the_cost(folder):
    cached, fresh = run(folder), run(folder, cache="never")
    assert fresh.document["features"]["rows_computed"] == 36
    assert fresh.document["features"]["cache_key"] is None
    assert fresh.document["metrics"] == cached.document["metrics"]
    warm = run(folder)
    model = (
        "head.safetensors" if warm.document["head"]["stored"]["classifier"] is None else "model.safetensors"
    )
    assert (warm.run_path / model).read_bytes() == (fresh.run_path / model).read_bytes()


def test_every_change_costs_exactly_its_rows(folder, tmp_path, make_images):
    assert counts(run(folder)) == (0, 36, 0)
    more = make_images(tmp_path / "more", {"a": 2}, seed=7)
    shutil.copy(more / "a/000.png", folder / "b/new.png")  # one added
    assert counts(run(folder)) == (36, 1, 0)
    (folder / "c/000.png").rename(folder / "c/zzz.png")  # one renamed
    assert counts(run(folder)) == (37, 0, 0)
    shutil.copy(more / "a/001.png", folder / "a/001.png")  # one edited
    assert counts(run(folder)) == (36, 1, 0)
    (folder / "a/002.png").unlink()  # one deleted
    assert counts(run(folder)) == (36, 0, 0)
    (folder / "a/003.png").rename(folder / "b/relabelled.png")
    assert counts(run(folder)) == (36, 0, 0)
    assert counts(run(folder, val_fraction=0.5, split_seed=3, seed=4)) == (36, 0, 0)


def test_relative_paths_of_a_run_hold_from_any_folder(folder, tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.run, tmp_path / "base")
    first = run("images", backbone="local-dir:base", random_init=False, image_size=None)
    options = facts_of(first)["options"]
    assert options["data"] == str(tmp_path / "images")
    assert options["backbone"] == f"local-dir:{tmp_path / 'base'}"
    weights = run("images", backbone="test_resnet", random_init=False, weights="base/model.safetensors")
    assert facts_of(weights)["options"]["weights"] == str(tmp_path / "base/model.safetensors")
    # A run's own network is the backbone it was made of: not one row is computed anew.
    assert counts(weights) == (36, 0, 0)


# ---- splits ----------------------------------------------------------------------------------------------


def test_test_images_are_not_touched(tmp_path, make_images):
    for split, count in (("train", 8), ("val", 4), ("test", 3)):
        make_images(tmp_path / "tree" / split, {"a": count, "b": count}, seed=count)
    for path in (tmp_path / "tree/test").rglob("*.png"):
        path.write_bytes(b"no image")
    result = run(tmp_path / "tree")
    assert counts(result) == (0, 24, 0)
    assert result.document["num_images"] == {"train": 16, "val": 8, "test": 0}


def test_a_refit_trains_on_val_and_then_does_not_measure_on_it(folder):
    plain, refit = run(folder), run(folder, refit=True)
    assert refit.document["metrics"]["val"] is None
    assert refit.evaluation is None
    estimate = refit.document["metrics"]["cross_validation"]
    assert estimate["num_images"] == 36
    assert estimate["interval"]["low"] <= estimate["top1_accuracy"] <= estimate["interval"]["high"]
    assert 0 < estimate["majority_baseline"] < 0.6
    corrected = refit.document["head"]["cv"]["corrected"]
    assert estimate["method"] == corrected["method"] == "bootstrap"
    for name in ("top1_accuracy", "log_loss", "interval"):
        assert estimate[name] == corrected[name]
    assert corrected["log_loss"] >= refit.document["head"]["cv"]["log_loss"]
    assert f"top-1 accuracy {estimate['top1_accuracy']:.3f}" in (refit.run_path / "README.md").read_text()
    assert facts_of(refit)["trained_on"] == ["train", "val"]
    assert not (refit.run_path / "evaluation-val.json").exists()
    weights = [open_run(str(result.run_path)).head().weight for result in (plain, refit)]
    assert not torch.equal(*weights)


def test_the_score_of_a_refit_is_by_groups(tmp_path, make_images):
    folder = make_images(tmp_path / "images", {"a": 8, "b": 8})
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name("copy-" + path.name))
    interval = run(folder, refit=True).document["metrics"]["cross_validation"]["interval"]
    assert interval["method"] == "wilson-groups"
    assert interval["num_groups"] == 16


def test_mlp_heads_are_corrected_where_nothing_else_measures_them(folder):
    options = {"head": "mlp:4", "epochs": 2}
    assert run(folder, **options).document["head"]["cv"]["corrected"] is None
    refit = run(folder, refit=True, **options).document
    assert refit["metrics"]["cross_validation"]["method"] == "nested"


def test_copies_of_an_image_and_groups_are_not_divided_by_folds(tmp_path, make_images, monkeypatch):
    folder = make_images(tmp_path / "images", {"a": 8, "b": 8})
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name("copy-" + path.name))
    seen = {}

    def spy(rows, labels, num_classes, chosen, **more):
        seen.update(more, rows=rows, labels=labels)
        return fit_head(rows, labels, num_classes, chosen, **more)

    monkeypatch.setattr("tlcli.commands.finetune.fit_head", spy)
    run(folder, folds=2)
    groups = seen["groups"].tolist()
    assert len(set(groups)) == len(groups) // 2
    for group in set(groups):
        same = [row for row, number in zip(seen["rows"], groups, strict=True) if number == group]
        assert len(same) == 2
        assert torch.equal(*same)


def test_the_majority_class_is_counted_on_train(tmp_path, make_images):
    make_images(tmp_path / "tree/train", {"a": 4, "b": 7})
    make_images(tmp_path / "tree/val", {"a": 6, "b": 2}, seed=1)
    result = run(tmp_path / "tree", folds=2)
    assert facts_of(result)["data"]["majority_class"] == 1
    assert result.document["metrics"]["val"]["majority_baseline"] == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("apache-2.0", None),
        (None, "is not known"),
        ("other", "is not known"),
        ("cc-by-nc-4.0", "excludes commercial use"),
        ("fair-noncommercial-research-license", "excludes commercial use"),
    ],
)
def test_a_licence_that_is_unknown_or_not_commercial_is_noted(tmp_path, folder, license, expected):
    model = timm.create_model("test_resnet", num_classes=0)
    cfg = {"input_size": [3, 32, 32], **({"license": license} if license else {})}
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": cfg}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    warnings = plan(folder, backbone=f"local-dir:{tmp_path}/base", random_init=False).warnings
    assert all(warning["code"].startswith("licence_") for warning in warnings)
    assert [expected in warning["message"] for warning in warnings] == ([True] if expected else [])


def test_the_licence_of_a_weights_file_is_not_that_of_the_architecture(tmp_path, folder):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    own = {"backbone": "resnet18", "random_init": False, "weights": str(tmp_path / "w.safetensors")}
    result = run(folder, **own)
    assert facts_of(result)["backbone"]["license"] is None
    assert "license" not in json.loads((result.run_path / "config.json").read_text())["pretrained_cfg"]
    assert [warning["code"] for warning in plan(folder, **own).warnings] == ["licence_unknown"]
    assert not plan(folder, backbone="resnet18").warnings
    assert not plan(folder, backbone="bundled", random_init=False).warnings


# ---- other heads and backbones ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "l2-normalised", "bf16 rows", "knn", "lda"])
def test_other_heads_are_evaluated_and_predicted_with(folder, monkeypatch, run_cli, kind):
    options = {}
    if kind == "mlp":
        options = {"head": "mlp:8", "epochs": 5, "lr": "0.003", "dropout": "0", "folds": 2}
    if kind == "l2-normalised":
        options = {"scaling": "l2-normalised"}
    if kind == "bf16 rows":
        options = {"cache_dtype": "bf16"}
    if kind in {"knn", "lda"}:
        options = {"head": kind, "l2": "auto"}
    result = run(folder, **options)
    if kind in {"knn", "lda"}:
        assert result.document["head"]["kind"] == kind
        assert result.document["head"]["stored"]["facts"]["kind"] == ("knn" if kind == "knn" else "linear")
        assert result.document["head"]["cv"]["log_loss"] is not None
        assert ("features of the training images" in (result.run_path / "README.md").read_text()) == (
            kind == "knn"
        )
    if kind not in {"bf16 rows", "lda"}:
        assert (result.run_path / "head.safetensors").exists()
        assert result.document["head"]["stored"]["classifier"] is None
    measured = json.loads(run_cli("evaluate", result.run_path, "--json").stdout)
    assert measured["top1_accuracy"] == result.document["metrics"]["val"]["top1_accuracy"]
    assert measured["log_loss"] == pytest.approx(result.document["metrics"]["val"]["log_loss"], rel=1e-6)
    again = run_cli("evaluate", result.run_path)
    assert "reused" in again.stderr
    assert "computed 0" in again.stderr  # the rows of finetune
    predicted = json.loads(run_cli("predict", result.run_path, folder, "--json").stdout)
    assert predicted["num_images"] == 36
    assert predicted["num_bad"] == 0


def test_a_backbone_of_torchvision(folder, run_cli):
    result = run(folder, backbone="torchvision/resnet18")
    assert result.document["head"]["stored"]["file"] == "head.safetensors"
    measured = run_cli("evaluate", result.run_path, "--json")
    assert measured.code == 0, measured.stderr
    document = json.loads(measured.stdout)
    assert document["top1_accuracy"] == result.document["metrics"]["val"]["top1_accuracy"]
    assert "computed 0" in measured.stderr


def test_the_bundled_backbone(folder):
    result = run(folder, backbone="bundled", random_init=False, folds=2)
    assert facts_of(result)["backbone"]["source"] == "bundled"
    assert facts_of(result)["backbone"]["pretrained"] is True
    assert result.document["metrics"]["val"]["top1_accuracy"] >= 0.8


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["8", "none", "0"])
def test_freezing_less_than_everything_is_refused(folder, freeze):
    with pytest.raises(UsageError, match="contradict each other"):
        plan_finetune(config(folder, freeze=freeze, scenario="feature-extraction"), Silent())


def test_freezing_everything_is_what_happens_anyway(folder):
    plan_finetune(config(folder, freeze="all", scenario="feature-extraction"), Silent())


def test_the_output_is_checked_before_anything_else(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    with pytest.raises(UsageError, match="mine"):
        plan_finetune(config(folder, output=str(tmp_path / "mine"), backbone="no such backbone"), Silent())


def test_missing_data_and_backbone(folder, tmp_path):
    with pytest.raises(DataError, match="none"):
        plan_finetune(config(tmp_path / "none"), Silent())
    with pytest.raises(UsageError, match="backbone"):
        plan_finetune(config(folder, backbone=None), Silent())
    with pytest.raises((UsageError, BackboneError), match="resnet99"):
        plan_finetune(config(folder, backbone="resnet99"), Silent())


def test_too_many_bad_images_leave_a_failed_run_that_says_which(folder):
    for path in sorted((folder / "a").iterdir())[:4]:
        path.write_bytes(b"no image " + path.name.encode())
    plan = plan_finetune(config(folder), Silent())
    with pytest.raises(DataError, match="4 images of 36"):
        finetune(plan, Silent())
    facts = json.loads((plan.run_dir / "run.json").read_text())
    assert facts["status"] == "failed"
    assert "cannot be used" in facts["error"]
    assert len((plan.run_dir / "bad_images.csv").read_text().splitlines()) >= 5
    with pytest.raises(DataError, match="failed"):
        open_run(str(plan.run_dir))
    result = run(folder, max_bad=0.2)
    reused, computed, skipped = counts(result)
    assert (reused + computed, skipped) == (32, 4)
    assert facts_of(result)["data"]["bad"] == 4


def test_a_wrong_row_fails_the_run_with_verify(folder):
    result = run(folder)
    run(folder, cache="verify")
    entry_of = plan_finetune(config(folder), Silent()).features.store.entry
    keys = sorted(entry_of.rows())
    rows, _ = entry_of.read(keys)
    shutil.rmtree(entry_of.shards_dir)
    with entry_of.writer({}) as writer:
        for key, row in zip(keys, rows, strict=True):
            writer.add(key, row + np.float32(1))
    with pytest.raises(CheckFailed, match="stored rows"):
        run(folder, cache="verify")
    assert facts_of(result)["status"] == "done"


def test_verify_of_an_empty_cache_fills_it(folder):
    assert run(folder, cache="verify").document["features"]["rows_computed"] == 36
    assert counts(run(folder)) == (36, 0, 0)


# ---- real ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_hymenoptera_is_learnt_and_timm_agrees_through_its_own_transform(real_assets, tmp_path):
    import timm
    from PIL import Image

    from tlcli.data.folders import find_images

    run_dir, data = tmp_path / "run", real_assets / "hymenoptera"
    backbone = f"local-dir:{real_assets / 'mobilenetv2_100.imagenet'}"
    assert main(["finetune", str(data), "--backbone", backbone, "-o", str(run_dir), "--max-bad", "0.02"]) == 0
    run_facts = json.loads((run_dir / "run.json").read_text())
    assert run_facts["metrics"]["val"]["top1_accuracy"] >= 0.95
    assert run_facts["metrics"]["val"]["num_images"] == 153
    model = timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()
    if run_facts["head"]["stored"]["classifier"] is None:
        pytest.skip("the head chosen is no linear layer")
    predictor = Predictor(open_run(str(run_dir)), dtype="fp32")
    samples = find_images([str(data / "val")])
    ours = {item.file: item.classes[0][0] for item in predictor.predict(samples, workers=os.cpu_count() or 1)}
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    agree = 0
    with torch.inference_mode():
        for sample in samples:
            with Image.open(sample.path) as image:
                best = int(model(transform(image.convert("RGB"))[None]).argmax())
            agree += run_facts["class_names"][best] == ours[sample.name]
    assert agree / len(samples) >= 0.99
    assert paths.home().exists()


def test_a_row_damaged_after_it_was_found_is_computed_again(run_cli, make_images, tmp_path, monkeypatch):
    """The index knows the row, the checksum refuses it: the run goes on and is the same."""
    data = make_images(tmp_path / "photos", {"a": 12, "b": 12})
    options = ("--backbone", "test_resnet", "--random-init", "--image-size", "32", "--json")
    first = json.loads(run_cli("finetune", data, *options, "-o", tmp_path / "first").stdout)
    (shard,) = Path(os.environ["TLCLI_HOME"]).rglob("shards/*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 0x40  # in the last row
    shard.chmod(0o644)
    shard.write_bytes(damaged)
    again = run_cli("finetune", data, *options, "-o", tmp_path / "second")
    assert again.code == 0, again.stderr
    assert "computed again" in again.stderr
    assert json.loads(again.stdout)["metrics"] == first["metrics"]
