"""The adapter between a Hugging Face causal LM and the block pool; nothing of the model is patched."""

from __future__ import annotations

import inspect
import itertools
import logging
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..cache.feed import Feed
from ..cache.paged import ATTENTION, EMPTY, HYBRID, RECURRENT, PagedCache, layer_plan
from ..cache.pool import BlockPool
from ..cache.sequence import EMBEDDING, History, Row
from ..errors import CapabilityError
from ..kernels.attention.attention import paged_attention
from ..kernels.attention.attention_cpu import CellPlan, paged_attention_cpu
from .capabilities import Capabilities, Capability

log = logging.getLogger("handloom")
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


class Model:
    """Ragged, paged forward passes over any causal LM whose cache transformers describes.

    Args:
        module: the transformers model, in evaluation mode.
        pool: the block pool to use.
        path: `attention`, `mask` or `rows`, see `Capabilities`.
        prefill_chunk: most prompt tokens in one forward pass.
    """

    def __init__(self, module, pool: BlockPool, path: str, prefill_chunk: int = 512):
        self.module, self.pool, self.path, self.prefill_chunk = module, pool, path, prefill_chunk
        self.config = module.config.get_text_config(decoder=True)
        self.plan = layer_plan(module.config)
        self.recurrent = any(kind in RECURRENT | HYBRID for kind, _ in self.plan)
        self.paged = any(kind in ATTENTION | HYBRID for kind, _ in self.plan)
        self.alone = False  # attend every row by itself, whatever it costs
        pool.scrub = True  # rectangles of cells are read and masked afterwards
        self.cache = PagedCache(self.plan, pool, path)
        self.layout = self.cache  # a cache whose recurrent states are laid out as the model wants them
        self._arguments = self._accepted(module)
        self._name = f"handloom_{next(_names)}"
        self._step: CellPlan | None = None
        self._feed: Feed | None = None
        self._ropes = _row_wise_ropes(module)
        self.restart = _rope_switch(self.config)
        self.compiled = None  # a CompiledStep that runs passes of one token per row
        if path == "attention":
            me = weakref.ref(self)
            AttentionInterface.register(self._name, lambda *a, **kw: me().attend(*a, **kw))
            weakref.finalize(self, AttentionInterface._global_mapping.pop, self._name, None)
        elif path == "mask":
            install_mask_hook()

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a cell holds depends on the tokens up to it alone, so that equal prefixes may share it."""
        return self.paged and not self.recurrent and not self._ropes

    @property
    def takes_prompts_together(self) -> bool:
        """Whether several prompts may share a pass; not where a row's bits must not depend on its neighbours."""
        return self.path == "attention" and self.shares_prefixes and not self.restart and not self.alone

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.module.get_input_embeddings().weight.device

    @staticmethod
    def _accepted(module) -> set[str]:
        return set(inspect.signature(module.forward).parameters)

    # -- one forward pass

    def forward(
        self, feed: Feed, cache: PagedCache | None = None, *, hidden=False, last_only=False
    ) -> Output:
        """Run the model over `feed`, writing its keys and values to the pool.

        Args:
            feed: the new tokens of each row.
            cache: a cache that holds recurrent states, updated in place; None for models without.
            hidden: return hidden states as well.
            last_only: logits of each row's last token only, `[B, 1, V]`.
        """
        if self.path == "rows" and len(feed.tables) > 1:
            return self._forward_rows(feed, hidden, last_only)
        cache = self.cache if cache is None else cache
        cache.bind(feed)
        self._aim(feed)
        if self.compiled is not None and not last_only and self.compiled.takes(feed, hidden):
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
            arguments["logits_to_keep"] = 1
        if hidden:
            arguments["output_hidden_states"] = True
        with self._ours(), self._last_of_each(feed) if ragged else nullcontext():
            out = self.module(**arguments)
        logits = out.logits
        if last_only:
            logits = logits[:, -1:] if logits.shape[1] == 1 or not ragged else _last(logits, feed)
        states = tuple(out.hidden_states) if hidden else None
        return Output(logits.float(), states, cache.states() if self.recurrent else ())

    def _forward_rows(self, feed: Feed, hidden, last_only) -> Output:
        """One forward pass per row, for models that take the position of a whole batch from its first row."""
        parts = [self.forward(row, hidden=hidden, last_only=last_only) for row in feed.rows()]
        width = 1 if last_only else feed.width
        logits = torch.cat([_padded(part.logits, width) for part in parts])
        if not hidden:
            return Output(logits)
        layers = zip(*(part.hidden for part in parts), strict=True)
        return Output(logits, tuple(torch.cat([_padded(h, feed.width) for h in layer]) for layer in layers))

    def _aim(self, feed: Feed) -> None:
        """What our attention function reads in the coming pass."""
        self._feed, self._step = feed, None
        known = feed.positions.device.type == "cpu" and len(feed.tables) > 0  # not so in a recorded step
        if self.path == "attention" and (known or feed.width > LONG):
            self._step = CellPlan(
                feed.tables, feed.lengths, self.pool.block_size, counts=feed.counts, alone=self.alone
            )

    @contextmanager
    def _ours(self):
        """Our attention function and rotations for the length of one pass; the model is left as it was."""
        handles = [part.register_forward_hook(_rotate_rows, with_kwargs=True) for part in self._ropes]
        settings = vars(self.config)  # the property's setter walks all sub-configurations, at every step
        theirs = settings["_attn_implementation_internal"]
        if self.path == "attention":
            settings["_attn_implementation_internal"] = self._name
        try:
            yield
        finally:
            settings["_attn_implementation_internal"] = theirs
            for handle in handles:
                handle.remove()

    @contextmanager
    def _last_of_each(self, feed: Feed):
        """The output layer sees each row's last token alone, for the length of one pass.

        A model that calls it in another way computes all logits, from which they are picked afterwards.
        """
        output = self.module.get_output_embeddings()
        if output is None:
            yield
            return

        def pick(layer, inputs):
            states = inputs[0] if inputs else None
            if torch.is_tensor(states) and states.shape[:2] == feed.positions.shape:
                return _last(states, feed), *inputs[1:]
            return None

        handle = output.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

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
        if self._step is not None:
            return paged_attention_cpu(query, key, value, plan=self._step, **options), None
        counts, place = feed.fresh(), query.device
        counts = None if counts is None else counts.to(place)
        table, lengths = feed.blocks().to(place), feed.valid().to(place)
        return paged_attention(query, key, value, table, lengths, counts=counts, **options), None

    # -- rows

    def prefill(self, tokens, embeddings=None, *, hidden=False, every=False, room=0) -> tuple[Row, Output]:
        """A new row that holds a prompt, computed alone and unpadded.

        Args:
            tokens: the prompt's ids, at least one.
            embeddings: `[T, D]` instead; `tokens` then only gives the length.
            room: blocks that the row may grow to, a hint for placing it.
            hidden, every: return hidden states, or logits, of every prompt token. Turns prefix sharing off.

        Returns:
            The row, and its Output: logits `[1, 1, V]`, or `[1, T, V]` with `every`.
        """
        whole = hidden or every or embeddings is not None or not self.shares_prefixes
        table = self.pool.table(() if whole else self.pool.match(tokens))
        start, chunk = len(table) * self.pool.block_size, self.prefill_chunk
        if not self.shares_prefixes:
            chunk = len(tokens)
        cache = PagedCache(self.plan, self.pool, self.path) if self.recurrent else None
        outputs = []
        for begin in range(start, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            table = self._writable(table, begin, len(part), room)
            piece = None if embeddings is None else self.embedded(embeddings[None, begin : begin + chunk])
            feed = Feed.build([part], [begin], [table], self.pool.block_size, self.device, piece)
            outputs.append(self.forward(feed, cache, hidden=hidden, last_only=not every))
        if self.recurrent:
            self.layout = cache
        if not whole:
            self.pool.register(table, tokens)
        history = History(tokens if embeddings is None else [EMBEDDING] * len(tokens))
        return Row(table, history, len(tokens)), _joined(outputs, every, hidden)

    def prefill_together(self, prompts, rooms) -> tuple[list[Row], torch.Tensor]:
        """New rows that hold prompts, computed in one ragged pass.

        Args:
            prompts: the ids of each, at least one.
            rooms: blocks that each row may grow to.

        Returns:
            The rows, and the logits `[B, V]` after each prompt.

        Raises:
            PoolExhausted: there are not enough blocks for all of them; none is kept.
        """
        block = self.pool.block_size
        tables = [self.pool.table(self.pool.match(ids)) for ids in prompts]
        starts = [len(table) * block for table in tables]
        parts = [list(ids[start:]) for ids, start in zip(prompts, starts, strict=True)]
        wanted = zip(tables, starts, parts, rooms, strict=True)
        tables = [self._writable(table, start, len(part), room) for table, start, part, room in wanted]
        logits = self.forward(Feed.build(parts, starts, tables, block, self.device), last_only=True).logits
        for table, ids in zip(tables, prompts, strict=True):
            self.pool.register(table, ids)
        rows = [Row(t, History(ids), len(ids)) for t, ids in zip(tables, prompts, strict=True)]
        return rows, logits[:, 0]

    def extend(self, rows, tokens, states=(), *, hidden=False) -> tuple[tuple[Row, ...], Output]:
        """Feed each row its own number of tokens.

        Args:
            rows: the rows to continue; they stay as they are.
            tokens: a list of at least one id for each row.
            states: recurrent states of the rows, `[B, ...]` each.
            hidden: return hidden states.

        Returns:
            The longer rows, and an Output with logits `[B, n, V]`, n the largest count.
        """
        if self.restart and any(
            r.length <= self.restart < r.length + len(t) for r, t in zip(rows, tokens, strict=True)
        ):
            return self._recompute(rows, tokens, hidden)
        if self.recurrent:
            return self._extend_stepwise(rows, tokens, states, hidden)
        tables = [self._writable(r.table, r.length, len(t)) for r, t in zip(rows, tokens, strict=True)]
        feed = Feed.build(tokens, [r.length for r in rows], tables, self.pool.block_size, self.device)
        return _longer(rows, tables, tokens), self.forward(feed, hidden=hidden)

    def embedded(self, embeddings):
        """Embeddings on the device and in the dtype of the model's own."""
        words = self.module.get_input_embeddings().weight
        return embeddings.to(device=words.device, dtype=words.dtype)

    def _writable(self, table, start, count, room=0):
        return self.pool.writable(table, start, count, room) if self.paged else table

    def _extend_stepwise(self, rows, tokens, states, hidden):
        """One token at a time: the only way that is right for every recurrent layer."""
        rows, states = list(rows), tuple(t.clone() for t in states)
        logits, layers, steps = [], [], []
        for j in range(max(len(t) for t in tokens)):
            active = [i for i, t in enumerate(tokens) if j < len(t)]
            where = torch.tensor(active, device=states[0].device)
            cache = PagedCache(self.plan, self.pool, self.path)
            cache.load_states(tuple(t.index_select(0, where) for t in states), self.layout)
            picked, new = [rows[i] for i in active], [[tokens[i][j]] for i in active]
            tables = [self._writable(r.table, r.length, 1) for r in picked]
            feed = Feed.build(new, [r.length for r in picked], tables, self.pool.block_size, self.device)
            out = self.forward(feed, cache, hidden=hidden)
            states = tuple(t.index_copy(0, where, s) for t, s in zip(states, out.states, strict=True))
            steps.append(states)
            for i, row in zip(active, _longer(picked, tables, new), strict=True):
                rows[i] = row
            logits.append(_scattered(out.logits, where, len(rows)))
            layers.append([_scattered(h, where, len(rows)) for h in out.hidden or ()])
        joined = tuple(torch.cat(parts, 1) for parts in zip(*layers, strict=True)) if hidden else None
        return tuple(rows), Output(torch.cat(logits, 1), joined, states, tuple(steps))

    def _recompute(self, rows, tokens, hidden):
        """Prefill again where a row passes the length at which the model changes all its rotations."""
        longer, logits, layers = [], [], []
        width = max(len(t) for t in tokens)
        for row, new in zip(rows, tokens, strict=True):
            if EMBEDDING in row.history:
                raise CapabilityError(
                    f"a prompt of embeddings cannot grow past {self.restart} tokens: this model then recomputes "
                    "every key from token ids"
                )
            if row.length <= self.restart < row.length + len(new):
                fresh, out = self.prefill(row.history.tolist() + list(new), hidden=hidden, every=True)
                fresh = Row(fresh.table, fresh.history, row.prompt_length)
                keep = slice(row.length, None)
            else:
                (fresh,), out = self.extend([row], [new], hidden=hidden)
                keep = slice(None)
            longer.append(fresh)
            logits.append(_padded(out.logits[:, keep], width))
            layers.append([_padded(h[:, keep], width) for h in out.hidden or ()])
        joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) if hidden else None
        return tuple(longer), Output(torch.cat(logits), joined)

    # -- what it can do

    def capabilities(self) -> Capabilities:
        """What this model supports on its path."""
        yes = Capability(True)
        note = {
            "attention": "",
            "mask": "its own attention over gathered cells",
            "rows": "one forward pass per row: it takes positions from the whole batch",
        }[self.path]
        if not self.paged:
            note = "recurrent states only, no keys and values"
        if self._ropes:
            note = "rotations are computed row by row"
        extend = Capability(True, "one forward pass per token: recurrent layers" if self.recurrent else "")
        if self.path == "attention" and not self.recurrent:
            tree = Capability(False, "the engine has no tree step yet")
        else:
            tree = Capability(False, "recurrent layers" if self.recurrent else f"{self.path} path")
        return Capabilities(self.path, Capability(True, note), yes, yes, extend, tree, self._graph())

    def _graph(self) -> Capability:
        if self.path == "rows":
            return Capability(False, "rows path: the host loops over rows")
        if self._ropes or self.restart:
            return Capability(False, "rotations depend on lengths that only the host knows")
        reason = uncapturable(self.module)
        if reason:
            return Capability(False, reason)
        return Capability(True, "captured on CUDA; the same program runs uncaptured elsewhere")


