"""The rules of the code's shape, checked on its syntax trees; and checks that each rule can fail.

`violations` takes module name -> source, so that the rules run on the package and on bad examples alike.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tlcli"

MODULE_LINES = 500  # physical lines
CLASS_LINES = 250
FUNCTION_LINES = 60
PARAMETERS = 7

# Imports point from a later layer to an earlier one, or stay inside a package. A package counts as one name.
LAYERS = (
    {"__init__", "errors", "progress", "warned"},
    {"wording"},
    {"machine"},
    {"config", "cache"},
    {"data", "backbones"},
    {"features", "heads", "metrics"},
    {"runs"},
    {"training", "page"},
    {"advice"},
    {"commands"},
    {"cli"},
    {"__main__"},
)

TORCH = {"torch", "torchvision", "timm"}
# No torch at import: what a command line needs before it knows that it has work to do.
LIGHT = {
    *("__init__", "__main__", "errors", "progress", "warned", "wording", "config", "cli", "advice"),
    *(
        "machine.files",
        "machine.interrupts",
        "machine.paths",
        "machine.processes",
        "runs.directory",
        "runs.continuing",
    ),
}
CONSOLE = {"typer", "rich"}
# Slow to import and not needed by every command, so imported by the functions that use them.
DEFERRED = {"sklearn", "scipy", "matplotlib", "networkx", "accelerate", "jinja2"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "core", "misc"}


def sources() -> dict[str, str]:
    """Return module name -> source of the package, such as tlcli.data.scan."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def violations(modules: dict[str, str]) -> list[str]:
    """Return every broken rule as `module:line: what`, module names sorted."""
    broken: list[str] = []
    edges: dict[str, set[str]] = {}
    for name, source in sorted(modules.items()):
        tree = ast.parse(source)
        imports = list(_imports(tree, name, modules))
        edges[name] = {target for target, _, _ in imports if target in modules} - {name}
        complaints = [
            *_names(name),
            *_layers(name, imports),
            *_banned_imports(name, imports),
            *_output(name, tree),
            *_ceilings(name, source, tree),
        ]
        broken += [f"{name}:{line}: {what}" for line, what in complaints]
    cycle = _cycle(edges)
    if cycle:
        broken.append(f"{cycle[0]}:1: import cycle {' -> '.join(cycle)}")
    return broken


