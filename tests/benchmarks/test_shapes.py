"""Shapes of known models: their size, and the bytes that a decode step reads."""

import benchmark_runs  # noqa: F401 - makes `benchmarks` importable
import pytest
import torch
from transformers import AutoConfig

from benchmarks.support.shapes import SHAPES, Sizes, build, config_of, refusal, sizes

PUBLISHED = {  # parameters, as the model cards and checkpoints have them
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "OLMoE-1B-7B": 6_919_161_856,
}
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def test_every_shape_but_the_tiny_ones_is_of_a_published_model():
    assert {name for name in SHAPES if not name.startswith("tiny")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name):
    assert sizes(config_of(name), torch.bfloat16).weights == 2 * PUBLISHED[name]


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_sizes_are_those_of_the_model_that_is_built(name):
    model, again = build(name, torch.float32), build(name, torch.float32)
    assert sizes(model.config, torch.float32).weights == sum(p.nbytes for p in model.parameters())
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not model.training


def test_a_step_reads_all_weights_but_the_table_and_the_keys_and_values():
    sized = sizes(config_of("Llama-3.1-8B"), torch.bfloat16)
    assert sized.read(1, 0) == 2 * (8_030_261_248 - 128256 * 4096)
    cell = 2 * 2 * 32 * 8 * 128  # bytes, keys and values, layers, heads, width
    assert sized.read(3, 1000) - sized.read(3, 0) == 3 * 1000 * cell


def test_a_tied_table_is_read_as_the_output_layer():
    assert sizes(config_of("Llama-3.2-1B"), torch.bfloat16).read(1, 0) == 2 * 1_235_814_400


def test_experts_count_as_often_as_they_are_chosen():
    sized = sizes(config_of("Qwen3-30B-A3B"), torch.bfloat16)
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    rest = sized.weights - experts - 2 * 151936 * 2048
    assert sized.read(1, 0) == pytest.approx(rest + experts * 8 / 128)
    assert sized.read(2, 0) == pytest.approx(rest + experts * (1 - (120 / 128) ** 2))
    assert sized.read(10**6, 0) == pytest.approx(rest + experts)


def test_windows_bound_what_is_read():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model(
        "gemma2", **SMALL, num_hidden_layers=3, num_key_value_heads=1, head_dim=4, sliding_window=10,
        layer_types=kinds,
    )  # fmt: skip
    sized = sizes(config, torch.float32)
    layer = 2 * 4 * 4
    assert sized.kept(8) == 3 * 8 * layer
    assert sized.kept(100) == (100 + 2 * 10) * layer


def test_a_model_without_attention_keeps_nothing_for_a_token():
    config = AutoConfig.for_model("mamba", vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert sizes(config, torch.float32).kept(100) == 0


def test_a_folder_is_loaded_with_its_own_weights(tmp_path):
    model = build("tiny-moe", torch.float32)
    model.save_pretrained(tmp_path)
    again = build(str(tmp_path), torch.float32)
    assert type(again) is type(model)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert sizes(config_of(str(tmp_path)), torch.float32) == sizes(model.config, torch.float32)


def test_refusal_begins_where_memory_ends():
    sized = Sizes(1000, 1000, 0, 0.0, 10, (), longest=50)
    needed = int(1.1 * (1000 + 2 * 3 * 10 * 40))
    assert refusal("m", sized, 2, 40, 3, needed) is None
    assert "needed" in refusal("m", sized, 2, 40, 3, needed - 1)
    assert refusal("m", sized, 1, 50, 1, 10**9) is None
    assert "longest sequence is 50" in refusal("m", sized, 1, 51, 1, 10**9)