def uncapturable(module) -> str:
    """What in a model's layers keeps its step from being captured, in words; empty if nothing does."""
    places = {p.device for p in module.parameters()}
    if len(places) > 1:
        return f"the model lies on {len(places)} devices, and a graph belongs to one"
    for layer in module.modules():
        state = getattr(layer, "state", None)  # bitsandbytes' Linear8bitLt
        threshold = getattr(state, "threshold", 0) if type(layer).__name__ == "Linear8bitLt" else 0
        if threshold > 0:
            return (
                f"bitsandbytes int8 asks the host for outliers above {threshold:g} in every layer; "
                "llm_int8_threshold=0 does not, nor do nf4 and fp4"
            )
    return ""


def _longer(rows, tables, tokens):
    return tuple(
        Row(table, row.history.extended(new), row.prompt_length, row.session)
        for row, table, new in zip(rows, tables, tokens, strict=True)
    )


def _joined(outputs, every, hidden) -> Output:
    last = outputs[-1]
    logits = torch.cat([o.logits for o in outputs], 1) if every else last.logits
    layers = (
        tuple(torch.cat(h, 1) for h in zip(*(o.hidden for o in outputs), strict=True)) if hidden else None
    )
    return Output(logits, layers, last.states)


def _last(part, feed):
    """`[B, Q, ...]` -> `[B, 1, ...]`: the last real entry of each row."""
    rows = torch.arange(part.shape[0], device=part.device)
    return part[rows, feed.fresh().to(part.device) - 1][:, None]