def _imports(tree: ast.AST, module: str, modules: dict[str, str]) -> Iterator[tuple[str, int, bool]]:
    """Yield (imported module, line, whether the import runs when the module is imported)."""
    deferred: set[ast.AST] = set()
    for block in ast.walk(tree):
        function = isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        if function or (isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")):
            deferred.update(ast.walk(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            # `from tlcli.data import scan` imports tlcli.data.scan; `from tlcli.errors import X` a name.
            below = [f"{base}.{alias.name}" for alias in node.names]
            names = [target if target in modules or _is_package(target) else base for target in below]
        else:
            continue
        for target in dict.fromkeys(names):
            yield (f"{target}.__init__" if target == "tlcli" else target), node.lineno, node not in deferred


def _is_package(target: str) -> bool:
    return target.startswith("tlcli.") and target.count(".") == 1 and _layer(_place(target)) is not None


def _place(module: str) -> str:
    """Return the name the layers know: tlcli.data.scan -> data, tlcli.heads.fit -> heads."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _layer(place: str) -> int | None:
    return next((number for number, names in enumerate(LAYERS) if place in names), None)


def _names(module: str) -> Iterator[tuple[int, str]]:
    for part in module.split("."):
        if part.strip("_") in VAGUE:
            yield 1, f"{part!r} says nothing; name the module after its stage"
    if _layer(_place(module)) is None:
        yield 1, "has no layer; give it one in tests/test_architecture.py and the README's map"


def _layers(module: str, imports: list[tuple[str, int, bool]]) -> Iterator[tuple[int, str]]:
    place, layer = _place(module), _layer(_place(module))
    for target, line, _ in imports:
        if target.split(".")[0] != "tlcli":
            continue
        other = _place(target)
        above = _layer(other)
        if layer is None or above is None or other == place:
            continue
        if above > layer:
            yield line, f"imports {target}, of a later layer"
        elif above == layer and layer > 0:
            yield line, f"imports {target}; parts of one layer do not know each other"


def _banned_imports(module: str, imports: list[tuple[str, int, bool]]) -> Iterator[tuple[int, str]]:
    place = _place(module)
    for target, line, at_import in imports:
        top = target.split(".")[0]
        if top == "click" or target.startswith("typer._"):
            yield line, f"imports {target}; only names that typer exports"
        if top in CONSOLE and place not in {"cli", "__main__"}:
            yield line, f"imports {top}; the library does not know the command line"
        if top in TORCH and place == "cache":
            yield line, f"imports {top}; the cache knows rows, not tensors"
        if top in TORCH and at_import and {place, module.removeprefix("tlcli.")} & LIGHT:
            yield line, f"imports {top} at import; move it into the function"
        if top in DEFERRED and at_import:
            yield line, f"imports {top} at import; move it into the function that needs it"


def _output(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if _place(module) in {"cli", "__main__"}:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in {"print", "input", "exit", "quit", "sys.exit", "os._exit", "breakpoint"}:
                yield node.lineno, f"calls {name}; the library reports, the command line talks"
            if name.startswith(("sys.stdout.", "sys.stderr.")):
                yield node.lineno, f"calls {name}; use the logger"
        if isinstance(node, ast.Raise) and node.exc and "SystemExit" in ast.unparse(node.exc):
            yield node.lineno, "raises SystemExit; raise a class of tlcli.errors"


def _ceilings(module: str, source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    lines = len(source.splitlines())
    if lines > MODULE_LINES:
        yield 1, f"has {lines} lines, more than {MODULE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > CLASS_LINES:
                yield node.lineno, f"class {node.name} has {length} lines, more than {CLASS_LINES}"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = _length(node)
        if length > FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {length} lines, more than {FUNCTION_LINES}"
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in {"self", "cls"} for argument in given)
        if count > PARAMETERS and _place(module) != "cli":
            yield node.lineno, f"{node.name} has {count} parameters, more than {PARAMETERS}; use a dataclass"


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from `def` to its end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, the first repeated at the end, or []."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


# ---- the package keeps the rules --------------------------------------------------------------------------


def test_the_package_keeps_every_rule() -> None:
    broken = violations(sources())
    assert not broken, "\n" + "\n".join(broken)


def test_no_vague_names_outside_the_package_either() -> None:
    paths = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py")]
    assert not [str(path) for path in paths if path.stem in VAGUE or path.parent.name in VAGUE]


def test_packages_have_an_init_that_is_only_a_docstring() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    for folder in sorted(folders):
        init = folder / "__init__.py"
        assert init.exists(), f"{folder} has no __init__.py"
        body = ast.parse(init.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) for node in body), f"{init} holds more than a docstring"


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = sorted(TORCH | DEFERRED | {"numpy", "PIL"})
    code = (
        "import sys; import tlcli.cli.app as app; app.build();"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the rules can fail -----------------------------------------------------------------------------------

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
LONG_CLASS = "class A:\n" + "    x = 1\n" * CLASS_LINES
MANY_PARAMETERS = "def f(a, b, c, d, /, e, *, g, h, i): ...\n"

BAD: list[tuple[str, dict[str, str], str]] = [
    ("upward", {"tlcli.data.scan": "from tlcli.features import plan"}, "of a later layer"),
    (
        "upward in a function",
        {"tlcli.heads.fit": "def f():\n    from tlcli.runs.run import x"},
        "later layer",
    ),
    ("upward, relative", {"tlcli.data.scan": "from ..features.plan import x"}, "of a later layer"),
    ("library to cli", {"tlcli.commands.report": "import tlcli.cli.output"}, "of a later layer"),
    ("training to advice", {"tlcli.training.plan": "from tlcli.advice.rules import x"}, "of a later layer"),
    ("beside", {"tlcli.cache.key": "from tlcli.config.data import x"}, "do not know each other"),
    ("beside", {"tlcli.data.scan": "from tlcli.backbones import zoo"}, "do not know each other"),
    ("torch in cache", {"tlcli.cache.store": "def f():\n    import torch"}, "rows, not tensors"),
    ("torch in cli", {"tlcli.cli.extract": "import torch.nn"}, "at import"),
    ("torch in config", {"tlcli.config.head": "if True:\n    from torch import Tensor"}, "at import"),
    ("torch in a light module", {"tlcli.machine.files": "import torch"}, "at import"),
    ("torch in a class", {"tlcli.cli.extract": "class A:\n    import timm"}, "at import"),
    ("slow import", {"tlcli.metrics.scores": "from scipy import stats"}, "function that needs it"),
    ("click", {"tlcli.cli.app": "def f():\n    import click"}, "only names that typer exports"),
    ("private click", {"tlcli.cli.app": "from typer._click import Context"}, "only names"),
    ("typer", {"tlcli.commands.finetune": "import typer"}, "does not know the command line"),
    ("rich", {"tlcli.progress": "def f():\n    from rich.progress import x"}, "does not know"),
    ("print", {"tlcli.commands.finetune": "def f():\n    print(1)"}, "calls print"),
    ("sys.exit", {"tlcli.commands.finetune": "import sys\nsys.exit(1)"}, "calls sys.exit"),
    ("SystemExit", {"tlcli.commands.finetune": "raise SystemExit(1)"}, "raises SystemExit"),
    ("stdout", {"tlcli.commands.finetune": "import sys\nsys.stdout.write('')"}, "use the logger"),
    ("vague name", {"tlcli.data.utils": ""}, "says nothing"),
    ("no layer", {"tlcli.novelty": ""}, "has no layer"),
    ("long module", {"tlcli.heads.fit": "\n" * (MODULE_LINES + 1)}, "lines, more than"),
    ("long class", {"tlcli.heads.fit": LONG_CLASS}, "class A has 251 lines"),
    ("long function", {"tlcli.heads.fit": LONG_FUNCTION}, "f has 61 lines"),
    ("parameters", {"tlcli.heads.fit": MANY_PARAMETERS}, "f has 8 parameters"),
    (
        "cycle",
        {
            "tlcli.heads.fit": "from tlcli.heads import mlp",
            "tlcli.heads.mlp": "def f():\n    import tlcli.heads.fit",
        },
        "import cycle tlcli.heads.fit -> tlcli.heads.mlp -> tlcli.heads.fit",
    ),
]

GOOD: list[tuple[str, dict[str, str]]] = [
    ("downward", {"tlcli.features.plan": "from tlcli.cache import store", "tlcli.cache.store": ""}),
    ("errors among themselves", {"tlcli.progress": "from tlcli.errors import x"}),
    ("inside a package", {"tlcli.data.audit": "from tlcli.data.scan import x"}),
    ("torch in a command's body", {"tlcli.cli.extract": "def f():\n    import torch"}),
    ("torch for types", {"tlcli.cli.extract": "if typing.TYPE_CHECKING:\n    import torch"}),
    ("torch in the library", {"tlcli.features.plan": "import torch"}),
    ("torch beside light modules", {"tlcli.machine.device": "import torch"}),
    ("rich in the command line", {"tlcli.cli.output": "from rich.console import Console"}),
    ("deferred", {"tlcli.metrics.scores": "def f():\n    from scipy import stats"}),
    ("many parameters in a command", {"tlcli.cli.finetune": MANY_PARAMETERS}),
    ("a name with a vague part", {"tlcli.data.commons": ""}),
]


@pytest.mark.parametrize(("modules", "expected"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_broken_rule_is_found(modules: dict[str, str], expected: str) -> None:
    assert any(expected in complaint for complaint in violations(modules))


@pytest.mark.parametrize("modules", [good[1] for good in GOOD], ids=[good[0] for good in GOOD])
def test_a_kept_rule_is_not_reported(modules: dict[str, str]) -> None:
    assert violations(modules) == []
