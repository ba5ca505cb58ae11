"""Models to measure with: real shapes with random weights, made from configurations alone; and what a token reads.

`build("Llama-3.1-8B", torch.bfloat16, "cuda")` needs no download. The configurations are the published ones, without
special tokens, so that no answer ends early.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SILENT = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MARGIN = 1.1  # activations, logits and fragments, on top of weights and keys and values


def _llama_rope(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# Name -> model type and configuration.
SHAPES: dict[str, tuple[str, dict]] = {
    "tiny": ("llama", {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }),
    "tiny-moe": ("qwen3_moe", {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2048, **SILENT,
    }),
    "Llama-3.2-1B": ("llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": _llama_rope(32.0), **SILENT,
    }),
    "Llama-3.1-8B": ("llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": _llama_rope(8.0), **SILENT,
    }),
    "Qwen3-8B": ("qwen3", {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **SILENT,
    }),
    "Qwen3-30B-A3B": ("qwen3_moe", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **SILENT,
    }),
    "OLMoE-1B-7B": ("olmoe", {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, **SILENT,
    }),
}  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a shape in `SHAPES`, of `demo` (SmolLM2), of a folder, or of a hub name."""
    if name in SHAPES:
        kind, values = SHAPES[name]
        return AutoConfig.for_model(kind, **values)
    return AutoConfig.from_pretrained(place(name))


def place(name: str) -> str | Path:
    """Where a model that is not in `SHAPES` is loaded from."""
    if name == "demo":
        from handloom.loading import demo

        name = demo.locate()
    return Path(name) if Path(name).is_dir() else name


def build(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A model in evaluation mode, all of it in memory; random weights are the same at every call.

    Args:
        name: one of `SHAPES`, `demo`, a folder, or a hub name.
        config: another configuration, for one of `SHAPES`.
    """
    if name not in SHAPES:
        model = AutoModelForCausalLM.from_pretrained(place(name), dtype=dtype).to(device).eval()
        with torch.no_grad():  # files are mapped, and whoever reads first would seem to take the memory
            torch.stack([p.sum(dtype=torch.float64) for p in model.parameters()])
        return model
    config = config_of(name) if config is None else config
    devices = [] if torch.device(device).type != "cuda" else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if config.eos_token_id is not None:
        with torch.no_grad():
            model.lm_head.weight[config.eos_token_id] = 0  # never the best token, so no answer ends early
    return model.eval()


@dataclass(frozen=True)
class Sizes:
    """How many bytes a model takes, and how many of them a decode step reads.

    Args:
        weights: all weights.
        every_step: weights that every step reads: all but experts and tables that are only looked up.
        experts: weights of all experts; chosen: the share of them that one token goes through.
        cell: keys and values of one token in all layers that keep every token.
        window_cells: layer groups with a window: (its length, keys and values of one token).
        longest: most tokens of prompt and answer.
    """

    weights: int
    every_step: int
    experts: int
    chosen: float
    cell: int
    window_cells: tuple[tuple[int, int], ...]
    longest: int

    def read(self, rows: int, context: float) -> float:
        """Bytes that one decode step of `rows` rows reads with `context` tokens before each.

        Of experts, the number of different ones that `rows` tokens go through if every choice is as likely: exact
        for one row, an expectation for more.
        """
        experts = self.experts * (1 - (1 - self.chosen) ** rows)
        return self.every_step + experts + rows * self.kept(context)

    def kept(self, tokens: float) -> float:
        """Bytes of the keys and values of one sequence of `tokens` tokens."""
        return self.cell * tokens + sum(size * min(window, tokens) for window, size in self.window_cells)


def sizes(config: PreTrainedConfig, dtype: torch.dtype) -> Sizes:
    """The sizes of the model that a configuration describes; nothing is allocated.

    Layers without keys and values (state-space, linear attention) count as reading their weights alone.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    tables = {id(m.weight): m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.pop(id(head.weight) if head is not None else None, None)
    weights = sum(p.nbytes for p in model.parameters())
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    text = config.get_text_config(decoder=True)
    cell, windows = _cells(text, dtype.itemsize)
    return Sizes(
        weights=weights,
        every_step=weights - experts - sum(tables.values()),
        experts=experts,
        chosen=_chosen(text) if experts else 0.0,
        cell=cell,
        window_cells=windows,
        longest=getattr(text, "max_position_embeddings", None) or 1 << 20,
    )


def _chosen(config) -> float:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            return config.num_experts_per_tok / count
    raise ValueError(f"{type(config).__name__} has experts, but does not say how many")


def _cells(config, itemsize: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Bytes of one token's keys and values: in layers that keep all tokens, and by window in those that do not."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # a state-space model
        return 0, ()
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width * itemsize
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = kinds.count("sliding_attention")
    window = getattr(config, "sliding_window", None)
    if sliding and window:
        return layer * kinds.count("full_attention"), ((window, layer * sliding),)
    return layer * (kinds.count("full_attention") + sliding), ()


def available_bytes(device: torch.device | str) -> int:
    """Memory that is free for new tensors on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def refusal(name: str, sized: Sizes, rows: int, tokens: int, caches: int, available: int) -> str | None:
    """Why `rows` sequences of `tokens` tokens cannot be decoded, or None where they can.

    Args:
        caches: how many caches of all rows live at once.
        available: bytes.
    """
    if tokens > sized.longest:
        return f"{name}: {tokens} tokens of prompt and answer, but its longest sequence is {sized.longest}"
    kept = sized.kept(tokens) * rows * caches
    needed = int(MARGIN * (sized.weights + kept))
    if needed <= available:
        return None
    return (
        f"{name}: {rows} rows of {tokens} tokens do not fit: {_gib(needed)} needed ({_gib(sized.weights)} of weights, "
        f"{_gib(kept)} of keys and values in {caches} caches), {_gib(available)} available. "
        "Choose fewer sides, a smaller batch, or a shorter context"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
