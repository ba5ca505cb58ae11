"""Settings: every name under which a parameter may be written, with what it takes; for type checkers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

Ids = Sequence[int]
Bias = Mapping[int, float] | Mapping[str, float] | Sequence[Any]


class Single(TypedDict, total=False):
    """The keyword arguments of `SamplingParams` and of `Engine.generate`, but for the number of samples.

    None stands for a parameter's default. What each means is told by `SamplingParams`.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    max_length: int | None
    temperature: float | None
    seed: int | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    top_a: float | None
    tfs: float | None
    top_n_sigma: float | None
    top_h: float | None
    top_h_rule: Literal["paper", "code"] | None
    p_less: bool | Literal["norm"] | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    smoothing_factor: float | None
    smoothing_curve: float | None
    edt_theta: float | None
    edt_base: float | None
    mirostat: Literal[0, 1, 2] | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    adaptive_target: float | None
    adaptive_decay: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_scope: Literal["auto", "prompt", "output", "all"] | None
    penalty_window: int | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_window: int | None
    dry_breakers: Sequence[int | str] | None
    no_repeat_ngram_size: int | None
    logit_bias: Bias | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None
    banned_tokens: Ids | None
    bad_words: Sequence[Sequence[int] | str] | None
    allowed_tokens: Ids | None
    suppress_first: Ids | None
    forced_tokens: Mapping[int, int] | Sequence[Any] | None
    exponential_decay: tuple[int, float] | None
    prefix_fn: Callable[[int, Any], Any] | None
    watermarking_config: Any
    stop: str | Sequence[str] | None
    stop_token_ids: Ids | None
    eos_token_ids: Ids | None
    ignore_eos: bool | None
    include_stop: bool | None
    max_time: float | None
    criteria: Any
    skip_special_tokens: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    profile: Literal["default", "hf", "vllm", "llamacpp", "textgen"] | None
    order: str | Sequence[str] | None
    processors: Any

    # other engines' names
    max_tokens: int | None
    max_completion_tokens: int | None
    max_gen_toks: int | None
    n_predict: int | None
    min_tokens: int | None
    temp: float | None
    typ_p: float | None
    tfs_z: float | None
    top_nsigma: float | None
    mirostat_mode: Literal[0, 1, 2] | None
    repeat_penalty: float | None
    repetition_penalty_range: int | None
    repeat_last_n: int | None
    penalty_last_n: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: str | Sequence[int | str] | None
    suppress_tokens: str | Ids | None
    custom_token_bans: str | Ids | None
    begin_suppress_tokens: Ids | None
    bad_words_ids: Sequence[Sequence[int] | str] | None
    allowed_token_ids: Ids | None
    exponential_decay_length_penalty: tuple[int, float] | None
    prefix_allowed_tokens_fn: Callable[[int, Any], Any] | None
    stop_strings: str | Sequence[str] | None
    custom_stopping_strings: str | Sequence[str] | None
    ban_eos_token: bool | None
    eos_token_id: int | Ids | None
    include_stop_str_in_output: bool | None
    stopping_criteria: Any
    top_logprobs: int | None
    n_probs: int | None
    logits_processor: Any
    logits_processors: Any

    # what says something only together with others
    do_sample: bool | None
    dynamic_temperature: bool | None
    dynatemp_low: float | None
    dynatemp_high: float | None
    best_of: int | None


class Settings(Single, total=False):
    """All of them."""

    n: int | None
    num_return_sequences: int | None
    n_cmpl: int | None


class Modes(TypedDict, total=False):
    """What leads `Engine.generate` to a strategy, as transformers names it; see `strategies.generate`."""

    num_beams: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    renormalize_logits: bool | None
    constraints: Sequence[Any] | None
    force_words_ids: Sequence[Any] | None
    penalty_alpha: float | None
    dola_layers: str | Sequence[int] | None
    guidance_scale: float | None
    negative_prompt_ids: Any
    negative_prompt: str | None
    assistant_model: Any
    assistant_early_exit: int | None
    num_assistant_tokens: int | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    custom_generate: Any


class OneCall(Single, Modes, total=False):
    """The keyword arguments of `Engine.generate` for one sample."""


class Call(Settings, Modes, total=False):
    """All of them."""
