"""cli: the command `handloom`, its options and its terminal."""

from .command import main

__all__ = ["main"]
