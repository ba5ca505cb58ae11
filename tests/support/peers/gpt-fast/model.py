"""A stand-in for gpt-fast's module `model`: the same names and arguments, a Llama in a few lines, for tests."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu


@dataclass
class ModelArgs:
    """Sizes, under gpt-fast's names."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float
    rope_scaling: dict | None = None


class Transformer(nn.Module):
    """One prompt at a time, over keys and values of `max_seq_length` positions."""

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config, self.head = config, config.dim // config.n_head
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(self._layer() for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def _layer(self):
        c, kv = self.config, self.config.n_local_heads * self.head
        attention = {"wqkv": (c.dim, c.dim + 2 * kv), "wo": (c.dim, c.dim)}
        feed = {
            "w1": (c.dim, c.intermediate_size),
            "w3": (c.dim, c.intermediate_size),
            "w2": (c.intermediate_size, c.dim),
        }
        made = {
            name: nn.ModuleDict({n: nn.Linear(*shape, bias=False) for n, shape in parts.items()})
            for name, parts in (("attention", attention), ("feed_forward", feed))
        }
        norms = {name: nn.RMSNorm(c.dim, c.norm_eps) for name in ("attention_norm", "ffn_norm")}
        return nn.ModuleDict(made | norms)

    def setup_caches(self, max_batch_size, max_seq_length):
        """Room for one prompt."""
        self.max_seq_length = -(-max_seq_length // 8) * 8
        shape = (2, self.config.n_local_heads, self.max_seq_length, self.head)
        self.cells = [torch.zeros(shape) for _ in self.layers]
        rates = self.config.rope_base ** -(torch.arange(0, self.head, 2) / self.head)
        self.turns = torch.polar(torch.ones(()), torch.arange(self.max_seq_length)[:, None] * rates)

    def _turned(self, x, position):
        """Neighbours rotated: x [T, H, D]."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[position][:, None]).flatten(2)

    def forward(self, mask, idx, input_pos):
        """Logits [1, T, V]."""
        c, x = self.config, self.tok_embeddings(idx[0])
        seen = mask.mask_mod(0, 0, input_pos[:, None], torch.arange(self.max_seq_length)[None])
        for layer, cells in zip(self.layers, self.cells, strict=True):
            sizes = [c.n_head, c.n_local_heads, c.n_local_heads]
            qkv = layer["attention"]["wqkv"](layer["attention_norm"](x)).unflatten(-1, (-1, self.head))
            q, k, v = qkv.split(sizes, dim=1)
            cells[0][:, input_pos] = self._turned(k, input_pos).transpose(0, 1)
            cells[1][:, input_pos] = v.transpose(0, 1)
            q = self._turned(q, input_pos).transpose(0, 1)
            out = scaled_dot_product_attention(q[None], *cells[:, None], attn_mask=seen, enable_gqa=True)[0]
            x = x + layer["attention"]["wo"](out.transpose(0, 1).flatten(1))
            feed, inner = layer["feed_forward"], layer["ffn_norm"](x)
            x = x + feed["w2"](silu(feed["w1"](inner)) * feed["w3"](inner))
        return self.output(self.norm(x))[None]
