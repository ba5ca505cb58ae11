"""Engine: a loaded model with its tokenizer and block pool; the object that most users touch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from importlib import import_module
from itertools import islice
from os import PathLike
from typing import Any, Literal, Unpack, overload

from .errors import ParameterError, PromptError
from .forward.programs.compiling import say
from .forward.twin.copies import check_layout
from .loading import limits
from .loop.generation import Event, Generation, Results
from .loop.intake import Arrivals, another_strategy, encoded, rehearsals, requests_of
from .loop.loop import run
from .loop.request import Request
from .params.settings import Call, OneCall, Single
from .pipeline.pipeline import Pipeline
from .stepping import Stepping
from .text.prompts import Many, One, chat_ids

log = logging.getLogger("handloom")


class Engine(Stepping):
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
        max_blocks: most blocks in the pool; None lets it grow. With `graph` it has room from the start for 2,048 tokens
            (or `max_length`) in every slot, where that takes at most half of the device's free memory; a run asks
            ahead for what it may need. Where it grows its cells move, and each pass is recorded again as it is wanted.
        prefill_chunk: most prompt tokens in one forward pass, of one prompt or of several together, >= 1; None is
            4096 on CUDA and 512 elsewhere. Decoding goes on between such passes.
        pipeline: the processors every request goes through; None is `Pipeline.default()`, which does nothing
            that a request does not ask for.
        prefix_cache: keep prompts' blocks for prompts that begin alike.
        graph: run the decode step as one device program, captured as a CUDA graph; None does so on CUDA where the
            model allows it. On a CPU True runs the same program uncaptured.
        fuse: run decoder layers that are recognised as a few launches of our kernels, and their rotary embeddings as
            one, checked against the plain ones when loading; `runner.fused` says of each layer why not. None does so
            on CUDA, True raises where none can be.
        compile: compile the model's decode step with torch.compile, once for each number of rows. It takes from
            half a minute to minutes, which stderr tells; what cannot be compiled runs as it is, and says why.
        self_check: compare a few logits with transformers' own cache when loading, and fall back if they differ.
        layout: of the linear layers' weights. `plain` runs the model's own. On a CPU `blocked` runs copies in oneDNN's
            blocked layout, in the same dtype, whose products are faster and round differently: as much memory again as
            the layers take. `auto` does so where it is at most half of what is free, and leaves a lone row to the
            model's own weights where the processor's kind says that they are faster (float32 with AMX): a rule, so
            that bits do not change between processes. `triton` reads bitsandbytes' 4-bit and 8-bit weights
            where they lie by our own product.
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
        super().__init__(
            model,
            slots=slots,
            fixed_slots=fixed_slots,
            max_length=max_length,
            block_size=block_size,
            max_blocks=max_blocks,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
            graph=graph,
            fuse=fuse,
            compile=compile,
            self_check=self_check,
            layout=layout,
            quantization=quantization,
        )
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config(decoder=True)
        self.pipeline = Pipeline.default() if pipeline is None else pipeline
        self.eos_token_ids = limits.eos_token_ids(model, tokenizer, eos_token_ids)

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

    # -- generating

    # For type checkers: one prompt gives one Generation, unless several samples are asked for; 1 is an int, too.
    @overload
    def generate(  # type: ignore[overload-overlap]
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
                        if bar is not None:
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

    def compare(self, prompts, settings, metrics=("logprob",), **options: Any):
        """Several settings on the same prompts with the same noise: `handloom.compare` with this engine."""
        return import_module(".experiments.analysis.compare", __package__).compare(
            self, prompts, settings, metrics, **options
        )

    def trace(self, prompt, params=None, **options: Any):
        """Every step's distribution at every place of the pipeline: `handloom.trace` with this engine."""
        return import_module(".experiments.analysis.trace", __package__).trace(
            self, prompt, params, **options
        )

    def warm_up(self, params=None, *, rows=None, tokens: Sequence[int] = (16, 128, 512)) -> float:
        """Do ahead what first requests wait for: kernels are compiled, steps and passes compiled and recorded.

        Args:
            params: what will be asked for, as for `generate`; a list for several kinds of requests, alone and beside
                each other. The longest ones tell how large the pool must be, which later would grow, see
                `max_blocks`. Compiled in any case is what is common: temperatures (by the entropy, too), top-k,
                top-p, min-p, penalties, masks, 16 alternatives. Other rules, such as typical, top-H, XTC, eta,
                top-n-sigma or a user's own, need to be named, in a list with those that they will stand beside.
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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by default."""
        return encoded(self, text)[0][0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        if self.tokenizer is None:
            raise PromptError("this engine has no tokenizer to decode with")
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

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


def _bar(total: int, progress: bool | None):
    shown = total > 1 and sys.stderr.isatty() if progress is None else progress
    if not shown:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="request", dynamic_ncols=True)
