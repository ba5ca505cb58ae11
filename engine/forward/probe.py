"""The check at load: does a model give the same logits through our cache as through transformers' own?"""

from __future__ import annotations

import logging

import torch
from transformers import DynamicCache

from ..cache.paged import ATTENTION, HYBRID, RECURRENT, layer_plan
from ..cache.pool import BlockPool
from ..errors import ModelError
from ..kernels import dispatch
from .fused.recognise import fuse as fuse_layers
from .fused.recognise import unfuse
from .model import Model, supported_layers
from .passes import accepted
from .ragged import row_wise_ropes
from .solo import SoloModel

log = logging.getLogger("handloom")
LENGTHS, STEPS = (9, 4), 2
# Largest mean logit error, in standard deviations of the logits, that is rounding and not structure.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOOSE = 0.15
# Models that keep recurrent state in their modules, where no cache can reach it.
STATE_IN_MODULES = {"recurrent_gemma"}
# Models that find a query's position by counting back from the number of keys.
POSITION_FROM_KEYS = {"gpt_neo"}


def adapt(
    module, pool_options: dict, prefill_chunk: int = 512, self_check: bool = True, fuse: bool | None = None
):
    """The fastest adapter that is right for a model.

    Args:
        module: the twin of a transformers causal LM.
        pool_options: arguments of `BlockPool`.
        prefill_chunk: most prompt tokens in one forward pass.
        self_check: compare logits with transformers' cache on two short rows; without it the static rules decide.
        fuse: run decoder layers fused where they are recognised; None does so on CUDA.

    Returns:
        (Model or SoloModel, BlockPool, vocabulary size of the logits).

    Raises:
        ModelError: the model cannot run a forward pass at all, or `fuse` is True and no layer can be fused.
    """
    config = module.config.get_text_config(decoder=True)
    row_wise_ropes(module)  # before the first pass: they write to buffers, which are the user's until then
    prompts = _prompts(config.vocab_size)
    reference, cache = _reference(module, config, prompts[0])
    vocab = reference.shape[-1]
    refusal = _refusal(module)
    tried = []
    for path in [] if refusal else _paths(module):
        probe = Model(module, _pool(module, cache), path, prefill_chunk)
        error = _error(probe, prompts, reference) if self_check else 0.0
        if not isinstance(error, str) and error <= _tolerance(module):
            fused = _fused(probe, fuse, (prompts, reference) if self_check else None)
            pool = _pool(module, cache, **pool_options)
            model = Model(module, pool, path, prefill_chunk)
            model.fused = fused
            return model, pool, vocab
        tried.append(
            f"{path}: {error if isinstance(error, str) else f'logits differ by {error:.2g} deviations'}"
        )
    reason = refusal or "; ".join(tried)
    if fuse:
        raise ModelError(f"fuse=True: {type(module).__name__} runs one sequence at a time ({reason})")
    log.warning("%s runs one sequence at a time (%s)", type(module).__name__, reason)
    pool = BlockPool(**pool_options)
    return SoloModel(module, pool, reason, config.model_type in STATE_IN_MODULES), pool, vocab


def _fused(probe, wanted: bool | None, check) -> dict[str, str]:
    """Fuse what can be; name of every decoder layer -> why it stays plain, empty where it is fused."""
    kernels = probe.device.type == "cuda" and dispatch.requested() != "torch"
    if not (kernels if wanted is None else wanted):
        return {}
    reasons = fuse_layers(probe) if probe.path == "attention" else {}
    fused = sum(not reason for reason in reasons.values())
    if fused and check is not None:
        error = _error(probe, *check)
        if isinstance(error, str) or error > _tolerance(probe.module):
            unfuse(probe.module)
            differs = error if isinstance(error, str) else f"logits differ by {error:.2g} deviations"
            reasons, fused = dict.fromkeys(reasons, f"all fused layers together: {differs}"), 0
    left = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if wanted and not fused:
        path = f"its attention runs on the {probe.path} path"
        raise ModelError(f"fuse=True: no decoder layer can be fused: {(left or path)[:300]}")
    if reasons:
        log.info("%d of %d decoder layers fused%s", fused, len(reasons), f" ({left[:300]})" if left else "")
    return reasons


