"""Token ids to text as they come."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"  # what every decoder shows for bytes that are not (yet) a character
# Prompt tokens decoded in front of the output, so that its first word keeps its space. More are taken where
# they begin inside a character, or are all special tokens that are skipped.
CONTEXTS = (6, 7, 8, 9, 16, 32, 64)
WINDOW = 16  # tokens after which the decoded window moves on
PATIENCE = 8  # undecodable tokens in a row after which the settled part of them is shown
LIMIT = 64  # undecodable tokens in a row after which all of them are shown
TAIL = 3  # bytes, hence tokens, that an incomplete UTF-8 character can have at most


class Detokenizer:
    """Turns output token ids into text one token at a time; the pieces join to the tokenizer's own decoding.

    A short window of tokens is decoded at each push and what it adds to the text already shown is returned,
    so a token costs one small decode however long the output is. Characters whose bytes are still incomplete
    are held back. Word starts are relative to the prompt: `decode(prompt + output) == decode(prompt) + text`,
    and `decode(output) == text` without a prompt.

    Two things differ from one `tokenizer.decode` of everything, both because shown text cannot be taken back:
    `clean_up_tokenization_spaces` is off, and where a byte-fallback tokenizer would replace the valid byte
    tokens beside an invalid one too, those already shown stay.
    """

    __slots__ = ("_decode", "_mark", "_parts", "_shown", "_window")

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        """Prepare for the first output token; costs one decode of a few prompt tokens.

        Args:
            tokenizer: a Hugging Face tokenizer, fast or slow.
            prompt_ids: ids in front of the output; only the last few are read, negative ones are ignored.
            skip_special_tokens: leave special tokens out of the text.
        """
        self._decode = _decoder(tokenizer, skip_special_tokens)
        self._window, self._shown = _context(self._decode, prompt_ids)
        self._mark = len(self._window)  # start of the tokens that have not added to the text
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def fork(self) -> "Detokenizer":
        """Return an independent copy; pushing to either does not change the other."""
        twin = object.__new__(type(self))
        twin._decode, twin._shown, twin._mark = self._decode, self._shown, self._mark
        twin._window, twin._parts = list(self._window), list(self._parts)
        return twin

    def push(self, token_id: int) -> str:
        """Append one output token and return the text it completes, "" where it completes none."""
        self._window.append(int(token_id))
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            delta = self._partial(text)
        else:
            delta = self._whole(text)
        if delta:
            self._parts.append(delta)
        return delta

    def finish(self) -> str:
        """Return the text still held back, incomplete characters as U+FFFD; call it once, at the end."""
        delta = self._added(self._window, self._decode(self._window))
        self._window, self._shown, self._mark = [], "", 0
        if delta:
            self._parts.append(delta)
        return delta

    def _whole(self, text: str) -> str:
        """Show all of the window, which ends with a complete character, and move it on when it is long."""
        window = self._window
        delta = self._added(window, text)
        if delta:
            if len(window) > WINDOW:
                self._window = window[self._mark :]
                text = self._decode(self._window)
            self._shown, self._mark = text, len(self._window)
        elif len(window) - self._mark > WINDOW:
            del window[self._mark :]  # a long run of tokens without text, such as skipped special ones
        return delta

    def _partial(self, text: str) -> str:
        """Show what precedes an incomplete character at the end of the window."""
        delta = ""
        if len(self._window) - self._mark >= PATIENCE:
            delta = self._settle(text)
            text = self._decode(self._window)
        settled = text.rstrip(REPLACEMENT)
        if settled.startswith(self._shown):
            delta += settled[len(self._shown) :]
            self._shown = settled
        return delta

    def _settle(self, text: str) -> str:
        """Show what later bytes cannot change of a long undecodable run; at LIMIT tokens, all of it."""
        window = self._window
        for hold in range(TAIL, 0, -1):
            head, tail = self._decode(window[:-hold]), window[-hold:]
            # Equality says that no character spans the border.
            if head + self._decode(tail) == text:
                if self._shown.startswith(head):
                    delta, self._shown = "", self._shown[len(head) :]
                else:
                    delta, self._shown = self._added(window[:-hold], head), ""
                self._window, self._mark = tail, 0
                return delta
        if len(window) - self._mark < LIMIT:
            return ""
        delta = self._added(window, text)
        self._window = window[-TAIL:]
        self._shown, self._mark = self._decode(self._window), TAIL
        return delta

    def _added(self, window: list[int], text: str) -> str:
        """Return what `text`, the decoding of `window`, adds to the text already shown."""
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # An invalid byte turned its whole byte-fallback run, shown characters included, into U+FFFD.
        return self._decode(window[self._mark :])


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """{text: id} of the tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {str(token): number for number, token in added if token.special}


def _decoder(tokenizer: Any, skip_special_tokens: bool):
    """Return a function from a list of ids to text, as direct as the tokenizer allows."""
    kind = type(tokenizer)
    plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )
    if plain:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    size = len(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})

    def decode(ids: list[int]) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's, where slow tokenizers raise.
        known = [i for i in ids if i < size or i in added]
        return tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    return decode


def _context(decode: Any, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """Return the last prompt tokens and their text, such that the text ends with a complete character."""
    tail = list(prompt_ids[-CONTEXTS[-1] :])
    while any(i < 0 for i in tail):  # embeddings have no token
        tail = tail[1:]
    text = ""
    for size in CONTEXTS:
        text = decode(tail[-size:])
        if text and not text.endswith(REPLACEMENT):
            return tail[-size:], text
        if size >= len(tail):
            break
    # The prompt ends inside a character: the output is decoded as if that began anew.
    while text.endswith(REPLACEMENT):
        tail.pop()
        text = decode(tail)
    return tail, text


def token_texts(
    tokenizer: Any, token_ids: Iterable[int], prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> list[str]:
    """Return the text that each token adds; the list joins to the text of all of them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        token_ids: output ids.
        prompt_ids: ids in front of them.
        skip_special_tokens: leave special tokens out of the text.
    """
    detokenizer = Detokenizer(tokenizer, prompt_ids, skip_special_tokens)
    texts = [detokenizer.push(i) for i in token_ids]
    rest = detokenizer.finish()
    if rest:
        texts[-1] += rest
    return texts
