"""Follow both tokens wherever the model hesitates: forks of one State, whose common past is stored once."""

from handloom import Engine, demo

engine = Engine.from_pretrained(demo.locate())
state = engine.prefill(["The best way to learn is to"])
for _ in range(8):
    probs, ids = state.logits.softmax(-1).topk(2)
    torn = [row for row in range(len(state)) if probs[row, 0] - probs[row, 1] < 0.1 and len(state) < 8]
    rows = [*range(len(state)), *torn]
    tokens = [*ids[:, 0].tolist(), *ids[torn, 1].tolist()]
    state = engine.step(state.select(rows), tokens)
for tokens in state.new_tokens:
    print(repr(engine.decode(tokens)))
