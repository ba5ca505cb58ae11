"""The field's many spellings of one parameter, and how each engine's dialect reads them.

Semantics follow transformers 5.23, vLLM's SamplingParams, llama.cpp's server, text-generation-webui and
OpenAI's API. A reader takes what is written and nothing more: no engine's default filter (top_k=50,
min_p=0.05 ...) is added. Only the mode has to come from somewhere: where the dialect samples by
default, an absent temperature means that engine's.
"""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import ParameterError
from .checks import LARGEST_ID, Check, is_number, scalar, to_bool, to_float, to_int, to_list

UNLIMITED = LARGEST_ID  # as max_new_tokens: only max_length and the model's own length end a request

Values = dict[str, Any]
Finish = Callable[[Values, Values, Mapping[str, Any]], None]  # (values, special, base): completes values


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
    return _replaced(-1, 0)(name, value)


def _replaced(old: int, new: Any) -> Callable[[str, Any], Any]:
    """A conversion that replaces one number and leaves everything else to the field's check."""

    def convert(name: str, value: Any) -> Any:
        number = scalar(value)
        return new if is_number(number) and number == old else value

    return convert


def _unlimited(name: str, value: Any) -> Any:
    """llama.cpp's n_predict: -1 = without end, -2 = until the context is full."""
    return _replaced(-2, UNLIMITED)(name, _replaced(-1, UNLIMITED)(name, value))


def _not_below_zero(name: str, value: Any) -> Any:
    number = scalar(value)
    return 0 if is_number(number) and number < 0 else value


def _target_or_off(name: str, value: Any) -> Any:
    """llama.cpp's adaptive-p target: below 0 is off, and 0 is a target, which handloom has no way to say."""
    number = scalar(value)
    if is_number(number) and number == 0:
        raise ParameterError(f"{name}=0 is not valid: expected a target in (0, 1], or -1 to switch it off")
    return _not_below_zero(name, value)


def _divided(divisor: float) -> Callable[[str, Any], float]:
    return lambda name, value: to_float(name, value) / divisor


def _tiny_if_zero(name: str, value: Any) -> Any:
    """A mass of 0 keeps the most probable token alone, and so does any mass below 1 / vocabulary size."""
    return _replaced(0, 1e-9)(name, value)


def _sequences(name: str, value: Any) -> Any:
    """A sequence bias with keys such as "(6, 7)", which is how transformers writes tuples into JSON."""
    if not isinstance(value, Mapping):
        return value
    return {
        tuple(_integers(name, key.strip("()"))) if isinstance(key, str) else key: bias
        for key, bias in value.items()
    }


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
    "prefix_allowed_tokens_fn": "prefix_fn",
    "stop_strings": "stop",
    "custom_stopping_strings": ("stop", _quoted),
    "ban_eos_token": "ignore_eos",
    "include_stop_str_in_output": "include_stop",
    "stopping_criteria": "criteria",
    "top_logprobs": "logprobs",
    "n_probs": ("logprobs", _replaced(0, None)),
    "logits_processor": "processors",
    "logits_processors": "processors",
}

# Spellings that say something only together with others; a dialect's `finish` reads them.
SPECIAL = frozenset({"do_sample", "dynamic_temperature", "dynatemp_low", "dynatemp_high", "best_of"})

