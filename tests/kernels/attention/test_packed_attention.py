"""Packed attention: the reference, the CPU path and the Triton kernel against a plain oracle, row by row.

Cells beyond a row's length and results that nobody wrote are NaN, so reading one shows. Without a GPU the kernel runs
in Triton's interpreter. Tolerance: twice the error of the plain computation in the same dtype.
"""

from dataclasses import dataclass

import pytest
import torch
from attention_oracle import attend_one, plain_error, plain_logits

from handloom.kernels.attention.attention_cpu import CellPlan, packed_attention_cpu
from handloom.kernels.attention.packed import paged_attention_packed, paged_attention_packed_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Packed:
    """One call: (cells, new tokens) of each row, options, seeded data; `cells[r]` holds row r's in order."""

    rows: tuple = ((5, 5), (40, 7), (1, 1), (70, 33), (90, 1))
    padding: int = 3
    heads: tuple = (6, 2)
    dims: tuple = (16, 16)
    block: int = 16
    dtype: torch.dtype = F32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        (heads, kv_heads), (d, dv) = self.heads, self.dims
        width = max(-(-length // self.block) for length, _ in self.rows) + 1
        pools = [
            torch.full((1 + len(self.rows) * width, self.block, kv_heads, n), float("nan"), dtype=self.dtype)
            for n in (d, dv)
        ]
        order = torch.randperm(len(self.rows) * width, generator=generator)
        self.table = (order + 1).view(len(self.rows), width).to(torch.int32)
        self.cells = []
        for blocks, (length, _) in zip(self.table.long(), self.rows, strict=True):
            fresh = (normal(length, kv_heads, d) * 2, normal(length, kv_heads, dv))
            for pool, new in zip(pools, fresh, strict=True):
                whole = pool[blocks].flatten(0, 1)
                whole[:length] = new
                pool[blocks] = whole.view(width, self.block, kv_heads, -1)
            self.cells.append(fresh)
        self.keys, self.values = pools
        self.counts = [count for _, count in self.rows]
        self.starts = torch.tensor([0, *self.counts]).cumsum(0).int()
        self.lengths = torch.tensor([length for length, _ in self.rows], dtype=torch.int32)
        self.q = normal(sum(self.counts) + self.padding, heads, d)
        self.sink = normal(heads) if self.sinks else None

    def options(self):
        sink = None if self.sink is None else self.sink.to(DEVICE)
        return {"sliding_window": self.window, "softcap": self.softcap, "sinks": sink}

    def tensors(self):
        found = (self.q, self.keys, self.values, self.table, self.starts, self.lengths)
        return [t.to(DEVICE) for t in found]

    def triton(self, **more):
        return paged_attention_packed(*self.tensors(), **self.options(), kernels="triton", **more).cpu()

    def cpu(self):
        plan = CellPlan(self.table.tolist(), self.lengths.tolist(), self.block, counts=self.counts)
        options = self.options() | {"sinks": self.sink}
        return packed_attention_cpu(self.q, self.keys, self.values, plan, **options)

    def oracle(self, dtype=torch.float64, logits=plain_logits):
        """Token by token over the cells that its position allows, all arithmetic in `dtype`."""
        out = torch.zeros(*self.q.shape[:2], self.dims[1], dtype=dtype)
        rules = {"softcap": self.softcap, "sinks": self.sink, "logits": logits}
        for (length, count), start, (k, v) in zip(self.rows, self.starts.tolist(), self.cells, strict=False):
            for j in range(count):
                place = length - count + j
                seen = slice(0 if self.window is None else max(0, place - self.window + 1), place + 1)
                parts = (self.q[start + j].to(dtype), k[seen].to(dtype), v[seen].to(dtype))
                out[start + j] = attend_one(*parts, self.dims[0] ** -0.5, **rules)
        return out

    def check(self, out):
        assert out.dtype == self.dtype
        assert (out[sum(self.counts) :] == 0).all()
        exact, plain = plain_error(self.oracle, self.dtype, self.dims[0])
        assert (out.double() - exact).abs().max() <= 2 * plain + 4 * torch.finfo(self.dtype).eps


RULES = {
    "plain": {},
    "window": {"window": 20},
    "window 1": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 3.0, "sinks": True},
}
SHAPES = {
    "multi-head": {"heads": (4, 4)},
    "multi-query": {"heads": (8, 1)},
    "more heads a group than a tile": {"heads": (130, 1), "rows": ((9, 9), (20, 2))},
    "80": {"dims": (80, 80)},
    "128, blocks of 64": {"dims": (128, 128), "block": 64},
    "256": {"dims": (256, 256), "block": 32},
    "values of another size": {"dims": (24, 40)},
    "prompts alone": {"rows": ((200, 200), (64, 64), (65, 65))},
    "chunks of a long prompt": {"rows": ((300, 129), (257, 1)), "padding": 0},
    "one row of tokens": {"rows": ((1, 1),), "padding": 0},
    "padding longer than a tile": {"rows": ((3, 2),), "padding": 200},
}
CASES = [pytest.param(change, id=name) for name, change in (RULES | SHAPES).items()]


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reference_against_oracle(change, dtype):
    case = Packed(**change, dtype=dtype)
    case.check(paged_attention_packed_reference(*case.tensors(), **case.options()).cpu())


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cpu_against_oracle(change, dtype):
    case = Packed(**change, dtype=dtype)
    case.check(case.cpu())


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_triton_against_oracle(change, dtype):
    case = Packed(**change, dtype=dtype)
    case.check(case.triton())


def test_triton_in_half_precision():
    case = Packed(dtype=F16)
    case.check(case.triton())


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_rows_without_queries_or_without_cells(kernels):
    """Empty rows among others and at the end, as in a recorded pass that is not full."""
    case = Packed(sinks=True)
    q, keys, values, table, starts, lengths = case.tensors()
    at = torch.tensor([0, 0, 1, 2, 3, 4, 4], device=DEVICE)  # rows 0 and 4 once more, without queries
    counts = torch.tensor(case.counts, device=DEVICE)[at]
    counts[1], counts[-1] = 0, 0
    lengths = lengths[at]
    lengths[-1] = 0
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    args = (q, keys, values, table[at], starts, lengths)
    case.check(paged_attention_packed(*args, **case.options(), kernels=kernels).cpu())


def test_triton_writes_its_results_and_nothing_else():
    case = Packed(window=20, sinks=True)
    guard = 7.25
    frame = torch.full((len(case.q) + 2, *case.q.shape[1:]), guard, device=DEVICE)
    frame[1:-1] = float("nan")
    out = case.triton(out=frame[1:-1])
    case.check(out)
    assert torch.equal(out, frame[1:-1].cpu())
    assert (frame[0] == guard).all()
    assert (frame[-1] == guard).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_do_not_see_each_other(dtype):
    """Triton tiles begin with their row, so a row alone has the same bits as among others; on the CPU likewise."""
    case = Packed(dtype=dtype)
    together, on_cpu = case.triton(), case.cpu()
    for row, count in enumerate(case.counts):
        start, one = int(case.starts[row]), slice(row, row + 1)
        q = case.q[start : start + count]
        starts = torch.tensor([0, count], dtype=torch.int32, device=DEVICE)
        _, keys, values, table, _, lengths = case.tensors()
        alone = paged_attention_packed(
            q.to(DEVICE), keys, values, table[one], starts, lengths[one], kernels="triton"
        )
        assert torch.equal(alone.cpu(), together[start : start + count])
        plan = CellPlan(case.table[one].tolist(), case.lengths[one].tolist(), case.block, counts=[count])
        assert torch.equal(
            packed_attention_cpu(q, case.keys, case.values, plan), on_cpu[start : start + count]
        )


def test_triton_takes_int64_and_strided_inputs():
    case = Packed()
    q, keys, values, table, starts, lengths = case.tensors()
    both = torch.stack([keys, values], dim=1)  # keys and values interleaved by block
    q = q.transpose(0, 1).contiguous().transpose(0, 1)  # head-major, as a model makes it
    args = (q, both[:, 0], both[:, 1], table.long(), starts.long(), lengths.long())
    case.check(paged_attention_packed(*args, kernels="triton").cpu())


def test_the_reference_reads_nothing_on_the_host():
    """On the meta device every read of a value raises."""
    case = Packed(window=20)
    args = [t.to("meta") for t in case.tensors()]
    assert paged_attention_packed(*args, sliding_window=20, kernels="torch").shape == case.q.shape


def test_refusals_name_what_does_not_fit():
    case = Packed()
    q, keys, values, table, starts, lengths = case.tensors()
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention_packed(q[..., :8], keys, values, table, starts, lengths)
    with pytest.raises(ValueError, match="starts has 5 entries, lengths 5 and block_table 5 rows"):
        paged_attention_packed(q, keys, values, table, starts[1:], lengths)
    plan = CellPlan(case.table.tolist(), case.lengths.tolist(), case.block, counts=case.counts)
    with pytest.raises(ValueError, match="do not fit 10 tokens"):
        packed_attention_cpu(case.q[:10], case.keys, case.values, plan)
