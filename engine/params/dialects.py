"""Dialects: how each engine spells its parameters, and what it makes of those that mean something only together.

Semantics follow transformers 5.23, vLLM's SamplingParams, llama.cpp's server, text-generation-webui and
OpenAI's API. A reader takes what is written and nothing more: no engine's default filter (top_k=50,
min_p=0.05 ...) is added. Only the mode has to come from somewhere: where the dialect samples by
default, an absent temperature means that engine's.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import ParameterError
from .aliases import (
    ALIASES,
    ELSEWHERE,
    SPECIAL,
    UNLIMITED,
    Values,
    divided,
    not_below_zero,
    replaced,
    sequences,
    target_or_off,
    tiny_if_zero,
)
from .checks import scalar, to_bool, to_float, to_int

Finish = Callable[[Values, Values, Mapping[str, Any]], None]  # (values, special, base): completes values


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one engine spells its parameters.

    profile: the pipeline profile that parameters read in this dialect ask for; aliases: spellings that
    mean something else here than in `ALIASES`; special: spellings that only `finish` can read; ignored:
    names that do not concern decoding (prompt, transport, caching); finish: completes the values from
    the special ones.
    """

    name: str
    finish: Finish
    profile: str | None = None
    aliases: Mapping[str, str | tuple[str, Callable[[str, Any], Any]]] = dataclasses.field(
        default_factory=dict
    )
    special: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    def knows(self, spelling: str, fields: Collection[str]) -> bool:
        """Whether a name is a field, an alias, or one that is deliberately ignored or refused."""
        tables = (fields, ALIASES, self.aliases, SPECIAL, self.special, self.ignored, ELSEWHERE)
        return any(spelling in table for table in tables)


