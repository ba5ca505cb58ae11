"""Triton's interpreter without what it does again and again: a third of the time of an interpreted kernel, or less.

It replaces the functions of `triton.language` at every launch, and once more at every call of a device function inside
a launch, which finds them replaced: only the first does anything. Every operator passes six functions on its way to
NumPy, which work out the types, the shapes and the constants that they worked out for the last one; each is made once
and kept. What overflows is computed and then not looked at. This module leaves all that out and changes no value.
"""

import functools
import os

import numpy as np
from triton.runtime import interpreter

core = interpreter.tl.core
Semantic = type(getattr(interpreter, "interpreter_semantic", None))


def patch_once() -> None:
    """Functions are replaced by the first function of a launch alone."""
    patch = interpreter._patch_lang

    @functools.cache
    def modules(fn) -> list:
        """Under which names a function sees `triton.language`."""
        return [value for value in fn.__globals__.values() if value is interpreter.tl or value is core]

    def once(fn):
        seen = modules(fn)
        replaced = seen and not any(core.is_builtin(one.load) for one in seen)
        return interpreter._LangPatchScope() if replaced else patch(fn)

    interpreter._patch_lang = once


def call_at_once() -> None:
    """A function of `triton.language` is called without the one that asks whether it was told a semantic."""

    def patch(target, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)
        semantic = interpreter.interpreter_semantic

        def called(*arguments, **named):
            named["_semantic"] = semantic
            return function(*arguments, **named)

        scope.set_attr(target, name, called)

    interpreter._patch_attr = patch


def keep_types() -> None:
    """There is one type for a scalar and a shape, and it knows the shape of its values."""
    block, value = core.block_type, core.tensor
    make_type, make_value, types, shapes = block.__init__, value.__init__, {}, {}
    to_ir, equal = block.to_ir, core.dtype.__eq__

    def new(cls, element_ty=None, shape=None):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        memory = getattr(element_ty, "address_space", None), getattr(element_ty, "const", None)
        key = element_ty.name, memory, sizes
        if key not in types:
            types[key] = object.__new__(cls)
            make_type(types[key], element_ty, shape)
            types[key].of_others, types[key].sizes = {}, sizes
        return types[key]

    def with_element_ty(self, scalar_ty):
        if scalar_ty.is_ptr():
            return block(scalar_ty, self.shape)
        name = scalar_ty.name
        if name not in self.of_others:
            self.of_others[name] = block(scalar_ty, self.shape)
        return self.of_others[name]

    def init(self, handle, type):
        if "of_values" not in vars(type):
            make_value(self, handle, type)
            shape = shapes.setdefault(getattr(type, "sizes", ()), (self.shape, self.numel))
            type.of_values = *shape, type.scalar
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = type.of_values

    block.__new__, block.__init__ = new, lambda self, element_ty, shape: None
    block.with_element_ty = with_element_ty
    block.to_ir = lambda self, builder: (
        self
        if builder is interpreter.interpreter_builder and not self.element_ty.is_ptr()
        else to_ir(self, builder)
    )
    value.__init__ = init
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    keep_by_name(interpreter, "_get_np_dtype")
    keep_by_name(Semantic, "computation_type_impl")


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


