"""What other models say of records: log-probabilities of a judge, and features for distances between texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine import Engine
from ...errors import ParameterError
from ...params.sampling_params import SamplingParams
from ...strategies.kit.decode import LEAST, Now, decode
from ..plan import Setting
from ..samples import turned

Records = Sequence[Mapping[str, Any]]


def with_judge(records: Records, engine: Engine, *, chat: bool = False) -> list[dict[str, Any]]:
    """Records with `judge_logprobs`, of each token of the text behind its prompt, for `judge_perplexity`.

    Texts are encoded by the judge's own tokenizer; a prompt's samples share its computation.

    Args:
        engine: of the judge. Prompts that are messages go through its chat template, and with `chat` texts, too.
    """
    if engine.tokenizer is None:
        raise ParameterError("a judge reads texts, and this engine has no tokenizer")
    places: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record["prompt_hash"], []).append(place)
    made = [dict(record) for record in records]
    for same in places.values():
        texts = [engine.tokenizer.encode(records[i]["text"], add_special_tokens=False) for i in same]
        read = [(i, ids) for i, ids in zip(same, texts, strict=True) if ids]
        if not read:
            continue
        state = engine.prefill([turned(records[same[0]]["prompt"], chat)]).select([0] * len(read))
        scores = engine.score(state, [ids for _, ids in read]).tolist()
        for (i, ids), row in zip(read, scores, strict=True):
            made[i]["judge_logprobs"] = row[: len(ids)]
    return made


def with_steps(records: Records, engine: Engine, *, chat: bool = False) -> list[dict[str, Any]]:
    """Records with the `entropy` in nats of the model's distribution at each of their tokens, the token's `rank` in it
    (1 is the most probable), and how many tokens the pipeline `kept`.

    The tokens are fed again, a forward pass a step, with the parameters of the record; a strategy's own changes of the
    distribution are not in it.

    Args:
        engine: of the model that drew them. chat: as in the plan.
    """
    made = [dict(record) for record in records]
    told = [record for record in made if record["token_ids"] and record["finish_reason"] != "error"]
    for record in told:
        record |= {"entropy": [], "rank": [], "kept": []}

    def again(now: Now) -> Tensor:
        rows = [told[request.index] for request in now.live]
        tokens = torch.tensor([r["token_ids"][len(r["rank"])] for r in rows], device=now.logits.device)
        logp = now.logits.log_softmax(-1)
        entropy = -(logp.exp() * logp.clamp(min=LEAST)).sum(-1)
        rank = (now.logits > now.logits.gather(1, tokens[:, None])).sum(-1) + 1
        kept = (now.processed > -torch.inf).sum(-1)
        for row, *numbers in zip(rows, entropy.tolist(), rank.tolist(), kept.tolist(), strict=True):
            for name, number in zip(("entropy", "rank", "kept"), numbers, strict=True):
                row[name].append(number)
        return tokens

    def asked(record: Mapping[str, Any]) -> SamplingParams:
        setting = Setting("", record.get("strategy"), record["params"])
        ends = {"max_new_tokens": len(record["token_ids"]), "stop": (), "seed": record["seed"]}
        return SamplingParams(**{**setting.params, **ends})

    prompts = [turned(record["prompt"], chat) for record in told]
    if told:
        decode(engine, prompts, [asked(record) for record in told], step=again)
    return made


@torch.no_grad()
def features(engine: Engine, texts: Sequence[str], *, layer: int = -1, pooling: str = "mean") -> np.ndarray:
    """[N, D] float32: a vector for each text, from the hidden states of a local model.

    Args:
        layer: of the hidden states. pooling: `mean` over the tokens, or the `last` one, as MAUVE takes it.

    Raises:
        ParameterError: another pooling, or a text without tokens.
    """
    if pooling not in ("mean", "last"):
        raise ParameterError(f"pooling={pooling!r}: expected mean or last")
    rows = []
    for number, text in enumerate(texts):
        if not text:
            raise ParameterError(f"text {number} is empty, and has no features")
        hidden = engine.prefill([text], hidden=True).hidden(layer)[0].float()  # [T, D]
        rows.append((hidden.mean(0) if pooling == "mean" else hidden[-1]).cpu().numpy())
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def with_embeddings(records: Records, engine: Engine, *, layer: int = -1) -> list[dict[str, Any]]:
    """Records with `embedding`, the mean hidden state of their text in a local model, for `embedding_diversity`."""
    made = [dict(record) for record in records]
    read = [record for record in made if record["text"]]
    for record, vector in zip(read, features(engine, [r["text"] for r in read], layer=layer), strict=True):
        record["embedding"] = vector.tolist()
    return made
