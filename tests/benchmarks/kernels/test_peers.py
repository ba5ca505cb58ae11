"""What the GPU check measures beside this engine, on a CPU: gpt-fast's loop, torch's attention over paged cells,
FlashInfer's headers."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.decode.sides import Request, Sampling
from benchmarks.gpu import decode, kernels
from benchmarks.gpu.gpt_fast import GptFast, load
from benchmarks.gpu.scale import DRY
from benchmarks.kernels import headers, sampling, varlen
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


@pytest.fixture
def given_headers(tmp_path, monkeypatch):
    """A checkout of FlashInfer on Python's path that holds a header's name alone."""
    (tmp_path / headers.HEADER).parent.mkdir(parents=True)
    (tmp_path / headers.HEADER).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_why_flashinfers_headers_are_not_measured(given_headers, monkeypatch):
    assert headers.folder() == given_headers
    (ours, skipped) = sorted(
        sampling.measure("p", "flat", 1, 300, "fp32", "cpu", ["handloom", "flashinfer"], 1, ("warm",)),
        key=lambda row: "skipped" in row,
    )
    assert (ours["side"], skipped["side"]) == ("handloom", "flashinfer")
    assert skipped["skipped"] == "FlashInfer's kernels run on CUDA alone"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(headers.cpp_extension, "CUDA_HOME", None)
    assert "there is no nvcc" in headers.missing("cuda")
    monkeypatch.setenv("PATH", str(given_headers))
    (given_headers / "nvcc").touch(0o755)

    def fails(*about, **named):
        raise RuntimeError("Error building extension\n[1/2] nvcc\nbinding.cu(7): error: no such function\n")

    monkeypatch.setattr(headers, "library", fails)
    assert (
        headers.missing("cuda") == "FlashInfer's headers do not build: binding.cu(7): error: no such function"
    )
    monkeypatch.setattr(sys, "path", [])
    assert headers.missing("cuda") is None


def test_flashinfers_binding_is_built_once_and_called_with_addresses(given_headers, monkeypatch):
    text, calls, built = headers.binding(), [], []
    for name, call in headers.CALLS.items():
        assert f'extern "C" int peer_{name}({headers.ARGUMENTS})' in text
        assert call in text
    assert len(headers.TYPES) == headers.ARGUMENTS.count(",") + 1
    monkeypatch.setattr(headers.cpp_extension, "_get_build_directory", lambda *about: str(given_headers))
    monkeypatch.setattr(headers.cpp_extension, "load", lambda *about, **named: built.append((about, named)))

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, arguments))
                return 7 * (name == "peer_draw")

            self.__dict__[name] = call
            return call

    made = Library()
    monkeypatch.setattr(headers.ctypes, "CDLL", lambda path: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=99))
    headers.library.cache_clear()
    rows = headers.Samplers(2, 30, "cpu")
    x = torch.zeros(2, 30)
    left = rows.keep_top_p(rows.keep_top_k(rows.softmax(x, p=0.8), k=5), p=0.9)
    assert rows.min_p(left, p=0.1) is rows.tokens
    one, two, space = *(part.data_ptr() for part in rows.probs), rows.space.data_ptr()
    assert calls == [
        ("peer_softmax", (x.data_ptr(), one, space, 2, 30, 0, 0.8, 0, 99)),
        ("peer_keep_top_k", (one, two, rows.states.data_ptr(), 2, 30, 5, 1.0, 0, 99)),
        ("peer_keep_top_p", (two, one, space, 2, 30, 0, 0.9, 0, 99)),
        ("peer_min_p", (one, rows.tokens.data_ptr(), space, 2, 30, 0, 0.1, 0, 99)),
    ]
    ((about, named),) = built
    assert about[1] == [str(given_headers / "binding.cu")]
    assert (given_headers / "binding.cu").read_text() == text
    assert named["extra_include_paths"] == [str(given_headers / "include")]
    with pytest.raises(RuntimeError, match="draw failed with status 7"):
        rows.draw(x)
    with pytest.raises(ValueError, match=r"float32 \(2, 30\)"):
        rows.draw(x.double())
    with pytest.raises(AttributeError, match="no sampler 'top_q'; there are softmax, draw"):
        rows.top_q  # noqa: B018
    headers.library.cache_clear()
