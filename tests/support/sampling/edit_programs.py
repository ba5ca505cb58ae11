"""Random programs for pipelines: members in any order, rows with and without them, steps, forks and rewinds."""

import math
import random

import torch

from handloom.kernels.sampling.draw import draw
from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.pipeline import Context, Edit, Keep, Pipeline
from handloom.pipeline.processors import DEFAULT_ORDER, Bitmask

EOS = 7


class Cheer(Edit):
    """A user's sparse edit that depends on the logit: listed tokens move towards a value."""

    defaults = {"cheer": 0.0}

    def listed(self, context):
        last = context.history.gather(1, context.lengths[:, None] - 1)
        return torch.cat(
            [last, (last + 1) % context.vocab_size, torch.full_like(last, context.vocab_size)], 1
        )

    def change(self, values, ids, context):
        share = context.values.cheer
        return torch.where(values.isneginf(), 2.0, values) * (1 - share) + 3.0 * share


class EvenOnly(Edit):
    """A user's mask: even tokens only, in every second step."""

    defaults = {"even_only": False}

    def mask(self, context):
        words = -(-context.vocab_size // 32)
        even = torch.full((len(context.lengths), words), 0x55555555, dtype=torch.int32)
        return torch.where((context.lengths % 2 == 0)[:, None], even.to(context.lengths.device), -1)


class Cap(Edit):
    """A user's pointwise edit: no logit above a value; off at infinity."""

    defaults = {"cap": math.inf}

    def point(self, logits, ids, value):
        return torch.where(logits > value, value, logits)


def grammar(context):
    """A bitmask that forbids a different third of the vocabulary in every step."""
    words = -(-context.vocab_size // 32)
    generator = torch.Generator().manual_seed(int(context.lengths.sum()))
    three = torch.randint(-(2**31), 2**31, (3, len(context.lengths), words), generator=generator)
    return (three[0] | three[1] | three[2]).to(torch.int32)


def pick(rng: random.Random, *values):
    return rng.choice(values)


def request(rng: random.Random, vocab: int, fusable: bool) -> SamplingParams:
    """A request that uses about a third of all rules; `fusable`: none that never runs in the sampler."""

    def ids(count):
        return tuple(rng.sample(range(vocab), count))

    choices = {
        "repetition_penalty": lambda: pick(rng, 1.3, 0.7),
        "presence_penalty": lambda: pick(rng, 0.6, -0.5),
        "frequency_penalty": lambda: pick(rng, 0.4, -0.3),
        "penalty_scope": lambda: pick(rng, "prompt", "output", "all"),
        "penalty_window": lambda: pick(rng, 1, 4),
        "logit_bias": lambda: {i: rng.uniform(-4, 4) for i in ids(3)},
        "sequence_bias": lambda: {ids(1): 2.0, ids(2): -3.0, ids(1): 1.0},
        "banned_tokens": lambda: ids(4),
        "bad_words": lambda: [ids(1), ids(2)],
        "allowed_tokens": lambda: ids(vocab // 2),
        "suppress_first": lambda: ids(5),
        "forced_tokens": lambda: {rng.randrange(3): rng.randrange(vocab)},
        "exponential_decay": lambda: (1, 1.5),
        "min_new_tokens": lambda: 3,
        "no_repeat_ngram_size": lambda: pick(rng, 1, 2, 3),
        "dry_multiplier": lambda: 0.8,
        "top_k": lambda: pick(rng, 1, 5, 20),
        "top_p": lambda: pick(rng, 0.3, 0.9),
        "min_p": lambda: 0.1,
        "typical_p": lambda: pick(rng, 0.5, 0.9),
        "top_h": lambda: pick(rng, 0.4, 0.8),
        "top_h_rule": lambda: pick(rng, "paper", "code"),
        "p_less": lambda: pick(rng, True, "norm"),
        "mirostat": lambda: pick(rng, 2, 2, 1),
        "top_n_sigma": lambda: 1.5,
        "xtc_probability": lambda: 0.5,
        "dynatemp_range": lambda: pick(rng, 0.3, 0.6),
        "edt_theta": lambda: pick(rng, 0.2, 1.0),
    }
    if fusable:
        choices["mirostat"] = lambda: 2
    chosen = {name: make() for name, make in choices.items() if rng.random() < 0.3}
    return SamplingParams(temperature=pick(rng, 0.0, 1.0, 0.7, 1.4), stop_token_ids=(2,), **chosen)


def pipeline(rng: random.Random, rows: int, fusable: bool, cap: type[Edit] = Cap) -> Pipeline:
    """All built-in rules and up to four of a user's own, in any order.

    fusable: sparse edits and masks in any order, then the rest as the sampler takes it.
    """
    own = [
        Cheer([pick(rng, 0.0, 0.5) for _ in range(rows)]),
        EvenOnly([pick(rng, False, True) for _ in range(rows)]),
        cap([pick(rng, math.inf, 1.0) for _ in range(rows)]),
        Bitmask([pick(rng, None, grammar) for _ in range(rows)]),
    ]
    own = [rule for rule in own if rng.random() < 0.4]
    rules = own + [rule() for rule in DEFAULT_ORDER if rule.name not in ("prefix_fn", "adaptive_p")]
    rng.shuffle(rules)
    if fusable:
        rules.sort(key=place)
    return Pipeline(rules, name="program")


def place(rule) -> int:
    """Where the sampler can take a rule: 0 edits of single tokens, 1 pointwise ones, 2 temperature, 3, 4 the rest."""
    if isinstance(rule, Keep):
        return 4 if rule.name == "mirostat" else 3
    return {"temperature": 2, "dynatemp": 2, "edt": 2}.get(
        rule.name, 3 if rule.sampling_only else int(isinstance(rule, Cap))
    )


class Program:
    """Rows that are advanced through the fused sampler, beside rows that are advanced rule by rule.

    rng: makes every choice. chain, requests: where they are not to be chosen.
    """

    def __init__(self, rng: random.Random, vocab: int, rows: int = 4, chain=None, requests=None, **options):
        self.rng, self.vocab = rng, vocab
        fusable = rng.random() < 0.7
        self.chain = chain or pipeline(rng, rows, fusable, **options)
        requests = requests or [request(rng, vocab, fusable) for _ in range(rows)]
        self.prompts = [
            [rng.randrange(min(vocab, 12)) for _ in range(rng.randint(1, 9))] for _ in range(rows)
        ]
        fused, plain = (
            self.chain.bind(requests, self.prompts, vocab_size=vocab, eos_token_ids={EOS}) for _ in range(2)
        )
        texts = [(row, list(prompt)) for row, prompt in enumerate(self.prompts)]
        self.values = [(fused, plain, texts)]

    def logits(self, texts) -> torch.Tensor:
        """Random logits of the texts; some rows with ties, with excluded tokens, or with finite masks."""
        found = []
        for row, text in texts:
            generator = torch.Generator().manual_seed(row * 7919 + 31 * len(text) + text[-1])
            x = torch.randn(self.vocab, generator=generator) * 3
            kind = (row + len(text)) % 5
            x = x.round() if kind == 1 else x
            x[:: 3 if kind == 2 else self.vocab] = -math.inf
            x[1 :: 4 if kind == 3 else self.vocab] = -1e9
            found.append(x)
        return torch.stack(found)

    def context(self, texts) -> Context:
        width = max(len(text) for _, text in texts) + 3
        return Context(
            tokens=torch.tensor([text + [-1] * (width - len(text)) for _, text in texts]),
            lengths=torch.tensor([len(text) for _, text in texts]),
            prompt_lengths=torch.tensor([len(self.prompts[row]) for row, _ in texts]),
            seeds=torch.tensor([row + 1 for row, _ in texts]),
            streams=torch.zeros(len(texts), dtype=torch.int64),
            vocab_size=self.vocab,
        )

    def run(self, moves: int):
        """Yield (Drawn, tokens and log-probabilities of the definition, where it stands) of each step."""
        for _ in range(moves):
            fused, plain, texts = self.rng.choice(self.values[-3:])
            if self.rng.random() < 0.3:
                index = [self.rng.randrange(len(texts)) for _ in range(self.rng.randint(1, 4))]
                texts = [(texts[i][0], list(texts[i][1])) for i in index]
                self.values.append((fused.select(index), plain.select(index), texts))
                continue
            x, context, other = self.logits(texts), self.context(texts), self.context(texts)
            drawn = fused.sample(x, context)
            processed = plain.one_by_one(x, other)
            tokens = draw(processed, other.seeds, other.positions, other.streams, plain.greedy_rows())
            logprobs = processed.log_softmax(-1).gather(1, tokens.clamp(min=0)[:, None])[:, 0]
            for i, (greedy, own) in enumerate(zip(plain.greedy, plain.chains, strict=True)):
                if (
                    greedy and own.chain_when_greedy
                ):  # log-probabilities of greedy rows are without truncation
                    logprobs[i] = drawn.logprobs[i]
            yield drawn, tokens, logprobs, where(fused)
            committed = tokens.clamp(min=0)
            fused, plain = fused.accept(drawn.tokens, context), plain.accept(committed, other)
            texts = [
                (row, [*text, token]) for (row, text), token in zip(texts, committed.tolist(), strict=True)
            ]
            self.values.append((fused, plain, texts))


def where(rows) -> str:
    """The active members in order, those that are not fused in brackets."""
    plan = rows.plan()
    names = [(i, member.processor.name) for i, member in enumerate(rows.members) if any(member.on)]
    return " ".join(f"[{name}]" if i in plan.unfused else name for i, name in names)


def compare(drawn, tokens, logprobs) -> str:
    """What differs between a fused step and the definition; empty: nothing."""
    if drawn.tokens.tolist() != tokens.clamp(min=0).tolist():
        return f"tokens {drawn.tokens.tolist()} instead of {tokens.tolist()}"
    alive = tokens >= 0
    if not torch.allclose(drawn.logprobs[alive], logprobs[alive], atol=5e-5, rtol=1e-5):
        return f"log-probabilities {drawn.logprobs.tolist()} instead of {logprobs.tolist()}"
    if not drawn.logprobs[~alive].isnan().all():
        return f"log-probabilities {drawn.logprobs.tolist()} of rows without a token"
    return ""
