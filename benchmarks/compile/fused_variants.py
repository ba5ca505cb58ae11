"""The kernels of fused layers and of a step's ends as real models launch them, for the offline compile."""

import triton

from benchmarks.compile.attention_variants import Build, report
from handloom.kernels import append_triton, penalties_triton
from handloom.kernels.layer import gated_triton, norm_triton, rope_triton
from handloom.kernels.linear import few_rows_triton


def builds(target=None):
    """Every build of the kernels between and in the products of few rows, and around the layers; names are unique."""
    yield from (_product(*row) for row in PRODUCTS)
    yield from (_norm(*row) for row in NORMS)
    yield from (_rotation(*row) for row in ROTATIONS)
    yield from (_look_up(*row) for row in LOOK_UPS)
    for name, dtype in (("silu", "bf16"), ("gelu_tanh", "bf16"), ("gelu", "fp16")):
        kernel, constants = gated_triton._gated_kernel, {"NAME": name, "BLOCK": gated_triton.BLOCK}
        yield _build(f"gated {name} {dtype}", kernel, constants, dtype, 4, 3, (48, 64))
    yield _append("append", (48, 24))
    yield _penalties("penalties", (64, 40))


# name, rows, outputs of each weight, inputs, gate, biases, residual, dtype; most registers and vgprs; bytes
PRODUCTS = [
    ("8B qkv, one row", 1, (4096, 1024, 1024), 4096, None, False, False, "bf16", (80, 96)),
    ("8B o, one row", 1, (4096,), 4096, None, False, True, "bf16", (72, 88)),
    ("8B gate and up, one row", 1, (14336, 14336), 4096, "silu", False, False, "bf16", (176, 152)),
    ("8B down, one row", 1, (4096,), 14336, None, False, True, "bf16", (72, 184)),
    ("1B qkv, one row", 1, (2048, 512, 512), 2048, None, False, False, "bf16", (72, 96)),
    ("1B gate and up, one row", 1, (8192, 8192), 2048, "silu", False, False, "bf16", (128, 96)),
    ("7B qkv with biases, one row", 1, (3584, 512, 512), 3584, None, True, False, "bf16", (80, 104)),
    ("2B gate and up, one row", 1, (9216, 9216), 2304, "gelu_tanh", False, False, "bf16", (128, 104)),
    ("8B o, one row, fp16", 1, (4096,), 4096, None, False, True, "fp16", (72, 88)),
    ("8B qkv, few rows", 8, (4096, 1024, 1024), 4096, None, False, False, "bf16", (104, 288)),
    ("8B o, few rows", 8, (4096,), 4096, None, False, True, "bf16", (104, 416)),
    ("8B gate and up, few rows", 8, (14336, 14336), 4096, "silu", False, False, "bf16", (144, 256)),
    ("7B qkv with biases, few rows", 8, (3584, 512, 512), 3584, None, True, False, "bf16", (112, 296)),
    ("8B up in bytes, one row", 1, (14336,), 4096, None, False, False, "bf16", (80, 64), True),
    ("8B up in bytes, few rows", 8, (14336,), 4096, None, False, False, "bf16", (72, 288), True),
    ("8B up in bytes, few rows, fp16", 8, (14336,), 4096, None, False, False, "fp16", (72, 256), True),
]
# name, size, residual, kinds of the norm and of the one before the sum; most registers and vgprs
NORMS = [
    ("norm 4096", 4096, False, "w", "-", (40, 48)),
    ("residual and norm 4096", 4096, True, "w", "-", (40, 56)),
    ("norm, residual, norm 2304", 2304, True, "w", "w", (64, 64)),
    ("layer norm 8192", 8192, True, "cwb", "-", (88, 96)),
    ("norm 16384", 16384, True, "w", "-", (72, 96)),
]
# name, tokens, dim, rotated, interleaved, norms of heads; most registers and vgprs
ROTATIONS = [
    ("rotate 128, one token", 1, 128, 128, False, 0, (40, 48)),
    ("rotate 128 normed, one token", 1, 128, 128, False, 2, (48, 56)),
    ("rotate 64 interleaved, one token", 1, 64, 64, True, 0, (40, 48)),
    ("rotate half of 128, many tokens", 512, 128, 64, False, 0, (48, 64)),
    ("rotate 256 normed, many tokens", 512, 256, 256, False, 2, (96, 96)),
]
# name, width of the angles; most registers and vgprs
LOOK_UPS = [("angles looked up, 128", 128, (24, 16)), ("angles looked up, 96", 96, (24, 16))]


