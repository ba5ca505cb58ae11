"""Launcher of the fused sampler: a few launches, no synchronisation, parameters read from device memory.

The first takes statistics of groups of tokens (`device.groups`), the next draws from a short list (`device.row`); where
a rule comes first that asks for more, sums over the row are taken in between (`device.order`). Rows of which more is
left are served by two more, which leave at once where there are none (`device.wide`).
"""

import concurrent.futures
import functools
from typing import NamedTuple

import torch
import triton

from .. import dispatch
from ..device import groups as triton_groups
from ..device import rules as triton_rules
from ..device.order.moments import PARTS, SUMS, moment_kernel
from ..device.order.temperatures import temperature_kernel
from ..device.row import row_kernel
from ..device.tokens import BITMASK, LISTED, REPLACED
from ..device.top import top_kernel
from ..device.wide.bins import BINS, bin_kernel
from ..device.wide.draw import wide_kernel
from ..launching import beside
from .rules import Call, Drawn, Replaced, top_k, touched_bits, with_top

GROUP = 128
FIRST_GROUPS = 16  # groups a tile of the first launch
FEW_PROGRAMS = 2048  # so many programs of it there are before each takes more than one tile
LIST_GROUPS = 4  # groups of an edit list that a program of it takes
LIST = 256  # candidates that the second launch ranks
ROW_GROUPS = 16  # groups that it reads at a time
WIDE_GROUPS, WIDE_LIST = 16, 8192  # groups a step, and most candidates listed, in the launches for wide rows
MOST_PROGRAMS = 264  # programs of each of them, over all rows, but two a row at least
MOMENT_GROUPS = 8  # groups a step of the launch for sums over rows
SPARE_GROUPS = 16  # groups of an edit list for which the statistics always have room
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
    "tail_free": (15,),
}
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
    if len(steps) > MOST_STEPS or len(functions) > KINDS["tail_free"][0] - BY_FUNCTION:
        raise ValueError(
            f"{len(steps)} truncation steps, with {len(functions)} functions of statistics: the kernels take "
            f"at most {MOST_STEPS}, with {KINDS['tail_free'][0] - BY_FUNCTION}"
        )
    words = [sum(part << 4 * (i % 7) for i, part in enumerate(column[half : half + 7]))
             for column in (zip(*steps, strict=True) if steps else ((), (), ()))
             for half in (0, 7)]  # fmt: skip
    return (*words, len(steps)), tuple(functions)


def parameters_of(rules):
    """Parameters of the rules, then the second ones of those that have one: the rows of the limits."""
    return [rule.parameter for rule in rules] + [rule.second for rule in rules if rule.second is not None]


def fill(table, values):
    """Copy each value into its row of the table, unless it lives there: all of them in one launch."""
    apart = [row for row, value in enumerate(values) if value.data_ptr() != table[row].data_ptr()]
    if values and len(apart) == len(values):
        torch.stack(values, out=table[: len(values)])
    else:
        for row in apart:
            table[row].copy_(values[row])


