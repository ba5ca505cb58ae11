"""The cache that transformers' models see: paged attention layers and the states of recurrent ones."""

from __future__ import annotations

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from .feed import Feed

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers 5.17 gives layers that keep nothing a recurrent cache that stays empty
    DummyLayer = LinearAttentionLayer

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
RECURRENT = {"conv", "linear_attention"}
HYBRID = {"hybrid", "hybrid_sliding"}
EMPTY = {"dummy"}


def layer_plan(config) -> list[tuple[str, dict]]:
    """(layer type, cache arguments) of each layer of a model's text configuration."""
    types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if isinstance(arguments, dict):  # transformers 5.17: the same for all layers, and no name for empty ones
        arguments = [arguments] * len(types)
        types = ["dummy" if kind in ("moe", "mlp") else kind for kind in types]
    return list(zip(types, arguments, strict=True))


class PagedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, kept in a block pool.

    Sliding and chunked layers keep every cell too: their window is applied by the mask or the kernel, so a row can
    be rewound past it.
    """

    is_compileable, is_sliding = True, False

    def __init__(self, pool, index: int, path: str):
        super().__init__()
        self.pool, self.index, self.path = pool, index, path
        self.feed: Feed | None = None
        self._flat: tuple | None = None  # see `stores`
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        """Nothing to do: the pool owns the cells."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the new cells `[B, H, Q, D]`; return all cells, gathered per row or as the pool holds them."""
        keys, values, *flat = self.stores()
        cells = self.feed.flat_cells()
        for store, new in zip(flat, (key_states, value_states), strict=True):
            rows = new.squeeze(2) if new.shape[2] == 1 else new.transpose(1, 2).reshape(-1, *store.shape[1:])
            store.index_copy_(0, cells, rows if rows.dtype == store.dtype else rows.to(store.dtype))
        if self.path == "attention":
            return keys, values
        table = self.feed.blocks().to(keys.device)
        return self._gather(keys, table), self._gather(values, table)

    def stores(self):
        """The layer's keys and values, `[N, block, heads, dim]`, and flat views `[cells, heads, dim]` for writing."""
        keys, values = self.pool.layer(self.index)
        if self._flat is None or self._flat[0] is not keys:
            self._flat = keys, values, keys.view(-1, *keys.shape[2:]), values.view(-1, *values.shape[2:])
        return self._flat

    def _gather(self, store, table):
        rows, width = table.shape
        picked = store.index_select(0, table.reshape(-1))
        cells = picked.view(rows, width * store.shape[1], *store.shape[2:]).transpose(1, 2)
        return cells[:, :, : self.feed.lengths[0]] if self.path == "rows" else cells

    def get_mask_sizes(self, query_length: int):
        """(key length, offset) of the rectangle that `update` returns."""
        if self.path == "rows":
            return self.feed.lengths[0], 0
        return self.feed.blocks().shape[1] * self.pool.block_size, 0

    def get_seq_length(self) -> int:
        """Cells before this pass, as far as a rectangle has such a number; models take shapes from it."""
        return self.get_mask_sizes(0)[0] - self.feed.width

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def batch_select_indices(self, indices):
        """Rows are chosen through tables, never here."""


class PagedHybridLayer(PagedLayer, LinearAttentionLayer):
    """A layer with both paged keys and values and a recurrent state."""

    def __init__(self, pool, index: int, path: str, number_of_states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        PagedLayer.__init__(self, pool, index, path)

    def lazy_initialization(self, *args, **kwargs):
        """Recurrent states are made on their first update; the pool owns the cells."""
        if not args:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)


class PagedCache(Cache):
    """One forward pass's view of the pool, for `model(..., past_key_values=...)`.

    Args:
        plan: `layer_plan(config)`.
        pool: the block pool.
        path: `attention` hands the whole pool to our attention function; `mask` gathers whole blocks of each row,
            for the model's own attention under a mask per row; `rows` gathers the exact cells of a single row.
    """

    def __init__(self, plan, pool, path: str):
        self.path = path
        layers = []
        for index, (kind, arguments) in enumerate(plan):
            states = arguments.get("number_of_states", 1)
            if kind in ATTENTION:
                layers.append(PagedLayer(pool, index, path))
            elif kind in RECURRENT:
                layers.append(LinearAttentionLayer(number_of_states=states))
            elif kind in HYBRID:
                layers.append(PagedHybridLayer(pool, index, path, states))
            else:
                layers.append(DummyLayer())
        super().__init__(layers=layers)
        self._paged = [layer for layer in layers if isinstance(layer, PagedLayer)]
        self._stateful = [
            layer
            for layer, (kind, _) in zip(layers, plan, strict=True)
            if isinstance(layer, LinearAttentionCacheLayerMixin) and kind not in EMPTY
        ]
        self._linear = [layer in self._stateful and layer not in self._paged for layer in layers]
        self.feed: Feed | None = None

    def bind(self, feed: Feed) -> PagedCache:
        """Point every layer at the tokens of the coming pass."""
        self.feed = feed
        for layer in self._paged:
            layer.feed = feed
        return self

    def get_query_offset(self, layer_idx: int = 0):
        """`[B, Q]` positions of the new tokens; the mask functions broadcast over them."""
        if not self._paged:
            return 0
        return self.get_seq_length() if self.path == "rows" else self.feed.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cells before this pass; for recurrent models, whether there were any."""
        if self._paged:
            return self._paged[0].get_seq_length()
        return self.feed.lengths[0] - self.feed.width

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0):
        """(key length, offset) for the mask of any layer: all layers keep every cell."""
        if self._paged:
            return self._paged[0].get_mask_sizes(query_length)
        return query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """Layers without keys and values."""
        return self._linear

    # -- recurrent states: a flat tuple of [B, ...] tensors

    def states(self) -> tuple[torch.Tensor, ...]:
        """Every recurrent and convolution state, `[B, ...]` each, in layer order."""
        return tuple(t for _, _, t in self._slots() if t is not None)

    def load_states(self, states: tuple[torch.Tensor, ...], like: PagedCache) -> None:
        """Take over `states`, laid out as in the cache `like` that they came from; the tensors are owned now."""
        found = iter(states)
        for layer, other in zip(self._stateful, like._stateful, strict=True):
            for name in ("conv", "recurrent"):
                done = getattr(other, f"is_{name}_states_initialized")
                for i in range(other.number_of_states):
                    if done[i]:
                        getattr(layer, f"{name}_states")[i] = next(found)
                        getattr(layer, f"is_{name}_states_initialized")[i] = True
            layer.conv_kernel_size = dict(other.conv_kernel_size)
            layer.has_previous_state = dict(other.has_previous_state)
            layer.dtype, layer.device = other.dtype, other.device

    def _slots(self):
        for layer in self._stateful:
            for name in ("conv_states", "recurrent_states"):
                for i, tensor in getattr(layer, name).items():
                    yield layer, (name, i), tensor
