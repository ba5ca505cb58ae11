"""Triton's interpreter without what it does again and again: a third of the time of an interpreted kernel.

It replaces the functions of `triton.language` at every launch, and once more at every call of a device function inside
a launch, which finds them replaced. Only the first does anything; this module leaves out the others. And it works the
type and the shape of every value out anew, of which there are few: they are made once and kept.
"""

import functools
import os

from triton.runtime import interpreter


def replaced(fn) -> bool:
    """Whether every name under which a function sees `triton.language` is the interpreter's already."""
    language = interpreter.tl
    seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
    builtin = language.core.is_builtin
    return bool(seen) and not any(builtin(one.load) or builtin(one.tensor.__add__) for one in seen)


def patch_once() -> None:
    """Functions are replaced by the first function of a launch alone."""
    patch = interpreter._patch_lang

    def once(fn):
        return interpreter._LangPatchScope() if replaced(fn) else patch(fn)

    interpreter._patch_lang = once


def keep_types() -> None:
    """Types of blocks, shapes of values, NumPy's types and those of results are worked out once."""
    core, types, shapes = interpreter.tl.core, {}, {}
    make_type, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__

    @functools.wraps(make_type)
    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple([getattr(size, "value", size) for size in shape])
        if key in types:
            vars(self).update(types[key])
        else:
            make_type(self, element_ty, shape)
            if not isinstance(element_ty, core.pointer_type):  # whose name does not tell all of it
                types[key] = dict(vars(self))

    @functools.wraps(make_tensor)
    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = {name: value for name, value in vars(self).items() if name in ("shape", "numel")}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    keep_by_name(interpreter, "_get_np_dtype")
    semantic = type(interpreter.interpreter_semantic)
    keep_by_name(semantic, "computation_type_impl")
    broadcast = semantic.broadcast_impl_value
    semantic.broadcast_impl_value = lambda self, one, other: (
        (one, other) if one.shape is other.shape else broadcast(self, one, other)
    )


def keep_by_name(owner, name) -> None:
    """A function of types answers from what it answered before to types of the same names."""
    original, answers = getattr(owner, name), {}

    @functools.wraps(original)
    def kept(*arguments):
        key = tuple([getattr(each, "name", each) for each in arguments])
        if key not in answers:
            answers[key] = original(*arguments)
        return answers[key]

    setattr(owner, name, kept)


def install() -> None:
    """From here on, in this process; versions of Triton that do it otherwise are left as they are."""
    if os.environ.get("TRITON_INTERPRET") != "1" or getattr(interpreter, "handloom_is_quick", False):
        return
    interpreter.handloom_is_quick = True
    if hasattr(interpreter, "_LangPatchScope"):
        patch_once()
    wanted = {"handle", "shape", "numel", "type", "dtype"}
    one = interpreter.tl.core.tensor(None, interpreter.tl.float32)
    if vars(one).keys() == wanted and hasattr(interpreter, "interpreter_semantic"):
        keep_types()
