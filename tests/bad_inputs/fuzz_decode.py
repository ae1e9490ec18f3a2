"""Fuzz the decoding of images: damaged and hostile files in child processes, with limits of time and memory.

    python -m tests.bad_inputs.fuzz_decode --minutes 10

Input n of a seed is always the same bytes, so that a number is all that must be kept to look at it again:

    python -m tests.bad_inputs.fuzz_decode --show 1234 > input

A child decodes inputs one after another and shares the number of the one it is at. When it dies of a signal,
or is killed because it does not get on, that input is the culprit and a new child goes on behind it. Wrong
is: a signal, too much time or memory, an exception other than DecodeError, pixels of another shape than the
header says, and pixels that depend on what was in the memory before.
"""

import argparse
import ctypes
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.image_files import jpeg_file, jpeg_segments, png_chunks, png_file, samples

SLOW_SECONDS = 10.0  # of processor time, for inspecting and decoding an input twice
HANG_SECONDS = 60.0
MEMORY_BYTES = 4 << 30  # of address space, beyond what the libraries take
PEAK_BYTES = 2 << 30  # of memory in use, for one input
ODD = (0, 1, 2, 3, 7, 8, 0x0F, 0x10, 0x3F, 0x7F, 0x80, 0xFE, 0xFF)
ODD_WIDE = (0, 1, 2, 255, 256, 4096, 9000, 0x3FFF, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF,
            0xFFFFFFFF)  # fmt: skip
M_PERTURB = -6  # of mallopt: fill memory that is taken and given back

Random = random.Random


# ---- inputs -----------------------------------------------------------------------------------------------


class Inputs:
    """Input n: a sound small file, damaged in up to a few ways."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.samples = samples()
        self.names = sorted(self.samples)

    def make(self, number: int) -> tuple[str, bytes]:
        """Return the name of the file it was made from, and the bytes."""
        generator = Random(f"{self.seed} {number}")
        name = generator.choice(self.names)
        data = self.samples[name]
        for _ in range(generator.choice((1, 1, 1, 2, 2, 3, 5))):
            data = self._damage(generator, name, data)
        return name, data

    def _damage(self, generator: Random, name: str, data: bytes) -> bytes:
        structured = STRUCTURED.get(name.rpartition(".")[2])
        if structured and generator.random() < 0.6:
            try:
                return structured(generator, data)
            except (IndexError, OverflowError, ValueError, struct.error, zlib.error):
                pass  # damaged beyond being taken apart
        if generator.random() < 0.1:
            other = self.samples[generator.choice(self.names)]
            place = generator.randrange(len(data) + 1)
            return data[:place] + other[generator.randrange(len(other)) :]
        return damage_bytes(generator, data)


def damage_bytes(generator: Random, data: bytes) -> bytes:
    """Change bytes anywhere, more often near the beginning."""
    if not data:
        return bytes([generator.choice(ODD)])
    changed = bytearray(data)
    end = len(changed) if generator.random() < 0.5 else min(64, len(changed))
    place = generator.randrange(end)
    kind = generator.randrange(8)
    if kind == 0:
        changed[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        changed[place] = generator.choice(ODD)
    elif kind == 2:
        order, size = generator.choice("<>"), generator.choice("HI")
        value = generator.choice(ODD_WIDE) & (0xFFFF if size == "H" else 0xFFFFFFFF)
        packed = struct.pack(order + size, value)
        changed[place : place + len(packed)] = packed
    elif kind == 3:
        for _ in range(generator.randrange(1, 12)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    elif kind == 4:
        del changed[place : place + generator.randrange(1, 20)]
    elif kind == 5:
        piece = changed[place : place + generator.randrange(1, 60)] * generator.choice((1, 2, 50))
        changed[place:place] = piece
    elif kind == 6:
        changed[place : place + 32] = bytes(min(32, len(changed) - place))
    else:
        del changed[place:]
    return bytes(changed)


def damage_jpeg(generator: Random, data: bytes) -> bytes:
    segments, rest = jpeg_segments(data)
    index = generator.randrange(len(segments))
    marker, content = segments[index]
    kind = generator.randrange(7)
    if kind == 0:
        segments.insert(generator.randrange(len(segments)), segments[index])
    elif kind == 1:
        del segments[index]
    elif kind == 2:
        other = generator.randrange(len(segments))
        segments[index], segments[other] = segments[other], segments[index]
    elif kind == 3:
        return jpeg_file(segments, damage_bytes(generator, rest))
    elif kind == 4:
        frame = [mark in {0xC0, 0xC1, 0xC2} for mark, _ in segments].index(True)
        marker, content = segments[frame]
        edges = [generator.choice((1, 7, 8, 9, 16, 17, 100, 2000)) for _ in range(2)]
        marker = generator.choice((marker, marker, 0xC0, 0xC2, 0xC9, 0xC3))
        segments[frame] = (
            marker,
            content[:1] + struct.pack(">HH", *edges) + damage_bytes(generator, content[5:]),
        )
    else:
        segments[index] = marker, damage_bytes(generator, content)
    return jpeg_file(segments, rest)


def damage_png(generator: Random, data: bytes) -> bytes:
    chunks = list(png_chunks(data))
    index = generator.randrange(len(chunks))
    kind, content = chunks[index]
    choice = generator.randrange(8)
    if choice == 0:
        chunks.insert(generator.randrange(len(chunks)), chunks[index])
    elif choice == 1:
        del chunks[index]
    elif choice == 2:
        other = generator.randrange(len(chunks))
        chunks[index], chunks[other] = chunks[other], chunks[index]
    elif choice in {3, 4}:
        edges = [generator.choice((1, 2, 7, 8, 9, 33, 1000, 3000)) for _ in range(2)]
        head = struct.pack(">II", *edges) if generator.random() < 0.5 else chunks[0][1][:8]
        depth, colour = generator.choice((1, 2, 4, 8, 16)), generator.choice((0, 2, 3, 4, 6))
        chunks[0] = b"IHDR", head + bytes([depth, colour, 0, 0, generator.choice((0, 0, 1))])
    elif choice == 5:
        body = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
        chunks = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
        chunks.insert(
            -1, (b"IDAT", zlib.compress(damage_bytes(generator, body) * generator.choice((1, 1, 30))))
        )
    else:
        chunks[index] = kind, damage_bytes(generator, content)
    return png_file(chunks)


def damage_tiff(generator: Random, data: bytes) -> bytes:
    """Change an entry of the first directory."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in {b"+\0", b"\0+"}
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    first, size, layout = (start + 8, 20, "HHQQ") if big else (start + 2, 12, "HHII")
    place = first + size * generator.randrange(count)
    entry = list(struct.unpack_from(order + layout, data, place))
    field = generator.randrange(4)
    known = (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339,
             347, 530)  # fmt: skip
    if field == 0:
        entry[0] = generator.choice(known)
    elif field == 1:
        entry[1] = generator.randrange(19)
    elif field == 2:
        entry[2] = generator.choice((0, 1, 2, 3, 4, 5, 100, 10_000, len(data), 2**31 - 1))
    else:
        small = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 500, 3000, 32773, 34712, 50001, len(data) - 1,
                 2**31 - 1)  # fmt: skip
        entry[3] = generator.choice((*small, entry[3] + 1, max(0, entry[3] - 1)))
    changed = bytearray(data)
    struct.pack_into(order + layout, changed, place, *entry)
    return bytes(changed)


