"""What the host reads from the device while it runs the loop and States: nothing but the results of steps.

Without CUDA the operations that wait there are counted by the dispatcher while recorded programs are replayed.
"""

import sys

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked
from recorded_graph import FORBIDDEN, HOST, install
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from handloom import Engine, SamplingParams
from handloom.cache import transfer
from handloom.forward.programs.capture import Letter
from handloom.loop import batch
from handloom.loop.batch import Step
from handloom.loop.loop import run
from handloom.loop.prefill import Prompts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in counts on a CPU")


class Waits(TorchDispatchMode):
    """Operations that would wait for a CUDA device, by name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if func._schema.name in FORBIDDEN or name in FORBIDDEN:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts outside of what may wait: uploads through pinned memory, and reading the results of a step."""
    install(monkeypatch)
    counting = Waits()

    def uncounted(original):
        def call(*args, **kwargs):
            with _disable_current_modes(), pytest.MonkeyPatch.context() as host:
                for name, method in HOST.items():
                    host.setattr(torch.Tensor, name, method)
                return original(*args, **kwargs)

        return call

    for name, original in (("upload", transfer.upload), ("send", transfer.send)):
        for module in [m for n, m in sys.modules.items() if n.startswith("handloom")]:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, uncounted(original))
    counting.uncounted = uncounted
    monkeypatch.setattr(Step, "read", uncounted(Step.read))
    for name, method in HOST.items():

        def read(tensor, *args, name=name, method=method, **kwargs):
            counting.seen.append(f"Tensor.{name}")
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)
    return counting


@pytest.mark.parametrize(("name", "rules"), [("llama", "greedy"), ("gpt_oss", "sampled")])
def test_the_host_waits_for_nothing_between_the_results_of_steps(name, rules, waits, monkeypatch):
    engine = Engine(ARCHITECTURES[name](), graph=True, slots=3, block_size=4, max_length=128)
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    params = [
        SamplingParams(max_new_tokens=5 + 2 * i, seed=i, **(sampled if rules == "sampled" else {}))
        for i in range(6)
    ]
    admitted, original = [], Prompts.compute
    monkeypatch.setattr(Prompts, "compute", lambda self: (admitted.append(len(self)), original(self))[1])
    for turn in range(3):  # twice to record
        prompts = [[turn, *prompt] for prompt in prompts_of([5, 9, 17, 3, 30, 8])]
        requests = engine.requests(prompts, params)
        waits.seen.clear(), admitted.clear()
        with waits:
            drawn = [event.request for event in run(engine, requests)]
    assert [drawn.count(i) for i in range(len(params))] == [p.max_new_tokens for p in params]
    assert len(admitted) >= 4
    assert waits.seen == []  # neither in steps nor in admissions
    assert_nothing_leaked(engine)


def test_the_count_itself(waits):
    with waits:
        torch.ones(3).sum().item()
        torch.ones(3).tolist()
        batch.upload([1, 2], torch.device("cpu"))
    assert waits.seen == ["aten::_local_scalar_dense", "Tensor.tolist"]


def test_a_step_of_a_state_waits_for_nothing_but_its_tokens(waits, monkeypatch):
    engine = Engine(ARCHITECTURES["llama"](), graph=True, slots=3, block_size=4, max_length=128)
    monkeypatch.setattr(Letter, "read", waits.uncounted(Letter.read))
    state = engine.prefill(prompts_of([5, 9]))
    for _ in range(7):
        tokens, before = state.logits.argmax(-1), len(engine.runner.recorded.programs)
        with waits:
            state = engine.step(state, tokens)
            assert state.lengths.shape == state.prompt_lengths.shape == (2,)
        if len(engine.runner.recorded.programs) > before:
            waits.seen.clear()  # it was recorded
    assert waits.seen == []
