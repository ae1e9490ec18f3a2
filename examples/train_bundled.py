"""Train the backbone that tlcli carries, `--backbone bundled`, and write its model card.

    python examples/train_bundled.py --assets PATH [--cache DIR] [--output tlcli/backbones/bundled]

A small ResNet starts from random weights and sees only CIFAR-10. Three losses at once: the pooled features of
a real MobileNetV2 (the teacher), the teacher's 1000 ImageNet probabilities, and the ten labels. Teacher and
student see the same fixed crops and colours, so the teacher runs once per view and its features are kept in
--cache. The student sees them at several sizes, the native 32 pixels among them: photographs are sharper than
enlarged tiny images. The linear probes at the end use four data sets that play no part in training.

PATH is the folder with `cifar10_jpeg.tar.xz`, `mobilenetv2_100.imagenet/` and the four probe sets with their
CSV splits.

Time for the weights in the package, on one thread of a busy two-core machine with AVX512-BF16: teacher 9
minutes, student 22, probes 1 to 2. A free core trains at about 800 images/s, which makes 10 minutes for the
student. Without bfloat16 in hardware expect several times as long.

Expected, as top-1 of a linear probe (the seeds are fixed, but bfloat16 sums differ between processors):

    probe                ours   random pixels
    sign_digits          0.903  0.735  0.798
    neu_surface_defects  0.994  0.952  0.489
    hymenoptera          0.732  0.641  0.608
    flowers              0.698  0.596  0.468
    digits               0.969  0.972  0.972
"""

import argparse
import csv
import io
import json
import math
import os
import tarfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

ARCHITECTURE = "resnet14t"
MODEL_ARGS: dict[str, Any] = {"channels": [40, 80, 128, 232], "stem_width": 16}
TRAIN_SIZES = (32, 48, 64)
TEACHER = "mobilenetv2_100.imagenet"
TEACHER_SIZE = 128
PROBE_SETS = ("sign_digits", "neu_surface_defects", "hymenoptera", "flowers")
PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
MAX_BYTES = 3_900_000


@dataclass(frozen=True)
class Settings:
    """How the student is trained; the defaults made the weights in the package."""

    epochs: float = 10.0
    views: int = 2
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    mixup: float = 0.3
    temperature: float = 2.0
    feature_weight: float = 1.0
    teacher_weight: float = 0.5
    label_weight: float = 0.3
    seed: int = 0


def channels_last(images: Tensor) -> Tensor:
    """Return the batch in the memory layout convolutions on a CPU like best."""
    return images.contiguous(memory_format=torch.channels_last)


# ---- CIFAR-10 and its views -------------------------------------------------------------------------------


def read_cifar(archive: Path) -> tuple[Tensor, Tensor]:
    """Return the training images, uint8 [n, 32, 32, 3], and their labels, int64 [n], in order of name."""
    found: dict[str, np.ndarray] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.lstrip("./").startswith("train/"):
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name] = np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB"))
    names = sorted(found)
    classes = sorted({Path(name).parent.name for name in names})
    labels = torch.tensor([classes.index(Path(name).parent.name) for name in names])
    return torch.from_numpy(np.stack([found[name] for name in names])), labels


