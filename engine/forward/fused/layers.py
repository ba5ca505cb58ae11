"""A decoder layer as a few launches: what each of its parts is, and the pass through them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...cache.paged import PagedCache
from ...kernels.layer.gated import gated
from ...kernels.layer.norm import add_norm
from ...kernels.layer.rope import rotate_and_write
from .parts import Hooks, NormReader, linear
from .products import Products, product
from .rotary import FusedRotary


@dataclass
class Heads:
    """The attention of a layer.

    Attributes:
        module: the attention module. projections: to queries, keys and values, or one for all three. out: back.
        dim, dim_v, q_heads, k_heads: head sizes and numbers.
        q_norm, k_norm: norms of every head, or of all heads together with `whole`.
        rotated: dimensions that turn, 0 for none; interleaved: see `rotate_and_write`.
        first_half: angles are given twice, one copy after the other, and only the first copy counts.
        options: what the module hands to its attention function; a parameter stands under its name in `sinks`.
    """

    module: nn.Module
    projections: tuple[nn.Module, ...]
    out: nn.Module
    dim: int = 0
    dim_v: int = 0
    q_heads: int = 0
    k_heads: int = 0
    q_norm: NormReader | None = None
    k_norm: NormReader | None = None
    whole: bool = False
    rotated: int = 0
    interleaved: bool = False
    first_half: bool = False
    options: dict = field(default_factory=dict)
    sinks: str | None = None

    def project(self, x, shape, products: Products):
        """x [T, K] -> queries, keys and values `[T, heads * dim]`."""
        if self.merged and products.takes(len(x), self.projections):
            parts = [product(x, self.projections)]
        else:
            parts = [p(x.view(*shape[:-1], -1)).flatten(0, -2) for p in self.projections]
        if len(parts) == 1:
            sizes = [self.q_heads * self.dim, self.k_heads * self.dim, self.k_heads * self.dim_v]
            parts = parts[0].split(sizes, -1)
        return parts

    @functools.cached_property
    def merged(self) -> bool:
        """Whether the projections may be read by our own product."""
        return all(linear(p) for p in self.projections)

    def norms(self, parts):
        """Queries and keys normed over all heads together, and the norms of single heads that remain."""
        q, k, v = parts
        q_norm = None if self.q_norm is None else self.q_norm()
        k_norm = None if self.k_norm is None else self.k_norm()
        if self.whole:
            q, k = add_norm(q, q_norm)[1], add_norm(k, k_norm)[1]
            q_norm = k_norm = None
        views = (q, self.q_heads, self.dim), (k, self.k_heads, self.dim), (v, self.k_heads, self.dim_v)
        return [part.view(len(part), heads, dim) for part, heads, dim in views], (q_norm, k_norm)

    def turns(self, turns, shape):
        """Cosines and sines of the tokens, `[T, W]`."""
        width = turns[0].shape[-1] // 2 if self.first_half else turns[0].shape[-1]
        return [t[..., :width].expand(*shape[:2], -1).reshape(-1, width) for t in turns]

    def attend(self, parts, shape, layer, turns):
        """Rotate, write to the cells of a `PagedLayer`, and attend: `[T, q_heads * dim_v]`."""
        (q, k, v), (q_norm, k_norm) = self.norms(parts)
        cos, sin = self.turns(turns, shape) if self.rotated else (None, None)
        keys, values, flat_keys, flat_values = layer.stores()
        q = rotate_and_write(
            q, k, v, cos, sin, flat_keys, flat_values, layer.feed.flat_cells(), q_norm=q_norm, k_norm=k_norm,
            rotated=self.rotated or None, interleaved=self.interleaved,
        )  # fmt: skip
        config, options = self.module.config, self.options
        if self.sinks is not None:
            options = {**options, "s_aux": self.module._parameters[self.sinks]}
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)
        queries = q.view(*shape[:2], self.q_heads, self.dim).transpose(1, 2)
        return attention(self.module, queries, keys, values, None, **options)[0].reshape(len(q), -1)


@dataclass
class Gate:
    """The feed-forward part of a layer: a gate and its factor, side by side or in one layer, and the way back."""

    projections: tuple[nn.Module, ...]
    activation: str
    down: nn.Module

    @functools.cached_property
    def merged(self) -> bool:
        """Whether the projections may be read by our own product."""
        return len(self.projections) == 2 and all(linear(p) for p in self.projections)

    def __call__(self, x, shape, products: Products):
        """x [T, K] -> act(gate) * up `[T, N]`."""
        if self.merged and products.takes(len(x), self.projections, self.activation):
            return product(x, self.projections, self.activation)
        parts = [p(x.view(*shape[:-1], -1)).flatten(0, -2) for p in self.projections]
        parts = parts[0].chunk(2, -1) if len(parts) == 1 else parts
        return gated(*parts, self.activation)


@dataclass
class Structure:
    """A decoder layer: its parts, and the norms before and after them.

    Attributes:
        layer: the decoder layer. index: of its cache layer. heads, mlp: its parts; a mlp without a `Gate` is called.
        norms: "before_attention", "after_attention", "before_mlp", "after_mlp" -> the norm there, if any.
        scale: what a part's output is multiplied by before it is added (Granite).
    """

    layer: nn.Module
    index: int
    heads: Heads
    mlp: nn.Module
    gate: Gate | None
    norms: dict[str, NormReader]
    scale: float
    products: Products
    hooks: Hooks = None

    def __post_init__(self):
        self.hooks = Hooks(self.layer)

    def takes(self, cache) -> bool:
        """Whether this pass runs here: over the pool, with nobody listening to the parts."""
        paged = isinstance(cache, PagedCache) and cache.path == "attention"
        return paged and not self.hooks and not torch.compiler.is_compiling()

    def norm(self, name):
        """The norm at a place, or None."""
        reader = self.norms.get(name)
        return None if reader is None else reader()

    def __call__(self, hidden, cache, turns):
        """hidden `[B, Q, K]` -> the layer's output, a new tensor."""
        shape, x = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        mixed = self.heads.attend(self.project(x, shape), shape, cache.layers[self.index], turns)
        x, y = self._add(self.heads.out, mixed, x, self.norm("after_attention"), self.norm("before_mlp"))
        y = x if y is None else y
        if self.gate is not None:
            inner = self.gate(y, shape, self.products)
            return self._add(self.gate.down, inner, x, self.norm("after_mlp"), None)[0].view(shape)
        out = self.mlp(y.view(shape))
        out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        return self._sum(out, x, self.norm("after_mlp"), None)[0].view(shape)

    def project(self, x, shape):
        """Queries, keys and values of x [T, K]."""
        norm = self.norm("before_attention")
        return self.heads.project(x if norm is None else add_norm(x, norm)[1], shape, self.products)

    def _add(self, back: Callable, inner, x, after, before):
        """The stream x with a part's result added, and that normed for the next part (or None)."""
        if linear(back) and self.products.takes(len(x), (back,)):
            if after is None:
                x = product(inner, (back,), scale=self.scale, residual=x)
                return x, None if before is None else add_norm(x, before)[1]
            out = product(inner, (back,))
        else:
            out = back(inner.view(1, *inner.shape)).view(x.shape)
        return self._sum(out, x, after, before)

    def _sum(self, out, x, after, before):
        if after is None and before is None:
            return torch.add(x, out, alpha=self.scale), None
        return add_norm(out, before, residual=x, scale=self.scale, post=after)


