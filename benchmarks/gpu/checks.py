"""Checks on CUDA: kernel values, bits that equal the CPU's, recorded steps against eager ones, a loop that never waits.

Every check takes a `Scale` and yields one text a failure, None for a case that is well, and `Skipped` where there is
nothing to check.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.scale import EVERYTHING, PROMPTS, Scale
from benchmarks.support.common import ROOT
from benchmarks.support.shapes import build
from handloom import Engine, ModelError, SamplingParams

ROOMS = ("support", "support/models", "support/sampling", "kernels/attention", "kernels/linear")
sys.path += [str(ROOT / "tests" / room) for room in ROOMS]  # whose cases are run here, too

# One set of rules with other values for every row: each set is a kernel of its own, which takes seconds to compile.
ALIKE = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=7, n=2, **EVERYTHING),
    SamplingParams(max_new_tokens=15, **EVERYTHING | {"temperature": 0.0, "logprobs": 2}),
    SamplingParams(max_new_tokens=9, **EVERYTHING | {"top_k": 20, "seed": 4}),
    SamplingParams(max_new_tokens=11, **EVERYTHING | {"temperature": 1.2, "frequency_penalty": 0.5}),
    SamplingParams(max_new_tokens=40, stop_token_ids=tuple(range(40)), **EVERYTHING | {"seed": 6}),
]
FUSED = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "glm4",
    "mixtral",
)
MIXED = [
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=7, seed=2),
    SamplingParams(temperature=1.2, mirostat=2, max_new_tokens=11, seed=5),
    SamplingParams(temperature=1.0, dry_multiplier=0.8, max_new_tokens=9, seed=7),
]


class Skipped(str):
    """Why a check has nothing to check here."""


def kernel_values(scale: Scale) -> Iterator[str | None]:
    """The interpreter's checks, unchanged, on CUDA."""
    import interpreted_kernels

    for name, found in interpreted_kernels.checks(scale.device):
        yield from (f"{name}: {text}" for text in found)
        yield None


def full_size_tokens(scale: Scale) -> Iterator[str | None]:
    """Tokens at full vocabularies equal those of the CPU path, whatever the batch around a row."""
    from sampling_rows import key, rows

    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.sample import sample

    device = scale.device
    for vocab in (32001, 128256, 151936, 262144):
        for name, x in rows(4, vocab):
            settings = {**key(4), "temperature": torch.tensor([0.8, 1.0, 0.0, 1.3])}
            chosen = (
                torch.tensor([50, 0, 0, 0]),
                torch.tensor([0.95, 0.9, 1.0, 1.0]),
                torch.tensor([0.05, 0, 0, 0]),
            )
            for dtype in (torch.float32, torch.bfloat16):
                make = (rules.top_k, rules.top_p, rules.min_p)
                on_cpu = tuple(rule(values) for rule, values in zip(make, chosen, strict=True))
                on_gpu = tuple(rule(values.to(device)) for rule, values in zip(make, chosen, strict=True))
                expected = sample(x.to(dtype), rules=on_cpu, **settings).tokens
                moved = {part: values.to(device) for part, values in settings.items()}
                got = sample(x.to(device, dtype), rules=on_gpu, kernels="triton", **moved).tokens.cpu()
                if not torch.equal(expected, got):
                    yield f"{name} V={vocab} {dtype}: {expected.tolist()} != {got.tolist()}"


def shuffled_rows(scale: Scale) -> Iterator[str | None]:
    """300 rows at once, and in shuffled order, give each row the token it gets alone: races would show here."""
    from sampling_rows import generator, key

    from handloom.kernels.sampling.sample import sample

    device = scale.device
    x = (torch.randn(300, 151936, generator=generator(0)) * 3).to(device, torch.bfloat16)
    settings = {name: value.to(device) for name, value in key(300).items()}
    settings |= {
        "top_k": torch.full((300,), 50, device=device),
        "top_p": torch.full((300,), 0.9, device=device),
    }
    together = sample(x, kernels="triton", **settings).tokens
    for turn in range(20):
        if not torch.equal(sample(x, kernels="triton", **settings).tokens, together):
            yield f"repeat {turn} differs"
    order = torch.randperm(300, generator=generator(1)).to(device)
    shuffled = {name: value[order] for name, value in settings.items()}
    if not torch.equal(sample(x[order], kernels="triton", **shuffled).tokens, together[order]):
        yield "shuffled rows differ"
    for row in range(0, 300, 37):
        alone = {name: value[row : row + 1] for name, value in settings.items()}
        if sample(x[row : row + 1], kernels="triton", **alone).tokens[0] != together[row]:
            yield f"row {row} alone differs"


