"""Speed of the feature cache: reading with checksums and without, writing, opening, and its share of a run.

    python examples/benchmarks/cache.py             2 minutes on two cores, 2 GB of disk

Rows are read by one thread from pages that the system already holds: all at once, as a head's training
reads them, and in shuffled batches of 32, as an epoch of `--freeze K` does. Reading is measured in seconds of
the processor, so that bytes a second are those of one core; writing also in seconds of the clock, beside
plain files of the same size, each synced. The bars: all at once at least 1 GB/s with checksums, and less than
3 % of a training run with cached rows spent in checksums. Writing goes by the disk.
Measured: into an array in use pooled rows 1.01, maps 2.10 and 2.29 GB/s; into new arrays, whose pages the
system clears first, 0.84, 1.58 and 1.76; checksums take 0.05 to 0.7 % of a run; an entry of 100,000 rows
opens in 0.07 to 0.13 s.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tlcli.cache import shard
from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey
from tlcli.cache.store import Store
from tlcli.cache.writer import FLUSH_BYTES
from tlcli.commands.finetune import finetune, plan_finetune
from tlcli.config.commands import FinetuneConfig
from tlcli.progress import Silent

KINDS = (("pooled 1280 fp32", "fp32", (1280,), 100_000), ("map 128x14x14 bf16", "bf16", (128, 14, 14), 5_000),
         ("map 48x56x56 bf16", "bf16", (48, 56, 56), 1_000))  # fmt: skip
REPEATS = 5
BATCH = 32
READ_ROWS = 20_000  # of the small kind, in batches
IMAGES = 300
RUNS: dict[str, dict[str, Any]] = {
    "head on pooled rows": {},
    "--freeze 3, 4 views": {"freeze": "3", "views": 4, "augment": "light", "epochs": 3, "cache": "always"},
}


class Unchecked:
    """What checksums that always agree would be; takes the place of computed ones."""

    def __init__(self, _keys: Any, rows: Any) -> None:
        self.count = len(rows)

    def __eq__(self, _other: object) -> Any:
        return np.ones(self.count, bool)

    __hash__ = None  # type: ignore[assignment]


class Timed:
    """`row_checksums` with the seconds of the processor spent in it."""

    def __init__(self) -> None:
        self.real, self.seconds = shard.row_checksums, 0.0

    def __call__(self, keys: Any, rows: Any) -> Any:
        """Return the checksums of rows."""
        started = time.thread_time()
        try:
            return self.real(keys, rows)
        finally:
            self.seconds += time.thread_time() - started


def seconds_of(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of the processor that a call takes."""
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def fill(entry: Entry, count: int) -> tuple[list[RowKey], float, float]:
    """Write random rows; return their keys, and the seconds of the clock and of the processor it took."""
    row_format = entry.row_format
    some = np.random.default_rng(0).integers(0, 0x3F80, (256, row_format.row_bytes // 2), np.uint16)
    rows = some.view(row_format.numpy_dtype).reshape(256, *row_format.shape)
    keys = [(hashlib.sha256(str(number).encode()).hexdigest(), 0) for number in range(count)]
    started, busy = time.perf_counter(), time.process_time()
    with entry.writer({}) as writer:
        for number, key in enumerate(keys):
            writer.add(key, rows[number % 256])
    return keys, time.perf_counter() - started, time.process_time() - busy


def plain_seconds(folder: Path, num_bytes: int) -> float:
    """Return the seconds to write plain files of a shard's size, each synced."""
    data = np.random.default_rng(3).bytes(FLUSH_BYTES)
    started = time.perf_counter()
    for number, first in enumerate(range(0, num_bytes, FLUSH_BYTES)):
        with open(folder / f"plain-{number}", "wb") as file:
            file.write(data[: num_bytes - first])
            file.flush()
            os.fsync(file.fileno())
    taken = time.perf_counter() - started
    for path in folder.glob("plain-*"):
        path.unlink()
    return taken


def read(entry: Entry, keys: list[RowKey], batch: int, out: Any = None) -> None:
    """Read rows, so many at once, into `out` where it is given."""
    for first in range(0, len(keys), batch):
        _, missing = entry.read(keys[first : first + batch], out)
        assert not missing


def speeds(entry: Entry, keys: list[RowKey], batch: int, reuse: bool) -> dict[str, float]:
    """Return GB/s of one core with checksums and without, medians of interleaved repeats."""
    row_format = entry.row_format
    out = np.zeros((batch, *row_format.shape), row_format.numpy_dtype) if reuse else None
    read(entry, keys, batch, out)
    found: dict[str, list[float]] = {"checked": [], "unchecked": []}
    checked = shard.row_checksums
    for _ in range(REPEATS):
        for way, checksums in (("checked", checked), ("unchecked", Unchecked)):
            shard.row_checksums = checksums  # type: ignore[assignment]
            found[way].append(seconds_of(read, entry, keys, batch, out))
    shard.row_checksums = checked
    num_bytes = len(keys) * entry.row_format.row_bytes
    return {way: num_bytes / statistics.median(each) / 1e9 for way, each in found.items()}


def reading(folder: Path) -> None:
    """Print the speed of every kind of row."""
    print(f"{'GB/s':20s} {'read':22s} {'checked':>9s} {'unchecked':>10s}")
    for name, dtype, shape, count in KINDS:
        spec = {"schema": 1, "row_dtype": dtype, "row_shape": list(shape)}
        store = Store(folder / name.split()[1])
        keys, writing, busy = fill(store.entry(spec), count)
        num_bytes = count * store.entry(spec).row_format.row_bytes
        plain = plain_seconds(folder, num_bytes)
        opened = statistics.median(seconds_of(store.entry(spec).rows) for _ in range(REPEATS))
        entry = store.entry(spec)
        shuffled = [keys[place] for place in np.random.default_rng(1).permutation(count)]
        for way, wanted, batch, reuse in (
            ("all at once", shuffled, count, False),
            ("the same, array in use", shuffled, count, True),
            ("batches", shuffled[:READ_ROWS], BATCH, False),
        ):
            found = speeds(entry, wanted, batch, reuse)
            print(f"{name:20s} {way:22s} {found['checked']:9.2f} {found['unchecked']:10.2f}", flush=True)
        print(
            f"{name:20s} written at {num_bytes / writing / 1e9:.2f} GB/s, plain files at "
            f"{num_bytes / plain / 1e9:.2f}, by the processor {num_bytes / busy / 1e9:.2f}; "
            f"{count:,} rows open in {opened:.3f} s",
            flush=True,
        )


def draw(folder: Path) -> None:
    """Write images of two classes."""
    generator = np.random.default_rng(2)
    for number in range(IMAGES):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (96, 96, 3), np.uint8)
        pixels[..., number % 2] //= 2
        Image.fromarray(pixels).save(place)


def shares(folder: Path) -> None:
    """Print which share of a run with cached rows is spent in checksums."""
    draw(folder / "images")
    os.environ["TLCLI_HOME"] = str(folder / "home")
    for name, options in RUNS.items():
        for again in (False, True):
            output = str(folder / f"{name}-{again}")
            config = FinetuneConfig(data=str(folder / "images"), backbone="bundled", output=output, **options)
            timed = Timed()
            shard.row_checksums = timed  # type: ignore[assignment]
            started, busy = time.perf_counter(), time.process_time()
            result = finetune(plan_finetune(config, Silent()), Silent())
            taken, busy = time.perf_counter() - started, time.process_time() - busy
            shard.row_checksums = timed.real
        assert not result.features.rows_computed
        whole, processor = 100 * timed.seconds / taken, 100 * timed.seconds / busy
        print(
            f"{name:20s} {timed.seconds:.4f} s in checksums: {whole:.2f} % of the run's {taken:.1f} s, "
            f"{processor:.2f} % of its {busy:.1f} s of the processor",
            flush=True,
        )


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        reading(Path(folder))
        shares(Path(folder))


if __name__ == "__main__":
    main()
