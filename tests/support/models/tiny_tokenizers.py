"""Small tokenizers of every decoding kind, built offline, for the tests of text and stopping."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog. Stop here, then STOP.",
    "naïve café, straße, 你好 世界, привет мир, 안녕하세요",
    "emoji 😀 😀 👩‍👩‍👧 flags 🇫🇷 and ❤️\nnew lines\n\n  and  spaces",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,STOP"
FIRST_BYTE = 4  # id of `<0x00>` in `byte_fallback`
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant] {% endif %}"


def _wrap(tokenizer: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | kwargs))


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2 and Llama 3, whose merges also cross the borders of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _wrap(tokenizer)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's form: BPE with "▁" for spaces and `<0xNN>` for unknown characters; strips the first space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    vocab |= {f"<0x{b:02X}>": FIRST_BYTE + b for b in range(256)}
    words = ["▁", *LETTERS, "▁t", "he", "▁the", "▁S", "TO", "▁STO", "▁STOP"]
    vocab |= {w: 260 + i for i, w in enumerate(words)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "S"), ("T", "O"), ("▁S", "TO"), ("▁STO", "P")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer, unk_token="<unk>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Unigram with the Metaspace decoder, as in T5 and XLNet; no byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *LETTERS, "▁the", "▁STO"]
    tokenizer = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, unk_token="<unk>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece as in BERT: words joined by spaces, "##" continues one."""
    pieces = ["[UNK]", "<s>", "</s>", "<pad>", *"abcdefgh", *(f"##{c}" for c in "abcdefgh"), "the", "stop"]
    pieces += ["##ing", ".", ","]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _wrap(tokenizer, unk_token="[UNK]")


class SlowWords(PreTrainedTokenizer):
    """A tokenizer in plain Python that joins its words by spaces."""

    WORDS = ("<unk>", *(f"w{i}" for i in range(20)))

    def __init__(self, **kwargs):
        self.words = list(self.WORDS)
        super().__init__(unk_token="<unk>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {w: i for i, w in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text: str) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]


class SlowBytes(SlowWords):
    """A tokenizer in plain Python whose tokens are bytes, as ByT5's; bytes of no character vanish."""

    WORDS = tuple(map(chr, range(256)))

    def _tokenize(self, text: str) -> list[str]:
        return [chr(b) for b in text.encode()]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(bytes([ord(t)]) for t in tokens if len(t) == 1).decode("utf-8", errors="ignore")


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "slow_words": cache(SlowWords),
    "slow_bytes": cache(SlowBytes),
}
