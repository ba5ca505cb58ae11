"""The field's many spellings of one parameter, and what to use instead of those that are none here."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ParameterError
from .checks import LARGEST_ID, is_number, scalar, to_float

UNLIMITED = LARGEST_ID  # as max_new_tokens: only max_length and the model's own length end a request

Values = dict[str, Any]


def _integers(name: str, text: Any) -> Any:
    """The ids in "1, 2"; anything that is not text is left to the field's own check."""
    if not isinstance(text, str):
        return text
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ParameterError(
            f'{name}={text!r} is not valid: expected token ids such as "13, 50256"'
        ) from None


def _quoted(name: str, text: Any) -> Any:
    r"""The strings in '"\n", "###"'; text without a quotation mark is one string."""
    if not isinstance(text, str) or '"' not in text:
        return [] if text == "" else text
    try:
        return json.loads(f"[{text}]", strict=False)
    except json.JSONDecodeError:
        message = f'{name}={text!r} is not valid: expected quoted strings such as "\\n", "###"'
        raise ParameterError(message) from None


def _whole_if_minus_one(name: str, value: Any) -> Any:
    """A window where -1 means the whole history, which handloom writes as 0."""
    if is_number(scalar(value)) and scalar(value) == 0:
        raise ParameterError(
            f"{name}=0 switches the penalty off in llama.cpp; leave the penalty itself out instead"
        )
    return replaced(-1, 0)(name, value)


def replaced(old: int, new: Any) -> Callable[[str, Any], Any]:
    """A conversion that replaces one number and leaves everything else to the field's check."""

    def convert(name: str, value: Any) -> Any:
        number = scalar(value)
        return new if is_number(number) and number == old else value

    return convert


def _unlimited(name: str, value: Any) -> Any:
    """llama.cpp's n_predict: -1 = without end, -2 = until the context is full."""
    return replaced(-2, UNLIMITED)(name, replaced(-1, UNLIMITED)(name, value))


def not_below_zero(name: str, value: Any) -> Any:
    number = scalar(value)
    return 0 if is_number(number) and number < 0 else value


def target_or_off(name: str, value: Any) -> Any:
    """llama.cpp's adaptive-p target: below 0 is off, and 0 is a target, which handloom has no way to say."""
    number = scalar(value)
    if is_number(number) and number == 0:
        raise ParameterError(f"{name}=0 is not valid: expected a target in (0, 1], or -1 to switch it off")
    return not_below_zero(name, value)


def divided(divisor: float) -> Callable[[str, Any], float]:
    return lambda name, value: to_float(name, value) / divisor


def tiny_if_zero(name: str, value: Any) -> Any:
    """A mass of 0 keeps the most probable token alone, and so does any mass below 1 / vocabulary size."""
    return replaced(0, 1e-9)(name, value)


def sequences(name: str, value: Any) -> Any:
    """A sequence bias with keys such as "(6, 7)", which is how transformers writes tuples into JSON."""
    if not isinstance(value, Mapping):
        return value
    return {
        tuple(_integers(name, key.strip("()"))) if isinstance(key, str) else key: bias
        for key, bias in value.items()
    }


def one_or_more(name: str, value: Any) -> Any:
    """A list of what may be a single id."""
    number = scalar(value)
    return [number] if isinstance(number, int) and not isinstance(number, bool) else value


@dataclasses.dataclass(frozen=True)
class ByRow:
    """transformers' `function(batch_id, ids)` as a prefix function: it is told the number of its row in the call."""

    function: Callable[[int, Any], Any]
    number: int | None = None

    def for_row(self, number: int) -> "ByRow":
        """The same function for the row of this number."""
        return ByRow(self.function, number)

    def __call__(self, sample: int, ids: Any) -> Any:
        return self.function(sample if self.number is None else self.number, ids)


def by_row(name: str, function: Any) -> Any:
    """A callable as a `ByRow`; anything else is left to the field's check."""
    return ByRow(function) if callable(function) else function


# spelling -> field, or (field, conversion of the value)
ALIASES: dict[str, str | tuple[str, Callable[[str, Any], Any]]] = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "n_predict": ("max_new_tokens", _unlimited),
    "min_tokens": "min_new_tokens",
    "temp": "temperature",
    "num_return_sequences": "n",
    "n_cmpl": "n",
    "typ_p": "typical_p",
    "tfs_z": "tfs",
    "top_nsigma": "top_n_sigma",
    "mirostat_mode": "mirostat",
    "repeat_penalty": "repetition_penalty",
    "repetition_penalty_range": "penalty_window",
    "repeat_last_n": ("penalty_window", _whole_if_minus_one),
    "penalty_last_n": ("penalty_window", _whole_if_minus_one),
    "dry_penalty_last_n": ("dry_window", _whole_if_minus_one),
    "dry_sequence_breakers": ("dry_breakers", _quoted),
    "suppress_tokens": "banned_tokens",
    "custom_token_bans": ("banned_tokens", _integers),
    "begin_suppress_tokens": "suppress_first",
    "bad_words_ids": "bad_words",
    "allowed_token_ids": "allowed_tokens",
    "exponential_decay_length_penalty": "exponential_decay",
    "prefix_allowed_tokens_fn": ("prefix_fn", by_row),
    "stop_strings": "stop",
    "custom_stopping_strings": ("stop", _quoted),
    "ban_eos_token": "ignore_eos",
    "eos_token_id": ("eos_token_ids", one_or_more),
    "include_stop_str_in_output": "include_stop",
    "stopping_criteria": "criteria",
    "top_logprobs": "logprobs",
    "n_probs": ("logprobs", replaced(0, None)),
    "logits_processor": "processors",
    "logits_processors": "processors",
}

