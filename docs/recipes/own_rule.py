"""A truncation rule of one's own: a threshold from the row's statistics, checked, and fused with the draw."""

from handloom import Engine, SamplingParams, demo, laws
from handloom.processors import Keep


class WithinOneNat(Keep):
    """Keep tokens at most `nats` below the most probable one."""

    defaults = {"nats": 0.0}

    def level(self, statistics, nats):
        return statistics.maximum - nats


laws.check_processor(WithinOneNat(1.0))
engine = Engine.from_pretrained(demo.locate())
params = SamplingParams(temperature=1.5, seed=2, max_new_tokens=12, processors=[WithinOneNat(1.0)])
print(engine.generate("Once upon a time", params).text)
print(engine.pipeline.explain(params))
