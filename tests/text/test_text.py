"""Prompts of every format to ids, and ids to text one token at a time."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, FIRST_BYTE, KINDS, byte_fallback, byte_level, metaspace
from transformers import BatchEncoding

from handloom.errors import PromptError
from handloom.text.detokenizer import Detokenizer, token_texts
from handloom.text.prompts import Prompt, chat_ids, encode_prompts

UNICODE = st.text(
    st.one_of(
        st.sampled_from("the STOP. 😀👩‍👧🇫🇷❤️\u200d\ufe0f\n\t é你"),
        st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"),
    ),
    max_size=60,
)


def stream(tokenizer, ids, prompt=(), skip=True) -> str:
    """The joined deltas, which must also be what the detokenizer says of itself."""
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    text = "".join([detokenizer.push(i) for i in ids]) + detokenizer.finish()
    assert detokenizer.text == text
    return text


def ids_of(tokenizer, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def tokens_that_end_inside_a_character(tokenizer) -> list[int]:
    found = [i for i in range(len(tokenizer)) if re.fullmatch("[^\ufffd]+\ufffd", tokenizer.decode([i]))]
    assert found, "the tiny vocabulary has no such token"
    return found


class Meter:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def __len__(self):
        return len(self.tokenizer)

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **kwargs)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "byte_fallback"])
@given(data=st.data())
def test_random_ids_stream_to_what_decode_gives(kind, data):
    """Any ids, invalid UTF-8, special tokens and ids beyond the vocabulary included."""
    tokenizer = KINDS[kind]()
    beyond = 0 if kind.startswith("slow") else 3
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1 + beyond), max_size=80))
    skip = data.draw(st.booleans())
    assert stream(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_long_runs_of_broken_characters_stream_to_what_decode_gives(data):
    """Pieces of characters in any order, alone and behind a letter in one token, far beyond the window."""
    tokenizer = byte_level()
    pieces = [*ids_of(tokenizer, *"ðŁĺĢÿ"), *tokens_that_end_inside_a_character(tokenizer)]
    run = data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=60))
    ids = run * data.draw(st.integers(1, 4))
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


@given(data=st.data())
def test_byte_fallback_streams_to_what_decode_gives(data):
    """Byte tokens spell valid characters or stand alone between words."""
    tokenizer = byte_fallback()
    words = st.integers(260, len(tokenizer) - 1).map(lambda i: [i])
    special = st.sampled_from([[0], [1], [2]])
    character = UNICODE.map(lambda s: [FIRST_BYTE + b for b in s[:3].encode()])
    lone = st.integers(0x80, 0xFF).map(lambda b: [FIRST_BYTE + b])
    pieces = data.draw(st.lists(st.tuples(st.one_of(words, special, character, lone), words), max_size=25))
    ids = [i for pair in pieces for piece in pair for i in piece]
    skip = data.draw(st.booleans())
    assert stream(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "slow_bytes"])
@given(text=UNICODE)
def test_text_survives_the_round_trip(kind, text):
    tokenizer = KINDS[kind]()
    want = text.replace("▁", " ") if kind == "byte_fallback" else text  # sentencepiece's sign for a space
    assert stream(tokenizer, tokenizer(text)["input_ids"]) == want


@pytest.mark.parametrize("kind", list(KINDS))
@given(data=st.data())
def test_text_continues_the_prompt(kind, data):
    """decode(prompt + output) == decode(prompt) + text, wherever whole characters are cut."""
    tokenizer = KINDS[kind]()
    word = st.sampled_from(["the", "a", "STOP", "w3", "cafe", "é", "😀", "\n"])
    ids = tokenizer(" ".join(data.draw(st.lists(word, max_size=12))))["input_ids"]
    cut = data.draw(st.integers(0, len(ids)))
    before, whole = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids[:cut], ids))
    if before.endswith("\ufffd") or (kind == "slow_bytes" and len(before.encode()) < cut):
        return
    assert before + stream(tokenizer, ids[cut:], prompt=ids[:cut]) == whole


def test_the_first_word_keeps_its_space_after_a_prompt():
    for tokenizer in (byte_fallback(), metaspace()):
        the = ids_of(tokenizer, "▁the")
        assert stream(tokenizer, the, prompt=ids_of(tokenizer, "▁", "a")) == " the"
        assert stream(tokenizer, the) == "the"
        # Nothing is shown in front of the output, so there is nothing to be apart from.
        assert stream(tokenizer, the, prompt=[tokenizer.bos_token_id]) == "the"
        # Ten skipped tokens do not hide that text precedes them.
        assert stream(tokenizer, the, prompt=[*ids_of(tokenizer, "a"), *[1] * 10]) == " the"


def test_embedding_positions_in_the_prompt_are_ignored():
    tokenizer = byte_fallback()
    the = ids_of(tokenizer, "▁the")
    assert stream(tokenizer, the, prompt=[-1, -1]) == "the"
    assert stream(tokenizer, the, prompt=[-1, *ids_of(tokenizer, "a")]) == " the"


def test_a_prompt_that_ends_inside_a_character_leaves_the_output_as_decoded_alone():
    tokenizer = byte_level()
    grin = [tokenizer.convert_tokens_to_ids(t) for t in "ðŁĺĢ"]  # the four bytes of U+1F600
    assert stream(tokenizer, grin[2:], prompt=grin[:2]) == "\ufffd\ufffd" == tokenizer.decode(grin[2:])


def test_bytes_of_a_character_are_held_until_it_is_complete():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.push(tokenizer.convert_tokens_to_ids(t)) for t in "aðŁĺĢb"]
    assert deltas == ["a", "", "", "", "😀", "b"]
    assert detokenizer.finish() == ""


def test_text_before_an_incomplete_character_is_shown_at_once():
    """In byte-level vocabularies one token may hold a letter and the first byte of the next character."""
    tokenizer = byte_level()
    for token in tokens_that_end_inside_a_character(tokenizer):
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(token) + "\ufffd" == tokenizer.decode([token])
        assert detokenizer.finish() == "\ufffd"


def test_an_unfinished_character_is_flushed_at_the_end():
    tokenizer = byte_fallback()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(FIRST_BYTE + b) for b in b"\xf0\x9f"] == ["", ""]
    assert detokenizer.finish() == "\ufffd\ufffd" == detokenizer.text


def test_a_shown_character_stays_when_an_invalid_byte_follows_it():
    """The newline is shown at once, although decode() would turn it into U+FFFD for its neighbour's sake."""
    tokenizer = byte_fallback()
    ids = [FIRST_BYTE + 0x0A, FIRST_BYTE + 0xFF, *ids_of(tokenizer, "a")]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids] == ["\n", "", "\ufffda"]
    assert tokenizer.decode(ids) == "\ufffd\ufffda"


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("byte_level", ["Ġthe", "a"]),
        ("byte_level", ["ÿ"]),
        ("byte_level", ["a", "ð"]),
        ("byte_level", ["ð", "Ł"]),
        ("byte_level", ["ĠðŁ"]),
        ("byte_level", ["</s>"]),
        ("byte_fallback", ["<0xFF>"]),
        ("byte_fallback", ["<0xC3>", "<0xA9>"]),
        ("byte_fallback", ["<s>", "▁"]),
    ],
)
def test_the_work_per_token_does_not_grow(kind, tokens):
    """Linear in the output's length, for valid text, long invalid runs and tokens without text."""
    tokenizer = KINDS[kind]()
    unit = ids_of(tokenizer, *tokens)
    ids = unit * (1200 // len(unit))
    meter = Meter(tokenizer)
    assert stream(meter, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert meter.decoded < 16 * len(ids)


def test_fork_is_independent():
    tokenizer = byte_level()
    first = Detokenizer(tokenizer)
    first.push(tokenizer.convert_tokens_to_ids("ð"))
    second = first.fork()
    assert [first.push(tokenizer.convert_tokens_to_ids(t)) for t in "ŁĺĢ"] == ["", "", "😀"]
    assert second.push(tokenizer.convert_tokens_to_ids("a")) == "\ufffda"
    assert (first.text, second.text) == ("😀", "\ufffda")


def test_slow_tokenizers_ignore_ids_beyond_their_vocabulary():
    """A model's vocabulary is often padded beyond its tokenizer's."""
    assert stream(KINDS["slow_words"](), [1, 900, 2]) == "w0 w1"


def test_token_texts_join_to_the_text():
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(t) for t in "aðŁĺĢð"]
    assert token_texts(tokenizer, ids) == ["a", "", "", "", "😀", "\ufffd"]
    assert token_texts(tokenizer, []) == []


# Prompts


def encode(prompts, tokenizer="byte_level", **limits):
    tokenizer = KINDS[tokenizer]() if isinstance(tokenizer, str) else tokenizer
    found, single = encode_prompts(tokenizer, prompts, **limits)
    return [p.ids for p in found], single


def test_one_text_and_a_list_of_texts():
    tokenizer = byte_level()
    the, dog = tokenizer("the fox")["input_ids"], tokenizer("dog")["input_ids"]
    assert encode("the fox") == ([the], True)
    assert encode(["the fox", "dog"]) == ([the, dog], False)
    assert encode(["dog"]) == ([dog], False)
    assert encode_prompts(tokenizer, "dog")[0][0].text == "dog"


def test_text_is_tokenized_with_the_tokenizers_own_special_tokens():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    adding = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    adding.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert encode("dog", adding) == ([adding("dog")["input_ids"]], True)
    assert encode("dog", adding)[0][0][0] == 0
    assert encode("", adding) == ([[0]], True)


@pytest.mark.parametrize(
    ("prompts", "ids", "single"),
    [
        ([5, 6, 7], [[5, 6, 7]], True),
        ((5, np.int64(6)), [[5, 6]], True),
        ([[5, 6], [7]], [[5, 6], [7]], False),
        (torch.tensor([5, 6]), [[5, 6]], True),
        (torch.tensor([5, 6], dtype=torch.int32), [[5, 6]], True),
        (np.array([5, 6]), [[5, 6]], True),
        ([torch.tensor([5, 6]), torch.tensor([7])], [[5, 6], [7]], False),
        ([torch.tensor(5), torch.tensor(6)], [[5, 6]], True),
        (Prompt([5]), [[5]], True),
        ([Prompt([5]), [6]], [[5], [6]], False),
        ({"input_ids": [5, 6]}, [[5, 6]], True),
        ({"input_ids": [[5, 6], [7]]}, [[5, 6], [7]], False),
        ({"input_ids": torch.tensor([5, 6])}, [[5, 6]], True),
        ({"input_ids": [5, 6, 2], "attention_mask": [1, 1, 0]}, [[5, 6]], True),
        ({"input_ids": torch.tensor([[2, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
         [[5], [6, 7]], False),
        ({"input_ids": np.array([[5, 2], [6, 7]]), "attention_mask": np.array([[1, 0], [1, 1]])},
         [[5], [6, 7]], False),
        ([{"input_ids": [5]}, {"input_ids": torch.tensor([[2, 6]]), "attention_mask": [[0, 1]]}],
         [[5], [6]], False),
    ],
)  # fmt: skip
def test_ids_are_taken_as_they_are(prompts, ids, single):
    assert encode(prompts, None, vocab_size=8) == (ids, single)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_a_tokenizers_padded_output_loses_its_padding(side, tensors):
    tokenizer = byte_level()
    texts = ["the quick brown fox", "a", "dog."]
    padded = tokenizer(texts, padding=True, padding_side=side, return_tensors=tensors)
    assert isinstance(padded, BatchEncoding)
    assert len({len(row) for row in padded["input_ids"]}) == 1
    assert encode(padded, None) == encode(texts)


def test_embeddings_are_float_matrices():
    matrix = torch.randn(3, 4)
    [prompt], single = encode_prompts(None, matrix, hidden_size=4)
    assert single
    assert prompt.ids == [-1, -1, -1]
    assert prompt.embeddings is matrix
    batch, single = encode_prompts(None, [matrix, [5]], hidden_size=4, vocab_size=8)
    assert not single
    assert [len(p) for p in batch] == [3, 1]
    with pytest.raises(PromptError, match=r"prompt 1 has embeddings of size 5; valid is 4"):
        encode_prompts(None, [matrix, torch.zeros(2, 5)], hidden_size=4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty list"),
        ([[5], []], "prompt 1 is empty: it has no token; a prompt needs at least one"),
        ([[5], ""], "prompt 1 is empty: '' encodes to no token"),
        (torch.zeros(0, dtype=torch.long), "prompt 0 is empty"),
        (torch.zeros(0, 4), "prompt 0 is empty"),
        (None, "prompt 0 is NoneType None; valid are text"),
        ([[5], None], "prompt 1 is NoneType None"),
        (b"bytes", "prompt 0 is bytes b'bytes'; decode it to str first"),
        ([b"bytes"], "prompt 0 is bytes"),
        (7, "prompt 0 is int 7"),
        ([[5], 2.5], "prompt 1 is float 2.5"),
        ({"a", "b"}, "prompt 0 is set"),
        ([5, 8], r"prompt 0: token id 8 at position 1 is out of range; valid ids are 0 to 7 \(vocab"),
        ([[5], [6, -1]], "prompt 1: token id -1 at position 1 is out of range"),
        ([5, "a"], "element 0 is a token id, element 1 is str 'a'"),
        ([[5], 6], "element 1 is a token id, element 0 is list"),
        ([[5, "a"]], "prompt 0: element 1 is str 'a'; a list prompt must hold integer"),
        ([[5, 1.0]], "prompt 0: element 1 is float 1.0"),
        ([[True, False]], "prompt 0: element 0 is bool True"),
        ([{"role": "user", "content": "a"}, "b"], "element 0 is a chat message, element 1 is str 'b'"),
        ({"role": "user", "content": "a"}, "put a single chat message into a list"),
        ({"ids": [1]}, r"must have 'input_ids' .* got keys \['ids'\]"),
        ({"input_ids": 5}, "input_ids must be a non-empty list or tensor"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "prompt 0: attention_mask has 1 values for 2"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1]]}, "one row for each of the 2 rows"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1], [0]]}, "prompt 1 is all padding"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "prompt 0: .* a hole at position 1"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]]}, "attention_mask holds 2; valid values are 0"),
        ([{"input_ids": [[5], [6]]}], "prompt 0 has 2 rows"),
        (torch.zeros(2, 2, 2), r"prompt 0 is a float32 tensor of shape \[2, 2, 2\]"),
        (torch.zeros(2), r"float32 tensor of shape \[2\]; valid are integer ids of shape \[T\]"),
        (torch.tensor([True]), "bool tensor"),
        (torch.tensor(5), r"int64 tensor of shape \[\]"),
        ([torch.zeros(1, 2, dtype=torch.long)], r"prompt 0 is a int64 tensor of shape \[1, 2\]"),
        (np.array([b"a"]), r"NumPy array of dtype \|S1"),
        ("\ud800", "prompt 0 is not valid Unicode"),
    ],
)  # fmt: skip
def test_bad_prompts_say_which_and_what_would_be_valid(prompts, message):
    with pytest.raises(PromptError, match=message):
        encode(prompts, vocab_size=8 if not isinstance(prompts, str) else None)


