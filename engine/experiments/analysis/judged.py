"""What other models say of records: log-probabilities of a judge, and features for distances between texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...engine import Engine
from ...errors import ParameterError

Records = Sequence[Mapping[str, Any]]


def with_judge(records: Records, engine: Engine) -> list[dict[str, Any]]:
    """Records with `judge_logprobs`, of each token of the text behind its prompt, for `judge_perplexity`.

    Texts are encoded by the judge's own tokenizer; a prompt's samples share its computation.

    Args:
        engine: of the judge. Prompts that are messages go through its chat template.
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
        state = engine.prefill([records[same[0]]["prompt"]]).select([0] * len(read))
        scores = engine.score(state, [ids for _, ids in read]).tolist()
        for (i, ids), row in zip(read, scores, strict=True):
            made[i]["judge_logprobs"] = row[: len(ids)]
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