def _refusal(module) -> str:
    config = module.config.get_text_config(decoder=True)
    if config.model_type in STATE_IN_MODULES:
        return "it keeps recurrent state inside its modules"
    return supported_layers(module.config)


def _paths(module) -> list[str]:
    config = module.config.get_text_config(decoder=True)
    kinds = {kind for kind, _ in layer_plan(config)}
    rows = [] if kinds & (RECURRENT | HYBRID) else ["rows"]
    # Rules for what a short probe would not meet: one temperature for all rows, borders that only a mask knows,
    # keys that are expanded behind the cache.
    if getattr(config, "attn_temperature_tuning", None) or config.model_type in POSITION_FROM_KEYS:
        return rows
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # below an adapter
    own = (
        "chunked_attention" in kinds
        or getattr(config, "kv_lora_rank", None)
        or not kinds & (ATTENTION | HYBRID)
    )
    if own or not type(base)._can_set_attn_implementation():
        return ["mask", *rows]
    return ["attention", "mask", *rows]


def _prompts(vocab: int) -> list[list[int]]:
    """Two rows of different length; the shorter begins the longer, so that one reference serves both."""
    longest = [(7 * i + 1) % min(vocab, 97) for i in range(max(LENGTHS))]
    return [longest[:n] for n in LENGTHS]


@torch.no_grad()
def _reference(module, config, prompt):
    """Logits `[T, V]` of a prompt, and the cache it left, from transformers alone."""
    cache = DynamicCache(config=config)
    ids = torch.tensor([prompt], device=module.get_input_embeddings().weight.device)
    name = "cache_params" if "cache_params" in accepted(module) else "past_key_values"
    try:
        out = module(input_ids=ids, use_cache=True, **{name: cache})
    except Exception as error:
        raise ModelError(f"{type(module).__name__} fails on a plain forward pass: {error}") from error
    return out.logits[0].float(), cache


def _pool(module, cache, **options) -> BlockPool:
    """A pool with cells for every layer that has keys and values in `cache`, grouped by shape."""
    pool, count = BlockPool(**options), len(layer_plan(module.config))
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(cache.layers[:count]):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and keys.dim() == 4:
            shape = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
            groups.setdefault((*shape, keys.dtype, keys.device), []).append(index)
    for (key_shape, value_shape, dtype, device), layers in groups.items():
        pool.add_store(layers, key_shape, value_shape, dtype, device)
    return pool


def _tolerance(module) -> float:
    quantized = getattr(module, "is_quantized", False)
    return LOOSE if quantized else TOLERANCE.get(module.dtype, LOOSE)


@torch.no_grad()
def _error(model, prompts, reference):
    """Mean logit error of two ragged rows over a prefill and some steps, in deviations; or what went wrong."""
    try:
        starts = [len(p) - STEPS for p in prompts]
        filled = [model.prefill(p[:n]) for p, n in zip(prompts, starts, strict=True)]
        rows = tuple(row for row, _ in filled)
        states = tuple(torch.cat(parts) for parts in zip(*(out.states for _, out in filled), strict=True))
        got = [[out.logits[0, -1]] for _, out in filled]
        for step in range(STEPS):
            tokens = [[p[n + step]] for p, n in zip(prompts, starts, strict=True)]
            rows, out = model.extend(rows, tokens, states)
            states = out.states
            for logits, row in zip(got, out.logits, strict=True):
                logits.append(row[0])
    except Exception as error:  # noqa: BLE001 - any failure means this path does not fit the model
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    want = torch.stack([reference[n - 1 + i] for n in starts for i in range(STEPS + 1)])
    have = torch.stack([logits for row in got for logits in row])
    if not torch.equal(want.isnan(), have.isnan()):
        return "NaN in other places"
    scale = want.nan_to_num().std().clamp_min(1e-6)
    return float((want - have).nan_to_num().abs().mean() / scale)