def _finish_handloom(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """Strict: what contradicts is an error."""
    _dynamic_temperature(values, special)
    _one_of_best(values, special, base)
    if "do_sample" not in special:
        return
    given = values.get("temperature")
    if not to_bool("do_sample", special["do_sample"]):
        if given:
            raise ParameterError(
                f"do_sample=False asks for greedy decoding, temperature={given} for sampling"
            )
        values["temperature"] = 0.0
    elif given == 0.0:
        raise ParameterError("do_sample=True asks for sampling, temperature=0 for greedy decoding")
    elif given is None:
        values["temperature"] = base.get("temperature") or 1.0


def _finish_hf(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """transformers: `do_sample` alone sets the mode, and max_new_tokens takes precedence over max_length."""
    if values.get("max_new_tokens") is not None:
        values.pop("max_length", None)
    elif values.get("max_length") is not None:
        values["max_new_tokens"] = UNLIMITED
    if values.get("top_h"):
        values.setdefault("top_h_rule", "code")
    _do_sample_decides(values, special, default=False)
    _one_of_best(values, special, base)


def _finish_vllm(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """vLLM and OpenAI's completions: sampling at temperature 1 is the default."""
    _default_temperature(values, special, 1.0)
    _finish_handloom(values, special, base)


def _finish_openai(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """OpenAI: chat has logprobs (bool) and top_logprobs (count), completions have logprobs (count)."""
    top, asked = special.get("top_logprobs"), scalar(special.get("logprobs"))
    top = None if top is None else to_int("top_logprobs", top, 0)
    if isinstance(asked, bool):
        if not asked and top:
            raise ParameterError(f"top_logprobs={top} needs logprobs=True")
        values["logprobs"] = (top or 0) if asked else None
    elif asked is not None or top is not None:
        asked = None if asked is None else to_int("logprobs", asked, 0, wanted="True, False, or a count")
        if None not in (asked, top) and asked != top:
            raise ParameterError(
                f"logprobs={asked} and top_logprobs={top} both set logprobs, to different values"
            )
        values["logprobs"] = top if asked is None else asked
    _finish_vllm(values, special, base)


def _finish_llamacpp(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """llama.cpp: a window of 0 switches the penalty off, and penalties count the prompt."""
    for spelling in ("repeat_last_n", "penalty_last_n"):
        if _window(values, special, spelling, "penalty_window") == 0:
            for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                values.pop(penalty, None)
    if _window(values, special, "dry_penalty_last_n", "dry_window") == 0:
        values.pop("dry_multiplier", None)
    _default_temperature(values, special, 0.8)
    _clamp_dynamic_range(values)
    _finish_handloom(values, special, base)
    _count_the_prompt(values)


def _finish_textgen(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    """text-generation-webui: `do_sample`, by default True, sets the mode; DRY has the penalties' range."""
    if to_bool("auto_max_new_tokens", special.get("auto_max_new_tokens", False)):
        values["max_new_tokens"] = UNLIMITED
    if values.get("penalty_window"):
        values.setdefault("dry_window", values["penalty_window"])
    if not special.get(
        "dynamic_temperature"
    ):  # presets hold dynatemp_low and _high even when they are not used
        special = {name: value for name, value in special.items() if not name.startswith("dynatemp_")}
    elif values.get("temperature") == 1.0:
        # text-generation-webui divides by both temperatures in turn: 1 is none, another one a contradiction
        values.pop("temperature")
    _dynamic_temperature(values, special)
    _do_sample_decides(values, special, default=True)
    _one_of_best(values, special, base)
    _count_the_prompt(values)


def _do_sample_decides(values: Values, special: Values, *, default: bool) -> None:
    """Let do_sample set the mode whatever the temperature says, and warn where that drops a temperature."""
    sampling = to_bool("do_sample", special.get("do_sample", default))
    given = values.get("temperature")
    if sampling:
        if given == 0.0 and "do_sample" in special:
            raise ParameterError("do_sample=True asks for sampling, temperature=0 for greedy decoding")
        values["temperature"] = 1.0 if given is None else given
        return
    if given not in (None, 0.0, 1.0) and "do_sample" not in special:
        warnings.warn(
            f"temperature={given} has no effect without do_sample=True: decoding is greedy", stacklevel=6
        )
    values["temperature"] = 0.0


def _default_temperature(values: Values, special: Values, temperature: float) -> None:
    """Set an engine's temperature where nothing that was written says anything about it."""
    if values.get("temperature") is None and not {"do_sample", "dynatemp_low"} & special.keys():
        values["temperature"] = temperature


def _dynamic_temperature(values: Values, special: Values) -> None:
    """Turn dynatemp_low/high into temperature -+ dynatemp_range."""
    low, high = special.get("dynatemp_low"), special.get("dynatemp_high")
    asked = special.get("dynamic_temperature")
    if asked is not None and not to_bool("dynamic_temperature", asked):
        values.pop("dynatemp_range", None)
        return
    if low is None and high is None:
        if asked and not values.get("dynatemp_range"):
            raise ParameterError("dynamic_temperature=True needs dynatemp_low and dynatemp_high")
        return
    if low is None or high is None:
        raise ParameterError("dynatemp_low and dynatemp_high go together: one of them is missing")
    low, high = to_float("dynatemp_low", low), to_float("dynatemp_high", high)
    if not 0 <= low <= high or high == 0:
        raise ParameterError(
            f"dynatemp_low={low}, dynatemp_high={high} is not valid: expected 0 <= low <= high, high > 0"
        )
    for field, value in (("temperature", (low + high) / 2), ("dynatemp_range", (high - low) / 2)):
        if values.get(field) not in (None, value):
            raise ParameterError(
                f"dynatemp_low={low}, dynatemp_high={high} mean {field}={value}, not {values[field]}"
            )
        values[field] = value


def _clamp_dynamic_range(values: Values) -> None:
    """llama.cpp lets the range reach below 0 and cuts it there: [0, t + r] has the middle (t + r) / 2."""
    temperature, reach = values.get("temperature"), values.get("dynatemp_range")
    if temperature and reach and reach > temperature:
        values["temperature"] = values["dynatemp_range"] = (temperature + reach) / 2


def _one_of_best(values: Values, special: Values, base: Mapping[str, Any]) -> None:
    best = special.get("best_of")
    if best is not None and to_int("best_of", best, 1) not in (1, values.get("n") or base.get("n") or 1):
        raise ParameterError(
            f"best_of={best!r} is not a sampling parameter: see handloom.strategies.best_of_n"
        )


def _window(values: Values, special: Values, spelling: str, field: str) -> int | None:
    """Move a llama.cpp window (-1 = all) into its field; returns it as it was written."""
    if spelling not in special:
        return None
    written = to_int(spelling, special[spelling], -1)
    if values.get(field) not in (None, max(written, 0)):
        raise ParameterError(f"{spelling}={written} sets {field}, which was given as {values[field]}")
    values[field] = max(written, 0)
    return written


def _count_the_prompt(values: Values) -> None:
    if values.get("presence_penalty") or values.get("frequency_penalty"):
        values.setdefault("penalty_scope", "all")


_CACHE = "how keys and values are kept; the engine has a cache of its own"
_ASSISTANT = "read only beside an assistant model or a draft"
_BEAMS = "read by beam search alone: set num_beams beside it"
_SPEED = "how transformers runs the same computation"
_RECORD = "where the configuration comes from"

# Fields of transformers' GenerationConfig that no token depends on in `Engine.generate`, and why.
HF_WITHOUT_EFFECT: dict[str, str] = {
    "use_cache": _CACHE,
    "cache_config": "settings of a quantised cache, which is refused",
    "max_cache_len": _CACHE,
    "pad_token_id": "fills rows behind their end; nothing is padded here",
    "bos_token_id": "stands for a prompt where none is given; here a prompt is always given",
    "decoder_start_token_id": "begins the text of an encoder-decoder model; this engine runs decoders",
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "renormalize_logits": "log_softmax changes no distribution; beam_search, which adds scores up, honours it",
    "return_dict_in_generate": "the form of generate's result; compat.as_custom_generate honours it",
    "num_assistant_tokens": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "assistant_ensemble_weight": _ASSISTANT,
    "max_matching_ngram_size": _ASSISTANT,
    "compile_config": _SPEED,
    "disable_compile": _SPEED,
    "continuous_batching_config": "of transformers' generate_batch; `slots` and the pool are the engine's",
    "low_memory": "of contrastive search, which is refused: see handloom.strategies.contrastive",
    "prefill_chunk_size": _SPEED,
    "synced_gpus": _SPEED,
    "transformers_version": _RECORD,
    "_from_model_config": _RECORD,
    "_commit_hash": _RECORD,
    "_original_object_hash": _RECORD,
}
_VLLM_IGNORED = """
    detokenize spaces_between_special_tokens output_kind skip_clone flat_logprobs skip_reading_prefix_cache
    logprobs_mode length_penalty early_stopping
"""
_LLAMACPP_IGNORED = """
    prompt stream cache_prompt id_slot n_keep return_tokens return_progress timings_per_token
    post_sampling_probs response_fields
"""
_TEXTGEN_IGNORED = """
    prompt messages model stream length_penalty early_stopping static_cache truncation_length add_bos_token
    max_tokens_second prompt_lines enable_thinking reasoning_effort show_after
"""
_OPENAI_IGNORED = """
    model prompt messages stream stream_options user store metadata service_tier safety_identifier
    prompt_cache_key tools parallel_tool_calls reasoning_effort modalities
"""

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("handloom", _finish_handloom),
        Dialect(
            "hf",
            _finish_hf,
            profile="hf",
            aliases={
                "top_p": ("top_p", tiny_if_zero),
                "sequence_bias": ("sequence_bias", sequences),
            },
            ignored=frozenset(HF_WITHOUT_EFFECT),
        ),
        Dialect("vllm", _finish_vllm, profile="vllm", ignored=frozenset(_VLLM_IGNORED.split())),
        Dialect(
            "llamacpp",
            _finish_llamacpp,
            profile="llamacpp",
            aliases={
                "temperature": ("temperature", not_below_zero),
                "temp": ("temperature", not_below_zero),
                "top_k": ("top_k", not_below_zero),
                "top_p": ("top_p", tiny_if_zero),
                "top_n_sigma": ("top_n_sigma", not_below_zero),
                "adaptive_target": ("adaptive_target", target_or_off),
                "seed": ("seed", replaced(2**32 - 1, -1)),
            },
            special=frozenset({"repeat_last_n", "penalty_last_n", "dry_penalty_last_n"}),
            ignored=frozenset(_LLAMACPP_IGNORED.split()),
        ),
        Dialect(
            "textgen",
            _finish_textgen,
            profile="textgen",
            aliases={
                "epsilon_cutoff": ("epsilon_cutoff", divided(1e4)),
                "eta_cutoff": ("eta_cutoff", divided(1e4)),
                "top_p": ("top_p", tiny_if_zero),
            },
            special=frozenset({"auto_max_new_tokens"}),
            ignored=frozenset(_TEXTGEN_IGNORED.split()),
        ),
        Dialect(
            "openai",
            _finish_openai,
            aliases={"top_p": ("top_p", tiny_if_zero)},
            special=frozenset({"logprobs", "top_logprobs"}),
            ignored=frozenset(_OPENAI_IGNORED.split()),
        ),
    )
}
