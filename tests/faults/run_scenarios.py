"""What is done to a run directory under faults, and what must be true of it afterwards."""

import functools
import json
from pathlib import Path
from typing import Any

from tests.faults.child import Outcome, Teller
from tests.faults.injection import Fault
from tlcli.config.commands import FinetuneConfig
from tlcli.errors import UsageError
from tlcli.runs.directory import RunDirectory, check_run_dir, read_facts, run_to_continue

EPOCHS = 4
FACTS: dict[str, Any] = {
    "scenario": "freeze",
    "class_names": ["a", "b"],
    "data": {"digest": "d", "num_images": {"train": 3, "val": 1}},
    "device": {"name": "cpu"},
}


def config(run: Path, **options: Any) -> FinetuneConfig:
    given = {"data": "/photos", "backbone": "test_resnet", "freeze": "2", "output": str(run)}
    return FinetuneConfig(**{**given, **options})


@functools.cache
def contents(seed: int) -> dict[str, bytes]:
    """Return the large and small files of a run; the files of no two seeds are alike."""
    return {
        "model.safetensors": bytes((seed * 7 + place) % 256 for place in range(5000)),
        "config.json": json.dumps({"architecture": "test_resnet", "seed": seed}, indent=2).encode() + b"\n",
        "evaluation-val.json": json.dumps({"top1_accuracy": seed / 10}, indent=2).encode() + b"\n",
        "predictions-val.csv": f"file,label\n{seed}.png,a\n".encode(),
        "README.md": f"# Classifier {seed}\n".encode(),
    }


def history(seed: int, epochs: int) -> list[dict[str, Any]]:
    return [{"kind": "epoch", "epoch": epoch, "loss": 1 / (epoch + seed + 1)} for epoch in range(epochs)]


def lines(seed: int, epochs: int) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in history(seed, epochs)).encode()


def train(run: Path, seed: int = 1, stop: bool = False, **options: Any) -> None:
    """Write a run as `finetune` does; with `stop` it is interrupted after two epochs."""
    given = config(run, **options)
    check_run_dir(given)
    run_to_continue(given)
    with RunDirectory(run, given, FACTS | {"seed": seed}, resume=given.resume) as writer:
        for epochs in range(1, EPOCHS + 1):
            writer.write_lines("metrics.jsonl", history(seed, epochs))
            if stop and epochs == 2:
                raise KeyboardInterrupt
        for name, content in contents(seed).items():
            if name.endswith(".safetensors"):
                writer.write_bytes(name, content)
            else:
                writer.write_text(name, content.decode())
        writer.finish({"metrics": {"val": {"top1_accuracy": seed / 10}}})


class RunScenario:
    """A run written below the folder given.

    Attributes:
        name: In the table.
        options: Of the disturbed command.
        again: Of the command that is run afterwards.
    """

    def __init__(self, name: str, options: dict[str, Any], again: dict[str, Any]) -> None:
        self.name = name
        self.options = options
        self.again = again

    def run(self, folder: Path) -> Path:
        return folder / "runs" / "pets"

    def prepare(self, folder: Path) -> None:
        if self.options.get("overwrite"):
            train(self.run(folder), seed=5)
        elif self.options.get("resume"):
            try:
                train(self.run(folder), stop=True)
            except KeyboardInterrupt:
                (self.run(folder) / "checkpoints").mkdir()
                (self.run(folder) / "checkpoints" / "state").write_bytes(b"weights")

    def act(self, folder: Path, teller: Teller) -> None:
        train(self.run(folder), **self.options)

    def rerun(self, folder: Path, teller: Teller) -> None:
        try:
            train(self.run(folder), **self.again)
        except UsageError as error:
            if "nothing to resume" not in error.message:
                raise
            # Nothing is left to do. A replaced run that is still there is named; what was being removed goes
            # when the next run begins.
            for kept in self.run(folder).parent.glob(".pets.replaced-*"):
                if str(kept) not in error.message:
                    teller.say("problem", f"{kept.name} is not named")
            train(self.run(folder).with_name("next"), overwrite=True)  # may be the second try

    # ---- what must be true ----------------------------------------------------------------------------

    def start(self, folder: Path) -> dict[str, bytes]:
        """Return the files that must not be lost."""
        return all_files(self.run(folder))

    def look(self, folder: Path, before: dict[str, bytes], outcome: Outcome, fault: Fault) -> list[str]:
        """Return what is wrong with what a disturbed process left; changes nothing."""
        run, problems = self.run(folder), []
        there = all_files(run)
        done = False
        if "run.json" in there:
            facts = read_facts(run, "run")
            done = facts["status"] == "done" and facts["seed"] == 1
        new = {**contents(1), "metrics.jsonl": lines(1, EPOCHS)}
        if done:
            problems += [f"{name} is wrong" for name in new if there.get(name) != new[name]]
            return problems
        for name in there.keys() & new.keys() - before.keys():
            allowed = [lines(1, epochs) for epochs in range(1, EPOCHS + 1)]
            if there[name] not in (allowed if name == "metrics.jsonl" else [new[name]]):
                problems.append(f"{name} is torn")
        if self.options.get("overwrite"):
            found = [all_files(place) for place in (run, *run.parent.glob(".pets.replaced-*"))]
            replaced = any(new.items() <= files.items() for files in found)  # and is now the old one itself
            if before not in found and not replaced:
                problems.append("the old run is lost")
            if outcome.ended == "refused" and not there and not fault.effect.endswith("+"):
                problems.append("the old run is not in its place after an error")
        elif self.options.get("resume"):
            problems += [f"{name} is lost" for name in before if name not in there]
        return problems

    def final(self, folder: Path) -> dict[str, bytes]:
        """Return every file that stays, without what may differ between runs that are equal."""
        found = {}
        for name, content in all_files(folder / "runs").items():
            parts = name.split("/")
            if parts[0] == "next":  # see `rerun`
                continue
            if parts[-1] == "run.json":
                facts = {**json.loads(content), "created": "", "resumed": 0}
                content = json.dumps(facts, sort_keys=True).encode()
            found[name] = content
        return found

    def compare(
        self, folder: Path, undisturbed: dict[str, bytes], before: dict[str, bytes], fault: Fault
    ) -> list[str]:
        """Return how the end of a rerun differs from the end of work that nothing disturbed."""
        found = self.final(folder)
        if (folder / "runs" / "next").exists():  # see `rerun`
            if all_files(self.run(folder)) == before:  # the new run had not begun, and the old one is done
                return []
            kept = {name: found.pop(name) for name in list(found) if name.startswith(".pets.replaced-1/")}
            whole = {name.partition("/")[2] for name in kept} == before.keys()
            if kept and not whole:
                return ["the old run is there in part"]
        names = sorted(found.keys() ^ undisturbed.keys())
        return [f"{name} is too much or missing" for name in names] + [
            f"{name} differs"
            for name in sorted(found.keys() & undisturbed.keys())
            if found[name] != undisturbed[name]
        ]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RUN_SCENARIOS = (
    RunScenario("run", {}, {"resume": True}),
    RunScenario("overwrite", {"overwrite": True}, {"overwrite": True}),
    RunScenario("overwrite, then resume", {"overwrite": True}, {"resume": True}),
    RunScenario("resume a run", {"resume": True}, {"resume": True}),
)
