"""The model changes under its engine: what was kept of the old one is dropped, and the twin follows."""

import statistics
import time

import pytest
import torch
from architectures import prompts_of
from helpers import full_logits, recorded, tiny_llama
from torch import nn

from handloom import Engine
from handloom.errors import HandloomError
from handloom.forward.twin import copies
from handloom.forward.twin.fingerprint import Fingerprint
from handloom.kernels.linear import blocked
from handloom.loop.batch import Batch
from handloom.loop.graph import GraphBatch

PROMPT = prompts_of([40])[0]  # two full blocks are kept
LAYER = "model.layers.0.mlp.down_proj"


def scaled(module, inputs, out):
    return out * 0.3


def replaced(model):
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Sequential(old, nn.Hardtanh())


CHANGES = {
    "in place": lambda m: m.get_submodule(LAYER).weight.mul_(0.5),
    "through .data": lambda m: m.get_submodule(LAYER).weight.data.mul_(0.5),
    "data assigned": lambda m: setattr(
        m.get_submodule(LAYER).weight, "data", 0.5 * m.get_submodule(LAYER).weight
    ),
    "parameter assigned": lambda m: setattr(
        m.get_submodule(LAYER), "weight", nn.Parameter(0.5 * m.get_submodule(LAYER).weight)
    ),
    "load_state_dict": lambda m: m.load_state_dict({n: 0.9 * t for n, t in m.state_dict().items()}),
    "hook": lambda m: m.get_submodule(LAYER).register_forward_hook(scaled),
    "pre-hook": lambda m: m.get_submodule(LAYER).register_forward_pre_hook(lambda _, x: (x[0] * 0.3,)),
    "module replaced": replaced,
    "attribute": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.01),
}


@pytest.mark.parametrize("layout", ["plain", "blocked"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_the_next_run_is_the_new_models(monkeypatch, change, layout):
    monkeypatch.setattr(blocked, "SMALLEST", 1)
    model = tiny_llama()
    engine = Engine(model, layout=layout)
    tolerance = {"atol": 1e-3, "rtol": 0}
    old = engine.prefill(PROMPT)
    torch.testing.assert_close(old.logits[0], full_logits(model, PROMPT)[-1], **tolerance)
    engine.generate(PROMPT, max_new_tokens=1)
    undo = change(model)
    new = engine.prefill(PROMPT)
    assert (old.logits - new.logits).abs().max() > 0.01
    torch.testing.assert_close(new.logits[0], full_logits(model, PROMPT)[-1], **tolerance)
    if hasattr(undo, "remove"):
        undo.remove()
        torch.testing.assert_close(engine.prefill(PROMPT).logits, old.logits, **tolerance)
        engine.generate(PROMPT, max_new_tokens=1)
    del old, new
    engine.pool.check()


@torch.no_grad()
def test_an_unchanged_model_keeps_its_prefixes_and_a_changed_one_does_not():
    model = tiny_llama()
    engine = Engine(model)
    engine.generate(PROMPT, max_new_tokens=1)
    with recorded(model) as passes:
        engine.generate(PROMPT, max_new_tokens=1)
        model.train()
        model.eval()
        engine.generate(PROMPT, max_new_tokens=1)
        assert passes.prompts == [8, 8]
        model.lm_head.weight.mul_(1)
        engine.generate(PROMPT, max_new_tokens=1)
    assert passes.prompts == [8, 8, 40]


@torch.no_grad()
def test_what_a_hook_does_may_change_so_nothing_outlives_a_run_while_there_is_one():
    model, steering = tiny_llama(), {"strength": 0.1}
    engine = Engine(model)
    model.model.layers[0].register_forward_hook(lambda module, inputs, out: out + steering["strength"])
    for steering["strength"] in (0.1, 3.0):
        got = engine.prefill(PROMPT).logits[0]
        torch.testing.assert_close(got, full_logits(model, PROMPT)[-1], atol=1e-3, rtol=0)


def test_nothing_recorded_or_compiled_runs_while_there_are_hooks():
    """A recorded step would call a hook once, when it is recorded."""
    model, seen = tiny_llama(), []
    engine = Engine(model, graph=True)
    engine.runner.compiled = pytest.fail
    assert isinstance(engine.batch(1, 8), GraphBatch)
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(1))
    assert engine.generate(PROMPT, max_new_tokens=4).n_new == 4
    assert len(seen) == 4
    assert type(engine.batch(1, 8)) is Batch
    handle.remove()
    engine.runner.compiled = None
    engine.generate(PROMPT, max_new_tokens=1)
    assert isinstance(engine.batch(1, 8), GraphBatch)


@torch.no_grad()
def test_a_tiny_edit_is_for_model_changed():
    model = tiny_llama(hidden_size=64)
    weight = model.get_submodule(LAYER).weight
    weight.data.flatten()[1] += 0.0
    engine = Engine(model)
    old = engine.prefill(PROMPT).logits
    weight.data[3, 2] += 5.0
    engine.model_changed()
    new = engine.prefill(PROMPT).logits[0]
    assert not torch.equal(new, old[0])
    torch.testing.assert_close(new, full_logits(model, PROMPT)[-1], atol=1e-3, rtol=0)


def test_a_state_from_before_goes_on_after_edits_but_not_with_other_modules():
    model = tiny_llama()
    engine = Engine(model)
    state = engine.prefill(PROMPT)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    engine.prefill([5])
    engine.step(state, [7])
    replaced(model)
    engine.prefill([5])
    with pytest.raises(HandloomError, match=r"before the modules of its model changed, and this is Engine\("):
        engine.step(state, [7])


def test_another_engines_state_is_refused_naming_both():
    one, two = Engine(tiny_llama()), Engine(tiny_llama(), slots=3)
    state = one.prefill(PROMPT)
    for use in (lambda s: two.step(s, [1]), lambda s: two.extend(s, [[1, 2]]), lambda s: two.score(s, [[1]])):
        with pytest.raises(HandloomError, match=r"made by Engine\(.*slots=8.*this is Engine\(.*slots=3"):
            use(state)
    with pytest.raises(HandloomError, match=r"slots=3.*slots=8"):
        type(state).concat([state, two.prefill(PROMPT)])


def test_memory_decides_on_the_layout(monkeypatch, caplog):
    monkeypatch.setattr(blocked, "SMALLEST", 1)
    model = tiny_llama()
    size = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))

    def copies_of(layout, free):
        monkeypatch.setattr(copies, "free_memory", lambda: free)
        with caplog.at_level("INFO", logger="handloom"):
            engine = Engine(model, layout=layout)
        return sum(isinstance(m, copies.Copied) for m in engine.runner.module.modules())

    assert copies_of("auto", 2 * size) == 15
    assert f"copies of {size / 1e6:.0f} MB" in caplog.text
    assert copies_of("auto", 2 * size - 1) == 0
    assert "layout='blocked' makes them all the same" in caplog.text
    assert copies_of("blocked", 0) == 15
    assert copies.free_memory() == 0
    monkeypatch.undo()
    assert 1e6 < copies.free_memory() <= float("inf")


