"""Tiny random models of many transformers architectures, for tests that need a causal LM of every kind.

Windows and chunks are 12 tokens long: prompts of 40 tokens and answers of 24 cross them several times; the
short rows of the check that the engine makes at load do not, as in a model of real size.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 101
WINDOW = 12
MAX_LENGTH = 256

# Untied: the greedy token of a random model with tied embeddings is mostly the last token again.
UNTIED = {"tie_word_embeddings": False}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA_LIKE = LLAMA_LIKE | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": WINDOW}
MULTI_HEAD_LATENT = LLAMA_LIKE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MULTI_HEAD_LATENT_MOE = MULTI_HEAD_LATENT | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA2_IN_HYBRID = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GATED_DELTA_NET = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
GPT2_LIKE = {"vocab_size": VOCAB, "n_positions": MAX_LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}

# name -> (transformers model type, configuration)
CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA_LIKE),
    "llama_dynamic_ntk": (
        "llama",
        LLAMA_LIKE
        | {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "llama_yarn": (
        "llama",
        LLAMA_LIKE
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
    ),
    "mistral_sw": ("mistral", LLAMA_LIKE | {"sliding_window": WINDOW}),
    "ministral": (
        "ministral",
        LLAMA_LIKE | {"sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL[:2], "head_dim": 8},
    ),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen2_sw": (
        "qwen2",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": SLIDING_THEN_FULL,
        },
    ),
    "qwen3": ("qwen3", LLAMA_LIKE | {"head_dim": 16}),
    "gemma": ("gemma", LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        GEMMA_LIKE
        | {
            "layer_types": SLIDING_THEN_FULL,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        GEMMA_LIKE | {"layer_types": SLIDING_THEN_FULL, "query_pre_attn_scalar": 8},
    ),
    "gemma3n_text": (
        "gemma3n_text",
        GEMMA_LIKE
        | {
            "layer_types": SLIDING_THEN_FULL,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        GEMMA_LIKE
        | {
            "layer_types": SLIDING_THEN_FULL,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
    ),
    "vaultgemma": (
        "vaultgemma",
        GEMMA_LIKE | {"layer_types": SLIDING_THEN_FULL, "query_pre_attn_scalar": 8},
    ),
    "phi": ("phi", LLAMA_LIKE),
    "phi3": ("phi3", LLAMA_LIKE | {"sliding_window": WINDOW}),
    "phi3_full": ("phi3", LLAMA_LIKE),
    "phi3_longrope": (
        "phi3",
        LLAMA_LIKE
        | {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": [4.0, 5.0, 6.0, 7.0],
                "short_factor": [1.0, 1.0, 1.5, 2.0],
                "original_max_position_embeddings": 32,
                "factor": 8.0,
            },
        },
    ),
    "gpt2": ("gpt2", GPT2_LIKE),
    "gptj": ("gptj", GPT2_LIKE | {"rotary_dim": 4}),
    "codegen": ("codegen", GPT2_LIKE | {"rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT2_LIKE),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "max_position_embeddings": MAX_LENGTH,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 32,
        },
    ),
    "gpt_neox": ("gpt_neox", LLAMA_LIKE),
    "opt": (
        "opt",
        LLAMA_LIKE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    ),
    "xglm": (
        "xglm",
        {
            "vocab_size": VOCAB,
            "max_position_embeddings": MAX_LENGTH,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
        },
    ),
    "falcon_rope": (
        "falcon",
        LLAMA_LIKE | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "falcon_alibi": (
        "falcon",
        LLAMA_LIKE | {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "mpt",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": MAX_LENGTH},
    ),
    "mixtral": ("mixtral", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        LLAMA_LIKE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        LLAMA_LIKE | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "olmoe": ("olmoe", LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": SLIDING_THEN_FULL,
        },
    ),
    "deepseek_v2": ("deepseek_v2", MULTI_HEAD_LATENT_MOE | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", MULTI_HEAD_LATENT_MOE),
    "minicpm3": ("minicpm3", MULTI_HEAD_LATENT | {"scale_emb": 2, "dim_model_base": 16}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        MULTI_HEAD_LATENT_MOE
        | {
            "head_dim": 8,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 16,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "olmo": ("olmo", LLAMA_LIKE),
    "olmo2": ("olmo2", LLAMA_LIKE),
    "olmo3": (
        "olmo3",
        LLAMA_LIKE | {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL},
    ),
    "cohere": ("cohere", LLAMA_LIKE | {"logit_scale": 1.0}),
    "cohere2": (
        "cohere2",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "logit_scale": 1.0,
            "sliding_window": WINDOW,
            "layer_types": SLIDING_THEN_FULL,
        },
    ),
    "granite": (
        "granite",
        LLAMA_LIKE
        | {
            "attention_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
    ),
    "granitemoe": ("granitemoe", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", LLAMA_LIKE | {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", LLAMA_LIKE | {"sliding_window": WINDOW}),
    "stablelm": ("stablelm", LLAMA_LIKE),
    "glm": ("glm", LLAMA_LIKE | {"head_dim": 8}),
    "glm4": ("glm4", LLAMA_LIKE | {"head_dim": 8}),
    "exaone4": (
        "exaone4",
        LLAMA_LIKE | {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL},
    ),
    "llama4_text": (
        "llama4_text",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "floor_scale": 16,
        },
    ),
    "nemotron": ("nemotron", LLAMA_LIKE | {"head_dim": 8}),
    "persimmon": ("persimmon", LLAMA_LIKE),
    "biogpt": ("biogpt", LLAMA_LIKE),
    "ernie4_5": ("ernie4_5", LLAMA_LIKE | {"head_dim": 8}),
    "seed_oss": ("seed_oss", LLAMA_LIKE | {"head_dim": 8}),
    "helium": ("helium", LLAMA_LIKE | {"head_dim": 8}),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    ),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "falcon_mamba": (
        "falcon_mamba",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    ),
    "jamba": (
        "jamba",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (
        "bamba",
        LLAMA_LIKE | MAMBA2_IN_HYBRID | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    ),
    "falcon_h1": (
        "falcon_h1",
        LLAMA_LIKE | MAMBA2_IN_HYBRID | {"mamba_d_ssm": 64},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        LLAMA_LIKE
        | MAMBA2_IN_HYBRID
        | {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
        },
    ),
    "zamba2": (
        "zamba2",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": (
        "lfm2",
        LLAMA_LIKE | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    ),
    "qwen3_next": (
        "qwen3_next",
        LLAMA_LIKE
        | GATED_DELTA_NET
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", LLAMA_LIKE | GATED_DELTA_NET),
    "recurrent_gemma": (
        "recurrent_gemma",
        LLAMA_LIKE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": WINDOW,
        },
    ),
}


def build(name: str) -> PreTrainedModel:
    """A random model: fp32, evaluation mode, no special tokens; the same weights at every call.

    name: a key of `CONFIGS`.
    """
    model_type, fields = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **(NO_SPECIAL_TOKENS | UNTIED | fields))
    with seeded(0):
        # transformers 5.17 takes sdpa for Gemma 2, which drops its softcap
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    randomise(model)
    for key, value in NO_SPECIAL_TOKENS.items():
        setattr(model.generation_config, key, value)
    return model.eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def randomise(model: PreTrainedModel, std: float = 0.3) -> None:
    """Overwrite matrices with N(0, std^2) and jitter vectors, so that the greedy token is well separated.

    The decay parameters of recurrent layers keep their initial values: random ones would diverge.
    Each parameter's values depend on its name alone, not on the order of the modules.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1]
        if leaf in {"A_log", "D", "dt_bias", "recurrent_param"}:
            continue
        if parameter.ndim >= 2:
            parameter.copy_(noise * std)
        elif leaf == "sinks":
            parameter.copy_(noise)
        else:
            parameter.add_(noise * 0.05)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {name: partial(build, name) for name in CONFIGS}


def prompts_of(lengths: list[int], seed: int = 5) -> list[list[int]]:
    """Random prompts, one per length, of ids 3 .. VOCAB - 1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def forget(model: PreTrainedModel, prompt: list[int]) -> None:
    """Clear what recurrent_gemma keeps inside its modules, which a one-token prompt would inherit."""
    if model.config.model_type == "recurrent_gemma":
        model(torch.tensor([prompt]), use_cache=False)


@torch.no_grad()
def greedy_reference(model: PreTrainedModel, prompts: list[list[int]], n: int | list[int]) -> list[list[int]]:
    """New tokens of `model.generate`, greedy, one row at a time, so without padding.

    prompts: id lists. n: tokens to generate, one for all or one per prompt.
    """
    counts = [n] * len(prompts) if isinstance(n, int) else n
    answers = []
    for prompt, count in zip(prompts, counts, strict=True):
        forget(model, prompt)
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@torch.no_grad()
def logits_reference(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Raw logits `[len(answer) + 1, V]` of `model.generate` when it is made to answer `answer`.

    Row i is for the token after `prompt + answer[:i]`.
    """
    forget(model, prompt)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=len(answer) + 1,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, ids: [[*answer, 0][len(ids) - len(prompt)]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(output.logits).float()
