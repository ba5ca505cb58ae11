"""Passes over prompts and States as programs: equal to eager passes while rows come, fork, rewind and go.

Without CUDA they are recorded and replayed by `recorded_graph`, through the same code.
"""

import re

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked, tiny_llama
from recorded_graph import Recorder, Recording, install

from handloom import CapabilityError, Engine, HandloomError, SamplingParams
from handloom.cache.feed import Feed, Lines, grid_numbers, packed_numbers
from handloom.cache.pool import RESERVED, TRASH, ZERO
from handloom.forward.programs import recorded as programs_module
from handloom.forward.programs.capture import Letter
from handloom.forward.programs.programs import bucket

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
NAMES = ["llama", "gemma2", "gpt_oss", "mixtral", "gpt2", "mistral_sw", "bloom", "deepseek_v3"]


@pytest.fixture
def recorders(monkeypatch):
    """The recorders of all batches; on a machine with CUDA there is nothing to stand in for."""
    return install(monkeypatch) if not ON_CUDA else []


def engines(name, **options):
    """An engine whose passes run as they are, and one that records them, over one model."""
    model = ARCHITECTURES[name]().to(DEVICE)
    options = {"slots": 3, "block_size": 4} | options
    return Engine(model, graph=False, **options), Engine(model, graph=True, **options)


def program_of(engine):
    """A run over States that forks, rewinds and drops rows; the logits of every real token that it met."""
    seen = []

    def note(state):
        if state.all_logits is None:
            seen.extend(state.logits)
        else:
            seen.extend(row[:count] for row, count in zip(state.all_logits, state.counts, strict=True))
        return state

    def best(state):
        return state.logits.argmax(-1)

    first = state = note(engine.prefill(prompts_of([5, 17, 2])))
    for turn in range(3):
        state = note(engine.step(state, best(state)))
        state = state.select([0, 0, 2, 1]) if turn == 1 else state  # one row forks
    longer = note(engine.extend(state, [[1, 2, 3], [4, 5], [6], [7, 8, 9]]))
    state = longer.keep([2, 1, 1, 0])  # rewound, each by its own count
    state = note(engine.step(state, best(state)))
    state = note(engine.step(state.select([3, 1]), [8, 9]))
    seen.append(engine.score(state, [[1, 2, 3], [4, 5, 6]]))
    note(engine.step(first, best(first)))  # an old State goes on
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_states_as_programs_equal_eager_ones_while_rows_fork_rewind_and_go(name, recorders):
    eager, program = engines(name)
    want = program_of(eager)
    for _ in range(3):  # as they are, then replayed
        have = program_of(program)
        for ours, theirs in zip(have, want, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    kept = program.runner.recorded.programs
    assert (len(kept) >= 3, kept.refused) == (True, {})
    del want, have
    assert_nothing_leaked(program)


def test_the_host_reads_the_tokens_of_a_step_while_its_pass_runs(recorders, monkeypatch):
    """They go from the device to the pass; what is wrong with them is told afterwards, and harms nobody."""
    if ON_CUDA:
        pytest.skip("follows the calls of the stand-in")
    eager, program = engines("llama")
    told = []
    for kind, name in ((Recording, "replay"), (Letter, "read"), (programs_module, "send")):
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda *given, name=name, original=original: (told.append(name), original(*given))[1]
        )
    state, other = program.prefill(prompts_of([5, 9])), eager.prefill(prompts_of([5, 9]))
    for _ in range(9):  # over the ends of blocks
        told.clear()
        tokens = state.logits.argmax(-1)
        state, other = program.step(state, tokens), eager.step(other, tokens)
        torch.testing.assert_close(state.logits, other.logits, **CLOSE)
    assert (state.tokens, told) == (
        other.tokens,
        ["replay", "send", "read"],
    )  # what is sent is of the next step
    with pytest.raises(HandloomError, match=r"row 1: token id 100000 is not in 0\.\."):
        program.step(state, torch.tensor([3, 100000]))
    with pytest.raises(HandloomError, match="1 rows of tokens for a State of 2 rows"):
        program.step(state, torch.tensor([3]))
    again, want = program.step(state, torch.tensor([3, 4])), eager.step(other, torch.tensor([3, 4]))
    torch.testing.assert_close(again.logits, want.logits, **CLOSE)
    picked = program.step(again.select([1]), torch.tensor([7]))  # fewer rows in another shape
    torch.testing.assert_close(picked.logits, eager.step(want.select([1]), torch.tensor([7])).logits, **CLOSE)
    del state, other, again, want, picked
    assert_nothing_leaked(program)


