"""The 4-bit kernels as real models launch them, for the offline compile of `attention_variants.py`."""

from benchmarks.compile.attention_variants import Build, report
from handloom.kernels.linear import nf4_triton


def builds(target):
    """Every 4-bit build for a target, the names unique; AMD has no byte permutations of ours."""
    rows = [
        ("nf4 one row", 1, "bf16", False, 64, 128, 144),
        ("nf4 one row, double", 1, "bf16", True, 64, 128, 160),
        ("nf4 one row, fp16, blocks of 128", 1, "fp16", False, 128, 128, 144),
        ("nf4", 16, "bf16", False, 64, 96, 128),
        ("nf4, double", 16, "bf16", True, 64, 128, 128),
        ("nf4, fp16, blocks of 128", 16, "fp16", False, 128, 128, 192),
        ("nf4 from a table, fp32", 16, "fp32", False, 64, 168, 256),
        ("nf4 32 rows", 32, "bf16", False, 64, 128, 160),
    ]
    return [*(_product(target, *row) for row in rows), _add(4)]


def _product(target, name, rows, dtype, double, blocksize, registers, vgprs):
    types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | {"words_ptr": "*i32", "parts_ptr": "*fp32"}
    types |= {"code_ptr": "*fp32", "planes_ptr": "*i32", "absmax_ptr": "*u8" if double else "*fp32"}
    types |= {"outputs": "i32"} if rows == 1 else dict.fromkeys(("outputs", "x_row", "rows"), "i32")
    if double:
        types |= dict.fromkeys(("nested_code_ptr", "nested_absmax_ptr", "offset_ptr"), "*fp32")
    constants = {"INPUTS": 4096, "BLOCKSIZE": blocksize, "NESTED": 256 if double else 0, "BIAS": False}
    constants |= {"UPCAST": False, "PERMUTE": dtype != "fp32" and target.startswith("sm_")}
    if rows == 1:
        kernel, (sizes, warps) = nf4_triton._vector_kernel, nf4_triton.vector_sizes(14336, 4096)
    else:
        kernel, (sizes, warps) = nf4_triton._tile_kernel, nf4_triton.tile_sizes(rows, 14336, 4096, blocksize)
        constants["HALF"] = int(dtype == "fp16")
    constants |= sizes
    absent = set(kernel.arg_names) - constants.keys() - types.keys() - {"PDL"}
    constants |= dict.fromkeys(absent)
    aligned = frozenset(types) - {"rows", "offset_ptr"}
    return Build(name, kernel, types, constants, aligned, warps, 3, registers, vgprs)


def _add(splits):
    types = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32", "outputs": "i32"}
    constants = {"SPLITS": splits, "BIAS": False, "UPCAST": False, "BLOCK_N": 512, "bias_ptr": None}
    kernel, aligned = nf4_triton._add_kernel, frozenset(types) - {"rows"}
    return Build(f"nf4 add {splits}", kernel, types, constants, aligned, 4, 3, 48, 48)


if __name__ == "__main__":
    report(builds)
