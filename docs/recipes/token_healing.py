"""Token healing: a prompt that ends inside a word; its last token is taken back, and the text that it had is kept."""

import torch

from handloom import Engine, demo
from handloom.strategies import decode

engine = Engine.from_pretrained(demo.locate())
texts = engine.tokenizer.batch_decode([[i] for i in range(engine.vocab_size)])


def healed(engine, text, **options):
    """Decode `text` from its last token on, with tokens that agree with what it said there."""
    ids = engine.encode(text)
    left = engine.decode(ids[-1:])

    def logits(now):
        rest = left[len(engine.decode(now.state.new_tokens[0])) :]
        fits = [t.startswith(rest) or (len(t) > 0 and rest.startswith(t)) for t in texts] if rest else [True]
        return now.logits.masked_fill(~torch.tensor(fits, device=now.logits.device), -torch.inf)

    return decode(engine, [ids[:-1]], logits=logits, **options)[0]


prompt = "The website is at http:"
print("as it is:", repr(engine.generate(prompt, max_new_tokens=6).text))
print("healed:", repr(healed(engine, prompt, max_new_tokens=6).text))
