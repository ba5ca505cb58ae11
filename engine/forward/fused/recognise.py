"""Finding decoder layers that can run fused, trying each against the plain one, and swapping its class in a twin."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from torch import nn

from ...cache.feed import Feed
from ...kernels.layer.rope import rotate_and_write_reference
from .layers import SWAPPED, Fused, FusedNorm, FusedOutput, Gate, Heads, Structure, swap, unswap
from .parts import bypassed, linear, read_activation, read_norm, samples
from .products import Products, default_products
from .rotary import FusedRotary, Heard, read_rotary, rotary_embeddings, tables_of

log = logging.getLogger("handloom")
ATTENTIONS = ("self_attn", "attention", "attn")
MLPS = ("mlp", "block_sparse_moe", "feed_forward", "moe")
# The norms of a decoder layer under the names that models give them, and the places where they stand.
PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")
ORDERS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("operator_norm", None, "ffn_norm", None),
)
KNOWN = {"scaling", "sliding_window", "softcap", "s_aux"}  # what our attention function reads
# What rounding may change of a layer, in shares of what it adds to the stream (root of the mean square of a token).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOOSE = 0.04  # in 16 bits: four times what was seen


@torch.no_grad()
def fuse(runner, products: Products | None = None) -> dict[str, str]:
    """Run the decoder layers of a model fused where they are recognised, and compute what the plain ones do.

    Every candidate is read from its modules, run beside the plain layer on numbers with outliers, and swapped only
    where the two agree but for rounding.

    Args:
        runner: the `Model` on the attention path whose twin is changed; its pool needs a few free blocks.
        products: the choice of products; None keeps the one that was made before, or measures it on CUDA.

    Returns:
        name of every decoder layer -> why it stays plain, empty where it is fused.
    """
    module = runner.module
    products = products or _products_of(module) or default_products(runner.device)
    unfuse(module)
    found = {
        name: part for name, part in module.named_modules() if _child(part, ATTENTIONS) and _child(part, MLPS)
    }
    structures = {name: _read(part, products) for name, part in found.items()}
    reasons = {name: built for name, built in structures.items() if isinstance(built, str)}
    trials = {name: Trial(runner, built) for name, built in structures.items() if name not in reasons}
    ropes = {part: name for name, part in rotary_embeddings(module, found).items()}
    for trial in trials.values():
        trial.begin()
    for part in ropes:
        swap(part, Heard, [])
    try:
        _pass(runner)
    finally:
        for trial in trials.values():
            trial.end()
        calls = {part: part.structure for part in ropes}
        for part in ropes:
            unswap(part)
    for name, trial in trials.items():
        reasons[name] = "it was not called" if trial.reason is None else trial.reason
    taken = [structures[name] for name in found if not reasons[name]]
    for structure in taken:
        swap(structure.layer, Fused, structure)
    if taken:
        _fuse_ends(runner, taken[0], products)
        for part, name in ropes.items():
            _fuse_rotary(runner, part, name, calls[part])
        _measure(module, taken, products)
    used = tables_of(module)
    runner.outlived += [table for table in runner.rotary_tables if table not in used]
    runner.rotary_tables = used
    return {name: reasons[name] for name in found}


def unfuse(module: nn.Module) -> None:
    """Every layer of a twin plain again."""
    for part in module.modules():
        if isinstance(part, SWAPPED):
            unswap(part)


def _products_of(module) -> Products | None:
    return next((part.structure.products for part in module.modules() if isinstance(part, Fused)), None)


def _fuse_ends(runner, structure: Structure, products) -> None:
    """The norm behind the last layer, and the output layer."""
    size = structure.heads.out.out_features
    for parent in runner.module.modules():
        if not any(structure.layer in part._modules.values() for part in parent._modules.values() if part):
            continue
        for part in parent.children():
            norm = bypassed(part) or read_norm(part, size)
            if not isinstance(norm, str):
                swap(part, FusedNorm, norm)
    output = runner.output and runner.output.layer
    if output is not None and linear(output) and not bypassed(output):
        swap(output, FusedOutput, products)


def _fuse_rotary(runner, part, name: str, calls: list[tuple]) -> None:
    """A rotary embedding looked up in tables, where they are what it computes."""
    known = next((table for table in runner.rotary_tables if table.part is part), None)
    table = read_rotary(part, calls, known)
    if isinstance(table, str):
        log.info("%s stays plain: %s", name, table)
    else:
        swap(part, FusedRotary, table)


def _measure(module, structures, products) -> None:
    groups = [((part,), None) for part in module.modules() if isinstance(part, FusedOutput)]
    for structure in structures:
        heads, gate = structure.heads, structure.gate
        groups += [(heads.projections, None)] if heads.merged else []
        groups += [(gate.projections, gate.activation)] if gate is not None and gate.merged else []
        backs = [heads.out] + ([] if gate is None else [gate.down])
        groups += [((back,), None) for back in backs if linear(back)]
    products.measure(groups)


# -- reading


def _read(layer: nn.Module, products: Products) -> Structure | str:
    """The structure that a layer seems to have, or why it has none that is known."""
    reason = bypassed(layer)
    if reason:
        return reason
    attention, mlp = _child(layer, ATTENTIONS), _child(layer, MLPS)
    norms = {
        name: part
        for name, part in layer.named_children()
        if part not in (attention, mlp) and not isinstance(part, nn.Dropout)
    }
    order = next((order for order in ORDERS if set(order) - {None} == set(norms)), None)
    if order is None:
        return f"its parts are {', '.join(norms) or 'no norms'}, an order that is not known"
    heads = _read_heads(attention)
    if isinstance(heads, str):
        return heads
    size = getattr(heads.out, "out_features", 0)
    places = {}
    for name, part in norms.items():
        reader = read_norm(part, size)
        if isinstance(reader, str):
            return f"{name}: {reader}"
        places[PLACES[order.index(name)]] = reader
    scale = getattr(layer, "residual_multiplier", 1.0)
    index = getattr(attention, "layer_idx", None)
    if not isinstance(index, int) or not isinstance(scale, int | float):
        return "its place in the cache is not known"
    return Structure(layer, index, heads, mlp, _read_gate(mlp), places, float(scale), products)


def _read_heads(attention: nn.Module) -> Heads | str:
    parts = dict(attention.named_children())
    names = next((n for n in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)) if set(n) <= set(parts)), None)
    out = parts.get("o_proj", parts.get("out_proj"))
    others = (
        set(parts)
        - set(names or ())
        - {"o_proj", "out_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm"}
    )
    if names is None or out is None or others:
        return f"its attention holds {', '.join(parts)}"
    heads = Heads(attention, tuple(parts[name] for name in names), out)
    for place, spellings in (("q_norm", ("q_norm", "q_layernorm")), ("k_norm", ("k_norm", "k_layernorm"))):
        norm = next((parts[name] for name in spellings if name in parts), None)
        if norm is None:
            continue
        size = sum(p.numel() for p in norm._parameters.values() if p is not None)
        reader = read_norm(norm, size or getattr(attention, "head_dim", 0))
        if isinstance(reader, str):
            return f"{place}: {reader}"
        if reader().bias is not None or reader.centered:
            return f"{place} is centered"
        setattr(heads, place, reader)
    return heads


def _read_gate(mlp: nn.Module) -> Gate | None:
    parts = dict(mlp.named_children())
    names = next((n for n in (("gate_proj", "up_proj"), ("gate_up_proj",)) if set(n) <= set(parts)), None)
    if names is None or "down_proj" not in parts or bypassed(mlp):
        return None
    rest = [part for name, part in parts.items() if name not in (*names, "down_proj")]
    acts = [getattr(mlp, name, None) for name in ("act_fn", "activation_fn", "act", "hidden_act")]
    activation = next((read_activation(act) for act in acts if callable(act)), None)
    if activation is None or any(part not in acts for part in rest):
        return None
    return Gate(tuple(parts[name] for name in names), activation, parts["down_proj"])


def _child(module: nn.Module, names) -> nn.Module | None:
    return next((module._modules[name] for name in names if module._modules.get(name) is not None), None)


# -- trying


class Trial:
    """Runs a structure beside its plain layer when that is called; `reason` is empty if they agree, None before."""

    def __init__(self, runner, structure: Structure):
        self.runner, self.structure, self.reason = runner, structure, None
        self._plain = type(structure.layer)

    def begin(self) -> None:
        """Let the layer's next calls be tried."""
        trial, plain = self, self._plain

        class Tried(plain):
            def forward(self, hidden_states, *args, **kwargs):
                with torch.no_grad():
                    trial.reason = trial.run(super().forward, hidden_states, args, kwargs)
                return super().forward(
                    hidden_states, *args, **kwargs
                )  # last: it writes the cells that are kept

        self.structure.layer.__class__ = Tried

    def end(self) -> None:
        """The layer's own class again."""
        self.structure.layer.__class__ = self._plain

    def run(self, plain, hidden, args, kwargs) -> str:
        """Why the structure is not what the layer does; empty if it is."""
        turns, cache = kwargs.get("position_embeddings"), kwargs.get("past_key_values")
        if args or not self.structure.takes(cache):
            return (
                "it is called in another way"
                if args or not self.structure.hooks
                else "a part of it has a hook"
            )
        x = samples(*hidden.shape, device=hidden.device, dtype=hidden.dtype)
        try:
            with self._watching() as calls:
                want = plain(x, **kwargs)
            if len(calls) != 1 or not torch.is_tensor(want):
                return "it does not call attention once and return a tensor"
            reason = self._complete(calls[0], x, turns)
            if reason:
                return reason
            reason = self._differs(x, cache, turns, want)
            if reason and self.structure.gate is not None:  # the attention half alone
                self.structure.gate = None
                reason = self._differs(x, cache, turns, want)
            return reason
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it trips over, the plain layer works
            return f"{type(error).__name__}: {error}".split("\n")[0][:160]

    def _differs(self, x, cache, turns, want) -> str:
        have = self.structure(x, cache, turns)
        added = (want - x).double()
        scale = added.square().mean(-1, keepdim=True).sqrt()
        rounding = 2 * torch.finfo(x.dtype).eps * want.double().abs()
        error = ((have - want).double().abs() - rounding).clamp_min(0).square().mean(-1, keepdim=True).sqrt()
        error = error / scale.clamp_min(1e-9)
        if not have.isfinite().all():
            return "it gives numbers that are not finite"
        worst, limit = float(error.max()), TOLERANCE.get(x.dtype, LOOSE)
        return "" if worst <= limit else f"its output differs by {worst:.2g} of what it adds"

    @contextmanager
    def _watching(self):
        """The calls of our attention function meanwhile: (query, key, value, keyword arguments)."""
        calls, attend = [], self.runner.attend

        def watch(module, query, key, value, mask, **kwargs):
            calls.append((module, query, key, value, kwargs))
            return attend(module, query, key, value, mask, **kwargs)

        self.runner.attend = watch
        try:
            yield calls
        finally:
            del self.runner.attend

    def _complete(self, call, x, turns) -> str:
        """Read sizes, options and rotation from what the plain layer handed to its attention."""
        module, query, key, value, options = call
        heads = self.structure.heads
        if module is not heads.module:
            return "another module calls attention"
        heads.q_heads, heads.dim, heads.k_heads, heads.dim_v = (
            query.shape[1],
            query.shape[3],
            key.shape[2],
            value.shape[3],
        )
        heads.options = {name: options[name] for name in KNOWN if options.get(name) is not None}
        sinks = heads.options.pop("s_aux", None)
        if sinks is not None:
            heads.sinks = next((n for n, p in heads.module._parameters.items() if p is sinks), None)
            if heads.sinks is None:
                return "the sinks of its attention are no parameter"
        sizes = {name: getattr(heads, name)().weight for name in ("q_norm", "k_norm") if getattr(heads, name)}
        heads.whole = any(weight is not None and weight.numel() != heads.dim for weight in sizes.values())
        return self._find_rotation(query.transpose(1, 2).flatten(0, 1), x, turns)

    def _find_rotation(self, want, x, turns) -> str:
        """Which dimensions of the queries turn, and in which pairs."""
        heads = self.structure.heads
        (q, k, v), (q_norm, _) = heads.norms(self.structure.project(x.reshape(-1, x.shape[-1]), x.shape))
        ways = [(0, False, False)]
        if turns is not None:
            width = turns[0].shape[-1]
            sizes = (width, False), (2 * width, False), (width, True)
            turning = [
                (size, pairs, half) for size, half in sizes for pairs in (False, True) if size <= heads.dim
            ]
            ways = turning + ways
        cells = torch.arange(len(q), device=q.device)
        for rotated, interleaved, half in ways:
            heads.rotated, heads.interleaved, heads.first_half = rotated, interleaved, half
            given = heads.turns(turns, x.shape) if rotated else (None, None)
            have = rotate_and_write_reference(
                q, k, v, *given, torch.empty_like(k), torch.empty_like(v), cells, q_norm=q_norm,
                rotated=rotated or None, interleaved=interleaved,
            )  # fmt: skip
            error = float((have - want).double().abs().amax() / want.double().abs().amax().clamp_min(1e-9))
            if error <= TOLERANCE.get(x.dtype, LOOSE):
                return ""
        return "its rotation is none that is known"


@torch.no_grad()
def _pass(runner) -> None:
    """One forward pass over two rows, of more tokens than the check at load has: kernels then take other tiles."""
    pool = runner.pool
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [8, 9, 1, 2, 3, 4, 5, 6, 7]]
    tables = [pool.writable(pool.table(), 0, len(row)) for row in tokens]
    runner.forward(Feed.build(tokens, [0, 0], tables, pool.block_size, runner.device))