class Plan:
    """Everything about a call that does not change from step to step: variants, buffers, off values.

    A Plan is for one number of rows, vocabulary, device and tuple of rules; `sample_fused` makes one unless
    it is given, and a decode loop that captures graphs keeps its own so that steps allocate nothing.
    `plan.rules` and `plan.pointwise` are the given ones with parameters that live in the plan: used in calls,
    and changed in place, they cost no copy.
    """

    def __init__(
        self, logits, *, rules=(), edits=None, pointwise=(), logprobs=False, n_top=0, adaptive=False
    ):
        rows, vocab = logits.shape
        device = logits.device
        self.rows, self.vocab = rows, vocab
        self.report = {False: 0, "chosen": CHOSEN}.get(logprobs, FULL)
        self.program, self.functions = program_of(rules)
        self.points = tuple(point.device for point in pointwise)
        self.n_top = n_top if n_top <= TOP_MOST else 0  # 0: none, or by `with_top`
        self.wants = wants_of(rules, self.report, self.n_top)
        self.special = special_of(rules, self.functions)
        self.vocab_groups = triton.cdiv(vocab, GROUP)
        self.listed = 0 if edits is None else edits.ids.shape[1]
        self.groups = self.vocab_groups + triton.cdiv(self.listed, GROUP)
        self.width = triton.next_power_of_2(max(self.groups, self.vocab_groups + SPARE_GROUPS))
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
        self.bin_counts, self.frames = torch.empty(rows, BINS.value, **whole), torch.empty(rows, 8, **whole)
        self.bin_masses = torch.empty(rows, BINS.value, device=device, dtype=torch.int64)
        self.records, self.sums = (
            torch.empty(rows, 2, **empty),
            torch.empty(rows, 8, device=device, dtype=torch.int64),
        )
        parts = (rows, PARTS.value) if any(self.special) or adaptive else (1, 1)
        self.parts, self.totals = (
            torch.empty(*size, SUMS.value, device=device, dtype=torch.float64) for size in (parts, parts[:1])
        )
        self.wide_lists = torch.empty(rows, WIDE_LIST, device=device, dtype=torch.int64)
        self.tokens = torch.empty(rows, device=device, dtype=torch.int64)
        self.floats = torch.empty(3, rows, **empty)
        self.temperatures = torch.empty(rows, **empty)  # of a call that has adaptive ones
        self.counts = torch.empty(2, rows, device=device, dtype=torch.int64)
        self.top_ids = torch.empty(rows, self.n_top, device=device, dtype=torch.int64)
        self.top_logprobs = torch.empty(rows, self.n_top, **empty)
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

    @functools.cached_property
    def ones(self):
        """float32 [B], the temperature of a call that has none."""
        return torch.ones_like(self.floats[0])

    @functools.cached_property
    def zeros(self):
        """int64 [B], the streams of a call that has none."""
        return torch.zeros_like(self.tokens)

    def builds(self, device):
        """Every kernel as this plan launches it, by name."""
        overlap, early = beside(device)
        return builds_of(self.width, self.points, self.functions, self.special, self.n_top, native=native(),
                         overlap=overlap, early=early)  # fmt: skip

    @classmethod
    def of(cls, call):
        """A plan for calls like this one."""
        asked = {"logprobs": call.logprobs, "n_top": call.n_top, "adaptive": call.adaptive is not None}
        return cls(call.logits, rules=call.rules, edits=call.edits, pointwise=call.pointwise, **asked)


def special_of(rules, functions):
    """What the kernel for rules of any kind needs: (ceilings?, ranks by distance?, sums of entropy?, all moments?,
    second differences?)."""
    kinds = {rule.kind for rule in rules}
    named = [kind in kinds for kind in ("typical", "top_h", "tail_free")]
    return bool(kinds & {"xtc", "typical"}), *named[:2], bool(functions), named[2]


def wants_of(rules, report, n_top):
    """What the first launch may be asked for, as bits: see `device.groups`."""
    wants = triton_groups.NOISES.value
    wants |= triton_groups.RAWS.value if report or n_top else 0
    wants |= triton_groups.REPORT.value if report else 0
    wants |= triton_groups.SUMS.value if any(rule.kind in ("mass", "typical", "xtc") for rule in rules) else 0
    return wants | (triton_groups.COIN.value if any(rule.kind == "xtc" for rule in rules) else 0)


def edits_of(edits, bitmask):
    """The bits of `wants` for an edit list and a bitmask."""
    listed = 0 if edits is None else LISTED.value | (REPLACED.value if isinstance(edits, Replaced) else 0)
    return listed | (0 if bitmask is None else BITMASK.value)


