"""transformers' own interfaces on handloom's loop: processors, stopping criteria, streamers,
custom_generate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .errors import CapabilityError, HandloomError, ParameterError
from .loop.generation import Event, Generation
from .loop.stopping import HFCriterion
from .params.sampling_params import SamplingParams
from .pipeline.foreign.huggingface import HFProcessor
from .strategies import named
from .strategies.modes import Mode, mode

__all__ = ["HFCriterion", "HFProcessor", "as_custom_generate", "stream_to"]

RUN_AS_CRITERIA = ("max_time", "stop_strings")  # fields for which `generate` has prepared a criterion
WATERMARKS = ("WatermarkLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
GUIDANCE = "UnbatchedClassifierFreeGuidanceLogitsProcessor"
ROWS = ("attention_mask", "inputs_embeds")  # what `unpadded` reads beside the ids
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def stream_to(
    streamer: Any, events: Iterable[Event], prompt_token_ids: Iterable[int] | None = None
) -> Generation | None:
    """Feed a Hugging Face streamer (`put`, `end`) from `Engine.stream` of one prompt; returns the Generation.

    prompt_token_ids: put first, as `generate` does; leave it out to stream the answer alone. Raises
    CapabilityError when the events belong to more than one sample: streamers know a single text.
    """
    if prompt_token_ids is not None:
        streamer.put(torch.tensor([list(prompt_token_ids)]))
    found, owner, begun = None, None, False
    try:
        for event in events:
            owner = owner or (event.request, event.sample)
            if owner != (event.request, event.sample):
                raise CapabilityError("a streamer takes one text; stream one prompt with n=1")
            if event.token_id is not None:
                streamer.put(torch.tensor([event.token_id]))
                begun = True
            elif event.generation is not None and not begun:  # a strategy that tells it whole
                streamer.put(torch.tensor(event.generation.token_ids))
            found = event.generation or found
    finally:
        streamer.end()
    return found


def as_custom_generate(
    strategy: Callable[..., Any] | str | None = None,
    *,
    tokenizer: Any = None,
    streamer: Any = None,
    assistant_model: Any = None,
    **engine_options: Any,
) -> Callable[..., Any]:
    """A function for `model.generate(..., custom_generate=...)` that decodes on handloom's loop.

    strategy: called as `strategy(engine, prompts, params)`, or the name of one of `handloom.strategies`; None is the
    one that the generation config asks for (beams of every kind, contrastive search, DoLa, guidance, drafts), else
    `Engine.generate`. tokenizer, streamer, assistant_model: given here, because transformers 5.23 hands none of them
    to a function. engine_options: arguments of `Engine`, such as slots.

    The generation config is read onto the `hf` profile; the logits processors and stopping criteria that were
    passed to `generate` run at their place, called with one row without padding at a time. Sampling seeds come
    from torch's global generator, so `set_seed` makes runs repeatable; the draws differ from
    `torch.multinomial`'s. What runs is in evaluation mode, the model stays in the mode it is in. Raises
    ParameterError for two strategies at once, CapabilityError for outputs that the loop does not keep, and
    HandloomError where rows ended in error; its `results` holds all that was generated.
    """
    strategy = named(strategy) if isinstance(strategy, str) else strategy
    held: list[Engine] = []  # the engine of the last model, and that of its assistant

    def engine_of(model) -> Engine:
        if not held or held[0].model is not model:
            held[:] = [Engine(model, tokenizer, **engine_options)]
            held.extend([Engine(assistant_model)] if assistant_model is not None else [])
        return held[0]

    def custom_generate(
        model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs
    ):
        wanted = [name for name in UNSUPPORTED_OUTPUTS if getattr(generation_config, name, None)]
        if wanted:
            raise CapabilityError(
                f"{', '.join(wanted)}: this loop keeps no such tensors; use SamplingParams(logprobs=n)"
            )
        engine = engine_of(model)
        prepared, config, negative = without_guidance(logits_processor or [], generation_config)
        settings = {name: value for name, value in vars(generation_config).items() if name[0] != "_"}
        settings |= {"assistant_model": held[1] if held[1:] else None, "negative_prompt_ids": negative}
        settings = {name: value for name, value in settings.items() if value is not None}
        asked, options, settings = mode(engine, settings)
        if strategy not in (None, asked) and asked is not Engine.generate:
            raise ParameterError(
                f"the config asks for {asked.__name__}, and strategy={strategy.__name__}: set one of them"
            )
        if "num_beams" in options:  # `generate` has repeated the rows for beams, which fork here
            input_ids = input_ids[:: options["num_beams"]]
            kwargs = kwargs | {
                name: kwargs[name][:: options["num_beams"]] for name in ROWS if kwargs.get(name) is not None
            }
        own = own_processors(model, config, prepared, input_ids, kwargs)
        params = params_of(settings, input_ids.shape[1], own, stopping_criteria or [])
        prompts = unpadded(input_ids, kwargs)
        if options.get("negative_prompts"):  # one for each prompt, whose samples are rows already
            samples = len(prompts) // len(options["negative_prompts"])
            options["negative_prompts"] = [n for n in options["negative_prompts"] for _ in range(samples)]
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        run = Mode(engine, strategy or asked, [params.replace(seed=seed) for seed in seeds], options)
        if streamer is not None:
            results = [stream_to(streamer, run.events(prompts), input_ids[0].tolist())]
        else:
            results = run.strategy(engine, prompts, run.params, **options)
        results = results if isinstance(results, list) else [results]
        input_ids = input_ids.repeat_interleave(len(results) // len(input_ids), 0)
        return padded_output(input_ids, whole(results), generation_config)

    return custom_generate


def without_guidance(prepared: Iterable[Any], config: Any) -> tuple[list[Any], Any, list[list[int]] | None]:
    """The processors and the config without classifier-free guidance, which is a strategy here, and its prompts."""
    prepared, negative = list(prepared), None
    if config.guidance_scale in (None, 1):
        return prepared, config, None
    config = copy.copy(config)
    config.guidance_scale = None
    place = next(i for i, rule in enumerate(prepared) if type(rule).__name__ == GUIDANCE)
    context = prepared.pop(place).unconditional_context
    if (ids := context["input_ids"]) is not None:
        negative = unpadded(ids, context)
    return prepared, config, negative


def whole(results: list[Generation]) -> list[Generation]:
    """The results, or a HandloomError with them where rows ended in error: ids alone would not tell."""
    failed = [f"row {i}: {r.error}" for i, r in enumerate(results) if r.finish_reason == "error"]
    if failed:
        error = HandloomError(f"{len(failed)} of {len(results)} rows ended in error; {'; '.join(failed)}")
        error.results = results
        raise error
    return results


def own_processors(
    model: Any, config: Any, prepared: Iterable[Any], input_ids: Tensor, model_kwargs: dict[str, Any]
) -> list[Any]:
    """Those of transformers' prepared processors that do not follow from the generation config."""
    prepared = list(prepared)
    standard = list(
        model._get_logits_processor(
            config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            device=input_ids.device,
            model_kwargs=model_kwargs,
        )
    )
    if config.watermarking_config is not None:  # the last of its kind; it holds a generator, and is made anew
        for chain in (prepared, standard):
            chain.pop(max(i for i, rule in enumerate(chain) if type(rule).__name__ in WATERMARKS))
    own = []
    for processor in prepared:
        twin = next((i for i, other in enumerate(standard) if same_processor(processor, other)), None)
        if twin is None:
            own.append(processor)
        else:
            standard.pop(twin)
    if standard:
        names = ", ".join(type(processor).__name__ for processor in standard)
        raise ParameterError(
            f"logits_processor replaces {names}, which the config asks for too; set one of them"
        )
    return [padding_seen(rule, input_ids, model_kwargs.get("attention_mask")) for rule in own]


