"""transformers' processors, criteria and streamers, custom_generate, and logits-processor-zoo."""

import copy
import math
import random

import logits_processor_zoo.transformers as originals
import pytest
import torch
from tiny_tokenizers import byte_level
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
)

from handloom import compat, laws
from handloom.engine import Engine
from handloom.errors import CapabilityError, ParameterError
from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.foreign import zoo
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.strategies import speculative


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=24, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, slots=2)


PROMPTS = ["the quick brown fox", "Stop here, then", "lazy dog. new lines and spaces"]


class Recorder(LogitsProcessor):
    """Notes what it is called with, and writes to its scores."""

    def __init__(self, log):
        self.log, self.calls = log, 0

    def __deepcopy__(self, memo):
        other = type(self)(self.log)
        other.calls = self.calls
        return other

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.log.append((self.calls, input_ids.tolist()[0], tuple(scores.shape), scores.dtype))
        scores[:, 0] = -math.inf
        return scores


def test_a_processor_sees_full_ids_growing_by_one(engine):
    log = []
    results = engine.generate(PROMPTS[:2], max_new_tokens=4, ignore_eos=True, processors=[Recorder(log)])
    for result in results:
        mine = [entry for entry in log if entry[1][: len(result.prompt_token_ids)] == result.prompt_token_ids]
        assert [entry[0] for entry in mine] == [1, 2, 3, 4]
        wanted = [result.prompt_token_ids + result.token_ids[:i] for i in range(4)]
        assert [entry[1] for entry in mine] == wanted
        assert {entry[2:] for entry in mine} == {((1, engine.vocab_size), torch.float32)}


class Alternate(LogitsProcessor):
    """Forces token 5 and 6 in turn: state that a fork or a rewind must not share."""

    def __init__(self):
        self.turn = 0

    def __call__(self, input_ids, scores):
        scores.fill_(-math.inf)
        scores[:, 5 + self.turn % 2] = 0
        self.turn += 1
        return scores


def context(length):
    return Context(
        tokens=torch.zeros(2, length, dtype=torch.int64), lengths=torch.full((2,), length),
        prompt_lengths=torch.ones(2, dtype=torch.int64), seeds=torch.zeros(2, dtype=torch.int64),
        streams=torch.zeros(2, dtype=torch.int64),
    )  # fmt: skip


def test_state_forks_and_rewinds():
    rows = Pipeline([Alternate()], name="x").bind([None] * 2, [[0]] * 2, vocab_size=9)
    x, ctx = torch.zeros(2, 9), context(1)
    assert rows.apply(x, ctx).argmax(-1).tolist() == [5, 5]
    assert rows.apply(x, ctx).argmax(-1).tolist() == [5, 5]  # nothing was accepted yet
    later = rows.accept(torch.tensor([5, -1]), ctx)
    assert later.apply(x, context(2)).argmax(-1).tolist() == [6, 5]
    assert rows.apply(x, context(1)).argmax(-1).tolist() == [5, 5]
    forked = later.select([0, 0])
    ctx = context(2)
    forked.apply(x, ctx)
    moved = forked.accept(torch.tensor([6, -1]), ctx)
    assert moved.apply(x, context(3)).argmax(-1).tolist() == [5, 6]


class Counted(Alternate):
    """Alternate, with a count of its deep copies and calls that all copies share."""

    def __init__(self):
        super().__init__()
        self.counts = {"copies": 0, "calls": 0}

    def __deepcopy__(self, memo):
        self.counts["copies"] += 1
        return copy.copy(self)

    def __call__(self, input_ids, scores):
        self.counts["calls"] += 1
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("graph", [False, True])
def test_the_loop_copies_once_a_request_and_never_for_a_token(model, tokenizer, graph):
    engine, rule = Engine(model, tokenizer, slots=2, graph=graph), Counted()
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, processors=[rule]) for n in (5, 9, 6)]
    for round_ in (1, 2):  # rows are replaced, the batch shrinks, and is used again
        results = engine.generate(PROMPTS, params)
        assert [result.token_ids for result in results] == [[5, 6] * 2 + [5], [5, 6] * 4 + [5], [5, 6] * 3]
        assert rule.counts["copies"] == 3 * round_
        assert rule.counts["calls"] >= 20 * round_
    assert rule.turn == 0  # the user's own object is never called


def test_samples_of_one_request_have_an_instance_each(engine):
    rule = Counted()
    results = engine.generate(PROMPTS[0], n=3, temperature=1.0, seed=1, max_new_tokens=4, processors=[rule])
    assert [result.token_ids for result in results] == [[5, 6, 5, 6]] * 3
    assert rule.counts["copies"] == 3


