"""Decoding on a CPU: every dtype, packing and compilation against `model.generate`, and llama.cpp where there is one.

Run from the repository root: `python -m benchmarks.cpu --help`.
"""

import json
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cpu.llama import llama_cpp
from benchmarks.cpu.quiet import Neighbours
from benchmarks.support.common import RESULTS, in_turn, median_ratio, record, show
from handloom import Engine, SamplingParams

# Name of a side -> how handloom loads it; the first one is what the others are compared with in quality.
OURS = {
    "float32": {"dtype": "float32"},
    "plain": {"dtype": "float32", "layout": "plain"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8-cpu": {"quantization": "int8-cpu"},
    "int4-cpu": {"quantization": "int4-cpu"},
}
THEIRS = ("float32", "bfloat16")
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
WINDOW = 512  # tokens of the text that are scored together
Measure = Callable[[int, bool], float]  # rows, whether to sample -> tokens per second

COLUMNS = {
    "case": "case",
    "side": "side",
    "best": "tokens/s, best",
    "median": "median",
    "cpu_ms": "CPU ms/token",
    "others": "cores that others took",
    "over_float32": "x generate float32",
    "over_same_dtype": "x generate, same dtype",
    "over_llama_cpp": "x llama.cpp",
    "perplexity": "perplexity",
}


def prompt_of(tokenizer) -> list[int]:
    """A prompt of one short sentence, in tokens."""
    return tokenizer("The history of the printing press begins in", add_special_tokens=False)["input_ids"]


def handloom(engine: Engine, prompt: list[int], steps: int) -> Measure:
    """This engine; every row has a seed of its own."""

    def measure(rows: int, sample: bool) -> float:
        common = {"max_new_tokens": steps, "ignore_eos": True, **(SAMPLING if sample else {})}
        params = [SamplingParams(seed=i, **common) for i in range(rows)]
        start = time.perf_counter()
        answers = engine.generate([prompt] * rows, params, progress=False)
        return sum(len(a.token_ids) for a in answers) / (time.perf_counter() - start)

    return measure


def generate(model, prompt: list[int], steps: int) -> Measure:
    """`model.generate` of transformers with its default cache."""

    @torch.no_grad()
    def measure(rows: int, sample: bool) -> float:
        ids = torch.tensor([prompt] * rows)
        chosen = {"do_sample": True, **SAMPLING} if sample else {"do_sample": False}
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=steps,
            max_new_tokens=steps,
            pad_token_id=0,
            **chosen,
        )
        return rows * (made.shape[1] - len(prompt)) / (time.perf_counter() - start)

    return measure


@torch.no_grad()
def perplexity(model, tokenizer, tokens: int) -> float:
    """Of the language reference that every Python carries (`pydoc_data.topics`), in windows of 512 tokens."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text[: 8 * tokens], add_special_tokens=False)["input_ids"][:tokens]
    total = count = 0
    for window in torch.tensor(ids).split(WINDOW):
        logp = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        total -= float(logp.gather(-1, window[1:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)


def build(folder: str, names: list[str], steps: int, compiled: list[str]) -> tuple[dict[str, Measure], dict]:
    """Sides by name, and the models whose quality is worth a number."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, sides, models = prompt_of(tokenizer), {}, {}
    for name in names:
        engine = Engine.from_pretrained(folder, device="cpu", slots=8, **OURS[name])
        sides[f"handloom {name}"], models[f"handloom {name}"] = handloom(engine, prompt, steps), engine.model
        if name in compiled:
            step = Engine(engine.model, engine.tokenizer, slots=8, compile=True)
            sides[f"handloom {name} compiled"] = handloom(step, prompt, steps)
    for name in THEIRS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
        model.generation_config.eos_token_id = None
        sides[f"generate {name}"] = generate(model, prompt, steps)
    return sides, models


