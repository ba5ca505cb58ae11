"""The attention kernels as real models launch them, compiled offline and held to limits; needs no GPU."""

import functools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from handloom.kernels.attention import attention_triton, packed_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16, FP32 = torch.bfloat16, torch.float32
# The limits are those of Triton 3.9; 3.6, which torch 2.11 brings, takes up to 34 registers more, and spills nothing.
OLDER = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 34


@dataclass(frozen=True)
class Build:
    """One kernel specialisation and its limits.

    Attributes:
        types: Triton type of each argument that is not a constexpr. aligned: those divisible by 16.
        registers: most registers a thread on any NVIDIA target; vgprs: on gfx942. Spills are never allowed.
        wide_loads: whether cells must be fetched 16 bytes at a time.
    """

    name: str
    kernel: object
    types: dict
    constexprs: dict
    aligned: frozenset
    num_warps: int
    num_stages: int
    registers: int
    vgprs: int
    wide_loads: bool = True


def builds():
    """Every attention build, the names unique."""
    shape = {"group": 4, "dim": 128, "dim_v": 128, "block_size": 16, "split": True, "queries": 1}
    tree = {"counts": True, "tree": True}
    gemma = {"group": 2, "dim": 256, "dim_v": 256, "window": 4096, "softcap": True}
    gpt_oss = {"group": 8, "dim": 64, "dim_v": 64, "window": 128, "sinks": True}
    multi_head = {"group": 1, "dim": 64, "dim_v": 64}
    rows = [
        ("llama-8b", BF16, {}, 160, 224),
        ("llama-8b, one piece", BF16, {"split": False}, 160, 224),
        ("llama-8b, fp16", torch.float16, {}, 160, 224),
        ("llama-8b, fp32", FP32, {}, 80, 184),
        ("multi-head 64", BF16, multi_head, 72, 136),
        ("multi-query 64", BF16, {**multi_head, "group": 64}, 152, 160),
        ("head size 80", BF16, {"group": 1, "dim": 80, "dim_v": 80, "block_size": 32}, 160, 224),
        ("head size 96", BF16, {"group": 1, "dim": 96, "dim_v": 96}, 160, 224),
        ("head size 112", BF16, {"dim": 112, "dim_v": 112, "block_size": 64}, 160, 224),
        ("gemma-2", BF16, gemma, 160, 240),
        ("gemma-2, fp32", FP32, gemma, 88, 160),
        ("gpt-oss", BF16, gpt_oss, 72, 136),
        ("verify 8", BF16, {"queries": 8, "counts": True}, 152, 288),
        ("verify 8, fp32", FP32, {"queries": 8, "counts": True}, 88, 120),
        ("tree 32", BF16, {"queries": 32, **tree}, 184, 208),
        ("tree 16, gemma-2", BF16, {**gemma, **tree, "queries": 16}, 176, 256),
        ("tree 16, gemma-2, fp32", FP32, {**gemma, **tree, "queries": 16}, 152, 240),
    ]
    found = [_decode(name, dtype, {**shape, **change}, *limits) for name, dtype, change, *limits in rows]
    packed = {"rows": 64, "group": 4, "dim": 128, "dim_v": 128, "block_size": 16}
    rows = [
        ("packed llama-8b", BF16, {}, 255, 512),
        ("packed llama-8b, fp32", FP32, {}, 255, 512),
        ("packed multi-head 64", BF16, multi_head, 255, 512),
        ("packed head size 96", BF16, {"group": 1, "dim": 96, "dim_v": 96}, 255, 512),
        ("packed gemma-2", BF16, gemma, 255, 512),
        ("packed gemma-2, whole", BF16, {**gemma, "window": 0}, 255, 512),
        ("packed gemma-2, fp32", FP32, gemma, 255, 512),
        ("packed gpt-oss", BF16, gpt_oss, 255, 512),
    ]
    found += [_packed(name, dtype, {**packed, **change}, *limits) for name, dtype, change, *limits in rows]
    return [*found, *(_merge(splits) for splits in (16, 64))]


def _decode(name, dtype, shape, registers, vgprs):
    variant, kernel = attention_triton.variant(dtype, **shape), attention_triton._decode_kernel
    return _attention(name, kernel, variant, dtype, registers, vgprs)


def _packed(name, dtype, shape, registers, vgprs):
    variant, kernel = packed_triton.variant(dtype, **shape), packed_triton._packed_kernel
    return _attention(name, kernel, variant, dtype, registers, vgprs)


