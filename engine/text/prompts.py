"""Prompts of every accepted format to token ids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jinja2
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import PromptError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt.

    Args:
        ids: token ids; -1 at every position of a prompt given as embeddings.
        embeddings: float tensor [T, D], or None.
        text: the text it was encoded from, or None where ids, messages or embeddings were given.
    """

    ids: list[int]
    embeddings: torch.Tensor | None = None  # [T, D]
    text: str | None = None

    def __len__(self) -> int:
        return len(self.ids)


# What one prompt can be, and several; a tokenizer's output is taken for several rows. For type checkers alone.
One = str | Prompt | Sequence[int] | Sequence[Mapping[str, Any]] | torch.Tensor
Many = (
    list[str]
    | tuple[str, ...]
    | Sequence[Prompt]
    | Sequence[Sequence[int]]
    | Sequence[Sequence[Mapping[str, Any]]]
    | Sequence[torch.Tensor]
    | Mapping[str, Any]
    | Iterable[Any]
)


def encode_prompts(
    tokenizer: Any,
    prompts: Any,
    *,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    max_length: int | None = None,
    room: int = 1,
    tools: list | None = None,
) -> tuple[list[Prompt], bool]:
    """Encode prompts of every accepted format; return them and whether a single prompt was given.

    Args:
        tokenizer: a Hugging Face tokenizer, or None where all prompts are ids or embeddings.
        prompts: one prompt (str; list, array, generator or 1-D integer tensor of ids; list of chat messages; float
            tensor [T, D] of embeddings; Prompt), a list or generator of these, or a tokenizer's output
            (`input_ids` of one or more rows and, where they are padded on either side, `attention_mask`).
        vocab_size: ids must be below it.
        hidden_size: embeddings must have this size D.
        max_length: tokens that prompt and output may have together.
        room: tokens of `max_length` that must be left for the output.
        tools: passed to the chat template.

    Raises:
        PromptError: names the index of the offending prompt, its value and what would be valid.
    """
    items, single = _split(prompts, getattr(tokenizer, "pad_token_id", None))
    encoded = []
    for index, item in enumerate(items):
        prompt = _encode(tokenizer, item, index, tools)
        _check(prompt, index, vocab_size, hidden_size)
        if max_length is not None and len(prompt) + room > max_length:
            raise PromptError(
                f"prompt {index} has {len(prompt)} tokens, too many for max_length={max_length} (prompt and "
                f"output together); at most {max_length - room} leave room for {room} output token(s)"
            )
        encoded.append(prompt)
    return encoded, single


def chat_ids(
    tokenizer: Any,
    messages: Sequence[Mapping],
    tools: list | None = None,
    *,
    index: int = 0,
    add_generation_prompt: bool | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Return the token ids of a conversation in the tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: `{"role": ..., "content": ...}` mappings, in order.
        tools: functions or JSON schemas, passed to the template.
        index: the prompt's number in error messages.
        add_generation_prompt: open the assistant's turn; None does so unless `continue_final_message` is set.
        template_kwargs: passed to `apply_chat_template`, for example `continue_final_message=True`.

    Raises:
        PromptError: no tokenizer, no template, a malformed message, or messages that the template refuses.
    """
    _check_messages(messages, index)
    if tokenizer is None:
        raise PromptError(f"prompt {index} is a conversation, but there is no tokenizer; pass token ids")
    if "chat_template" not in template_kwargs and not _has_template(tokenizer):
        raise PromptError(
            f"prompt {index} is a conversation, but {type(tokenizer).__name__} has no chat template (is the "
            "model instruction-tuned?); set `tokenizer.chat_template` to a Jinja template, or pass plain text"
        )
    if add_generation_prompt is None:
        add_generation_prompt = not template_kwargs.get("continue_final_message", False)
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            **template_kwargs,
        )
    except jinja2.TemplateError as error:
        raise PromptError(f"prompt {index}: the chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])


def _has_template(tokenizer: Any) -> bool:
    method = getattr(type(tokenizer), "apply_chat_template", None)
    if method is None:
        return False
    # Tokenizers with a method of their own carry their template in code.
    return method is not PreTrainedTokenizerBase.apply_chat_template or tokenizer.chat_template is not None


def _check_messages(messages: Any, index: int) -> None:
    """Raise PromptError unless `messages` is a non-empty list of well-formed chat messages."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"prompt {index}: messages must be a non-empty list of {{'role': ..., 'content': ...}}, "
            f"got {_brief(messages)}"
        )
    for at, message in enumerate(messages):
        where = f"prompt {index}, message {at}"
        if not isinstance(message, Mapping):
            raise PromptError(f"{where}: must be {{'role': ..., 'content': ...}}, got {_brief(message)}")
        if not isinstance(message.get("role"), str):
            raise PromptError(
                f"{where}: 'role' must be a string such as 'user', got {_brief(message.get('role'))}"
            )
        content = message.get("content")
        if content is None and "tool_calls" in message:
            continue
        if not isinstance(content, str | list | tuple):
            raise PromptError(f"{where}: 'content' must be a string or list of parts, got {_brief(content)}")


