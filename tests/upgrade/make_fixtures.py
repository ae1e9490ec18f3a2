"""Write the fixtures of a release: runs, a feature cache, images, configurations and JSON documents.

    git checkout v0.2.0 && python -m tests.upgrade.make_fixtures tests/upgrade/v0_2_0

Done once a release, by its own code; the folder is never written again. Every command is run twice: what
is kept is the second document, of a cache that has all rows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.upgrade.upgrade_commands import COMMANDS

CLASSES = ("0", "1", "4", "7")
COUNTS = {"train": 8, "val": 4}  # images of each class
PIXELS = 24
ROOT_NAME = "@ROOT@"  # stands for the folder's absolute path in text files
LEFT_OUT = (
    "report.html",
    "checkpoints",
    "preview.png",
    "demo",
    "demo-home",
)  # large, or made anew by any version


def write_digits(folder: Path) -> None:
    """Write a few of scikit-learn's digits as grey PNG files, split/class/number.png."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for name in CLASSES:
        of_class = [number for number, label in enumerate(digits.target) if str(label) == name]
        taken = iter(of_class)
        for split, count in COUNTS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in (next(taken) for _ in range(count)):
                pixels = (digits.images[number] * 15).astype("uint8")
                image = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
                image.save(place / f"{number:04d}.png", optimize=True)


def run(folder: Path, name: str, runs: str) -> str:
    """Run one of `COMMANDS` in `folder`; return its JSON document."""
    words = [word.format(runs=runs) for word in COMMANDS[name]]
    home = folder / ("demo-home" if name == "demo" else "home")
    environment = {**os.environ, "TLCLI_HOME": str(home), "TLCLI_OFFLINE": "1"}
    command = [sys.executable, "-m", "tlcli", *words, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
    json.loads(done.stdout)
    return done.stdout


def main(target: Path) -> None:
    """Write the fixtures into `target`, which must not exist."""
    assert not target.exists(), f"{target} exists: fixtures of a release are never made again"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "fixture"
        write_digits(folder / "images")
        for name in COMMANDS:
            run(folder, name, "runs")
            print(name, flush=True)
        documents = {}
        for name in COMMANDS:
            (folder / "preview.png").unlink(missing_ok=True)
            documents[name] = run(folder, name, "again")
        shutil.rmtree(folder / "again")
        for name, text in documents.items():
            path = folder / "json" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for name in LEFT_OUT:
            for path in list(folder.rglob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in folder.rglob("*"):
            if path.suffix in {".json", ".yaml", ".md", ".csv", ".jsonl"}:
                text = path.read_text(encoding="utf-8").replace(str(folder), ROOT_NAME)
                path.write_text(text.replace(f"{Path(sys.executable).parent}/", ""), encoding="utf-8")
        shutil.copytree(folder, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