@dataclass(frozen=True)
class View:
    """One fixed augmentation of every image: affine crops, float [n, 2, 3], and colour changes, [n, 3]."""

    crop: Tensor
    colour: Tensor

    @classmethod
    def draw(cls, count: int, seed: int, smallest: float = 0.35) -> "View":
        """Draw crops of `smallest` to 1 of the area, flips, and brightness, contrast, saturation factors."""
        generator = torch.Generator().manual_seed(seed)

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator)

        area = smallest + (1 - smallest) * uniform()
        ratio = torch.exp((uniform() * 2 - 1) * math.log(4 / 3))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        left, top = (uniform() * 2 - 1) * (1 - width), (uniform() * 2 - 1) * (1 - height)
        flip = torch.where(uniform() < 0.5, -1.0, 1.0)
        zero = torch.zeros(count)
        crop = torch.stack(
            [torch.stack([width * flip, zero, left], 1), torch.stack([zero, height, top], 1)], 1
        )
        brightness, contrast = 0.65 + 0.7 * uniform(), 0.65 + 0.7 * uniform()
        saturation = 0.5 + uniform()
        saturation = torch.where(uniform() < 0.15, zero, saturation)
        return cls(crop, torch.stack([brightness, contrast, saturation], 1))

    def render(
        self, images: Tensor, index: Tensor, size: int, *, mode: str = "bilinear", mirror: bool = False
    ) -> Tensor:
        """Return the view of `images[index]` as float [n, 3, size, size] in [-1, 1]."""
        pixels = images[index].permute(0, 3, 1, 2).float() / 255
        brightness, contrast, saturation = self.colour[index].view(-1, 3, 1, 1, 1).unbind(1)
        pixels = pixels * brightness
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = mean + (pixels - mean) * contrast
        grey = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        pixels = (grey + (pixels - grey) * saturation).clamp(0, 1)
        crop = self.crop[index].clone()
        if mirror:
            crop[:, 0, 0] *= -1
        grid = F.affine_grid(crop, [len(index), 3, size, size], align_corners=False)
        pixels = F.grid_sample(pixels, grid, mode=mode, padding_mode="reflection", align_corners=False)
        return pixels.clamp(0, 1) * 2 - 1


def teacher_features(assets: Path, images: Tensor, views: list[View], cache: Path | None) -> list[Tensor]:
    """Return the teacher's pooled features of every view, float16 [n, 1280] each, kept in `cache`."""
    model = None
    found = []
    for number, view in enumerate(views):
        file = cache / f"targets-{number}.npy" if cache else None
        if file is not None and file.exists():
            found.append(torch.from_numpy(np.load(file)))
            continue
        if model is None:
            model = timm.create_model(f"local-dir:{assets / TEACHER}", pretrained=True, num_classes=0)
            model = model.eval().to(memory_format=torch.channels_last)
        started, parts = time.monotonic(), []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for index in torch.arange(len(images)).split(50):
                pixels = view.render(images, index, TEACHER_SIZE, mode="bicubic")
                parts.append(model(channels_last(pixels)).half())
        found.append(torch.cat(parts).clone())
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, found[-1].numpy())
        print(f"teacher, view {number}: {time.monotonic() - started:.0f} s", flush=True)
    return found


# ---- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What the student is asked for, one row per image of a batch."""

    features: Tensor
    probabilities: Tensor
    labels: Tensor

    def mixed(self, share: float, order: Tensor) -> "Targets":
        """Return `share` of these targets plus the rest of the same targets in another order."""
        rows = (self.features, self.probabilities, self.labels)
        return Targets(*(share * row + (1 - share) * row[order] for row in rows))


class Teacher:
    """The teacher's features, standardised, and the probabilities its classifier makes of them."""

    def __init__(self, assets: Path, features: list[Tensor], temperature: float) -> None:
        model = timm.create_model(f"local-dir:{assets / TEACHER}", pretrained=True)
        self.weight, self.bias = model.classifier.weight.detach(), model.classifier.bias.detach()
        sample = features[0][::10].float()
        # The small constant keeps features that are almost always zero from dominating the loss.
        self.mean, self.std = sample.mean(0), sample.std(0) + 0.03
        self.features, self.temperature = features, temperature

    def targets(self, view: int, index: Tensor, labels: Tensor) -> Targets:
        """Return the targets of one view of the images `index`."""
        values = self.features[view][index].float()
        logits = values @ self.weight.T + self.bias
        return Targets(
            features=((values - self.mean) / self.std).clamp(-5, 5),
            probabilities=F.softmax(logits / self.temperature, dim=1),
            labels=F.one_hot(labels, 10).float(),
        )


