"""Metrics of samples: functions of one record, or of all records of one prompt and setting.

A record is a line of a results file: a mapping with `token_ids`, `text`, `raw_logprobs`, `logprobs` and what else the
run wrote. A metric of one's own is a function of a record (or of a list of records, for `group=True`).
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from ...errors import ParameterError
from .statistics import majority_at_k, pass_at_k

Record = Mapping[str, Any]
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Metric:
    """A named function of records.

    Args:
        name: in tables and plans. function: record -> number or None where it does not apply; of a list of records
            that share prompt and setting, if `group`. needs: module that it imports, or "".
    """

    name: str
    function: Callable[[Any], float | None]
    group: bool = False
    needs: str = ""

    def of(self, records: Sequence[Record]) -> list[float]:
        """Its finite values over records of one prompt and setting; failed samples are left out."""
        well = [record for record in records if record.get("finish_reason") != "error"]
        if not well:
            return []
        found = [self.function(well)] if self.group else [self.function(record) for record in well]
        return [float(value) for value in found if value is not None and math.isfinite(value)]


def ngrams(tokens: Sequence, n: int) -> list[tuple]:
    """All n-grams in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(record: Record, n: int) -> float | None:
    """Share of n-grams that occurred before, 1 - unique / all (rep-n of arXiv 1908.04319, 2202.06417)."""
    grams = ngrams(record["token_ids"], n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def diversity(record: Record) -> float | None:
    """Product over n = 2, 3, 4 of 1 - rep-n (arXiv 2202.06417)."""
    shares = [share for n in (2, 3, 4) if (share := repetition(record, n)) is not None]
    return math.prod(1 - share for share in shares) if len(shares) == 3 else None


def distinct(records: Sequence[Record], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a prompt's samples (arXiv 1510.03055)."""
    grams = [gram for record in records for gram in ngrams(record["token_ids"], n)]
    return len(set(grams)) / len(grams) if grams else None


def compression(record: Record) -> float | None:
    """Bytes of the text over its bytes after gzip: high where it repeats itself (arXiv 2403.00553)."""
    data = record["text"].encode()
    return len(data) / len(gzip.compress(data, mtime=0)) if data else None


def mean_logprob(record: Record, field: str = "raw_logprobs") -> float | None:
    """Mean log-probability of a token in nats, under the model (raw) or as it was drawn (`logprobs`).

    Of another field with a number for each token, such as those of `judged.with_steps`, its mean.
    """
    values = record.get(field)
    return float(np.mean(values)) if values else None


def surprisal(record: Record) -> float | None:
    """Mean surprisal of a token in nats under the model's own distribution."""
    mean = mean_logprob(record)
    return None if mean is None else -mean


def perplexity(record: Record) -> float | None:
    """exp of the mean surprisal under the model's own distribution."""
    mean = mean_logprob(record)
    return None if mean is None else math.exp(-mean)


def judge_perplexity(record: Record) -> float | None:
    """exp of the mean surprisal under another model; see `judged.with_judge`."""
    mean = mean_logprob(record, "judge_logprobs")
    return None if mean is None else math.exp(-mean)


def watermark_p(record: Record) -> float | None:
    """p-value of the mark that `exponential_watermark` leaves, by the record's own key and width, or the defaults."""
    from ...strategies import detect_exponential

    params = record.get("params") or {}
    return detect_exponential(
        record["token_ids"], **{k: params[k] for k in ("key", "width") if k in params}
    ).p_value


def watermark(detect: Callable[[Sequence[int]], Any], name: str = "watermark_p") -> Metric:
    """p-values of any detector, such as `GreenList(...).detect`, as a metric."""
    return Metric(name, lambda record: detect(record["token_ids"]).p_value)


def self_bleu(records: Sequence[Record]) -> float | None:
    """Mean BLEU of each sample with the others as references, 0 to 100 (arXiv 1802.01886), by sacrebleu."""
    from sacrebleu.metrics import BLEU

    texts = [record["text"] for record in records]
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return float(np.mean(scores))


def embedding_diversity(records: Sequence[Record]) -> float | None:
    """Mean cosine distance between the `embedding`s of a prompt's samples, 0 to 2; see `judged.with_embeddings`."""
    vectors = [
        np.asarray(record["embedding"], float) for record in records if record.get("embedding") is not None
    ]
    if len(vectors) < 2:
        return None
    units = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]
    return float(np.mean([1 - a @ b for a, b in combinations(units, 2)]))


def numeric_answer(text: str) -> float | None:
    """The last number of a text, thousands separators dropped."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(record: Record) -> float | None:
    """Whether the text is the target but for white space at its ends; None without a target."""
    target = record.get("target")
    return None if target is None else float(record["text"].strip() == str(target).strip())


def numeric_match(record: Record) -> float | None:
    """Whether the last number of the text is that of the target; None without a number in the target."""
    target = numeric_answer(str(record.get("target", "")))
    return None if target is None else float(numeric_answer(record["text"]) == target)


def pass_rate(records: Sequence[Record], k: int) -> float | None:
    """Unbiased pass@k over a prompt's samples, from their `correct`; None with fewer than k."""
    outcomes = [bool(record["correct"]) for record in records if record.get("correct") is not None]
    return pass_at_k(len(outcomes), sum(outcomes), k) if len(outcomes) >= k else None


def majority(records: Sequence[Record], k: int) -> float | None:
    """Probability that a vote of k of a prompt's samples on the last number is right; None without a target."""
    target = numeric_answer(str(records[0].get("target", "")))
    if target is None or len(records) < k:
        return None
    return majority_at_k([numeric_answer(record["text"]) for record in records], target, k)


def tokens_per_second(record: Record) -> float | None:
    """Output tokens after the first, per second of decoding."""
    return (record.get("time") or {}).get("tokens_per_second") or None


def extra(name: str) -> Callable[[Record], float | None]:
    """A number that the strategy wrote into `extra`."""
    return lambda record: (record.get("extra") or {}).get(name)


def mauve(ours: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], **options) -> float:
    """MAUVE between two sets of features (arXiv 2102.01454), by mauve-text; features come from `judged.features`.

    Args:
        ours, reference: one vector a text. options: of `mauve.compute_mauve`.
    """
    import mauve as library

    found = library.compute_mauve(
        p_features=np.asarray(reference, float), q_features=np.asarray(ours, float), verbose=False, **options
    )
    return float(found.mauve)