def _attention(name, kernel, variant, dtype, registers, vgprs):
    element, constexprs = TYPES[dtype], dict(variant.constexprs)
    types = {"scale": "fp32", "softcap": "fp32", "tree_ptr": "*u8"}
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "sinks_ptr"), f"*{element}")
    types |= dict.fromkeys(("parts_ptr", "lse_ptr"), "*fp32")
    integers = ("table_ptr", "lengths_ptr", "counts_ptr", "depth_ptr", "starts_ptr")
    types |= dict.fromkeys(integers, "*i32")
    flags = {"counts_ptr": "COUNTS", "sinks_ptr": "SINKS", "tree_ptr": "TREE"}
    names = kernel.arg_names
    constexprs |= {
        pointer: None for pointer, flag in flags.items() if pointer in names and not constexprs[flag]
    }
    if "depth_ptr" in names and not (constexprs["TREE"] and constexprs["WINDOW"] > 0):
        constexprs["depth_ptr"] = None
    free = [n for n in names if n not in constexprs and n != "PDL"]
    types = {n: types.get(n, "i32") for n in free}
    aligned = frozenset(free) - {"scale", "softcap", "kv_heads", "table_stride", "rows", "splits"}
    sizes = (variant.num_warps, variant.num_stages)
    return Build(name, kernel, types, constexprs, aligned, *sizes, registers, vgprs)


def _merge(splits):
    types = {
        "parts_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "sinks_ptr": "*bf16",
        "out_ptr": "*bf16",
        "heads": "i32",
        "splits": "i32",
    }
    constexprs = {"DIM_V": 128, "SINKS": True, "UPCAST": False, "BLOCK_V": 128}
    constexprs["BLOCK_S"] = splits
    kernel, aligned = attention_triton._merge_kernel, frozenset(types) - {"heads", "splits"}
    return Build(
        f"merge {splits}", kernel, types, constexprs, aligned, 4, 3, 104, 120, wide_loads=splits > 16
    )


def measure(build, target):
    """Compile one build for a target of `TARGETS`: registers, spill bytes, shared memory, 16-byte loads.

    Needs no GPU, but a process in which TRITON_INTERPRET is not set.
    """
    names, constexprs = build.kernel.arg_names, dict(build.constexprs)
    if "PDL" in names:  # set where the target has it, as `launching.beside` does
        constexprs["PDL"] = target in ("sm_90", "sm_100")
    source = ASTSource(
        fn=build.kernel,
        signature={n: build.types.get(n, "constexpr") for n in names},
        constexprs=constexprs,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in build.aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if target.startswith("gfx"):
        options["num_stages"] = min(build.num_stages, attention_triton.AMD_STAGES)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    row = {"name": build.name, "target": target, "shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        find = functools.partial(_number, text=text)
        return row | {
            "registers": find(r"\.vgpr_count:\s+(\d+)"),
            "spills": find(r"\.vgpr_spill_count:\s+(\d+)"),
        }
    return row | _nvidia(compiled.asm["ptx"], TARGETS[target].arch)


def _nvidia(ptx, arch):
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        gpu = re.search(r"\.target (sm_\w+)", ptx).group(1)
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={gpu}"]  # as triton calls it
        command = [get_ptxas(arch).path, *flags, str(path), "-o", str(Path(folder, "kernel.cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spills": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "wide": len(re.findall(r"cp\.async\.cg|ld\.global[\w.:]*\.v4", ptx)),
    }


def _number(pattern, text):
    return int(re.search(pattern, text).group(1))


def excess(build, row):
    """What a measured build does against its limits, in words; [] where it keeps them."""
    amd = row["target"].startswith("gfx")
    limit = (build.vgprs if amd else build.registers) + OLDER
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} bytes of spills")
    if row["registers"] > limit:
        found.append(f"{row['registers']} registers, limit {limit}")
    if not amd and build.wide_loads and not row["wide"]:
        found.append("no 16-byte loads")
    return [f"{build.name} on {row['target']}: {text}" for text in found]


def report(builds_on):
    """Print the builds of every target (or of those on the command line); exit 1 where a limit is broken."""
    wrong = []
    for target in sys.argv[1:] or TARGETS:
        for build in builds_on(target):
            row = measure(build, target)
            wrong += excess(build, row)
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    print("\n".join(wrong))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    report(lambda target: builds())
