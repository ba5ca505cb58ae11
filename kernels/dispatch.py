"""Which implementation runs: "triton", "torch" or "auto", by argument, `use` block or environment variable.

An argument beats the innermost `use` block, which beats HANDLOOM_KERNELS, which beats "auto". "auto" takes
Triton on CUDA and torch elsewhere, and logs each reason for falling back once. An explicit choice is followed
or raises.
"""

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os

CHOICES = ("auto", "triton", "torch")
VARIABLE = "HANDLOOM_KERNELS"

_choice = contextvars.ContextVar("handloom_kernels", default=None)
_logger = logging.getLogger("handloom.kernels")


class KernelUnavailable(RuntimeError):
    """The implementation that was asked for by name cannot run here."""


@contextlib.contextmanager
def use(choice):
    """Run the block with "auto", "triton" or "torch"; blocks nest, and are local to thread and task."""
    token = _choice.set(_valid(choice, "use()"))
    try:
        yield
    finally:
        _choice.reset(token)


def requested(argument=None):
    """The choice in force: argument, else `use` block, else HANDLOOM_KERNELS, else "auto"."""
    if argument is not None:
        return _valid(argument, "kernels=")
    if _choice.get() is not None:
        return _choice.get()
    return _valid(os.environ.get(VARIABLE) or "auto", VARIABLE)


def select(operation, device, argument=None, unsupported=None):
    """Decide for one call.

    Args:
        operation: name for messages.
        device: torch.device of the call's tensors.
        argument: the call's own choice or None.
        unsupported: why this call has no Triton kernel, or None.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: unknown choice. KernelUnavailable: "triton" was asked for by name and cannot run.
    """
    choice = requested(argument)
    if choice == "torch":
        return "torch"
    reason = unsupported or _why_not(device.type, named=choice == "triton")
    if reason is None:
        return "triton"
    if choice == "triton":
        raise KernelUnavailable(f"{operation}: kernels='triton' cannot run: {reason}; use 'torch' or 'auto'")
    _log_once(operation, reason)
    return "torch"


def _why_not(device_type, named):
    """Why Triton cannot run on this kind of device, or None; the interpreter runs only named choices."""
    if device_type == "cuda" or (named and interpreting()):
        return None if _has_triton() else "triton is not installed"
    return (
        f"tensors are on {device_type!r}; Triton needs 'cuda' (or TRITON_INTERPRET=1 before it is imported)"
    )


@functools.cache
def _has_triton():
    return importlib.util.find_spec("triton") is not None


def interpreting():
    """True where Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _valid(choice, where):
    if choice not in CHOICES:
        raise ValueError(f"{where} {choice!r}: choose one of {', '.join(map(repr, CHOICES))}")
    return choice


@functools.cache
def _log_once(operation, reason):
    _logger.info("%s runs in torch: %s", operation, reason)
