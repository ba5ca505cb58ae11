"""Every strategy on one model and set of prompts: tokens a second, passes and rows a token, acceptance, peak memory;
beside transformers where it has the mode, or where its version 4.49, the last to hold them, had it.

On a CPU seconds are those of the processor, by all threads, so that other work on the machine counts for neither side.

Run from the repository root: `python -m benchmarks.strategies --help`.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.support.common import RESULTS, ROOT, record, show
from benchmarks.support.peak import Peak
from handloom import Engine, strategies
from handloom.loading import demo

PROMPTS = (
    "The capital of France is", "Once upon a time, in a village", "The best way to learn is", "2, 3, 5, 7, 11,",
    "My favourite food is", "In the year 2000", "The sky is", "Dear sir or madam,",
)  # fmt: skip
WARM = {"temperature": 1.0, "seed": 1}
# name -> options of the strategy
GREEDY = {
    "contrastive_search": {"k": 4, "alpha": 0.6},
    "adaptive_contrastive_search": {},
    "frustratingly_simple": {},
    "classifier_free_guidance": {"guidance_scale": 1.5},
    "context_aware": {"questions": list(PROMPTS)},
    "dola": {"layers": "low", "rule": "code"},
    "scored": {"scorer": lambda texts: [0.0] * len(texts), "k": 10},
    "beam_search": {"num_beams": 4},
    "diverse_beam_search": {"num_beams": 4, "num_beam_groups": 2},
    "constrained_beam_search": {"num_beams": 4, "constraints": [[400]]},
    "speculative": {"num_draft": 4},
    "chain_of_thought": {"k": 4},
    "lookahead": {"heuristic": lambda texts: [0.0] * len(texts), "k": 3, "depth": 2},
    "tree_search": {"value": lambda texts: [0.0] * len(texts), "simulations": 4, "k": 4},
}
SAMPLED = {
    "stochastic_beam": {"k": 4},
    "arithmetic_sampling": {"n": 4},
    "best_of_n": {"n": 4},
    "bayes_risk": {"n": 4},
    "self_consistency": {"n": 4, "answer": lambda generation: generation.n_new},
    "deep_confidence": {"n": 4, "answer": lambda generation: generation.n_new},
    "smc": {"n": 4, "alpha": 2.0},
    "power_smc": {"n": 4},
    "grammar_aligned": {"allowed": lambda text: torch.arange(100, 200), "iterations": 2},
    "power_sampling": {"blocks": 2, "moves": 2},
    "weighted_rejection": {"n": 4, "allowed": lambda text, token: True},
    "antislop": {"phrases": [" the"]},
    "soft_thinking": {"top_k": 15},
    "mixture_of_inputs": {},
    "exponential_watermark": {},
    "cautious": {},
}
# what needs a second model: name -> the strategy, and its options from a model of the first half of the layers
TWO = {
    "contrastive_decoding": ("contrastive_decoding", lambda half: {"amateur": half}),
    "experts": ("experts", lambda half: {"anti_expert": half, "alpha": 0.1}),
    "ensemble": ("ensemble", lambda half: {"others": [half]}),
    "speculative, half model": ("speculative", lambda half: {"draft": half, "num_draft": 4}),
    "speculative, as a block": ("speculative", lambda half: {"draft": half, "num_draft": 4, "rule": "block"}),
    "speculative, two drafts": (
        "speculative",
        lambda half: {"draft": [half, strategies.prompt_lookup], "num_draft": 4},
    ),
    "speculative, tree": ("speculative", lambda half: {"draft": half, "num_draft": (3, 2, 1)}),
}
# name -> fields of transformers' config for the same mode: of the project's version, and of 4.49
THEIRS = {
    "generate": {},
    "beam_search": {"num_beams": 4},
    "classifier_free_guidance": {"guidance_scale": 1.5},
    "speculative": {"prompt_lookup_num_tokens": 4},
}
OLDER = {
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low", "repetition_penalty": 1.0},
    "diverse_beam_search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained_beam_search": {"num_beams": 4, "force_words_ids": [[400]]},
}
COLUMNS = {
    "strategy": "strategy",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "passes_per_token": "passes a token",
    "rows_per_token": "rows a token",
    "acceptance": "accepted",
    "peak_mib": "peak MiB",
    "transformers": "transformers",
    "transformers_tokens_per_second": "its tokens/s",
    "transformers_passes_per_token": "its passes",
    "times_transformers": "times",
}
ALONE = {"speculative"}  # modes that transformers runs one prompt at a time


@dataclass
class Passes:
    """Forward passes of a model, and the rows that they had."""

    count: int = 0
    rows: int = 0
    handle: object = field(default=None, repr=False)

    def watch(self, model) -> None:
        """Count from now on."""

        def note(_, args, kwargs):
            given = kwargs.get("input_ids", args[0] if args else None)
            self.count += 1
            self.rows += (kwargs["inputs_embeds"] if given is None else given).shape[0]

        self.handle = model.register_forward_pre_hook(note, with_kwargs=True)


def clock(device: torch.device) -> float:
    """Seconds: of the processor where it computes, else of the wall behind all that was launched."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(model, run: Callable[[], list], repeats: int = 2) -> dict:
    """Tokens a second of the best of some runs; passes, rows and memory of one before them, which counts.

    run: decodes and returns the results, each with `n_new`.
    """
    passes = Passes()
    passes.watch(model)  # a hook may keep a step from being recorded, so this run is not timed
    with Peak(model.device) as peak:
        results = run()
    passes.handle.remove()
    tokens = sum(result.n_new for result in results)
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = clock(model.device)
        run()
        seconds.append(clock(model.device) - start)
    found = {
        "tokens": tokens,
        "tokens_per_second": round(tokens / min(seconds), 2),
        "passes_per_token": round(passes.count / max(1, tokens), 3),
        "rows_per_token": round(passes.rows / max(1, tokens), 2),
        "peak_mib": round(peak.added / 2**20, 1),
    }
    if drafted := sum(getattr(result, "drafted", 0) for result in results):
        found["acceptance"] = round(sum(result.accepted for result in results) / drafted, 3)
    return found