# Spellings that say something only together with others; a dialect's `finish` reads them.
SPECIAL = frozenset({"do_sample", "dynamic_temperature", "dynatemp_low", "dynatemp_high", "best_of"})

_BEAM = "beam search is a strategy: see handloom.strategies.beam_search, or strategies.generate for a whole config"
_SPECULATIVE = "speculative decoding is a strategy: see handloom.strategies.speculative"
_GUIDANCE = "guidance mixes the logits of two States: see handloom.strategies.classifier_free_guidance"
_ORDER = "write order=[names of handloom's processors], or pass pipeline=Pipeline([...]) to the Engine"
_GRAMMAR = "a grammar is a processor: pass processors=[Grammar.json_schema(...)], from handloom.processors"
_SCORES = (
    "ask for logprobs=<number of alternatives>; raw and processed log-probabilities are then in the result"
)
_OTHER_TEXT = "not offered"

# spelling -> (values that ask for nothing, what to use instead)
ELSEWHERE: dict[str, tuple[tuple, str]] = {
    "num_beams": ((1,), _BEAM),
    "num_beam_groups": ((1,), _BEAM),
    "diversity_penalty": ((0,), _BEAM),
    "use_beam_search": ((False,), _BEAM),
    "beam_width": ((1,), _BEAM),
    "constraints": (([],), _BEAM),
    "force_words_ids": (([],), _BEAM),
    "penalty_alpha": ((0,), "contrastive search is a strategy: see handloom.strategies.contrastive_search"),
    "dola_layers": ((), "DoLa is a strategy: see handloom.strategies.dola"),
    "custom_generate": (
        (),
        "a strategy is called by itself: strategies.named(name)(engine, prompts, params)",
    ),
    "assistant_model": ((), _SPECULATIVE),
    "prompt_lookup_num_tokens": ((0,), _SPECULATIVE),
    "speculation_type": ((), _SPECULATIVE),
    "use_mtp": ((False,), _SPECULATIVE),
    "assistant_early_exit": ((), _SPECULATIVE),
    "prediction": ((), _SPECULATIVE),
    "guidance_scale": ((1,), _GUIDANCE),
    "negative_prompt": (("",), _GUIDANCE),
    "negative_prompt_ids": ((), _GUIDANCE),
    "encoder_repetition_penalty": ((1,), 'write repetition_penalty=1/x with penalty_scope="prompt"'),
    "encoder_no_repeat_ngram_size": ((0,), "pass a processor: processors=[...]"),
    "min_length": ((0,), "it counts the prompt; write min_new_tokens"),
    "forced_bos_token_id": (
        (),
        "behind a prompt of one token write forced_tokens={0: id}; behind any other transformers ignores it",
    ),
    "is_assistant": ((False,), _SPECULATIVE),
    "cache_implementation": (
        (
            *("dynamic", "offloaded", "static", "offloaded_static", "sliding_window", "hybrid"),
            *("hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
        ),
        "the engine has a cache of its own, whose keys and values are never quantised",
    ),
    "forced_eos_token_id": ((), "write forced_tokens={max_new_tokens - 1: id}"),
    "token_healing": ((False,), "not offered: the prompt is taken as it is, to its last token"),
    "remove_invalid_values": ((False,), 'a row whose logits are not finite ends with finish_reason="error"'),
    "output_scores": ((False,), _SCORES),
    "output_logits": ((False,), _SCORES),
    "output_attentions": ((False,), "call the model itself for its attentions"),
    "output_hidden_states": ((False,), "use engine.prefill / step(..., hidden=True) and state.hidden(layer)"),
    "sampler_priority": (([], ""), _ORDER),
    "samplers": (([], ""), _ORDER),
    "temperature_last": ((False,), _ORDER),
    "grammar": (("",), _GRAMMAR),
    "grammar_string": (("",), _GRAMMAR),
    "json_schema": (({}, ""), _GRAMMAR),
    "structured_outputs": ((), _GRAMMAR),
    "guided_decoding": ((), _GRAMMAR),
    "response_format": (({"type": "text"},), _GRAMMAR),
    "tool_choice": (("auto", "none"), _GRAMMAR),
    "echo": ((False,), "ask for prompt_logprobs=<number>; the result holds prompt_token_ids"),
    "suffix": (("",), _OTHER_TEXT),
    "t_max_predict_ms": ((0, -1), "write max_time in seconds"),
    "n_indent": ((0,), _OTHER_TEXT),
    "min_keep": ((0, 1), "every rule here keeps at least one token"),
    "truncate_prompt_tokens": ((-1,), "cut the prompt before it is passed"),
    "extra_args": (({},), _OTHER_TEXT),
}

# Spellings in that table for which `Engine.generate` runs a strategy instead: see `strategies.modes`.
MODES = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids", "penalty_alpha", "dola_layers"),
    *("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "guidance_scale"),
    "custom_generate",
)