def _scattered(part, where, rows):
    full = part.new_zeros(rows, *part.shape[1:])
    return full.index_copy_(0, where.to(part.device), part)


def _padded(part, width):
    return torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1]))


# -- transformers' registries


def install_mask_hook() -> None:
    """Let transformers' own mask functions answer for rows of different length.

    The registered functions are wrapped once for the whole process; a call whose query offset is not a tensor
    `[B, Q]` passes straight through, so `model.generate` is not affected.
    """
    for name, additive in (("sdpa", False), ("eager", True)):
        original = AttentionMaskInterface._global_mapping[name]
        if not getattr(original, "handloom", False):
            AttentionMaskInterface.register(name, _ragged_mask(original, additive))


def _ragged_mask(original, additive: bool):
    def mask(*args, **kwargs):
        positions = kwargs.get("q_offset", 0)
        if not (torch.is_tensor(positions) and positions.dim() == 2):
            return original(*args, **kwargs)
        device, (rows, queries) = positions.device, positions.shape
        batch = torch.arange(rows, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        cell = torch.arange(kwargs["kv_length"], device=device)[None, None, None]
        seen = kwargs["mask_function"](batch, head, positions[:, None, :, None], cell)
        seen = seen.expand(rows, 1, queries, kwargs["kv_length"])
        if not additive:
            return seen
        dtype = kwargs["dtype"]
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)

    mask.handloom = True
    return mask


