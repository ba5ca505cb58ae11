"""cli: the command `handloom`, its options and its terminal."""

import sys


def main() -> None:
    """Run the command `handloom`: an answer to a prompt, or one of the commands of experiments."""
    from . import command, experiments

    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    (experiments if asked in experiments.COMMANDS else command).main()


__all__ = ["main"]
