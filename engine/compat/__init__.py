"""compat: transformers' own interfaces on handloom's loop."""

from .bridge import HFCriterion, HFProcessor, as_custom_generate, stream_to

__all__ = ["HFCriterion", "HFProcessor", "as_custom_generate", "stream_to"]
