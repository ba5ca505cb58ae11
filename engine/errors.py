"""Errors that handloom raises: one base class, one subclass for each thing a caller can put right."""

from collections.abc import Sequence
from typing import Any


class HandloomError(Exception):
    """Base class of every error that handloom raises on purpose.

    `results` holds what was generated where only some rows failed and the caller gets nothing but ids otherwise.
    """

    results: Sequence[Any] = ()


class ParameterError(HandloomError, ValueError):
    """A sampling parameter is unknown, out of range, or contradicts another one."""


class PromptError(HandloomError, ValueError):
    """A prompt cannot be turned into token ids that the model accepts."""


class ModelError(HandloomError):
    """A model cannot be loaded, or does not behave as a causal language model must."""


class CapabilityError(HandloomError):
    """The loaded model cannot do what was asked; `engine.capabilities` says why."""


class PoolExhausted(HandloomError, MemoryError):
    """The block pool has no free block left, and may not grow."""
