"""Compile every Triton kernel variant for every target, without a GPU, and hold it against limits.json.

    python -m benchmarks.compile                  # all targets, two at a time, one process each
    python -m benchmarks.compile --target sm_90
    python -m benchmarks.compile --write          # take what was measured as the new limits

Prints one table; the exit status is 1 when a limit is broken. Checked: no spills, registers, shared memory,
128-bit loads, and no contracted multiply-add where bits are promised to be the same everywhere. The builds of
attention, of the 4-bit product and of fused layers bring their limits along (`..._variants`). Seconds are
of processor time, compilers included; kernels that Triton has in its cache take none.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.compile import sampling_variants

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
ROOT = Path(__file__).resolve().parents[2]
LIMITS = Path(__file__).with_name("limits.json")
COLUMNS = (
    "registers",
    "spills",
    "shared",
    "wide_loads",
    "contractions",
    "barriers",
    "path",
    "a_logit",
    "seconds",
)

ALIGNED = ("logits", "stride", "vocab", "token_ids", "noise")


def compile_case(name, kernel, types, named, target):
    """Compile one variant; returns its figures. named: constants and launch options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {key: value for key, value in named.items() if key in names}
    options = {key: value for key, value in named.items() if key not in names}
    signature = {key: "constexpr" if key in constants else types[key] for key in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(names) if key in ALIGNED}
    values = {(names.index(key),): value for key, value in constants.items()}
    started = processor_seconds()
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"enable_fp_fusion": False, **options}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    figures = {"shared": compiled.metadata.shared, "seconds": round(processor_seconds() - started, 1)}
    if "amdgcn" in compiled.asm:
        return figures | _amd(compiled.asm["amdgcn"])
    code, found = _nvidia(compiled.asm, target)
    return figures | found | sampling_variants.counted(name, code, named)


def _nvidia(assembly, target):
    """The text of the machine code, and registers, spills and instruction counts from it."""
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(get_ptxas(TARGETS[target][1]).path).parent
    tools = tools if (tools / "nvdisasm").exists() else Path(get_ptxas(90).path).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    return code, {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)) + len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": len(re.findall(r"LDG\.E\.128", code)),
        "contractions": len(re.findall(r"\bFFMA", code)),
    }


def _amd(code):
    """The same from the assembly text of gfx942."""

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill to vector registers, not to memory
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "contractions": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f32", code)),
    }


def _output(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def processor_seconds():
    """Processor time of this process and of the finished ones that it started."""
    return sum(os.times()[:4])


def compile_target(target):
    """All figures of one target, in this process: {case: figures}."""
    found = {case[0]: compile_case(*case, target) for case in sampling_variants.cases(target)}
    return found | compile_builds(target)


def compile_builds(target):
    """The same of the builds that have limits of their own; `over` says which of them are broken."""
    from benchmarks.compile import attention_variants, fused_variants, nf4_variants

    found = {}
    named = [(f"attention {build.name}", build) for build in attention_variants.builds()]
    named += [(build.name, build) for build in (*nf4_variants.builds(target), *fused_variants.builds(target))]
    for name, build in named:
        started = processor_seconds()
        row = attention_variants.measure(build, target)
        figures = {name: row[name] for name in ("registers", "spills", "shared")}
        figures |= {"wide_loads": row.get("wide", "-"), "over": attention_variants.excess(build, row)}
        found[name] = figures | {"seconds": round(processor_seconds() - started, 1)}
    return found


def in_subprocess(target):
    """`compile_target` in a process of its own: a compiler may exit instead of raising."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--target", target, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        return {"compiler": {"error": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}}
    return json.loads(done.stdout)


def breaches(figures, limit):
    """What of a case is over its limit: a list of words."""
    if "error" in figures:
        return [str(figures["error"])]
    if "over" in figures:
        return figures["over"]
    if limit is None:
        return ["no limit recorded: run with --write"]
    over = [
        f"{name} > {limit[name]}" for name in ("registers", "spills", "shared") if figures[name] > limit[name]
    ]
    if figures["wide_loads"] < limit["wide_loads"]:
        over.append(f"wide_loads < {limit['wide_loads']}")
    over += [
        f"{name} > {limit[name]}"
        for name in ("path", "a_logit")
        if figures.get(name, 0) > limit.get(name, 1e9)
    ]
    if limit["contractions"] is not None and figures["contractions"] > limit["contractions"]:
        over.append(f"contractions > {limit['contractions']}")
    return over


def as_limit(case, figures):
    """The limit that measured figures give: registers and shared memory with a little head room."""
    return {
        "registers": figures["registers"] + 8,
        "spills": 0,
        "shared": figures["shared"] + 1024,
        "wide_loads": figures["wide_loads"],
        "contractions": 0 if case == "noise" else None,
        **{name: figures[name] for name in ("path", "a_logit") if name in figures},
    }


def main():
    """Compile, print the table, and return 1 if a limit is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument(
        "--json", action="store_true", help="compile in this process and print figures as JSON"
    )
    parser.add_argument("--write", action="store_true", help="record what is measured as the new limits")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(compile_target(options.target)))
        return 0
    targets = [options.target] if options.target else list(TARGETS)
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(targets, pool.map(in_subprocess, targets), strict=True))
    import triton

    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"cases": {}}
    if options.write:
        for target, cases in found.items():
            own = {case: figures for case, figures in cases.items() if "over" not in figures}
            limits["cases"][target] = {case: as_limit(case, figures) for case, figures in own.items()}
        limits["triton"] = triton.__version__
        LIMITS.write_text(json.dumps(limits, indent=1) + "\n")
    print(f"triton {triton.__version__}; limits recorded with {limits.get('triton')}")
    print(f"{'target':8}{'case':32}" + "".join(f"{name:>13}" for name in COLUMNS))
    broken = 0
    for target, cases in found.items():
        for case, figures in cases.items():
            over = breaches(figures, limits["cases"].get(target, {}).get(case))
            broken += bool(over)
            row = "".join(f"{figures.get(name, '-'):>13}" for name in COLUMNS)
            print(f"{target:8}{case:32}{row}  {'; '.join(over)}".rstrip())
    for setting, kernels in sampling_variants.sharing().items():
        print(f"{setting:40}{', '.join(kernels)}")
    print(f"{broken} broken" if broken else "all within limits")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
