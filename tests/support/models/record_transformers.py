"""Tokens of decoding modes that transformers 4.49 was the last to hold, for tests/strategies/transformers_4_49.json.

Two runs, as the two versions cannot be in one process:

    python tests/support/models/record_transformers.py save FOLDER       # the models, by the project's transformers
    python tests/support/models/record_transformers.py record FOLDER JSON   # with transformers 4.49.0 on the path
"""

import json
import sys
from pathlib import Path

import torch

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]
MODELS = {
    "plain": {},
    "deep": {"num_hidden_layers": 6},
    "tied": {"num_hidden_layers": 6, "tie_word_embeddings": True},
    "eos": {"eos_token_id": [7, 11, 13]},
}
BEAMS = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 2.0, "length_penalty": 0.5},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "early_stopping": True},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1, "repetition_penalty": 1.3},
]
CONSTRAINTS = [
    {"num_beams": 4, "force_words_ids": [[30]]},
    {"num_beams": 4, "force_words_ids": [[30, 31]]},
    {"num_beams": 6, "force_words_ids": [[30, 31], [44]]},
    {"num_beams": 5, "force_words_ids": [[[30, 31], [44]]]},
    {"num_beams": 6, "force_words_ids": [[[30, 31, 32], [44, 45]], [50]], "length_penalty": 0.5},
]


def save(folder: Path) -> None:
    """The models, made by the project's tests."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from helpers import tiny_llama

    for name, fields in MODELS.items():
        tiny_llama(**fields).save_pretrained(folder / name)


def record(folder: Path, out: Path) -> None:
    """Greedy and beam tokens of each mode, one prompt at a time."""
    import transformers

    assert transformers.__version__ == "4.49.0"
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in MODELS
    }

    def run(model, prompt, **options):
        given = torch.tensor([prompt])
        with torch.no_grad():
            found = models[model].generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, pad_token_id=0, **options
            )
        return found[:, len(prompt) :].tolist()

    found = {"contrastive": [], "dola": [], "groups": [], "constraints": []}
    for alpha, k in ((0.6, 4), (0.3, 3), (0.9, 6)):
        runs = [(p, run("plain", p, penalty_alpha=alpha, top_k=k, max_new_tokens=10)[0]) for p in PROMPTS]
        found["contrastive"].append({"alpha": alpha, "k": k, "runs": runs})
    for tied in (False, True):
        for layers, penalty in (("low", 1.2), ("high", 1.0), ([1, 3], 1.0), ([2], 1.0)):
            options = {"dola_layers": layers, "repetition_penalty": penalty, "max_new_tokens": 8}
            runs = [(p, run("tied" if tied else "deep", p, **options)[0]) for p in PROMPTS]
            found["dola"].append(
                {"tied": tied, "dola_layers": layers, "repetition_penalty": penalty, "runs": runs}
            )
    for name, cases in (("groups", BEAMS), ("constraints", CONSTRAINTS)):
        for model in ("plain", "eos"):
            for options in cases:
                count = options["num_beams"] if name == "groups" else 1
                runs = []
                for prompt in PROMPTS:
                    tokens = run(model, prompt, num_return_sequences=count, max_new_tokens=9, **options)
                    runs.append((prompt, tokens))
                found[name].append({"model": model, "options": options, "runs": runs})
    out.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('{"', '\n{"') + "\n")


if __name__ == "__main__":
    {"save": save, "record": record}[sys.argv[1]](*map(Path, sys.argv[2:]))
