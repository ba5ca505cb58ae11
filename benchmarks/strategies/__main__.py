"""Every strategy on one model and set of prompts: tokens a second, passes and rows a token, peak memory; beside
transformers where it has the mode.

Run from the repository root: `python -m benchmarks.strategies --help`.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer

from benchmarks.support.common import RESULTS, record, show
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
    "dola": {"layers": "low"},
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
    "power_sampling": {"blocks": 2, "moves": 2},
    "soft_thinking": {"top_k": 15},
    "mixture_of_inputs": {},
    "exponential_watermark": {},
    "cautious": {},
}
# name -> fields of transformers' config for the same mode, where transformers of the project has it
THEIRS = {
    "generate": {},
    "beam_search": {"num_beams": 4},
    "classifier_free_guidance": {"guidance_scale": 1.5},
    "speculative": {"prompt_lookup_num_tokens": 4},
}
COLUMNS = {
    "strategy": "strategy",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "passes_per_token": "passes a token",
    "rows_per_token": "rows a token",
    "peak_gib": "peak GiB",
    "transformers_tokens_per_second": "transformers tokens/s",
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


def measured(model, run: Callable[[], int]) -> dict:
    """Tokens a second of the better of two runs, and passes and rows a token of a third, which is counted."""
    seconds, tokens = [], 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        gc.collect()
        start = time.perf_counter()
        tokens = run()
        seconds.append(time.perf_counter() - start)
    found = {"tokens": tokens, "tokens_per_second": round(tokens / min(seconds), 1)}
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    passes = Passes()
    passes.watch(model)  # a hook may keep a step from being recorded, so this run is not timed
    run()
    passes.handle.remove()
    return found | {
        "passes_per_token": round(passes.count / max(1, tokens), 3),
        "rows_per_token": round(passes.rows / max(1, tokens), 2),
    }


def ours(engine: Engine, name: str, options: dict, count: int) -> Callable[[], int]:
    """A run that returns how many tokens its results have."""
    strategy = Engine.generate if name == "generate" else getattr(strategies, name)

    def run() -> int:
        results = strategy(engine, list(PROMPTS), max_new_tokens=count, ignore_eos=True, **options)
        return sum(result.n_new for result in results)

    return run


def theirs(engine: Engine, name: str, count: int) -> Callable[[], int]:
    """The same mode by transformers, padded on the left, or one prompt after the other."""
    prompts = [engine.encode(text) for text in PROMPTS]
    width = max(map(len, prompts))
    batches = [[p] for p in prompts] if name in ALONE else [prompts]
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}

    def run() -> int:
        tokens = 0
        for batch in batches:
            size = max(map(len, batch)) if len(batch) == 1 else width
            ids = torch.tensor([[0] * (size - len(p)) + p for p in batch], device=engine.device)
            mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in batch], device=engine.device)
            found = engine.model.generate(ids, attention_mask=mask, **options, **THEIRS[name])
            tokens += len(batch) * (found.shape[1] - size)
        return tokens

    return run


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the demo model.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="These strategies alone.")] = None,
    keep: Annotated[
        bool, typer.Option(help="Append the rows to benchmarks/results/strategies.jsonl.")
    ] = False,
) -> None:
    """Measure each strategy on eight prompts at once."""
    engine = Engine.from_pretrained(demo.locate(model), slots=8)
    chosen = {"generate": {}, **GREEDY, **{name: WARM | options for name, options in SAMPLED.items()}}
    rows = []
    for name, options in chosen.items():
        if only and name not in only:
            continue
        row = {"strategy": name, **measured(engine.model, ours(engine, name, options, tokens))}
        if name in THEIRS:
            other = measured(engine.model, theirs(engine, name, tokens))
            row["transformers_tokens_per_second"] = other["tokens_per_second"]
            row["times_transformers"] = round(row["tokens_per_second"] / other["tokens_per_second"], 2)
        rows.append(row)
    show("strategies, eight prompts at once", COLUMNS, rows)
    if keep:
        record(rows, RESULTS / "strategies.jsonl")


if __name__ == "__main__":
    typer.run(main)
