"""Launcher of the fused sampler: a few launches, no synchronisation, parameters read from device memory.

The first takes statistics of groups of tokens (`device.groups`; a second of the tokens of an edit list), the next draws
from a short list (`device.row`). Rows that need more are served by two more, which leave at once where there are none
(`device.wide`), or by one for pipelines with rules of any kind (`device.general`).
"""

import torch
import triton

from .. import dispatch
from ..device import groups as triton_groups
from ..device import rules as triton_rules
from ..device import wide as triton_wide
from ..device.general import general_kernel
from ..device.row import row_kernel
from ..device.tokens import BITMASK, LISTED, REPLACED
from ..launching import beside
from .rules import Drawn, Replaced, with_top

GROUP = 128
FIRST_GROUPS = 16  # groups a tile of the first launch
FEW_PROGRAMS, MOST_TILES = 2048, 8  # so many programs of it there are before each takes more than one tile
LIST_GROUPS = 4  # groups a program of the launch for edit lists
LIST = 256  # candidates that the second launch ranks
ROW_GROUPS = 16  # groups that it reads at a time
WIDE_GROUPS, WIDE_LIST = 4, 4096  # groups a step, and most candidates listed, in the launches for wide rows
MOST_PROGRAMS = 1056  # programs of each of them, over all rows, but two a row at least
CAPACITY = 1024  # candidates that the kernel for every kind of rule holds; more are read again in every step
GENERAL_GROUPS = 4  # groups a step of it
TOP_MOST = 64  # most raw log-probabilities that the kernels report; for more there is `with_top`
MOST_STEPS = 14
KINDS = {  # the steps of each kind of rule, numbered as in `device.steps`
    "count": (0,),
    "exact_count": (0, 3),
    "mass": (1,),
    "value": (2,),
    "xtc": (4,),
    "typical": (5,),
    "top_h": (6, 7),
}
BINS = triton_wide.BINS.value
PLANES = triton_groups.PLANES.value
CHOSEN, FULL = 1, 2  # reports
BY_FUNCTION = 8  # value rules by other functions than min-p's


def program_of(rules):
    """(the steps of the rules as seven int32 arguments of the kernels, the device functions of value rules)."""
    steps, functions, second = [], [], len(rules)
    for place, rule in enumerate(rules):
        other = place if rule.second is None else second
        second += rule.second is not None
        kinds = KINDS[rule.kind]
        if rule.kind == "value" and rule.device != "min_p_threshold":
            function = getattr(triton_rules, rule.device) if isinstance(rule.device, str) else rule.device
            functions += [] if function in functions else [function]
            kinds = (BY_FUNCTION + functions.index(function),)
        steps += [(kind, place, other) for kind in kinds]
    if len(steps) > MOST_STEPS:
        raise ValueError(f"{len(steps)} truncation steps: the kernels take at most {MOST_STEPS}")
    words = [sum(part << 4 * (i % 7) for i, part in enumerate(column[half : half + 7]))
             for column in (zip(*steps, strict=True) if steps else ((), (), ()))
             for half in (0, 7)]  # fmt: skip
    return (*words, len(steps)), tuple(functions)


def parameters_of(rules):
    """Parameters of the rules, then the second ones of those that have one: the rows of the limits."""
    return [rule.parameter for rule in rules] + [rule.second for rule in rules if rule.second is not None]


def fill(table, values):
    """Copy each value into its row of the table, unless it lives there."""
    for target, value in zip(table, values, strict=False):
        if value.data_ptr() != target.data_ptr():
            target.copy_(value)