def timed(
    measure: Measure, rows: int, sample: bool, spent: list[float], neighbours: Neighbours
) -> Callable[[int], float]:
    """One side in one case; the processor time a token goes to `spent` (a loaded machine disturbs it less)."""

    def once(turn: int) -> float:
        neighbours.wait()
        begun, before, start = neighbours.start(), time.process_time(), time.perf_counter()
        rate = measure(rows, sample)
        neighbours.stop(begun)
        tokens = rate * (time.perf_counter() - start)
        spent.append(1e3 * (time.process_time() - before) / tokens)
        return rate

    return once


def compare(sides: dict[str, Measure], repeats: int, rows: int, sample: bool, patience: float) -> list[dict]:
    """All sides in turn; ratios are medians over the rounds, in which every side has run once."""
    spent = {name: [] for name in sides}
    neighbours = {name: Neighbours(patience) for name in sides}
    found = in_turn({n: timed(m, rows, sample, spent[n], neighbours[n]) for n, m in sides.items()}, repeats)
    case = f"batch {rows}, {'sampling' if sample else 'greedy'}"
    table = []
    for name, rates in found.items():
        row = {"benchmark": "cpu", "case": case, "side": name, "repeats": repeats, "best": max(rates)}
        row |= {"median": statistics.median(rates), "cpu_ms": min(spent[name])}
        seen = neighbours[name].seen[-repeats:]  # the rounds that count; those before warm up
        row["others"] = statistics.median(seen) if seen else None
        row["over_float32"] = median_ratio(rates, found["generate float32"])
        dtype = name.split()[1].replace("plain", "float32") if name.startswith("handloom") else ""
        if f"generate {dtype}" in found:
            row["over_same_dtype"] = median_ratio(rates, found[f"generate {dtype}"])
        if "llama.cpp" in found:
            row["over_llama_cpp"] = median_ratio(rates, found["llama.cpp"])
        table.append(row)
    return table


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub name")] = "demo",
    sides: Annotated[str, typer.Option(help="handloom's sides, by commas")] = ",".join(OURS),
    compiled: Annotated[str, typer.Option(help="which of them to measure compiled too, by commas")] = "",
    gguf: Annotated[Path | None, typer.Option(help="the same model for llama.cpp (needs xllamacpp)")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=2, help="new tokens of every answer")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="rounds in which all sides run in turn")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="rows of the sampling case")] = 8,
    patience: Annotated[
        float, typer.Option(min=0, help="seconds to wait before each measurement for other processes to rest")
    ] = 0.0,
    quality: Annotated[int, typer.Option(help="tokens of text for the perplexity; 0 leaves it out")] = 2048,
    output: Annotated[Path, typer.Option(help="rows are appended here")] = RESULTS / "cpu.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines in place of a table")] = False,
) -> None:
    """Measure decoding on this CPU, all sides in one run; the same prompt and answer length for all of them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    names, chosen = [n for n in sides.split(",") if n], [n for n in compiled.split(",") if n]
    unknown = sorted({*names, *chosen} - set(OURS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: sides are {', '.join(OURS)}")
    if model == "demo":
        from handloom.loading import demo

        model = demo.locate()
    built, models = build(model, names, steps, chosen)
    tokenizer = AutoTokenizer.from_pretrained(model)
    scores = {n: perplexity(m, tokenizer, quality) for n, m in models.items()} if quality else {}
    single = dict(built)
    if gguf is not None:
        single["llama.cpp"] = llama_cpp(gguf, prompt_of(tokenizer), steps, threads)
    table = compare(single, repeats, 1, False, patience) + compare(built, repeats, rows, True, patience)
    about = {"model": Path(model).name, "steps": steps}
    table = [row | about | {"perplexity": scores.get(row["side"])} for row in table]
    table = record(table, output)
    if as_json:
        for row in table:
            print(json.dumps(row))
    else:
        show("cpu", COLUMNS, table)


if __name__ == "__main__":
    typer.run(main)
