"""A user's script, read by a type checker and never run; each deliberate mistake has its names in mypy and pyright."""

from handloom import Engine, Pipeline, Results, SamplingParams, State, processors
from handloom.strategies import beam_search

engine = Engine.from_pretrained("a/model", slots=4)

# One prompt gives one Generation, several give Results.
text: str = engine.generate("text").text
text = engine.generate(["a", "b"])[0].text
tokens: list[int] = engine.generate([1, 2, 3], max_new_tokens=5).token_ids
rows: Results = engine.generate([[1, 2], [3]], SamplingParams(seed=1))
few: Results = rows[:1]
samples: Results = engine.generate("text", n=3, temperature=1)
answer: str = engine.chat([{"role": "user", "content": "Hello"}], top_p=0.9).text

# Parameters under any of their names.
params = SamplingParams(temperature=0.7, max_tokens=5, stop="\n", logit_bias={5: -1.0})
params = params.replace(top_k=None, stop=["a", "b"])

# States.
state: State = engine.prefill(["a", "b"])
longer = engine.step(state, state.logits.argmax(-1)).select([0, 0, 1])
width: int = longer.logits.shape[1]
kept = beam_search(engine, "text", num_beams=2)
text = engine.generate("text", num_beams=2, early_stopping=True).text
pipeline = Pipeline([processors.Temperature(0.5), lambda logits, context: logits])

# Mistakes.
SamplingParams(temprature=1)  # expect: call-arg reportCallIssue
SamplingParams(temperature="hot")  # expect: arg-type reportArgumentType
params.replace(top_kay=3)  # expect: call-arg reportCallIssue
engine.generate(["a", "b"]).text  # expect: attr-defined reportAttributeAccessIssue
engine.generate("text")[0]  # expect: index reportIndexIssue
engine.generate("text").txt  # expect: attr-defined reportAttributeAccessIssue
engine.generate("text", temprature=1)  # expect: call-overload reportCallIssue
state.logitz  # expect: attr-defined reportAttributeAccessIssue
engine.step(state)  # expect: call-arg reportCallIssue
engine.slots = "many"  # expect: assignment reportAttributeAccessIssue
