"""Two voters on every token: one model under two instructions, or two models; a product needs both to agree."""

from handloom import Engine, demo
from handloom.strategies import ensemble

engine = Engine.from_pretrained(demo.locate())
question = "Name an animal that can fly: "
first, second = f"You know birds.\n{question}", f"You know insects.\n{question}"
for kind in ("product", "mixture"):
    (result,) = ensemble(engine, [first], others=[(engine, [second])], kind=kind, max_new_tokens=8)
    print(f"{kind}: {result.text!r}")
