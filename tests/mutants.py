"""Mutation testing: small faults put into modules one by one, to see whether their unit tests notice.

    python tests/mutants.py tests/training/mutants.toml --results mutants.csv     resumable
    python tests/mutants.py tests/training/mutants.toml --only mixing.py

Every fault runs in a fork of a process that has loaded the libraries but nothing of tlcli, and only the tests
that run its line, the quickest first: seconds a fault rather than a minute. No file is changed. The
configuration names modules and tests, and argues for faults that change nothing that a test could see.
"""

import argparse
import ast
import copy
import csv
import gc
import importlib
import importlib.abc
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "accelerate", "coverage", "hypothesis", "numpy", "PIL.Image", "pytest", "scipy.optimize", "sklearn",
    "timm", "timm.optim", "torch", "torchvision", "typer", "rich",
)  # fmt: skip
PYTEST = ["-q", "-x", "--no-header", "-o", "addopts=", "-p", "no:cacheprovider"]
KEPT_OUT = ["--import-mode=importlib", "-m", "not slow and not gpu and not network and not real"]

TIMEOUT = 86  # exit code
MOST_SECONDS = 10.0  # of other modules' tests, for a fault that the module's own did not notice

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
ARITHMETIC: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        module: Path of the file, from the root.
        line: Where.
        what: Column and change, as code.
        tree: The module with the fault.
    """

    module: str
    line: int
    what: str
    tree: ast.Module

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what names the fault while other lines of the file change: module, line's text, change."""
        return self.module, (ROOT / self.module).read_text().splitlines()[self.line - 1].strip(), self.what


# ---- the faults -----------------------------------------------------------------------------------------


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every fault of a module."""
    tree = ast.parse((ROOT / module).read_text())
    for path, node in _walk(tree, ()):
        for replaced, what in _changes(node):
            other = copy.deepcopy(tree)
            _put(other, path, replaced)
            what = f"{node.col_offset}: {what}"  # the same change may stand in a line twice
            yield Mutant(module, node.lineno, what, ast.fix_missing_locations(other))


def _walk(node: ast.AST, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield nodes with their paths; no annotation, docstring, decorator or message for people."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or (
            isinstance(node, ast.AnnAssign) and value is None
        ):
            continue
        children = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _is_talk(child):
                continue
            here = (*path, (name, index))
            if hasattr(child, "lineno"):
                yield here, child
            yield from _walk(child, here)


def _is_talk(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        node = node.value
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("logger.info", "logger.debug", "UsageError", "warn", "TypeVar")
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _changes(node: Any) -> Iterator[tuple[Any, str]]:
    """Yield what may stand in the place of a node, and the change as code."""

    def changed(**fields: Any) -> tuple[Any, str]:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other, f"{_code(node)} -> {_code(other)}"

    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for kind in COMPARISONS[type(operator)]:
                yield changed(ops=[*node.ops[:index], kind(), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        for kind in ARITHMETIC.get(type(node.op), ()):
            yield changed(op=kind())
    elif isinstance(node, ast.BoolOp):
        yield changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for index in range(len(node.values)):
            rest = [value for place, value in enumerate(node.values) if place != index]
            other = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
            yield other, f"{_code(node)} -> {_code(other)}"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand, f"{_code(node)} -> {_code(node.operand)}"
    elif isinstance(node, ast.Constant):
        yield from _other_values(node, changed)
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If | ast.While):
        test = ast.UnaryOp(ast.Not(), node.test)
        yield _with(node, test=test), f"if {_code(node.test)} -> if not {_code(node.test)}"
    elif isinstance(node, ast.Break | ast.Continue) or (
        isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ):
        yield ast.copy_location(ast.Pass(), node), f"{_code(node)} -> pass"
    elif isinstance(node, ast.Call):
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                other, _ = changed(keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])
                yield other, f"{_code(node.func)}({keyword.arg}=...) -> {_code(node.func)}()"
    if isinstance(node, ast.AugAssign):
        yield ast.copy_location(ast.Pass(), node), f"{_code(node)} -> pass"


def _other_values(node: ast.Constant, changed: Any) -> Iterator[tuple[Any, str]]:
    value = node.value
    if isinstance(value, bool):
        yield changed(value=not value)
    elif isinstance(value, int):
        yield changed(value=value + 1)
    elif isinstance(value, float):
        yield changed(value=2 * value if value else 1.0)


def _with(node: Any, **fields: Any) -> Any:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _code(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def _put(tree: ast.AST, path: tuple[Any, ...], node: Any) -> None:
    for name, index in path[:-1]:
        tree = getattr(tree, name) if index is None else getattr(tree, name)[index]
    name, index = path[-1]
    if index is None:
        setattr(tree, name, node)
    else:
        getattr(tree, name)[index] = node


# ---- running tests --------------------------------------------------------------------------------------


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of tlcli with a fault in it."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.module.removesuffix(".py").replace("/", ".")
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of the faulty module, None for every other."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, ROOT / self.mutant.module, loader=self)

    def exec_module(self, module: Any) -> None:
        """Run the faulty code as the module."""
        exec(compile(self.mutant.tree, str(ROOT / self.mutant.module), "exec"), module.__dict__)


class Limit:
    """Ends a process in which one test takes far longer than it does without a fault."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_runtest_setup(self, item: Any) -> None:
        """Begin to count."""
        signal.signal(signal.SIGALRM, lambda *_: os._exit(TIMEOUT))
        signal.alarm(20 + int(20 * self.seconds.get(item.nodeid, 1.0)))


