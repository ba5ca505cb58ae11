"""Which answer does the model hold for likely? Scores of continuations; the prompt is computed once for all of them."""

from handloom import Engine, demo

engine = Engine.from_pretrained(demo.locate())
answers = [" Paris", " London", " a banana"]
state = engine.prefill(["The capital of France is"]).select([0] * len(answers))
ids = [engine.encode(answer) for answer in answers]
scores = engine.score(state, ids)  # [3, longest], nats; 0 beyond a row's length
totals = [float(row[: len(tokens)].sum()) for row, tokens in zip(scores, ids, strict=True)]
for total, answer in sorted(zip(totals, answers, strict=True), reverse=True):
    print(f"{total:8.2f}{answer}")
