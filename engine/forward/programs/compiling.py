"""The compiled decode step: the model's own forward through torch.compile, with our attention as one opaque op."""

from __future__ import annotations

import itertools
import logging
import sys
import time
import types
import weakref

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from ...cache.feed import Feed
from ...cache.paged import ATTENTION
from ...errors import CapabilityError
from ..model import Model
from ..passes import FOREIGN

log = logging.getLogger("handloom")
# Largest mean difference to the eager logits, in standard deviations of them, that is rounding and not structure.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOOSE = 0.15
# On CUDA products of one row become tuned kernels that read the weights at full speed; the graphs are our own.
ON_CUDA = {"coordinate_descent_tuning": True, "triton.cudagraphs": False}

# An op takes numbers and tensors only, so it finds its step under a number: the lowest free one, since it is a part
# of what inductor's cache goes by.
_steps: weakref.WeakValueDictionary[int, CompiledStep] = weakref.WeakValueDictionary()
_library = torch.library.Library("handloom", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int step, int layer, float? scale, int? window, "
    "float? softcap, Tensor? sinks) -> Tensor"
)


def _attend(query, key, value, step, layer, scale, window, softcap, sinks):
    """Write the new cells `[B, Hk, 1, D]` and attend over all of them: `[B, H, 1, D]` -> `[B, 1, H, Dv]`."""
    return _steps[step].attend(query, key, value, layer, scale, window, softcap, sinks)


def _attend_fake(query, key, value, step, layer, scale, window, softcap, sinks):
    rows, heads, queries, _ = query.shape
    return query.new_empty(rows, queries, heads, value.shape[-1])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("handloom::attend", _attend_fake, lib=_library)


class FreshLayer(CacheLayerMixin):
    """A cache layer that hands back what it is given: the op writes the cells, and reads all of them."""

    is_compileable, is_sliding = True, False

    def __init__(self):
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        """Nothing to do."""

    def update(self, key_states, value_states, *args, **kwargs):
        """The new keys and values, as they are."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int):
        """No mask is built; any constant will do."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Positions are given, so this is a number for shapes only."""
        return 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1