class Remembers(LogitsProcessor):
    """Forbids what was the most likely token at any call before: its state depends on the scores it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        best = int(scores.argmax())
        scores[:, self.seen] = -math.inf
        self.seen.append(best)
        return scores


def test_any_program_of_forks_and_rewinds_equals_replay():
    rng, vocab = random.Random(4), 50
    table = torch.randn(400, vocab, generator=torch.Generator().manual_seed(2))

    def logits(rows):  # of each row, from its length and last token
        return torch.stack([table[(7 * len(row) + 3 * row[-1]) % 400] for row in rows])

    def at(rows):
        width = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows])
        return Context(tokens=torch.tensor([row + [-1] * (width - len(row)) for row in rows]), lengths=lengths,
                       prompt_lengths=torch.ones_like(lengths))  # fmt: skip

    def fresh(count):
        return Pipeline([Remembers()], name="x").bind([None] * count, [[0]] * count, vocab_size=vocab)

    def replayed(row):
        one, rule = [], Remembers()
        for length in range(1, len(row) + 1):
            one = rule(torch.tensor([row[:length]]), logits([row[:length]]).clone())
        return one[0]

    states = [(fresh(2), [[0], [0]])]
    for _ in range(120):
        rows, texts = states[-1] if rng.random() < 0.7 else rng.choice(states)
        if rng.random() < 0.3:
            index = [rng.randrange(len(texts)) for _ in range(rng.randint(1, 3))]
            rows, texts = rows.select(index), [texts[i] for i in index]
        context = at(texts)
        processed = rows.apply(logits(texts), context)
        assert torch.equal(processed, torch.stack([replayed(text) for text in texts]))
        tokens = processed.argmax(-1)
        states.append(
            (rows.accept(tokens, context), [[*t, int(x)] for t, x in zip(texts, tokens, strict=True)])
        )
    assert max(len(text) for _, texts in states for text in texts) > 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_state_in_the_loop_is_that_of_strategies_which_copy(engine, temperature):
    asked = {
        "max_new_tokens": 8,
        "temperature": temperature,
        "seed": 1,
        "ignore_eos": True,
        "processors": [Remembers()],
    }
    plain = engine.generate(PROMPTS, **asked)
    assert all(len(set(result.token_ids)) > 4 for result in plain)
    laws.batch_equals_solo(Engine.generate, engine, PROMPTS, **asked)
    laws.cached_equals_naive(engine, PROMPTS, **asked)
    drafted = speculative(engine, PROMPTS, rule="coupled", num_draft=3, **asked)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    again = speculative(engine, PROMPTS, draft=engine, num_draft=2, rule="coupled", **asked)
    assert [result.token_ids for result in again] == [result.token_ids for result in plain]
    assert sum(result.accepted for result in again) > 0


def test_it_is_called_only_for_its_own_rows_and_runs_before_the_temperature(engine):
    seen = []

    def record(input_ids, scores):
        seen.append(scores.clone())
        return scores

    with_it, without = engine.generate(
        PROMPTS[:2],
        [
            SamplingParams(max_new_tokens=1, temperature=0.5, processors=[record]),
            SamplingParams(max_new_tokens=3),
        ],
        seed=1,
    )
    assert len(seen) == 1
    state = engine.prefill(PROMPTS[:1])
    torch.testing.assert_close(seen[0], state.logits, rtol=1e-4, atol=1e-4)
    assert with_it.token_ids
    assert without.token_ids


def test_a_wrong_shape_is_named():
    rows = Pipeline([lambda input_ids, scores: scores[:, :3]]).bind([None] * 2, [[0]] * 2, vocab_size=9)
    with pytest.raises(ParameterError, match=r"returned shape \(1, 3\)"):
        rows.apply(torch.zeros(2, 9), context(1))


class EndAfter(StoppingCriteria):
    def __init__(self, calls):
        self.calls = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        return torch.tensor([self.calls == 0])


@pytest.mark.parametrize(
    "wrap",
    [lambda rule: rule, lambda rule: [rule], compat.HFCriterion, lambda rule: StoppingCriteriaList([rule])],
)
def test_stopping_criteria_have_state_per_request(engine, wrap):
    rule = EndAfter(3)
    for _ in range(2):
        results = engine.generate(PROMPTS, max_new_tokens=9, ignore_eos=True, criteria=wrap(rule))
        assert [len(result.token_ids) for result in results] == [3, 3, 3]
        assert {(result.finish_reason, result.stop_reason) for result in results} == {("stop", "EndAfter")}
    assert rule.calls == 3


def test_criteria_of_every_kind_stand_side_by_side(engine, tokenizer):
    seen = []

    def theirs(input_ids, scores, **kwargs):
        seen.append((input_ids.tolist()[0], scores))
        return False

    def ours(progress):
        return "enough" if len(progress.token_ids) == 4 else None

    length = len(tokenizer.encode(PROMPTS[0]))
    asked = {"max_new_tokens": 9, "ignore_eos": True}
    result = engine.generate(PROMPTS[0], criteria=[theirs, ours], **asked)
    assert (len(result.token_ids), result.stop_reason) == (4, "enough")
    assert seen == [(result.prompt_token_ids + result.token_ids[:n], None) for n in (1, 2, 3, 4)]
    both = StoppingCriteriaList([EndAfter(7), MaxLengthCriteria(length + 2)])
    result = engine.generate(PROMPTS[0], criteria=[both, ours], **asked)
    assert (len(result.token_ids), result.stop_reason) == (2, "StoppingCriteriaList")
    spelled = dict(enumerate(tokenizer.convert_tokens_to_ids(list("newhats"))))
    stop = StopStringCriteria(tokenizer, "what")
    result = engine.generate(PROMPTS[0], criteria=stop, forced_tokens=spelled, **asked)
    assert (result.text, result.stop_reason) == ("newhat", "StopStringCriteria")


def test_streamers(engine, tokenizer, capsys):
    result = engine.generate(PROMPTS[0], max_new_tokens=8)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    same = compat.stream_to(streamer, engine.stream(PROMPTS[0], max_new_tokens=8), result.prompt_token_ids)
    assert same.token_ids == result.token_ids
    assert "".join(streamer) == tokenizer.decode(result.token_ids, skip_special_tokens=True)
    streamer = TextStreamer(tokenizer)
    with pytest.raises(CapabilityError, match="one text"):
        compat.stream_to(streamer, engine.stream(PROMPTS[:2], max_new_tokens=2))


def left_padded(tokenizer, prompts):
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.5, "min_new_tokens": 6},
        {"suppress_tokens": [5, 6, 7], "sequence_bias": [[[9], 1.5]]},
        {"bad_words_ids": [[8], [10, 11]], "return_dict_in_generate": True},
        {"logits_processor": LogitsProcessorList([Alternate()])},
        {"stopping_criteria": StoppingCriteriaList([EndAfter(4)])},
    ],
)
def test_custom_generate_equals_generate_greedily(model, tokenizer, settings):
    inputs = left_padded(tokenizer, PROMPTS[:1] if "stopping_criteria" in settings else PROMPTS)
    settings = {"max_new_tokens": 10, "do_sample": False, **settings}
    theirs = model.generate(**inputs, **copy.deepcopy(settings))
    ours = model.generate(**inputs, **settings, custom_generate=compat.as_custom_generate(slots=2))
    assert type(ours) is type(theirs)
    if settings.get("return_dict_in_generate"):
        ours, theirs = ours.sequences, theirs.sequences
    assert ours.tolist() == theirs.tolist()


def test_custom_generate_samples_repeatably_and_streams(model, tokenizer):
    inputs = left_padded(tokenizer, PROMPTS)
    run = compat.as_custom_generate()
    options = {
        "max_new_tokens": 6,
        "do_sample": True,
        "top_k": 20,
        "num_return_sequences": 2,
        "custom_generate": run,
    }
    torch.manual_seed(5)
    first = model.generate(**inputs, **options)
    assert first.shape[0] == 6
    assert first[0].tolist() != first[1].tolist()
    torch.manual_seed(5)
    assert torch.equal(model.generate(**inputs, **options), first)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = left_padded(tokenizer, PROMPTS[:1])
    run = compat.as_custom_generate(streamer=streamer)
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, custom_generate=run)
    assert "".join(streamer) == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_custom_generate_says_what_it_cannot_do(model, tokenizer):
    inputs, run = left_padded(tokenizer, PROMPTS), compat.as_custom_generate()
    with pytest.raises(CapabilityError, match="output_scores"):
        model.generate(
            **inputs, max_new_tokens=2, output_scores=True, return_dict_in_generate=True, custom_generate=run
        )
    with pytest.raises(ParameterError, match="asks for beam_search, classifier_free_guidance"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, guidance_scale=2.0, custom_generate=run)
    other = compat.as_custom_generate("dola")
    with pytest.raises(ParameterError, match="asks for beam_search, and strategy=dola"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, custom_generate=other)
    twice = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])
    with pytest.raises(ParameterError, match="RepetitionPenalty"):
        model.generate(
            **inputs, max_new_tokens=2, repetition_penalty=1.5, logits_processor=twice, custom_generate=run
        )


def test_a_processor_of_transformers_itself_runs_in_a_pipeline():
    x, ctx = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), context(1)
    rows = Pipeline([TemperatureLogitsWarper(0.5)]).bind([None] * 2, [[0]] * 2, vocab_size=9)
    torch.testing.assert_close(rows.apply(x, ctx), x / 0.5)


# Chains of the zoo's processors, each of which changes what the tiny model says.
LONG = ("GenLengthLogitsProcessor", {"boost_factor": 60.0})
SURE = (
    "PreventHallucinationLogitsProcessor",
    {"batch_size": 3, "minp": 1.1, "tolerate": 2, "phrase": "dog."},
)
ZOO = [
    [LONG],
    [("GenLengthLogitsProcessor", {"boost_factor": 900.0, "p": 3, "complete_sentences": True}), SURE],
    [("CiteFromPromptLogitsProcessor", {"boost_factor": 30.0})],
    [
        (
            "CiteFromPromptLogitsProcessor",
            {"boost_factor": -4.0, "boost_eos": False, "conditional_boost_factor": 90.0},
        )
    ],
    [LONG, ("ForceLastPhraseLogitsProcessor", {"phrase": "lazy dog.", "batch_size": 3})],
    [("MultipleChoiceLogitsProcessor", {"choices": ["a", "b", "c"]})],
    [("MultipleChoiceLogitsProcessor", {"choices": ["a", "b", "c"], "boost_first_words": 5.0})],
    [
        LONG,
        (
            "TriggerPhraseLogitsProcessor",
            {"phrase": "fox", "trigger_token_phrase": "</s>", "batch_size": 3, "trigger_count": 2},
        ),
    ],
    [
        SURE,
        (
            "TriggerPhraseLogitsProcessor",
            {"phrase": "fox", "trigger_token_phrase": ".", "batch_size": 3, "trigger_after": True},
        ),
    ],
    [("TriggerPhraseLogitsProcessor", {"phrase": "fox", "trigger_time": 1e-9, "batch_size": 3})],
    [SURE],
    [("MaxTimeLogitsProcessor", {"max_time": 1e-9})],
    [("MaxTimeLogitsProcessor", {"max_time": 1e-9, "boost_token_str": "x"})],
]
ASKED = [*PROMPTS[:2], "which?\na. fox\nb. dog\nc. new\nthe"]


def chain_of(module, chain, tokenizer):
    return [getattr(module, name)(tokenizer=tokenizer, **arguments) for name, arguments in chain]


def test_every_processor_of_the_zoo_is_tried():
    assert {name for chain in ZOO for name, _ in chain} == set(originals.__all__)
    assert set(dir(zoo)) >= set(originals.__all__)


@pytest.mark.parametrize("chain", ZOO, ids=lambda chain: "+".join(name[:8] for name, _ in chain))
def test_the_zoo_runs_unchanged_and_its_restatement_equals_it(engine, model, tokenizer, chain):
    expected, plain = [], []
    for prompt in ASKED:
        ids = torch.tensor([tokenizer.encode(prompt)])
        own = LogitsProcessorList(chain_of(originals, chain, tokenizer))
        out = model.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=own)
        expected.append(out[0, ids.shape[1] :].tolist())
        plain.append(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist())
    assert expected != plain
    options = {"max_new_tokens": 12, "skip_special_tokens": False}
    unchanged = engine.generate(ASKED, processors=chain_of(originals, chain, tokenizer), **options)
    assert [result.token_ids for result in unchanged] == expected
    ours = engine.generate(ASKED, processors=chain_of(zoo, chain, tokenizer), **options)
    assert [result.token_ids for result in ours] == expected


def test_the_zoo_at_rest_changes_nothing(engine, tokenizer):
    plain = engine.generate(ASKED, max_new_tokens=6)
    rule = zoo.MaxTimeLogitsProcessor(tokenizer, max_time=1e9)
    same = engine.generate(ASKED, max_new_tokens=6, processors=[rule])
    assert [result.token_ids for result in same] == [result.token_ids for result in plain]


def test_restated_forcing_is_exact_and_survives_excluded_tokens(tokenizer):
    rule = zoo.MultipleChoiceLogitsProcessor(tokenizer, choices=["a", "b"])
    x = torch.zeros(2, len(tokenizer))
    x[0, ::3] = -math.inf
    result = rule(x, context(1))
    allowed = {zoo.single_token(tokenizer, choice) for choice in "ab"}
    for row in range(2):
        assert set(result[row].isfinite().nonzero().flatten().tolist()) <= allowed
    assert not result.isnan().any()
    late = zoo.MaxTimeLogitsProcessor(tokenizer, max_time=-1.0)
    x[:, tokenizer.eos_token_id] = -math.inf
    assert late(x, context(1)).argmax(-1).tolist() == [tokenizer.eos_token_id] * 2


def test_zoo_arguments_that_make_no_sense(tokenizer):
    with pytest.raises(ParameterError, match="not one token"):
        zoo.MultipleChoiceLogitsProcessor(tokenizer, choices=["a whole sentence"])
    with pytest.raises(ParameterError, match="trigger_token_phrase or trigger_time"):
        zoo.TriggerPhraseLogitsProcessor(tokenizer, phrase="x")