# -- rotary embeddings that depend on the longest row


def _row_wise_ropes(module) -> list:
    """Rotary embeddings whose frequencies depend on the longest row, so that rows disturb each other."""
    found = []
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            found.append(part)
    return found


def _rotate_rows(part, args, kwargs, output):
    """A forward hook that gives each row the rotation it would have alone."""
    x, positions = args[0] if args else kwargs["x"], kwargs.get("position_ids")
    positions = args[1] if positions is None else positions
    rest = {k: v for k, v in kwargs.items() if k not in ("x", "position_ids")}
    kinds = part.rope_type
    prefixes = [f"{kind}_" for kind in kinds] if isinstance(kinds, dict) else [""]
    prefixes = [p for p in prefixes if hasattr(part, f"{p}original_inv_freq")]
    rows = []
    for i in range(positions.shape[0]):
        _reset_rope(
            part, prefixes, x.device
        )  # the frequencies of a longer neighbour must not outlive its turn
        rows.append(part.forward(x, positions[i : i + 1], *args[2:], **rest))
    _reset_rope(part, prefixes, x.device)
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _reset_rope(part, prefixes, device) -> None:
    for prefix in prefixes:
        original = getattr(part, f"{prefix}original_inv_freq").to(device).clone()
        setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)
        setattr(part, f"{prefix}inv_freq", original)


def _rope_switch(config) -> int | None:
    """The length beyond which a longrope model uses other frequencies for every position, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] + [v for v in rope.values() if isinstance(v, dict)]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            return getattr(config, "original_max_position_embeddings", None) or kind.get(
                "original_max_position_embeddings"
            )
    return None


def supported_layers(config) -> str:
    """Empty when every layer type is known, else the reason why the model cannot use the pool."""
    known = ATTENTION | RECURRENT | HYBRID | EMPTY
    unknown = sorted({kind for kind, _ in layer_plan(config)} - known)
    return f"layer type {', '.join(unknown)} is not known" if unknown else ""
