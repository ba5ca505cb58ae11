"""One forward pass of a model's twin over the block pool."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from ..cache.feed import Feed
from ..cache.paged import ATTENTION, HYBRID, RECURRENT, PagedCache, layer_plan
from ..cache.pool import BlockPool
from ..errors import CapabilityError
from ..kernels.attention.attention import paged_attention
from ..kernels.attention.attention_cpu import CellPlan, packed_attention_cpu, paged_attention_cpu
from ..kernels.attention.packed import paged_attention_packed
from .fused.rotary import tables_of
from .ragged import install_mask_hook, rope_switch, row_wise_ropes
from .twin.twin import capture_hidden_states, replace

_names = itertools.count()
LONG = 32  # more new tokens than this are a prompt: torch's own attention over gathered cells is faster
# Arguments by which a model asks its attention for something that ours does not do.
FOREIGN = ("position_bias", "indices", "block_indices", "head_mask")


@dataclass
class Output:
    """What a forward pass gives: `logits [B, n, V]` float32, hidden states, recurrent states and their steps."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    states: tuple[torch.Tensor, ...] = ()
    steps: tuple[tuple[torch.Tensor, ...], ...] = ()


class Pass:
    """One ragged, paged forward pass over a model; the arguments are those of `Model`."""

    def __init__(self, module, pool: BlockPool, path: str, prefill_chunk: int = 512):
        self.module, self.pool, self.path, self.prefill_chunk = module, pool, path, prefill_chunk
        self.config = module.config.get_text_config(decoder=True)
        self.plan = layer_plan(module.config)
        self.recurrent = any(kind in RECURRENT | HYBRID for kind, _ in self.plan)
        self.paged = any(kind in ATTENTION | HYBRID for kind, _ in self.plan)
        self.alone = False  # attend every row by itself, whatever it costs
        # Kernels read no cell beyond a row's length; what gathers rectangles of cells masks them afterwards.
        pool.scrub = path == "mask" or (path == "attention" and self.device.type == "cpu")
        self.cache = PagedCache(self.plan, pool, path)
        self.layout = self.cache  # a cache whose recurrent states are laid out as the model wants them
        self._arguments = accepted(module)
        self._name = f"handloom_{next(_names)}"
        self._step: CellPlan | None = None
        self._feed: Feed | None = None
        self._ropes = row_wise_ropes(module)
        self.output = output_layer(module)
        self.restart = rope_switch(self.config)
        self.fused: dict[str, str] = {}  # decoder layers, and why they stay plain; empty where they run fused
        self.rotary_tables = tables_of(module)  # of rotary embeddings that look angles up
        self.outlived: list = []  # tables of such as do no longer: recorded passes of a run under way may read them
        self.compiled = None  # a CompiledStep that runs passes of one token per row
        self.hooked = False  # the model has forward hooks, which a compiled step might pass by
        self.recorded = None  # RecordedPasses, where passes over prompts are recorded
        if path == "attention":
            me = weakref.ref(self)
            AttentionInterface.register(self._name, lambda *a, **kw: me().attend(*a, **kw))
            weakref.finalize(self, AttentionInterface._global_mapping.pop, self._name, None)
        elif path == "mask":
            install_mask_hook()

    @functools.cached_property
    def shares_prefixes(self) -> bool:
        """Whether what a cell holds depends on the tokens up to it alone, so that equal prefixes may share it."""
        return self.paged and not self.recurrent and not self._ropes

    @functools.cached_property
    def packs(self) -> bool:
        """Whether pieces of several prompts may stand behind one another in one row of a pass."""
        plain = self.path == "attention" and self.shares_prefixes and not self.restart
        return plain and "position_ids" in self._arguments

    @functools.cached_property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.module.get_input_embeddings().weight.device

    # -- one forward pass

    def forward(
        self, feed: Feed, cache: PagedCache | None = None, *, hidden=False, last_only=False, into=None
    ) -> Output:
        """Run the model over `feed`, writing its keys and values to the pool.

        Args:
            feed: the new tokens of each row.
            cache: a cache that holds recurrent states, updated in place; None for models without.
            hidden: return hidden states as well.
            last_only: logits of each row's last token only, `[B, 1, V]`; of packed rows `[1, R, V]`.
            into: `[N, V]` float32, receives all N rows of logits; the Output's are then a view of it.
        """
        alone = self.path == "rows" and len(feed.tables) > 1
        out = (
            self._forward_rows(feed, hidden, last_only)
            if alone
            else self._through(feed, cache, hidden, last_only)
        )
        out.logits = out.logits.float() if into is None else copied(out.logits, into)
        return out

    def _through(self, feed: Feed, cache: PagedCache | None, hidden, last_only) -> Output:
        """The pass, with logits in the model's dtype."""
        cache = self.cache if cache is None else cache
        cache.bind(feed)
        self._aim(feed)
        self.pool.clean()
        compiled = self.compiled is not None and not self.hooked and not last_only
        if compiled and self.compiled.takes(feed, hidden):
            return Output(self.compiled(feed))
        arguments = {"use_cache": True}
        arguments["cache_params" if "cache_params" in self._arguments else "past_key_values"] = cache
        if feed.embeddings is None:
            arguments["input_ids"] = feed.ids
        else:
            arguments["inputs_embeds"] = feed.embeddings
        if "position_ids" in self._arguments:
            arguments["position_ids"] = feed.positions
        ragged = last_only and feed.counts is not None
        if last_only and not ragged and "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = 1 if feed.last is None else feed.last
        if hidden:
            capture_hidden_states(self.module)
            arguments["output_hidden_states"] = True
        with self._ours(), self.output.only_last(feed) if ragged and self.output else nullcontext():
            out = self.module(**arguments)
        logits = out.logits
        if last_only and feed.last is not None:
            logits = logits if logits.shape[1] == len(feed.last) else logits.index_select(1, feed.last)
        elif last_only:
            logits = logits[:, -1:] if logits.shape[1] == 1 or not ragged else last_of_rows(logits, feed)
        states = tuple(out.hidden_states) if hidden else None
        return Output(logits, states, cache.states() if self.recurrent else ())

    def _forward_rows(self, feed: Feed, hidden, last_only) -> Output:
        """One forward pass per row, for models that take the position of a whole batch from its first row."""
        parts = [self.forward(row, hidden=hidden, last_only=last_only) for row in feed.rows()]
        width = 1 if last_only else feed.width
        logits = torch.cat([padded(part.logits, width) for part in parts])
        if not hidden:
            return Output(logits)
        layers = zip(*(part.hidden for part in parts), strict=True)
        return Output(logits, tuple(torch.cat([padded(h, feed.width) for h in layer]) for layer in layers))

    def _aim(self, feed: Feed) -> None:
        """What our attention function reads in the coming pass."""
        self._feed, self._step = feed, None
        known = feed.positions.device.type == "cpu" and len(feed.tables) > 0  # not so in a recorded step
        if self.path == "attention" and (known or (feed.width > LONG and feed.starts is None)):
            counts = feed.counts if feed.offsets is None else np.diff(feed.offsets).tolist()
            self._step = CellPlan(
                feed.tables,
                feed.lengths,
                self.pool.block_size,
                counts=counts,
                tree=feed.tree,
                alone=self.alone,
            )

    @contextmanager
    def _ours(self):
        """Our attention function and angles for the length of one pass; a compiled step has others."""
        settings = vars(self.config)  # the property's setter walks all sub-configurations, at every step
        theirs = settings["_attn_implementation_internal"]
        if self.path == "attention":
            settings["_attn_implementation_internal"] = self._name
        try:
            for table in self.rotary_tables:
                table.aim(self._feed.reach(self.pool.block_size))
            yield
        finally:
            for table in self.rotary_tables:
                table.aim(0)
            settings["_attn_implementation_internal"] = theirs

    def attend(
        self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
        s_aux=None, **kwargs,
    ):  # fmt: skip
        """The attention function that transformers calls: query `[B, H, Q, D]`, key and value as the pool has them."""
        for name in FOREIGN:
            if kwargs.get(name) is not None:
                raise CapabilityError(f"attention with {name} is not paged")
        if key.dim() != 4 or key.shape[:2] != (self.pool.capacity, self.pool.block_size):
            raise CapabilityError("the model reshapes what its cache returns, so its attention is not paged")
        feed, query = self._feed, query.transpose(1, 2)
        options = {"scale": scaling, "sliding_window": sliding_window, "softcap": softcap, "sinks": s_aux}
        if feed.starts is not None:
            return self._attend_packed(query[0], key, value, options)[None], None
        if self._step is not None:
            return paged_attention_cpu(query, key, value, plan=self._step, **options), None
        counts, place = feed.fresh(), query.device
        counts = None if counts is None else counts.to(place)
        table, lengths = feed.blocks().to(place), feed.valid().to(place)
        options["tree"] = feed.tree
        return paged_attention(query, key, value, table, lengths, counts=counts, **options), None

    def _attend_packed(self, query, key, value, options) -> torch.Tensor:
        """The same for packed rows: query `[T, H, D]`."""
        if self._step is not None:
            return packed_attention_cpu(query, key, value, self._step, **options)
        place = query.device
        table, starts, lengths = (
            t.to(place) for t in (self._feed.blocks(), self._feed.starts, self._feed.valid())
        )
        return paged_attention_packed(query, key, value, table, starts, lengths, **options)


