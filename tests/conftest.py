"""Fixtures of the whole suite: an isolated home, no network, one thread, small learnable images."""

import colorsys
import itertools
import logging
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So starts a shell what it puts into the background, and children inherit it; but Ctrl-C is tested here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so starts nohup, likewise
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass(frozen=True)
class Result:
    """What one command line gave."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's state below a folder of its own, away from hubs and from the user's settings."""
    home = tmp_path_factory.mktemp("home")
    for name in ("TLCLI_OFFLINE", "TLCLI_DEVICE", "TLCLI_WORKERS", "TLCLI_JSON", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TLCLI_HOME", str(home / "tlcli"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(home)
    random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two cores are shared by everything a test machine does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return `run_cli(*args) -> Result`, which runs a command line in this process."""

    def run(*args: object) -> Result:
        from tlcli.cli.app import main

        before = dict(os.environ)
        capfd.readouterr()
        try:
            code = main([str(arg) for arg in args])
        finally:
            os.environ.clear()
            os.environ.update(before)
            logger = logging.getLogger("tlcli")
            logger.handlers, logger.propagate = [], True
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def write_images(
    root: Path,
    counts: Mapping[str, int],
    size: tuple[int, int] = (32, 32),
    suffix: str = ".png",
    seed: int = 0,
) -> Path:
    """Write `counts[class]` images a class: a shape in the class's hue at a random place, easy to learn."""
    generator = random.Random(seed)
    for number, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        hue = number / max(1, len(counts))
        for index in range(count):
            shade = generator.randrange(200, 256)
            image = Image.new("RGB", size, (shade, shade, shade))
            left, top = generator.randrange(size[0] // 3), generator.randrange(size[1] // 3)
            colour = colorsys.hsv_to_rgb(hue, 0.9, 0.6 + 0.4 * generator.random())
            fill = tuple(int(255 * value) for value in colour)
            ImageDraw.Draw(image).rectangle((left, top, left + size[0] // 2, top + size[1] // 2), fill=fill)
            image.save(folder / f"{index:03d}{suffix}")
    return root


@pytest.fixture
def make_images() -> Callable[..., Path]:
    """Return `make_images(root, {class: count}, size, suffix, seed) -> root`."""
    return write_images


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder of images; a module's IMAGES says how many of each class."""
    return write_images(tmp_path / "images", getattr(request.module, "IMAGES", {"a": 12, "b": 12}))


@dataclass(frozen=True)
class TrainedRun:
    """A data set and a run trained on it; tests that change a run take a copy."""

    images: Path
    run: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Return a run of a tiny backbone whose head is stored as its classifier.

    Classes b and c look alike, so that it makes mistakes.
    """
    from tlcli.commands.finetune import finetune, plan_finetune
    from tlcli.config.commands import FinetuneConfig
    from tlcli.progress import Silent

    root = tmp_path_factory.mktemp("trained")
    images = write_images(root / "images", {"a": 16, "b": 16})
    alike = write_images(root / "alike", {"x": 16, "y": 16}, seed=1)
    (alike / "y").rename(images / "c")
    config = FinetuneConfig(
        data=str(images), backbone="test_resnet", random_init=True, image_size=32, output=str(root / "run"),
        dtype="fp32", workers=2, scaling="plain",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_HOME", str(root / "home"))
        finetune(plan_finetune(config, Silent()), Silent())
    return TrainedRun(images, root / "run")


@pytest.fixture
def make_tuned(trained: TrainedRun, tmp_path: Path) -> Callable[..., Path]:
    """Return `make_tuned(backbone, hidden) -> run`: a run whose backbone is no longer what it was.

    It is not trained but shifted by noise, so that only its own stored tensors give its logits. The data are
    those of `trained`.
    """

    def make(backbone: str = "test_resnet", hidden: tuple[int, ...] = (), **training: object) -> Path:
        import dataclasses

        import torch

        from tlcli.backbones.zoo import load_backbone
        from tlcli.config.backbone import BackboneOptions
        from tlcli.config.commands import FinetuneConfig
        from tlcli.config.fields import to_options
        from tlcli.heads.linear import LinearHead
        from tlcli.heads.mlp import MlpHead
        from tlcli.runs.directory import RunDirectory
        from tlcli.runs.model_files import save_model
        from tlcli.runs.run import open_run

        loaded = load_backbone(BackboneOptions(backbone=backbone, random_init=True, image_size=32))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for tensor in loaded.model.parameters():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        sizes = (loaded.num_features, *hidden, 3)
        weights = [torch.randn(b, a, generator=generator) / a**0.5 for a, b in itertools.pairwise(sizes)]
        biases = [torch.randn(len(weight), generator=generator) / 10 for weight in weights]
        head = (
            MlpHead(tuple(weights), tuple(biases), "elu") if hidden
            else LinearHead(weights[0], biases[0], False)
        )  # fmt: skip
        config = FinetuneConfig(data=str(trained.images), backbone=backbone, random_init=True, freeze="2")
        facts = open_run(str(trained.run)).facts
        facts = {key: facts[key] for key in ("class_names", "data", "device")} | {
            "scenario": "freeze",
            "backbone": {"name": backbone, "architecture": loaded.architecture, "arguments": loaded.arguments,
                         "license": None, "source": loaded.origin, "pretrained": False,
                         "num_frozen_units": 2},
            "preprocess": dataclasses.asdict(loaded.preprocess),
            "cache_key": None,
            "dtype": {"name": "fp32", "reason": "asked for", "prefix": "fp32", "suffix": "fp32"},
            "options": to_options(config),
        }  # fmt: skip
        run = tmp_path / "tuned"
        with RunDirectory(run, config, facts) as writer:
            stored = save_model(writer, loaded, head, tuple(facts["class_names"]))
            writer.finish({
                "head": {"kind": "mlp" if hidden else "linear", "chosen": {}, "cv": None, "stored": stored},
                "recipe": {"epochs": 3}, "trained_on": ["train"], "metrics": {"val": None},
                "training": {"epochs": 3, "steps": 9, "best_epoch": None, "selected_on": None, "probe": None,
                             **training},
            })  # fmt: skip
        torch.save((loaded.model, head), tmp_path / "tuned.pt")
        return run

    return make


@pytest.fixture
def real_assets() -> Path:
    """Return the folder of the real backbone and data sets, or skip."""
    value = os.environ.get("TLCLI_REAL_ASSETS")
    if not value or not Path(value).is_dir():
        pytest.skip("TLCLI_REAL_ASSETS is not set to the folder of the real assets")
    return Path(value)
