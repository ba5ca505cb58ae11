"""`custom_generate` and `Engine.generate` against transformers' own `generate`, where a batch has more than one row."""

import copy

import pytest
import torch
from tiny_tokenizers import byte_level
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)

from handloom.compat import as_custom_generate
from handloom.engine import Engine
from handloom.errors import HandloomError, ParameterError
from handloom.strategies import beam_search, named

TOKENIZER = byte_level()
PROMPTS = ["the quick brown fox", "Stop here, then", "lazy dog. new lines and spaces"]
ENDS = [76, 264]  # tokens that the model says early


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    ids = {name: getattr(TOKENIZER, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), **ids, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, TOKENIZER, slots=2)


def padded(prompts=PROMPTS):
    rows = [TOKENIZER.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = [[TOKENIZER.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


WIDTH = padded()["input_ids"].shape[1]
PAIRS = torch.tensor([[76, 76], [88, 88], [29, 29]])  # that the model says


def own_of_each_row(row, ids):
    return [10 + row, 20 + len(ids) % 7, 30 + 3 * row]


class RowBias(LogitsProcessor):
    """A bias for each row of the batch."""

    def __init__(self):
        self.bias = 9 * torch.randn(3, len(TOKENIZER), generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids, scores):
        return scores + self.bias


class RowTokens(LogitsProcessor):
    """Forces the n-th tokens of its row, from a table that cannot be broadcast; `for_row` gives a row's part."""

    def __init__(self, table):
        self.table = table

    def for_row(self, number):
        return RowTokens(self.table[number : number + 1])

    def __call__(self, input_ids, scores):
        tokens = self.table[:, input_ids.shape[1] % self.table.shape[1]]
        return scores.index_put((torch.arange(len(scores)), tokens), torch.tensor(1e3))


def guidance(model):
    rows = torch.tensor([[40, 41], [50, 51], [60, 61]])
    return UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, model, unconditional_ids=rows)


def processors(*rules):
    return {"logits_processor": LogitsProcessorList(rules)}


def criteria(*rules):
    return {"stopping_criteria": StoppingCriteriaList(rules)}


LIKE_GENERATE = {
    "prefix function": {"prefix_allowed_tokens_fn": own_of_each_row},
    "prefix processor": processors(PrefixConstrainedLogitsProcessor(own_of_each_row, 1)),
    "prefix of what is excluded": {
        "prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 12],
        "bad_words_ids": [[10], [11], [12]],
    },
    "shorter than the config": criteria(MaxLengthCriteria(WIDTH + 4)),
    "longer than the config": criteria(MaxLengthCriteria(WIDTH + 15)),
    "ends of its own": criteria(EosTokenCriteria([88, 68, 280])),
    "stop strings of its own": criteria(StopStringCriteria(TOKENIZER, ["a", "o"])),
    "time of its own": criteria(MaxTimeCriteria(0.0)),
    "the config's ends": {"eos_token_id": ENDS},
    "no end so early": {"eos_token_id": ENDS, "min_new_tokens": 4},
    "decay of the config's ends": {"eos_token_id": ENDS, "exponential_decay_length_penalty": (2, 1.8)},
    "bad words that are ends": {
        "eos_token_id": [88],
        "bad_words_ids": [[88], [280], [TOKENIZER.eos_token_id]],
    },
    "green list by the last token": {"watermarking_config": WatermarkingConfig(bias=8.0)},
    "green list by itself": {
        "watermarking_config": WatermarkingConfig(bias=8.0, seeding_scheme="selfhash", context_width=2)
    },
    "SynthID": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4, 5])},
    "forced BOS behind many tokens": {"forced_bos_token_id": 9},
    "forced EOS": {"forced_eos_token_id": 9},
    "penalty behind the prompt": processors(
        RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=WIDTH)
    ),
    "penalty behind a part of each prompt": processors(
        RepetitionPenaltyLogitsProcessor(3.0, prompt_ignore_length=torch.tensor([WIDTH, 0, WIDTH - 3]))
    ),
    "penalty of the prompts": processors(EncoderRepetitionPenaltyLogitsProcessor(1.9, padded()["input_ids"])),
    "n-grams of the prompts": processors(
        EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([[76, 76], [88, 88], [29, 29]]))
    ),
    "a bias for each row": processors(RowBias()),
}


