"""The model `handloom` of lm-evaluation-harness: shared contexts computed once, every strategy by `--gen_kwargs`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import lm_eval.models  # noqa: F401 - the registry is filled by this import, unless it holds something already
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ... import strategies
from ...engine import Engine
from ...errors import HandloomError, ParameterError
from ...loop.generation import Generation
from ...params.sampling_params import SamplingParams
from ..plan import Setting
from ..samples import load_engine

LOGITS = 1024  # tokens of a pass that keeps all their logits
Tokens = Sequence[int]


@register_model("handloom")
class HandloomLM(TemplateLM):
    """An Engine that lm-evaluation-harness can ask, with the numbers of its `hf` model on the same weights.

    Args:
        pretrained: folder or hub id, `demo` for the default model, or an Engine.
        batch_size: rows that run together: "auto", or a number. The harness's own default, 1, counts as "auto", since
            here no answer depends on it; `slots=1` is one row.
        max_batch_size: most rows, where `batch_size` is "auto".
        device: such as "cuda:0", which the harness names on machines without one, too: those take their CPU.
        max_length: of context and answer together; None is the engine's own limit.
        max_gen_toks: new tokens where a task does not say.
        add_bos_token, prefix_token_id: as for `hf`: whether texts begin with BOS (None: as the tokenizer does), and
            the token before an empty context (None: BOS or EOS).
        think_end_token: only the text behind it is the answer. enable_thinking: given to the chat template.
        strategy: a strategy's name for all generation; `--gen_kwargs` may name another.
        options: arguments of `Engine.from_pretrained` and of `Engine`.

    Raises:
        ParameterError: an option that neither takes.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        enable_thinking: bool | None = None,
        strategy: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None
        wanted = str(batch_size).partition(":")[0]
        rows = max_batch_size if wanted in ("auto", "1") else int(wanted)
        if not isinstance(pretrained, Engine):
            options |= {} if rows is None or "slots" in options else {"slots": int(rows)}
            pretrained = load_engine(pretrained, device=device, **_known(options))
        elif options:
            raise ParameterError(f"{', '.join(options)}: an Engine that is loaded takes no more options")
        self.engine, self.tokenizer = pretrained, pretrained.tokenizer
        if self.tokenizer is None:
            raise ParameterError("lm-evaluation-harness gives texts, and this engine has no tokenizer")
        self.max_length = min(max_length or self.engine.max_length, self.engine.max_length)
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self._prefix, self._think_end, self._strategy = prefix_token_id, think_end_token, strategy
        self._template = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._device = self.engine.device
        self.batch_size = self.engine.slots

    # -- texts and tokens

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        found = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in found if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's cache."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; BOS comes first where the tokenizer says so and the text does not begin with it."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode([self.prefix_token_id])
        ):
            special = False
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt its last message is to be continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        engine = self.engine
        info = {
            "model_num_parameters": engine.model.num_parameters(),
            "model_dtype": str(engine.dtype),
            "engine": repr(engine),
        }
        return info | {"handloom": version("handloom")}

    # -- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one; equal contexts are computed once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (text, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise HandloomError(
                    f"{text!r:.80}: a continuation of {len(continuation)} tokens; expected 1 to {self.max_length}"
                )
            whole = [*context, *continuation][-(self.max_length + 1) :]
            places.setdefault(tuple(whole[: -len(continuation)]), []).append(place)
        found: list[Any] = [None] * len(requests)
        with _bar(len(requests), "loglikelihood", disable_tqdm) as bar:
            for group in _groups(places, self.engine.slots):
                rows = [(c, place) for c, (_, shared) in enumerate(group) for place in shared]
                scores = self._scores(
                    [context for context, _ in group], [(c, requests[place][2]) for c, place in rows]
                )
                for place, score in zip([place for _, place in rows], scores, strict=True):
                    found[place] = score
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], score)
                bar.update(len(rows))
        return found

    @torch.no_grad()
    def _scores(
        self, contexts: Sequence[Tokens], rows: Sequence[tuple[int, Tokens]]
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of continuations, each behind the context whose number it names."""
        state = self.engine.prefill([list(context) for context in contexts])
        owners = torch.tensor([context for context, _ in rows], device=state.logits.device)
        heads = [[continuation[0]] for _, continuation in rows]
        totals = list(_read(state.logits[owners, None], heads))
        longer = [(row, list(tokens)) for row, (_, tokens) in enumerate(rows) if len(tokens) > 1]
        state, done = state.select([rows[row][0] for row, _ in longer]), 0
        while longer:
            width = max(1, LOGITS // len(longer))
            state = self.engine.extend(state, [tokens[done:-1][:width] for _, tokens in longer])
            assert state.all_logits is not None
            targets = [tokens[done + 1 :][:width] for _, tokens in longer]
            for (row, _), (logp, greedy) in zip(longer, _read(state.all_logits, targets), strict=True):
                totals[row] = (totals[row][0] + logp, totals[row][1] and greedy)
            done += width
            left = [i for i, (_, tokens) in enumerate(longer) if len(tokens) > done + 1]
            state, longer = state.select(left), [longer[i] for i in left]
        return totals

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length that share one token."""
        windows = []
        for request in requests:
            cut = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows.append([(None, *utils.make_disjoint_window(window)) for window in cut])
        scores = iter(self._loglikelihood_tokens([w for each in windows for w in each], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the requests' order; repeats of a request are samples of one prompt, which is computed once."""
        groups: dict[str, dict[str, list[int]]] = {}  # by keyword arguments, and by context
        for place, request in enumerate(requests):
            context, kwargs = request.args
            asked = groups.setdefault(json.dumps(kwargs, sort_keys=True, default=str), {})
            asked.setdefault(context, []).append(place)
        answers: list[Any] = [None] * len(requests)
        for contexts in groups.values():
            kwargs = requests[next(iter(contexts.values()))[0]].args[1]
            setting, until = self._asked(kwargs)
            made = iter(self._generated(setting, contexts, disable_tqdm))
            for context, places in contexts.items():
                for place in places:
                    answers[place] = self._answer(next(made), until)
                    self.cache_hook.add_partial("generate_until", (context, kwargs), answers[place])
        return answers

    def _asked(self, kwargs: Mapping[str, Any]) -> tuple[Setting, list[str]]:
        """A task's keyword arguments as a setting of ours, and what ends its answers."""
        values = dict(normalize_gen_kwargs(dict(kwargs), self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences([text for text in values.pop("until") if text], eos=eos)
        values["max_new_tokens"] = values.pop("max_gen_toks")
        if values.pop("do_sample"):
            values.setdefault("temperature", 1.0)
        stops = values.pop("stop", ())
        values["stop"] = until + ([stops] if isinstance(stops, str) else list(stops))
        if isinstance(values.get("seed"), int) and values["seed"] >= 0:
            values["seed"] = f"per-request:{values['seed']}"  # prompts draw with noise of their own
        strategy = values.pop("strategy", self._strategy)
        return Setting("--gen_kwargs", strategy, values), values["stop"]

    def _generated(
        self, setting: Setting, contexts: Mapping[str, list[int]], quiet: bool
    ) -> list[Generation]:
        """One Generation a request: contexts in order, the samples of each together."""
        params = SamplingParams(**setting.params)
        room = self.max_length - params.max_new_tokens
        if room < 1:
            raise ParameterError(
                f"max_gen_toks={params.max_new_tokens} leaves no room for a context in {self.max_length} tokens"
            )
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in contexts]
        counts = [len(places) for places in contexts.values()]
        if setting.strategy is None:
            asked = [params.replace(n=n) for n in counts]
            made = self.engine.generate(prompts, asked, progress=False if quiet else None)
        else:
            strategy = strategies.named(setting.strategy)
            if "num_beams" in inspect.signature(strategy).parameters:
                params = params.replace(stop=())  # beams run to their end, and the answer is cut afterwards
            repeated = [ids for ids, n in zip(prompts, counts, strict=True) for _ in range(n)]
            made = strategy(self.engine, repeated, params, **setting.options)
        failed = next((each.error for each in made if each.finish_reason == "error"), None)
        if failed is not None:
            raise HandloomError(failed)
        return list(made)

    def _answer(self, made: Generation, until: list[str]) -> str:
        text = self.engine.decode(made.token_ids)
        return postprocess_generated_text(text, until, self._think_end)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Options that loading takes, or an error with those that it would take."""
    taken = {
        name
        for function in (Engine.from_pretrained, Engine.__init__)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    wrong = sorted(set(options) - taken)
    if wrong:
        raise ParameterError(f"--model_args {', '.join(wrong)}: expected one of {', '.join(sorted(taken))}")
    return options


def _groups(places: Mapping[tuple[int, ...], list[int]], rows: int) -> Iterator[list]:
    """Contexts with their continuations, so many at once that these are about `rows`; those alike come together."""
    group: list[tuple[tuple[int, ...], list[int]]] = []
    count = 0
    for context in sorted(places):
        if group and count + len(places[context]) > rows:
            yield group
            group, count = [], 0
        group.append((context, places[context]))
        count += len(places[context])
    if group:
        yield group


def _read(logits: torch.Tensor, targets: Sequence[Tokens]) -> Iterable[tuple[float, bool]]:
    """Of logits [R, n, V] and at most n ids a row: the sum of their log-probabilities, and whether all are the best."""
    width = max(map(len, targets))
    logits = logits[:, :width].float()
    ids = torch.tensor([[*row, *[-1] * (width - len(row))] for row in targets], device=logits.device)
    real = ids >= 0
    logp = logits.gather(-1, ids.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)  # [R, n]
    best = (logits.argmax(-1) == ids) | ~real
    return zip(logp.masked_fill(~real, 0).double().sum(-1).tolist(), best.all(-1).tolist(), strict=True)


def _bar(total: int, what: str, quiet: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, disable=quiet or None)
