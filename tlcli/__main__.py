"""`python -m tlcli` and the `tlcli` script."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from tlcli.cli.app import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