@pytest.mark.parametrize("name", LIKE_GENERATE)
def test_custom_generate_equals_generate(model, name):
    settings = {"max_new_tokens": 10, "do_sample": False, **LIKE_GENERATE[name]}
    theirs = model.generate(**padded(), **copy.copy(settings))
    ours = model.generate(**padded(), **settings, custom_generate=as_custom_generate(slots=2))
    assert ours.tolist() == theirs.tolist()
    plain = model.generate(**padded(), max_new_tokens=10, do_sample=False)
    assert (ours.tolist() == plain.tolist()) == (name == "forced BOS behind many tokens")


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "eos_token_id": ENDS},
    "beams of what a row may say": {"num_beams": 2, "prefix_allowed_tokens_fn": own_of_each_row},
    "guidance": {"guidance_scale": 2.5, "repetition_penalty": 1.5},
    "guidance from texts": {
        "guidance_scale": 2.5,
        "negative_prompt_ids": torch.tensor([[40, 41], [50, 51], [60, 61]]),
    },
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_of_the_config_equals_generate(model, name):
    settings = {"max_new_tokens": 8, "do_sample": False, **MODES[name]}
    theirs = model.generate(**padded(), **copy.copy(settings))
    ours = model.generate(**padded(), **settings, custom_generate=as_custom_generate(slots=2))
    assert ours.tolist() == theirs.tolist()
    assert ours.tolist() != model.generate(**padded(), max_new_tokens=8, do_sample=False).tolist()


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {}], ids=str
)
def test_drafts_for_a_batch_which_generate_takes_one_by_one(model, settings):
    """Greedy tokens stay; transformers refuses a batch here."""
    plain = model.generate(**padded(), max_new_tokens=8, do_sample=False)
    assistant = None if settings else copy.deepcopy(model)
    run = as_custom_generate(assistant_model=assistant)
    ours = model.generate(**padded(), max_new_tokens=8, do_sample=False, **settings, custom_generate=run)
    assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("settings", "name", "options"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search", {"alpha": 0.6, "k": 4}),
        ({"dola_layers": [0, 1]}, "dola", {"layers": [0, 1], "rule": "code"}),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "diverse_beam_search",
         {"num_beams": 4, "diversity_penalty": 1.0}),
        ({"num_beams": 3, "force_words_ids": [[30, 31]]}, "constrained_beam_search",
         {"num_beams": 3, "constraints": [[30, 31]]}),
        ({}, "frustratingly_simple", {}),
    ],
)  # fmt: skip
def test_modes_that_transformers_left_run_by_their_fields_or_by_name(engine, model, settings, name, options):
    direct = named(name)(engine, PROMPTS, max_new_tokens=6, **options)
    for run in (as_custom_generate(None if settings else name), as_custom_generate(name)):
        ours = model.generate(**padded(), max_new_tokens=6, do_sample=False, **settings, custom_generate=run)
        assert [
            row[:end] for row, end in zip(ours[:, WIDTH:].tolist(), (r.n_new for r in direct), strict=True)
        ] == [r.token_ids for r in direct]


def test_a_streamer_gets_a_strategys_tokens(model):
    """Token by token where the strategy streams, else together when they are there."""
    ids = padded(PROMPTS[:1])["input_ids"]
    for settings, puts in (({"guidance_scale": 2.0}, 6), ({"num_beams": 2}, 2)):
        told = Puts()
        run = as_custom_generate(streamer=told)
        out = model.generate(ids, max_new_tokens=5, do_sample=False, **settings, custom_generate=run)
        assert [token for each in told.values for token in each] == out[0].tolist()
        assert len(told.values) == puts


class Puts:
    """A streamer that remembers."""

    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        pass


def test_guidance_with_a_text_for_each_row(model):
    settings = {"max_new_tokens": 8, "do_sample": False}
    theirs = model.generate(**padded(), **processors(guidance(model)), **settings)
    ours = model.generate(
        **padded(), **processors(guidance(model)), **settings, custom_generate=as_custom_generate(slots=2)
    )
    assert ours.tolist() == theirs.tolist()


def test_forced_bos_behind_a_single_token(model):
    settings = {"max_new_tokens": 5, "do_sample": False, "forced_bos_token_id": 9}
    ids = torch.tensor([[50], [60]])
    theirs = model.generate(ids, **settings)
    assert theirs[:, 1].tolist() == [9, 9]
    assert model.generate(ids, **settings, custom_generate=as_custom_generate()).tolist() == theirs.tolist()