def test_a_padded_tensor_without_a_mask_explains_itself():
    ids = torch.tensor([[2, 2, 5], [5, 6, 7], [5, 6, 2]])
    with pytest.raises(PromptError) as caught:
        encode(ids)
    message = str(caught.value)
    assert "shape [3, 3] without an attention_mask" in message
    assert "rows 0, 2 start or end with the pad id 2" in message
    assert "pass the tokenizer's whole output (input_ids and attention_mask)" in message
    with pytest.raises(PromptError, match="without an attention_mask"):
        encode({"input_ids": ids})
    with pytest.raises(PromptError) as caught:
        encode(ids, None)
    assert "pad id" not in str(caught.value)


def test_a_prompt_must_leave_room_in_max_length():
    assert encode([5, 6, 7], max_length=4)[0] == [[5, 6, 7]]
    with pytest.raises(PromptError, match=r"prompt 1 has 4 tokens, too many for max_length=4 .* at most 3"):
        encode([[5], [5, 6, 7, 7]], max_length=4)
    assert encode([5, 6, 7, 7], max_length=4, room=0)[0] == [[5, 6, 7, 7]]


def test_text_without_a_tokenizer():
    with pytest.raises(PromptError, match="prompt 1 is text, but there is no tokenizer; pass a list"):
        encode([[5], "a"], None)


