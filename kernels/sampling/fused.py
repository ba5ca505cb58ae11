"""Launcher of the fused sampler: two launches, no synchronisation, parameters read from device memory."""

import torch
import triton

from ..device import rules as triton_rules
from ..device.sample import group_statistics_kernel, sample_kernel
from .rules import Drawn, Replaced, with_top

GROUP = 128
FIRST_GROUPS = 16  # groups a program of the first launch
TOP_MOST = 64  # most raw log-probabilities that the kernels report; for more there is `with_top`
CAPACITY = 1024  # candidates held in registers; more are read again in every step
KINDS = {  # the steps of each kind of rule, numbered as in triton_steps
    "count": (0,),
    "exact_count": (0, 3),
    "mass": (1,),
    "value": (2,),
    "xtc": (4,),
    "typical": (5,),
    "top_h": (6, 7),
}


def steps_of(rules):
    """(kind, row of the parameter, row of the second parameter) of every step, and the rule of each."""
    steps, owners, seconds = [], [], len(rules)
    for place, rule in enumerate(rules):
        second = place if rule.second is None else seconds
        seconds += rule.second is not None
        steps += [(kind, place, second) for kind in KINDS[rule.kind]]
        owners += [rule] * len(KINDS[rule.kind])
    return tuple(steps), tuple(owners)


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
        self.rows, self.vocab, self.logprobs = rows, vocab, bool(logprobs)
        self.steps, owners = steps_of(rules)
        self.devices = tuple(device_function(rule) for rule in owners)
        self.needs = tuple(bool(rule.kind == "value" and rule.needs_statistics) for rule in owners)
        self.points = tuple(point.device for point in pointwise)
        self.entropy = any(rule.kind in ("typical", "top_h") for rule in rules)
        self.moments = self.logprobs or self.entropy or any(self.needs)
        self.n_top = n_top if n_top <= TOP_MOST else 0  # 0: none, or by `with_top`
        self.raw = self.logprobs or self.n_top > 0
        self.planes = 10 if self.moments or self.raw else 3
        self.vocab_groups = triton.cdiv(vocab, GROUP)
        self.groups = self.vocab_groups + (0 if edits is None else triton.cdiv(edits.ids.shape[1], GROUP))
        self.width = max(16, triton.next_power_of_2(self.groups))
        empty = {"device": device, "dtype": torch.float32}
        self.statistics = torch.empty(rows, self.planes, self.width, **empty)
        self.active = torch.empty(rows, self.width, device=device, dtype=torch.int32)
        self.listed = torch.empty(rows, CAPACITY, **empty)
        self.listed_ids = torch.empty(rows, CAPACITY, device=device, dtype=torch.int32)
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

    def constants(self, groups, edits, bitmask):
        """Compile-time arguments that both launches share."""
        return {
            "STEPS": self.steps,
            "VARIANT": variant(
                groups, sparse_form(edits), bitmask is not None, self.points, self.steps, any(self.needs)
            ),
            "MOMENTS": self.moments,
            "PLANES": self.planes,
            "enable_fp_fusion": False,
        }


def sparse_form(edits):
    """How the kernels read the edit list: 0 none, 1 edits of the logits (`SparseEdits`), 2 new logits (`Replaced`)."""
    return 0 if edits is None else 2 if isinstance(edits, Replaced) else 1


def variant(groups, sparse, masked, points, steps, full):
    """What is compiled in; see `triton_search`."""
    kinds = {kind for kind, _, _ in steps}
    return (
        *(groups, int(sparse), masked, points),
        *(bool(kinds & {4, 5}), 3 in kinds, 5 in kinds, 7 in kinds, full),
    )


def first_warps(moments, sparse, bytes_each):
    """Warps of a program of the first launch: more where more values are live."""
    return 8 if moments or sparse or bytes_each > 2 else 4


def second_groups(moments, sparse, entropy=False):
    """Groups a step of the second launch: fewer where each needs more registers."""
    if entropy or (moments and sparse):
        return 4
    return 8 if moments or sparse else 16


