"""Paged attention: the reference, the CPU path and the Triton kernel, each against a plain oracle.

Cells beyond each row's length are NaN in every test, so reading one shows. Without a GPU the kernel runs in
Triton's interpreter. Tolerance: twice the error of the plain computation in the same dtype.
"""

from dataclasses import dataclass, field

import pytest
import torch
from attention_oracle import attend_one, plain_error, plain_logits
from torch.nn.functional import scaled_dot_product_attention

from handloom.kernels import dispatch
from handloom.kernels.attention import attention, attention_cpu
from handloom.kernels.attention.attention import (
    attention_workspace,
    paged_attention,
    paged_attention_reference,
)
from handloom.kernels.attention.attention_cpu import CellPlan, paged_attention_cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Case:
    """One call: shapes, options and seeded data; `row_cells[b]` holds row b's keys and values in order."""

    lengths: tuple = (1, 17, 90)
    queries: int = 1
    counts: tuple | None = None
    heads: tuple = (6, 2)
    dims: tuple = (16, 16)
    block: int = 16
    dtype: torch.dtype = F32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tree: bool = False
    scattered: bool = True
    seed: int = 0
    row_cells: list = field(default_factory=list, init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        rows, width = len(self.lengths), -(-max(self.lengths) // self.block) + 1
        (hq, hk), (d, dv) = self.heads, self.dims
        self.keys = torch.full((1 + rows * width, self.block, hk, d), float("nan"), dtype=self.dtype)
        self.values = torch.full((1 + rows * width, self.block, hk, dv), float("nan"), dtype=self.dtype)
        order = (
            torch.randperm(rows * width, generator=generator)
            if self.scattered
            else torch.arange(rows * width)
        )
        self.table = (order + 1).view(rows, width).to(torch.int32)
        for blocks, length in zip(self.table.long(), self.lengths, strict=True):
            cells = (normal(length, hk, d) * 2, normal(length, hk, dv))
            for pool, new in zip((self.keys, self.values), cells, strict=True):
                whole = pool[blocks].flatten(0, 1)
                whole[:length] = new
                pool[blocks] = whole.view(width, self.block, *new.shape[1:])
            self.row_cells.append(cells)
        self.q = normal(rows, self.queries, hq, d)
        self.sink = normal(hq) if self.sinks else None
        self.ancestors = self._trees(generator) if self.tree else None

    def _trees(self, generator):
        """Random trees: node j hangs below an earlier node."""
        tree = torch.zeros(len(self.lengths), self.queries, self.queries, dtype=torch.bool)
        for row in tree:
            for j in range(self.queries):
                row[j, j] = True
                if j:
                    row[j] |= row[int(torch.randint(j, (), generator=generator))]
        return tree

    def count(self, row):
        return self.queries if self.counts is None else self.counts[row]

    def options(self, device=DEVICE):
        tensors = {
            "counts": self.counts and torch.tensor(self.counts),
            "sinks": self.sink,
            "tree": self.ancestors,
        }
        moved = {name: value if value is None else value.to(device) for name, value in tensors.items()}
        return {**moved, "sliding_window": self.window, "softcap": self.softcap}

    def tensors(self, device=DEVICE):
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return [t.to(device) for t in (self.q, self.keys, self.values, self.table, lengths)]

    def triton(self, **more):
        return paged_attention(*self.tensors(), **self.options(), kernels="triton", **more).cpu()

    def reference(self):
        return paged_attention_reference(*self.tensors(), **self.options()).cpu()

    def cpu(self):
        """The CPU path, given exactly the blocks that it may read."""
        needed = [-(-length // self.block) for length in self.lengths]
        tables = [tuple(row[:n]) for row, n in zip(self.table.tolist(), needed, strict=True)]
        rest = self.options("cpu") | {"counts": self.counts}
        return paged_attention_cpu(self.q, self.keys, self.values, tables, self.lengths, **rest)

    def oracle(self, dtype=torch.float64, logits=plain_logits):
        """Query by query over the cells that its position allows, all arithmetic in `dtype`."""
        out = torch.zeros(*self.q.shape[:3], self.dims[1], dtype=dtype)
        rules = {"softcap": self.softcap, "sinks": self.sink, "logits": logits}
        for row, (k, v) in enumerate(self.row_cells):
            for query in range(self.count(row)):
                seen = self._seen(row, query)
                parts = (self.q[row, query].to(dtype), k[seen].to(dtype), v[seen].to(dtype))
                out[row, query] = attend_one(*parts, self.dims[0] ** -0.5, **rules)
        return out

    def _seen(self, row, query):
        base = self.lengths[row] - self.count(row)
        if not self.tree:
            position = base + query
            cells = {cell: cell for cell in range(position + 1)}
        else:
            tree = self.ancestors[row].tolist()
            depth = [sum(line) - 1 for line in tree]
            position = base + depth[query]
            cells = {cell: cell for cell in range(base)}
            cells |= {base + f: base + depth[f] for f in range(self.count(row)) if tree[query][f]}
        return [cell for cell, at in cells.items() if self.window is None or position - at < self.window]

    def check(self, out):
        """`out` is finite and, over real queries, no further from the oracle than twice the same dtype's error."""
        assert out.dtype == self.dtype
        assert torch.isfinite(out).all()
        real = torch.zeros(out.shape[:2], dtype=torch.bool)
        for row in range(len(real)):
            real[row, : self.count(row)] = True
        exact, plain = plain_error(self.oracle, self.dtype, self.dims[0], real)
        error = (out.double() - exact)[real].abs().max()
        assert error <= 2 * plain + 4 * torch.finfo(self.dtype).eps


DECODE = {"lengths": (1, 17, 90)}
VERIFY = {"lengths": (4, 40, 90), "queries": 4}
RAGGED = {"lengths": (9, 17, 70), "queries": 4, "counts": (1, 4, 3)}
SHAPES = {"decode": DECODE, "verify": VERIFY, "ragged": RAGGED}
RULES = {
    "plain": {},
    "window": {"window": 20},
    "window 1": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 3.0, "sinks": True},
}
TREES = {name: {**RULES[name], "tree": True} for name in ("plain", "window", "all")}
MATRIX = (
    [
        pytest.param({**shape, **rule}, id=f"{shape_name}, {name}")
        for shape_name, shape in SHAPES.items()
        for name, rule in RULES.items()
    ]
    + [
        # A window narrower than the tree is deep, where a cell's place differs from its position.
        pytest.param(
            {"lengths": (8, 30, 40), "queries": 8, "window": 2, "tree": True}, id="deep tree, window 2"
        ),
    ]
    + [
        pytest.param({**shape, **rule}, id=f"{shape_name}, tree, {name}")
        for shape_name, shape in (("verify", VERIFY), ("ragged", RAGGED))
        for name, rule in TREES.items()
    ]
)
HEADS = [
    pytest.param({"heads": (4, 4)}, id="multi-head"),
    pytest.param({"heads": (8, 1)}, id="multi-query"),
    pytest.param({"heads": (24, 1), **VERIFY}, id="more queries than a tile"),
    pytest.param({"dims": (64, 64)}, id="64"),
    pytest.param({"dims": (80, 80)}, id="80"),
    pytest.param({"dims": (96, 96)}, id="96"),
    pytest.param({"dims": (112, 112)}, id="112"),
    pytest.param({"dims": (128, 128), "block": 64}, id="128, blocks of 64"),
    pytest.param({"dims": (256, 256), "block": 32, **VERIFY}, id="256, blocks of 32"),
    pytest.param({"dims": (24, 40)}, id="values of another size"),
]


def test_uniform_attention_by_hand():
    keys = torch.zeros(2, 4, 1, 2)
    values = torch.tensor([1.0, 2.0, 6.0, float("nan")]).view(1, 4, 1, 1).expand(2, 4, 1, 2).contiguous()
    q, table, length = torch.ones(1, 1, 1, 2), torch.tensor([[1]]), torch.tensor([3])
    for attend in (
        lambda **rule: paged_attention_reference(q, keys, values, table, length, **rule),
        lambda **rule: paged_attention_cpu(q, keys, values, [(1,)], [3], **rule),
    ):
        assert attend()[0, 0, 0].tolist() == [3.0, 3.0]  # (1 + 2 + 6) / 3
        assert attend(sliding_window=2)[0, 0, 0].tolist() == [4.0, 4.0]  # (2 + 6) / 2
        sink = torch.zeros(1)  # a fourth cell of the same logit and no value
        torch.testing.assert_close(attend(sinks=sink)[0, 0, 0], torch.tensor([2.25, 2.25]))


def test_softcap_by_hand():
    keys = torch.tensor([100.0, 0.0]).view(1, 2, 1, 1)
    values = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    q = torch.ones(1, 1, 1, 1)
    expected = torch.tensor(1 / (1 + torch.e**-2.0))  # logits 2 * tanh(50) = 2 and 0
    reference = paged_attention_reference(
        q, keys, values, torch.tensor([[0]]), torch.tensor([2]), softcap=2.0
    )
    torch.testing.assert_close(reference.squeeze(), expected)
    torch.testing.assert_close(
        paged_attention_cpu(q, keys, values, [(0,)], [2], softcap=2.0).squeeze(), expected
    )


def test_tree_by_hand():
    """Two siblings below one root: each averages the old cell, the root and itself."""
    keys, values = torch.zeros(1, 4, 1, 1), torch.tensor([3.0, 6.0, 9.0, 30.0]).view(1, 4, 1, 1)
    q = torch.ones(1, 3, 1, 1)
    tree = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    reference = paged_attention_reference(q, keys, values, torch.tensor([[0]]), torch.tensor([4]), tree=tree)
    torch.testing.assert_close(reference.flatten(), torch.tensor([4.5, 6.0, 13.0]))
    cpu = paged_attention_cpu(q, keys, values, [(0,)], [4], tree=tree)
    torch.testing.assert_close(cpu.flatten(), torch.tensor([4.5, 6.0, 13.0]))


@pytest.mark.parametrize("change", MATRIX + HEADS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reference_against_oracle(change, dtype):
    case = Case(**change, dtype=dtype)
    case.check(case.reference())


@pytest.mark.parametrize("change", MATRIX + HEADS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cpu_against_oracle(change, dtype):
    case = Case(**change, dtype=dtype)
    case.check(case.cpu())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tail_of_a_prompt_against_oracle(dtype):
    """What CUDA takes for the later pieces of a long prompt."""
    case = Case(lengths=(90,), queries=40, heads=(6, 2), dtype=dtype)
    k, v = (part.transpose(0, 1)[None].to(DEVICE) for part in case.row_cells[0])
    case.check(attention_cpu._attend_tail(case.q[0].to(DEVICE), k, v, case.dims[0] ** -0.5)[None].cpu())


@pytest.mark.parametrize("change", MATRIX)
@pytest.mark.parametrize(("dtype", "splits"), [(F32, 1), (BF16, 4)], ids=str)
def test_triton_matrix(change, dtype, splits):
    case = Case(**change, dtype=dtype)
    case.check(case.triton(splits=splits))


@pytest.mark.parametrize("change", HEADS)
def test_triton_head_shapes(change):
    case = Case(**{"lengths": (5, 40), **change}, dtype=F16)
    case.check(case.triton(splits=2))


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_triton_long_rows_in_any_number_of_splits(splits):
    case = Case(lengths=(1, 64, 65, 300), window=130, heads=(2, 1), dtype=F16)
    case.check(case.triton(splits=splits))


@pytest.mark.parametrize("splits", [1, 3])
def test_triton_writes_its_outputs_and_nothing_else(splits):
    case = Case(**RAGGED, sinks=True)
    rows, guard = len(case.lengths), 7.25
    frame = torch.full((rows + 2, *case.q.shape[1:]), guard, device=DEVICE)
    frame[1:-1] = float("nan")
    size = attention_workspace(*case.q.shape[:3], case.dims[1], splits, DEVICE).numel()
    scratch = torch.full((size + 64,), float("nan"), device=DEVICE)
    scratch[size:] = guard
    pools = [case.keys.clone(), case.values.clone()]
    out = case.triton(splits=splits, out=frame[1:-1], workspace=scratch[:size])
    case.check(out)
    assert torch.equal(out, frame[1:-1].cpu())
    assert (frame[0] == guard).all()
    assert (frame[-1] == guard).all()
    assert (scratch[size:] == guard).all()
    for before, after in zip(pools, (case.keys, case.values), strict=True):
        assert torch.equal(before.nan_to_num(1e9), after.nan_to_num(1e9))


def test_triton_rows_do_not_see_each_other():
    case = Case(**RAGGED, window=20, sinks=True, dtype=BF16)
    together = case.triton(splits=4)
    q, keys, values, table, lengths = case.tensors()
    for row in range(len(q)):
        rest = case.options() | {"counts": case.options()["counts"][row : row + 1]}
        one = slice(row, row + 1)
        args = (q[one], keys, values, table[one], lengths[one])
        assert torch.equal(paged_attention(*args, **rest, kernels="triton", splits=4).cpu()[0], together[row])


def test_triton_takes_int64_and_strided_inputs():
    case = Case(**VERIFY)
    q, keys, values, table, lengths = case.tensors()
    both = torch.stack([keys, values], dim=1)  # [N, 2, block, Hk, D]: keys and values interleaved by block
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # head-major, as a model makes it
    args = (q, both[:, 0], both[:, 1], table.long(), lengths.long())
    case.check(paged_attention(*args, **case.options(), kernels="triton", splits=2).cpu())


def test_empty_and_idle_rows_are_zero_or_finite():
    case = Case(lengths=(1, 20), queries=2, counts=(0, 2))
    q, keys, values, table, lengths = case.tensors()
    lengths[0] = 0
    for splits in (1, 2):
        args = (q, keys, values, table, lengths)
        out = paged_attention(*args, **case.options(), kernels="triton", splits=splits)
        assert (out[0] == 0).all()
        assert torch.isfinite(out).all()
    assert (paged_attention_reference(q, keys, values, table, lengths, **case.options())[0] == 0).all()


def forked(case):
    """Two rows that share row 1's full blocks; each owns its last one, where the second changed a cell."""
    length, block = case.lengths[1], case.block
    last = (length - 1) // block
    own = case.table[2, 0]  # a block of row 2 becomes the copy
    for pool in (case.keys, case.values):
        pool[own] = pool[case.table[1, last]]
        pool[own, (length - 1) % block] = 0.5
    table = case.table[[1, 1]].clone()
    table[1, last] = own
    cells = [tuple(t.clone() for t in case.row_cells[1]) for _ in range(2)]
    for t in cells[1]:
        t[-1] = 0.5
    case.table, case.row_cells, case.lengths = table, cells, (length, length)
    case.q = case.q[[1, 1]]
    return case


def test_forked_tables_share_blocks_and_differ_where_one_wrote():
    case = forked(Case(lengths=(5, 40, 30)))
    for out in (case.reference(), case.cpu(), case.triton(splits=1), case.triton(splits=3)):
        case.check(out)
        assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "change", [DECODE, VERIFY, {**VERIFY, "window": 20}], ids=["decode", "verify", "window"]
)
def test_cpu_rows_are_independent_to_the_last_bit(change, dtype):
    case = Case(**change, dtype=dtype)
    together = case.cpu()
    for row, length in enumerate(case.lengths):
        alone = paged_attention_cpu(
            case.q[row : row + 1],
            case.keys,
            case.values,
            [case.table[row].tolist()],
            [length],
            **case.options("cpu"),
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cpu_result_does_not_depend_on_where_the_blocks_lie(dtype):
    for change in (DECODE, VERIFY, {**RAGGED, "softcap": 3.0}):
        scattered, straight = (Case(**change, dtype=dtype, scattered=s) for s in (True, False))
        straight.q = scattered.q
        for row, (k, v) in enumerate(scattered.row_cells):
            for pool, cells in ((straight.keys, k), (straight.values, v)):
                blocks = straight.table[row].long()
                whole = pool[blocks].flatten(0, 1)
                whole[: len(cells)] = cells
                pool[blocks] = whole.view(-1, *pool.shape[1:])
        assert torch.equal(scattered.cpu(), straight.cpu())


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_cpu_is_as_exact_as_torch_attention(queries):
    case = Case(lengths=(40, 64), queries=queries, heads=(9, 3), dims=(64, 64))
    out, exact = case.cpu(), case.oracle()
    for row, (k, v) in enumerate(case.row_cells):
        seen = torch.ones(queries, len(k), dtype=torch.bool).tril(len(k) - queries)
        keys, values = (t.transpose(0, 1)[None].repeat_interleave(3, 1) for t in (k, v))
        plain = scaled_dot_product_attention(case.q[row].transpose(0, 1)[None], keys, values, attn_mask=seen)
        error = (out[row].double() - exact[row]).abs().max()
        assert error <= 2 * (plain[0].transpose(0, 1).double() - exact[row]).abs().max() + 1e-7


@pytest.mark.parametrize(("dtype", "atol"), [(F32, 1e-6), (BF16, 4e-3)], ids=str)
def test_a_long_common_beginning_is_read_once(dtype, atol, monkeypatch):
    """Rows that begin with the same blocks have the values that they have alone, what is behind them row by row (the
    rest of the pool is NaN) or in a rectangle (cells beyond a row are finite there).
    """
    keys, values = torch.full((2, 60, 16, 3, 64), float("nan"), dtype=dtype)
    scattered, straight = [7, 3, 40, 5, 6, 1, 2, 8, 9], range(20, 29)
    for front, lengths in (
        (scattered, (145, 159, 340)),
        (straight, (149, 146, 350)),
        (scattered, (200, 250, 350)),
    ):
        tables = [
            [*front, 50, *range(10, 16)],
            [*front, 51, *range(41, 47)],
            [*front, *range(30, 40), 55, 54, 53],
        ]
        for table, length in zip(tables, lengths, strict=True):
            cells = torch.randn(2, length, 3, 64, dtype=dtype)
            for pool, own in zip((keys, values), cells, strict=True):
                for place, cell in enumerate(own):
                    pool[table[place // 16], place % 16] = cell
        q = torch.randn(3, 1, 9, 64, dtype=dtype)
        plan = CellPlan(tables, lengths, 16, alone=False)
        assert (plan.shared, plan.together, plan.rest.together) == (144, False, lengths[0] == 200)
        if plan.rest.together:
            keys, values = keys.nan_to_num(30.0), values.nan_to_num(30.0)
        alone = paged_attention_cpu(q, keys, values, plan=CellPlan(tables, lengths, 16))
        with monkeypatch.context() as patch:  # what reads a row at a time is not needed
            patch.setattr("handloom.kernels.attention.attention_cpu._row_attention", None)
            together = paged_attention_cpu(q, keys, values, plan=plan)
        torch.testing.assert_close(together, alone, rtol=0, atol=atol)
        windowed = [
            paged_attention_cpu(q, keys, values, plan=p, sliding_window=100)
            for p in (plan, CellPlan(tables, lengths, 16))
        ]
        assert torch.equal(*windowed)
    assert CellPlan([[1, 2, 3], [1, 2, 4]], [40, 40], 16, alone=False).shared == 0  # too short to be worth it


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_short_rows_in_one_rectangle(window, dtype):
    """Rows that may share a rectangle get the same values; cells beyond a row are finite there, and unseen."""
    case = Case(lengths=(50, 64, 90), window=window, dtype=dtype)
    for pool in (case.keys, case.values):
        pool.nan_to_num_(30.0)
    plan = CellPlan(case.table.tolist(), case.lengths, case.block, alone=False)
    assert plan.together
    case.check(paged_attention_cpu(case.q, case.keys, case.values, plan=plan, sliding_window=window))
    assert not CellPlan(case.table.tolist(), case.lengths, case.block).together


def test_cpu_large_chunk_keeps_its_mask_small():
    """A chunk whose mask is too large to repeat per head takes the other route, to the same values."""
    case = Case(lengths=(1500,), queries=1000, heads=(4, 1), dims=(8, 8))
    plan = CellPlan(case.table.tolist(), case.lengths, case.block)
    out = paged_attention_cpu(case.q, case.keys, case.values, plan=plan)
    (mask,) = plan._masks.values()
    assert mask.shape == (1000, 1500)
    assert (out - case.reference()).abs().max() < 1e-5


def test_plan_is_shared_by_layers_and_makes_each_mask_once():
    case = Case(**VERIFY)
    plan = CellPlan(case.table.tolist(), case.lengths, case.block)
    first = paged_attention_cpu(case.q, case.keys, case.values, plan=plan)
    masks = dict(plan._masks)
    second = paged_attention_cpu(case.q, case.keys, case.values, plan=plan)
    assert torch.equal(first, second)
    assert plan._masks.keys() == masks.keys()
    assert all(plan._masks[key] is masks[key] for key in masks)


def test_plan_refuses_rows_without_cells_or_blocks():
    with pytest.raises(ValueError, match=r"row 1: length 0 needs 1..32 cells"):
        CellPlan([(1,), (2, 3)], [4, 0], 16)
    with pytest.raises(ValueError, match=r"row 0: length 17 needs 1..16 cells"):
        CellPlan([(1,)], [17], 16)


def test_the_reference_reads_nothing_on_the_host():
    """On the meta device every read of a value raises."""
    for change in ({}, {"window": 20, "sinks": True, "softcap": 3.0}, {"tree": True, "window": 20}):
        case = Case(**RAGGED, **change)
        out = paged_attention(*case.tensors("meta"), **case.options("meta"), kernels="torch")
        assert out.shape == (3, 4, 6, 16)


def test_refusals_name_what_does_not_fit():
    case = Case()
    q, keys, values, table, lengths = case.tensors()
    with pytest.raises(ValueError, match="do not fit"):
        paged_attention(q[..., :8], keys, values, table, lengths)
    with pytest.raises(ValueError, match="block_table has 1 rows, q has 3"):
        paged_attention(q, keys, values, table[:1], lengths)
    with pytest.raises(ValueError, match="workspace has 10 floats"):
        case.triton(splits=2, workspace=torch.empty(10, device=DEVICE))
    wide = Case(lengths=(2,), dims=(512, 512))
    with pytest.raises(dispatch.KernelUnavailable, match="head sizes 512 and 512"):
        wide.triton()
    mixed = (q, keys.half(), values.half(), table, lengths)
    assert "torch.float16" in attention.uncovered(*mixed[:3])


def test_splits_fill_the_device_without_shredding_short_rows():
    assert attention.default_splits(1, 8, 32768, torch.device("cpu")) == 1
    if DEVICE.type == "cuda":
        assert 32 <= attention.default_splits(1, 8, 32768, DEVICE) <= 64
        assert attention.default_splits(1, 8, 128, DEVICE) == 1
        assert attention.default_splits(64, 8, 32768, DEVICE) == 1


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph needs CUDA")
def test_one_captured_launch_follows_the_lengths():
    case = Case(**RAGGED, dtype=BF16)
    q, keys, values, table, lengths = case.tensors()
    options, out = case.options(), torch.empty_like(q)
    workspace = attention_workspace(*q.shape[:3], q.shape[3], 4, DEVICE)

    def attend():
        static = {"splits": 4, "workspace": workspace, "out": out, "kernels": "triton"}
        paged_attention(q, keys, values, table, lengths, **options, **static)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for shorter in (0, 2, 5):
        lengths.copy_(torch.tensor(case.lengths) - shorter)
        options["counts"].copy_(torch.tensor([1, 2, 3]))
        graph.replay()
        expected = paged_attention_reference(
            q.float(), keys.float(), values.float(), table, lengths, **options
        )
        for row, count in enumerate((1, 2, 3)):
            assert (out[row, :count].float() - expected[row, :count]).abs().max() < 2e-2
