"""Engine: a loaded model with its tokenizer and block pool; the object that most users touch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike

import torch

from .errors import CapabilityError, ParameterError, PromptError
from .forward.compiling import compile_step
from .forward.probe import adapt
from .loading import limits
from .loop.batch import Batch
from .loop.generation import Event, Generation
from .loop.graph import GraphBatch
from .loop.intake import encoded, requests_of
from .loop.loop import run
from .loop.request import Request
from .pipeline.pipeline import Pipeline
from .state import State, continuations, stacked, whole_numbers
from .text.prompts import chat_ids

log = logging.getLogger("handloom")


class Engine:
    """A causal LM ready to decode.

    Args:
        model: a transformers causal LM; it is used as it is and stays usable.
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
        prefill_chunk: most prompt tokens in one forward pass, >= 1.
        pipeline: the processors every request goes through; None is `Pipeline.default()`, which does nothing
            that a request does not ask for.
        prefix_cache: keep prompts' blocks for prompts that begin alike.
        graph: run the decode step as one device program, captured as a CUDA graph; None does so on CUDA where the
            model allows it. On a CPU True runs the same program uncaptured.
        compile: compile the model's decode step with torch.compile, once for each number of rows. It takes from
            half a minute to minutes, which stderr tells; what cannot be compiled runs as it is, and says why.
        self_check: compare a few logits with transformers' own cache when loading, and fall back if they differ.

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
        prefill_chunk: int = 512,
        pipeline: Pipeline | None = None,
        prefix_cache: bool = True,
        graph: bool | None = None,
        compile: bool = False,
        self_check: bool = True,
    ):
        if isinstance(model, str | PathLike):
            raise ParameterError(
                f"Engine takes a model that is loaded: Engine.from_pretrained({str(model)!r}) loads one"
            )
        whole = {"slots": slots, "block_size": block_size, "prefill_chunk": prefill_chunk}
        whole |= {} if max_blocks is None else {"max_blocks": max_blocks}
        for name, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParameterError(f"{name}={value!r} must be a whole number of at least 1")
        if model.training:
            log.info("the model was in training mode; it is switched to evaluation mode")
            model.eval()
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config.get_text_config(decoder=True)
        # A shared prefix was computed in another shape than the prompt alone: equal, but not to the last bit.
        share = prefix_cache and not fixed_slots
        options = {"block_size": block_size, "max_blocks": max_blocks, "prefix_cache": share}
        self.runner, self.pool, self.vocab_size = adapt(model, options, prefill_chunk, self_check)
        self.capabilities = self.runner.capabilities()
        self.graphs = self._wants_graphs(graph)
        self._batches: dict[tuple[int, int], Batch] = {}
        self._head: tuple | None = None
        self.slots = slots if self.capabilities.ragged else 1
        self.fixed_slots, self.compile = fixed_slots, compile
        self.runner.alone = fixed_slots
        if compile:
            compile_step(self.runner, {self.bucket(rows) for rows in range(1, self.slots + 1)})
        self.pipeline = Pipeline.default() if pipeline is None else pipeline
        self.eos_token_ids = limits.eos_token_ids(model, tokenizer, eos_token_ids)
        self.max_length = limits.longest(model, max_length)

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
            name_or_path, dtype, device, device_map, tp_plan, quantization, layout, gguf_file, revision,
                trust_remote_code: see `handloom.loading.load`.
            model_kwargs: further arguments for transformers' `from_pretrained`.
            engine_kwargs: arguments of `Engine`.

        Raises:
            ModelError: no usable model is found there.
        """
        from .loading.loading import load

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
        return cls(model, tokenizer, **engine_kwargs)

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

    def generate(
        self,
        prompts,
        params=None,
        *,
        defaults: str = "none",
        progress: bool | None = None,
        **overrides,
    ) -> Generation | list[Generation]:
        """Decode prompts to their end.

        Args:
            prompts: a string, a list of ids, a list of messages, a tokenizer's output, an `[T, D]` embedding
                tensor, or a list of any of these.
            params: SamplingParams, a Hugging Face GenerationConfig or a dict for all prompts, or a list of one
                per prompt; None is greedy, 256 new tokens.
            defaults: `none`, or `model` to start from the model's `generation_config.json`.
            progress: show a progress bar; None shows it for several prompts in a terminal.
            overrides: single parameters, under any of their known names.

        Returns:
            One Generation for one prompt with `n=1`; else a list in the order of the prompts, samples of one
            prompt together. After Ctrl-C what is unfinished has `finish_reason="cancelled"`.

        Raises:
            PromptError, ParameterError: before anything is decoded.
        """
        requests, single = requests_of(self, prompts, params, defaults, overrides)
        results: dict[tuple[int, int], Generation] = {}
        with _bar(len(requests), progress) as bar, closing(run(self, requests)) as events:
            try:
                for event in events:
                    if event.generation is not None:
                        results[event.request, event.sample] = event.generation
                        bar.update()
            except KeyboardInterrupt:
                log.warning("interrupted: %d of %d results are complete", len(results), len(requests))
        for request in requests:
            if (request.index, request.sample) not in results:
                if request.stopper is None:
                    request.start(self)
                results[request.index, request.sample] = request.end("cancelled").generation
        ordered = [results[r.index, r.sample] for r in requests]
        return ordered[0] if single and len(ordered) == 1 else ordered

    def stream(self, prompts, params=None, *, defaults: str = "none", **overrides) -> Iterator[Event]:
        """Decode prompts and yield an Event for every token of every row, as it comes.

        The last Event of a row carries its Generation. Close the generator to stop early. Arguments and errors as
        for `generate`, raised before the first Event.
        """
        requests = self.requests(prompts, params, defaults=defaults, **overrides)
        return run(self, requests)

    def chat(self, messages, params=None, *, tools=None, **overrides) -> Generation | list[Generation]:
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
        if not self.graphs:
            return Batch(self, size, width)
        self.pool.reserve(size * -(-width // self.pool.block_size))  # a pool that moves is recorded anew
        width = min(max(2048, 1 << (width - 1).bit_length()), self.max_length)
        kept = self._batches.pop((size, width), None)
        return GraphBatch(self, size, width) if kept is None else kept

    def give_back(self, batch: Batch) -> None:
        """Keep an empty batch with what it has captured for the next run."""
        if self.graphs:
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
        """A State that holds prompts, each computed alone and unpadded.

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
        filled = [self.runner.prefill(p.ids, p.embeddings, hidden=hidden) for p in given]
        rows, outs = zip(*filled, strict=True)
        return State(
            rows=tuple(rows),
            logits=torch.cat([out.logits[:, -1] for out in outs]),
            counts=tuple(row.length for row in rows),
            hidden_states=tuple(map(stacked, zip(*(out.hidden for out in outs), strict=True)))
            if hidden
            else None,
            states=tuple(torch.cat(parts) for parts in zip(*(out.states for out in outs), strict=True)),
        )

    @torch.no_grad()
    def step(self, state: State, tokens, *, hidden: bool = False) -> State:
        """The State after one more token per row.

        Args:
            state: where to continue; it stays valid.
            tokens: `[B]` token ids.
            hidden: keep hidden states.
        """
        ids = whole_numbers(tokens, "tokens")
        longer = self.extend(state, [[t] for t in ids], hidden=hidden)
        return State(
            rows=longer.rows,
            logits=longer.logits,
            counts=longer.counts,
            hidden_states=longer.hidden_states,
            states=longer.states,
        )

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
        given = continuations(state, tokens, counts, self.vocab_size, self.max_length)
        if not given:
            return replace(state, all_logits=state.logits[:, None], before=state.logits)
        rows, out = self.runner.extend(state.rows, given, state.states, hidden=hidden)
        fed = tuple(len(row) for row in given)
        last = torch.tensor(fed, device=out.logits.device) - 1
        return State(
            rows=rows,
            logits=out.logits[torch.arange(len(rows), device=last.device), last],
            all_logits=out.logits,
            counts=fed,
            hidden_states=out.hidden,
            states=out.states,
            steps=(state.states, *out.steps) if out.steps else (),
            before=state.logits,
        )

    def score(self, state: State, tokens, counts=None) -> torch.Tensor:
        """Log-probabilities of continuations; nothing is kept.

        Args:
            state: where the continuations begin.
            tokens, counts: as for `extend`.

        Returns:
            `[B, n]` float32, nats; 0 beyond a row's count.
        """
        given = continuations(state, tokens, counts, self.vocab_size, self.max_length)
        if not given:
            return state.logits.new_zeros(0, 0)
        width = max(len(row) for row in given)
        logits = [state.logits[:, None]]
        if width > 1:
            logits.append(self.extend(state, [row[:-1] or row for row in given]).all_logits[:, : width - 1])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in given], device=self.device)
        logp = torch.cat(logits, 1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        real = torch.arange(width) < torch.tensor([len(row) for row in given])[:, None]
        return logp.masked_fill(~real.to(logp.device), 0.0)

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
        if self._head is None or self._head[0] is not self.model:
            from .forward.head import Head

            self._head = self.model, Head(self.runner.module)
        return self._head[1](hidden.to(self.dtype), norm)

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
