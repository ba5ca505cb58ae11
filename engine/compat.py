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

__all__ = ["HFCriterion", "HFProcessor", "as_custom_generate", "stream_to"]

RUN_AS_CRITERIA = ("max_time", "stop_strings")  # fields for which `generate` has prepared a criterion
WATERMARKS = ("WatermarkLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def stream_to(
    streamer: Any, events: Iterable[Event], prompt_token_ids: Iterable[int] | None = None
) -> Generation:
    """Feed a Hugging Face streamer (`put`, `end`) from `Engine.stream` of one prompt; returns the Generation.

    prompt_token_ids: put first, as `generate` does; leave it out to stream the answer alone. Raises
    CapabilityError when the events belong to more than one sample: streamers know a single text.
    """
    if prompt_token_ids is not None:
        streamer.put(torch.tensor([list(prompt_token_ids)]))
    found, owner = None, None
    try:
        for event in events:
            owner = owner or (event.request, event.sample)
            if owner != (event.request, event.sample):
                raise CapabilityError("a streamer takes one text; stream one prompt with n=1")
            if event.token_id is not None:
                streamer.put(torch.tensor([event.token_id]))
            found = event.generation or found
    finally:
        streamer.end()
    return found


def as_custom_generate(
    strategy: Callable[..., Any] | None = None,
    *,
    tokenizer: Any = None,
    streamer: Any = None,
    **engine_options: Any,
) -> Callable[..., Any]:
    """A function for `model.generate(..., custom_generate=...)` that decodes on handloom's loop.

    strategy: called as `strategy(engine, prompts, params)`; None is `Engine.generate`. tokenizer, streamer:
    given here, because transformers 5.23 hands neither to a function. engine_options: arguments of `Engine`,
    such as slots.

    The generation config is read onto the `hf` profile; the logits processors and stopping criteria that were
    passed to `generate` run at their place, called with one row without padding at a time. Sampling seeds come
    from torch's global generator, so `set_seed` makes runs repeatable; the draws differ from
    `torch.multinomial`'s. What runs is in evaluation mode, the model stays in the mode it is in. Raises
    ParameterError for what the loop does in another way (beams, guidance), CapabilityError for outputs it does
    not keep, and HandloomError where rows ended in error; its `results` holds all that was generated.
    """
    held: list[Engine] = []  # the engine of the last model

    def custom_generate(
        model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs
    ):
        wanted = [name for name in UNSUPPORTED_OUTPUTS if getattr(generation_config, name, None)]
        if wanted:
            raise CapabilityError(
                f"{', '.join(wanted)}: this loop keeps no such tensors; use SamplingParams(logprobs=n)"
            )
        if not held or held[0].model is not model:
            held[:] = [Engine(model, tokenizer, **engine_options)]
        own = own_processors(model, generation_config, logits_processor or [], input_ids, kwargs)
        params = params_of(generation_config, input_ids.shape[1], own, stopping_criteria or [])
        prompts = unpadded(input_ids, kwargs)
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        requests = [params.replace(seed=seed) for seed in seeds]
        if streamer is not None:
            results = [stream_to(streamer, held[0].stream(prompts, requests), input_ids[0].tolist())]
        else:
            results = (strategy or Engine.generate)(held[0], prompts, requests)
        results = results if isinstance(results, list) else [results]
        return padded_output(input_ids, whole(results), generation_config)

    return custom_generate


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


def params_of(config: Any, prompt_length: int, own: list[Any], criteria: Iterable[Any]) -> SamplingParams:
    """Parameters of one row, from transformers' prepared generation config, processors and criteria."""
    settings = {name: value for name, value in vars(config).items() if value is not None and name[0] != "_"}
    for name in (*RUN_AS_CRITERIA, "num_return_sequences"):  # the rows have been repeated already
        settings.pop(name, None)
    ends = [token for token in iter_ids(settings.pop("eos_token_id", None)) if token >= 0]
    lengths, criteria, replaced = split_criteria(criteria, ends)
    last = settings.pop("max_length") - prompt_length
    most = max(1, min(lengths, default=config.max_length) - prompt_length)
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
