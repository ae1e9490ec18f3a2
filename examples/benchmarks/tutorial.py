"""`tlcli finetune` on hymenoptera against the loop of PyTorch's transfer-learning tutorial.

    python examples/benchmarks/tutorial.py --assets ASSETS            6 minutes on two cores

Both start from nothing and are timed from process start to exit: tlcli with an empty cache, and the
tutorial's "ConvNet as fixed feature extractor" (frozen backbone, forward pass in every epoch, batches of 4,
SGD with momentum 0.9, learning rate 0.001 divided by 10 every 7 epochs, random resized crops and flips) with
the same backbone, for a few measured epochs, scaled to its 25. Expected: at least 25 times less time, and an
accuracy of at least 0.95.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOOP = """
import sys, time
import timm, torch
from torch import nn
from torchvision import datasets, transforms
data, backbone, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
random = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
train = transforms.Compose([*random, transforms.ToTensor(), normalise])
plain = [transforms.Resize(256), transforms.CenterCrop(224)]
val = transforms.Compose([*plain, transforms.ToTensor(), normalise])
sets = {k: datasets.ImageFolder(f"{data}/{k}", t) for k, t in {"train": train, "val": val}.items()}
loaders = {
    k: torch.utils.data.DataLoader(v, batch_size=4, shuffle=True, num_workers=2) for k, v in sets.items()
}
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
model = timm.create_model(backbone, pretrained=True)
for parameter in model.parameters():
    parameter.requires_grad = False
model.reset_classifier(2)
model = model.to(device)
optimizer = torch.optim.SGD(model.get_classifier().parameters(), lr=0.001, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
criterion = nn.CrossEntropyLoss()
best = 0.0
for epoch in range(epochs):
    started = time.perf_counter()
    for phase in ("train", "val"):
        model.train(phase == "train")
        right = 0
        for images, labels in loaders[phase]:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.set_grad_enabled(phase == "train"):
                outputs = model(images)
                loss = criterion(outputs, labels)
                if phase == "train":
                    loss.backward()
                    optimizer.step()
            right += int((outputs.argmax(1) == labels).sum())
        if phase == "train":
            scheduler.step()
    best = max(best, right / len(sets["val"]))
    print("epoch", time.perf_counter() - started, right / len(sets["val"]), flush=True)
"""


def main() -> None:
    """Run both sides in turn and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=os.environ.get("TLCLI_REAL_ASSETS"))
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs of the loop, in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    assets = Path(options.assets).resolve()
    data, backbone = str(assets / "hymenoptera"), f"local-dir:{assets / 'mobilenetv2_100.imagenet'}"
    loops, runs = [], []
    for repeat in range(options.repeats):
        started = time.perf_counter()
        command = [sys.executable, "-c", LOOP, data, backbone, str(options.epochs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        total = time.perf_counter() - started
        epochs = [line.split() for line in done.stdout.splitlines() if line.startswith("epoch")]
        seconds = [float(line[1]) for line in epochs]
        loops.append(total + (25 - len(seconds)) * statistics.mean(seconds))
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TLCLI_HOME": f"{folder}/home"}
            started = time.perf_counter()
            command = [sys.executable, "-m", "tlcli", "finetune", data, "--backbone", backbone, "--json"]
            done = subprocess.run(
                [*command, "-o", f"{folder}/run"], check=True, capture_output=True, text=True, env=environment
            )
            runs.append(time.perf_counter() - started)
        val = json.loads(done.stdout)["metrics"]["val"]
        print(
            f"repeat {repeat + 1}: loop {statistics.mean(seconds):.1f} s an epoch, {loops[-1]:.0f} s for 25 "
            f"(accuracy after {len(epochs)}: {float(epochs[-1][2]):.3f}); tlcli {runs[-1]:.1f} s, "
            f"accuracy {val['top1_accuracy']:.3f}",
            flush=True,
        )
    ratio = statistics.median(loop / run for loop, run in zip(loops, runs, strict=True))
    print(f"tlcli takes {ratio:.1f} times less (bar 25); accuracy {val['top1_accuracy']:.3f} (bar 0.95)")


if __name__ == "__main__":
    main()
