"""handloom: a decoding engine with a handwritten sampling loop."""

__version__ = "0.1.0"
