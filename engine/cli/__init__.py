"""cli: the command `handloom`, its options and its terminal."""

import sys


def main() -> None:
    """Run the command `handloom`: an answer to a prompt, or one of the commands of experiments and of the server."""
    from . import command, experiments, serving

    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    for commands in (experiments, serving):
        if asked in commands.COMMANDS:
            commands.main()
            return
    command.main()


__all__ = ["main"]
