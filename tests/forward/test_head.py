"""Engine.head: hidden states of any layer to logits, by the model's own modules, on every architecture."""

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import tiny_llama

from handloom import CapabilityError, Engine
from handloom.forward.head import Head

SEVERAL_STREAMS = {"gemma3n_text"}  # its hidden states are four vectors a token


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_the_last_hidden_state_gives_the_logits(name):
    model = ARCHITECTURES[name]().eval()
    if name in SEVERAL_STREAMS:
        with pytest.raises(CapabilityError, match="one vector a token"):
            Head(model)
        return
    head, unnormed = Head(model), []
    handle = head.norm.register_forward_pre_hook(lambda _, inputs: unnormed.append(inputs[0]))
    out = model(torch.tensor([[5, 9, 3, 8]]), use_cache=False, output_hidden_states=True)
    handle.remove()
    wanted, last = out.logits[0].float(), out.hidden_states[-1][0]
    torch.testing.assert_close(head(last, norm=False), wanted, rtol=0, atol=1e-4)
    before = unnormed[0].reshape(last.shape) if unnormed else last
    torch.testing.assert_close(head(before), wanted, rtol=0, atol=1e-4)


def test_inner_layers_by_hand_and_the_model_is_untouched():
    model = tiny_llama(num_hidden_layers=3)
    engine = Engine(model)
    state = engine.prefill([[5, 9, 3], [8, 8, 2]], hidden=True)
    hooks = [len(part._forward_hooks) for part in model.modules()]
    inner = state.hidden(1)[:, -1]
    torch.testing.assert_close(engine.head(inner), model.lm_head(model.model.norm(inner)).detach())
    torch.testing.assert_close(engine.head(inner, norm=False), model.lm_head(inner).detach())
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # the modules are the model's own
    torch.testing.assert_close(engine.head(inner, norm=False), model.lm_head(inner).detach())


def test_a_cap_on_the_logits_is_kept():
    engine = Engine(ARCHITECTURES["gemma2"]())
    state = engine.prefill([[5, 9, 3]], hidden=True)
    torch.testing.assert_close(
        engine.head(state.hidden()[:, -1], norm=False), state.logits, rtol=0, atol=1e-4
    )