def graph_replay(scale: Scale) -> Iterator[str | None]:
    """Replays advance the position in device memory, follow parameters changed in place, and allocate nothing."""
    from sampling_rows import generator, key

    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.fused import Plan, sample_fused

    device = scale.device
    x = torch.randn(4, 32000, generator=generator(3)).to(device)
    settings = {name: value.to(device) for name, value in key(4).items()}
    settings |= {"temperature": torch.ones(4, device=device)}
    settings["rules"] = (
        rules.top_k(torch.full((4,), 50.0, device=device)),
        rules.top_p(torch.ones(4, device=device)),
    )
    plan = Plan(x, rules=settings["rules"])
    first = settings["positions"].clone()
    sample_fused(rules.Call(x, **settings), plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_fused(rules.Call(x, **settings), plan=plan)
        settings["positions"] += 1
    settings["positions"].copy_(first)
    held = torch.cuda.memory_allocated()
    for step in range(6):
        if step == 3:
            settings["rules"][0].parameter.fill_(3.0)
            settings["temperature"].fill_(0.5)
        graph.replay()
        eager = sample_fused(rules.Call(x, **{**settings, "positions": first + step})).tokens
        if not torch.equal(captured.tokens, eager):
            yield f"replay {step}: {captured.tokens.tolist()} != {eager.tolist()}"
        del eager
    if torch.cuda.memory_allocated() != held:
        yield "replays allocated memory"


def attention_values(scale: Scale) -> Iterator[str | None]:
    """The attention kernel against an oracle over the rules of attention, as the tests do in the interpreter."""
    from test_attention import DECODE, RAGGED, RULES, VERIFY, Case

    shapes = [{**DECODE, **rule} for rule in RULES.values()] + [{**RAGGED, **RULES["all"]}]
    shapes += [{**VERIFY, **RULES[rule], "tree": True} for rule in ("plain", "all")]
    shapes += [{"dims": (128, 128), "heads": (8, 2), "lengths": (5, 900)}, {"dims": (256, 256), "block": 32}]
    for change in shapes:
        for dtype, splits in ((torch.bfloat16, 4), (torch.float32, 1)):
            case = Case(**change, dtype=dtype)
            try:
                case.check(case.triton(splits=splits))
            except AssertionError as error:
                yield f"{change} {dtype}, {splits} splits: {first_line(error)}"
            yield None


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def nf4_values(scale: Scale) -> Iterator[str | None]:
    """Products with 4-bit weights against the dense product, in bitsandbytes' own layout."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Skipped("bitsandbytes is not installed")
        return
    from test_nf4 import activations, check, quantized

    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        weight, _ = quantized(512, 4096, kind=kind, nested=nested)
        for rows in (1, 2, 16, 40):
            try:
                check(weight, activations(rows, 4096, dtype=torch.bfloat16))
            except AssertionError as error:
                yield f"{kind}, nested {nested}, {rows} rows: {first_line(error)}"
            yield None


def few_row_values(scale: Scale) -> Iterator[str | None]:
    """Products of few rows at real sizes against the reference, and rows that do not touch each other."""
    from test_few_rows import case, check, test_rows_do_not_touch_each_other

    for rows in (1, 2, 5, 8, 16):
        for inputs, sizes, gate in (
            (4096, (4096, 1024, 1024), None),
            (2304, (9216, 9216), "gelu_tanh"),
            (14336, (4096,), None),
        ):
            try:
                check(*case(rows, inputs, sizes, torch.bfloat16), gate=gate)
            except AssertionError as error:
                yield f"{rows} rows, {inputs} -> {sizes}, {gate}: {first_line(error)}"
            yield None
        x, weights = case(rows, 4096, (14336,), torch.bfloat16)
        bytes_, scales = (
            (weights[0].float() * 2000).round().clamp(-127, 127).to(torch.int8),
            torch.rand(14336),
        )
        try:
            check(x, [bytes_], scales=scales.to(scale.device) / 1000)
        except AssertionError as error:
            yield f"{rows} rows of a weight of bytes: {first_line(error)}"
        yield None
    for gate in (None, "silu"):
        try:
            test_rows_do_not_touch_each_other(gate)
        except AssertionError as error:
            yield f"neighbours, {gate}: {first_line(error)}"
        yield None


def fused_layers(scale: Scale) -> Iterator[str | None]:
    """Fused decoder layers against plain ones: logits after ragged prompts, and after steps of 1 to 8 rows."""
    from architectures import ARCHITECTURES

    for name in FUSED if scale.on_cuda else scale.architectures:
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.15)):
            model = ARCHITECTURES[name]().to(scale.device, dtype)
            try:
                sides = [Engine(model, slots=8, fuse=fuse) for fuse in (False, True)]
            except ModelError as error:
                yield f"{name} {dtype}: {error}"
                continue
            left = {layer: reason for layer, reason in sides[1].runner.fused.items() if reason}
            yield f"{name} {dtype}: {left}" if left else None
            for rows in (1, 2, 8):
                prompts = (PROMPTS * 2)[:rows]
                states = [side.prefill(prompts) for side in sides]
                found = [side.step(state, [7] * rows) for side, state in zip(sides, states, strict=True)]
                want, have = (torch.cat([s.logits, f.logits]) for s, f in zip(states, found, strict=True))
                error = float((want - have).abs().mean() / want.std())
                yield f"{name} {dtype}, {rows} rows: {error:.2g} deviations" if not error <= limit else None


def recorded_steps(scale: Scale) -> Iterator[str | None]:
    """Tokens of recorded steps equal those of eager steps on the same device, over architectures."""
    from architectures import ARCHITECTURES

    for name in scale.architectures:
        model = ARCHITECTURES[name]().to(scale.device)
        if type(model)._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # the default reads sizes on the host in float32
        yield from same_tokens(name, model, PROMPTS, ALIKE)


def recorded_rules(scale: Scale) -> Iterator[str | None]:
    """The same for rules with memory, and rows whose rules differ."""
    from architectures import ARCHITECTURES

    yield from same_tokens("llama", ARCHITECTURES["llama"]().to(scale.device), PROMPTS[:3], MIXED)


def same_tokens(name: str, model, prompts, params) -> Iterator[str | None]:
    """Differences between eager and recorded steps; None where a turn shows none."""
    eager = Engine(model, slots=3, graph=False).generate(prompts, params, progress=False)
    yield None
    engine = Engine(model, slots=3, graph=True)
    for turn in range(2):
        for want, have in zip(eager, engine.generate(prompts, params, progress=False), strict=True):
            if (want.token_ids, want.finish_reason) != (have.token_ids, have.finish_reason):
                where = f"{name}, turn {turn}, request {have.request}"
                yield f"{where}: {want.token_ids} {want.finish_reason} != {have.token_ids} {have.finish_reason}"
        yield None
    refused = [batch.programs.refused for batch in engine._batches.values() if batch.programs is not None]
    yield from (f"{name}: a step was not recorded: {why}" for reasons in refused for why in reasons.values())
    engine.pool.check()


def compiled_steps(scale: Scale) -> Iterator[str]:
    """A compiled and recorded step draws what the eager one draws, in float32, and is compiled once a batch size."""
    from architectures import ARCHITECTURES

    model = ARCHITECTURES["llama"]().to(scale.device)
    want = Engine(model, slots=2, graph=False).generate(PROMPTS, ALIKE, progress=False)
    engine = Engine(model, slots=2, graph=scale.on_cuda, compile=True)
    if engine.runner.compiled is None:
        yield "the step was not compiled"
        return
    for turn in range(2):
        for a, b in zip(want, engine.generate(PROMPTS, ALIKE, progress=False), strict=True):
            if a.token_ids != b.token_ids:
                yield f"turn {turn}, request {b.request}: {a.token_ids} != {b.token_ids}"
    if engine.runner.compiled.refused:
        yield engine.runner.compiled.refused


@contextmanager
def waits_are(mode: str, on_cuda: bool):
    """What torch does where the host waits for the device: nothing on a CPU."""
    if not on_cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def silent_steps(scale: Scale) -> Iterator[str]:
    """No host sync in the decode loop: the steps between two admissions run with syncs made errors."""
    engine = Engine(build(scale.small, scale.dtype, scale.device), slots=4, graph=True)
    rows, steps = PROMPTS[:4], 3 * scale.few
    for _ in range(2):  # the second time blocks are reused, which have to be cleared
        events = engine.stream(rows, max_new_tokens=16 + steps, ignore_eos=True, **EVERYTHING)
        for _ in range(4 * 12):  # admission, warm-up and recording
            next(events)
        try:
            with waits_are("error", scale.on_cuda):
                for _ in range(4 * steps):
                    next(events)
        except RuntimeError as error:
            yield f"the decode loop waits for the device: {error}"
        finally:
            events.close()


def tensor_parallel(scale: Scale) -> Iterator[str | None]:
    """Two ranks under NCCL, where there are two devices, draw the tokens that one draws, also on the second device."""
    from helpers import tiny_llama

    if torch.cuda.device_count() < 2:
        yield Skipped(f"{torch.cuda.device_count()} CUDA device here, two are needed")
        return
    model = tiny_llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [
            str(ROOT / "tests" / "support" / "programs" / "ranks.py"),
            folder,
            json.dumps(PROMPTS[:3]),
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            yield f"exit status {done.returncode}: {done.stderr[-600:]}"
            return
        found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]
    for device in ("cuda:0", "cuda:1"):
        engine = Engine(model.to(device), slots=2, max_length=64)
        answers = engine.generate(PROMPTS[:3], max_new_tokens=8, progress=False)
        alone = [answer.token_ids for answer in answers]
        yield from (
            f"rank {rank} and {device} alone differ: {ranks['greedy']} != {alone}"
            for rank, ranks in enumerate(found)
            if ranks["greedy"] != alone
        )
        yield None


ODD_SHAPES = "import benchmarks.gpu.checks as checks; checks.odd_shapes()"


def memory_faults(scale: Scale) -> Iterator[str | None]:
    """compute-sanitizer over the kernels at odd shapes, without the allocator that would hide a stray access."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", os.defpath), f"{home}/bin", f"{home}/compute-sanitizer"]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if tool is None:
        yield Skipped(f"compute-sanitizer is neither on PATH nor in {home}")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", ODD_SHAPES]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        faults = [line for line in done.stdout.splitlines() if "=====" in line or "Error" in line]
        yield "\n".join(faults[:12]) or done.stderr[-600:]
    yield None