def same_processor(one: Any, other: Any) -> bool:
    """True when two processors are of one type and hold equal values."""
    if type(one) is not type(other) or vars(one).keys() != vars(other).keys():
        return False
    pairs = [(value, vars(other)[name]) for name, value in vars(one).items()]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs
    )


def params_of(
    settings: dict[str, Any], prompt_length: int, own: list[Any], criteria: Iterable[Any]
) -> SamplingParams:
    """Parameters of one row, from transformers' prepared settings, processors and criteria."""
    for name in (*RUN_AS_CRITERIA, "num_return_sequences"):  # the rows have been repeated already
        settings.pop(name, None)
    ends = [token for token in iter_ids(settings.pop("eos_token_id", None)) if token >= 0]
    lengths, criteria, replaced = split_criteria(criteria, ends)
    longest = settings.pop("max_length")
    most, last = max(1, min(lengths, default=longest) - prompt_length), longest - prompt_length
    least = max(settings.pop("min_length", 0) - prompt_length, settings.get("min_new_tokens", 0))
    settings |= {"max_new_tokens": most, "min_new_tokens": min(least, most)}
    forced = forced_tokens(settings, prompt_length, last - 1)
    settings = {name: value for name, value in settings.items() if value is not False or name == "do_sample"}
    asked = next((rule for rule in own if type(rule).__name__ == "PrefixConstrainedLogitsProcessor"), None)
    return SamplingParams.from_generation_config(
        settings,
        processors=[rule for rule in own if rule is not asked],
        prefix_allowed_tokens_fn=None if asked is None else asked._prefix_allowed_tokens_fn,
        criteria=criteria,
        eos_token_ids=ends,
        ignore_eos=replaced,
        forced_tokens=forced,
        skip_special_tokens=False,
    )


