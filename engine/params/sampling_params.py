"""SamplingParams: what one request asks of the decoding engine."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Unpack

from ..errors import ParameterError
from .checks import (
    FrozenDict,
    choice,
    flag,
    functions,
    hook,
    integer,
    positions_to_ids,
    real,
    seed_or_base,
    sequence_bias,
    start_and_factor,
    texts,
    texts_or_ids,
    token_bias,
    token_ids,
    watermark,
    words,
)
from .dialects import DIALECTS
from .reading import read
from .settings import Settings

SMALLEST_TEMPERATURE = 1e-6  # below it, logits divided by it leave float32


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class SamplingParams:
    """What one request asks for: an immutable value; every row of a batch may have its own.

    The keywords are the fields below or any of their usual names in transformers, vLLM, llama.cpp,
    text-generation-webui and OpenAI's API (`max_tokens`, `do_sample`, `repeat_penalty` ...). None means
    a field's default. NumPy and torch scalars are numbers, arrays and tensors are lists. An off value
    is exact identity. Raises ParameterError for an unknown name, a value out of range, and values that
    contradict each other.

    Length
        max_new_tokens: most tokens to generate, >= 1.
        min_new_tokens: no EOS, stop token or stop string before so many tokens; 0 = off.
        max_length: most tokens of prompt and output together, >= 1; None = the model's own limit.
    Mode
        temperature: logits are divided by it, >= 1e-6; 0 = greedy, the most probable token.
        seed: of all random draws, 0 .. 2**63 - 1; None or -1 = a fresh one for each request. One seed is the same
            noise for every prompt of a list: a row depends on nothing but its own request. "per-request:7" derives
            one for each from the base 7 and the request's number.
        n: samples of the prompt, >= 1, each on its own stream of the seed.
    Truncation
        top_k: keep the k most probable tokens; 0 or -1 = off (arXiv 1805.04833).
        top_p: nucleus, keep the fewest tokens of this mass, (0, 1]; 1 = off (arXiv 1904.09751).
        min_p: keep p >= min_p * p_max, [0, 1]; 0 = off (arXiv 2407.01082).
        typical_p: keep this mass, closest to the entropy first, (0, 1]; 1 = off (arXiv 2202.00666).
        epsilon_cutoff: keep p >= epsilon, [0, 1); 0 = off (arXiv 2210.15191).
        eta_cutoff: keep p >= min(eta, sqrt(eta) * exp(-entropy)), [0, 1); 0 = off (arXiv 2210.15191).
        top_a: keep p >= top_a * p_max**2, [0, 1]; 0 = off (RWKV-LM, 2022).
        tfs: tail-free sampling, mass of the curvature to keep, (0, 1]; 1 = off (Bricken 2019).
        top_n_sigma: keep logits within n standard deviations of the largest, >= 0; 0 or -1 = off (arXiv
            2411.07641).
        top_h: entropy of the kept set as a share of the whole, (0, 1]; 0 = off (arXiv 2509.02510).
        top_h_rule: "paper" renormalises the kept set; "code" follows its authors' code and transformers.
        p_less: keep p >= sum of p**2 (True) or its normalised form ("norm"); False = off (arXiv
            2509.23234).
        xtc_probability: chance of dropping all top choices but the least of them, [0, 1]; 0 = off.
        xtc_threshold: probability from which XTC counts a token as a top choice, [0, 1].
    Reshaping
        dynatemp_range: temperature runs from t - range to t + range with the entropy, 0 <= range <= t;
            0 = off.
        dynatemp_exponent: of the normalised entropy in it, >= 0.
        smoothing_factor: quadratic curve around the largest logit, >= 0; 0 = off.
        smoothing_curve: its cubic share, >= 1 (below 1 unlikely tokens would rise); 1 = purely quadratic.
        edt_theta: entropy-dependent temperature t * base**(theta / entropy), >= 0; 0 = off (arXiv
            2403.14541).
        edt_base: its base, (0, 1].
        mirostat: its version, 1 or 2; 0 = off (arXiv 2007.14966).
        mirostat_tau: surprise to aim at, in bits, >= 0.
        mirostat_eta: its learning rate, [0, 1].
        adaptive_target: adaptive-p, the probability to aim at, (0, 1]; 0 or -1 = off (llama.cpp pull
            request 17927).
        adaptive_decay: of its memory, [0, 0.99].
    Penalties
        repetition_penalty: divides positive and multiplies negative logits of seen tokens, > 0; 1 = off
            (arXiv 1909.05858).
        presence_penalty: subtracted once from every seen token, any finite number; 0 = off.
        frequency_penalty: subtracted for each time a token was seen, any finite number; 0 = off.
        penalty_scope: what "seen" means: "prompt", "output", "all", or "auto": all for repetition,
            output for the rest.
        penalty_window: only the last so many tokens are seen; 0 = the whole history.
        dry_multiplier: penalty multiplier * base**(match - allowed) for continuing a repeat, >= 0; 0 = off.
        dry_base: >= 1.
        dry_allowed_length: longest repeat without a penalty, >= 0.
        dry_window: only the last so many tokens are searched; 0 = the whole history.
        dry_breakers: tokens that no repeat crosses, as ids or strings.
        no_repeat_ngram_size: no n-gram of this size twice; 0 = off.
    Constraints
        logit_bias: {token id: number added to its logit}.
        sequence_bias: {(ids ...): number added to the last id's logit when the others precede it}.
        banned_tokens: ids that are never drawn.
        bad_words: sequences that are never completed, as lists of ids or as strings.
        allowed_tokens: the only ids that may be drawn, one or more; None = off.
        suppress_first: ids that are not drawn as the first token.
        forced_tokens: {output position from 0: id}.
        exponential_decay: (start, factor), EOS grows by factor**(length - start) after start tokens;
            None = off.
        prefix_fn: callable (sample index, ids) -> ids allowed next; None = off. Under transformers' name,
            `prefix_allowed_tokens_fn`, it is told the number of its row in the call instead.
        watermarking_config: transformers' WatermarkingConfig (arXiv 2301.10226) or SynthIDTextWatermarkingConfig,
            or a mapping of its settings; it acts last, with the same lists as there; None = off.
    Stopping
        stop: strings that end the text, matched across token borders, never inside the prompt.
        stop_token_ids: token ids that end it.
        eos_token_ids: ids that end it in place of the model's end-of-sequence tokens, for this request and all
            its rules; [] = none, None = the model's.
        ignore_eos: go on after the end-of-sequence tokens.
        include_stop: keep the stop string in the text.
        max_time: seconds since the request was admitted, > 0; None = off.
        criteria: callables (Progress) -> truth or a reason, or transformers' StoppingCriteria, that may end it.
        skip_special_tokens: leave special tokens out of the text.
    Results
        logprobs: log-probabilities of so many alternatives for each token, >= 0; None = the chosen
            token's only.
        prompt_logprobs: the same for the prompt's tokens; None = off.
    Pipeline
        profile: whose order and edge rules: "default", "hf", "vllm", "llamacpp" or "textgen".
        order: names of the profile's processors, which then run alone and in this order; () = all in its own.
        processors: your own, appended to the pipeline.
    """

    max_new_tokens: int = integer(256, 1)
    min_new_tokens: int = integer(0, 0)
    max_length: int | None = integer(None, 1)
    temperature: float = real(0.0, f"[{SMALLEST_TEMPERATURE:g}, inf)", off=0.0)
    seed: int | str | None = seed_or_base()
    n: int = integer(1, 1)

    top_k: int = integer(0, 0, also_default=(-1,))
    top_p: float = real(1.0, "(0, 1]", off=1.0)
    min_p: float = real(0.0, "[0, 1]", off=0.0)
    typical_p: float = real(1.0, "(0, 1]", off=1.0)
    epsilon_cutoff: float = real(0.0, "[0, 1)", off=0.0)
    eta_cutoff: float = real(0.0, "[0, 1)", off=0.0)
    top_a: float = real(0.0, "[0, 1]", off=0.0)
    tfs: float = real(1.0, "(0, 1]", off=1.0)
    top_n_sigma: float = real(0.0, "(0, inf)", off=0.0, also_off=(-1,))
    top_h: float = real(0.0, "(0, 1]", off=0.0)
    top_h_rule: str = choice("paper", "paper", "code")
    p_less: bool | str = choice(False, False, True, "norm")
    xtc_probability: float = real(0.0, "[0, 1]", off=0.0)
    xtc_threshold: float = real(0.1, "[0, 1]")

    dynatemp_range: float = real(0.0, "[0, inf)", off=0.0)
    dynatemp_exponent: float = real(1.0, "[0, inf)")
    smoothing_factor: float = real(0.0, "[0, inf)", off=0.0)
    smoothing_curve: float = real(1.0, "[1, inf)")
    edt_theta: float = real(0.0, "[0, inf)", off=0.0)
    edt_base: float = real(0.8, "(0, 1]")
    mirostat: int = choice(0, 0, 1, 2)
    mirostat_tau: float = real(5.0, "[0, inf)")
    mirostat_eta: float = real(0.1, "[0, 1]")
    adaptive_target: float = real(0.0, "(0, 1]", off=0.0, also_off=(-1,))
    adaptive_decay: float = real(0.9, "[0, 0.99]")

    repetition_penalty: float = real(1.0, "(0, inf)", off=1.0)
    presence_penalty: float = real(0.0, "(-inf, inf)", off=0.0)
    frequency_penalty: float = real(0.0, "(-inf, inf)", off=0.0)
    penalty_scope: str = choice("auto", "auto", "prompt", "output", "all")
    penalty_window: int = integer(0, 0, also_default=(-1,))
    dry_multiplier: float = real(0.0, "[0, inf)", off=0.0)
    dry_base: float = real(1.75, "[1, inf)")
    dry_allowed_length: int = integer(2, 0)
    dry_window: int = integer(0, 0, also_default=(-1,))
    dry_breakers: tuple[int | str, ...] = texts_or_ids()
    no_repeat_ngram_size: int = integer(0, 0)

    logit_bias: Mapping[int | str, float] = token_bias()
    sequence_bias: Mapping[tuple[int, ...], float] = sequence_bias()
    banned_tokens: tuple[int, ...] = token_ids()
    bad_words: tuple[tuple[int, ...] | str, ...] = words()
    allowed_tokens: tuple[int, ...] | None = token_ids(None, may_be_empty=False)
    suppress_first: tuple[int, ...] = token_ids()
    forced_tokens: Mapping[int, int] = positions_to_ids()
    exponential_decay: tuple[int, float] | None = start_and_factor()
    prefix_fn: Callable[[int, Any], Any] | None = hook()  # noqa: RUF009 - makes a field, like the others
    watermarking_config: Mapping[str, Any] | None = watermark()

    stop: tuple[str, ...] = texts()
    stop_token_ids: tuple[int, ...] = token_ids()
    eos_token_ids: tuple[int, ...] | None = token_ids(None)
    ignore_eos: bool = flag(False)
    include_stop: bool = flag(False)
    max_time: float | None = real(None, "(0, inf)")
    criteria: tuple[Callable, ...] = functions()
    skip_special_tokens: bool = flag(True)

    logprobs: int | None = integer(None, 0)
    prompt_logprobs: int | None = integer(None, 0)

    profile: str = choice("default", "default", "hf", "vllm", "llamacpp", "textgen")
    order: tuple[str, ...] = texts()
    processors: tuple[Any, ...] = functions(method="apply")

    def __init__(self, **settings: Unpack[Settings]) -> None:
        self._fill(read(settings, DIALECTS["handloom"], _CHECKS, {}))

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Set every field, absent ones and None to the default, and check the fields against each other."""
        given = {name: value for name, value in values.items() if value is not None}
        vars(self).update(_DEFAULTS | given)
        self._check_together()

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ParameterError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}"
            )
        if self.dynatemp_range > self.temperature > 0:
            raise ParameterError(
                f"dynatemp_range={self.dynatemp_range} is more than temperature={self.temperature}: "
                "the temperature would fall below 0"
            )
        if self.allowed_tokens and not set(self.allowed_tokens).difference(self.banned_tokens):
            raise ParameterError(f"every one of allowed_tokens={self.allowed_tokens} is in banned_tokens")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], dialect: str = "handloom") -> "SamplingParams":
        """Parameters written for handloom or for another engine.

        settings: names and values; None = absent. dialect: "handloom", "hf" (transformers), "vllm",
        "llamacpp" (server), "textgen" (text-generation-webui, cutoffs in units of 1e-4) or "openai".
        Every dialect accepts handloom's names too, and asks for its engine's profile. Only what is
        written is read: no engine's default filters are added. An absent temperature is the engine's
        own mode: greedy for hf (unless `do_sample`), 1.0 for vllm, openai and textgen, 0.8 for
        llamacpp. Names that do not concern decoding are skipped. Raises ParameterError for anything
        else it cannot honour.
        """
        if not isinstance(settings, Mapping):
            raise ParameterError(f"expected a mapping of parameters, got {type(settings).__name__}")
        if dialect not in DIALECTS:
            raise ParameterError(
                f"dialect={dialect!r} is not valid: expected one of {', '.join(map(repr, DIALECTS))}"
            )
        spoken = DIALECTS[dialect]
        values = read(settings, spoken, _CHECKS, {})
        if spoken.profile is not None and values.get("profile") is None:
            values["profile"] = spoken.profile
        return cls(**values)

    @classmethod
    def from_generation_config(cls, config: Any, **overrides: Any) -> "SamplingParams":
        """Parameters of a transformers GenerationConfig, or of a generation_config.json as a mapping.

        do_sample alone sets the mode (absent = greedy), fields that are None are absent, and no
        top_k=50 is added. overrides: parameters under any name, which win over the config's. Every field
        of transformers' is honoured, listed with the reason why it cannot change a token in
        `handloom.params.dialects.HF_WITHOUT_EFFECT`, or a ParameterError, as num_beams > 1 is and whatever
        else handloom does in another way. An object's attributes that nobody knows are skipped with a
        warning; in a mapping they are a ParameterError.
        """
        settings = dict(config) if isinstance(config, Mapping) else _attributes(config)
        settings = {name: value for name, value in settings.items() if name not in overrides}
        settings |= {name: overrides[name] for name in ("do_sample",) if name in overrides}
        return cls.from_dict(settings, dialect="hf").replace(**overrides)

    def replace(self, **changes: Unpack[Settings]) -> "SamplingParams":
        """A copy with some parameters changed, under any of their names; None sets a default back."""
        current = dict(vars(self))
        values = current | read(changes, DIALECTS["handloom"], _CHECKS, current)
        changed = object.__new__(type(self))
        changed._fill(values)
        return changed

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of drawing one."""
        return self.temperature == 0.0

    def ends(self, model_ids: Collection[int]) -> frozenset[int]:
        """The end-of-sequence ids that end the text: its own, else the model's; none with `ignore_eos`."""
        own = model_ids if self.eos_token_ids is None else self.eos_token_ids
        return frozenset() if self.ignore_eos else frozenset(own)

    def resolve(self, tokenizer: Any) -> "SamplingParams":
        """A copy in which every string that stands for tokens has become ids.

        tokenizer: a transformers tokenizer; None will do where there is no such string. bad_words: each
        string with and without a space before it, as vLLM does. dry_breakers: the last token of "a" +
        string, as text-generation-webui does. logit_bias: every token of the string, as llama.cpp does.
        `stop` stays text. A processor with a method `for_tokenizer` is replaced by what it returns.
        """
        own = [
            rule.for_tokenizer(tokenizer) if hasattr(rule, "for_tokenizer") else rule
            for rule in self.processors
        ]
        if any(new is not old for new, old in zip(own, self.processors, strict=True)):
            return self.replace(processors=own).resolve(tokenizer)
        strings = [
            entry
            for entry in (*self.bad_words, *self.dry_breakers, *self.logit_bias)
            if isinstance(entry, str)
        ]
        if not strings:
            return self
        if tokenizer is None:
            raise ParameterError(
                f"the string {strings[0]!r} needs a tokenizer to become token ids; write ids instead"
            )

        def encode(text: str) -> tuple[int, ...]:
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not ids:
                raise ParameterError(f"the tokenizer makes no token of {text!r}")
            return ids

        bias: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            for token in encode(key) if isinstance(key, str) else (key,):
                if bias.setdefault(token, value) != value:
                    raise ParameterError(
                        f"logit_bias gives token {token} two values: {bias[token]} and {value}"
                    )
        return self.replace(
            bad_words=[ids for entry in self.bad_words for ids in _spellings(entry, encode)],
            dry_breakers=[encode("a" + e)[-1] if isinstance(e, str) else e for e in self.dry_breakers],
            logit_bias=bias,
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ParameterError if any token id of these parameters is not below `vocab_size`."""
        for name, token in self._ids():
            if token >= vocab_size:
                raise ParameterError(f"{name}: token id {token} is not valid: expected 0 to {vocab_size - 1}")
        if self.banned_tokens and len(self.banned_tokens) >= vocab_size:
            raise ParameterError("banned_tokens holds the whole vocabulary: no token is left to draw")

    def _ids(self) -> Iterator[tuple[str, int]]:
        """(field, token id) for every token id of these parameters; strings are left out."""
        for name in _HOLD_IDS:
            for token in getattr(self, name) or ():
                if not isinstance(token, str):
                    yield name, token
        for name in ("bad_words", "sequence_bias"):
            yield from ((name, t) for ids in getattr(self, name) if not isinstance(ids, str) for t in ids)
        yield from (("forced_tokens", token) for token in self.forced_tokens.values())

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Every field (or only those that differ from the default) in values that `json.dumps` takes.

        `from_dict` reads it back, before and after JSON. Callables and processors are given by name,
        for the record; those cannot be read back.
        """
        shown = dataclasses.fields(self) if defaults else self._changed()
        return {field.name: _plain(field.name, getattr(self, field.name)) for field in shown}

    def _changed(self) -> list[dataclasses.Field]:
        return [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def __repr__(self) -> str:
        shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in self._changed())
        return f"{type(self).__name__}({shown})"


_HOLD_IDS = (
    "banned_tokens", "allowed_tokens", "suppress_first", "stop_token_ids", "eos_token_ids", "dry_breakers", "logit_bias"
)  # fmt: skip
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
_CHECKS = {field.name: field.metadata["check"] for field in dataclasses.fields(SamplingParams)}

# The signature that help() and notebooks show: the fields, although __init__ takes their aliases too.
SamplingParams.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in dataclasses.fields(SamplingParams)
        ),
        inspect.Parameter("aliases", inspect.Parameter.VAR_KEYWORD),
    ]
)


def _attributes(config: Any) -> dict[str, Any]:
    """The settings in a GenerationConfig, without attributes that no parameter is called after."""
    if not callable(getattr(config, "to_dict", None)):
        raise ParameterError(f"expected a GenerationConfig or a mapping, got {type(config).__name__}")
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    strange = [name for name in settings if not DIALECTS["hf"].knows(name, _CHECKS)]
    if strange:
        warnings.warn(
            f"the generation config has unknown settings, skipped: {', '.join(strange)}", stacklevel=3
        )
    return {name: value for name, value in settings.items() if name not in strange}


def _spellings(entry: Any, encode: Callable[[str], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A bad word's token sequences: with and without a space before it, tokenizers tell them apart."""
    if not isinstance(entry, str):
        return [entry]
    word = entry.lstrip()
    return [encode(word), encode(" " + word)] if word else [encode(entry)]


def _plain(name: str, value: Any) -> Any:
    """A field's value in the types that JSON has."""
    if name == "sequence_bias":
        return [[list(ids), bias] for ids, bias in value.items()]
    if isinstance(value, FrozenDict):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain("", entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
