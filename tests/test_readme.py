"""What the documents promise: their commands exist, their map is complete, and the wheel holds everything."""

import functools
import json
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
SHELL_FENCES = {"", "sh", "bash", "shell", "console"}
SHELL_WORDS = {"if", "then", "else", "elif", "while", "until", "do", "!", "time", "exec", "{", "("}
OPERATORS = set(";&|()<>")


# ---- finding command lines --------------------------------------------------------------------------------


def documents() -> list[Path]:
    """Return every file whose command lines must parse."""
    folders = [*ROOT.glob("docs/**/*"), *ROOT.glob("examples/**/*")]
    kept = [path for path in folders if path.suffix in {".md", ".sh", ".py", ".yaml", ".yml"}]
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return sorted(path for path in [*pages, *kept] if path.exists())


def shell_lines(path: Path, text: str) -> Iterator[str]:
    """Yield the shell lines of a document: its fenced blocks, its script, or its docstrings' commands."""
    if path.suffix == ".md":
        fence = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)
        for language, block in fence.findall(text):
            lines = [line.strip() for line in _joined(block)]
            if language not in SHELL_FENCES:
                continue
            prompts = [line[2:] for line in lines if line.startswith("$ ")]
            # Where a block has prompts, what lies between is output. A bare block may be output as a whole.
            yield from prompts or (lines if language else [line for line in lines if _is_tlcli(line)])
        yield from (
            line.strip() for line in _joined(fence.sub("", text)) if re.match(r"(    |\t)tlcli ", line)
        )
    elif path.suffix == ".sh":
        yield from (line for line in _joined(text) if not line.lstrip().startswith("#"))
    else:
        lines = (line.strip().removeprefix("#").strip() for line in _joined(text))
        yield from (line.removeprefix("$ ") for line in lines if _is_tlcli(line.removeprefix("$ ")))


