"""The seven processors of NVIDIA's logits-processor-zoo 0.2.1, restated: same names and arguments, any batch.

Where the originals fill all other logits with the smallest one (which leaks when sampling, and gives NaN
where a token is excluded), these exclude them: forcing is exact, before or after other rules. State is kept
per row, so rows may fork, rewind and be replaced; `batch_size` is accepted and ignored. The originals
themselves run unchanged, too: hand them to `SamplingParams(processors=[...])` or a `Pipeline`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ParameterError
from ..forms import NEG_INF, Context, Processor, committed


class PerRow:
    """One immutable state per row, None where a row has none."""

    def __init__(self, states: Sequence[Any]):
        self.states = list(states)

    def select(self, index: Sequence[int]) -> PerRow:
        """The states of chosen rows."""
        return PerRow([self.states[i] for i in index])

    def put(self, row: int, other: PerRow) -> PerRow:
        """These states with one row's replaced."""
        return PerRow([*self.states[:row], other.states[0], *self.states[row + 1 :]])


class RowRule(Processor):
    """Base of rules for one row: `begin(prompt)` gives its state, `step` new logits and state.

    States are immutable values; a step's new state counts once its token is accepted.
    """

    needs_history = True
    speculative_safe = False
    before_temperature = True

    def begin(self, prompt: list[int]) -> Any:
        """State of a row before its first token."""
        return None

    def step(self, state: Any, prompt: list[int], output: list[int], logits: Tensor) -> tuple[Tensor, Any]:
        """New logits [V] and state from a row's ids so far and its logits [V], which may be written to."""
        raise NotImplementedError

    def start(self, context: Context) -> PerRow:
        rows = zip(context.history.tolist(), context.prompt_lengths.tolist(), strict=True)
        return PerRow([self.begin(ids[:length]) for ids, length in rows])

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        result, states = logits.clone(), list(context.memory.states)
        lengths, prompts = context.lengths.tolist(), context.prompt_lengths.tolist()
        for row, on in enumerate(context.values.flags):
            if on:
                ids = context.history[row, : lengths[row]].tolist()
                prompt, output = ids[: prompts[row]], ids[prompts[row] :]
                result[row], states[row] = self.step(states[row], prompt, output, result[row].clone())
        context.note(PerRow(states))
        return result

    def accept(self, memory: PerRow, tokens: Tensor, context: Context) -> PerRow:
        return committed(self, context)