def _split(prompts: Any, pad_id: int | None) -> tuple[list, bool]:
    """Return the list of prompts and whether it was one prompt rather than a list of them."""
    if isinstance(prompts, str | Prompt):
        return [prompts], True
    if isinstance(prompts, Mapping):
        return _rows(prompts, pad_id, 0)
    prompts = _plain(prompts, 0)
    if isinstance(prompts, torch.Tensor):
        if _is_ids(prompts) and prompts.ndim == 2:
            raise PromptError(_padding_message(prompts, pad_id))
        return [prompts], True
    if not isinstance(prompts, list | tuple):
        return [prompts], True
    if not prompts:
        raise PromptError("prompts is an empty list; pass at least one prompt, which has at least one token")
    ids = [_is_id(p) for p in prompts]
    messages = [isinstance(p, Mapping) and "role" in p for p in prompts]
    if all(ids) or all(messages):
        return [prompts], True
    for kind, name in ((ids, "a token id"), (messages, "a chat message")):
        if any(kind):
            yes, no = kind.index(True), kind.index(False)
            raise PromptError(
                f"prompts mixes the elements of one prompt with whole prompts: element {yes} is {name}, "
                f"element {no} is {_brief(prompts[no])}; pass one prompt, or a list of whole prompts"
            )
    return [_one_row(p, pad_id, i) if isinstance(p, Mapping) else p for i, p in enumerate(prompts)], False


def _rows(batch: Mapping, pad_id: int | None, index: int) -> tuple[list[list[int]], bool]:
    """Return the unpadded rows of a tokenizer's output, and whether it held one flat row."""
    if "input_ids" not in batch:
        hint = "; put a single chat message into a list" if "role" in batch else ""
        raise PromptError(
            f"prompt {index}: a mapping must have 'input_ids' (and 'attention_mask' where padded), "
            f"got keys {sorted(map(str, batch))}{hint}"
        )
    ids = _as_tensor(batch["input_ids"], index)
    mask = batch.get("attention_mask")
    if mask is None and isinstance(ids, torch.Tensor) and ids.ndim == 2:
        raise PromptError(_padding_message(ids, pad_id))
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    mask = mask.tolist() if isinstance(mask, torch.Tensor | np.ndarray) else mask
    if not isinstance(ids, list | tuple) or not ids:
        raise PromptError(f"prompt {index}: input_ids must be a non-empty list or tensor, got {_brief(ids)}")
    single = not isinstance(ids[0], list | tuple | torch.Tensor | np.ndarray)
    rows: list[Any] = (
        [ids] if single else [r.tolist() if isinstance(r, torch.Tensor | np.ndarray) else r for r in ids]
    )
    if mask is None:
        return rows, single
    masks = [mask] if single else mask
    if not isinstance(masks, list | tuple) or len(masks) != len(rows):
        raise PromptError(f"attention_mask must have one row for each of the {len(rows)} rows of input_ids")
    return [_unpad(r, m, index + i) for i, (r, m) in enumerate(zip(rows, masks, strict=True))], single


def _one_row(batch: Mapping, pad_id: int | None, index: int) -> list[int]:
    rows, _ = _rows(batch, pad_id, index)
    if len(rows) != 1:
        raise PromptError(f"prompt {index} has {len(rows)} rows of input_ids; inside a list it must have one")
    return rows[0]


def _unpad(ids: Any, mask: Any, index: int) -> list[int]:
    """Return the ids where `mask` is 1; its ones must be one unbroken stretch."""
    mask = mask.tolist() if isinstance(mask, torch.Tensor | np.ndarray) else mask
    if not isinstance(mask, list | tuple) or len(mask) != len(ids):
        got = f"{len(mask)} values" if isinstance(mask, list | tuple) else _brief(mask)
        raise PromptError(f"prompt {index}: attention_mask has {got} for {len(ids)} token ids; pass one each")
    odd = next((m for m in mask if m not in (0, 1)), None)
    if odd is not None:
        raise PromptError(f"prompt {index}: attention_mask holds {odd!r}; valid values are 0 (padding) and 1")
    kept = [at for at, m in enumerate(mask) if m]
    if not kept:
        raise PromptError(f"prompt {index} is all padding: its attention_mask has no 1, so no token is left")
    start, stop = kept[0], kept[-1] + 1
    if len(kept) != stop - start:
        hole = next(at for at in range(start, stop) if not mask[at])
        raise PromptError(
            f"prompt {index}: attention_mask has a hole at position {hole}; zeros are valid only on the left "
            "or right, as padding"
        )
    return list(ids[start:stop])


