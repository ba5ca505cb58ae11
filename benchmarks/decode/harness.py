"""lm-evaluation-harness on an Engine against its own `hf` model: multiple choice, ragged generation, repeated prompts.

Run from the repository root: `python -m benchmarks.decode.harness [model folder]`. Rows of `decode/harness`: seconds
of the clock and of the processor, forward passes, and tokens that went through them, padding and idle slots included.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.decode.counting import fed
from benchmarks.support.common import RESULTS, in_turn, median_ratio, record, show
from handloom.experiments.lm_eval.model import HandloomLM
from handloom.loading import demo

COLUMNS = {
    "case": "case",
    "handloom_s": "handloom s",
    "hf_s": "hf s",
    "ratio": "ratio",
    "cpu_ratio": "of processor time",
    "handloom_tokens": "tokens",
    "hf_tokens": "hf tokens",
    "equal": "equal answers",
}
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
NAMES = ["Ann", "Ben", "Carla", "David", "Eva", "Frank", "Gina", "Hugo", "Ida", "Jan"]
THINGS = ["apples", "books", "coins", "pencils", "stamps", "cards", "shells", "marbles"]
FACTS = (0, 1, 1, 2, 3, 5, 9, 14)  # sentences of a question between its first and its last
ENDS = {"until": ["Question:", "\n\n"], "max_gen_toks": 128}
Case = tuple[str, list[Instance]]


def request(method: str, *arguments) -> Instance:
    """What the harness asks a model."""
    return Instance(request_type=method, doc={}, arguments=arguments, idx=0)


def words(rng: random.Random, count: int) -> str:
    """So many words of text that no two prompts share."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def question(rng: random.Random, facts: int) -> tuple[str, str]:
    """A problem in words and its worked answer, in the manner of GSM8K."""
    name, thing, n = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 40)
    asked, worked = [f"{name} has {n} {thing}."], [f"{name} begins with {n} {thing}."]
    for _ in range(facts):
        other, more = rng.choice(NAMES), rng.randint(2, 9)
        n += more
        asked.append(f"Then {other} gives {name} {more} more {thing}.")
        worked.append(f"After {other} there are {n}.")
    return " ".join([*asked, f"How many {thing} does {name} have now?"]), " ".join(
        [*worked, f"The answer is {n}."]
    )


def problems(rng: random.Random, shots: int, count: int) -> Case:
    """Questions of very different length behind the same worked examples; answers end where the model ends them."""
    shared = "".join(
        "Question: {}\nAnswer: {}\n\n".format(*question(rng, rng.randint(1, 6))) for _ in range(shots)
    )
    asked = [question(rng, rng.choice(FACTS))[0] for _ in range(count)]
    return "generate_until", [
        request("generate_until", f"{shared}Question: {each}\nAnswer:", ENDS) for each in asked
    ]


def choices(rng: random.Random, length: int) -> Case:
    """Four answers of 8 words to each of four contexts."""
    contexts = [words(rng, length) for _ in range(4)]
    options = [" " + words(rng, 8) for _ in range(4)]
    return "loglikelihood", [
        request("loglikelihood", context, option) for context in contexts for option in options
    ]


def lengths(rng: random.Random, scale: float) -> Case:
    """Prompts of 20 to 500 words whose answers all run to 32 tokens."""
    counts = (20, 400, 30, 60, 300, 25, 40, 500, 20, 80, 35, 250, 30, 45, 120, 60)
    wanted = {"until": ["\n\n"], "max_gen_toks": 32}
    return "generate_until", [request("generate_until", words(rng, int(n * scale)), wanted) for n in counts]


def answers(rng: random.Random, count: int) -> Case:
    """Sums behind up to nine sentences, answered in a few tokens, and one request in eight that asks for a description:
    a batch of `hf` goes on until its longest answer ends."""
    sums = [
        f"{question(rng, rng.choice(FACTS[:7]))[0]} What is {rng.randint(2, 20)} plus {rng.randint(2, 20)}?"
        for _ in range(count)
    ]
    asked = [
        f"Describe how {rng.choice(THINGS)} are made, step by step." if i % 8 == 3 else each
        for i, each in enumerate(sums)
    ]
    return "generate_until", [request("generate_until", f"Question: {each}\nAnswer:", ENDS) for each in asked]


