"""Timings of the engine at real shapes: steps, first tokens, ragged requests, contexts, and where a step's time goes.

Every function takes a `Scale` and yields rows.
"""

import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.decode import speed
from benchmarks.decode.rivals import COMPILED, side
from benchmarks.decode.sides import Sampling, twin
from benchmarks.decode.speed import Case, Subject
from benchmarks.gpu.checks import waits_are
from benchmarks.gpu.gpt_fast import GptFast
from benchmarks.gpu.scale import EVERYTHING, PROMPTS, Scale
from benchmarks.support.bandwidth import read_bandwidth
from benchmarks.support.shapes import build, config_of, sizes
from handloom import Engine
from handloom.kernels.launching import early

CHAIN = Sampling(temperature=0.8, top_k=50, top_p=0.95)


def waits_of_replacement(scale: Scale) -> Iterator[dict]:
    """How often the host waits for the device in a run in which every slot is taken over twice: a figure, no check."""
    engine = Engine(build(scale.small, scale.dtype, scale.device), slots=4, graph=True)
    prompts = [[*p, n] for n in range(2) for p in PROMPTS]

    def run():
        engine.generate(
            prompts, max_new_tokens=scale.few, ignore_eos=True, progress=False, temperature=1.0, seed=0
        )

    run()
    with warnings.catch_warnings(record=True) as heard, waits_are("warn", scale.on_cuda):
        warnings.simplefilter("always")
        run()
    waits = sum("synchroniz" in str(w.message).lower() for w in heard)
    yield {"figure": "waits an admission", "value": waits / len(prompts), "requests": len(prompts)}


# -- timings: each yields rows


@contextmanager
def subject(scale: Scale, name: str):
    """A model with random weights, on the device while the block runs."""
    model = build(name, scale.dtype, scale.device)
    try:
        yield Subject(name, model, sizes(config_of(name), scale.dtype))
    finally:
        del model
        gc.collect()
        if scale.on_cuda:
            torch.cuda.empty_cache()


def row_of(
    scale: Scale,
    about: Subject,
    case: Case,
    name: str,
    repeats: int = 1,
    sampling=None,
    counted: bool = False,
    make: Callable = side,
) -> dict:
    """One side on one case, made by `make`; what it cannot do says why in `skipped`."""
    row = {
        "benchmark": "decode/ragged" if case.requests else "decode/speed",
        "case": case.name,
        **about.about(),
    }
    row |= {"batch": case.batch, "context": case.context, "new_tokens": case.new, "side": name}
    row |= {} if sampling is None else {"mode": "sampling"}
    started, made = time.monotonic(), None
    try:
        made = make(name, about.model, case.batch, case.context + case.new)
        made.timeline(case.workload(about, -1), sampling)
        row["first_run_s"] = time.monotonic() - started
        with scale.alone():
            lines = [made.timeline(case.workload(about, turn), sampling) for turn in range(1, repeats + 1)]
            reads = bandwidth(about.model.device.type)
        row |= speed.summary(lines)
        row |= speed.share(row["tpot_p50_ms"], about.sized, case, reads)
        row |= speed.calls(about, case, made) if counted else {}
    except speed.FAILURES as error:
        row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    finally:
        if made is not None:
            made.close()
        if name in (*COMPILED, GptFast.name):
            torch.compiler.reset()
    return row


_measured: dict[str, float] = {}


def bandwidth(device: str) -> float:
    """Bytes a second that the device reads, measured once a run; to be called while others are kept off it."""
    if device not in _measured:
        _measured[device] = read_bandwidth(device)
    return _measured[device]


def gaps(engine: Engine, prompts, new: int, **params) -> float:
    """Median time between two tokens of a request, in milliseconds."""
    moments: dict[int, list[float]] = {}
    for event in engine.stream(prompts, max_new_tokens=new, ignore_eos=True, **params):
        if event.finish == "error":
            raise RuntimeError(event.generation.error)
        moments.setdefault(event.request, []).append(time.perf_counter())
    return 1e3 * float(np.median(np.concatenate([np.diff(m) for m in moments.values()])))