class Fused:
    """What a decoder layer's class becomes in a twin: the same, but for a forward that runs its `structure`."""

    structure: Structure

    def forward(self, hidden_states, *args, past_key_values=None, position_embeddings=None, **kwargs):
        """As the layer's own."""
        if args or not self.structure.takes(past_key_values):
            return super().forward(
                hidden_states, *args, past_key_values=past_key_values, position_embeddings=position_embeddings, **kwargs
            )  # fmt: skip
        return self.structure(hidden_states, past_key_values, position_embeddings)


class FusedNorm:
    """What the class of the norm behind the last layer becomes."""

    structure: NormReader

    def forward(self, x):
        """As the norm's own."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        return add_norm(x.reshape(-1, x.shape[-1]), self.structure())[1].view(x.shape)


class FusedOutput:
    """What the class of the output layer becomes."""

    structure: Products

    def forward(self, x):
        """As the layer's own."""
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling() or not self.structure.takes(rows, (self,)):
            return super().forward(x)
        return product(x.reshape(rows, -1), (self,)).view(*x.shape[:-1], -1)


SWAPPED = (Fused, FusedNorm, FusedOutput, FusedRotary)


def swap(part: nn.Module, kind: type, structure) -> None:
    """Let a module of a twin run its structure; it stays an instance of its class, with all that it holds."""
    part.structure = structure
    part.__class__ = _subclass(kind, type(part))


def unswap(part: nn.Module) -> None:
    """The module's own class again."""
    part.__class__ = type(part).__bases__[1]
    del part.structure


@functools.cache
def _subclass(kind: type, plain: type) -> type:
    return type(f"Fused{plain.__name__}", (kind, plain), {"__module__": plain.__module__})
