"""Laws of decoding: checks to run on your own strategy, engine or processor; AssertionError says what broke.

A strategy is any callable `strategy(engine, prompts, params=None, **options)` that gives Generations or lists
of token ids in the order of the prompts; `Engine.generate` is one. Where a check compares tokens, the message
names the first place where they differ.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import ParameterError
from ..kernels import dispatch
from ..kernels.sampling.draw import draw
from ..kernels.sampling.reference import apply_edits
from ..loop.request import Request
from ..params.sampling_params import SamplingParams
from ..pipeline.pipeline import Context, Pipeline, Rows
from . import naive

LEAVES = 300_000  # most sequences that `sequence_law` enumerates
EXPECTED = 5.0  # least expected count of a chi-square cell; rarer sequences are pooled


# -- strategies


def batch_equals_solo(strategy: Callable, engine, prompts: Sequence, params=None, **options) -> None:
    """Each prompt's tokens are the same whatever shares its batch: all prompts, all in reverse, each alone.

    Args:
        strategy: the strategy to check.
        prompts: at least two, in a list.
        params: one for all, or a list with one for each; a seed if anything is drawn.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    alone = [
        _run(strategy, engine, prompts[i : i + 1], _slice(params, i), options) for i in range(len(prompts))
    ]
    together = _run(strategy, engine, prompts, params, options)
    backwards = params[::-1] if isinstance(params, list | tuple) else params
    reverse = _run(strategy, engine, prompts[::-1], backwards, options)
    flat = [result for results in alone for result in results]
    flat_reverse = [result for results in alone[::-1] for result in results]
    _compare("batch_equals_solo", "in a batch", together, "alone", flat)
    _compare("batch_equals_solo", "in the reversed batch", reverse, "alone", flat_reverse)


def cached_equals_naive(
    engine, prompts, params=None, *, strategy: Callable = Engine.generate, **options
) -> None:
    """The tokens are those of `naive.generate`, which recomputes every sequence for every token.

    Args:
        prompts, params: as for `Engine.generate`; a seed if anything is drawn.
        strategy: what to compare, by default the engine's own loop.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    fast = _run(strategy, engine, prompts, params, options)
    slow = naive.generate(engine, prompts, params, **_fields(options))

    def gap(index: int, at: int, one: int, other: int) -> str:
        ids = [*slow[index].prompt_token_ids, *slow[index].token_ids[:at]]
        if min(ids) < 0:
            return ""
        logits = naive.next_logits(engine.model, [ids])[0]
        return f"; cache-free their logits differ by {float(logits[one] - logits[other]):.2e}"

    _compare("cached_equals_naive", "with the cache", fast, "without", slow, gap)


def temperature_zero_is_argmax(
    strategy: Callable, engine, prompts: Sequence, params=None, *, atol: float = 1e-4, **options
) -> None:
    """At temperature 0 every token has the largest cache-free processed logit, but for `atol`.

    Args:
        strategy: a strategy that gives one result for each prompt.
        prompts: a list of them.
        params: one for all prompts, or a list with one for each; their temperature is set to 0.
        atol: how far below the largest logit a token may be, for caches that round differently.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    asked = engine.requests(prompts, params, **{**_fields(options), "temperature": 0.0})
    options = {name: value for name, value in options.items() if name not in _fields(options)}
    results = _run(strategy, engine, prompts, [request.params for request in asked], options)
    assert len(results) == len(asked), (
        f"temperature_zero_is_argmax: {len(results)} results for {len(asked)} prompts; one for each is needed"
    )
    for request, result in zip(asked, results, strict=True):
        for at, (token, logits) in enumerate(
            zip(_ids(result), _replay(engine, request, _ids(result)), strict=True)
        ):
            best = int(logits.argmax())
            assert float(logits[token]) >= float(logits[best]) - atol, (
                f"temperature_zero_is_argmax: prompt {request.index}, output position {at}: token {token} "
                f"has logit {float(logits[token]):.6g}, but token {best} has {float(logits[best]):.6g}"
            )