def first_tiles(rows, groups):
    """Tiles of FIRST_GROUPS groups that a program of the first launch takes."""
    return max(
        1, min(triton_groups.MOST_TILES.value, rows * triton.cdiv(groups, FIRST_GROUPS) // FEW_PROGRAMS)
    )


def native():
    """Whether the kernels may use NVIDIA's own instructions."""
    return not (torch.version.hip or dispatch.interpreting())


def sample_fused(call, *, out=None, plan=None):
    """`sample` by the Triton kernels: Call -> Drawn.

    Args:
        out: int64 [B] or None; receives the tokens.
        plan: Plan or None; holds every buffer. Its result tensors are overwritten by the next call with it.
            With a plan the call allocates nothing and can be captured in a CUDA graph; limits are copied from
            the rules' parameters inside the graph, so changing those in place takes effect on replay.

    The highest log-probabilities, up to TOP_MOST of them, come from the same launches (of a plan that was made for
    as many); more take a torch operation after them, which allocates.
    """
    fresh = plan is None
    plan = Plan.of(call) if fresh else plan
    tokens = plan.tokens if out is None else out
    if plan.rows > 0:
        if not fresh:
            fill(plan.limits, parameters_of(call.rules))
            fill(plan.point_values, [point.parameter for point in call.pointwise])
        for kernel, grid, arguments, named in launches(call, plan, tokens):
            kernel[grid](*arguments, **named)
    return _result(plan, tokens, call.logits, call.n_top)


def warm_up(
    device, vocab, dtype=torch.float32, *, rules=(), edits=False, logprobs="chosen", n_top=0, pointwise=(),
    adaptive=False,
):  # fmt: skip
    """Compile what calls with these settings need, side by side; nothing is drawn.

    The number of rows, of listed tokens and the parameters do not matter, nor which of counts, masses and min-p the
    rules are. A build that is there already costs nothing.

    Args:
        device: of the calls. vocab: V. dtype: of the logits.
        rules, pointwise, logprobs, n_top: as in `sample`. edits: whether calls have an edit list. adaptive: whether
            some have a temperature by the entropy.

    Returns:
        int, the number of kernels looked after.
    """
    logits = torch.zeros(1, vocab, device=device, dtype=dtype)
    zero, real = (torch.zeros(1, device=device, dtype=kind) for kind in (torch.int64, torch.float32))
    listed = torch.full((1, 1), -1, device=device, dtype=torch.int32)
    made = Replaced(listed, real[:, None], touched_bits(listed, vocab)) if edits else None
    rules = tuple(rules) or (top_k(real),)  # rows without a rule leave nothing to the launches for wide rows
    call = Call(logits, seeds=zero, positions=zero, rules=rules, edits=made, logprobs=logprobs, n_top=n_top,
                pointwise=tuple(pointwise), adaptive=real.expand(4, 1) if adaptive else None)  # fmt: skip
    plan = Plan.of(call)
    found = {one[0]: one for one in launches(call, plan, plan.tokens)}.values()  # one of them may run twice

    def build(kernel, grid, arguments, named):
        with torch.cuda.device_of(logits):  # each thread has a current device of its own
            kernel.warmup(*arguments, grid=grid, **named)

    with concurrent.futures.ThreadPoolExecutor(
        len(found)
    ) as pool:  # the compilers run outside of Python's lock
        list(pool.map(lambda one: build(*one), found))
    return len(found)


def launches(call, plan, tokens):
    """[(kernel, grid, arguments, constants and options)] of a call, in order."""
    logits = call.logits if call.logits.stride(-1) == 1 else call.logits.contiguous()
    edits, bitmask = call.edits, call.bitmask
    wants = plan.wants | edits_of(edits, bitmask)
    head = logits, logits.stride(0), plan.vocab, plan.vocab_groups, plan.groups, plan.statistics, plan.width
    key = call.seeds, call.positions, plan.zeros if call.streams is None else call.streams
    given = plan.ones if call.temperature is None else call.temperature
    row = *key, given if call.adaptive is None else plan.temperatures, plan.limits, *plan.program
    mask = (plan.counters, 0) if bitmask is None else (bitmask, bitmask.stride(0))
    touched = (plan.counters, 0) if edits is None else (edits.touched, edits.touched.stride(0))
    last = plan.point_values, plan.rows
    tiles = first_tiles(plan.rows, plan.vocab_groups)
    programs = triton.cdiv(plan.vocab_groups, FIRST_GROUPS * tiles)
    grid = plan.rows, programs + triton.cdiv(plan.groups - plan.vocab_groups, LIST_GROUPS)
    builds = plan.builds(logits.device)
    asked = plan.counters, wants, tiles, programs
    listed = *_listed(plan, edits), plan.listed, *touched, *_penalties(plan, edits), plan.values
    sweep = plan.rows, min(PARTS.value, triton.cdiv(plan.vocab_groups, MOMENT_GROUPS))
    groups = [("group", grid, (*head, *asked, *row, *mask, *listed, *last))]
    ids = plan.counters if edits is None else edits.ids
    edited = *mask, ids, plan.values, plan.listed, *touched, *last
    found = groups
    if call.adaptive is not None:  # the maxima alone, and a sweep for the entropy, come first
        maxima = plan.counters, wants & ~plan.wants, tiles, programs
        found = [("group", grid, (*head, *maxima, *row, *mask, *listed, *last)),
                 ("temperature", sweep, (*head, plan.counters, wants, plan.parts, plan.temperatures,
                                                            call.adaptive, given, *edited)), *groups]  # fmt: skip
    head = *head, plan.counters, wants, plan.report
    row = *row, *edited
    results = tokens, plan.floats, plan.counts
    lists = plan.active, plan.lists, plan.list_keys, plan.list_weights, plan.list_ids
    bins, frame = (plan.bin_counts, plan.bin_masses), (plan.frames, plan.records, plan.sums)
    if plan.n_top:  # before the buffers hold what later launches are left
        own = plan.active, plan.lists, plan.top_ids, plan.top_logprobs, plan.n_top
        found.append(("top", (plan.rows,), (*head[:4], *head[5:8], *own)))
    if any(plan.special[1:4]):
        sums = *head[:-1], plan.parts, plan.totals
        found.append(("moment", sweep, (*sums, *row)))
    found.append(("row", (plan.rows,), (*head, *lists, *bins, *frame, plan.totals, *results, *row)))
    if plan.program[-1] or plan.report == FULL:  # else no row is left to others
        grid = plan.rows, max(2, min(MOST_PROGRAMS // plan.rows, triton.cdiv(plan.groups, WIDE_GROUPS)))
        found.append(("bin", grid, (*head, plan.active, plan.wide_lists, *bins, *frame, *row)))
        found.append(("wide", grid, (*head, *frame, plan.wide_lists, plan.totals, *results, *row)))
    return [(builds[name].kernel, size, arguments, builds[name].named) for name, size, arguments in found]


class Build(NamedTuple):
    """A kernel with its compile-time constants and launch options."""

    kernel: object
    named: dict


def builds_of(
    width, points=(), functions=(), special=(False,) * 5, n_top=0, *, native=True, overlap=(), early=()
):
    """Every kernel as it is launched, by name, {str: Build}.

    Args:
        width: of the statistics. points: device functions of pointwise edits. functions: of value rules other than
            min-p. special: see `special_of`. n_top: as in `Plan`.
        native: whether NVIDIA's own instructions may be used. overlap, early: see `launching.beside`.
    """
    shared = {"POINTS": points, **dict(overlap), **dict(early), "enable_fp_fusion": False}
    first = {"PTX": native, "num_warps": 4, **shared}
    kinds = {"DEVICES": functions, "SPECIAL": special if any(special) else ()}
    most = {"maxnreg": 255 if any(special) else 128} if native else {}  # of 128, two rows share a processor
    wide = {
        "GROUPS": WIDE_GROUPS,
        "N": WIDE_LIST,
        "num_warps": 8,
        **({"maxnreg": 255} if native else {}),
        **shared,
    }
    top = {
        "WIDTH": width,
        "N": LIST,
        "TOP": max(16, triton.next_power_of_2(n_top)),
        "PART": ROW_GROUPS,
        **shared,
    }
    top.pop("POINTS")
    return {
        "group": Build(triton_groups.group_kernel, {"GROUPS": FIRST_GROUPS, "LIST": LIST_GROUPS, **first}),
        "row": Build(
            row_kernel,
            {"WIDTH": width, "N": LIST, "PART": ROW_GROUPS, **kinds, **most, "num_warps": 8, **shared},
        ),
        "moment": Build(
            moment_kernel,
            {"GROUPS": MOMENT_GROUPS, "WIDTH": width, "FULL": special[3], "num_warps": 4, **shared},
        ),
        "temperature": Build(
            temperature_kernel, {"GROUPS": MOMENT_GROUPS, "WIDTH": width, "num_warps": 4, **shared}
        ),
        "bin": Build(bin_kernel, wide),
        "wide": Build(wide_kernel, {"WIDTH": width, **kinds, **wide}),
        "top": Build(top_kernel, {"num_warps": 8, **top}),
    }


def _listed(plan, edits):
    """Ids, biases, seen and counts of an edit list; other buffers stand in for what is absent and never read."""
    if edits is None:
        return plan.counters, plan.limits, plan.counters, plan.counters
    if isinstance(edits, Replaced):
        return edits.ids, edits.values, edits.ids, edits.ids
    return edits.ids, edits.bias, edits.seen, edits.counts


def _penalties(plan, edits):
    if edits is None or isinstance(edits, Replaced):
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
