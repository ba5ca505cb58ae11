"""Builds of the sampling kernels: what is compiled, and counts on their machine code.

Settings share builds: how many rows, whether there are edits, a mask or log-probabilities, and which counts, masses and
min-p a row has, are data. `sharing` tells which kernels a setting uses; `cases` yields each of them once.

Counts: instructions a logit in the loop of the first launch, compiled for one load at a time; barriers along
the longest way through a kernel, loops taken as often as TURNS says.
"""

import re

import networkx

NAMES = {
    "i32": """stride vocab groups_of_vocab groups width wants report report_on tiles programs kinds more_kinds
        places more_places seconds more_seconds steps mask_stride listed_length touched_stride rows n_top""",
    "*fp32": """stats records values biases repetition presence frequency floats temperatures limits point_values
        top_logprobs found adaptive""",
    "*i32": """counters active keys_of ids_of counts_of frames bitmask listed_ids seen listed_counts
        touched""",
    "*fp64": "parts totals",
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
    "mask": ("BITMASK",),
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
    kinds = builds_of(WIDTH, special=(True, True, True, False, False), **about)
    moments = builds_of(
        WIDTH, functions=(rules.eta_threshold,), special=(False, False, False, True, False), **about
    )
    bends = builds_of(WIDTH, special=(False, False, False, False, True), **about)
    builds = {name: build for name, build in common.items() if name != "moment"}
    for kernel in ("moment", "row", "wide"):
        builds |= {f"{kernel} typical+top-h+xtc": kinds[kernel], f"{kernel} eta": moments[kernel]}
        builds |= {} if kernel == "moment" else {f"{kernel} tail-free": bends[kernel]}
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
        "... with a temperature by the entropy": {"rules": three, "adaptive": torch.zeros(4, 1)},
        "eta, top-n-sigma": {"rules": (rules.eta(one), rules.top_n_sigma(one))},
        "k, tail-free": {"rules": (rules.top_k(one), rules.tail_free(one))},
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
    flow = Flow(code)
    found = {
        "barriers": sum(map(flow.barrier, range(len(flow.operations)))),
        "path": flow.longest(flow.barrier),
    }
    if name.startswith("loop "):
        own = constants["GROUPS"] * 128 / (32 * constants["num_warps"])  # logits of a thread
        count = flow.shortest if name == "loop edits" else flow.instructions  # a tile without a listed token
        found["a_logit"] = round(count(flow.loop()) / own, 1)
    return found


class Flow:
    """The flow of a kernel's machine code, from its disassembly.

    operations: (predicated?, operation) by index; targets: {index of a branch: index it goes to}.
    """

    def __init__(self, code):
        self.operations, branches, labels = [], {}, {}
        for line in code.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line.strip()):
                labels[label.group(1)] = len(self.operations)
            if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
                to = (
                    re.search(r"`\((\.L_x_\d+)\)", found.group(3))
                    if found.group(2).startswith("BRA")
                    else None
                )
                if to:
                    branches[len(self.operations)] = to.group(1)
                # a branch on a predicate may name it behind the operation
                predicated = bool(found.group(1)) or (
                    to is not None and re.search(r"\bU?P\d", found.group(3))
                )
                self.operations.append((bool(predicated), found.group(2)))
        self.targets = {index: labels[name] for index, name in branches.items() if name in labels}

    def barrier(self, index):
        """1 for a barrier, else 0."""
        return int(self.operations[index][1].startswith("BAR"))

    def following(self, index):
        """Indices that can be executed after an index."""
        predicated, operation = self.operations[index]
        to = self.targets.get(index)
        ends = operation.startswith(("EXIT", "RET")) or to is not None
        onward = index + 1 < len(self.operations) and (predicated or not ends)
        return ([] if to is None else [to]) + ([index + 1] if onward else [])

    def longest(self, weight):
        """Sum of weights along the longest way through the kernel, loops taken TURNS times."""
        return longest(self.graph(), weight)

    def loop(self):
        """Indices of the largest loop."""
        return max(networkx.strongly_connected_components(self.graph()), key=len)

    def instructions(self, loop):
        """Number of instructions of a loop."""
        return sum(self.operations[index][1] != "NOP" for index in loop)

    def shortest(self, loop):
        """Number of instructions of the shortest way round in a loop."""
        graph, head = self.graph().subgraph(loop), min(loop)
        return 1 + min(networkx.shortest_path_length(graph, head, last) for last in graph.predecessors(head))

    def graph(self):
        """What can be executed after what."""
        size = range(len(self.operations))
        return networkx.DiGraph((index, to) for index in size for to in self.following(index))


def longest(graph, weight):
    """Sum of weights along the longest way through a graph, every way round in it taken TURNS times."""
    parts = networkx.condensation(graph)
    best = {}
    for part in networkx.topological_sort(parts):
        members = parts.nodes[part]["members"]
        own = sum(map(weight, members))
        if own and len(members) > 1:
            inner = graph.subgraph(members).copy()
            heads = {
                to for member in members for before, to in graph.in_edges(member) if before not in members
            }
            inner.remove_edges_from(list(inner.in_edges(heads or {min(members)})))
            own = TURNS * longest(inner, weight)
        best[part] = own + max((best[before] for before in parts.predecessors(part)), default=0)
    return max(best.values(), default=0)