_ORDERS = range(1, 5)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("tokens", lambda record: float(len(record["token_ids"]))),
        Metric("logprob", mean_logprob),
        Metric("processed_logprob", lambda record: mean_logprob(record, "logprobs")),
        Metric("surprisal", surprisal),
        Metric("perplexity", perplexity),
        *(Metric(name, partial(mean_logprob, field=name)) for name in ("entropy", "rank", "kept")),
        Metric("judge_logprob", lambda record: mean_logprob(record, "judge_logprobs")),
        Metric("judge_perplexity", judge_perplexity),
        Metric("watermark_p", watermark_p),
        *(Metric(f"rep_{n}", partial(repetition, n=n)) for n in _ORDERS),
        *(Metric(f"distinct_{n}", partial(distinct, n=n), group=True) for n in _ORDERS),
        Metric("diversity", diversity),
        Metric("compression", compression),
        Metric("self_bleu", self_bleu, group=True, needs="sacrebleu"),
        Metric("embedding_diversity", embedding_diversity, group=True),
        Metric("exact_match", exact_match),
        Metric("numeric_match", numeric_match),
        Metric("correct", lambda record: None if record.get("correct") is None else float(record["correct"])),
        *(Metric(f"pass_{k}", partial(pass_rate, k=k), group=True) for k in (1, 5, 10, 100)),
        *(Metric(f"majority_{k}", partial(majority, k=k), group=True) for k in (5, 16, 64)),
        Metric("tokens_per_second", tokens_per_second),
        Metric("peak_mem_mb", lambda record: record.get("peak_mem_mb")),
        Metric("forward_passes", extra("passes")),
        Metric("acceptance", extra("acceptance")),
    )
}


def find(names: Sequence[str | Metric | Callable]) -> list[Metric]:
    """Metrics by name, or made of functions of a record.

    Raises:
        ParameterError: an unknown name, or one whose library is not installed.
    """
    found = []
    for name in names:
        if isinstance(name, Metric):
            found.append(name)
        elif callable(name):
            found.append(Metric(getattr(name, "__name__", "metric"), name))
        elif name not in METRICS:
            raise ParameterError(
                f"metric {name!r}: expected one of {', '.join(METRICS)}, or a function of a record"
            )
        elif METRICS[name].needs and importlib.util.find_spec(METRICS[name].needs) is None:
            raise ParameterError(f"metric {name!r} needs the package {METRICS[name].needs!r}")
        else:
            found.append(METRICS[name])
    return found
