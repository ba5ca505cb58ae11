"""Self-refinement with shared prefixes: a draft, several revisions of it at once, and the likeliest one; the prompt and
the draft are computed once, whatever is asked of them."""

from handloom import Engine, demo

engine = Engine.from_pretrained(demo.locate())
question = [{"role": "user", "content": "What is a cache, in one sentence?"}]
draft = engine.chat(question, max_new_tokens=16)
requests = ["Make it shorter.", "Make it simpler.", "Say it with an example."]
turns = [
    [*question, {"role": "assistant", "content": draft.text}, {"role": "user", "content": r}]
    for r in requests
]
revised = engine.generate([engine.chat_prompt(turn) for turn in turns], max_new_tokens=16)
answer = engine.prefill([engine.chat_prompt(question)]).select([0] * len(revised))
scores = engine.score(answer, [r.token_ids for r in revised]).sum(-1)  # as answers to the question itself
for score, request, result in zip(scores.tolist(), requests, revised, strict=True):
    print(f"{score / result.n_new:6.2f} {request} {result.text!r}")