class CompiledStep:
    """The forward pass of one new token a row, compiled once for each number of rows.

    Block tables, lengths and the pool itself stay outside the compiled graph, so rows may come, grow and go, and
    the pool may grow, without another compilation.

    Args:
        model: the adapter whose step is compiled.
        sizes: numbers of rows worth compiling for; other steps run as they are.
        backend: of torch.compile.

    Raises:
        CapabilityError: the model does not run on the attention path alone, so its step has no static shape.
    """

    def __init__(self, model: Model, sizes: set[int], backend: str = "inductor"):
        reason = unsupported(model)
        if reason:
            raise CapabilityError(f"the decode step cannot be compiled: {reason}")
        self.sizes, self.refused = sizes, ""
        self.compiled: dict[int, float] = {}  # rows -> seconds it took to compile
        self._model = weakref.ref(model)
        self._module, self._config = model.module, model.config
        self._cache = Cache(layers=[FreshLayer() for _ in model.plan])
        self._number = next(number for number in itertools.count() if number not in _steps)
        self._name = f"handloom_compiled_{self._number}"
        _steps[self._number] = self
        AttentionInterface.register(self._name, _attention(self._number))
        weakref.finalize(self, AttentionInterface._global_mapping.pop, self._name, None)
        # A code object of its own: torch counts recompilations for each code object, not for each model.
        forward = types.FunctionType(_forward.__code__.replace(), globals(), f"decode_{self._number}")
        # Modules stay as they are while an engine runs, so a step need not look at each of them again.
        options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        if backend == "inductor" and model.device.type == "cuda":
            options |= ON_CUDA
        self._forward = torch.compile(
            forward, fullgraph=True, dynamic=False, backend=backend, options=options
        )

    def takes(self, feed: Feed, hidden: bool) -> bool:
        """Whether this pass is a plain decode step, one token for every row, of a size to compile for."""
        plain = feed.width == 1 and feed.ids is not None and feed.positions.shape[0] in self.sizes
        return plain and not hidden and not self.refused

    def __call__(self, feed: Feed) -> torch.Tensor:
        """Logits `[B, 1, V]` float32 of a pass that the model is aimed at."""
        rows = feed.positions.shape[0]
        return self._run(feed).float() if rows in self.compiled else self._compile(feed, rows)

    def _run(self, feed: Feed) -> torch.Tensor:
        settings = vars(self._config)  # the property's setter walks all sub-configurations, at every step
        theirs = settings["_attn_implementation_internal"]
        settings["_attn_implementation_internal"] = self._name
        try:
            return self._forward(self._module, feed.ids, feed.positions, self._cache)
        finally:
            settings["_attn_implementation_internal"] = theirs

    def _compile(self, feed: Feed, rows: int) -> torch.Tensor:
        """Compile for `rows` rows and compare with the eager step; a failure is told once and switches this off."""
        what = f"the decode step of {type(self._module).__name__} for {rows} row{'s' * (rows > 1)}"
        say(f"compiling {what} ...")
        want, start = self._eager(feed), time.perf_counter()
        try:
            have = self._run(feed).float()
        except Exception as error:  # noqa: BLE001 - whatever the compiler trips over, the eager step still works
            return self._refuse(f"{type(error).__name__}: {_first_line(error)}", want)
        scale = want.nan_to_num().std().clamp_min(1e-6)
        error = float((want - have).nan_to_num().abs().mean() / scale)
        if not error <= TOLERANCE.get(self._module.dtype, LOOSE):
            return self._refuse(f"its logits differ from the eager step by {error:.2g} deviations", want)
        self.compiled[rows] = time.perf_counter() - start
        say(f"compiled {what} in {self.compiled[rows]:.1f} s")
        return have

    def _eager(self, feed: Feed) -> torch.Tensor:
        model = self._model()
        model.compiled = None
        try:
            return model.forward(feed).logits
        finally:
            model.compiled = self

    def _refuse(self, reason: str, logits: torch.Tensor) -> torch.Tensor:
        self.refused = reason
        log.warning("the decode step runs uncompiled: %s", reason)
        return logits

    def attend(self, query, key, value, layer, scale, window, softcap, sinks) -> torch.Tensor:
        """What the op does: keys and values to the pool, then the model's own ragged attention."""
        model = self._model()
        keys, values = model.cache.layers[layer].update(key, value)
        options = {"scaling": scale, "sliding_window": window, "softcap": softcap, "s_aux": sinks}
        return model.attend(None, query, keys, values, None, **options)[0]


def compile_step(model, sizes: set[int]) -> None:
    """Let a model's plain decode steps run compiled; where that cannot be, say so and leave it as it is."""
    try:
        model.compiled = CompiledStep(model, sizes)
    except CapabilityError as error:
        log.warning("compile=True: %s", error)


def unsupported(model) -> str:
    """Why the step of a model has no static shape; empty if it has one."""
    path = getattr(model, "path", "solo")
    if path != "attention":
        return f"the model runs on the {path} path, whose shapes follow the lengths of the rows"
    others = sorted({kind for kind, _ in model.plan} - ATTENTION)
    if others:
        return f"layers of type {', '.join(others)} keep what the compiled graph cannot reach"
    if model._ropes:
        return "its rotations depend on the longest row"
    return ""


def _forward(module, ids, positions, cache):
    return module(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits


def _attention(number: int):
    """The attention function for transformers: one call of the op, which a compiler cannot look into."""

    def attention(
        module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None,
        **kwargs,
    ):  # fmt: skip
        for name in FOREIGN:
            if kwargs.get(name) is not None:
                raise CapabilityError(f"attention with {name} is not paged")
        layer, window = module.layer_idx, None if sliding_window is None else int(sliding_window)
        out = torch.ops.handloom.attend(query, key, value, number, layer, scaling, window, softcap, s_aux)
        return out, None

    return attention


def say(line: str) -> None:
    """Progress of something that takes long, on stderr, whatever the logging is set to."""
    sys.stderr.write(f"handloom: {line}\n")
    sys.stderr.flush()


def _first_line(error: Exception) -> str:
    """What went wrong, without the compiler's advice; it heads its message with "... raised:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:wanted])[:200] or "no message"