def lean_handles() -> None:
    """Whether an array is wider than its type is asked of two numbers, and each operation makes one handle."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    check, of_two, boolean = handle.__post_init__, builder.binary_op, np.dtype(bool)
    widths, bitwise = {}, {np.bitwise_and, np.bitwise_or, np.bitwise_xor}

    def width(dtype) -> int:
        """The most bytes an element of this type may take."""
        if dtype.name not in widths:
            widths[dtype.name] = 2**30 if dtype.is_ptr() else max(1, dtype.primitive_bitwidth // 8)
        return widths[dtype.name]

    def init(self, data, dtype, attr=None):
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr
        if data.itemsize > width(dtype):
            check(self)

    def binary_op(self, lhs, rhs, op):
        if lhs.data.dtype == boolean and op not in bitwise:
            return of_two(self, lhs, rhs, op)
        output, dtype = op(lhs.data, rhs.data), lhs.dtype.scalar
        if output.itemsize > width(dtype):
            output = output.astype(interpreter._get_np_dtype(dtype))
        return handle(output, dtype)

    handle.__init__, builder.binary_op = init, binary_op


def leave_out_checks() -> None:
    """Values of one shape or type are not stretched or cast; an overflow is looked for where somebody is told."""
    sanitise, broadcast, cast = (
        Semantic.binary_op_sanitize_overflow_impl,
        Semantic.broadcast_impl_value,
        Semantic.cast,
    )
    Semantic.binary_op_sanitize_overflow_impl = lambda self, *arguments: (
        sanitise(self, *arguments) if self.builder.options.debug else None
    )
    Semantic.broadcast_impl_value = lambda self, one, other: (
        (one, other) if one.shape is other.shape else broadcast(self, one, other)
    )
    Semantic.cast = lambda self, one, to, *rest: one if one.dtype is to.scalar else cast(self, one, to, *rest)


class Plans:
    """What methods of the interpreter's semantic come to, by the types of their arguments.

    A call that ended in one function of NumPy over its own arguments, and constants, goes there straight when the same
    types meet again, and leaves the stretching of shapes to NumPy. The first call of a kind is watched for that.
    """

    PRIMITIVES = ("binary_op", "ternary_op", "unary_op", "cast_impl")

    def __init__(self):
        self.calls, self.depth = [], 0
        for name in self.PRIMITIVES:
            setattr(interpreter.InterpreterBuilder, name, self.watched(name))

    def watched(self, name):
        """A primitive of the builder that says what it was called with."""
        primitive = getattr(interpreter.InterpreterBuilder, name)

        @functools.wraps(primitive)
        def call(builder, *arguments):
            if self.depth:
                self.calls.append((primitive, arguments))
            return primitive(builder, *arguments)

        return call

    def plan(self, name) -> None:
        """Let a method of the semantic be learned."""
        method, plans, value = getattr(Semantic, name), {}, core.tensor
        builder, missing = interpreter.interpreter_builder, object()

        @functools.wraps(method)
        def planned(semantic, *arguments):
            if semantic.builder is not builder:
                return method(semantic, *arguments)
            key = []
            for each in arguments:
                if type(each) is value:
                    key += each.type.name, each.handle.dtype.name
                else:
                    key.append(each if each is True else getattr(each, "name", None) or repr(each))
            key = tuple(key)
            known = plans.get(key, missing)
            if known is missing:
                result, plans[key] = self.learn(method, semantic, arguments)
                return result
            if known is None:
                return method(semantic, *arguments)
            primitive, parts, rest, result = known
            handles = [arguments[part].handle if type(part) is int else part for part in parts]
            return value(primitive(builder, *handles, *rest), result)

        setattr(Semantic, name, planned)

    def learn(self, method, semantic, arguments):
        """The result of a call, and its plan: (primitive, places of its operands or constants, the rest, type)."""
        before, self.calls = self.calls, []
        self.depth += 1
        try:
            result = method(semantic, *arguments)
        finally:
            calls, self.calls = self.calls, before
            self.depth -= 1
        if len(calls) != 1 or type(result) is not core.tensor or result.type.scalar.is_ptr():
            return result, None
        primitive, given = calls[0]
        operands = [each for each in given if isinstance(each, interpreter.TensorHandle)]
        numbers = [place for place, each in enumerate(arguments) if type(each) in (int, float, core.tensor)]
        parts = []
        for place, operand in zip(numbers, operands, strict=False):
            parts.append(place if type(arguments[place]) is core.tensor else operand)
            if parts[-1] is place and not stretched(arguments[place].handle, operand):
                return result, None
        if len(parts) != len(operands) or any(
            operand is not each for operand, each in zip(operands, given, strict=False)
        ):
            return result, None
        return result, (primitive, parts, given[len(operands) :], result.type)


def stretched(given, used) -> bool:
    """Whether an operand is an argument, as it was or in another shape."""
    if used is given:
        return True
    same = used.dtype == given.dtype and used.data.dtype == given.data.dtype
    if not same or used.data.shape == given.data.shape:
        return False
    one, other = np.broadcast_arrays(given.data, used.data)
    return one.shape == used.data.shape and one.tobytes() == other.tobytes()


METHODS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "truediv",
    "mod": "mod",
    "and": "and_",
    "or": "or_",
    "xor": "xor_",
    "lt": "less_than",
    "le": "less_equal",
    "gt": "greater_than",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
}


def short_ways() -> None:
    """Methods are learned, and an operator of a kernel goes to its method at once; the compiler's go as they went."""
    plans = Plans()
    for method in (*METHODS.values(), "where", "cast", "minus", "minimum", "maximum"):
        plans.plan(method)
    for operator, method in METHODS.items():
        shorten(
            f"__{operator}__", getattr(Semantic, method), (True,) if method in ("add", "sub", "mul") else ()
        )


def shorten(name, method, checks) -> None:
    """One operator of two values; `checks`: whether it is to look for an overflow."""
    original, value = getattr(core.tensor, name), core.tensor
    semantic = interpreter.interpreter_semantic

    def operator(self, other, _semantic=None):
        if _semantic is not None:
            return original(self, other, _semantic=_semantic)
        if type(other) is core.constexpr:
            other = other.value
        if type(other) in (value, int, float):
            return method(semantic, self, other, *checks)
        return original(self, other, _semantic=semantic)

    setattr(core.tensor, name, operator)


def install() -> None:
    """From here on, in this process; versions of Triton that do it otherwise are left as they are."""
    if os.environ.get("TRITON_INTERPRET") != "1" or getattr(interpreter, "handloom_is_quick", False):
        return
    interpreter.handloom_is_quick = True
    if hasattr(interpreter, "_LangPatchScope"):
        patch_once()
    wanted = {"handle", "shape", "numel", "type", "dtype"}
    one = core.tensor(interpreter.TensorHandle(np.zeros(1, np.float32), core.float32), core.float32)
    if vars(one).keys() == wanted and hasattr(interpreter, "interpreter_semantic"):
        for step in (call_at_once, keep_types, lean_handles, leave_out_checks, short_ways):
            step()
