"""Naming classes in a stream: the same as the trained network, image by image."""

import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tlcli.commands.predict import Predictor, predict
from tlcli.config.commands import PredictConfig
from tlcli.data.dataset import Sample
from tlcli.data.decode import decode
from tlcli.data.folders import find_images
from tlcli.data.image_files import read_bytes
from tlcli.errors import DataError, UsageError
from tlcli.runs.run import open_run


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor(open_run(str(trained.run)), dtype="fp32")


@pytest.fixture
def samples(trained):
    return find_images([str(trained.images)])


def test_logits_equal_those_of_timm_on_the_same_tensor(trained, predictor, samples):
    images = torch.stack(
        [predictor.extractor.view.transform(decode(read_bytes(s.path))) for s in samples[:20]]
    )
    model = timm.create_model(f"local-dir:{trained.run}", pretrained=True).eval()
    assert model.num_classes == 3
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = model((images.float() / 255 - mean) / std)
    torch.testing.assert_close(predictor.logits(images), expected, rtol=0, atol=1e-4)
    assert predictor.logits(images[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("backbone", "hidden"), [("test_resnet", ()), ("test_resnet", (6,)), ("classic/lenet5", (6, 5))]
)
def test_a_tuned_network_gives_the_logits_of_what_was_trained(make_tuned, samples, backbone, hidden):
    run = make_tuned(backbone, hidden)
    model, head = torch.load(run.with_suffix(".pt"), weights_only=False)
    predictor = Predictor(open_run(str(run)), dtype="fp32")
    images = torch.stack(
        [predictor.extractor.view.transform(decode(read_bytes(s.path))) for s in samples[:9]]
    )
    preprocess = predictor.extractor.backbone.preprocess
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    with torch.inference_mode():
        expected = head.logits(model((images.float() / 255 - mean) / std))
    torch.testing.assert_close(predictor.logits(images), expected, rtol=1e-4, atol=1e-4)
    found = list(predictor.predict(samples[:9], top=3))
    assert [item.classes[0][0] for item in found] == ["abc"[i] for i in expected.argmax(1)]


def test_classes_equal_those_of_timm_through_its_own_transform(tmp_path, make_images, trained, predictor):
    folder = make_images(tmp_path / "photos", {"a": 40, "b": 40}, size=(90, 70), suffix=".jpg", seed=4)
    samples = find_images([str(folder)])
    ours = [item.classes[0][0] for item in predictor.predict(samples)]
    model = timm.create_model(f"local-dir:{trained.run}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(sample.path).convert("RGB")) for sample in samples])
        theirs = [predictor.class_names[number] for number in model(batch).argmax(1)]
    agreement = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    assert agreement >= 0.99
    assert len(set(ours)) > 1


def test_predictions_come_in_order_and_with_ranked_probabilities(predictor, samples):
    found = list(predictor.predict(samples, top=3, workers=2))
    assert [item.file for item in found] == [sample.name for sample in samples]
    for item in found:
        values = [value for _, value in item.classes]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert {name for name, _ in item.classes} == {"a", "b", "c"}


def test_more_classes_than_there_are_gives_all_of_them(predictor, samples):
    assert len(next(iter(predictor.predict(samples[:1], top=50))).classes) == 3


def test_a_prediction_does_not_depend_on_the_others(predictor, samples):
    together = {item.file: item.classes for item in predictor.predict(samples, top=3)}
    for sample in samples[::7]:
        (alone,) = predictor.predict([sample], top=3, workers=3)
        assert [name for name, _ in alone.classes] == [name for name, _ in together[sample.name]]
        assert dict(alone.classes) == pytest.approx(dict(together[sample.name]), abs=1e-6)


def test_one_bad_image_is_reported_and_the_rest_predicted(predictor, samples, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [samples[0], Sample(str(tmp_path / "bad.png"), "bad.png"), Sample("nowhere.png", "nowhere.png"),
             samples[1], samples[0]]  # fmt: skip
    found = list(predictor.predict(mixed))
    assert [item.file for item in found] == [sample.name for sample in mixed]
    assert [bool(item.error) for item in found] == [False, True, True, False, False]
    assert found[1].classes == ()
    assert found[0] == found[4]


def test_an_endless_stream_is_answered_as_it_comes(predictor, samples):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield samples[len(taken) % len(samples)]

    stream = predictor.predict(endless(), workers=1)
    for _ in range(3):
        next(stream)
    assert len(taken) <= predictor.extractor.batch_size


def run_predict(run, *images, lines=(), **options):
    return list(predict(PredictConfig(run=str(run), images=tuple(map(str, images)), **options), lines))


def test_files_folders_and_lines(trained, tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    shutil.copy(trained.images / "a/000.png", tmp_path / "deep/er/one.PNG")
    lines = [f"{trained.images}/b/000.png\n", "\n", f"{trained.images}/b/001.png\r\n"]
    found = run_predict(trained.run, trained.images / "c/000.png", "-", tmp_path, lines=lines, workers=2)
    assert [Path(item.file).name for item in found] == ["000.png", "000.png", "001.png", "one.PNG"]
    assert not any(item.error for item in found)


def test_names_of_any_bytes(trained, tmp_path):
    for name in ("new\nline.png", "[red]x.png", "\udcff.png"):
        shutil.copy(trained.images / "a/000.png", os.fsencode(tmp_path / name))
    found = run_predict(trained.run, tmp_path)
    assert {Path(item.file).name for item in found} == {"new\nline.png", "[red]x.png", "\udcff.png"}
    assert len({item.classes for item in found}) == 1


def test_nothing_to_predict(trained, tmp_path):
    with pytest.raises(UsageError, match="IMAGES"):
        run_predict(trained.run)
    with pytest.raises(DataError, match="There are no images"):
        run_predict(trained.run, "-")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="None of 1"):
        run_predict(trained.run, tmp_path / "bad.png")
    with pytest.raises(DataError):
        run_predict(trained.run, tmp_path / "none.png")
    with pytest.raises(DataError, match="does not exist"):
        run_predict(tmp_path / "none", trained.images)


def test_the_runs_own_dtype_unless_asked(trained):
    run = open_run(str(trained.run))
    assert Predictor(run).extractor.dtype_choice.name == "fp32"
    assert Predictor(run, dtype="bf16").extractor.dtype_choice.name == "bf16"