def test_a_step_that_was_made_ready_is_that_of_its_state_alone(recorders):
    """Siblings that wrote first, hidden states, other rows, a pool that moved, the greatest length: all begin anew."""
    eager, program = engines("llama", block_size=8, max_length=34)
    passes = program.runner.recorded

    def walk(engine):
        seen, taken = [], []
        again = passes.again

        def noted(*given):
            taken.append((found := again(*given)) is not None)
            return found

        def step(state, ids, **options):
            state = engine.step(state, torch.tensor(ids, device=DEVICE), **options)
            seen.append(state)
            return state

        passes.again = noted
        first = step(step(engine.prefill([[3, 4], [6, 7]]), [1, 2]), [3, 4])
        told = engine.step(first, [5, 6])  # tokens of the host, where those of the device were expected
        assert torch.equal(engine.extend(first, [[5], [6]]).logits, told.logits)
        seen.append(told)
        longer = engine.extend(first, [[9, 9], [9, 9]])  # it writes where the next step of `first` would
        step(first, [5, 6])
        other = step(first, [7, 8])
        step(longer.keep([1, 1]), [1, 2])
        last = step(other, [2, 1], hidden=True)
        last = step(last, [2, 1], hidden=True)
        step(last, [3, 3])
        last = step(seen[-1].select([1, 0]), [4, 5])
        if engine is program:
            engine.pool._resize(engine.pool.capacity + 8)
        for turn in range(25):
            last = step(last, [turn, 2 * turn])
        del passes.again
        with pytest.raises(HandloomError, match="row 0 would have 35 tokens, more than max_length=34"):
            step(last, [1, 1])
        return seen, taken

    (want, _), (have, taken) = walk(eager), walk(program)
    for ours, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
        assert ours.tokens == theirs.tokens
    assert [turn for turn, ready in enumerate(taken[:9]) if ready] == [1, 6]
    assert sum(taken[9:]) == 25 - 1 - 3  # the pool has moved; new blocks at 16, 24 and 32
    del want, have, ours, theirs
    assert_nothing_leaked(program)


def test_inference_mode_comes_and_goes(recorders):
    """What is made while it is on, cells of a pool that grows among it, is written to when it is off."""

    def walk(engine, inside, outside=False):
        params = [SamplingParams(max_new_tokens=6, repetition_penalty=1.2), SamplingParams(max_new_tokens=6)]
        with torch.inference_mode(inside):
            state = engine.step(engine.prefill([[3, 4], [6, 7]]), torch.tensor([1, 2], device=DEVICE))
            stream = engine.stream([[5, 3], [8]], params)
            tokens = [next(stream).token_id]
        with torch.inference_mode(outside):
            for turn in range(3):
                state = engine.step(state, torch.tensor([turn, 2], device=DEVICE))
            tokens += [event.token_id for event in stream]
            texts = engine.generate([[5, 3], [8] * 70], params)
        return state.logits, tokens + [text.token_ids for text in texts]

    logits, tokens = walk(engines("llama")[0], False)
    with torch.inference_mode():
        inside = engines("llama")
    for engine in (*engines("llama"), *inside):
        have, told = walk(engine, True)
        torch.testing.assert_close(have, logits, **CLOSE)
        assert (told, walk(engine, False, True)[1]) == (tokens, tokens)


# What a graph cannot hold: told when the engine is made, or by the pass itself, which then runs as it is.
NO_GRAPH = {"llama_dynamic_ntk", "phi3_longrope", "gpt_neo", "glm_moe_dsa", "llama4_text", "recurrent_gemma"}
UNRECORDED = {
    "gemma3n_text",
    "falcon_rope",
    "falcon_alibi",
}  # they make tensors of the host's numbers in each pass