def odd_shapes(device: str = "cuda") -> None:
    """Run the sampler where rows end in the middle of everything, and attention over ragged rows."""
    from sampling_rows import generator, key

    from handloom.kernels.attention.attention import paged_attention
    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.fused import Plan, sample_fused

    for batch, vocab, dtype in (
        (1, 128256, torch.bfloat16),
        (3, 50257, torch.float32),
        (2, 333, torch.bfloat16),
    ):
        x = torch.randn(batch, vocab, generator=generator(vocab)).to(device, dtype)
        settings = {name: value.to(device) for name, value in key(batch).items()}
        chosen = (
            rules.top_k(torch.full((batch,), 50.0, device=device)),
            rules.top_p(torch.full((batch,), 0.9, device=device)),
        )
        for several in ((), chosen[1:], chosen):
            plan = Plan(x, rules=several, logprobs=True)
            for _ in range(2):
                sample_fused(rules.Call(x, logprobs=True, **settings | {"rules": plan.rules}), plan=plan)
    keys, values = (torch.randn(9, 16, 2, 64, device=device).bfloat16() for _ in range(2))
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([61, 17], dtype=torch.int32, device=device)
    q = torch.randn(2, 1, 8, 64, device=device).bfloat16()
    paged_attention(q, keys, values, table, lengths, kernels="triton")
    torch.cuda.synchronize()
