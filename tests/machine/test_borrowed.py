"""Every private name of another library that tlcli uses is in one table, and is still there."""

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from torch import fx, nn

from tlcli.machine.borrowed import BORROWED

PACKAGE = Path(__file__).parents[2] / "tlcli"
OWN = {"_parsed", "_make"}  # of this package's classes, and of Python's NamedTuple
BASES = {"self", "cls"}


def resolve(name: str) -> object:
    """Return what a dotted name stands for."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def has_constant() -> bool:
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0])

    model = Constant()
    fx.Tracer().trace(model)
    return "_tensor_constant0" in vars(model)


def wraps_an_optimizer() -> bool:
    return hasattr(create_optimizer_v2(nn.Linear(2, 2), opt="lookahead_sgd", lr=0.1), "_base_optimizer")


def marks_what_it_prepares() -> bool:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's training may have left one
    network = nn.Linear(2, 2)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(network)
    return hasattr(network, "_is_accelerate_prepared")


# Names that are no attributes of a module, and how to see that they are there.
SEEN: dict[str, Callable[[], bool]] = {
    "torch.fx: _tensor_constant": has_constant,
    "torch.compile: _orig_mod": lambda: "_orig_mod.weight" in torch.compile(nn.Linear(2, 2)).state_dict(),
    "torch.nn.Module._modules": lambda: nn.Sequential(nn.ReLU())._modules.keys() == {"0"},
    "torch.nn.Module._buffers": lambda: "running_mean" in nn.BatchNorm1d(2)._buffers,
    "torch.nn.Module._non_persistent_buffers_set": lambda: nn.Module()._non_persistent_buffers_set == set(),
    "timm.optim.lookahead.Lookahead._base_optimizer": wraps_an_optimizer,
    "numpy: _core": lambda: "_core" in np.float64(0).__reduce__()[0].__module__,
    "accelerate: _is_accelerate_prepared": marks_what_it_prepares,
}


@pytest.mark.parametrize("name", BORROWED)
def test_a_borrowed_name_is_there(name):
    found = SEEN[name]() if name in SEEN else resolve(name)
    assert found, f"{name} is gone from torch {torch.__version__}, timm {timm.__version__}: {BORROWED[name]}"


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield the private names that a module takes from anything but its own classes, with their lines."""
    tree = ast.parse(source)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    }
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr if ast.unparse(node.value) not in BASES else ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            name = next((part for part in node.value.split(".") if part.startswith("_") and part != "_"), "")
        if name.startswith("_") and not name.startswith("__") and len(name) > 2 and name not in defined | OWN:
            yield node.lineno, name


def test_no_other_private_name_is_used():
    known = {name.rpartition(".")[2].rpartition(": ")[2] for name in BORROWED}
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in PACKAGE.rglob("*.py")
        for line, name in private_names(path.read_text(encoding="utf-8"))
        if name not in known
    }
    assert found == set()


def test_a_private_name_of_another_library_is_seen():
    assert sorted(private_names("import torch\ntorch._C._secret()\nself._own()\n'timm._hidden'\n")) == [
        (2, "_secret"),
        (4, "_hidden"),
    ]