def beside_a_stream(engine):
    """Tokens of requests that take each other's slots, and what a State says that forks and rewinds meanwhile."""
    params = [SamplingParams(max_new_tokens=n, temperature=n % 2, seed=n) for n in (4, 2, 2, 3)]
    engine.pool.reserve(80)  # where cells move, everything is recorded anew
    first = state = engine.prefill(prompts_of([7, 12]))
    tokens, logits = [], [*state.logits]
    for event in engine.stream(prompts_of([6, 13, 9, 5], seed=6), params):
        tokens.append((event.request, event.token_id))
        if len(tokens) == 1 and engine.capabilities.extend:
            state = engine.extend(state, [[1, 2], [3]])
            logits += [row[:count] for row, count in zip(state.all_logits, state.counts, strict=True)]
            state = state.keep([1, 0])
        elif len(tokens) in (2, 4, 5, 7):
            state = engine.step(state, state.logits.argmax(-1))
        elif len(tokens) == 6:
            state = state.select([1, 0, 1])
        elif len(tokens) == 9:
            state = engine.step(first, [7, 8])  # an old one
        logits += [*state.logits]
    assert len(tokens) == 11
    return sorted(tokens), logits, state.tokens


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - NO_GRAPH))
def test_every_architecture_says_as_programs_what_it_says_eagerly(name, recorders):
    eager, program = engines(name, slots=2)
    want, have = beside_a_stream(eager), beside_a_stream(program)
    assert (have[0], have[2]) == (want[0], want[2])
    for ours, theirs in zip(have[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    kept = [batch.programs for batch in program._batches.values()]
    kept += [] if program.runner.recorded is None else [program.runner.recorded.programs]
    assert {bool(each.refused) for each in kept} == {name in UNRECORDED}
    if name not in UNRECORDED and not ON_CUDA:
        assert kept[0].recorder.replays >= 4
        used = {key[0] for each in kept[1:] for key, found in each._kept.items() if found.graph.replays}
        assert used >= ({"grid", "packed"} if program.runner.packs else {"grid"}) or not kept[1:]
    del want, have
    assert_nothing_leaked(program)


@pytest.mark.parametrize("name", sorted(NO_GRAPH))
def test_what_cannot_be_recorded_says_why_when_its_engine_is_made(name):
    model = ARCHITECTURES[name]()
    why = Engine(model).capabilities.graph.reason
    with pytest.raises(CapabilityError, match=f"graph=True: {re.escape(why)}"):
        Engine(model, graph=True)


def test_a_shape_serves_every_pass_that_fits_in(recorders):
    eager, program = engines("llama")
    prompts = [prompts_of([length])[0] for length in (17, 18, 20, 19)]
    for prompt in prompts:
        torch.testing.assert_close(program.prefill(prompt).logits, eager.prefill(prompt).logits, **CLOSE)
        program.pool.forget_prefixes()
        program.runner.recorded.programs.catch_up()
    assert len(program.runner.recorded.programs) == 2  # 18 and 20 tokens


def test_prompts_packed_into_programs_are_those_of_eager_passes(recorders):
    """Samples of one prompt, shared beginnings, log-probabilities of a prompt and embeddings among them."""
    eager, program = engines("llama", slots=4, prefill_chunk=32)
    prompts = prompts_of([5, 40, 17, 3, 26, 9])
    prompts[5] = [*prompts[4][:11], *prompts[5]]
    params = [SamplingParams(max_new_tokens=5, temperature=i % 2, seed=i) for i in range(6)]
    params[1], params[2] = params[1].replace(n=2), params[2].replace(prompt_logprobs=1)
    words = eager.model.get_input_embeddings().weight.detach()
    for turn in range(3):
        given = [[turn, *prompt] for prompt in prompts]
        given[3] = words[given[3]]
        want, got = eager.generate(given, params), program.generate(given, params)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours.token_ids, ours.sample) == (theirs.token_ids, theirs.sample)
            told, known = ours.prompt_logprobs or [0], theirs.prompt_logprobs or [0]
            assert told[1:] == pytest.approx(known[1:], abs=1e-4)
        assert len(got[3].prompt_logprobs) == 18
    assert program.runner.recorded.programs.refused == {}
    del want, got, given
    assert_nothing_leaked(program)


def test_of_more_shapes_than_are_kept_the_one_unused_longest_goes(recorders, monkeypatch):
    monkeypatch.setattr(programs_module, "KEPT", 2)
    eager, program = engines("llama")
    passes = program.runner.recorded.programs
    for length in (5, 20, 40, 20, 60):
        prompt = prompts_of([length], seed=length)
        torch.testing.assert_close(program.prefill(prompt).logits, eager.prefill(prompt).logits, **CLOSE)
        program.pool.forget_prefixes()
        passes.catch_up()
    assert [key[1] for key in passes._kept] == [20, 60]  # 40 had gone unused for longer


def test_kernels_read_no_cell_beyond_a_row(recorders):
    """So where they read, as on CUDA, no block has to be zeroed before it is used."""
    eager, program = engines("llama", slots=4, block_size=8)
    prompts = prompts_of([5, 40, 17, 3, 26, 9])
    want = eager.generate(prompts, max_new_tokens=12)
    program.pool.scrub = False
    for store in program.pool.stores:
        store.keys[:, RESERVED:], store.values[:, RESERVED:] = torch.nan, torch.nan
    for _ in range(2):
        got = program.generate(prompts, max_new_tokens=12)
        assert [g.token_ids for g in got] == [g.token_ids for g in want]
        program.pool.forget_prefixes()
    state, other = program.prefill(prompts[:2]), eager.prefill(prompts[:2])
    for _ in range(4):
        tokens = other.logits.argmax(-1)
        state, other = program.step(state, tokens), eager.step(other, tokens)
        torch.testing.assert_close(state.logits, other.logits, **CLOSE)


def test_with_fixed_slots_a_prompt_has_the_same_bits_beside_any_others(recorders):
    model, prompts = tiny_llama(), prompts_of([5, 40, 17, 3])
    engine = Engine(model, slots=4, fixed_slots=True, graph=True, prefill_chunk=16, block_size=4)
    together = engine.generate(prompts, max_new_tokens=4)
    for _ in range(2):
        for prompt, answer in zip(prompts, together, strict=True):
            alone = engine.generate(prompt, max_new_tokens=4)
            assert (alone.token_ids, alone.raw_logprobs) == (answer.token_ids, answer.raw_logprobs)


def test_after_a_warm_up_nothing_is_recorded_for_what_was_announced(recorders, capsys):
    _, program = engines("llama")
    asked = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=6)
    took = program.warm_up(asked, rows=(1, 3), tokens=(16,))
    assert f"warmed up in {took:.1f} s" in capsys.readouterr().err
    before = [len(b.programs) for b in program._batches.values()], len(program.runner.recorded.programs)
    program.generate(prompts_of([16, 15, 14]), asked.replace(seed=3))
    program.generate(prompts_of([13]), asked.replace(temperature=1.1))
    after = [len(b.programs) for b in program._batches.values()], len(program.runner.recorded.programs)
    assert before == after or ON_CUDA
    assert_nothing_leaked(program)