def exact_distribution(
    strategy: Callable,
    engine,
    prompt,
    params: SamplingParams,
    *,
    draws: int = 20_000,
    batch: int = 500,
    seed: int = 0,
    samples: bool = True,
    false_alarm: float = 1e-6,
    **options,
) -> float:
    """The strategy samples whole sequences with exactly the probabilities that model and pipeline define.

    The law is enumerated (`sequence_law`) and compared with `draws` sequences by a chi-square test; sequences
    expected fewer than five times are pooled. An impossible sequence fails at once.

    Args:
        strategy: the sampler.
        engine: with a vocabulary small enough to enumerate.
        prompt: one prompt.
        params: with temperature > 0, and max_new_tokens as the depth of the enumeration.
        draws, batch: sequences in all, and in one call.
        seed: of the draws; the result is the same every time.
        samples: ask for n samples of the prompt, which is prefilled once; False gives the strategy the prompt
            many times, each time with another seed.
        false_alarm: probability of failing a strategy that is right.
        options: fields of `SamplingParams`, and options of the strategy.

    Returns:
        The p-value.
    """
    law, counts = sequence_law(engine, prompt, params), Counter()
    for start in range(seed, seed + draws, batch):
        count = min(batch, seed + draws - start)
        if samples:
            results = _run(strategy, engine, [prompt], [params.replace(seed=start, n=count)], options)
        else:
            each = [params.replace(seed=start + i) for i in range(count)]
            results = _run(strategy, engine, [prompt] * count, each, options)
        assert len(results) == count, f"exact_distribution: {len(results)} results, {count} were asked for"
        counts.update(tuple(_ids(result)) for result in results)
    impossible = [sequence for sequence in counts if sequence not in law]
    assert not impossible, f"exact_distribution: drew {impossible[0]}, which has probability 0"
    p_value = chi_square(counts, law, draws)
    worst = max(law, key=lambda s: abs(counts[s] - draws * law[s]) / (draws * law[s]) ** 0.5)
    assert p_value >= false_alarm, (
        f"exact_distribution: p-value {p_value:.2e} is below the false-alarm probability {false_alarm:g}; "
        f"the worst of {len(law)} sequences is {worst}: drawn {counts[worst]} times, "
        f"expected {draws * law[worst]:.1f} of {draws}"
    )
    return p_value