def accepted(module) -> set[str]:
    """Names of the arguments that a model's forward takes, those of an adapter's base model included."""
    names = set(inspect.signature(module.forward).parameters)
    return names | accepted(module.get_base_model()) if hasattr(module, "get_base_model") else names


class OutputLayer(nn.Module):
    """An output layer that can be told to see each row's last token alone.

    A model that calls it in another way computes all logits, from which they are picked afterwards.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.feed = layer, None

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own."""
        return self.layer.weight

    @contextmanager
    def only_last(self, feed: Feed):
        """For the length of one pass over `feed`."""
        self.feed = feed
        try:
            yield
        finally:
            self.feed = None

    def forward(self, states, *rest):
        """`[B, Q, D]` -> `[B, Q or 1, V]`."""
        if self.feed is not None and states.shape[:2] == self.feed.positions.shape:
            states = last_of_rows(states, self.feed)
        return self.layer(states, *rest)


def output_layer(module: nn.Module) -> OutputLayer | None:
    """The output layer of a twin, which from now on can be told what to see; None where the model names none."""
    layer = module.get_output_embeddings()
    if layer is None or isinstance(layer, OutputLayer):
        return layer
    mine = OutputLayer(layer)
    replace(module, layer, mine)
    return mine


def last_of_rows(part, feed):
    """`[B, Q, ...]` -> `[B, 1, ...]`: the last real entry of each row."""
    rows = torch.arange(part.shape[0], device=part.device)
    return part[rows, feed.fresh().to(part.device) - 1][:, None]


def copied(logits, into):
    """Logits `[B, Q, V]` in the memory of `into [B * Q, V]`."""
    return into.copy_(logits.reshape(into.shape)).view(logits.shape)


def padded(part, width):
    """`[B, n, ...]` -> `[B, width, ...]`, zero behind what there is."""
    return torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1]))
