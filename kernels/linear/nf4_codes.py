"""Device functions that turn words of eight 4-bit codes into values; importing this file needs triton.

On NVIDIA the 16 values lie in eight registers and are picked by byte permutations: no load, no shared memory, two
permutations a weight. Elsewhere, and for float32 activations, each is a load from the table.
"""

import triton
import triton.language as tl

# Nibbles 2j + 1, 2j of a word are its codes 2j, 2j + 1: bitsandbytes puts the first of a byte into the high half.
_SELECTORS = """{
.reg .b32 s, m, a, b, h, l, p, q;
.reg .b16 x, y;
and.b32 s, $8, 0x77777777;
shr.b32 m, $8, 1;
and.b32 m, m, 0x44444444;
or.b32 m, m, 0x32103210;
"""
# High and low bytes of four values: of the codes below 8, of those above, the right ones of both; then woven.
_FOUR = """prmt.b32 a, $9, $10, s;
prmt.b32 b, $11, $12, s;
prmt.b32 h, a, b, m;
prmt.b32 a, $13, $14, s;
prmt.b32 b, $15, $16, s;
prmt.b32 l, a, b, m;
prmt.b32 p, l, h, 0x4051;
prmt.b32 q, l, h, 0x6273;
"""
_UPPER = "shr.u32 s, s, 16;\nshr.u32 m, m, 16;\n"
# What becomes of two woven values: two 16-bit ones, or float32 from float16, which no integer unit has to do.
_SIXTEEN = "mov.b32 {{${0}, ${1}}}, {2};\n"
_FLOAT = "mov.b32 {{x, y}}, {2};\ncvt.f32.f16 ${0}, x;\ncvt.f32.f16 ${1}, y;\n"


def _ptx(pair):
    first, second = (pair.format(j, j + 1, "p") + pair.format(j + 2, j + 3, "q") for j in (0, 4))
    return _SELECTORS + _FOUR + first + _UPPER + _FOUR + second + "}"


# From a word ($8) and eight registers of `code_planes` ($9 to $16) to its eight values ($0 to $7).
PTX = {"values": _ptx(_SIXTEEN), "floats": _ptx(_FLOAT)}


_VALUES, _FLOATS = tl.constexpr(PTX["values"]), tl.constexpr(PTX["floats"])
_SHORTS = tl.constexpr(",".join(["=&h"] * 8 + ["r"] * 9))
_SINGLES = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 9))
# A word that the compiler knows to be common to all threads would be copied anew for every permutation: add lane / 32.
_OWN = tl.constexpr("{\n.reg .b32 t;\nmov.u32 t, %laneid;\nshr.u32 t, t, 5;\nadd.u32 $0, $1, t;\n}")


@triton.jit
def _own(ptr):
    """The word at ptr, in a register of each thread's own."""
    return tl.inline_asm_elementwise(_OWN, "=r,r", [tl.load(ptr)], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def planes(planes_ptr, PERMUTE: tl.constexpr, HALF: tl.constexpr):
    """The eight registers that `values` and `floats` need; HALF: float16 ones."""
    if PERMUTE:
        at = planes_ptr + 8 * HALF
        return (
            _own(at), _own(at + 1), _own(at + 2), _own(at + 3),
            _own(at + 4), _own(at + 5), _own(at + 6), _own(at + 7),
        )  # fmt: skip
    else:
        return 0, 0, 0, 0, 0, 0, 0, 0


@triton.jit
def table(words, code_ptr):
    """Eight float32 values a word, each loaded."""
    return (
        tl.load(code_ptr + ((words >> 4) & 15)), tl.load(code_ptr + (words & 15)),
        tl.load(code_ptr + ((words >> 12) & 15)), tl.load(code_ptr + ((words >> 8) & 15)),
        tl.load(code_ptr + ((words >> 20) & 15)), tl.load(code_ptr + ((words >> 16) & 15)),
        tl.load(code_ptr + ((words >> 28) & 15)), tl.load(code_ptr + ((words >> 24) & 15)),
    )  # fmt: skip


@triton.jit
def values(words, code_ptr, h0, h1, h2, h3, l0, l1, l2, l3, DTYPE: tl.constexpr, PERMUTE: tl.constexpr):
    """The values of words int32 [N, W], as [N, 8 W] in the order of the inputs, in DTYPE."""
    if PERMUTE:
        b0, b1, b2, b3, b4, b5, b6, b7 = tl.inline_asm_elementwise(
            _VALUES, _SHORTS, [words, h0, h1, h2, h3, l0, l1, l2, l3], is_pure=True, pack=1,
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        )  # fmt: skip
    else:
        b0, b1, b2, b3, b4, b5, b6, b7 = table(words, code_ptr)
    even, odd = tl.join(tl.join(b0, b4), tl.join(b2, b6)), tl.join(tl.join(b1, b5), tl.join(b3, b7))
    found = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))
    if PERMUTE:
        return found.to(DTYPE, bitcast=True)
    else:
        return found.to(DTYPE)


@triton.jit
def floats(words, code_ptr, h0, h1, h2, h3, l0, l1, l2, l3, PERMUTE: tl.constexpr):
    """Eight float32 tensors of the shape of words: the values of its codes (as float16 `planes` have them)."""
    if PERMUTE:
        return tl.inline_asm_elementwise(
            _FLOATS, _SINGLES, [words, h0, h1, h2, h3, l0, l1, l2, l3], is_pure=True, pack=1,
            dtype=(
                tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32
            ),
        )  # fmt: skip
    else:
        return table(words, code_ptr)


@triton.jit
def eighths(x_ptr, at, kept, WORDS: tl.constexpr):
    """8 * WORDS numbers at x_ptr + at as eight float32 tensors [WORDS]: the first of every eight, the second ..."""
    x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (WORDS, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7
