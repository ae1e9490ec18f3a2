"""`python -m tlcli` and the `tlcli` script."""

import faulthandler
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    if sys.stderr is not None:  # a caller may have closed it
        faulthandler.enable()  # after a crash in C code the stack tells which part it was, such as a decoder
    from tlcli.cli.app import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
