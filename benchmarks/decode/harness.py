"""lm-evaluation-harness on an Engine against its own `hf` model: multiple choice, ragged generation, repeated prompts.

Run from the repository root: `python -m benchmarks.decode.harness [model folder]`. Rows of `decode/harness`; seconds.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.support.common import RESULTS, in_turn, median_ratio, record, show
from handloom.experiments.lm_eval.model import HandloomLM
from handloom.loading import demo

BATCH = 8
COLUMNS = {
    "case": "case",
    "handloom_s": "handloom s",
    "hf_s": "hf s",
    "ratio": "ratio",
    "equal": "equal answers",
}


def words(rng: random.Random, count: int) -> str:
    """So many words of text that no two prompts share."""
    known = (
        "time",
        "year",
        "people",
        "way",
        "day",
        "man",
        "thing",
        "woman",
        "life",
        "child",
        "world",
        "school",
    )
    return " ".join(rng.choice(known) for _ in range(count))


def cases(rng: random.Random, scale: float) -> dict[str, tuple[str, list[Instance]]]:
    """Name -> the model's method and its requests."""

    def request(method: str, *arguments) -> Instance:
        return Instance(request_type=method, doc={}, arguments=arguments, idx=0)

    def ask(length: int) -> Instance:
        return request("generate_until", words(rng, length), {"until": ["\n\n"], "max_gen_toks": 32})

    contexts = [words(rng, int(600 * scale)) for _ in range(4)]
    options = [" " + words(rng, 8) for _ in range(4)]
    lengths = [int(n * scale) for n in (20, 400, 30, 60, 300, 25, 40, 500, 20, 80, 35, 250, 30, 45, 120, 60)]
    sampled = request(
        "generate_until", words(rng, int(400 * scale)), {"temperature": 1.0, "max_gen_toks": 16}
    )
    return {
        "4 choices of 600 words": (
            "loglikelihood",
            [request("loglikelihood", c, option) for c in contexts for option in options],
        ),
        "16 ragged prompts, 32 tokens": ("generate_until", [ask(length) for length in lengths]),
        "8 repeats of 400 words": ("generate_until", [sampled] * 8),
    }


def main() -> None:
    """Every case, both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the prompts' lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.jsonl")
    asked = parser.parse_args()
    folder = demo.locate(asked.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = {
        "handloom": HandloomLM(folder, batch_size=BATCH),
        "hf": HFLM(folder, batch_size=BATCH, device=device),
    }
    rows = []
    for case in cases(random.Random(0), asked.scale):
        answers = {}

        def run(name: str, turn: int, case: str = case, answers: dict = answers) -> float:
            # New texts in every round: what was computed in the last one is of no use to this one.
            method, requests = cases(random.Random(turn), asked.scale)[case]
            start = time.perf_counter()
            answers[name, turn] = getattr(sides[name], method)(requests, disable_tqdm=True)
            return time.perf_counter() - start

        timed = in_turn({name: lambda turn, name=name: run(name, turn) for name in sides}, asked.repeats)
        last = asked.repeats
        pairs = list(zip(answers["handloom", last], answers["hf", last], strict=True))
        sampled = "repeats" in case
        same = [a == b if isinstance(a, str) else abs(a[0] - b[0]) < 1e-2 and a[1] == b[1] for a, b in pairs]
        rows.append(
            {
                "bench": "decode/harness",
                "case": case,
                "batch": BATCH,
                "handloom_s": min(timed["handloom"]),
                "hf_s": min(timed["hf"]),
                "ratio": median_ratio(timed["hf"], timed["handloom"]),
                "equal": None if sampled else sum(same) / len(same),
            }
        )
    show("lm-evaluation-harness", COLUMNS, record(rows, asked.output))


if __name__ == "__main__":
    main()
