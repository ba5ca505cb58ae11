"""Sampling calls that are compared: rows of logits, modes, and a builder a side."""

import functools

import torch
from transformers.generation import logits_process as hf

from benchmarks.kernels import headers
from benchmarks.kernels import timing as kernels_timing
from benchmarks.kernels.timing import CACHES, Call, Run
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.reference import apply_edits, scale, truncate
from handloom.kernels.sampling.sample import sample

MODES = ("greedy", "temperature", "k", "p", "min-p", "k+p+min-p", "everything")
ALL_RULES = ("k+p+min-p", "everything")  # the modes with several rules
ROWS = ("typical", "flat", "ties")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, HISTORY = 0.8, 50, 0.95, 0.05, 1.2, 256
BANNED = 97  # in the mode "everything" every token whose id is a multiple of it
GROUP = 128  # tokens that the fused kernel has statistics of together
BYTES_A_LOGIT = 96  # most that the sides need in memory at once (plain torch, everything: 64 and the logits)
COLUMNS = {
    "mode": "mode", "rows": "rows", "batch": "B", "vocab": "V", "dtype": "dtype", "cache": "cache", "side": "side",
    "p50": "p50 us", "ratio": "/ ours", "bandwidth_share": "of bandwidth", "launches": "launches",
    "operations": "operations", "passes": "passes", "bytes_read": "read", "skipped": "",
}  # fmt: skip


def logits_of(kind, batch, vocab, dtype, device, seed=0):
    """Rows of one kind: a power law, almost equal values, or whole numbers with many ties."""
    return _rows(kind, batch, vocab, seed).to(device, dtype)