def _padding_message(ids: torch.Tensor, pad_id: int | None) -> str:
    """Explain why a 2-D tensor of ids without a mask is refused."""
    shape = list(ids.shape)  # [B, T]
    suspects = []
    if pad_id is not None and ids.numel():
        ends = (ids[:, 0] == pad_id) | (ids[:, -1] == pad_id)
        suspects = ends.nonzero().flatten().tolist()
    rows = ", ".join(map(str, suspects[:8])) + (", ..." if len(suspects) > 8 else "")
    looks = f" (rows {rows} start or end with the pad id {pad_id})" if suspects else ""
    return (
        f"prompts is a tensor of shape {shape} without an attention_mask, so padding cannot be told from "
        f"text{looks}; pass the tokenizer's whole output (input_ids and attention_mask), a list of id lists "
        "without padding, or the texts themselves"
    )


def _encode(tokenizer: Any, item: Any, index: int, tools: list | None) -> Prompt:
    """Encode one prompt; its range and length are checked elsewhere."""
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return _encode_text(tokenizer, item, index)
    item = _plain(item, index)
    if isinstance(item, torch.Tensor):
        return _encode_tensor(item, index)
    if isinstance(item, list | tuple):
        if set(map(type, item)) == {int}:  # thousands of them, mostly
            return Prompt(list(item))
        if any(isinstance(p, Mapping) for p in item):
            return Prompt(chat_ids(tokenizer, item, tools, index=index))
        wrong = next((at for at, p in enumerate(item) if not _is_id(p)), None)
        if wrong is not None:
            raise PromptError(
                f"prompt {index}: element {wrong} is {_brief(item[wrong])}; a list prompt must hold integer "
                "token ids only, or chat messages only"
            )
        return Prompt([int(p) for p in item])
    hint = "; decode it to str first" if isinstance(item, bytes | bytearray) else ""
    raise PromptError(
        f"prompt {index} is {_brief(item)}{hint}; valid are text, a list or 1-D tensor of token ids, a list "
        "of chat messages, a tokenizer's output, or a float tensor [T, D] of embeddings"
    )


def _encode_text(tokenizer: Any, text: str, index: int) -> Prompt:
    if tokenizer is None:
        raise PromptError(
            f"prompt {index} is text, but there is no tokenizer; pass a list of token ids, or give the "
            "engine a tokenizer"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt {index} is not valid Unicode: {error}") from error
    return Prompt(list(tokenizer(text, verbose=False)["input_ids"]), text=text)


def _encode_tensor(tensor: torch.Tensor, index: int) -> Prompt:
    if tensor.is_floating_point() and tensor.ndim == 2:
        return Prompt([-1] * tensor.shape[0], embeddings=tensor)
    if _is_ids(tensor) and tensor.ndim == 1:
        return Prompt(tensor.tolist())
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    raise PromptError(
        f"prompt {index} is a {dtype} tensor of shape {shape}; valid are integer ids of shape [T], or float "
        "embeddings of shape [T, D]; pass a batch as a list of these"
    )


def _check(prompt: Prompt, index: int, vocab_size: int | None, hidden_size: int | None) -> None:
    """Raise PromptError for an empty prompt, ids out of range and embeddings of a wrong size."""
    if not len(prompt):
        what = f"{prompt.text!r} encodes to no token" if prompt.text is not None else "it has no token"
        raise PromptError(
            f"prompt {index} is empty: {what}; a prompt needs at least one, for example the tokenizer's "
            "bos_token_id"
        )
    if prompt.embeddings is not None:
        size = prompt.embeddings.shape[1]
        if hidden_size is not None and size != hidden_size:
            raise PromptError(f"prompt {index} has embeddings of size {size}; valid is {hidden_size}")
        return
    low, high = min(prompt.ids), max(prompt.ids)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bad = low if low < 0 else high
        valid = (
            f"0 to {vocab_size - 1} (vocab size {vocab_size})" if vocab_size is not None else "0 and above"
        )
        at = prompt.ids.index(bad)
        raise PromptError(
            f"prompt {index}: token id {bad} at position {at} is out of range; valid ids are {valid}"
        )


def _plain(value: Any, index: int) -> Any:
    """Return arrays of numbers as tensors, columns, maps and generators as lists, everything else as it is."""
    if not isinstance(value, np.ndarray):
        known = str | bytes | bytearray | list | tuple | set | frozenset | Mapping | torch.Tensor | Prompt
        return value if isinstance(value, known) or not _in_order(value) else list(value)
    return value.tolist() if value.dtype.kind in "UO" and value.ndim else _as_tensor(value, index)


def _in_order(value: Any) -> bool:
    """Whether a value is a column, a map, a generator or the like."""
    return isinstance(value, Iterable) and not isinstance(value, type)


def _as_tensor(value: Any, index: int) -> Any:
    """Return NumPy arrays of numbers as tensors, everything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "iuf":
        raise PromptError(
            f"prompt {index} is a NumPy array of dtype {value.dtype}; valid are integer ids or float "
            "embeddings; pass texts as a list of str"
        )
    return torch.from_numpy(value.astype(np.int64) if value.dtype.kind in "iu" else value)


def _is_ids(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _is_id(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and _is_ids(value)
    return isinstance(value, Integral) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    """Return a short description of a value for error messages."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