# Conversations

MESSAGES = [{"role": "system", "content": "the"}, {"role": "user", "content": "fox"}]


def chat_tokenizer(template: str | None = CHAT):
    plain = byte_level()
    tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_use_the_chat_template():
    tokenizer = chat_tokenizer()
    want = tokenizer("[system] the\n[user] fox\n[assistant] ")["input_ids"]
    assert chat_ids(tokenizer, MESSAGES) == want
    assert encode(MESSAGES, tokenizer) == ([want], True)
    assert encode([MESSAGES, "dog"], tokenizer) == ([want, tokenizer("dog")["input_ids"]], False)


def test_a_final_assistant_message_can_be_continued():
    tokenizer = chat_tokenizer()
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "the dog"}]
    want = tokenizer("[user] fox\n[assistant] the dog")["input_ids"]
    assert chat_ids(tokenizer, messages, continue_final_message=True) == want


def test_a_template_can_be_passed_for_one_call():
    tokenizer = chat_tokenizer(None)
    found = chat_ids(tokenizer, MESSAGES, chat_template="{{ messages[1].content }}")
    assert found == tokenizer("fox")["input_ids"]


def test_a_missing_template_says_how_to_set_one():
    with pytest.raises(PromptError, match=r"prompt 1 .* no chat template .* set `tokenizer.chat_template`"):
        encode(["a", MESSAGES], chat_tokenizer(None))
    with pytest.raises(PromptError, match="there is no tokenizer"):
        chat_ids(None, MESSAGES)


def test_what_the_template_refuses_is_a_prompt_error():
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match=r"prompt 0: the chat template refuses .* roles must alternate"):
        chat_ids(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list .* got str 'hi'"),
        ([{"role": "user", "content": "a"}, "b"], "message 1: must be .* got str 'b'"),
        ([{"content": "a"}], "message 0: 'role' must be a string such as 'user', got NoneType"),
        ([{"role": "user"}], "message 0: 'content' must be a string or list of parts, got NoneType"),
        ([{"role": "user", "content": 3}], "'content' must be .* got int 3"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(PromptError, match=message):
        chat_ids(chat_tokenizer(), messages)
