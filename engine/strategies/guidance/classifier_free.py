"""Classifier-free guidance (arXiv 2306.17806) and context-aware decoding (arXiv 2305.14739): one model, two prompts."""

from __future__ import annotations

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def classifier_free_guidance(
    engine, prompts, params=None, *, negative_prompts=None, guidance_scale=1.5, stream=False, **options
) -> list[Generation]:
    """log p = log p(w | negative) + gamma (log p(w | prompt) - log p(w | negative)), before the pipeline.

    A token costs one forward pass of two rows for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        negative_prompts: what to move away from, one for each prompt, or one for all; None is each prompt's last
            token alone, as in the paper and transformers.
        guidance_scale: gamma; 1 is plain decoding, 0 decodes the negative prompts.

    Returns:
        One Generation for each sample of each prompt, in order.
    """

    def logits(now):
        conditional, unconditional = (each.log_softmax(-1) for each in now.joint.logits)
        return unconditional + guidance_scale * (conditional - unconditional)

    given = opposites(engine, prompts, negative_prompts)
    return decode(engine, prompts, params, logits=logits, beside=[(engine, given)], stream=stream, **options)


def context_aware(
    engine, prompts, params=None, *, questions, alpha=0.5, stream=False, **options
) -> list[Generation]:
    """(1 + alpha) logits(w | context, question) - alpha logits(w | question), before the pipeline.

    A token costs one forward pass of two rows for each prompt.

    Args:
        prompts: context and question.
        params, options: as for `decode`.
        questions: the same prompts without their context, one for each.
        alpha: how much the context counts beyond what the model knows; 0 is plain decoding, the paper's are 0.5 (in
            summaries) and 1 (where knowledge conflicts).
    """

    def logits(now):
        informed, prior = now.joint.logits
        return (1 + alpha) * informed - alpha * prior

    beside = [(engine, questions)]
    return decode(engine, prompts, params, logits=logits, beside=beside, stream=stream, **options)


def opposites(engine, prompts, negative) -> list:
    """One negative prompt for each prompt."""
    encoded = [request.prompt for request in engine.requests(prompts)]
    if negative is None:
        if any(prompt.embeddings is not None for prompt in encoded):
            raise ParameterError("prompts of embeddings have no last token: give negative_prompts")
        return [prompt.ids[-1:] for prompt in encoded]
    given = [request.prompt for request in engine.requests(negative)]
    return given * len(encoded) if len(given) == 1 else given