def ours(engine: Engine, name: str, options: dict, count: int) -> Callable[[], list]:
    """A run that returns its results."""
    strategy = Engine.generate if name == "generate" else getattr(strategies, name)
    return lambda: strategy(engine, list(PROMPTS), max_new_tokens=count, ignore_eos=True, **options)


@dataclass
class Row:
    """A row of transformers' output."""

    n_new: int


def theirs(model, prompts: list[list[int]], alone: bool, fields: dict, count: int) -> Callable[[], list]:
    """The same mode by transformers, padded on the left, or one prompt after the other."""
    batches = [[p] for p in prompts] if alone else [prompts]
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}

    def run() -> list:
        found = []
        for batch in batches:
            size = max(map(len, batch))
            ids = torch.tensor([[0] * (size - len(p)) + p for p in batch], device=model.device)
            mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in batch], device=model.device)
            rows = model.generate(ids, attention_mask=mask, **options, **fields)
            found += [Row(row.shape[0] - size) for row in rows]
        return found

    return run


def older(folder: Path, model: str, prompts: list[list[int]], fields: dict, count: int, threads: int) -> dict:
    """The same in a process that sees the transformers 4.49 of a folder."""
    task = {"model": model, "prompts": prompts, "fields": fields, "count": count, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.strategies.older"], input=json.dumps(task), text=True, check=True,
        stdout=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo model.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="These strategies alone.")] = None,
    transformers_449: Annotated[
        Path | None,
        typer.Option("--transformers-449", help="Folder in which transformers 4.49 is installed."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; default: its own choice.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs, the best of which counts.")] = 2,
    keep: Annotated[
        bool, typer.Option(help="Append the rows to benchmarks/results/strategies.jsonl.")
    ] = False,
) -> None:
    """Measure each strategy on eight prompts at once."""
    if threads:
        torch.set_num_threads(threads)
    where = demo.locate(model)
    engine = Engine.from_pretrained(where, slots=8, layout="plain")
    half = strategies.early_exit(engine, engine.config.num_hidden_layers // 2)
    rows = []
    for name, (strategy, options) in cases(half).items():
        if only and name not in only:
            continue
        row = {"strategy": name, **measured(engine.model, ours(engine, strategy, options, tokens), repeats)}
        prompts = [engine.encode(text) for text in PROMPTS]
        other = None
        if name in THEIRS:
            run = theirs(engine.model, prompts, name in ALONE, THEIRS[name], tokens)
            other = {"transformers": version("transformers"), **measured(engine.model, run, repeats)}
        elif name in OLDER and transformers_449:
            other = older(transformers_449, where, prompts, OLDER[name], tokens, torch.get_num_threads())
        if other:
            row["transformers"] = other["transformers"]
            row["transformers_tokens_per_second"] = other["tokens_per_second"]
            if "passes_per_token" in other:  # the exact count, which holds on any device
                row["transformers_passes_per_token"] = other["passes_per_token"]
            row["times_transformers"] = round(row["tokens_per_second"] / other["tokens_per_second"], 2)
        rows.append(row)
        show("strategies, eight prompts at once", COLUMNS, rows[-1:])
        if keep:
            record(rows[-1:], RESULTS / "strategies.jsonl")
    show("strategies, eight prompts at once", COLUMNS, rows)


def cases(half: Engine) -> dict[str, tuple[str, dict]]:
    """What is measured: name -> the strategy, and its options."""
    found = {name: (name, options) for name, options in {"generate": {}, **GREEDY}.items()}
    found |= {name: (name, WARM | options) for name, options in SAMPLED.items()}
    return found | {name: (strategy, options(half)) for name, (strategy, options) in TWO.items()}


if __name__ == "__main__":
    typer.run(main)