def create_student(seed: int) -> nn.Module:
    """Return the student without a classifier, with random weights that depend on `seed` only."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
    return model.to(memory_format=torch.channels_last)


def train(
    images: Tensor, labels: Tensor, views: list[View], teacher: Teacher, settings: Settings
) -> nn.Module:
    """Train the student and return it; the three heads it was trained through are dropped."""
    student = create_student(settings.seed)
    width = student.num_features
    heads = nn.ModuleList([nn.Linear(width, 1280), nn.Linear(width, 1000), nn.Linear(width, 10)])
    parameters = [*student.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    mixing = np.random.default_rng(settings.seed + 2)
    per_epoch = len(images) // settings.batch_size
    steps = round(settings.epochs * per_epoch)
    order = torch.empty(0, dtype=torch.long)
    started, averages = time.monotonic(), np.zeros(3)
    student.train()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        done = step / steps
        rate = min(1.0, (done + 1 / steps) / settings.warmup) * (
            0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        index = order[(step % per_epoch) * settings.batch_size :][: settings.batch_size]
        number = int(mixing.integers(len(views)))
        pixels = views[number].render(
            images, index, int(mixing.choice(TRAIN_SIZES)), mirror=bool(mixing.random() < 0.5)
        )
        targets = teacher.targets(number, index, labels[index])
        if mixing.random() < settings.mixup:
            share, other = float(mixing.beta(0.8, 0.8)), torch.randperm(len(index), generator=generator)
            pixels, targets = share * pixels + (1 - share) * pixels[other], targets.mixed(share, other)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student(channels_last(pixels))
            features, wide, ten = (head(hidden).float() for head in heads)
        losses = torch.stack(
            [
                F.mse_loss(features, targets.features),
                F.cross_entropy(wide / settings.temperature, targets.probabilities),
                F.cross_entropy(ten, targets.labels),
            ]
        )
        weights = losses.new_tensor([settings.feature_weight, settings.teacher_weight, settings.label_weight])
        optimizer.zero_grad(set_to_none=True)
        (losses * weights).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        averages += (losses.detach().numpy() - averages) / min(step + 1, 100)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{steps}  features {averages[0]:.3f}  teacher {averages[1]:.3f}  "
                f"labels {averages[2]:.3f}  {(step + 1) * settings.batch_size / seconds:.0f} images/s  "
                f"{seconds / 60:.1f} min",
                flush=True,
            )
    return student.eval()


def save(student: nn.Module, output: Path, image_size: int) -> None:
    """Write `config.json` and the weights as float16; timm copies them into float32 parameters."""
    output.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in student.state_dict().items()
    }
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise SystemExit(f"{name} does not fit into float16")
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": student.num_features,
        "global_pool": "avg",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 0,
            "pool_size": [math.ceil(image_size / 32)] * 2,
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
            "description": "tlcli's bundled backbone: a narrow ResNet distilled from MobileNetV2 on CIFAR-10",
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- linear probes ----------------------------------------------------------------------------------------


def probe_files(assets: Path, name: str) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Return a probe set's files, its labels and which rows train the probe (bool)."""
    if name == "hymenoptera":
        files = sorted(path for path in (assets / name).rglob("*") if path.is_file())
        return (
            files,
            np.array([path.parent.name for path in files]),
            np.array([path.parent.parent.name == "train" for path in files]),
        )
    with (assets / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return (
        [assets / row["filename"] for row in rows],
        np.array([row["label"] for row in rows]),
        np.array([row["split"] == "train" for row in rows]),
    )


def features_of(model: nn.Module, images: list[Image.Image], image_size: int) -> np.ndarray:
    """Return float32 [n, D]: pooled features through timm's own evaluation transform, in full precision."""
    config = timm.data.resolve_data_config({"input_size": (3, image_size, image_size)}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            batch = torch.stack([transform(image) for image in images[start : start + 64]])
            parts.append(model.eval()(channels_last(batch)))
    return torch.cat(parts).numpy()


def raw_pixels(images: list[Image.Image]) -> np.ndarray:
    """Return float32 [n, 1728]: every image squashed to 24 x 24 RGB, values in [0, 1]."""
    small = [np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC), np.float32) for image in images]
    return np.stack(small).reshape(len(small), -1) / 255


