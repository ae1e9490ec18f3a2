"""Every family of backbones through every scenario, as users run it, and docs/backbones.md of what was found.

    python -m tests.matrix.matrix               all families, from where the last call stopped
    python -m tests.matrix.matrix swin_transformer levit     these alone, again
    python -m tests.matrix.matrix --afresh      forgets what was found before

The smallest member of each family, random weights, a dozen images; once with all defaults and once with
--dtype fp32 --amp none. Each runs in a fork of one process that has imported torch and timm, and cannot harm
another.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.matrix.checks import Broken, Refused, check
from tests.matrix.members import EASY_SIZE, Member, members

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "matrix.jsonl"
PAGE = ROOT / "docs" / "backbones.md"
VARIANTS = {"default": (), "fp32": ("--dtype", "fp32", "--amp", "none")}
SECONDS = 900.0  # of one family and variant
MAX_REFUSALS = 8
SMALLER = (112, 128, 192, 256)  # pixels, for networks whose own images are larger than EASY_SIZE


def run_line(folder: Path) -> Any:
    """Return `run(*words)`, which runs a command line in this process and captures its file descriptors."""

    def run(*words: object) -> tuple[int, str, str]:
        from tlcli.cli.app import main

        texts = []
        with contextlib.ExitStack() as stack:
            for number in (1, 2):
                saved = os.dup(number)
                file = stack.enter_context(open(folder / f"fd{number}", "w+", encoding="utf-8"))
                os.dup2(file.fileno(), number)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, number)
                texts.append(file)
            code = main([str(word) for word in words])
            sys.stdout.flush()
            sys.stderr.flush()
            found = []
            for file in texts:
                file.seek(0)
                found.append(file.read())
        return code, found[0], found[1]

    return run


def examine(member: Member, variant: str) -> dict[str, Any]:
    """Return what was found of a member: works, refused or broken, and why."""
    started = time.perf_counter()
    found: dict[str, Any] = {"family": member.family, "name": member.name, "variant": variant}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"TLCLI_HOME": str(folder / "home"), "TLCLI_OFFLINE": "1", "COLUMNS": "200"}
        sizes: list[int | None] = [None] if member.image_size <= EASY_SIZE else [*SMALLER, None]
        try:
            found |= check(member.name, sizes, folder, run_line(folder), VARIANTS[variant])
            found["outcome"] = "works"
        except Refused as error:
            found |= {"outcome": "refused", "why": str(error)}
        except Broken as error:
            found |= {"outcome": "broken", "why": str(error)}
        except Exception:
            found |= {"outcome": "broken", "why": traceback.format_exc()[-1500:]}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def forked(member: Member, variant: str) -> dict[str, Any]:
    """Return what a fork found, or how it ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(examine(member, variant)))
    process.start()
    sender.close()
    found = {"family": member.family, "name": member.name, "variant": variant, "outcome": "broken"}
    try:
        if not receiver.poll(SECONDS):
            process.kill()
            return {**found, "why": f"it took more than {SECONDS:.0f} s", "seconds": SECONDS}
        answer: dict[str, Any] = receiver.recv()
        return answer
    except EOFError:
        process.join()
        return {**found, "why": f"its process ended with {process.exitcode}", "seconds": 0.0}
    finally:
        process.join()


def stored() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows found so far; of one family and variant the last."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {(row["family"], row["variant"]): row for row in rows}


def main() -> int:
    """Run what is missing, write the page, and return 1 where a family is broken or too many are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    parser.add_argument("--afresh", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.afresh:
        RESULTS.unlink(missing_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    import timm  # noqa: F401 - warm, for all forks
    import torch

    import tlcli.cli.app
    import tlcli.commands.finetune  # noqa: F401

    torch.set_num_threads(1)  # a thread pool would not survive the fork
    before = stored()
    todo = [
        (member, variant)
        for member in sorted(members(), key=lambda one: one.gflops)  # the giants last
        for variant in VARIANTS
        if member.family in options.families
        or (not options.families and (member.family, variant) not in before)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda item: forked(*item), todo):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(
                f"{found['family']} {found['name']} {found['variant']}: {found['outcome']}"
                f" in {found['seconds']:.0f} s {found.get('why', '')[-300:]}",
                flush=True,
            )
    rows = stored()
    if len(rows) == len(members()) * len(VARIANTS):
        from tests.matrix.page import page

        PAGE.write_text(page(list(rows.values())), encoding="utf-8")
    broken = [row for row in rows.values() if row["outcome"] == "broken"]
    refused = {row["family"] for row in rows.values() if row["outcome"] == "refused"}
    print(f"{len(rows)} rows: {len(broken)} broken, {len(refused)} families refused (at most {MAX_REFUSALS})")
    return int(bool(broken) or len(refused) > MAX_REFUSALS)


if __name__ == "__main__":
    sys.exit(main())
