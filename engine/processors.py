"""The built-in processors, and the forms that one of your own can take."""

from .pipeline import processors as _built_in
from .pipeline.foreign import zoo
from .pipeline.processors import *  # noqa: F403

__all__ = [*_built_in.__all__, "zoo"]  # noqa: PLE0604
