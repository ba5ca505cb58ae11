"""The twin of a model, on every architecture: the same bits, the user's tables, and nothing of the user's changed."""

import copy
import functools

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import recorded, tiny_llama
from torch import nn

from handloom import Engine
from handloom.forward.twin.twin import Twin, twin, watched

IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def test_a_twin_computes_the_same_and_shares_tables_but_not_modules(name):
    model = ARCHITECTURES[name]().eval()
    mine, before = twin(model), logits(model)
    assert torch.equal(logits(mine), before)
    assert not {id(m) for m in mine.modules()} & {id(m) for m in model.modules()}
    assert {id(p) for p in mine.parameters()} == {id(p) for p in model.parameters()}

    words = model.get_input_embeddings()
    old, words.weight = words.weight, nn.Parameter(words.weight * 1.5)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(mine), logits(model)), "a parameter assigned to the model"
    words.weight = old

    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    handle = linear.register_forward_hook(lambda module, inputs, out: out * 0.3)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(mine), logits(model)), "a hook registered on the model"
    assert torch.equal(logits(twin(model, hooks=False)), before)
    handle.remove()

    model.train()
    assert not any(m.training for m in mine.modules())
    attention = model.config._attn_implementation
    for config in (mine.config, mine.config.get_text_config(decoder=True)):
        vars(config)["_attn_implementation_internal"] = "another"
    assert model.config._attn_implementation == attention
    layers = [m for m in mine.modules() if getattr(m, "config", None) is not None]
    text = type(mine.config.get_text_config(decoder=True))
    assert {m.config._attn_implementation for m in layers if type(m.config) is text} == {"another"}


def photograph(model):
    """Everything of a model that an engine might leave behind: attributes, tables and configuration, by identity."""
    seen = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            seen[path, name] = dict(value) if isinstance(value, dict) else value
    return seen, copy.deepcopy(vars(model.config)), {n: t.clone() for n, t in model.state_dict().items()}


def same(one, other):
    tables, config, values = zip(one, other, strict=True)
    assert tables[0].keys() == tables[1].keys()
    for key, value in tables[0].items():
        now = tables[1][key]
        if isinstance(value, dict):
            assert value.keys() == now.keys(), key
            assert all(value[k] is now[k] for k in value), key
        else:
            assert value is now, key
    assert config[0] == config[1]
    assert all(torch.equal(values[0][n].nan_to_num(), values[1][n].nan_to_num()) for n in values[0])


def test_nothing_of_the_model_is_another_after_a_run(name):
    model = ARCHITECTURES[name]().train()
    before = photograph(model)
    engine = Engine(model, slots=2, max_length=128)
    engine.generate(prompts_of([41, 20, 5]), max_new_tokens=3)
    engine.step(engine.prefill(prompts_of([5])), [7])
    same(before, photograph(model))


def test_attributes_follow_and_containers_lead_to_twins():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(3, 3), 1.0
            self.plain, self.method = [self.inner], self.inner.extra_repr
            self.bound = functools.partial(torch.nn.functional.mse_loss, self.inner)

        def forward(self, x):
            return self.plain[0](x) * self.scale

    model = Holder()
    pair = Twin(model)
    mine = pair.module
    assert mine.plain[0] is mine.inner is mine.method.__self__ is mine.bound.args[0] is not model.inner
    model.scale = 3.0
    pair.follow(model, ["scale"])
    x = torch.ones(1, 3)
    assert torch.equal(mine(x), model(x))


def test_a_compiled_model_and_compiled_layers_stand_for_what_was_compiled():
    model = tiny_llama()
    wanted = logits(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    mine = twin(torch.compile(model, backend="eager"))
    assert type(mine) is type(model)
    assert all(layer._compiled_call_impl is None for layer in mine.model.layers)
    assert torch.equal(logits(mine), wanted)


def test_accelerates_forwards_run_in_the_twin():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_llama(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    mine = twin(model)
    assert "forward" in vars(mine)
    assert torch.equal(logits(mine), logits(model))
    mine.lm_head = nn.Linear(32, 101)  # acts only if the twin's forward runs the twin's parts
    assert not torch.equal(logits(mine), logits(model))


@torch.no_grad()
@pytest.mark.parametrize("first", ["engine", "model", "inner"])
def test_hidden_states_are_recorded_once_for_model_and_twin(first):
    """transformers records them by hooks that it installs on first use; model and twin share their tables."""
    model = tiny_llama(num_hidden_layers=3)

    def theirs(model=model):
        return model(IDS, use_cache=False, output_hidden_states=True).hidden_states

    wanted = theirs(tiny_llama(num_hidden_layers=3))
    if first != "engine":
        (model if first == "model" else model.model)(IDS, use_cache=False, output_hidden_states=True)
    engine = Engine(model)
    kept = engine.prefill([*range(20)])
    state = engine.prefill(IDS.tolist(), hidden=True)
    for got in (theirs(), state.hidden_states, engine.prefill(IDS.tolist(), hidden=True).hidden_states):
        assert len(got) == len(wanted) == 4
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not watched(*model.modules())
    with recorded(model) as passes:  # recording is no change of the model
        torch.testing.assert_close(engine.prefill([*range(20)]).logits, kept.logits)
    assert passes.prompts == [4]
