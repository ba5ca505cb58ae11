"""forms: what a processor can be: opaque, an edit, or a keep; and the step that each of them reads."""

from .context import Context
from .edit import Edit
from .keep import Keep
from .processor import NEG_INF, Adapted, Function, Processor, committed, guarded, is_ours, values_of

__all__ = [
    "NEG_INF",
    "Adapted",
    "Context",
    "Edit",
    "Function",
    "Keep",
    "Processor",
    "committed",
    "guarded",
    "is_ours",
    "values_of",
]