def split_criteria(criteria: Iterable[Any], ends: list[int]) -> tuple[list[int], list[Any], bool]:
    """The lengths that end a row, the criteria to run, and whether one of them stands in for the config's EOS."""
    lengths, others, replaced = [], [], bool(ends)
    for rule in criteria:
        kind = type(rule).__name__
        if kind == "MaxLengthCriteria":
            lengths.append(rule.max_length)
        elif kind == "EosTokenCriteria" and set(rule.eos_token_id.tolist()) == set(ends):
            replaced = False
        else:
            others.append(rule)
    return lengths, others, replaced


def forced_tokens(settings: dict[str, Any], prompt_length: int, last: int) -> dict[int, int]:
    """`forced_tokens` from the fields for BOS, forced behind a prompt of one token, and for EOS, at position `last`."""
    first = settings.pop("forced_bos_token_id", None)
    ends = list(iter_ids(settings.pop("forced_eos_token_id", None)))
    if len(ends) > 1:
        raise ParameterError(f"forced_eos_token_id={ends}: one token can be forced, not a choice of several")
    forced = {0: first} if first is not None and prompt_length == 1 else {}
    return forced | ({last: ends[0]} if ends else {})


def padding_seen(rule: Any, input_ids: Tensor, mask: Tensor | None) -> Any:
    """A rule that counts positions or shows ids with the padding in front, for rows that have none here."""
    if mask is None:
        return rule
    pads, own = (mask == 0).sum(1).cpu(), copy.copy(rule)
    if type(rule).__name__ == "PrefixConstrainedLogitsProcessor":
        asked = rule._prefix_allowed_tokens_fn

        def with_padding(row: int, ids: Tensor) -> Any:
            return asked(row, torch.cat([input_ids[row, : pads[row]].to(ids.device), ids]))

        own._prefix_allowed_tokens_fn = with_padding
    elif type(rule).__name__ == "RepetitionPenaltyLogitsProcessor" and rule.prompt_ignore_length is not None:
        own.prompt_ignore_length = (torch.as_tensor(rule.prompt_ignore_length).cpu() - pads).clamp(min=0)
    else:
        return rule
    return own


def unpadded(input_ids: Tensor, kwargs: dict[str, Any]) -> list[Any]:
    """The prompts without their padding: lists of ids, or [T, D] embeddings."""
    mask, embeddings = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    rows = input_ids if embeddings is None else embeddings
    keep = torch.ones(rows.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    picked = [row[chosen.to(row.device)] for row, chosen in zip(rows, keep, strict=True)]
    return [row.tolist() for row in picked] if embeddings is None else picked


def padded_output(input_ids: Tensor, results: list[Generation], config: Any) -> Any:
    """What `generate` returns: ids [B, T + new], padded on the right, or its output class."""
    pad = config.pad_token_id
    if pad is None:
        pad = next(iter_ids(config.eos_token_id), 0)
    longest = max((len(result.token_ids) for result in results), default=0)
    new = [[*result.token_ids, *[pad] * (longest - len(result.token_ids))] for result in results]
    sequences = torch.cat(
        [input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1
    )
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


def iter_ids(ids: int | Iterable[int] | None) -> Iterator[int]:
    """A config's token ids, which may be one, several or None."""
    return iter(()) if ids is None else iter([ids] if isinstance(ids, int) else ids)
