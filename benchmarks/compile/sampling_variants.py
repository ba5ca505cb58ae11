"""Builds of the sampling kernels: what is compiled, and counts on their machine code.

Settings share builds: how many rows, whether there are edits, a mask or log-probabilities, and which counts, masses and
min-p a row has, are data. `sharing` tells which kernels a setting uses; `cases` yields each of them once.

Counts: instructions a logit in the loop of the first launch, compiled for one load at a time; barriers that a row
runs through at most: those outside of loops, and those inside as often as TURNS says.
"""

import re

NAMES = {
    "i32": """stride vocab groups_of_vocab groups width wants report report_on tiles kinds more_kinds places more_places
        seconds more_seconds steps mask_stride listed_length touched_stride rows n_top""",
    "*fp32": """stats records values biases repetition presence frequency floats temperatures limits point_values
        listed_x top_logprobs""",
    "*i32": """counters active keys_of ids_of counts_of frames bitmask listed_ids listed_to seen listed_counts
        touched""",
    "*i64": "lists weights_of masses_of sums tokens counts top_ids seeds positions streams",
}
ROW_TYPES = {name: kind for kind, names in NAMES.items() for name in names.split()}
WIDTH = 2048  # of the statistics of 151,936 tokens
TURNS = 3  # of a loop: the steps of k + p + min-p; reading four times 16 groups takes fewer barriers a turn
LOADS = {  # of the first launch: the bits of `wants`
    "maxima": (),
    "sums": ("RAWS",),
    "noise": ("NOISES",),
    "edits": ("LISTED",),
}


def cases(target):
    """Yield (name, kernel, argument types, constants and launch options) of the builds for a target."""
    from handloom.kernels.device import groups, rules, tokens
    from handloom.kernels.noise import philox_triton
    from handloom.kernels.sampling.fused import builds_of

    noise_types = dict.fromkeys(("seeds", "positions", "streams", "token_ids", "words"), "*i64")
    noise_types |= {"noise": "*fp32", "columns": "i32"}
    yield "noise", philox_triton.gumbel_kernel, noise_types, {"BLOCK": 1024, "num_warps": 4}
    about = {"native": target.startswith("sm"), "overlap": {"PDL": target in ("sm_90", "sm_100")}}
    common = builds_of(WIDTH, n_top=20, **about)
    kinds = builds_of(WIDTH, special=(True, True, True, False), **about)["general"]
    moments = builds_of(
        WIDTH, functions=(rules.eta_threshold,), special=(False, False, False, True), **about
    )["general"]
    builds = {name: build for name, build in common.items() if name != "general"}
    builds |= {"general typical+top-h+xtc": kinds, "general eta": moments}
    for name, build in builds.items():
        for dtype in ("bf16", "fp32") if name == "group" else ("bf16",):
            yield f"{name} {dtype}", build.kernel, {"logits": f"*{dtype}", **ROW_TYPES}, build.named
    if target == "sm_90":
        for name, bits in LOADS.items():
            wants = sum(getattr(groups, bit, getattr(tokens, bit, None)).value for bit in bits)
            fixed = {"wants": wants, "steps": 0, **common["group"].named}
            yield f"loop {name}", groups.group_kernel, {"logits": "*bf16", **ROW_TYPES}, fixed


def sharing():
    """{setting: names of the kernels that it launches}: settings with the same names share all builds."""
    import torch

    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling.fused import Plan, launches

    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    three = (rules.top_k(one), rules.top_p(one), rules.min_p(one))
    ids = torch.full((1, 5), -1, dtype=torch.int32)
    listed = rules.Replaced(ids, torch.zeros(1, 5), rules.touched_bits(ids, 1000))
    settings = {
        "greedy, temperature": {},
        "k, p, min-p in any order and number": {"rules": three},
        "... with log-probabilities": {"rules": three, "logprobs": "chosen"},
        "exactly k": {"rules": (rules.top_k(one, ties="lowest"), *three[1:])},
        "... with a mask": {"rules": three, "bitmask": torch.zeros(1, 32, dtype=torch.int32)},
        "... with penalties, biases": {"rules": three, "edits": listed, "logprobs": "chosen"},
        "... with 5 alternatives": {"rules": three, "n_top": 5},
        "typical, top-h, xtc": {"rules": (rules.typical(one), rules.top_h(one), rules.xtc(one, one))},
        "eta, top-n-sigma": {"rules": (rules.eta(one), rules.top_n_sigma(one))},
    }
    found = {}
    for name, setting in settings.items():
        call = rules.Call(torch.zeros(1, 1000), seeds=zero, positions=zero, **setting)
        plan = Plan.of(call)
        found[name] = [
            kernel.__name__.removesuffix("_kernel") for kernel, *_ in launches(call, plan, plan.tokens)
        ]
    return found


def counted(name, code, constants):
    """Figures of a build from the text of its machine code."""
    instructions, labels = listing(code)
    bodies = loops(instructions, labels)
    found = {"barriers": sum(op.startswith("BAR") for op, _ in instructions)}
    if name.startswith("loop "):
        start, end = max(bodies, key=lambda body: body[1] - body[0])
        own = constants["GROUPS"] * 128 / (32 * constants["num_warps"])  # logits of a thread
        found["a_logit"] = round(sum(op != "NOP" for op, _ in instructions[start : end + 1]) / own, 1)
    inside = {i for start, end in bodies for i in range(start, end + 1)}
    looped = sum(op.startswith("BAR") for i, (op, _) in enumerate(instructions) if i in inside)
    found["path"] = found["barriers"] + (TURNS - 1) * looped
    return found


def listing(code):
    """([(operation, arguments)], {label: index}) of a disassembly."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label.group(1)] = len(instructions)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            instructions.append((found.group(1), found.group(2)))
    return instructions, labels


def loops(instructions, labels):
    """(first, last) index of every loop: the branches that go back."""
    found = []
    for index, (op, arguments) in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", arguments) if op.startswith("BRA") else None
        if target and labels.get(target.group(1), index) < index - 3:
            found.append((labels[target.group(1)], index))
    return found
