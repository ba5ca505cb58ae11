"""Loading: dtypes, quantisation, GGUF, folders that lack something; on small models saved to disk."""

import json
import logging
import re
import shutil

import pytest
import torch
from architectures import prompts_of
from helpers import assert_nothing_leaked, tiny_llama
from tiny_tokenizers import byte_level

from handloom import Engine
from handloom.errors import ModelError, PromptError

PROMPTS = prompts_of([5, 17, 9])
WIDE = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer), **WIDE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """A folder with a model in float32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that folder, to spoil."""
    return shutil.copytree(saved, tmp_path / "copied")


def load(folder, **options):
    return Engine.from_pretrained(str(folder), device="cpu", **options)


def answers(engine, n=8):
    return [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=n)]


def theirs(model, n=8):
    """What `model.generate` answers, prompt by prompt."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=2
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


# What is loaded


def test_a_saved_model_answers_as_the_one_in_memory(saved, model, tokenizer):
    engine = load(saved)
    assert engine.dtype == torch.float32
    assert not engine.model.training
    assert engine.eos_token_ids == {tokenizer.eos_token_id}
    assert answers(engine) == answers(Engine(model, tokenizer))
    assert engine.generate("the fox", max_new_tokens=3).prompt_token_ids == tokenizer("the fox")["input_ids"]
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_dtype_by_name_or_value(saved, given):
    engine = load(saved, dtype=given)
    assert engine.dtype == torch.bfloat16
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert engine.pool.stores[0].keys.dtype == torch.bfloat16
    assert engine.prefill(PROMPTS[0]).logits.dtype == torch.float32


def test_auto_is_the_checkpoints_own_dtype(model, tmp_path):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32


def test_arguments_of_the_engine_and_of_transformers_are_passed_on(saved):
    engine = load(
        saved, slots=3, max_length=40, fixed_slots=True, model_kwargs={"attn_implementation": "eager"}
    )
    assert (engine.slots, engine.max_length, engine.fixed_slots) == (3, 40, True)
    assert engine.model.config._attn_implementation == "eager"
    assert answers(engine) == answers(load(saved))


def test_a_softcap_is_not_left_to_an_attention_that_drops_it(copied):
    assert load(copied).model.config._attn_implementation == "sdpa"
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"attn_logit_softcapping": 5.0}))
    assert load(copied).model.config._attn_implementation == "eager"
    chosen = load(copied, model_kwargs={"attn_implementation": "sdpa"})
    assert chosen.model.config._attn_implementation == "sdpa"


def test_a_folder_may_be_a_path(saved):
    assert answers(Engine.from_pretrained(saved, device="cpu")) == answers(load(saved))


def test_a_device_map_places_the_model(saved):
    engine = Engine.from_pretrained(str(saved), device_map={"": "cpu"})
    assert engine.device == torch.device("cpu")
    assert answers(engine) == answers(load(saved))


def test_a_model_without_a_tokenizer_still_decodes_ids(model, saved, tmp_path):
    model.save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert engine.tokenizer is None
    assert answers(engine) == answers(load(saved))
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.generate("the")


# Quantisation


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_models_run_on_a_cpu_and_answer_as_transformers_does(saved, kind):
    engine = load(saved, quantization=kind)
    layer = engine.model.model.layers[0].mlp.gate_proj
    assert type(layer).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
    if kind != "int8":
        assert layer.weight.quant_type == kind
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == 64 * 128 // 2
    assert engine.capabilities.path == "attention"
    assert engine.capabilities.ragged
    assert answers(engine) == theirs(engine.model)
    exact = load(saved).prefill(PROMPTS).logits
    error = (engine.prefill(PROMPTS).logits - exact).std() / exact.std()
    assert 0 < error < (0.1 if kind == "int8" else 1.0)  # in deviations; weights of random models suffer
    assert_nothing_leaked(engine)


def test_four_bits_with_our_product_give_the_same_logits(saved):
    engine = load(saved, quantization="nf4-triton")
    assert type(engine.runner.module.model.layers[0].mlp.gate_proj).__name__ == "FourBitLinear"
    want = load(saved, quantization="nf4").prefill(PROMPTS).logits
    error = (engine.prefill(PROMPTS).logits - want).std() / want.std()
    assert error < 0.1  # bitsandbytes may multiply in bfloat16; weights that are misread give 1.4
    assert_nothing_leaked(engine)


def test_eight_bits_with_our_product_follow_the_weights_and_need_no_outliers(saved):
    engine = load(saved, quantization="int8-triton")
    name = "model.layers.0.mlp.gate_proj"
    theirs, ours = engine.model.get_submodule(name), engine.runner.module.get_submodule(name)
    assert (type(theirs).__name__, type(ours).__name__) == ("Linear8bitLt", "EightBitLinear")
    assert theirs.state.threshold == 0  # or the step could not be captured
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 50  # an outlier, which rounds away the others where activations are bytes
    dense = x @ (theirs.weight.data.float() * ours.scales[:, None]).T
    assert ours.scales.allclose(load(saved).model.get_submodule(name).weight.abs().amax(1) / 127, rtol=1e-3)
    for rows in (1, 16, 40):
        torch.testing.assert_close(ours(x[:rows]), dense[:rows])
        torch.testing.assert_close(ours(x[:rows].half()).float(), dense[:rows], rtol=4e-3, atol=4e-3)
        small = ours(x[:rows].half() * 2.0**-9).float()  # still normal numbers of 16 bits
        torch.testing.assert_close(small, dense[:rows] * 2.0**-9, rtol=4e-3, atol=4e-3 * 2.0**-9)
    exact = load(saved).prefill(PROMPTS).logits
    assert (engine.prefill(PROMPTS).logits - exact).std() < 0.1 * exact.std()
    assert_nothing_leaked(engine)


def test_an_adapter_on_quantised_layers_stays_on_with_our_product(saved):
    """peft's wrappers have the names of bitsandbytes' own classes."""
    peft = pytest.importorskip("peft")
    engine = load(saved, quantization="int8-triton")
    base = engine.prefill(PROMPTS).logits
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(engine.model, config).eval()
    want = Engine(adapted, layout="plain").prefill(PROMPTS).logits
    assert (want - base).std() > 0.2 * want.std()
    for have in (engine, Engine(adapted, layout="triton")):
        assert (have.prefill(PROMPTS).logits - want).std() < 0.1 * want.std()


def test_quantisation_in_a_chosen_dtype(saved):
    engine = load(saved, quantization="nf4", dtype="bfloat16")
    assert engine.model.model.layers[0].mlp.gate_proj.compute_dtype == torch.bfloat16
    assert engine.generate(PROMPTS[0], max_new_tokens=4).finish_reason in ("length", "eos")


def test_an_unknown_quantisation_names_the_known_ones(saved):
    with pytest.raises(ModelError, match=r"quantization='nf8'.*nf4, fp4, int8"):
        load(saved, quantization="nf8")


# GGUF


def write_gguf(model, path):
    """The model as a llama GGUF in float32, with token texts t0, t1 ..."""
    gguf = pytest.importorskip("gguf")
    config, names = model.config, {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([])
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for short, long in names.items():
            value = weights[f"model.layers.{layer}.{long}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            if heads:  # llama.cpp rotates neighbouring channels, transformers the two halves of a head
                halves = value.view(heads, 2, value.shape[0] // heads // 2, -1)
                value = halves.transpose(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{short}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised_on_load(model, tmp_path):
    write_gguf(model, tmp_path / "tiny.gguf")
    engine = load(tmp_path, gguf_file="tiny.gguf")
    assert engine.dtype == torch.float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value)
    assert answers(engine) == [g.token_ids for g in Engine(model).generate(PROMPTS, max_new_tokens=8)]


def test_a_gguf_file_that_is_missing_or_is_none_is_named(saved, tmp_path):
    with pytest.raises(ModelError, match=r"missing\.gguf"):
        load(saved, gguf_file="missing.gguf")
    (tmp_path / "fake.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load(tmp_path, gguf_file="fake.gguf")


def test_a_gguf_file_is_not_quantised_again(model, tmp_path):
    write_gguf(model, tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"gguf_file.*quantization|quantization.*gguf_file"):
        load(tmp_path, gguf_file="tiny.gguf", quantization="nf4")


# What cannot be loaded


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load a causal LM from.*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no-one/no-model"):
        load("no-one/no-model", revision="v9")


def test_what_can_only_be_a_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./absent", str(tmp_path / "absent"), tmp_path / "absent", "~/absent/model"):
        with pytest.raises(ModelError, match=rf"from '{re.escape(str(name))}': there is no such folder$"):
            Engine.from_pretrained(name)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"'a\.gguf' is a file: pass its folder, and gguf_file='a\.gguf'"):
        Engine.from_pretrained("a.gguf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_one_line(saved):
    with pytest.raises(
        ModelError, match=r"^device='cuda' is not to be had here: [^\n]+; device='cpu' always is$"
    ):
        Engine.from_pretrained(saved, device="cuda")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(tmp_path)


def test_a_folder_without_weights(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(copied)


def test_a_truncated_weights_file(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(copied)


def test_a_spoilt_configuration(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(copied)


def test_a_model_of_another_kind(copied):
    (copied / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        load(copied)


def test_code_from_the_hub_is_not_run_unless_trusted(copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    }
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(copied)


def test_a_spoilt_tokenizer_is_reported(copied, caplog):
    (copied / "tokenizer.json").write_text('{"version": "1.0"}')
    with caplog.at_level(logging.WARNING, logger="handloom"):
        engine = load(copied)
    assert engine.tokenizer is None
    assert "tokenizer" in caplog.text
    assert engine.generate(PROMPTS[0], max_new_tokens=2).n_new == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float31"}, "dtype='float31'.*bfloat16"),
        ({"dtype": 16}, "dtype=16"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' and device_map='auto' exclude each other"),
    ],
)
def test_arguments_that_are_not_valid(saved, options, message):
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(str(saved), **options)