def run_tests(mutant: Mutant, tests: list[str], seconds: dict[str, float]) -> str:
    """Run tests on a fault in a fork; return killed, survived or timeout (which is noticed too)."""
    most = 30 + 4 * sum(seconds.get(name, 1.0) for name in tests)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.alarm(int(most) + 10)  # in case the parent was killed
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        code = 3
        try:
            import pytest

            sys.meta_path.insert(0, Loader(mutant))
            with tempfile.TemporaryDirectory() as folder:
                options = [*PYTEST, *KEPT_OUT, f"--basetemp={folder}/t", *tests]
                code = int(pytest.main(options, plugins=[Limit(seconds)]))
        finally:
            os._exit(code)
    ends = time.monotonic() + most
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "survived", TIMEOUT: "timeout"}.get(code, "killed")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def lines_of_tests(
    modules: list[str], tests: list[str]
) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """Run the tests without a fault; return which of them run each line, and how long each takes."""
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data"), Path(folder, "times")
        environment = {**os.environ, "COVERAGE_FILE": str(data), "OMP_NUM_THREADS": "1"}
        sources = ",".join(sorted({str(Path(module).parent) for module in modules}))
        command = [
            sys.executable, "-m", "pytest", "-o", "addopts=", "-q", *KEPT_OUT, "-p", "no:cacheprovider",
            f"--cov={sources}", "--cov-context=test", "--cov-report=", f"--junitxml={report}", *tests,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\nthe tests fail without a fault")
        from xml.etree import ElementTree

        import coverage

        seconds = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
        found: dict[tuple[str, int], set[str]] = defaultdict(set)
        read = coverage.CoverageData(str(data))
        read.read()
        for module in modules:
            for line, contexts in read.contexts_by_lineno(str(ROOT / module)).items():
                found[module, line] |= {name.split("|")[0] for name in contexts if name}
    return found, seconds


def within(tests: list[str], seconds: dict[str, float], most: float) -> list[str]:
    """Return the first tests that take so many seconds in all."""
    found, total = [], 0.0
    for name in tests:
        total += seconds.get(name, 0.0)
        if total > most:
            break
        found.append(name)
    return found


# ---- the run --------------------------------------------------------------------------------------------


def main() -> int:
    """Run what is missing in the results; print the faults that survived and are not argued for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configuration", type=Path)
    parser.add_argument("--results", type=Path, default=Path("mutants.csv"), help="a row a fault")
    parser.add_argument("--only", default="", help="modules whose path holds this")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="of the faults, for N processes at once")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    settings = tomllib.loads(options.configuration.read_text())
    argued = {(item["module"], item["line"], item["change"]) for item in settings.get("argued", [])}
    modules = [module for module in settings["modules"] if options.only in module]
    number, count = map(int, options.part.split("/"))
    faults = [mutant for module in modules for mutant in mutants(module)]
    known = _results(options.results)
    wanted = (
        []
        if options.summary
        else [mutant for mutant in faults if mutant.key not in known][number - 1 :: count]
    )
    if wanted:
        os.environ["OMP_NUM_THREADS"] = "1"
        tests_of, seconds = lines_of_tests(modules, settings["tests"])
        os.chdir(ROOT)
        for name in LIBRARIES:
            importlib.import_module(name)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        gc.freeze()  # what is loaded is not looked through again in every fork
    for index, mutant in enumerate(wanted, 1):
        own = f"test_{Path(mutant.module).stem}.py"
        tests = sorted(tests_of[mutant.module, mutant.line], key=lambda name: seconds.get(name, 0.0))
        mine = [name for name in tests if own in name] or tests
        if not mine:  # what runs when the module is loaded
            mine = [file for file in settings["tests"] if file.endswith(own)]
        outcome = run_tests(mutant, mine, seconds)
        others = within([name for name in tests if name not in mine], seconds, MOST_SECONDS)
        if outcome == "survived" and others:
            outcome = run_tests(mutant, others, seconds)
        with options.results.open("a", newline="") as file:
            csv.writer(file).writerow([*mutant.key, outcome])
        if outcome == "survived":
            print(f"{index}/{len(wanted)}  {mutant.module}:{mutant.line}  {mutant.what}", flush=True)
    known = _results(options.results)
    left = [mutant for mutant in faults if known.get(mutant.key) == "survived"]
    print(f"{len(faults)} faults, {sum(mutant.key in known for mutant in faults)} run, {len(left)} survived")
    unexplained = [mutant for mutant in left if mutant.key not in argued]
    for mutant in unexplained:
        print(f"{mutant.module}:{mutant.line}  {mutant.what}")
    return bool(unexplained)


def _results(path: Path) -> dict[tuple[str, str, str], str]:
    """Return what is known: module, line's text and change -> outcome."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row[0], row[1], row[2]): row[3] for row in csv.reader(file)}


if __name__ == "__main__":
    sys.exit(main())
