"""Engine: a loaded model with its tokenizer and block pool; the object that most users touch."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from os import PathLike
from typing import Any, Literal, Unpack, overload

import torch

from .errors import CapabilityError, HandloomError, ModelError, ParameterError, PromptError
from .forward.fused.recognise import fuse
from .forward.head import Head
from .forward.probe import adapt
from .forward.programs.compiling import compile_step, say
from .forward.programs.recorded import record_passes
from .forward.twin.copies import check_layout, lay_out, renew
from .forward.twin.fingerprint import Changes, Fingerprint
from .forward.twin.twin import Twin
from .loading import limits
from .loop.batch import Batch
from .loop.generation import Event, Generation, Results
from .loop.graph import GraphBatch
from .loop.intake import Arrivals, another_strategy, encoded, rehearsals, requests_of
from .loop.loop import run
from .loop.request import Request
from .params.settings import Call, OneCall, Single
from .pipeline.pipeline import Pipeline
from .state import State, continuations, drafted, extended, prefilled, scored, stepped, unread, whole_numbers
from .text.prompts import Many, One, chat_ids

log = logging.getLogger("handloom")
PASS = {"cuda": 4096}  # prompt tokens of a pass; a pass of so many fills the device


class Engine:
    """A causal LM ready to decode.

    Args:
        model: a transformers causal LM, in any mode; a twin of it runs (`forward.twin`), so it is never touched. Edits
            of its weights, hooks and adapters act from the next run on, see `model_changed`.
        tokenizer: its tokenizer, or None where prompts are ids.
        slots: most rows decoded together, >= 1.
        fixed_slots: always decode all slots, so that a row's logits do not depend, to the last bit, on how many
            requests there are. Otherwise the batch shrinks with them. Prompts then share no computed prefix.
        max_length: most tokens of prompt and output together; None takes the model's limit.
        eos_token_ids: ids that end a text, unless a request names its own; None takes those of the model's
            `generation_config`, as transformers does. An end that only the tokenizer or a chat template knows is
            added here: `eos_token_ids=[*ids, tokenizer.eos_token_id]`.
        block_size: tokens in a block of the key/value pool, >= 1.
        max_blocks: most blocks in the pool; None lets it grow.
        prefill_chunk: most prompt tokens in one forward pass, of one prompt or of several together, >= 1; None is
            4096 on CUDA and 512 elsewhere. Decoding goes on between such passes.
        pipeline: the processors every request goes through; None is `Pipeline.default()`, which does nothing
            that a request does not ask for.
        prefix_cache: keep prompts' blocks for prompts that begin alike.
        graph: run the decode step as one device program, captured as a CUDA graph; None does so on CUDA where the
            model allows it. On a CPU True runs the same program uncaptured.
        fuse: run decoder layers that are recognised as a few launches of our kernels, checked against the plain ones
            when loading; `runner.fused` says of each why not. None does so on CUDA, True raises where none can be.
        compile: compile the model's decode step with torch.compile, once for each number of rows. It takes from
            half a minute to minutes, which stderr tells; what cannot be compiled runs as it is, and says why.
        self_check: compare a few logits with transformers' own cache when loading, and fall back if they differ.
        layout: of the linear layers' weights. `plain` runs the model's own. On a CPU `blocked` runs copies in oneDNN's
            blocked layout, in the same dtype, whose products are faster and round differently: as much memory again as
            the layers take. `auto` does so where it is at most half of what is free. `triton` reads bitsandbytes' 4-bit
            weights where they lie by our own product.
        quantization: on a CPU `int8-cpu` or `int4-cpu` runs packed copies of the linear layers, the output layer too;
            None runs them as they are. The model stays whole: its layers keep their weights, whose edits are packed
            anew, and the copies take 1 byte a weight or 5 bits beside them (the output layer 1 or, in bfloat16, 2
            bytes). `from_pretrained` gives the weights up instead. A layer with hooks, and `head`, run unpacked.

    Raises:
        ParameterError: an argument is out of range.
        ModelError: the model fails on a plain forward pass.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        slots: int = 8,
        fixed_slots: bool = False,
        max_length: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
        block_size: int = 16,
        max_blocks: int | None = None,
        prefill_chunk: int | None = None,
        pipeline: Pipeline | None = None,
        prefix_cache: bool = True,
        graph: bool | None = None,
        fuse: bool | None = None,
        compile: bool = False,
        self_check: bool = True,
        layout: str = "plain",
        quantization: str | None = None,
    ):
        if isinstance(model, str | PathLike):
            raise ParameterError(
                f"Engine takes a model that is loaded: Engine.from_pretrained({str(model)!r}) loads one"
            )
        if prefill_chunk is None:
            prefill_chunk = PASS.get(model.get_input_embeddings().weight.device.type, 512)
        whole = {"slots": slots, "block_size": block_size, "prefill_chunk": prefill_chunk}
        whole |= {} if max_blocks is None else {"max_blocks": max_blocks}
        for name, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParameterError(f"{name}={value!r} must be a whole number of at least 1")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                f"{type(model).__name__}: a prompt-learning adapter puts positions of its own before the prompt, which "
                "an engine does not count; adapters of weights (LoRA and the like) work"
            )
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config.get_text_config(decoder=True)
        # A shared prefix was computed in another shape than the prompt alone: equal, but not to the last bit.
        share = prefix_cache and not fixed_slots
        self._pool_options = {"block_size": block_size, "max_blocks": max_blocks, "prefix_cache": share}
        self.prefill_chunk, self._self_check = prefill_chunk, self_check
        self._layout, self._quantization = layout, quantization
        self._asked_slots, self._graph, self._fuse = slots, graph, fuse
        self.fixed_slots, self.compile = fixed_slots, compile
        self._lock, self._running = threading.Lock(), None
        self._adapt()
        self.pipeline = Pipeline.default() if pipeline is None else pipeline
        self.eos_token_ids = limits.eos_token_ids(model, tokenizer, eos_token_ids)
        self.max_length = limits.longest(model, max_length)
        self.pool.owner = repr(self)

    # -- the model and its twin

    def _adapt(self) -> None:
        """Make a twin of the model as it is now, and find out how it runs."""
        self._seen = Fingerprint(self.model)
        self._twin = Twin(self.model)
        lay_out(self._twin.module, self._layout, self._quantization)
        self.runner, self.pool, self.vocab_size = adapt(
            self._twin.module, self._pool_options, self.prefill_chunk, self._self_check, self._fuse
        )
        self.capabilities = self.runner.capabilities()
        self.graphs = self._wants_graphs(self._graph)
        self.slots = self._asked_slots if self.capabilities.ragged else 1
        self.runner.alone, self.runner.hooked = self.fixed_slots, self._seen.hooked
        self._forget_programs()

    def _forget_programs(self) -> None:
        """Drop what was recorded or compiled from the model as it was."""
        self._batches: dict[tuple[int, int], GraphBatch] = {}
        self._head: Head | None = None
        if self.graphs:
            record_passes(self.runner, self.slots, self.vocab_size)
        if self.compile:
            compile_step(self.runner, {self.bucket(rows) for rows in range(1, self.slots + 1)})

    def _look(self) -> None:
        """See before a run or a State begins whether the model has changed, and follow it."""
        other = self._seen.model is not self.model
        changes = Changes(modules=True) if other else self._seen.changes()
        if changes:
            log.info("the model has changed (%s): what was kept of it is dropped", changes)
            self._follow(changes)
        elif self._seen.hooked:
            self.pool.forget_prefixes()  # what a hook does may differ from one run to the next

    def _follow(self, changes: Changes) -> None:
        if changes.modules:
            self.pool.owner += ", before the modules of its model changed"
            self._adapt()
            self.pool.owner = repr(self)
            return
        for module, names in changes.attributes:
            if self.capabilities.path != "solo":  # there a module's attributes may be the state of a sequence
                self._twin.follow(module, names)
        if changes.attributes and self.capabilities.path == "attention" and self.runner.fused:
            self.runner.fused = fuse(self.runner)
        self.pool.forget_prefixes()
        if changes.values:
            renew(self._twin.module)
        if changes.hooks or changes.moved or changes.attributes:
            self.runner.hooked = self._seen.hooked
            self._forget_programs()

    def model_changed(self) -> None:
        """Say that the model is not what it was, where the engine cannot see it.

        Before a run or a State begins the engine itself looks for replaced modules and adapters, assigned or edited
        parameters and buffers, hooks that came or went, and attributes of modules. It does not see an edit through
        `.data` that leaves 64 evenly spread elements of a tensor alone, or what a processor's own model does. While
        hooks are registered, nothing computed outlives its run. States made before go on from what they hold.
        """
        with self._turn("model_changed"):
            changes = self._seen.changes()
            changes.values = changes.moved = True
            self._follow(changes)

    @contextmanager
    def _turn(self, what: str):
        """One thing at a time: another thread waits until it is through."""
        me = threading.get_ident()
        if self._running == me:
            raise HandloomError(
                f"{what} was called from inside a run of the same {self!r}, by a processor, a criterion or a hook, and "
                "would wait for itself; give it an engine of its own: Engine(engine.model, engine.tokenizer)"
            )
        with self._lock:
            self._running = me
            try:
                yield
            finally:
                self._running = None

    def _in_turns(self, requests: list[Request] | Arrivals) -> Iterator[Event]:
        """The events of a run that others may go between."""
        events = None
        try:
            while True:
                with self._turn("stream"):
                    if events is None:
                        self._look()
                        events = run(self, requests)
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            if events is not None:
                inside = self._running == threading.get_ident()  # collected in the middle of another call
                with nullcontext() if inside else self._turn("stream"):
                    events.close()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        *,
        dtype="auto",
        device=None,
        device_map=None,
        tp_plan=None,
        quantization: str | None = None,
        layout: str = "auto",
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict | None = None,
        **engine_kwargs,
    ) -> Engine:
        """An Engine for a hub id or a local folder.

        Args:
            name_or_path, dtype, device, device_map, tp_plan, quantization, gguf_file, revision,
                trust_remote_code: see `handloom.loading.load`.
            layout: see `Engine`; `auto` leaves a quantised or split model as it is.
            model_kwargs: further arguments for transformers' `from_pretrained`.
            engine_kwargs: arguments of `Engine`.

        Raises:
            ModelError: no usable model is found there.
        """
        from .loading.loading import OWN, load

        check_layout(layout)
        model, tokenizer = load(
            name_or_path,
            dtype=dtype,
            device=device,
            device_map=device_map,
            tp_plan=tp_plan,
            quantization=quantization,
            layout=layout,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **(model_kwargs or {}),
        )
        if quantization in OWN:
            layout = "triton"
        elif layout == "auto" and (quantization is not None or tp_plan is not None):
            layout = "plain"
        return cls(model, tokenizer, layout=layout, **engine_kwargs)

    def __repr__(self) -> str:
        return (
            f"Engine({type(self.model).__name__}, vocab={self.vocab_size}, slots={self.slots}, "
            f"max_length={self.max_length}, {self.dtype}, {self.device}, path={self.capabilities.path})"
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    # -- generating

    # For type checkers: one prompt gives one Generation, unless several samples are asked for.
    @overload
    def generate(
        self,
        prompts: One,
        params=None,
        *,
        n: Literal[1] = 1,
        defaults=...,
        progress=...,
        **overrides: Unpack[OneCall],
    ) -> Generation: ...

    @overload
    def generate(
        self, prompts: One, params=None, *, n: int, defaults=..., progress=..., **overrides: Unpack[OneCall]
    ) -> Results: ...

    @overload
    def generate(
        self, prompts: Many, params=None, *, defaults=..., progress=..., **overrides: Unpack[Call]
    ) -> Results: ...

    def generate(
        self,
        prompts,
        params=None,
        *,
        defaults: str = "none",
        progress: bool | None = None,
        **overrides: Any,
    ) -> Generation | Results:
        """Decode prompts to their end.

        Args:
            prompts: a string, a list of ids, a list of messages, a tokenizer's output, an `[T, D]` embedding
                tensor, or a list of any of these; arrays, columns of `datasets`, maps and generators are lists.
            params: SamplingParams, a Hugging Face GenerationConfig or a dict for all prompts, or a list of one
                per prompt; None is greedy, 256 new tokens. Fields such as num_beams lead to `strategies.generate`.
            defaults: `none`, or `model` to start from the model's `generation_config.json`.
            progress: show a progress bar; None shows it for several prompts in a terminal.
            overrides: single parameters, under any of their known names.

        Returns:
            One Generation for one prompt with `n=1`; else a list in the order of the prompts, samples of one
            prompt together. After Ctrl-C what is unfinished has `finish_reason="cancelled"`.

        Raises:
            PromptError, ParameterError: before anything is decoded.
        """
        if other := another_strategy(self, params, defaults, overrides):
            return other.results(prompts)
        requests, single = requests_of(self, prompts, params, defaults, overrides)
        results: dict[tuple[int, int], Generation] = {}
        with (
            _bar(len(requests), progress) as bar,
            self._turn("generate"),
            closing(run(self, requests)) as events,
        ):
            try:
                self._look()
                for event in events:
                    if event.generation is not None:
                        results[event.request, event.sample] = event.generation
                        bar.update()
            except KeyboardInterrupt:
                log.warning("interrupted: %d of %d results are complete", len(results), len(requests))
        for request in requests:
            if (request.index, request.sample) not in results:
                results[request.index, request.sample] = request.cancelled(self)
        ordered = Results(results[r.index, r.sample] for r in requests)
        return ordered[0] if single and len(ordered) == 1 else ordered

    def stream(
        self, prompts, params=None, *, defaults: str = "none", **overrides: Unpack[Call]
    ) -> Iterator[Event]:
        """Decode prompts and yield an Event for every token of every row, as it comes.

        The last Event of a row carries its Generation. Close the generator to stop early. Arguments and errors as
        for `generate`, raised before the first Event; or Arrivals alone, whose requests come while this runs.
        """
        if isinstance(prompts, Arrivals):
            return self._in_turns(prompts)
        if other := another_strategy(self, params, defaults, overrides):
            return other.events(prompts)
        return self._in_turns(self.requests(prompts, params, defaults=defaults, **overrides))

    @overload
    def chat(
        self, messages, params=None, *, tools=None, n: Literal[1] = 1, **overrides: Unpack[Single]
    ) -> Generation: ...

    @overload
    def chat(self, messages, params=None, *, tools=None, n: int, **overrides: Unpack[Single]) -> Results: ...

    def chat(self, messages, params=None, *, tools=None, **overrides: Any) -> Generation | Results:
        """Answer a conversation in the tokenizer's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` mappings, or a string that becomes one user message.
            params, overrides: as for `generate`.
            tools: functions or JSON schemas for the template.

        Raises:
            PromptError: the tokenizer has no chat template, or refuses the messages.
        """
        return self.generate(self.chat_prompt(messages, tools=tools), params, **overrides)

    def chat_prompt(self, messages, *, tools=None, **template) -> list[int]:
        """The token ids of a conversation, ready for `generate`, `stream` or `prefill`."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return chat_ids(self.tokenizer, messages, tools, **template)

    def warm_up(self, params=None, *, rows=None, tokens: Sequence[int] = (16, 128, 512)) -> float:
        """Do ahead what first requests wait for: kernels are compiled, steps and passes compiled and recorded.

        Args:
            params: what will be asked for, as for `generate`; a list for several kinds of requests.
            rows: how many requests at once, a number or several; None: one, and as many as there are slots.
            tokens: lengths of their prompts.

        Returns: the seconds it took, which stderr tells, too.
        """
        start = time.perf_counter()
        for requests in rehearsals(self, params, rows, tokens):
            with closing(self._in_turns(requests)) as events:
                list(islice(events, 4 * len(requests)))
        self.pool.forget_prefixes()
        say(f"warmed up in {(took := time.perf_counter() - start):.1f} s")
        return took

    def bucket(self, rows: int) -> int:
        """Slots to decode `rows` running requests with."""
        if self.fixed_slots or rows >= self.slots:
            return self.slots
        if self.device.type == "cpu" and not self.compile:
            return max(1, rows)  # nothing is captured or compiled, so any shape will do
        return min(self.slots, 1 << max(0, rows - 1).bit_length())

    def batch(self, requests: int, width: int) -> Batch:
        """Slots for a run of `requests` requests of at most `width` tokens each."""
        size = self.bucket(requests)
        if not self.graphs or self._seen.hooked:
            return Batch(self, size, width)
        self.pool.reserve(size * -(-width // self.pool.block_size))  # a pool that moves is recorded anew
        width = min(max(2048, 1 << (width - 1).bit_length()), self.max_length)
        kept = self._batches.pop((size, width), None)
        return GraphBatch(self, size, width) if kept is None else kept

    def give_back(self, batch: Batch) -> None:
        """Keep an empty batch with what it has captured for the next run."""
        if isinstance(batch, GraphBatch):
            self._batches[batch.size, batch.history.shape[1] - 1] = batch

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by default."""
        return encoded(self, text)[0][0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        if self.tokenizer is None:
            raise PromptError("this engine has no tokenizer to decode with")
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    # -- States

    @torch.no_grad()
    def prefill(self, prompts=None, *, embeddings=None, hidden: bool = False) -> State:
        """A State that holds prompts, computed unpadded, several in a pass where the model packs.

        Args:
            prompts: as for `generate`.
            embeddings: `[T, D]` or a list of them, instead of prompts.
            hidden: keep the hidden states of every prompt token (see `State.hidden`).

        Raises:
            PromptError: a prompt is not usable; PoolExhausted: it does not fit.
        """
        if (prompts is None) == (embeddings is None):
            raise PromptError("prefill takes prompts or embeddings, one of them")
        given = encoded(self, prompts if embeddings is None else embeddings)[0]
        with self._turn("prefill"):
            self._look()
            return prefilled(self.runner, given, hidden)

    @torch.no_grad()
    def step(self, state: State, tokens, *, embeddings=None, hidden: bool = False) -> State:
        """The State after one more token per row.

        Args:
            state: where to continue; it stays valid.
            tokens: `[B]` token ids.
            embeddings: `[B, D]` fed in place of the tokens' own; the rows' history still names the tokens.
            hidden: keep hidden states.
        """
        with self._turn("step"):
            if embeddings is None and unread(tokens, self.runner):
                return stepped(self, state, tokens, hidden)
            ids = whole_numbers(tokens, "tokens")
            if embeddings is not None and embeddings.shape[:1] != (len(ids),):
                raise HandloomError(f"embeddings {[*embeddings.shape]} for {len(ids)} tokens; give [B, D]")
            longer = self._extended(state, [[t] for t in ids], None, hidden, embeddings)
        return replace(longer, all_logits=None, steps=(), before=None)

    @torch.no_grad()
    def extend(self, state: State, tokens, counts=None, *, hidden: bool = False) -> State:
        """The State after several more tokens per row, with the logits behind each of them.

        Args:
            state: where to continue; it stays valid.
            tokens: `[B, n]` token ids, or one list of ids per row.
            counts: `[B]` how many of a row's `n` tokens are real, 1 to n; None for all.
            hidden: keep hidden states.

        Returns:
            A State with `all_logits [B, n, V]`; `state.keep(counts)` goes back to a part of the extension.
        """
        with self._turn("extend"):
            return self._extended(state, tokens, counts, hidden)

    def _extended(self, state: State, tokens, counts, hidden: bool, embeddings=None) -> State:
        given = self._continuations(state, tokens, counts)
        return extended(self.runner, state, given, hidden, embeddings)

    @torch.no_grad()
    def tree_step(self, state: State, tokens, parents, *, hidden: bool = False) -> State:
        """Score a tree of drafts behind each row in one pass; `state.keep_path` of the result commits one path of it.

        Each draft sees its row, its ancestors and itself (SpecInfer, arXiv 2305.09781).

        Args:
            state: where the trees hang; it stays valid.
            tokens: `[B, n]` token ids, or one list of ids per row.
            parents: for each row the place of every draft's parent, which comes before it, or -1 for a child of the
                row's last token; one list of n for all rows.
            hidden: keep hidden states.

        Returns:
            A State whose rows and `logits` are those of `state`, with `all_logits [B, n, V]` behind each draft.

        Raises:
            CapabilityError: the model takes lines of drafts only (`capabilities.tree`).
        """
        if not self.capabilities.tree:
            raise CapabilityError(f"tree_step: {self.capabilities.tree.reason}; extend takes lines of drafts")
        given = self._continuations(state, tokens, None)
        with self._turn("tree_step"):
            return drafted(self.runner, state, given, parents, hidden)

    def _continuations(self, state: State, tokens, counts) -> list[list[int]]:
        return continuations(state, tokens, counts, self.pool, self.vocab_size, self.max_length)

    @torch.no_grad()
    def score(self, state: State, tokens, counts=None) -> torch.Tensor:
        """Log-probabilities of continuations; nothing is kept.

        Args:
            state: where the continuations begin.
            tokens, counts: as for `extend`.

        Returns:
            `[B, n]` float32, nats; 0 beyond a row's count.
        """
        given = self._continuations(state, tokens, counts)
        if not given:
            return state.logits.new_zeros(0, 0)
        if max(map(len, given)) == 1:
            return scored(given, state.logits[:, None])
        with self._turn("score"):
            longer = self._extended(state, [row[:-1] or row for row in given], None, False)
        return scored(given, torch.cat((state.logits[:, None], longer.all_logits), 1))

    def head(self, hidden: torch.Tensor, *, norm: bool = True) -> torch.Tensor:
        """The logits that hidden states of any layer would give: the model's final norm and output layer.

        Args:
            hidden: `[N, D]`, such as `state.hidden(layer)[:, -1]` of inner layers.
            norm: through the final norm first; False for the last layer's, which `State.hidden` gives normed.

        Returns:
            `[N, V]` float32, scaled and capped as the model does.

        Raises:
            CapabilityError: the model's logits are not a function of its last hidden state.
        """
        with self._turn("head"):
            if self._head is None:
                self._head = Head(self.model)
            return self._head(hidden.to(self.dtype), norm)

    # -- inputs

    def requests(self, prompts, params=None, *, defaults: str = "none", **overrides) -> list[Request]:
        """What `generate` would run, validated and nothing computed: for a loop or a strategy of one's own.

        Args:
            prompts, params, defaults, overrides: as in `generate`.

        Returns:
            One Request a sample, in request order; a row draws with its `seed` and, as the stream, its `sample`.

        Raises:
            PromptError, ParameterError: a prompt or a parameter is not usable.
        """
        return requests_of(self, prompts, params, defaults, overrides)[0]

    def _wants_graphs(self, graph: bool | None) -> bool:
        able = self.capabilities.graph
        if graph and not able:
            raise CapabilityError(f"graph=True: {able.reason}")
        return bool(able) and self.device.type == "cuda" if graph is None else graph


def _bar(total: int, progress: bool | None):
    from tqdm.auto import tqdm

    shown = total > 1 and sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, disable=not shown, unit="request", dynamic_ncols=True)