@torch.no_grad()
def test_blocked_copies_leave_the_model_whole(monkeypatch):
    monkeypatch.setattr(blocked, "SMALLEST", 1)
    model = tiny_llama()
    whole = {name: id(p) for name, p in model.named_parameters()}
    engine = Engine(model, layout="blocked")
    assert {name: id(p) for name, p in model.named_parameters()} == whole
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 15
    state = engine.prefill(PROMPT)
    model.lm_head.weight.mul_(0)  # between two steps: the copy remembers the version
    assert engine.step(state, [7]).logits.abs().max() == 0


@torch.no_grad()
def test_the_fingerprint_sees_nothing_where_nothing_is_and_says_what_it_sees():
    model = tiny_llama()
    seen = Fingerprint(model)
    full_logits(model, PROMPT)
    assert not seen.changes()
    model.model.layers[1].self_attn.scaling = 2.0
    assert seen.changes().attributes == [(model.model.layers[1].self_attn, ["scaling"])]
    model.model.norm.weight.data.add_(1)
    changes = seen.changes()
    assert (changes.values, changes.moved, str(changes)) == (True, False, "values")
    model.to(torch.bfloat16)
    assert seen.changes().modules
    assert not seen.changes()


def test_adapters_of_peft_act_and_are_followed(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(blocked, "SMALLEST", 1)
    model = tiny_llama()
    engine = Engine(model, layout="blocked")
    tolerance = {"atol": 1e-3, "rtol": 0}
    base = engine.prefill(PROMPT).logits[0]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    with_adapter = full_logits(adapted, PROMPT)[-1]
    assert (with_adapter - base).abs().max() > 0.01
    torch.testing.assert_close(engine.prefill(PROMPT).logits[0], with_adapter, **tolerance)
    with adapted.disable_adapter():
        torch.testing.assert_close(engine.prefill(PROMPT).logits[0], base, **tolerance)
    torch.testing.assert_close(engine.prefill(PROMPT).logits[0], with_adapter, **tolerance)

    other = Engine(adapted, layout="blocked")
    assert other.capabilities.path == "attention"
    answers = [
        other.generate(PROMPT, max_new_tokens=6).token_ids,
        engine.generate(PROMPT, max_new_tokens=6).token_ids,
    ]
    assert answers[0] == answers[1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 10.0)
    adapted(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    optimizer.step()
    for each in (engine, other):
        got = each.prefill(PROMPT).logits[0]
        assert (got - with_adapter).abs().max() > 0.01
        torch.testing.assert_close(got, full_logits(adapted, PROMPT)[-1], **tolerance)
    merged = adapted.merge_and_unload()
    want = full_logits(merged, PROMPT)[-1]
    torch.testing.assert_close(engine.prefill(PROMPT).logits[0], want, **tolerance)


def test_prompt_learning_is_refused_with_the_reason():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(HandloomError, match="positions of its own before the prompt"):
        Engine(peft.get_peft_model(tiny_llama(), config))


def cost(model, rounds=20) -> float:
    """Microseconds of one look at a model, the median."""
    seen, times = Fingerprint(model), []
    for _ in range(rounds):
        start = time.perf_counter()
        seen.changes()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    import sys

    from transformers import AutoModelForCausalLM

    for name in sys.argv[1:]:
        loaded = AutoModelForCausalLM.from_pretrained(name)
        print(name, f"{cost(loaded):.0f} us, {len(list(loaded.modules()))} modules")  # noqa: T201