def second_options():
    """Launch options of the second launch: one program a row, so registers need not be shared."""
    return {"num_warps": 8} | ({} if torch.version.hip else {"maxnreg": 255})


def device_function(rule):
    """The Triton function of a value rule; other kinds have a place holder."""
    if rule.kind != "value":
        return triton_rules.min_p_threshold
    return getattr(triton_rules, rule.device) if isinstance(rule.device, str) else rule.device


def sample_fused(call, *, out=None, plan=None):
    """`sample` by the Triton kernels: Call -> Drawn.

    Args:
        out: int64 [B] or None; receives the tokens.
        plan: Plan or None; holds every buffer. Its result tensors are overwritten by the next call with it.
            With a plan the call allocates nothing and can be captured in a CUDA graph; limits are copied from
            the rules' parameters inside the graph, so changing those in place takes effect on replay.

    The highest log-probabilities, up to TOP_MOST of them, come from the same two launches (of a plan that was made
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
    sparse, mask, mask_stride = _edit_arguments(logits, plan, edits, call.bitmask)
    row_arguments = (
        call.seeds,
        call.positions,
        plan.zeros if call.streams is None else call.streams,
        plan.ones if call.temperature is None else call.temperature,
        plan.limits,
        mask,
        mask_stride,
        sparse,
        plan.point_values,
        plan.rows,
    )
    head = logits, logits.stride(0), plan.vocab, plan.vocab_groups, plan.groups, plan.statistics, plan.width
    group_statistics_kernel[(plan.rows, triton.cdiv(plan.groups, FIRST_GROUPS))](
        *head,
        *row_arguments,
        RAW=plan.raw,
        num_warps=first_warps(plan.moments, edits is not None, logits.element_size()),
        **plan.constants(FIRST_GROUPS, edits, call.bitmask),
    )
    groups = second_groups(plan.moments, edits is not None, plan.entropy)
    sample_kernel[(plan.rows,)](
        *(*head, plan.active, plan.listed, plan.listed_ids, tokens, plan.floats, plan.counts),
        *(plan.top_ids, plan.top_logprobs, plan.n_top),
        *row_arguments,
        DEVICES=plan.devices,
        NEEDS=plan.needs,
        LOGPROBS=plan.logprobs,
        WIDTH=plan.width,
        CAPACITY=CAPACITY,
        TOP=max(16, triton.next_power_of_2(plan.n_top)) if plan.n_top else 0,
        PLAIN=variant(groups, 0, False, (), (), False),
        **second_options(),
        **plan.constants(groups, edits, call.bitmask),
    )
    return _result(plan, tokens, logits, n_top)


def _edit_arguments(logits, plan, edits, bitmask):
    """Pointers of the edit list and bitmask; the logits stand in for what is absent and never read."""
    sparse = (logits,) * 4 + (0, logits, 0) + (logits,) * 3
    if isinstance(edits, Replaced):
        listed = edits.ids, edits.values, logits, logits, edits.ids.shape[1]
        sparse = (*listed, edits.touched, edits.touched.stride(0), *sparse[7:])
    elif edits is not None:
        sparse = (
            *(edits.ids, edits.bias, edits.seen, edits.counts),
            edits.ids.shape[1],
            edits.touched,
            edits.touched.stride(0),
            *(edits.repetition, edits.presence, edits.frequency),
        )
    return sparse, logits if bitmask is None else bitmask, 0 if bitmask is None else bitmask.stride(0)


def _result(plan, tokens, logits, n_top):
    drawn = Drawn(tokens)
    if plan.logprobs:
        drawn = Drawn(tokens, *plan.floats, *plan.counts)
    if n_top and n_top == plan.n_top:
        return drawn._replace(top_ids=plan.top_ids, top_logprobs=plan.top_logprobs)
    return with_top(drawn, logits, n_top) if n_top else drawn
