"""The command tree, and the one place where an error becomes an exit code."""

import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated

import typer

from tlcli import __version__
from tlcli.cli import options, output
from tlcli.errors import Interrupted, TlcliError
from tlcli.machine import interrupts, memory, paths

EXIT_CODES = (
    "Exit codes: 0 done, 1 bug, 2 usage, 3 data, 4 backbone or weights, 5 device, memory, disk, permission, "
    "6 a check or gate failed, 128+n interrupted by signal n (INT, TERM, USR1, USR2, HUP) with the finished "
    "work kept."
)

# command -> module:function below tlcli.cli; a group's commands are one level deeper
COMMANDS = {
    "recommend": "recommend:recommend",
    "extract": "extract:extract",
    "finetune": "finetune:finetune",
    "evaluate": "evaluate:evaluate",
    "predict": "predict:predict",
    "report": "report:report",
    "demo": "demo:demo",
}
GROUPS = {
    "backbones": (
        "List backbones, or show one unit by unit.",
        {"list": "backbones:list_backbones", "show": "backbones:show"},
    ),
    "data": (
        "Check a data set, show its split, or preview its augmentation.",
        {"check": "data:check", "split": "data:split", "preview": "data:preview"},
    ),
    "cache": (
        "Look at, verify and prune the feature cache.",
        {
            "list": "cache:list_entries",
            "show": "cache:show",
            "verify": "cache:verify",
            "prune": "cache:prune",
        },
    ),
}

DISK_OR_PERMISSION = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ENOMEM,
}  # fmt: skip


ODD_PATH = {errno.ENAMETOOLONG, errno.ELOOP}


def build() -> typer.Typer:
    """Return the command tree."""
    app = typer.Typer(
        name="tlcli",
        help="Transfer learning on images: a folder in, a measured classifier out.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    _add(app, COMMANDS)
    for name, (help, commands) in GROUPS.items():
        group = typer.Typer(
            help=help, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
        )
        _add(group, commands)
        app.add_typer(group, name=name)
    return app


def _add(app: typer.Typer, commands: dict[str, str]) -> None:
    for name, place in commands.items():
        module, _, function = place.partition(":")
        run = getattr(importlib.import_module(f"tlcli.cli.{module}"), function)
        app.command(name, epilog=run.epilog)(run)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"tlcli {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: list[str]) -> int:
    """Run the command line `argv` (without the program's name) and return the exit code."""
    _prepare()
    if not argv or (len(argv) == 1 and argv[0] in GROUPS):
        argv = [*argv, "--help"]  # asking for nothing is asking for help, which is no error
    try:
        build()(args=argv, prog_name="tlcli")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except options.ReaderGone:  # nothing to tell it, and nothing must be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _failed(Interrupted(options.interrupting_signal))
    except TlcliError as error:
        return _failed(error)
    except Exception as error:
        return _unexpected(error)
    return 0


def _failed(error: TlcliError) -> int:
    output.print_error(error.message, error.hint)
    return error.exit_code


def _unexpected(error: Exception) -> int:
    """Map what the machine refuses to 5; anything else is a bug and shows its traceback."""
    if memory.is_out_of_memory(error):
        hint = "Use a smaller --image-size, fewer --workers, in training a smaller --batch-size, or another "
        hint += "--device. Finished work is kept: the same command continues it."
        output.print_error(
            f"Out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", hint
        )
        return 5
    if isinstance(error, OSError) and error.errno in DISK_OR_PERMISSION:
        where = f" ({error.filename})" if error.filename else ""
        output.print_error(
            f"The system refused: {error.strerror}{where}.",
            f"Check space and permissions; tlcli keeps its state in {paths.home()}.",
        )
        return 5
    if isinstance(error, OSError) and error.errno in ODD_PATH:
        output.print_error(f"No such path can be: {error.strerror} ({error.filename}).", "Check the path.")
        return 2
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
        output.print_error("A path begins with ~, and there is no such home folder.", "Write it in full.")
        return 2
    traceback.print_exception(error)
    output.print_error("This is a bug in tlcli; please report it with the lines above.")
    return 1


def _prepare() -> None:
    """Make odd file names printable, signals end like Ctrl-C, and TLCLI_OFFLINE hold for the hub client."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open as long as the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # paths of any bytes
    if paths.offline():
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads that spin for long while they wait slow a busy machine down; threads that sleep at once take
    # half as long again over the small steps of training. It must be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    options.interrupting_signal = signal.SIGINT
    if threading.current_thread() is threading.main_thread():
        for number in interrupts.SIGNALS[1:]:  # Ctrl-C is Python's own; HUP is ignored under nohup
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _terminate)


def _terminate(number: int, _frame: FrameType | None) -> None:
    options.interrupting_signal = number
    if number == signal.SIGHUP:
        interrupts.leave_terminal()
    raise KeyboardInterrupt