def probe(values: np.ndarray, labels: np.ndarray, in_train: np.ndarray) -> float:
    """Return the accuracy of logistic regression outside train, its strength chosen on a fifth of train."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    values = StandardScaler().fit(values[in_train]).transform(values)

    def fitted(strength: float, rows: np.ndarray, answers: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(rows, answers)

    with threadpool_limits(1), warnings.catch_warnings():
        # Weak regularisation needs thousands of steps to converge; 300 are enough to rank the strengths.
        warnings.simplefilter("ignore", ConvergenceWarning)
        inner, held, inner_labels, held_labels = train_test_split(
            values[in_train], labels[in_train], test_size=0.2, random_state=0, stratify=labels[in_train]
        )
        best = max(PROBE_STRENGTHS, key=lambda c: fitted(c, inner, inner_labels).score(held, held_labels))
        final = fitted(best, values[in_train], labels[in_train])
        return float(final.score(values[~in_train], labels[~in_train]))


def digits() -> tuple[list[Image.Image], np.ndarray, np.ndarray, np.ndarray]:
    """Return scikit-learn's digits (8 x 8) as images, their labels, which rows train, and the raw pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = (data.images * (255 / 16)).astype(np.uint8)
    train_rows, _ = train_test_split(
        np.arange(len(pixels)), test_size=0.3, random_state=0, stratify=data.target
    )
    in_train = np.isin(np.arange(len(pixels)), train_rows)
    return [Image.fromarray(image).convert("RGB") for image in pixels], data.target, in_train, data.data


