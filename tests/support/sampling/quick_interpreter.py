"""Triton's interpreter without what it does again and again: half of the time of an interpreted kernel.

It replaces the functions of `triton.language` at every launch, and once more at every call of a device function inside
a launch, which finds them replaced. Only the first does anything; this module leaves out the others.
"""

import os

from triton.runtime import interpreter


def replaced(fn) -> bool:
    """Whether every name under which a function sees `triton.language` is the interpreter's already."""
    language = interpreter.tl
    seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
    builtin = language.core.is_builtin
    return bool(seen) and not any(builtin(one.load) or builtin(one.tensor.__add__) for one in seen)


def install() -> None:
    """From here on, in this process; versions of Triton that do it otherwise are left as they are."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang

    def once(fn):
        return interpreter._LangPatchScope() if replaced(fn) else patch(fn)

    interpreter._patch_lang = once