def overhead(scale: Scale, about: Subject, batch: int) -> dict:
    """What everything switched on adds to the greedy step of one engine, in turns."""
    engine = Engine(twin(about.model), slots=batch)
    prompts = [[(7 * i + 13 * b) % 500 + 3 for i in range(scale.prompt)] for b in range(batch)]
    times: dict[str, list[float]] = {"greedy": [], "everything": []}
    modes = {"greedy": {}, "everything": EVERYTHING}
    for params in modes.values():  # records the steps
        gaps(engine, prompts, scale.new, **params)
    with scale.alone():
        for _ in range(3):
            for mode, params in modes.items():
                times[mode].append(gaps(engine, prompts, scale.new, **params))
    added = statistics.median(b / a - 1 for a, b in zip(times["greedy"], times["everything"], strict=True))
    return {
        "figure": f"everything on, {about.name}, batch {batch}", "model": about.name, "batch": batch,
        "greedy_ms": min(times["greedy"]), "everything_ms": min(times["everything"]), "value": added,
    }  # fmt: skip


def steps(scale: Scale, name: str) -> Iterator[dict]:
    """One row: this engine, plain and sampling, and where its time goes."""
    with subject(scale, name) as about:
        case = Case(1, scale.prompt, scale.new)
        yield row_of(scale, about, case, "handloom", repeats=2, counted=name == scale.small)
        yield overhead(scale, about, 1)
        yield state_steps(scale, about)
        yield from profile(scale, about)
        yield row_of(scale, about, case, "handloom", sampling=CHAIN)


def rivals(scale: Scale, name: str) -> Iterator[dict]:
    """One row by others: `generate`, the hand-written loop, this engine compiled, `generate` compiled."""
    with subject(scale, name) as about:
        short, slow = Case(1, scale.prompt, scale.new), Case(1, scale.prompt, scale.few)
        yield row_of(scale, about, slow, "generate")
        yield row_of(scale, about, slow, "loop")
        yield row_of(scale, about, slow, "generate", sampling=CHAIN)
        yield row_of(scale, about, short, "handloom compile", repeats=2)
        yield row_of(scale, about, short, "generate static+compile", repeats=2)


def state_steps(scale: Scale, about: Subject) -> dict:
    """`engine.step` of a State over the loop's own step, both greedy, one row.

    Once with its logits read behind every step, as some strategies do, and once (`ahead_ms`) with nothing read: then
    the host is a step ahead of the device, as in the loop.
    """
    engine = Engine(twin(about.model), slots=1)
    prompt = [[(7 * i) % 500 + 3 for i in range(scale.prompt)]]

    def walk(read: bool) -> float:
        state, moments = engine.prefill(prompt), []
        for _ in range(scale.new):
            state = engine.step(state, state.logits.argmax(-1))
            if read:
                state.logits[0, 0].item()
            moments.append(time.perf_counter())
        return 1e3 * float(np.median(np.diff(moments)))

    walk(True), gaps(engine, prompt, scale.new)
    with scale.alone():
        state, ahead, loop = walk(True), walk(False), gaps(engine, prompt, scale.new)
    return {
        "figure": f"step of a State over the loop's, {about.name}", "model": about.name, "batch": 1,
        "greedy_ms": loop, "state_ms": state, "ahead_ms": ahead, "value": state / loop,
    }  # fmt: skip


def dependent_launches(scale: Scale) -> Iterator[dict]:
    """The greedy step of one row with kernels that wait for the launch before them, over that with early starts."""
    for name in (scale.small, scale.large):
        with subject(scale, name) as about:
            prompt = [[(7 * i) % 500 + 3 for i in range(scale.prompt)]]
            engines = {on: Engine(twin(about.model), slots=1) for on in (True, False)}

            def walk(on, engines=engines, prompt=prompt):
                with early(on):
                    return gaps(engines[on], prompt, scale.new)

            for on in engines:  # records the steps
                walk(on)
            with scale.alone():
                times = [[walk(on) for on in engines] for _ in range(5)]
            yield {
                "figure": f"step without early starts over with them, {name}", "model": name, "batch": 1,
                "greedy_ms": min(t for t, _ in times), "waiting_ms": min(t for _, t in times),
                "value": statistics.median(b / a for a, b in times),
            }  # fmt: skip


def gpt_fast(scale: Scale) -> Iterator[dict]:
    """The large model's step by gpt-fast, where its checkout is given."""
    with subject(scale, scale.large) as about:
        case = Case(1, scale.prompt, scale.new)
        made = functools.partial(GptFast.of, scale.peers)
        yield row_of(scale, about, case, GptFast.name, repeats=2, make=made)