@functools.lru_cache(maxsize=1)  # large rows take longer to make than to sample from
def _rows(kind, batch, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    if kind == "typical":
        ranks = torch.stack([torch.randperm(vocab, generator=g) for _ in range(batch)])
        return -1.2 * torch.log(ranks + 1.0)
    normal = torch.randn(batch, vocab, generator=g)
    return normal * 1e-3 if kind == "flat" else (normal * 2).round()


def history_edits(batch, vocab, device):
    """(history [B, HISTORY], SparseEdits of a repetition penalty on it)."""
    history = torch.randint(0, vocab, (batch, HISTORY), generator=torch.Generator().manual_seed(1))
    start = torch.zeros(batch, dtype=torch.int64)
    ids, seen, counts = rules.count_tokens(history, (start, start), (start + HISTORY, start))
    one, bits = torch.ones(batch), rules.touched_bits(ids, vocab)
    fields = {"ids": ids, "bias": torch.zeros(ids.shape), "seen": seen, "counts": counts, "touched": bits}
    fields |= {"repetition": PENALTY * one, "presence": 0 * one, "frequency": 0 * one}
    return history.to(device), rules.SparseEdits(**{name: part.to(device) for name, part in fields.items()})


def settings_of(mode, logits):
    """Arguments of `sample` for a mode; tensors of one value a row, on the logits' device."""
    batch, vocab = logits.shape

    def value(number):
        return torch.full((batch,), float(number), device=logits.device)

    zero = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    found = {"seeds": zero + 7, "positions": zero + 11, "streams": zero}
    found["temperature"] = value(0.0 if mode == "greedy" else TEMPERATURE)
    three = (rules.top_k(value(TOP_K)), rules.top_p(value(TOP_P)), rules.min_p(value(MIN_P)))
    single = {"k": three[:1], "p": three[1:2], "min-p": three[2:]}
    found["rules"] = three if mode in ALL_RULES else single.get(mode, ())
    if mode == "everything":
        allowed = torch.arange(vocab, device=logits.device)[None] % BANNED != 0
        found |= {"edits": history_edits(batch, vocab, logits.device)[1], "logprobs": True}
        found["bitmask"] = rules.pack_mask(allowed).repeat(batch, 1)
    return found


def ours(mode, logits) -> Run:
    """Our call for a mode."""
    if logits.device.type == "cuda":
        return fused(mode, logits)
    settings = settings_of(mode, logits)
    return Call(lambda: sample(logits, **settings), {})  # its passes run in NumPy, which nothing counts


def fused(mode, logits) -> Run:
    """The fused kernels, with their buffers kept as a decode loop keeps them."""
    from handloom.kernels.sampling.fused import Plan, sample_fused

    settings = settings_of(mode, logits)
    edits, logprobs = settings.get("edits"), settings.get("logprobs", False)
    plan = Plan(logits, rules=settings["rules"], edits=edits, logprobs=logprobs)
    traffic = fused_traffic(mode, logits, settings)
    settings["rules"] = plan.rules
    return Call(lambda: sample_fused(rules.Call(logits, **settings), plan=plan), traffic)


def fused_traffic(mode, logits, settings):
    """Bytes that the fused kernels move at least, on these very logits.

    Every logit once, and once more the groups of 128 with a token that the rules keep; statistics of every group,
    written by the first launch and read by the second; bitmask, and the edited tokens; results. Not in it: reads
    of groups that turn out to hold nothing kept, further sweeps of a row with more kept tokens than fit into
    registers, and parameters of a row.
    """
    batch, vocab = logits.shape
    element, groups = logits.element_size(), -(-vocab // GROUP)
    edits, bitmask = settings.get("edits"), settings.get("bitmask")
    described = settings.get("logprobs", False)
    planes = 2 + 7 * described + (mode == "temperature")
    again = batch * GROUP * element
    if settings["rules"]:
        scaled = scale(apply_edits(logits, edits=edits, bitmask=bitmask), settings["temperature"])
        kept = torch.nn.functional.pad(
            truncate(scaled, settings["rules"]) > -torch.inf, (0, groups * GROUP - vocab)
        )
        again = int(kept.view(batch, groups, GROUP).any(-1).sum()) * GROUP * element
    lists = 0
    if edits is not None:
        groups += -(-edits.ids.shape[1] // GROUP)
        parts = (edits.ids, edits.bias, edits.seen, edits.counts, edits.touched)
        lists = sum(part.numel() * part.element_size() for part in parts) + edits.ids.numel() * element
    lists += 0 if bitmask is None else bitmask.numel() * bitmask.element_size()
    statistics = batch * planes * groups * 4
    read = batch * vocab * element + again + lists + statistics
    return {"bytes_read": read, "bytes_written": statistics + batch * (8 + 28 * described)}


def transformers_chain(mode, logits) -> Run:
    """What `generate` does with these settings: float32 copy, processors, softmax, multinomial."""
    batch, vocab = logits.shape
    if mode == "greedy":
        return lambda: logits.float().argmax(dim=-1)
    several = mode in ALL_RULES
    chain = [hf.TemperatureLogitsWarper(TEMPERATURE)]
    chain += [hf.TopKLogitsWarper(TOP_K)] if mode == "k" or several else []
    chain += [hf.TopPLogitsWarper(TOP_P)] if mode == "p" or several else []
    chain += [hf.MinPLogitsWarper(MIN_P)] if mode == "min-p" or several else []
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=logits.device)
    if mode == "everything":
        ids = history_edits(batch, vocab, logits.device)[0]
        banned = hf.SuppressTokensLogitsProcessor(list(range(0, vocab, BANNED)))
        chain = [hf.RepetitionPenaltyLogitsProcessor(PENALTY), banned, *chain]

    def run():
        scores = logits.to(torch.float32, copy=True)
        for processor in chain:
            scores = processor(ids, scores)
        tokens = torch.multinomial(torch.softmax(scores, dim=-1), 1)
        if mode != "everything":
            return tokens
        return tokens, torch.log_softmax(logits.float(), -1).gather(1, tokens), torch.log_softmax(scores, -1)

    return run


def plain_torch(mode, logits) -> Run:
    """Our rules as torch operations on whole rows, and an exponential race for the draw: no kernel, no seed."""
    if mode == "greedy":
        return lambda: logits.argmax(dim=-1)
    settings = settings_of(mode, logits)
    edits, bitmask = settings.get("edits"), settings.get("bitmask")

    def run():
        left = scale(apply_edits(logits, edits=edits, bitmask=bitmask), settings["temperature"])
        weights = torch.softmax(truncate(left, settings["rules"]), dim=-1)
        tokens = (weights / torch.empty_like(weights).exponential_()).argmax(dim=-1, keepdim=True)
        if mode != "everything":
            return tokens
        return (
            tokens,
            torch.log_softmax(logits.float(), -1).gather(1, tokens),
            weights.gather(1, tokens).log(),
        )

    return run


def topk_first(mode, logits) -> Run | None:
    """The usual hand-written loop: `topk` first, the other rules and an exponential race on the k tokens left."""
    if mode not in ("k", "k+p+min-p"):
        return None

    def run():
        values, ids = (logits.float() / TEMPERATURE).topk(TOP_K, dim=-1)
        weights = torch.softmax(values, dim=-1)
        if mode != "k":
            kept = weights.cumsum(dim=-1) - weights < TOP_P
            weights = torch.where(kept & (weights >= MIN_P * weights[:, :1]), weights, 0)
        race = weights / torch.empty_like(weights).exponential_()
        return ids.gather(1, race.argmax(dim=-1, keepdim=True))

    return run


def flashinfer_chain(mode, logits) -> Run | None:
    """FlashInfer's samplers where they are installed and have the mode; probabilities where a call asks for them."""
    try:
        from flashinfer import sampling
    except ImportError:
        return _bare_flashinfer(mode, logits)

    def scaled():
        return logits.float() / TEMPERATURE

    def three():
        left = sampling.top_k_renorm_probs(torch.softmax(scaled(), dim=-1), TOP_K)
        return sampling.min_p_sampling_from_probs(sampling.top_p_renorm_probs(left, TOP_P), MIN_P)

    return {
        "temperature": lambda: sampling.sampling_from_logits(scaled()),
        "k": lambda: sampling.top_k_top_p_sampling_from_logits(scaled(), TOP_K, 1.0),
        "p": lambda: sampling.top_k_top_p_sampling_from_logits(scaled(), logits.shape[1], TOP_P),
        "min-p": lambda: sampling.min_p_sampling_from_probs(torch.softmax(scaled(), dim=-1), MIN_P),
        "k+p+min-p": three,
    }.get(mode)


def _bare_flashinfer(mode, logits) -> Run | None:
    """The same from FlashInfer's headers, where they are given and can be built."""
    if headers.folder() is None or headers.missing(logits.device.type):
        return None
    rows = headers.Samplers(*logits.shape, logits.device)

    def weights():
        return rows.softmax(logits.float(), p=TEMPERATURE)

    return {
        "temperature": lambda: rows.draw(logits.float() / TEMPERATURE),
        "k": lambda: rows.top_k(weights(), k=TOP_K),
        "p": lambda: rows.top_p(weights(), p=TOP_P),
        "min-p": lambda: rows.min_p(weights(), p=MIN_P),
        "k+p+min-p": lambda: rows.min_p(
            rows.keep_top_p(rows.keep_top_k(weights(), k=TOP_K), p=TOP_P), p=MIN_P
        ),
    }.get(mode)


def vllm_chain(mode, logits) -> Run | None:
    """vLLM's top-k, top-p and draw where it is installed and has the mode."""
    if mode not in ("temperature", "k", "p"):
        return None
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample
    except ImportError:
        return None
    batch, device = len(logits), logits.device
    k = torch.full((batch,), TOP_K, dtype=torch.int32, device=device) if mode == "k" else None
    p = torch.full((batch,), TOP_P, device=device) if mode == "p" else None

    def run():
        scores = apply_top_k_top_p(logits.float() / TEMPERATURE, k, p)
        return random_sample(torch.softmax(scores, dim=-1), {})

    return run


SIDES = {
    "handloom": ours,
    "transformers": transformers_chain,
    "torch": plain_torch,
    "topk": topk_first,
    "flashinfer": flashinfer_chain,
    "vllm": vllm_chain,
}


def measure(mode, kind, batch, vocab, dtype, device, sides, repeats, caches=CACHES, budget=0.0, **how):
    """Yield the rows of one setting, one a side and cache; sides take turns.

    Args:
        mode, kind, dtype, sides: of `MODES`, `ROWS`, `DTYPES`, `SIDES`. repeats, budget: see `kernels_timing.rounds`.
        how: more of `kernels_timing.measure`.
    """
    about = {"benchmark": "kernels/sampling", "mode": mode, "rows": kind, "batch": batch, "vocab": vocab}
    about["dtype"] = dtype
    reason = kernels_timing.shortage(batch * vocab * BYTES_A_LOGIT, device)
    if reason:
        yield from (
            {**about, "side": side, "device": device, "cache": caches[0], "skipped": reason} for side in sides
        )
        return
    if "flashinfer" in sides and (reason := headers.missing(device)):
        sides = [side for side in sides if side != "flashinfer"]
        yield {**about, "side": "flashinfer", "device": device, "cache": caches[0], "skipped": reason}
    logits = logits_of(kind, batch, vocab, DTYPES[dtype], device)
    builders = {side: functools.partial(SIDES[side], mode) for side in sides}
    yield from kernels_timing.measure(
        builders, logits, logits.numel() * logits.element_size(),
        device=device, caches=caches, repeats=repeats, budget=budget, about=about, **how,
    )  # fmt: skip
