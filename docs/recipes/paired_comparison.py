"""Do two truncation rules differ? Both run with the same seeds, so that prompts and noise cancel in the difference."""

import statistics

from handloom import Engine, demo

engine = Engine.from_pretrained(demo.locate())
prompts = ["Once upon a time", "The sky is", "In the year 2000", "My favourite food is"]
settings = {"temperature": 1.2, "seed": 5, "max_new_tokens": 12}
plain = engine.generate(prompts, **settings)
cut = engine.generate(prompts, min_p=0.2, **settings)

# Mean log-probability a token under the model itself.
gains = [
    sum(b.raw_logprobs) / b.n_new - sum(a.raw_logprobs) / a.n_new for a, b in zip(plain, cut, strict=True)
]
print(cut)
print(
    f"min-p gains {statistics.mean(gains):.2f} nats a token, +- {statistics.stdev(gains) / len(gains) ** 0.5:.2f}"
)