def test_the_first_token_does_not_wait_for_a_recording(recorders, monkeypatch):
    if ON_CUDA:
        pytest.skip("follows the calls of the stand-in")
    _, program = engines("llama", slots=1)
    told, original = [], Recorder.record
    monkeypatch.setattr(
        Recorder, "record", lambda self, *steps: (told.append("recorded"), original(self, *steps))[1]
    )
    told.extend(event.token_id for event in program.stream(prompts_of([9]), max_new_tokens=4))
    assert told[0] != "recorded"
    assert len([what for what in told if what != "recorded"]) == 4
    assert "recorded" in told


def test_surplus_tokens_and_rows_write_to_the_trash_alone():
    engine = Engine(tiny_llama(), block_size=4)
    table = engine.prefill(prompts_of([6])).rows[0].table
    numbers, shape = grid_numbers([[7, 8], [9]], [4, 2], [table, table], 4, (4, 4, 8))
    feed = Feed.grid(torch.from_numpy(numbers), *shape)
    real = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]).bool()
    assert (feed.cells[~real] == TRASH * 4).all()
    assert (feed.cells[real] // 4 == torch.tensor([table.blocks[1]] * 2 + [table.blocks[0]])).all()
    assert feed.positions[real].tolist() == [4, 5, 2]
    assert (feed.block_table[2:] == ZERO).all()
    numbers, shape = packed_numbers([[7, 8], [9]], [4, 2], [table, table], 4, (8, 4, 8))
    feed = Feed.unpacked(torch.from_numpy(numbers), *shape)
    assert (feed.cells[0, 3:] == TRASH * 4).all()
    assert (feed.starts.tolist(), feed.valid().tolist(), feed.last.tolist()) == (
        [0, 2, 3, 3, 3],
        [6, 3, 0, 0],
        [1, 2, 0, 0],
    )


def test_buckets_waste_an_eighth_at_most():
    for count in range(1, 5000):
        assert count <= bucket(count, 8) <= max(16, count * 9 / 8 + 1)
    assert len({bucket(count, 8) for count in range(1, 4097)}) == 1 + 8 * 8


def test_numbers_of_steps_are_those_that_are_written_anew():
    """Rows that go on, get blocks, leave, and others in their place."""
    pool = Engine(tiny_llama(), block_size=4).pool
    lines, held = Lines(4, 8, 4), [pool.writable(pool.table(), 0, n) for n in (9, 2, 5)]
    for begins, tables in (
        ([8, 1, 4], held),
        ([9, 2, 5], held),  # a token further: the same blocks
        ([12, 3, 6], [pool.writable(held[0], 12, 1), *held[1:]]),
        ([7], held[2:]),
        ([0, 7], [held[1], held[2]]),
    ):
        ids = [[10 + row] for row in range(len(begins))]
        want, _ = grid_numbers(ids, begins, tables, 4, (4, 1, 8))
        assert lines.fill([row[0] for row in ids], begins, tables)[4:].tolist() == want[4:].tolist()
        assert lines.ids[: len(begins)].tolist() == [row[0] for row in ids]


def test_a_second_prompt_of_similar_length_replays_the_pass_of_the_first(recorders):
    if ON_CUDA:
        pytest.skip("counts the replays of the stand-in")
    _, program = engines("llama", slots=1)
    passes = program.runner.recorded.programs
    program.generate(prompts_of([20])[0], max_new_tokens=2)
    recorder, recorded = passes.recorder, len(passes)
    before = recorder.warm_ups, recorder.replays
    program.generate([9, *prompts_of([18])[0]], max_new_tokens=2)
    assert (recorder.warm_ups, recorder.replays) == (before[0], before[1] + 1)
    assert len(passes) == recorded == 1