def force(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """`logits` [V] with all other tokens excluded; a single token is forced even where it was."""
    forced = torch.full_like(logits, NEG_INF)
    forced[list(tokens)] = logits[list(tokens)] if len(tokens) > 1 else 0.0
    return forced


def single_token(tokenizer: Any, text: str, last: bool = False) -> int:
    """The id of a text of one token (a BOS or prefix token may precede it), or the last id of any text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    prefixed = getattr(tokenizer, "add_prefix_space", None) is not False
    bos = getattr(tokenizer, "bos_token", None) and getattr(tokenizer, "bos_token_id", None) in ids
    if not ids or (not last and len(ids) > (2 if bos or prefixed else 1)):
        raise ParameterError(f"{text!r} is not one token of this tokenizer: it becomes {ids}")
    return ids[-1]


class EndOfSentence:
    """Whether a row ends with a full stop or a new line, as the tokenizer writes them."""

    def __init__(self, tokenizer: Any):
        ends = ("It is a sentence.", "It is a new line\n")
        self.tokens = {single_token(tokenizer, text, last=True) for text in ends}

    def __call__(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.tokens


class GenLengthLogitsProcessor(RowRule):
    """Boost the end token by boost_factor * n^p / 10^p after n output tokens (negative: longer texts).

    complete_sentences: only after a full stop or a new line. boost_token_str: another token than the end
    token. A row that has that token already is left alone.
    """

    def __init__(self, tokenizer, boost_factor, p=2, complete_sentences=False, boost_token_str=None):
        super().__init__()
        self.boost_factor, self.p = boost_factor, p
        self.ended = EndOfSentence(tokenizer) if complete_sentences else None
        self.token = (
            tokenizer.eos_token_id if boost_token_str is None else single_token(tokenizer, boost_token_str)
        )

    def step(self, state, prompt, output, logits):
        if self.token not in output and (self.ended is None or self.ended(prompt + output)):
            logits[self.token] += self.boost_factor * len(output) ** self.p / 10**self.p
        return logits, state


class CiteFromPromptLogitsProcessor(RowRule):
    """Boost the tokens of the prompt (boost_eos: and the end token), and by conditional_boost_factor those
    that follow the last token somewhere in the prompt. Negative factors do the opposite.
    """

    def __init__(self, tokenizer, boost_factor=1.0, boost_eos=True, conditional_boost_factor=0.0):
        super().__init__()
        self.boost_factor, self.conditional = boost_factor, conditional_boost_factor
        self.extra = {tokenizer.eos_token_id} if boost_eos else set()

    def step(self, state, prompt, output, logits):
        known = [token for token in {*prompt, *self.extra} if 0 <= token < len(logits)]
        logits[known] += self.boost_factor
        if self.conditional and output:
            after = {second for first, second in itertools.pairwise(prompt) if first == output[-1]}
            logits[[token for token in after if 0 <= token < len(logits)]] += self.conditional
        return logits, state


class ForceLastPhraseLogitsProcessor(RowRule):
    """Write a phrase, once, when the row is about to end."""

    def __init__(self, phrase, tokenizer, batch_size=None):
        super().__init__()
        self.end, self.phrase = tokenizer.eos_token_id, tokenizer.encode(phrase, add_special_tokens=False)

    def begin(self, prompt):
        return 0

    def step(self, state, prompt, output, logits):
        if 0 < state < len(self.phrase) or (state == 0 and int(logits.argmax()) == self.end):
            return force(logits, [self.phrase[state]]), state + 1
        return logits, state


class MultipleChoiceLogitsProcessor(RowRule):
    """Answer with one of the choices. boost_first_words: add this times the logit of the first word of each
    choice's text (found in the prompt as new line, choice, delimiter, word) to the choice's logit.
    """

    def __init__(self, tokenizer, choices=None, delimiter=".", boost_first_words=0.0):
        super().__init__()
        choices = ["1", "2", "3", "4"] if choices is None else choices
        self.choices = [single_token(tokenizer, choice) for choice in choices]
        self.delimiter, self.boost = single_token(tokenizer, delimiter), boost_first_words
        ids = tokenizer.get_vocab().values() if boost_first_words else ()
        self.new_lines = {token for token in ids if tokenizer.decode(token).endswith("\n")}

    def begin(self, prompt):
        words: list[int] = []
        for line, choice, mark, word in zip(prompt, prompt[1:], prompt[2:], prompt[3:], strict=False):
            wanted = self.choices[len(words)] if len(words) < len(self.choices) else None
            if line in self.new_lines and choice == wanted and mark == self.delimiter:
                words.append(word)
        return tuple(words)

    def step(self, state, prompt, output, logits):
        if self.boost and state:
            logits[self.choices[: len(state)]] += self.boost * logits[list(state)]
        return force(logits, self.choices), state


class Trigger(NamedTuple):
    """State of a TriggerPhraseLogitsProcessor: next phrase token (-1: waiting), triggers left, clock."""

    place: int
    left: int
    since: float


class TriggerPhraseLogitsProcessor(RowRule):
    """Write a phrase instead of (trigger_after: after) a trigger token, or once trigger_time seconds have
    passed; at most trigger_count times.
    """

    def __init__(
        self,
        tokenizer,
        batch_size=None,
        phrase="",
        trigger_token_phrase=None,
        trigger_time=None,
        trigger_count=1,
        trigger_after=False,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        if trigger_token_phrase is None and trigger_time is None:
            raise ParameterError("give trigger_token_phrase or trigger_time")
        self.phrase = tokenizer.encode(phrase, add_special_tokens=False)
        if not self.phrase:
            raise ParameterError(f"phrase={phrase!r} has no token")
        self.token = None if trigger_token_phrase is None else single_token(tokenizer, trigger_token_phrase)
        self.seconds, self.count = trigger_time or float("inf"), trigger_count
        self.after, self.clock = trigger_after, clock

    def begin(self, prompt):
        return Trigger(-1, self.count, self.clock())

    def step(self, state, prompt, output, logits):
        place, left, since = state
        if left <= 0:
            return logits, state
        if place == -1 and (int(logits.argmax()) == self.token or self.clock() - since > self.seconds):
            place = 0
            if self.after:
                return logits, Trigger(0, left, since)
        if place == -1:
            return logits, state
        logits, place = force(logits, [self.phrase[place]]), place + 1
        if place == len(self.phrase):
            return logits, Trigger(-1, left - 1, self.clock())
        return logits, Trigger(place, left, since)


class PreventHallucinationLogitsProcessor(RowRule):
    """Write a phrase when more than `tolerate` steps (in all, as in the original) had no token of at least
    probability minp; then start counting again.
    """

    def __init__(
        self, tokenizer, batch_size=None, minp=0.4, tolerate=1, phrase="...I don't know actually.\n"
    ):
        super().__init__()
        self.phrase = tokenizer.encode(phrase, add_special_tokens=False)
        self.minp, self.tolerate = minp, tolerate

    def begin(self, prompt):
        return 0, 0

    def step(self, state, prompt, output, logits):
        place, unsure = state
        unsure += bool(logits.softmax(-1).max() < self.minp)
        if 0 < place < len(self.phrase) or (place == 0 and unsure > self.tolerate):
            return force(logits, [self.phrase[place]]), (place + 1, unsure)
        return logits, (0, 0) if place == len(self.phrase) else (place, unsure)


class MaxTimeLogitsProcessor(RowRule):
    """Force the end token after max_time seconds. complete_sentences: only after a full stop or a new line.
    boost_token_str: force another token, once.
    """

    def __init__(
        self,
        tokenizer,
        max_time,
        complete_sentences=False,
        boost_token_str=None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self.max_time, self.clock = max_time, clock
        self.ended = EndOfSentence(tokenizer) if complete_sentences else None
        self.token = (
            tokenizer.eos_token_id if boost_token_str is None else single_token(tokenizer, boost_token_str)
        )

    def begin(self, prompt):
        return self.clock()

    def step(self, state, prompt, output, logits):
        ready = self.token not in output and (self.ended is None or self.ended(prompt + output))
        late = self.clock() - state > self.max_time
        return (force(logits, [self.token]) if ready and late else logits), state