def alone(model, prompt, **settings):
    ids = torch.tensor([TOKENIZER.encode(prompt)])
    return model.generate(ids, do_sample=False, **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("wrapped", [False, True])
def test_engine_generate_tells_the_row_under_transformers_name(engine, wrapped):
    own = {"prefix_allowed_tokens_fn": own_of_each_row}
    if wrapped:
        own = {"processors": PrefixConstrainedLogitsProcessor(own_of_each_row, 1)}
    results = engine.generate(PROMPTS, max_new_tokens=6, n=2, temperature=1.0, seed=1, ignore_eos=True, **own)
    assert len(results) == 6
    for row, result in enumerate(results):
        assert {10 + row, 30 + 3 * row} & set(result.token_ids)
        assert set(result.token_ids) <= {10 + row, 30 + 3 * row, *range(20, 27)}
    beams = beam_search(engine, PROMPTS, num_beams=2, max_new_tokens=6, ignore_eos=True, **own)
    assert [set(b.token_ids) <= {10 + i, 30 + 3 * i, *range(20, 27)} for i, b in enumerate(beams)] == [
        True
    ] * 3
    asked = []
    engine.generate(PROMPTS, max_new_tokens=1, prefix_fn=lambda sample, ids: asked.append(sample) or [5])
    assert set(asked) == {0}  # under its own name it is told the sample


def test_a_processor_gives_a_row_its_own_part(engine):
    table = torch.tensor([[11, 12], [21, 22], [31, 32]])
    results = engine.generate(PROMPTS, max_new_tokens=4, processors=[RowTokens(table)])
    assert [set(result.token_ids) for result in results] == [{11, 12}, {21, 22}, {31, 32}]
    assert results[0].params.to_dict()["processors"] == ["RowTokens"]


def test_a_part_for_too_few_rows_is_named(engine):
    rule = EncoderRepetitionPenaltyLogitsProcessor(1.9, torch.tensor([[5, 6], [7, 8]]))
    with pytest.raises(ParameterError, match=r"EncoderRepetitionPenalty.* 2 rows; there is a row 2"):
        engine.generate(PROMPTS, processors=[rule])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, settings in LIKE_GENERATE.items()
        if not {"logits_processor", "stopping_criteria"} & {*settings}
    ],
)
def test_a_config_of_ends_or_a_watermark_reads_the_same_in_engine_generate(engine, model, name):
    settings = dict(LIKE_GENERATE[name])
    row_function = settings.pop("prefix_allowed_tokens_fn", None)
    if any(key.startswith("forced") for key in settings):
        with pytest.raises(ParameterError, match="forced_tokens="):
            engine.generate(PROMPTS, GenerationConfig(**settings))
        return
    config = GenerationConfig(max_new_tokens=10, pad_token_id=TOKENIZER.pad_token_id, **settings)
    mine = engine.generate(PROMPTS, config, prefix_allowed_tokens_fn=row_function)
    for row, (prompt, result) in enumerate(zip(PROMPTS, mine, strict=True)):
        own = None if row_function is None else lambda _, ids, row=row: row_function(row, ids)
        theirs = alone(model, prompt, generation_config=config, prefix_allowed_tokens_fn=own)
        assert result.token_ids == theirs
        if result.token_ids[-1] in (settings.get("eos_token_id") or ()):
            assert (result.finish_reason, result.stop_reason) == ("eos", result.token_ids[-1])


def test_transformers_detects_the_watermark_that_is_made_here(engine):
    from transformers import WatermarkDetector

    config = WatermarkingConfig(bias=6.0)
    detector = WatermarkDetector(engine.model.config, device="cpu", watermarking_config=config)
    asked = {"max_new_tokens": 60, "temperature": 2.0, "seed": 3, "ignore_eos": True}
    marked = engine.generate(PROMPTS[0], watermarking_config=config, **asked)
    plain = engine.generate(PROMPTS[0], **asked)
    scores = [detector(torch.tensor([r.token_ids]), return_dict=True).z_score[0] for r in (marked, plain)]
    assert scores[0] > 6
    assert abs(scores[1]) < 3


@pytest.mark.parametrize("training", [True, False])
def test_custom_generate_leaves_the_model_in_its_mode(model, training):
    other = copy.deepcopy(model).train(training)
    other.transformer.h[0].train(not training)
    before = [module.training for module in other.modules()]
    run = as_custom_generate()
    for _ in range(2):
        other.generate(**padded(), max_new_tokens=2, do_sample=False, custom_generate=run)
        assert [module.training for module in other.modules()] == before
    with pytest.raises(ParameterError):
        other.generate(**padded(), max_new_tokens=2, num_beams=2, guidance_scale=2.0, custom_generate=run)
    assert [module.training for module in other.modules()] == before


def test_rows_that_end_in_error_are_told_with_all_that_was_generated(model):
    def broken(row, ids):
        if row == 1 and len(ids) > WIDTH + 1:
            raise KeyError("no such state")
        return [40 + row]

    with pytest.raises(
        HandloomError, match=r"1 of 3 rows ended in error; row 1: .*KeyError.*no such state"
    ) as told:
        model.generate(
            **padded(), max_new_tokens=4, do_sample=False, prefix_allowed_tokens_fn=broken,
            custom_generate=as_custom_generate(),
        )  # fmt: skip
    assert [result.token_ids for result in told.value.results] == [[40] * 4, [41] * 2, [42] * 4]