def repeats(rng: random.Random, length: int) -> Case:
    """Eight samples of one prompt."""
    wanted = {"temperature": 1.0, "max_gen_toks": 16}
    return "generate_until", [request("generate_until", words(rng, length), wanted)] * 8


CASES = {
    "choices": lambda rng, scale: choices(rng, int(600 * scale)),
    "examples": lambda rng, scale: problems(rng, round(8 * scale), 24),
    "questions": lambda rng, scale: problems(rng, 0, 24),
    "lengths": lengths,
    "answers": lambda rng, scale: answers(rng, 24),
    "repeats": lambda rng, scale: repeats(rng, int(400 * scale)),
}


def measured(model, lm, case: Case) -> tuple[float, float, list[int], list]:
    """Seconds of the clock and of the processor, tokens of each pass, and the answers."""
    method, requests = case
    with fed(model) as counts:
        clock, processor = time.perf_counter(), time.process_time()
        answers = getattr(lm, method)(requests, disable_tqdm=True)
        return time.perf_counter() - clock, time.process_time() - processor, counts, answers


def same(a, b) -> bool:
    """Equal texts, or a log-probability within 0.01 and the same verdict on greedy."""
    return a == b if isinstance(a, str) else abs(a[0] - b[0]) < 1e-2 and a[1] == b[1]


def row(name: str, found: dict[str, list], batch: int) -> dict:
    """What a case's rounds say; counts and answers are those of the last one."""
    (_, _, ours, mine), (_, _, theirs, other) = (found[side][-1] for side in ("handloom", "hf"))
    pairs = [same(a, b) for a, b in zip(mine, other, strict=True)]
    seconds = {side: [[each[i] for each in rounds] for i in (0, 1)] for side, rounds in found.items()}
    return {
        "bench": "decode/harness", "case": name, "batch": batch, "requests": len(pairs),
        "handloom_s": min(seconds["handloom"][0]), "hf_s": min(seconds["hf"][0]),
        "ratio": median_ratio(seconds["hf"][0], seconds["handloom"][0]),
        "handloom_cpu_s": min(seconds["handloom"][1]), "hf_cpu_s": min(seconds["hf"][1]),
        "cpu_ratio": median_ratio(seconds["hf"][1], seconds["handloom"][1]),
        "handloom_passes": len(ours), "handloom_tokens": sum(ours), "hf_passes": len(theirs), "hf_tokens": sum(theirs),
        "equal": None if name == "repeats" else sum(pairs) / len(pairs),
    }  # fmt: skip


def main() -> None:
    """Every case, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; default: all")
    parser.add_argument("--batch", type=int, default=8, help="of both sides")
    parser.add_argument("--dtype", default="float32", help="of both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--scale", type=float, default=1.0, help="of the prompts' lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.jsonl")
    asked = parser.parse_args()
    folder = demo.locate(asked.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = HandloomLM(folder, batch_size=asked.batch, dtype=asked.dtype)
    theirs = HFLM(folder, batch_size=asked.batch, device=device, dtype=asked.dtype)
    rows = []
    for name in asked.case or CASES:

        def run(model, lm, turn: int, case=CASES[name]):
            # New texts in every round: what was computed in the last one is of no use to this one.
            return measured(model, lm, case(random.Random(turn), asked.scale))

        sides = {
            "handloom": lambda turn: run(ours.engine.model, ours, turn),
            "hf": lambda turn: run(theirs.model, theirs, turn),
        }
        rows += record([row(name, in_turn(sides, asked.repeats, asked.warmup), asked.batch)], asked.output)
    show("lm-evaluation-harness", COLUMNS, rows)


if __name__ == "__main__":
    main()