_BEAM = "beam search is a strategy: see handloom.strategies.beam"
_SPECULATIVE = "speculative decoding is a strategy: see handloom.strategies.speculative"
_GUIDANCE = "guidance needs a second forward pass: mix the logits of two States, or pass a processor"
_ORDER = "the order of the rules belongs to the Pipeline: pass pipeline=Pipeline([...]) to the Engine"
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
    "penalty_alpha": ((0,), "contrastive search is a strategy: see handloom.strategies.contrastive"),
    "dola_layers": ((), "DoLa is a strategy, written with state.hidden(layer)"),
    "assistant_model": ((), _SPECULATIVE),
    "prompt_lookup_num_tokens": ((0,), _SPECULATIVE),
    "speculation_type": ((), _SPECULATIVE),
    "use_mtp": ((False,), _SPECULATIVE),
    "assistant_early_exit": ((), _SPECULATIVE),
    "prediction": ((), _SPECULATIVE),
    "guidance_scale": ((1,), _GUIDANCE),
    "negative_prompt": (("",), _GUIDANCE),
    "negative_prompt_ids": ((), _GUIDANCE),
    "watermarking_config": ((), "pass the watermark as a processor: processors=[...]"),
    "encoder_repetition_penalty": ((1,), 'write repetition_penalty=1/x with penalty_scope="prompt"'),
    "encoder_no_repeat_ngram_size": ((0,), "pass a processor: processors=[...]"),
    "min_length": ((0,), "it counts the prompt; write min_new_tokens"),
    "forced_bos_token_id": ((), "write forced_tokens={0: id}"),
    "forced_eos_token_id": ((), "write forced_tokens={max_new_tokens - 1: id}"),
    "token_healing": ((False,), _OTHER_TEXT),
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


def read(settings: Mapping[str, Any], dialect: Dialect, checks: Mapping[str, Check], base: Mapping) -> Values:
    """Checked values by field name, from settings in a dialect's spelling.

    checks: the check of every field; base: the values that the settings are going to change, empty for
    none. A None stays None (the caller takes the field's default). Raises ParameterError for a name
    that is unknown or handled elsewhere, a value out of range, and two spellings of one field that
    disagree.
    """
    values: Values = {}
    spelled: dict[str, str] = {}
    special: Values = {}
    bans: list = []
    for spelling, value in settings.items():
        if spelling in dialect.special or spelling in SPECIAL:
            special[spelling] = value
            continue
        field, convert = _target(spelling, value, dialect, checks)
        if field is None:
            continue
        if field == "logit_bias" and value is not None:
            value, banned = _without_bans(spelling, value)
            bans += banned
        if convert is not None and value is not None:
            value = convert(spelling, value)
        checked = None if value is None else checks[field](spelling, value)
        if values.get(field) is not None and checked is not None and values[field] != checked:
            raise ParameterError(
                f"{spelled[field]}={settings[spelled[field]]!r} and {spelling}={settings[spelling]!r} "
                f"both set {field}, to different values"
            )
        if values.get(field) is None:
            values[field], spelled[field] = checked, spelling
    if bans:
        earlier = values.get("banned_tokens", base.get("banned_tokens")) or ()
        values["banned_tokens"] = checks["banned_tokens"]("logit_bias", [*earlier, *bans])
    special = {name: value for name, value in special.items() if value is not None}
    dialect.finish(values, special, base)
    return {name: None if value is None else checks[name](name, value) for name, value in values.items()}


def _target(spelling: Any, value: Any, dialect: Dialect, checks: Mapping[str, Check]) -> tuple:
    """(field, conversion or None) of a spelling; (None, None) for one that asks for nothing here."""
    if spelling in dialect.aliases:
        target = dialect.aliases[spelling]
    elif spelling in checks:
        target = spelling
    elif spelling in ALIASES:
        target = ALIASES[spelling]
    elif spelling in dialect.ignored:
        return None, None
    elif spelling in ELSEWHERE:
        neutral, instead = ELSEWHERE[spelling]
        if (
            value is None
            or any(type(value) is type(n) and value == n for n in neutral)
            or _same(value, neutral)
        ):
            return None, None
        raise ParameterError(f"{spelling}={value!r} is not a sampling parameter of handloom: {instead}")
    else:
        raise ParameterError(_unknown(spelling, dialect, checks))
    return (target, None) if isinstance(target, str) else target


def _same(value: Any, neutral: tuple) -> bool:
    """Whether a number equals one of the neutral numbers, be it an int or a float."""
    number = scalar(value)
    return is_number(number) and any(is_number(other) and number == other for other in neutral)