class Plan:
    """Everything about a call that does not change from step to step: variants, buffers, off values.

    A Plan is for one number of rows, vocabulary, device and tuple of rules; `sample_fused` makes one unless
    it is given, and a decode loop that captures graphs keeps its own so that steps allocate nothing.
    `plan.rules` and `plan.pointwise` are the given ones with parameters that live in the plan: used in calls,
    and changed in place, they cost no copy.
    """

    def __init__(self, logits, *, rules=(), edits=None, pointwise=(), logprobs=False, n_top=0):
        rows, vocab = logits.shape
        device = logits.device
        self.rows, self.vocab = rows, vocab
        self.report = {False: 0, "chosen": CHOSEN}.get(logprobs, FULL)
        self.program, self.functions = program_of(rules)
        self.points = tuple(point.device for point in pointwise)
        self.n_top = n_top if n_top <= TOP_MOST else 0  # 0: none, or by `with_top`
        self.wants = wants_of(rules, self.report, self.n_top)
        every_kind = bool(self.functions) or any(rule.kind in ("xtc", "typical", "top_h") for rule in rules)
        self.every_kind, self.general = every_kind, every_kind or self.n_top > 0
        self.vocab_groups = triton.cdiv(vocab, GROUP)
        self.listed = 0 if edits is None else edits.ids.shape[1]
        self.groups = self.vocab_groups + triton.cdiv(self.listed, GROUP)
        self.width = max(16, triton.next_power_of_2(self.groups))
        empty = {"device": device, "dtype": torch.float32}
        whole = {"device": device, "dtype": torch.int32}
        self.statistics = torch.empty(rows, PLANES, self.width, **empty)
        self.counters = torch.empty(rows, 4, **whole)
        self.active = torch.empty(rows, self.width, **whole)
        self.lists = torch.empty(rows, LIST, device=device, dtype=torch.int64)
        self.list_keys = torch.empty(rows, LIST, **whole)
        self.list_ids = torch.empty(rows, LIST, **whole)
        self.list_weights = torch.empty(rows, LIST, device=device, dtype=torch.int64)
        self.values = torch.empty(rows, max(self.listed, 1), **empty)  # of the edit list, edited
        self.bin_counts, self.frames = torch.empty(rows, BINS, **whole), torch.empty(rows, 8, **whole)
        self.bin_masses = torch.empty(rows, BINS, device=device, dtype=torch.int64)
        self.records, self.sums = torch.empty(rows, 2, **empty), torch.empty(rows, 8, device=device, dtype=torch.int64)
        self.wide_lists = torch.empty(rows, WIDE_LIST, device=device, dtype=torch.int64)
        self.wide_values = torch.empty(rows, CAPACITY, **empty)
        self.wide_ids = torch.empty(rows, CAPACITY, **whole)
        self.tokens = torch.empty(rows, device=device, dtype=torch.int64)
        self.floats = torch.empty(3, rows, **empty)
        self.counts = torch.empty(2, rows, device=device, dtype=torch.int64)
        self.top_ids = torch.empty(rows, self.n_top, device=device, dtype=torch.int64)
        self.top_logprobs = torch.empty(rows, self.n_top, **empty)
        self.ones = torch.ones(rows, **empty)
        self.zeros = torch.zeros(rows, device=device, dtype=torch.int64)
        self.limits = torch.empty(max(len(parameters_of(rules)), 1), rows, **empty)
        self.point_values = torch.empty(max(len(pointwise), 1), rows, **empty)
        fill(self.limits, parameters_of(rules))
        fill(self.point_values, [point.parameter for point in pointwise])
        rest = iter(self.limits[len(rules) :])
        self.rules = tuple(
            rule._replace(parameter=at, second=None if rule.second is None else next(rest))
            for rule, at in zip(rules, self.limits, strict=False)
        )
        self.pointwise = tuple(
            point._replace(parameter=at) for point, at in zip(pointwise, self.point_values, strict=False)
        )

    @classmethod
    def of(cls, call):
        """A plan for calls like this one."""
        asked = {"logprobs": call.logprobs, "n_top": call.n_top}
        return cls(call.logits, rules=call.rules, edits=call.edits, pointwise=call.pointwise, **asked)


def wants_of(rules, report, n_top):
    """What the first launch may be asked for, as bits: see `device.groups`."""
    wants = triton_groups.NOISES.value
    wants |= triton_groups.RAWS.value if report or n_top else 0
    wants |= triton_groups.REPORT.value if report else 0
    wants |= triton_groups.SUMS.value if any(rule.kind == "mass" for rule in rules) else 0
    return wants | (triton_groups.COIN.value if any(rule.kind == "xtc" for rule in rules) else 0)


def edits_of(edits, bitmask):
    """The bits of `wants` for an edit list and a bitmask."""
    listed = 0 if edits is None else LISTED.value | (REPLACED.value if isinstance(edits, Replaced) else 0)
    return listed | (0 if bitmask is None else BITMASK.value)


