"""The 4-bit kernels as real models launch them, for the offline compile of `attention_variants.py`."""

from benchmarks.compile.attention_variants import Build, report
from handloom.kernels.linear import nf4_triton


def builds():
    """Every 4-bit build, the names unique."""
    rows = [
        ("nf4 vector", 1, "bf16", False, 64, 136, 96),
        ("nf4 vector, double", 1, "bf16", True, 64, 136, 96),
        ("nf4 vector, fp16, blocks of 128", 1, "fp16", False, 128, 136, 96),
        ("nf4 16 rows", 16, "bf16", False, 64, 88, 104),
        ("nf4 16 rows, double", 16, "bf16", True, 64, 104, 104),
        ("nf4 32 rows", 32, "bf16", False, 64, 168, 288),
    ]
    return [_build(*row) for row in rows]


def _build(name, rows, dtype, double, blocksize, registers, vgprs):
    one = rows <= nf4_triton.GEMV_ROWS
    kernel = nf4_triton._gemv_kernel if one else nf4_triton._gemm_kernel
    types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(("outputs", "x_row"), "i32")
    types |= {"packed_ptr": "*u8", "code_ptr": "*fp32", "absmax_ptr": "*u8" if double else "*fp32"}
    if double:
        types |= dict.fromkeys(("nested_code_ptr", "nested_absmax_ptr", "offset_ptr"), "*fp32")
    if not one:
        types["rows"] = "i32"
    constants = {"INPUTS": 4096, "BLOCKSIZE": blocksize, "NESTED": 256 if double else 0, "BIAS": False}
    constants |= {"UPCAST": False, **nf4_triton.sizes(rows, blocksize)}
    constants |= {n: None for n in kernel.arg_names if n not in constants and n not in types}
    aligned = frozenset(types) - {"rows", "offset_ptr"}
    return Build(name, kernel, types, constants, aligned, 4, 3, registers, vgprs)


if __name__ == "__main__":
    report(builds())