def _unknown(spelling: Any, dialect: Dialect, checks: Mapping[str, Check]) -> str:
    """What to say about a name that nobody knows here."""
    message = f"unknown sampling parameter {spelling!r}"
    if any(spelling in other.ignored for other in DIALECTS.values()):
        return f"{message}: it does not concern decoding, leave it out"
    if dialect.name == "handloom":
        for other in DIALECTS.values():
            if spelling in other.aliases or spelling in other.special:
                return f"{message}: it is {other.name}'s, read it with from_dict(..., dialect={other.name!r})"
    names = [*checks, *ALIASES, *dialect.aliases, *SPECIAL, *dialect.special]
    near = difflib.get_close_matches(str(spelling).lower(), names, n=1, cutoff=0.6)
    return message + (
        f"; did you mean {near[0]!r}?" if near else "; help(handloom.SamplingParams) lists them all"
    )


def _without_bans(name: str, value: Any) -> tuple[Any, list]:
    """A logit bias without its bans (`[id, false]`, llama.cpp's way), and the ids so banned."""
    if isinstance(value, str):
        return value, []
    kept, banned = [], []
    pairs = (
        list(value.items())
        if isinstance(value, Mapping)
        else to_list(name, value, "a mapping or a list of pairs")
    )
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or scalar(pair[1]) is not False:
            kept.append(pair)
        elif isinstance(pair[0], str) and not pair[0].isdigit():
            raise ParameterError(f"{name} cannot ban the text {pair[0]!r}: write bad_words=[{pair[0]!r}]")
        else:
            banned.append(int(pair[0]) if isinstance(pair[0], str) else pair[0])
    return kept, banned


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
    if "eos_token_id" in special:
        ids = scalar(special["eos_token_id"])
        wanted = "a token id, or a list of them"
        ids = [ids] if isinstance(ids, int) else to_list("eos_token_id", ids, wanted)
        ids = [to_int("eos_token_id", token, 0, wanted=wanted) for token in ids]
        values["stop_token_ids"] = [*(values.get("stop_token_ids") or ()), *ids]
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


_HF_IGNORED = """
    use_cache cache_implementation cache_config max_cache_len pad_token_id bos_token_id
    decoder_start_token_id length_penalty early_stopping renormalize_logits return_dict_in_generate
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind assistant_ensemble_weight max_matching_ngram_size
    compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size
    transformers_version synced_gpus _from_model_config _commit_hash _original_object_hash
"""
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
                "top_p": ("top_p", _tiny_if_zero),
                "sequence_bias": ("sequence_bias", _sequences),
            },
            special=frozenset({"eos_token_id"}),
            ignored=frozenset(_HF_IGNORED.split()),
        ),
        Dialect("vllm", _finish_vllm, profile="vllm", ignored=frozenset(_VLLM_IGNORED.split())),
        Dialect(
            "llamacpp",
            _finish_llamacpp,
            profile="llamacpp",
            aliases={
                "temperature": ("temperature", _not_below_zero),
                "temp": ("temperature", _not_below_zero),
                "top_k": ("top_k", _not_below_zero),
                "top_p": ("top_p", _tiny_if_zero),
                "top_n_sigma": ("top_n_sigma", _not_below_zero),
                "adaptive_target": ("adaptive_target", _target_or_off),
                "seed": ("seed", _replaced(2**32 - 1, -1)),
            },
            special=frozenset({"repeat_last_n", "penalty_last_n", "dry_penalty_last_n"}),
            ignored=frozenset(_LLAMACPP_IGNORED.split()),
        ),
        Dialect(
            "textgen",
            _finish_textgen,
            profile="textgen",
            aliases={
                "epsilon_cutoff": ("epsilon_cutoff", _divided(1e4)),
                "eta_cutoff": ("eta_cutoff", _divided(1e4)),
                "top_p": ("top_p", _tiny_if_zero),
            },
            special=frozenset({"auto_max_new_tokens"}),
            ignored=frozenset(_TEXTGEN_IGNORED.split()),
        ),
        Dialect(
            "openai",
            _finish_openai,
            aliases={"top_p": ("top_p", _tiny_if_zero)},
            special=frozenset({"logprobs", "top_logprobs"}),
            ignored=frozenset(_OPENAI_IGNORED.split()),
        ),
    )
}