def probe_all(
    assets: Path, output: Path, image_size: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Return (this backbone, its random initialisation, raw pixels) for every probe set and the digits."""
    ours = timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=0)
    blank = create_student(seed)
    blank.pretrained_cfg = ours.pretrained_cfg
    table = {}
    for name in (*PROBE_SETS, "digits"):
        if name == "digits":
            images, labels, in_train, pixels = digits()
        else:
            files, labels, in_train = probe_files(assets, name)
            images = [Image.open(file).convert("RGB") for file in files]
            pixels = raw_pixels(images)
        inputs: list[Callable[[], np.ndarray]] = [
            lambda images=images: features_of(ours, images, image_size),
            lambda images=images: features_of(blank, images, image_size),
            lambda pixels=pixels: pixels,
        ]
        ours_here, blank_here, pixels_here = (probe(values(), labels, in_train) for values in inputs)
        table[name] = (ours_here, blank_here, pixels_here)
        print(f"{name:20s} {ours_here:.3f}  {blank_here:.3f}  {pixels_here:.3f}", flush=True)
    return table


def images_per_second(model: nn.Module, image_size: int, *, bf16: bool) -> float:
    """Return the best of five forward passes of 64 images on the current number of threads."""
    batch = channels_last(torch.randn(64, 3, image_size, image_size))
    best = 0.0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for _ in range(6):
            started = time.perf_counter()
            model(batch)
            best = max(best, len(batch) / (time.perf_counter() - started))
    return best


# ---- model card -------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
library_name: timm
tags: [image-feature-extraction, timm]
---

# The backbone in the tlcli package

With tlcli: `--backbone bundled`. Without: `timm.create_model("local-dir:PATH", pretrained=True,
num_classes=0)`.

A narrow ResNet for a first try, for machines without a network and for tests. It was trained on tiny images
in minutes; where a model hub can be reached, a backbone trained on ImageNet is the better choice for real
work.

| | |
|---|---|
| architecture | timm `{architecture}`, {arguments} |
| parameters | {parameters:,} |
| features | {features}, averaged over positions |
| image size | {size} x {size}: shorter side resized (bicubic), centre crop; mean = std = 0.5 |
| weights on disk | {weight_bytes:,} bytes (float16, read into float32) |
| speed on one thread | {fast:.0f} images/s in bfloat16, {slow:.0f} in float32 (batch 64, AVX512-BF16) |

## What a linear probe reaches

Accuracy of logistic regression on standardised features, its strength chosen inside train, on the same
splits in every column. *Random* is the same network before training; *pixels* is the same regression on the
raw 24 x 24 RGB pixels (8 x 8 grey for the digits). The validation side of hymenoptera has 153 images only.

| data set | this backbone | random | pixels |
|---|---|---|---|
{rows}

None of these sets trained the weights. The first four were looked at to choose among a few architectures,
training recipes and image sizes, so their figures are slightly optimistic. `digits` are scikit-learn's
handwritten digits, easy for raw pixels too.

## How it was made

`examples/train_bundled.py`: {epochs:g} epochs over the 50,000 training images of CIFAR-10 in {views} fixed
augmented views, from random weights (seed {seed}), at 32, 48 and 64 pixels, with mixup on {mixup:.0%} of
the batches, AdamW and a cosine schedule, in bfloat16 on one CPU thread. The loss has three parts: mean
squared error to the standardised pooled features of the teacher (weight {feature_weight:g}), cross-entropy
to the teacher's 1000 probabilities at temperature {temperature:g} (weight {teacher_weight:g}), and
cross-entropy to the CIFAR-10 labels (weight {label_weight:g}). No weight was copied from the teacher.

- **Data**: CIFAR-10 (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009),
  re-encoded as JPEG. It is published for research without a formal licence. Its images were collected from
  the web as part of Tiny Images, which was withdrawn in 2020 for offensive labels, and belong to their
  owners. The package holds none of them.
- **Teacher**: MobileNetV2 1.0 224 (Apache-2.0, from the google-coral test data), itself trained on
  ImageNet-1k, whose images are provided for non-commercial research.
- **Licence** of these weights: Apache-2.0.

## Limits

It has seen ten kinds of animals and vehicles in 32 x 32 pixels: small details, text, faces and whatever a
few pixels decide are beyond it. It inherits the biases of its data and of its teacher. Not for decisions
about people.
"""


def write_card(
    output: Path, image_size: int, table: dict[str, tuple[float, float, float]], settings: Settings
) -> None:
    """Measure size and speed and write `README.md` beside the weights."""
    model = timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=0).eval()
    model = model.to(memory_format=torch.channels_last)
    card = CARD.format(
        architecture=ARCHITECTURE,
        arguments=", ".join(f"`{name}={value}`" for name, value in MODEL_ARGS.items()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        features=model.num_features,
        size=image_size,
        weight_bytes=(output / "model.safetensors").stat().st_size,
        fast=images_per_second(model, image_size, bf16=True),
        slow=images_per_second(model, image_size, bf16=False),
        rows="\n".join(f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} |" for name, (a, b, c) in table.items()),
        **vars(settings),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    total = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {total:,} bytes")
    if total > MAX_BYTES:
        raise SystemExit(f"{total:,} bytes are more than the {MAX_BYTES:,} the package allows")


def main() -> None:
    """Train, save, probe and describe the bundled backbone."""
    default = Path(__file__).resolve().parent.parent / "tlcli" / "backbones" / "bundled"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assets = os.environ.get("TLCLI_REAL_ASSETS")
    parser.add_argument("--assets", type=Path, default=assets, required=assets is None, metavar="PATH")
    parser.add_argument("--output", type=Path, default=default, metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the teacher's features here")
    parser.add_argument("--epochs", type=float, default=Settings.epochs)
    parser.add_argument("--image-size", type=int, default=96, help="size the saved network asks for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-training", action="store_true", help="measure the weights in --output again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(epochs=options.epochs)
    started = time.monotonic()
    if options.skip_training:
        student = timm.create_model(f"local-dir:{options.output}", pretrained=True, num_classes=0)
    else:
        images, labels = read_cifar(options.assets / "cifar10_jpeg.tar.xz")
        views = [View.draw(len(images), 1000 + number) for number in range(settings.views)]
        features = teacher_features(options.assets, images, views, options.cache)
        teacher = Teacher(options.assets, features, settings.temperature)
        student = train(images, labels, views, teacher, settings)
    save(student, options.output, options.image_size)
    print(f"{'probe':20s} ours   random pixels")
    table = probe_all(options.assets, options.output, options.image_size, settings.seed)
    write_card(options.output, options.image_size, table, settings)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
