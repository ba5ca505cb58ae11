"""Regex-guided rewinding: where a text begins to match a pattern, go back to before the match and take another way."""

import re

from handloom import Engine, demo

engine = Engine.from_pretrained(demo.locate())


def without(pattern, prompt, tokens=24):
    """Greedy text that the pattern is nowhere found in; States of the past are kept, so that going back is free."""
    past, closed = [engine.prefill([prompt])], [set()]  # behind each token, and what must not follow it
    while len(past) <= tokens:
        logits = past[-1].logits.clone()
        logits[:, list(closed[-1])] = -float("inf")
        past.append(engine.step(past[-1], logits.argmax(-1)))
        closed.append(set())
        ids = past[-1].new_tokens[0]
        if found := re.search(pattern, engine.decode(ids)):
            fits = [engine.decode(ids[:n]) for n in range(len(ids) + 1)]
            start = max(n for n, text in enumerate(fits) if len(text) <= found.start())
            del past[start + 1 :], closed[start + 1 :]
            closed[-1].add(ids[start])
    return engine.decode(past[-1].new_tokens[0])


prompt = "Once upon a time, there was a"
print("as it is: ", repr(engine.generate(prompt, max_new_tokens=24).text))
print("rewound:  ", repr(without(r"town|city", prompt)))
