"""transformers' own interfaces on handloom's loop: processors, stopping criteria, streamers,
custom_generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..errors import CapabilityError, ParameterError
from ..loop.generation import Event, Generation
from ..loop.stopping import HFCriterion
from ..params.sampling_params import SamplingParams
from ..pipeline.foreign.huggingface import HFProcessor

__all__ = ["HFCriterion", "HFProcessor", "as_custom_generate", "stream_to"]

NATIVE_CRITERIA = {"MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria"}
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
    passed to `generate` run at their place. Sampling seeds come from torch's global generator, so `set_seed`
    makes runs repeatable; the draws differ from `torch.multinomial`'s. Raises ParameterError for what the
    loop does in another way (beams, guidance), CapabilityError for outputs it does not keep.
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
        engine = held[0]
        own = own_processors(model, generation_config, logits_processor or [], input_ids, kwargs)
        params = params_of(generation_config, input_ids.shape[1], own, stopping_criteria or [], engine)
        prompts = unpadded(input_ids, kwargs)
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        requests = [params.replace(seed=seed) for seed in seeds]
        if streamer is not None:
            results = [stream_to(streamer, engine.stream(prompts, requests), input_ids[0].tolist())]
        else:
            results = (strategy or Engine.generate)(engine, prompts, requests)
        results = results if isinstance(results, list) else [results]
        return padded_output(input_ids, results, generation_config)

    return custom_generate


def own_processors(
    model: Any, config: Any, prepared: Iterable[Any], input_ids: Tensor, model_kwargs: dict[str, Any]
) -> list[Any]:
    """Those of transformers' prepared processors that do not follow from the generation config."""
    standard = list(
        model._get_logits_processor(
            config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            device=input_ids.device,
            model_kwargs=model_kwargs,
        )
    )
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
    return own


def same_processor(one: Any, other: Any) -> bool:
    """True when two processors are of one type and hold equal values."""
    if type(one) is not type(other) or vars(one).keys() != vars(other).keys():
        return False
    pairs = [(value, vars(other)[name]) for name, value in vars(one).items()]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs
    )


def params_of(
    config: Any, prompt_length: int, own: list[Any], criteria: Iterable[Any], engine: Engine
) -> SamplingParams:
    """Parameters of one row, from transformers' prepared generation config."""
    settings = {name: value for name, value in vars(config).items() if value is not None and name[0] != "_"}
    least = settings.pop("min_length", 0) - prompt_length
    settings["min_new_tokens"] = max(least, settings.get("min_new_tokens", 0))
    settings["max_new_tokens"] = settings.pop("max_length") - prompt_length
    settings.pop("num_return_sequences", None)  # the rows have been repeated already
    settings = {name: value for name, value in settings.items() if value is not False or name == "do_sample"}
    ends = set(iter_ids(settings.pop("eos_token_id", None)))
    known = ends >= engine.eos_token_ids  # else the config narrows what ends a text
    return SamplingParams.from_generation_config(
        settings,
        processors=own,
        criteria=[rule for rule in criteria if type(rule).__name__ not in NATIVE_CRITERIA],
        stop_token_ids=sorted(ends - engine.eos_token_ids if known else ends),
        ignore_eos=not known,
        skip_special_tokens=False,
    )


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