def profile(scale: Scale, about: Subject, most: int = 24) -> Iterator[dict]:
    """The kernels of a greedy step, by time: how often each runs and how long, in microseconds a step."""
    if not scale.on_cuda:
        return
    engine, skip, counted = Engine(twin(about.model), slots=1), 32, 16
    prompt = [[(7 * i) % 500 + 3 for i in range(scale.prompt)]]
    gaps(engine, prompt, skip + counted)
    events = engine.stream(prompt, max_new_tokens=skip + 2 * counted, ignore_eos=True)
    for _ in range(skip):
        next(events)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with scale.alone(), torch.profiler.profile(activities=kinds) as heard:
        for _ in range(counted):
            next(events)
        torch.cuda.synchronize()
    events.close()
    found = [each for each in heard.key_averages() if each.self_device_time_total > 0]
    found.sort(key=lambda each: -each.self_device_time_total)
    total = {"us": sum(e.self_device_time_total for e in found), "calls": sum(e.count for e in found)}
    rows = [("all kernels", total["calls"], total["us"])]
    rows += [(each.key[:120], each.count, each.self_device_time_total) for each in found[:most]]
    for kernel, calls, us in rows:
        yield {
            "benchmark": "gpu/profile", "model": about.name, "batch": 1, "kernel": kernel,
            "calls_per_step": round(calls / counted, 2), "us_per_step": round(us / counted, 2),
        }  # fmt: skip


def first_tokens(scale: Scale) -> Iterator[dict]:
    """Time to the first token of one prompt, after warm-up."""
    with subject(scale, scale.large) as about:
        for name in ("handloom", "generate"):
            yield row_of(scale, about, Case(1, scale.prompt, 4), name, repeats=9)


def small_steps(scale: Scale) -> Iterator[dict]:
    """The small model."""
    yield from steps(scale, scale.small)


def large_steps(scale: Scale) -> Iterator[dict]:
    """The large model."""
    yield from steps(scale, scale.large)


def small_rivals(scale: Scale) -> Iterator[dict]:
    """Others and compiled sides on the small model."""
    yield from rivals(scale, scale.small)


def large_rivals(scale: Scale) -> Iterator[dict]:
    """Others and compiled sides on the large model."""
    yield from rivals(scale, scale.large)


def many_rows(scale: Scale) -> Iterator[dict]:
    """Ragged requests that replace each other in a large batch, and what everything switched on adds to its step."""
    with subject(scale, scale.small) as about:
        yield row_of(scale, about, ragged(scale), "handloom", repeats=2)
        yield overhead(scale, about, scale.rows)


def many_rows_rivals(scale: Scale) -> Iterator[dict]:
    """The same requests by transformers' continuous batching, and a batch of `generate`."""
    with subject(scale, scale.small) as about:
        yield row_of(scale, about, ragged(scale), "generate_batch")
        yield row_of(scale, about, Case(scale.rows, scale.prompt, scale.few), "generate")


def ragged(scale: Scale) -> Case:
    """Prompts of a quarter to four times `prompt`, answers of an eighth of `new` to all of it."""
    return Case(scale.rows, 4 * scale.prompt, scale.new, requests=scale.requests)


def contexts(scale: Scale) -> Iterator[dict]:
    """Time per token over the length of the context."""
    with subject(scale, scale.large) as about:
        for context in scale.contexts:
            yield row_of(scale, about, Case(1, context, scale.few), "handloom")


def four_bits(scale: Scale) -> Iterator[dict]:
    """Steps of the small model in its own dtype, in bitsandbytes' nf4, and in nf4 with our product."""
    variants: dict[str, Callable] = {"dense": lambda m: m, "nf4": quantised, "nf4-triton": with_our_products}
    for name, change in variants.items():
        with subject(scale, scale.small) as about:
            engine_of = change(about.model)
            for batch in scale.quantised:
                engine = Engine(engine_of, slots=batch)
                prompts = [[(7 * i + b) % 500 + 3 for i in range(scale.prompt)] for b in range(batch)]
                gaps(engine, prompts, scale.few)
                with scale.alone():
                    taken = gaps(engine, prompts, scale.few)
                yield {
                    "figure": f"{name}, batch {batch}", "model": about.name, "batch": batch, "weights": name,
                    "value": taken, "recorded": sum(
                        len(b.programs or ()) for b in engine._batches.values()),
                }  # fmt: skip


def quantised(model):
    """The model's linear layers but the output in bitsandbytes' nf4."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
            shape = layer.in_features, layer.out_features
            made = bitsandbytes.nn.Linear4bit(
                *shape, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
            made.load_state_dict({"weight": layer.weight.cpu()})
            model.set_submodule(name, made.to(layer.weight.device).eval())
    model.is_quantized = True
    return model


def with_our_products(model):
    """The same with our product."""
    from handloom.loading.fourbit import own_products

    own_products(quantised(model))
    return model
