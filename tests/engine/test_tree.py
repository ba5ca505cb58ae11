"""Trees of drafts: scored in one pass as separate extensions would be, one path committed, every State still usable."""

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked, recorded, tiny_llama
from recorded_graph import install

from handloom import CapabilityError, Engine, HandloomError

TREE = [-1, 0, 0, 1, -1, 4, 3]  # two children of the row, and paths 0 1 3 6, 0 2, 4 5
PATHS = [[0, 1, 3, 6], [0, 2], [4, 5]]
NAMES = ["llama", "gemma2", "gpt_oss", "gpt2", "mistral_sw", "mixtral"]


def drafts(rows):
    return [[(11 * row + 7 * place + 3) % 97 for place in range(len(TREE))] for row in range(rows)]


@pytest.fixture(params=["plain", "recorded"])
def program(request, monkeypatch):
    """Options of an engine whose passes run as they are, or are recorded and replayed."""
    if request.param == "recorded" and not torch.cuda.is_available():
        install(monkeypatch)
    return {"graph": request.param == "recorded"}


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_scored_as_separate_extensions(name, program):
    engine = Engine(ARCHITECTURES[name](), block_size=4, **program)
    assert engine.capabilities.tree
    state = engine.prefill(prompts_of([9, 3, 14]))
    tokens = drafts(3)
    for _ in range(3):  # the first pass runs as it is, later ones are replayed
        tree = engine.tree_step(state, tokens, TREE)
        assert torch.equal(tree.logits, state.logits)
        assert tree.tokens == state.tokens
        for path in PATHS:
            line = engine.extend(state, [[row[place] for place in path] for row in tokens])
            scale = line.all_logits.std().clamp_min(1)
            assert (tree.all_logits[:, path] - line.all_logits).abs().max() <= 1e-4 * scale
        if engine.runner.recorded is not None:
            engine.runner.recorded.programs.catch_up()
    del state, tree, line
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_path_goes_on_as_its_extension_does(name, program):
    engine = Engine(ARCHITECTURES[name](), block_size=4, **program)
    state, tokens = engine.prefill(prompts_of([9, 3, 14])), drafts(3)
    tree = engine.tree_step(state, tokens, TREE)
    for chosen in ([PATHS[0], PATHS[2], PATHS[1]], [PATHS[2]] * 3, [[], [0], PATHS[0]]):
        kept = tree.keep_path(chosen)
        assert kept.tokens == [
            before + [row[place] for place in path]
            for before, row, path in zip(state.tokens, tokens, chosen, strict=True)
        ]
        for i, path in enumerate(chosen):
            alone = state.select([i])
            line = engine.extend(alone, [[tokens[i][place] for place in path]]) if path else alone
            torch.testing.assert_close(kept.logits[i], line.logits[0], atol=1e-4, rtol=1e-4)
            after, want = engine.step(kept.select([i]), [5]), engine.step(line, [5])
            torch.testing.assert_close(after.logits, want.logits, atol=1e-4, rtol=1e-4)
    fresh = Engine(engine.model)
    want = fresh.extend(fresh.prefill(prompts_of([9, 3, 14])), [[1, 2]] * 3)
    again = engine.extend(state, [[1, 2]] * 3)  # the State before the tree goes on
    torch.testing.assert_close(again.all_logits, want.all_logits, atol=1e-4, rtol=1e-4)
    del state, tree, kept, alone, line, after, again
    assert_nothing_leaked(engine)


def test_a_path_along_the_first_drafts_is_kept_without_a_copy():
    engine = Engine(tiny_llama(), block_size=4)
    tree = engine.tree_step(engine.prefill(prompts_of([9])), drafts(1), [-1, 0, 1, 2, 2, 0, -1])
    copies = engine.pool.copies
    kept = tree.keep_path([[0, 1, 2, 3]])
    assert kept.rows[0].table is tree.drafts.tables[0]
    assert engine.pool.copies == copies


def test_trees_of_different_sizes_forks_and_paths_with_an_end():
    engine = Engine(tiny_llama(), block_size=4)
    state = engine.prefill(prompts_of([9, 3]))
    tokens = [drafts(1)[0], [4]]
    tree = engine.tree_step(state, tokens, [TREE, [-1]]).select([1, 0, 0])
    kept = tree.keep_path(torch.tensor([[0, -1, -1, -1], [0, 1, 3, 6], [4, 5, -1, -1]]))
    for i, (row, path) in enumerate([(1, [0]), (0, PATHS[0]), (0, PATHS[2])]):
        want = engine.extend(state.select([row]), [[tokens[row][place] for place in path]])
        torch.testing.assert_close(kept.logits[i], want.logits[0], atol=1e-4, rtol=1e-4)
        assert kept.tokens[i] == want.tokens[0]
    back = kept.keep([0, 2, 1])  # it is a State that an extension made
    assert [len(row) for row in back.tokens] == [3, 11, 10]
    torch.testing.assert_close(back.logits[0], state.logits[1])


def test_a_tree_step_is_one_pass():
    engine = Engine(tiny_llama())
    state = engine.prefill(prompts_of([9, 3]))
    with recorded(engine.model) as passes:
        tree = engine.tree_step(state, drafts(2), TREE, hidden=True)
    assert passes.shapes == [(2, len(TREE))]
    kept = tree.keep_path([PATHS[0], PATHS[1]])
    line = engine.extend(
        state, [[drafts(2)[0][p] for p in PATHS[0]], [drafts(2)[1][p] for p in PATHS[1]]], hidden=True
    )
    torch.testing.assert_close(kept.hidden(), line.hidden(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "jamba", "gpt_neo"])
def test_models_that_take_lines_only_say_so(name):
    engine = Engine(ARCHITECTURES[name]())
    assert not engine.capabilities.tree
    with pytest.raises(CapabilityError, match="extend takes lines"):
        engine.tree_step(engine.prefill([[1, 2, 3]]), [[4, 5]], [-1, -1])


def test_what_is_no_tree_or_no_path_is_refused():
    engine = Engine(tiny_llama())
    state = engine.prefill(prompts_of([5, 4]))
    for parents, told in [
        ([0, 0], "parent of draft 0 is 0"),
        ([-1, -2], "parent of draft 1 is -2"),
        ([-1], "1 parents for 2 drafts"),
        ([[-1, 0]], "1 rows of parents for 2 rows"),
    ]:
        with pytest.raises(HandloomError, match=told):
            engine.tree_step(state, [[1, 2], [3, 4]], parents)
    tree = engine.tree_step(state, [[1, 2], [3, 4]], [-1, 0])
    for paths, told in [
        ([[1], []], "draft 1 hangs on 0, not on -1"),
        ([[0, 2], []], "draft 2 is not in 0..1"),
        ([[0]], "1 paths for a State of 2 rows"),
    ]:
        with pytest.raises(HandloomError, match=told):
            tree.keep_path(paths)
    with pytest.raises(HandloomError, match="keep_path commits one path"):
        tree.keep([1, 1])
    with pytest.raises(HandloomError, match="made by tree_step"):
        state.keep_path([[], []])