def first_tiles(rows, groups):
    """Tiles of FIRST_GROUPS groups that a program of the first launch takes."""
    return max(1, min(MOST_TILES, rows * triton.cdiv(groups, FIRST_GROUPS) // FEW_PROGRAMS))


def native():
    """Whether the kernels may use NVIDIA's own instructions."""
    return not (torch.version.hip or dispatch.interpreting())


def general_options():
    """Launch options of the kernel for every kind of rule: its registers need not be shared."""
    return {"num_warps": 8} | ({} if torch.version.hip else {"maxnreg": 255})


def sample_fused(call, *, out=None, plan=None):
    """`sample` by the Triton kernels: Call -> Drawn.

    Args:
        out: int64 [B] or None; receives the tokens.
        plan: Plan or None; holds every buffer. Its result tensors are overwritten by the next call with it.
            With a plan the call allocates nothing and can be captured in a CUDA graph; limits are copied from
            the rules' parameters inside the graph, so changing those in place takes effect on replay.

    The highest log-probabilities, up to TOP_MOST of them, come from the same launches (of a plan that was made
    for as many); more take a torch operation after them, which allocates.
    """
    logits, rules, edits, n_top = call.logits, call.rules, call.edits, call.n_top
    if plan is None:
        plan = Plan.of(call)
    if plan.rows == 0:
        return _result(plan, plan.tokens if out is None else out, logits, n_top)
    fill(plan.limits, parameters_of(rules))
    fill(plan.point_values, [point.parameter for point in call.pointwise])
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens = plan.tokens if out is None else out
    bitmask = call.bitmask
    wants = plan.wants | edits_of(edits, bitmask)
    head = logits, logits.stride(0), plan.vocab, plan.vocab_groups, plan.groups, plan.statistics, plan.width
    key = call.seeds, call.positions, plan.zeros if call.streams is None else call.streams
    row = *key, plan.ones if call.temperature is None else call.temperature, plan.limits, *plan.program
    mask = (plan.counters, 0) if bitmask is None else (bitmask, bitmask.stride(0))
    touched = (plan.counters, 0) if edits is None else (edits.touched, edits.touched.stride(0))
    last = plan.point_values, plan.rows
    results = tokens, plan.floats, plan.counts
    overlap, early = beside(logits.device)
    exact = {**overlap, **early, "enable_fp_fusion": False}
    shared = {"POINTS": plan.points, **exact}
    tiles = first_tiles(plan.rows, plan.vocab_groups)
    triton_groups.group_kernel[(plan.rows, triton.cdiv(plan.vocab_groups, FIRST_GROUPS * tiles))](
        *(*head, plan.counters, wants, tiles, *row, *mask, *touched, *last),
        GROUPS=FIRST_GROUPS, PTX=native(), num_warps=4, **shared,
    )  # fmt: skip
    if plan.listed:
        programs = triton.cdiv(plan.listed, LIST_GROUPS) + triton.cdiv(plan.groups - plan.vocab_groups, LIST_GROUPS)
        triton_groups.list_kernel[(plan.rows, programs)](
            *(*head, wants, *row, *mask, *_listed(plan, edits), plan.listed, *touched, *_penalties(plan, edits)),
            *(plan.values, *last),
            GROUPS=LIST_GROUPS, PTX=native(), num_warps=4, **shared,
        )  # fmt: skip
    made = plan.counters if edits is None else edits.ids, plan.values, plan.listed
    head = *head, plan.counters, wants, plan.report
    row = *row, *mask, *made, *touched, *last
    lists = plan.active, plan.lists, plan.list_keys, plan.list_weights, plan.list_ids
    bins, found = (plan.bin_counts, plan.bin_masses), (plan.frames, plan.records, plan.sums)
    row_kernel[(plan.rows,)](
        *(*head, *lists, *bins, *found, *results, *row),
        WIDTH=plan.width, N=LIST, PART=ROW_GROUPS, num_warps=8, **shared,
    )  # fmt: skip
    if plan.general:
        general_kernel[(plan.rows,)](
            *(*head, plan.active, plan.wide_values, plan.wide_ids, *results),
            *(plan.top_ids, plan.top_logprobs, plan.n_top, *row),
            DEVICES=plan.functions, VARIANT=(GENERAL_GROUPS, plan.points, plan.every_kind), WIDTH=plan.width,
            CAPACITY=CAPACITY, TOP=max(16, triton.next_power_of_2(plan.n_top)) if plan.n_top else 0,
            **general_options(), **exact,
        )  # fmt: skip
    else:
        grid = plan.rows, max(2, min(MOST_PROGRAMS // plan.rows, triton.cdiv(plan.groups, WIDE_GROUPS)))
        shared |= {"GROUPS": WIDE_GROUPS, "N": WIDE_LIST, "num_warps": 8}
        triton_wide.bin_kernel[grid](*(*head, *bins, *found, *row), **shared)
        triton_wide.wide_kernel[grid](*(*head, *found, plan.wide_lists, *results, *row), WIDTH=plan.width, **shared)
    return _result(plan, tokens, logits, n_top)


def _listed(plan, edits):
    """Ids, biases, seen and counts of an edit list; other buffers stand in for what is absent and never read."""
    if isinstance(edits, Replaced):
        return edits.ids, edits.values, edits.ids, edits.ids
    return edits.ids, edits.bias, edits.seen, edits.counts


def _penalties(plan, edits):
    if isinstance(edits, Replaced):
        return (plan.limits,) * 3
    return edits.repetition, edits.presence, edits.frequency


def _result(plan, tokens, logits, n_top):
    drawn = Drawn(tokens)
    if plan.report == CHOSEN:
        drawn = Drawn(tokens, *plan.floats[:2])
    if plan.report == FULL:
        drawn = Drawn(tokens, *plan.floats, *plan.counts)
    if n_top and n_top == plan.n_top:
        return drawn._replace(top_ids=plan.top_ids, top_logprobs=plan.top_logprobs)
    return with_top(drawn, logits, n_top) if n_top else drawn
