"""The host's share of a step and of an admission, where replays cost nothing: exact counts."""

import pytest
import torch

from benchmarks.decode.host import Host, Nothing, timed

# Calls of Python functions at commit 639ff78, by the same command: steps and admissions of 1 and 16 rows.
STEP, ADMISSION = {1: 63.2, 16: 342}, {1: 707, 16: 9201}
LAUNCH = {1: 56, 16: 204}  # before the launch of a State's step, at commit db98d47


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in records on a CPU")
@pytest.mark.parametrize("rows", STEP)
def test_a_step_takes_half_of_the_calls_that_it_took(rows):
    host = Host(rows, "greedy")
    calls = host.calls()
    assert calls["calls_per_step"] <= STEP[rows] / 2
    assert calls["calls_per_admission"] <= ADMISSION[rows] / 2
    assert host.state_calls()["calls_before"] <= LAUNCH[rows] / 2


def test_the_count_itself():
    class Two(Host):
        def __init__(self):
            self.within = False

        def run(self, new):
            for _ in range(new + 5):
                self.step()

        def step(self):
            self.within = True
            len([self.forward()])
            self.within = False

        def forward(self):
            return None

    # Each step is one call, what happens in the forward is none; `run` is one, and the profile's end counts nothing.
    assert Two().calls() == {"calls_per_step": 1, "calls_per_admission": 6}


def test_a_step_of_a_state_is_counted_before_and_after_its_launch():
    class Passes(Host):
        def __init__(self):
            self.rows, self.engine, self.within, self.note = 1, self, False, None

        def prompts(self):
            return self

        def prefill(self, prompts):
            return prompts

        def step(self, state, tokens):
            self.prompts()
            Nothing().replay()
            self.prompts(), self.prompts()
            return state

    replay = Nothing.replay
    assert Passes().state_calls() == {"calls_before": 4, "calls_after": 3}  # with `step`, and the clock's own
    assert Nothing.replay is replay


def test_each_call_of_a_method_is_timed_for_as_long_as_it_is_asked_for():
    class Kind:
        def prepare(self, fails=False):
            return 1 / (not fails)

    spent, original = [], Kind.prepare
    with timed(Kind, "prepare", spent):
        assert Kind().prepare() == 1
        with pytest.raises(ZeroDivisionError):
            Kind().prepare(True)
    assert (len(spent), min(spent) >= 0, Kind.prepare) == (2, True, original)
