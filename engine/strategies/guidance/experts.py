"""DExperts (arXiv 2105.03023) and proxy tuning (arXiv 2401.08565): the difference of two models steers a third."""

from __future__ import annotations

from ...loop.generation import Generation
from ..kit.decode import decode


def experts(
    engine, prompts, params=None, *, expert=None, anti_expert=None, alpha=1.0, stream=False, **options
) -> list[Generation]:
    """logits + alpha (logits of the expert - logits of the anti-expert), before the pipeline.

    Proxy tuning is the same with a tuned small model as the expert, the untuned one as the anti-expert, and alpha 1.
    A token costs a forward pass of each model, one row for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        expert, anti_expert: Engines of the same vocabulary; one of them may be None, which adds nothing.
        alpha: strength; 0 is plain decoding. DExperts' detoxification uses 2, its sentiment 3.2.
    """
    steering = [(each, sign) for each, sign in ((expert, 1), (anti_expert, -1)) if each is not None]

    def logits(now):
        added = zip(now.beside, steering, strict=True)
        return now.logits + alpha * sum(sign * other for other, (_, sign) in added)

    beside = [(each, prompts) for each, _ in steering]
    return decode(engine, prompts, params, logits=logits, beside=beside, stream=stream, **options)