def damage_webp(generator: Random, data: bytes) -> bytes:
    """Change, repeat, drop or swap chunks, with the sizes made right again."""
    chunks, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        chunks.append((data[position : position + 4], data[position + 8 : position + 8 + size]))
        position += 8 + size + size % 2
    index = generator.randrange(len(chunks))
    kind = generator.randrange(5)
    if kind == 0:
        chunks.insert(generator.randrange(len(chunks)), chunks[index])
    elif kind == 1:
        del chunks[index]
    else:
        chunks[index] = chunks[index][0], damage_bytes(generator, chunks[index][1])
    body = b"".join(
        name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


STRUCTURED: dict[str, Callable[[Random, bytes], bytes]] = {
    "jpg": damage_jpeg,
    "png": damage_png,
    "tif": damage_tiff,
    "webp": damage_webp,
}


# ---- one input --------------------------------------------------------------------------------------------


def judge(data: bytes, perturb: Callable[[int], object] = lambda _fill: None) -> tuple[str, str]:
    """Decode a file as tlcli does; return "decoded", "refused" or what is wrong, and the details.

    Args:
        data: The file.
        perturb: Called with different values before the file is decoded the first and the second time.
    """
    import torch

    from tlcli.data.decode import decode, inspect
    from tlcli.data.image_files import MAX_PIXELS, DecodeError

    facts, reason, images = None, "", []
    try:
        facts = inspect(data)
    except DecodeError as error:
        reason = error.reason
    except Exception:
        return "wrong exception", traceback.format_exc()
    for fill in (0x55, 0xA6):
        perturb(fill)
        try:
            images.append(decode(data))
        except DecodeError as error:
            reason = error.reason
        except Exception:
            return "wrong exception", traceback.format_exc()
        finally:
            perturb(0)
    if len(images) == 1 or (images and not torch.equal(*images)):
        return "depends on memory", f"{facts} {reason}"
    if not images:
        return "refused", reason
    image = images[0]
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        return "wrong shape", f"{image.dtype} {tuple(image.shape)}"
    if facts is None:
        return "wrong shape", f"decoded, though its header is refused: {reason}"
    height, width = image.shape[1:]
    if {height, width} != {facts.height, facts.width} or not 0 < height * width <= MAX_PIXELS:
        return "wrong shape", f"{tuple(image.shape)} of {facts}"
    return "decoded", ""


# ---- children ---------------------------------------------------------------------------------------------


def work(seed: int, start: int, stop: int, at: Any, reports: Any) -> None:
    """Judge inputs [start, stop); `at` holds the number of the one in work."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    inputs = Inputs(seed)
    for data in inputs.samples.values():  # every decoder is loaded before the limit is set
        assert judge(data)[0] == "decoded"
    limit = _status("VmSize") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's complaints
    for number in range(start, stop):
        at.value = number
        name, data = inputs.make(number)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before, started = _status("VmRSS"), time.thread_time()
        verdict, details = judge(data, lambda fill: libc.mallopt(M_PERTURB, fill))
        seconds, peak = time.thread_time() - started, _status("VmHWM") - before
        if verdict in {"decoded", "refused"} and seconds > SLOW_SECONDS:
            verdict = "slow"
        elif verdict in {"decoded", "refused"} and peak > PEAK_BYTES:
            verdict = "large"
        reports.send((number, name, verdict, details, seconds, peak, len(data)))


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field + ":"))


class Report:
    """What was found."""

    def __init__(self, inputs: Inputs, output: Path | None) -> None:
        self.inputs = inputs
        self.output = output
        self.verdicts: Counter[str] = Counter()
        self.formats: Counter[tuple[str, str]] = Counter()
        self.slowest = self.largest = (0.0, -1, "")

    def add(
        self, number: int, name: str, verdict: str, details: str, seconds: float, peak: int, size: int
    ) -> None:
        self.verdicts[verdict] += 1
        self.formats[name.rpartition(".")[2], verdict] += 1
        self.slowest = max(self.slowest, (seconds, number, f"{name}, {size} bytes"))
        self.largest = max(self.largest, (float(peak), number, f"{name}, {size} bytes"))
        if verdict not in {"decoded", "refused"}:
            last = details.strip().splitlines()[-1] if details.strip() else ""
            print(
                f"{verdict}: input {number} ({name}, {size} bytes, {seconds:.1f} s, {peak >> 20} MiB) {last}",
                flush=True,
            )
            if self.output:
                self.output.mkdir(parents=True, exist_ok=True)
                path = self.output / f"{number}-{verdict.replace(' ', '-')}-{name}"
                path.write_bytes(self.inputs.make(number)[1])

    def __str__(self) -> str:
        lines = [
            f"{sum(self.verdicts.values())} inputs: "
            + ", ".join(f"{n} {v}" for v, n in self.verdicts.items())
        ]
        for kind in sorted({kind for kind, _ in self.formats}):
            counts = {verdict: n for (other, verdict), n in sorted(self.formats.items()) if other == kind}
            lines.append(f"  {kind}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
        lines.append(
            f"slowest: {self.slowest[0]:.2f} s of processor time, input {self.slowest[1]} ({self.slowest[2]})"
        )
        lines.append(
            f"most memory: {self.largest[0] / 2**20:.0f} MiB, input {self.largest[1]} ({self.largest[2]})"
        )
        return "\n".join(lines)


def fuzz(seed: int, start: int, stop: int, minutes: float, output: Path | None) -> Report:
    """Judge inputs [start, stop), or as many of them as the time allows."""
    context = multiprocessing.get_context("spawn")
    report = Report(Inputs(seed), output)
    until = time.monotonic() + 60 * minutes
    while start < stop and time.monotonic() < until:
        at = context.Value("q", -1, lock=False)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(seed, start, stop, at, sender), daemon=True)
        child.start()
        sender.close()
        killed, moved = False, time.monotonic()
        try:
            while time.monotonic() < until:
                if receiver.poll(1.0):
                    found = receiver.recv()
                    report.add(*found)
                    start, moved = found[0] + 1, time.monotonic()
                elif at.value >= 0 and time.monotonic() - moved > HANG_SECONDS:
                    killed = True
                    break
        except EOFError:
            pass
        finished = time.monotonic() >= until or start >= stop
        if finished or killed:
            child.kill()
        child.join()
        if finished:
            break
        if at.value < start:
            raise SystemExit(f"the child ended before input {start}: exit code {child.exitcode}")
        start = at.value
        name, data = report.inputs.make(start)
        code = child.exitcode or 0
        how = "hang" if killed else f"crash {signal.Signals(-code).name if code < 0 else code}"
        report.add(start, name, how, "", HANG_SECONDS if killed else 0.0, 0, len(data))
        start += 1
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the decoding of images.")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=10**9, help="at most this many")
    parser.add_argument("--output", type=Path, help="folder for the inputs that find something")
    parser.add_argument("--show", type=int, help="write this input to standard output, and stop")
    options = parser.parse_args()
    if options.show is not None:
        sys.stdout.buffer.write(Inputs(options.seed).make(options.show)[1])
        return 0
    started = time.monotonic()
    report = fuzz(
        options.seed, options.start, options.start + options.inputs, options.minutes, options.output
    )
    print(f"{report}\n{time.monotonic() - started:.0f} s")
    return 0 if set(report.verdicts) <= {"decoded", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
