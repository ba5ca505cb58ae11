"""What the GPU check measures beside this engine, on a CPU: gpt-fast's loop, torch's attention over paged cells."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.decode.sides import Request, Sampling
from benchmarks.gpu import decode, kernels
from benchmarks.gpu.gpt_fast import GptFast, load
from benchmarks.gpu.scale import DRY
from benchmarks.kernels import varlen
from benchmarks.kernels.attention import parse_heads
from benchmarks.support.shapes import build
from handloom import Engine
from handloom.kernels.attention.packed import paged_attention_packed_reference

PEERS = Path(__file__).resolve().parents[2] / "support" / "peers"


def test_gpt_fasts_loop_says_what_the_model_says():
    """Its weights are ours in another order: greedy answers agree, also after another prompt was there before."""
    model = build("tiny", torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)  # so that tokens depend on the whole context
    side, engine = GptFast(load(PEERS), model, 24), Engine(model, slots=1)
    for prompt in ([3, 5, 7, 9], [1] * 17):
        (want,) = engine.generate([prompt], max_new_tokens=6, ignore_eos=True, progress=False)
        answer, moments = side.tokens(prompt, 6)
        assert answer == want.token_ids
        assert moments == sorted(moments)
    line = side.timeline([Request([3, 5], 4), Request([4], 3)])
    assert [len(moments) for moments in line.tokens] == [4, 3]
    assert line.total == line.tokens[1][-1] > line.tokens[1][0] > line.tokens[0][-1]
    with pytest.raises(ValueError, match="greedily alone"):
        side.timeline([Request([3], 2)], Sampling(0.8))


def test_gpt_fasts_row_and_why_there_is_none():
    (row,) = decode.gpt_fast(replace(DRY, peers=PEERS))
    assert (row["side"], "skipped" in row) == ("gpt-fast", False)
    assert row["tokens_per_s"] > 0
    (row,) = decode.gpt_fast(replace(DRY, peers=PEERS / "gpt-fast"))
    assert "gpt-fast/gpt-fast/model.py" in row["skipped"]
    with pytest.raises(ImportError, match=r"no gpt-fast/model\.py: its checkout is given"):
        load(DRY.peers)
    with pytest.raises(ValueError, match="qwen3_moe"):
        GptFast(load(PEERS), build("tiny-moe", torch.float32), 16)


def paged(
    q, keys, values, starts, no_keys, queries, context, *, window_size, enable_gqa, seqused_k, block_table
):
    """What `varlen_attn` is asked for, by our reference; pages of 16 are refused, as some devices do."""
    assert (no_keys, window_size, enable_gqa) == (None, (-1, 0), True)
    assert queries == int(starts.diff().max())
    assert context == int(seqused_k.max())
    if keys.shape[1] % 256:
        raise RuntimeError("page size must be a multiple of 256")
    return paged_attention_packed_reference(q, keys, values, block_table, starts, seqused_k)


@pytest.mark.parametrize("queries", [1, 7])
def test_paged_attention_of_torch_is_asked_for_the_same(queries):
    given = varlen.packed_of(parse_heads("4/2x16"), 3, queries, 40, torch.float32, "cpu")
    want = varlen.ours(given)()
    torch.testing.assert_close(varlen.theirs(paged, 256, given)(), want)
    how = {"caches": ("warm",), "repeats": 1, "budget": 1.0}
    found = list(varlen.measure(parse_heads("4/2x16"), 3, queries, 40, "fp32", "cpu", paged, **how))
    refused, *timed = found
    assert refused["side"] == "varlen_attn, pages of 16"
    assert "multiple of 256" in refused["skipped"]
    assert [row["side"] for row in timed] == ["handloom", "varlen_attn, pages of 256"]
    assert timed[1]["ratio"] > 0


def test_why_torch_has_no_paged_attention_is_said(monkeypatch):
    (row,) = kernels.varlen_timings(DRY)
    assert row["skipped"] == "varlen_attn runs on CUDA alone, not on cpu"
    varlen_module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen_module, "varlen_attn", lambda query, key, value: None)
    assert varlen.missing("cuda") == f"varlen_attn of torch {torch.__version__} takes no block_table"