def lossless(
    strategy: Callable, engine, prompts: Sequence, params=None, *, test: dict | None = None, **options
):
    """A strategy that should only be faster gives what plain decoding gives.

    Greedy prompts must get the tokens of `Engine.generate`, sampled ones its law (`exact_distribution`).

    Args:
        strategy: such as `strategies.speculative`.
        prompts: a list of them.
        params: one for all prompts, or a list with one for each.
        test: arguments for `exact_distribution`.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    asked = engine.requests(prompts, params, **_fields(options))
    options = {name: value for name, value in options.items() if name not in _fields(options)}
    greedy = [request for request in asked if request.params.greedy]
    if greedy:
        given = [request.prompt for request in greedy], [request.params for request in greedy]
        plain = _run(Engine.generate, engine, *given, {})
        _compare("lossless", "strategy", _run(strategy, engine, *given, options), "plain decoding", plain)
    for request in asked:
        if not request.params.greedy:
            exact_distribution(strategy, engine, request.prompt, request.params, **(test or {}), **options)


# -- the law of sequences


@torch.no_grad()
def sequence_law(engine, prompt, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every sequence that can be drawn, by enumerating the tree without a cache.

    Args:
        engine: with a small vocabulary; about V ** max_new_tokens sequences are enumerated.
        prompt: one prompt of ids or text.
        params: its `max_new_tokens` is the depth; EOS and stop token ids end a sequence earlier.

    Returns:
        {token ids: probability} of the sequences whose probability is above 0.

    Raises:
        ParameterError: there are more than 300,000 of them.
    """
    (request, *_) = engine.requests([prompt], params.replace(n=1))
    params, prompt = request.params, request.prompt.ids
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else engine.eos_token_ids)
    rows, paths = _bind(engine, request), [()]
    weights, law = torch.ones(1, dtype=torch.float64), {}
    for depth in range(params.max_new_tokens):
        ids = [prompt + list(path) for path in paths]
        context = _context(request, ids, len(prompt), engine)
        logits = torch.cat(
            [naive.next_logits(engine.model, ids[i : i + 512]) for i in range(0, len(ids), 512)]
        )
        processed = rows.apply(logits, context).double().cpu()
        if params.greedy:
            step = torch.zeros_like(processed).scatter_(1, processed.argmax(-1, keepdim=True), 1.0)
        else:
            step = processed.softmax(-1)
        parents, tokens = (step > 0).nonzero(as_tuple=True)
        weights = (weights[:, None] * step)[parents, tokens]
        if len(weights) + len(law) > LEAVES:
            raise ParameterError(f"more than {LEAVES} sequences; use a smaller vocabulary, depth, or top_k")
        grown = [(*paths[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        ends = [path[-1] in stops or depth + 1 == params.max_new_tokens for path in grown]
        law |= {path: w for path, w, end in zip(grown, weights.tolist(), ends, strict=True) if end}
        going = [i for i, end in enumerate(ends) if not end]
        if not going:
            break
        parents, tokens = parents[going], tokens[going]
        again = rows.select(parents)  # processors that carry memory want the very context that apply saw
        at = _context(request, [ids[p] for p in parents.tolist()], len(prompt), engine)
        again.apply(logits[parents.to(logits.device)], at)
        rows, weights = again.accept(tokens.to(logits.device), at), weights[going]
        paths = [grown[i] for i in going]
    return law


def chi_square(counts: dict, law: dict, draws: int) -> float:
    """The p-value of Pearson's chi-square test that `counts` of `draws` outcomes come from `law`.

    Outcomes expected fewer than five times are pooled into one cell; 1.0 if only one cell is left.
    """
    cells = [(counts.get(key, 0), draws * p) for key, p in law.items() if draws * p >= EXPECTED]
    pooled = draws - sum(seen for seen, _ in cells), draws - sum(expected for _, expected in cells)
    if pooled[1] >= EXPECTED or not cells:
        cells.append(pooled)
    elif pooled[1] > 0:
        cells.sort(key=lambda cell: cell[1])
        cells[0] = cells[0][0] + pooled[0], cells[0][1] + pooled[1]
    if len(cells) < 2:
        return 1.0
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


# -- States


@torch.no_grad()
def fork_and_rewind_equal_replay(
    engine, prompts: Sequence, *, steps: int = 24, seed: int = 0, atol: float = 1e-3
):
    """Continuing any older State, any number of times, gives the logits of prefilling its tokens afresh.

    Args:
        prompts: of the first State.
        steps: States to make, each from a random one of those before it, by step, extend and keep, or select.
        seed: of the random choices.
        atol: how far a logit may be from the replayed one.
    """
    rng = random.Random(seed)
    states = [engine.prefill(list(prompts))]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(engine.vocab_size) for _ in range(count)]

    for number in range(steps):
        old = rng.choice(states)
        move = rng.choice(("step", "extend", "select"))
        if move == "step":
            new = engine.step(old, torch.tensor(tokens(len(old))))
        elif move == "extend":
            counts = [rng.randint(1, 4) for _ in range(len(old))]
            new = engine.extend(old, [tokens(n) for n in counts]).keep([rng.randint(1, n) for n in counts])
        else:
            new = old.select([rng.randrange(len(old)) for _ in range(rng.randint(1, len(old) + 1))])
        states.append(new)
        for where, state in (("new", new), ("old", old)):
            replayed = engine.prefill(state.tokens).logits
            error = (state.logits - replayed).abs().amax(-1)
            row = int(error.argmax())
            assert float(error[row]) <= atol, (
                f"fork_and_rewind_equal_replay: {where} State of {move} number {number}, row {row} "
                f"({len(state.tokens[row])} tokens): logits are {float(error[row]):.2e} from their replay"
            )
        engine.pool.check()


# -- processors


def check_processor(
    rule,
    on: SamplingParams | None = None,
    *,
    vocab_size: int = 64,
    steps: int = 4,
    seed: int = 0,
    kernel: Callable[[Rows, Tensor, Context], Tensor] | None = None,
    atol: float = 0.0,
) -> None:
    """A processor keeps its promises, on random logits, some rows with excluded tokens and with ties.

    Off is identity, beside rows that are on; a row's result does not depend on the others; the same call
    gives the same bits; the input is untouched; exclusions make no NaN; `keeps_argmax` is true where it is
    declared; forks and rewinds of its memory equal a replay. What the fused sampler makes of it is what its own
    `apply` gives: the edited logits to the last bit, and the token of the draw, in torch and, where Triton or its
    interpreter (TRITON_INTERPRET=1) can run, in the kernels.

    Args:
        rule: a Processor, a class of them, or a function (logits, context) -> logits.
        on: parameters that switch it on; None for a rule with parameters of its own.
        vocab_size: >= 8.
        steps: tokens that the rows are advanced by.
        seed: of logits and tokens.
        kernel: another implementation of `Rows.apply`, called as (rows, logits, context).
        atol: how far the kernel's finite logits may be from the reference; what is kept must be the same.
    """
    trial = Trial(rule, on or SamplingParams(temperature=1.0), vocab_size, steps, seed)
    off = SamplingParams(temperature=trial.on.temperature)
    together, rows = trial.play([trial.on] * 4)
    if not trial.processor.active(off):
        mixed, _ = trial.play([trial.on, off, trial.on, off])
        trial.equal("off is identity", [step[1::2] for step in mixed], [step[1::2] for step in trial.inputs])
        trial.equal("off beside on", [step[::2] for step in mixed], [step[::2] for step in together])
    for row in range(4):
        alone, _ = trial.play([trial.on], [row])
        trial.equal("batch equals solo", alone, [step[row : row + 1] for step in together], row)
    trial.equal("repeatable", trial.play([trial.on] * 4)[0], together)
    for at, (before, after) in enumerate(zip(trial.inputs, together, strict=True)):
        where = f"check_processor({trial.processor.name}), step {at}"
        assert not after.isnan().any(), f"{where}: NaN from logits without any"
        if trial.processor.keeps_argmax:
            best = after.gather(1, before.argmax(-1, keepdim=True))[:, 0]
            assert torch.equal(best, after.amax(-1)), (
                f"{where}: keeps_argmax, yet the most likely token changed"
            )
    for at in range(steps):  # rewind to every step, and go on from there in two forks
        forks, _ = trial.play([trial.on] * 8, [0, 1, 2, 3] * 2, rows[at].select([0, 1, 2, 3] * 2), at)
        for half in (slice(0, 4), slice(4, 8)):
            trial.equal(f"rewind to step {at}", [step[half] for step in forks], together[at:])
    for at, before in enumerate(rows):
        _same_as_reference(trial, before, at, kernel, atol)


def _same_as_reference(trial: Trial, rows: Rows, at: int, kernel: Callable | None, atol: float) -> None:
    """At one step of a trial, the fused draw takes the reference's token, and a kernel gives its logits."""
    context, logits = trial.context(range(4), at), trial.inputs[at]
    reference = rows.one_by_one(logits, context)

    def same(law: str, got: Tensor, want: Tensor) -> None:
        trial.equal(law, [got], [want], first_step=at)

    same("rows.apply", rows.apply(logits, trial.context(range(4), at)), reference)
    edits = rows.edits(logits, trial.context(range(4), at))
    if edits is not None:
        same("the sampler's edits", apply_edits(logits, **edits.arguments()), reference)
        tokens = torch.tensor([row[at] for row in trial.tokens])
        same(
            "the sampler's edits at a token", edits.at(tokens)[:, None], reference.gather(1, tokens[:, None])
        )
    if not reference.isneginf().all(-1).any():
        tokens = draw(reference, context.seeds, context.positions, context.streams, rows.greedy_rows())
        for law, fused in _draws(trial, rows, logits, at):
            same(law, fused[:, None], tokens[:, None])
    if kernel is not None:
        other = kernel(rows, logits, trial.context(range(4), at))
        trial.equal("the kernel's kept tokens", [other.isneginf()], [reference.isneginf()])
        error = float((other - reference).nan_to_num(0.0).abs().max())
        assert error <= atol, f"check_processor({trial.processor.name}): kernel off by {error:.2e}"


def _draws(trial: Trial, rows: Rows, logits: Tensor, at: int) -> Iterator[tuple[str, Tensor]]:
    """Tokens of one step, by every implementation that can run here."""
    yield "the fused draw", rows.sample(logits, trial.context(range(4), at)).tokens
    if dispatch.interpreting() and at == len(trial.inputs) - 1:  # Triton's interpreter is slow: one step
        try:
            with dispatch.use("triton"):
                yield (
                    "the draw of the Triton kernels",
                    rows.sample(logits, trial.context(range(4), at)).tokens,
                )
        except dispatch.KernelUnavailable:  # no Triton, or no device function
            return


class Trial:
    """Four rows of made-up logits, prompts and tokens, on which a processor is played."""

    def __init__(self, rule, on: SamplingParams, vocab_size: int, steps: int, seed: int):
        self.pipeline = Pipeline([rule], name="check_processor")
        self.processor, self.on, self.vocab_size = self.pipeline[0], on, vocab_size
        source = torch.Generator().manual_seed(seed)
        self.inputs = [torch.randn(4, vocab_size, generator=source) * 3 for _ in range(steps)]
        for logits in self.inputs:
            logits[1, ::3] = -torch.inf
            logits[2] = logits[2].round()
            logits[3, 2:] = -torch.inf
        # Few different ids, so that penalties and repeats have something to find.
        small = min(8, vocab_size)
        ids = torch.randint(small, (4, 12 + steps), generator=source).tolist()
        self.prompts = [row[: 6 + 2 * i] for i, row in enumerate(ids)]
        self.tokens = [row[12:] for row in ids]

    def context(self, which: Iterable[int], at: int) -> Context:
        """The context of rows `which` after `at` steps."""
        which = list(which)
        ids = [self.prompts[i] + self.tokens[i][:at] for i in which]
        width = max(map(len, ids))
        return Context(
            tokens=torch.tensor([row + [-1] * (width - len(row)) for row in ids]),
            lengths=torch.tensor([len(row) for row in ids]),
            prompt_lengths=torch.tensor([len(self.prompts[i]) for i in which]),
            seeds=torch.tensor([100 + i for i in which]),
            streams=torch.zeros(len(which), dtype=torch.int64),
            params=[self.on] * len(which),
            vocab_size=self.vocab_size,
        )

    def play(self, params, which=range(4), rows: Rows | None = None, start: int = 0):
        """Every step's output for rows `which`, and the Rows before each step."""
        which, outputs, states = list(which), [], []
        if rows is None:
            rows = self.pipeline.bind(
                list(params),
                [self.prompts[i] for i in which],
                vocab_size=self.vocab_size,
                seeds=[100 + i for i in which],
            )
        for at in range(start, len(self.inputs)):
            context, logits = self.context(which, at), self.inputs[at][which]
            before = logits.clone()
            outputs.append(rows.apply(logits, context))
            states.append(rows)
            self.equal("the input is untouched", [logits], [before])
            rows = rows.accept(torch.tensor([self.tokens[i][at] for i in which]), context)
        return outputs, states

    def equal(
        self, law: str, got: list[Tensor], want: list[Tensor], first_row: int = 0, first_step: int = 0
    ) -> None:
        """Raise AssertionError at the first value that is not the same."""
        for step, (a, b) in enumerate(zip(got, want, strict=True), first_step):
            differs = (a != b) & ~((a != a) & (b != b))
            if differs.any():
                row, token = differs.nonzero()[0].tolist()
                raise AssertionError(
                    f"check_processor({self.processor.name}), {law}: step {step}, row {first_row + row}, "
                    f"token {token}: {a[row, token].item():.9g} instead of {b[row, token].item():.9g}"
                )


# -- helpers


def _ids(result) -> list[int]:
    return [int(token) for token in getattr(result, "token_ids", result)]


def _fields(options: dict) -> dict:
    """The options that are fields of SamplingParams."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    return {name: value for name, value in options.items() if name in names}


def _slice(params, i: int):
    return params[i : i + 1] if isinstance(params, list | tuple) else params


def _run(strategy: Callable, engine, prompts, params, options: dict) -> list:
    results = (
        strategy(engine, prompts, **options)
        if params is None
        else strategy(engine, prompts, params, **options)
    )
    return [results] if hasattr(results, "token_ids") else list(results)


def _compare(law: str, here: str, got: list, there: str, want: list, note: Callable | None = None) -> None:
    """Raise AssertionError at the first token that differs."""
    assert len(got) == len(want), f"{law}: {len(got)} results {here}, {len(want)} {there}"
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        for at, (a, b) in enumerate(zip_longest(_ids(one), _ids(other))):
            if a == b:
                continue
            extra = note(index, at, a, b) if note is not None and a is not None and b is not None else ""
            a, b = (f"token {x}" if x is not None else "the end" for x in (a, b))
            raise AssertionError(
                f"{law}: result {index} differs first at output position {at}: {a} {here}, {b} {there}{extra}"
            )
        ends = getattr(one, "finish_reason", None), getattr(other, "finish_reason", None)
        if None not in ends:
            assert ends[0] == ends[1], f"{law}: result {index} ends by {ends[0]} {here}, by {ends[1]} {there}"


def _bind(engine, request: Request) -> Rows:
    return engine.pipeline.bind(
        [request.params],
        [request.prompt.ids],
        device=engine.device,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        seeds=[request.seed],
    )


def _context(request: Request, ids: list[list[int]], prompt_length: int, engine) -> Context:
    def filled(value: int) -> Tensor:
        return torch.full((len(ids),), value, device=engine.device)

    return Context(
        tokens=torch.tensor(ids, device=engine.device),
        lengths=filled(len(ids[0])),
        prompt_lengths=filled(prompt_length),
        seeds=filled(request.seed),
        streams=filled(0),
        params=[request.params] * len(ids),
        vocab_size=engine.vocab_size,
    )


def _replay(engine, request: Request, tokens: list[int]):
    """Cache-free processed logits [V] before each of the tokens."""
    rows, prompt = _bind(engine, request), request.prompt
    for at, token in enumerate(tokens):
        ids = [prompt.ids + tokens[:at]]
        context = _context(request, ids, len(prompt), engine)
        processed = rows.apply(naive.next_logits(engine.model, ids, prompt.embeddings), context)
        yield processed[0]
        rows = rows.accept(torch.tensor([token], device=engine.device), context)