def _product(name, rows, sizes, inputs, gate, biases, residual, dtype, limits, narrow=False):
    config = few_rows_triton.config_for(rows, len(sizes), sizes[0], inputs, gate, narrow)
    kernel = few_rows_triton._vector_kernel if rows == 1 else few_rows_triton._rows_kernel
    constants = {
        "INPUTS": inputs,
        "WEIGHTS": len(sizes),
        "GATE": gate or "",
        "SCALES": narrow,
        "RESIDUAL": residual,
        "SCALE": False,
    }
    constants |= {f"BIAS{i}": biases and i < len(sizes) for i in range(3)}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "STAGES": config.stages, "ROWS": 8}
    absent = {
        f"{kind}{i}_ptr" for kind in "wb" for i in range(3) if i >= len(sizes) or (kind == "b" and not biases)
    }
    absent |= set() if residual else {"residual_ptr"}
    absent |= set() if narrow else {"scales_ptr"}
    types = {"scales_ptr": "*fp32"} | ({"w0_ptr": "*i8"} if narrow else {})
    return _build(name, kernel, constants, dtype, config.num_warps, 3, limits, absent, **types)


def _norm(name, size, residual, norm, post, limits):
    kernel = norm_triton._add_norm_kernel
    constants = {
        "SIZE": size,
        "RESIDUAL": residual,
        "SCALE": False,
        "NORM": norm,
        "OFFSET": 0.0,
        "POST": post,
    }
    constants |= {"POST_OFFSET": 0.0, "BLOCK": 1 << (size - 1).bit_length()}
    absent = {"post_bias_ptr"} | ({"post_weight_ptr"} if post == "-" else set())
    absent |= set() if "b" in norm else {"bias_ptr"}
    absent |= set() if residual else {"residual_ptr", "sum_ptr"}
    return _build(name, kernel, constants, "bf16", norm_triton.num_warps(size), 3, limits, absent)


def _rotation(name, tokens, dim, rotated, interleaved, norms, limits):
    blocks, warps = rope_triton.tiles(tokens, 8, dim, rotated, dim)
    constants = {
        "DIM": dim,
        "DIM_V": dim,
        "ROTATED": rotated,
        "ONCE": False,
        "INTERLEAVED": interleaved,
        **blocks,
    }
    constants |= {"Q_NORM": norms, "K_NORM": norms, "Q_OFFSET": 0.0, "K_OFFSET": 0.0}
    absent = set() if norms else {"q_weight_ptr", "k_weight_ptr"}
    wide = tokens > 16 and not interleaved  # a lane of one token has too few numbers for 16 bytes
    return _build(name, rope_triton._rotate_kernel, constants, "bf16", warps, 3, limits, absent, wide)


def _look_up(name, width, limits):
    constants = {"SIZE": 2 * width, "BLOCK": triton.next_power_of_2(2 * width)}
    return _build(name, rope_triton._look_up_kernel, constants, "bf16", 1, 3, limits)


def _append(name, limits):
    floats, ints = ("raw", "processed", "top_logprobs"), ("top", "stop_count")
    kernel, types = append_triton.append_kernel, {"results": "*fp64", "table": "*i32"}
    types |= dict.fromkeys(floats, "*fp32")
    types = {
        n: types.get(n, "i32" if n in ints or n.endswith("_stride") else "*i64") for n in kernel.arg_names
    }
    return _plain(name, kernel, types, {"BLOCK_SIZE": 16}, 1, limits)


def _penalties(name, limits):
    kernel, numbers = penalties_triton.penalties_kernel, ("vocab", "capacity", "words", "which")
    types = dict.fromkeys(("first", "ids_out", "touched"), "*i32") | dict.fromkeys(numbers, "i32")
    for n in kernel.arg_names:
        if n in ("logits", "values_out") or n.endswith("_strength"):
            types[n] = "*fp32"
        elif "_skip_" in n:
            types[n] = "*i1"
        types.setdefault(n, "i32" if n.endswith("_stride") else "*i64")
    return _plain(name, kernel, types, {"BLOCK": penalties_triton.BLOCK}, 8, limits)


def _plain(name, kernel, types, constants, warps, limits):
    """A kernel that takes rows of any place and width, so nothing is known of its arguments."""
    types = {n: kind for n, kind in types.items() if n not in constants}
    return Build(name, kernel, types, constants, frozenset(), warps, 3, *limits, wide_loads=False)


def _build(name, kernel, constants, dtype, warps, stages, limits, absent=(), wide=True, **special):
    constants = {
        n: v for n, v in {**constants, "PDL": False, "UPCAST": False}.items() if n in kernel.arg_names
    }
    constants |= dict.fromkeys(absent)
    types = {n: f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")} | {
        "cells_ptr": "*i64",
        "positions_ptr": "*i64",
    }
    types |= dict.fromkeys(("eps", "post_eps", "q_eps", "k_eps", "scale"), "fp32") | special
    types = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    aligned = frozenset(n for n, kind in types.items() if kind != "fp32") - {"rows", "last"}
    return Build(name, kernel, types, constants, aligned, warps, stages, *limits, wide_loads=wide)


if __name__ == "__main__":
    report(builds)