def commands(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every tlcli call in a shell line."""
    for inner in re.findall(r"\$\(([^()]*)\)", line):
        yield from commands(inner)
    line = re.sub(r"\$\([^()]*\)", "1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    simple: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= OPERATORS and token:
            if token.startswith((">", "<")) and simple and simple[-1].isdigit():
                simple.pop()  # the 2 of 2>file
            if simple:
                yield from _arguments(simple)
            simple = ["redirection"] if token.startswith((">", "<")) else []
        else:
            simple.append(token)


def _arguments(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in SHELL_WORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    if words[:1] == ["tlcli"]:
        yield words[1:]
    elif words[1:3] == ["-m", "tlcli"]:
        yield words[3:]


def _is_tlcli(line: str) -> bool:
    return re.match(r"(\w+=\S+ )*tlcli [a-z-]", line) is not None


def _joined(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


# ---- parsing them against the real command tree -----------------------------------------------------------


@functools.cache
def tree() -> Any:
    """Return the root command, as typer builds it."""
    from tlcli.cli.app import build

    return typer.main.get_command(build())


def problem(arguments: list[str]) -> str | None:
    """Return why the command tree refuses `arguments`, or None. Nothing is executed.

    A shell variable stands for a number, which is also a path and a name; a --config file is not read.
    """
    if "--config" in arguments:
        place = arguments.index("--config")
        arguments = arguments[:place] + arguments[place + 2 :]
    words = [re.sub(r"\$\{?\w+\}?|\$@", "1", word) for word in arguments]
    command, name, parent = tree(), "tlcli", None
    try:
        while True:
            context = command.make_context(name, list(words), parent=parent)
            if not hasattr(command, "resolve_command"):
                return None
            rest = [*context._protected_args, *context.args]
            name, command, words = command.resolve_command(context, rest)
            parent = context
    except typer.Exit:
        return None  # --help, --version
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return None
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"


def test_every_command_line_in_the_documents_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broken, count = [], 0
    for path in documents():
        for line in shell_lines(path, path.read_text(encoding="utf-8")):
            try:
                found = list(commands(line))
            except ValueError as error:  # an unbalanced quote: no shell line on its own
                found = []
                if "tlcli" in line:
                    broken.append(f"{path.relative_to(ROOT)}: {line}\n    {error}")
            for arguments in found:
                count += 1
                if why := problem(arguments):
                    broken.append(f"{path.relative_to(ROOT)}: tlcli {shlex.join(arguments)}\n    {why}")
    assert not broken, "\n" + "\n".join(broken)
    if (ROOT / "README.md").exists():
        assert count > 10, "the documents show fewer commands than the tool has; does the search still work?"


def test_every_example_of_the_help_parses() -> None:
    def leaves(command: Any) -> Iterator[Any]:
        if not hasattr(command, "commands"):
            yield command
        for child in getattr(command, "commands", {}).values():
            yield from leaves(child)

    for leaf in leaves(tree()):
        lines = [line for line in (leaf.epilog or "").splitlines() if "tlcli " in line]
        assert len(lines) == 2, f"{leaf.name} has {len(lines)} examples"
        for line in lines:
            found = list(commands(line))
            assert found, f"{leaf.name}: {line!r} calls no tlcli"
            for arguments in found:
                assert problem(arguments) is None, f"{line}: {problem(arguments)}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tlcli cache list --json", [["cache", "list", "--json"]]),
        ("if ! TLCLI_HOME=/x tlcli cache verify; then", [["cache", "verify"]]),
        ('accuracy="$(tlcli evaluate runs/x --json | python -c 1)"', [["evaluate", "runs/x", "--json"]]),
        ("find . | tlcli predict runs/x - 2> errors.txt", [["predict", "runs/x", "-"]]),
        ("python -m tlcli demo > out  # tlcli nothing", [["demo"]]),
        ("tlcli data check 'my images' && tlcli demo", [["data", "check", "my images"], ["demo"]]),
        ("cat tlcli recommend", []),
    ],
)
def test_calls_are_found_in_shell_lines(line: str, expected: list[list[str]]) -> None:
    assert list(commands(line)) == expected


def test_only_shell_and_prompts_are_read_from_a_page() -> None:
    page = (
        "```sh\ntlcli a \\\n  --b\n```\n```console\n$ tlcli c\ntlcli: output\n```\n```python\ntlcli d\n```\n"
    )
    assert list(shell_lines(Path("x.md"), page)) == ["tlcli a  --b", "tlcli c"]


@pytest.mark.parametrize(
    "line",
    [
        "recomend --size small",
        "recommend --sise small",
        "recommend --size medium",
        "recommend --size small spare",
        "cache",
    ],
)
def test_a_wrong_command_line_is_refused(line: str) -> None:
    if line == "cache" and "cache" in tree().commands:
        assert problem(["cache", "lost"]) is not None
    else:
        assert problem(shlex.split(line)) is not None


# ---- the map ----------------------------------------------------------------------------------------------


def mapped(lines: list[str]) -> set[str]:
    """Return the paths of Python files in a map: folders end in a slash, two spaces deeper is below."""
    above: list[str] = []
    found = set()
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        for word in line.split():
            if word.endswith("/") and line.strip() == word:
                above[depth:] = [word]
            elif word.endswith(".py"):
                found.add("".join(above[:depth]) + word)
            else:
                break  # from here on it is prose
    return found


def test_the_map_of_files_is_true() -> None:
    fences = re.findall(r"^```text\n(tlcli/\n.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    assert len(fences) == 1, "README.md has no map: a fenced block that begins with tlcli/"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tlcli").rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
    assert mapped(fences[0].splitlines()) == modules


# ---- the wheel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a fresh environment that has the built wheel, and not the source tree.

    Its dependencies are this environment's: a .pth file names our site-packages, whose own .pth files (that
    of an editable install among them) are not read then.
    """
    folder = tmp_path_factory.mktemp("wheel")

    def run(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("tlcli-*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run([*pip, "--quiet", str(wheel)])
    purelib = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(purelib.strip()) / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return python


def test_the_wheel_works_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    code = "import tlcli; print(tlcli.__file__)"
    where = subprocess.run(
        [clean_python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert where.stdout.startswith(str(clean_python.parent.parent))
    script = clean_python.parent / "tlcli"
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert version.stdout.startswith("tlcli ")


def test_the_wheel_holds_the_bundled_backbone(clean_python: Path, tmp_path: Path) -> None:
    if not (ROOT / "tlcli" / "backbones" / "bundled").exists():
        pytest.skip("the bundled backbone is not made yet")
    script = clean_python.parent / "tlcli"
    shown = subprocess.run(
        [script, "backbones", "show", "bundled", "--json", "--offline"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["schema"] == "tlcli.backbones.show/1"
    assert document["units"]
