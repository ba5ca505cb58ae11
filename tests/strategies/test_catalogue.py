"""The catalogue: every strategy is small, says what it costs, and gives real log-probabilities, times and events."""

import ast
import inspect
import io
import math
import tokenize
from pathlib import Path

import pytest
from helpers import assert_nothing_leaked, tiny_llama

from handloom import Engine, strategies
from handloom.strategies.modes import own_options

ROOM = Path(strategies.__file__).resolve().parent
LINES = 60  # of code, in the file of a strategy
LARGER = {
    "__init__.py",
    "modes.py",
    "kit/decode.py",
    "kit/requests.py",
}  # no strategies: names, fields, the kit
PROMPTS = [[5, 9, 17], [40]]
WARM = {"temperature": 1.0, "seed": 3}


def lines_of_code(path: Path) -> int:
    """Lines that hold something else than comments, docstrings and imports."""
    text, found = path.read_text(encoding="utf-8"), set()
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            found |= set(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(text)
    skipped = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    documented = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef))
    skipped += [node.body[0] for node in documented if ast.get_docstring(node)]
    return len(found - {line for node in skipped for line in range(node.lineno, node.end_lineno + 1)})


def test_a_file_holds_at_most_sixty_lines_of_code():
    sizes = {str(path.relative_to(ROOM)): lines_of_code(path) for path in ROOM.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > LINES and name not in LARGER} == {}


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(), slots=16)


@pytest.fixture(scope="module")
def other():
    return Engine(tiny_llama(num_hidden_layers=1), slots=16)


def zeros(texts, *_):
    return [0.0] * len(texts)


def by_length(generation):
    return generation.n_new


# strategy -> its options, from a second model; those for which another seed or temperature is needed name it
CASES = {
    "adaptive_contrastive_search": lambda o: {},
    "arithmetic_sampling": lambda o: {"n": 2, **WARM},
    "bayes_risk": lambda o: {"n": 2, **WARM},
    "beam_search": lambda o: {"num_beams": 2},
    "best_of_n": lambda o: {"n": 2, **WARM},
    "cautious": lambda o: {"marks": range(0, 101, 3), **WARM},
    "chain_of_thought": lambda o: {"k": 2},
    "classifier_free_guidance": lambda o: {},
    "constrained_beam_search": lambda o: {"constraints": [[30]]},
    "context_aware": lambda o: {"questions": [[9], [2]]},
    "contrastive_decoding": lambda o: {"amateur": o},
    "contrastive_search": lambda o: {},
    "deep_confidence": lambda o: {"answer": by_length, "n": 2, **WARM},
    "diverse_beam_search": lambda o: {"num_beams": 2},
    "dola": lambda o: {},
    "ensemble": lambda o: {"others": [o]},
    "experts": lambda o: {"expert": o},
    "exponential_watermark": lambda o: {"width": 1, **WARM},
    "frustratingly_simple": lambda o: {},
    "grammar_aligned": lambda o: {"allowed": lambda text: range(50), "iterations": 2, **WARM},
    "lookahead": lambda o: {"heuristic": zeros, "depth": 1},
    "power_sampling": lambda o: {"blocks": 2, "moves": 1, **WARM},
    "power_smc": lambda o: {"n": 2, **WARM},
    "scored": lambda o: {"scorer": zeros},
    "self_consistency": lambda o: {"answer": by_length, "n": 2, **WARM},
    "smc": lambda o: {"n": 2, "twist": zeros, **WARM},
    "speculative": lambda o: {"draft": [o, strategies.prompt_lookup], "num_draft": 2},
    "stochastic_beam": lambda o: {"k": 2, **WARM},
    "tree_search": lambda o: {"value": zeros, "simulations": 2},
    "weighted_rejection": lambda o: {"n": 2, "allowed": lambda text, token: token < 90, **WARM},
}
MIXED = {
    "mixture_of_inputs",
    "soft_thinking",
}  # their inputs are no tokens, so that no pass over the text tells
OTHERS = {
    "antislop",
    "decode",
    "early_exit",
    "generate",
    "rollout",
}  # text, the kit, and the engine's own call


def first_argument(name):
    value = getattr(strategies, name)
    return next(iter(inspect.signature(value).parameters)) if inspect.isfunction(value) else None


def streams(name):
    return "stream" in inspect.signature(getattr(strategies, name)).parameters


def test_every_strategy_is_here_and_says_what_a_token_costs():
    strategic = {name for name in strategies.__all__ if first_argument(name) == "engine"} - OTHERS
    assert strategic == CASES.keys() | MIXED
    for name in strategic | {"antislop"}:
        said = " ".join(inspect.getdoc(getattr(strategies, name)).split())
        assert " pass" in said, name


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_and_times_are_real(engine, other, name):
    """What a pass over the result says: the model's own log-probabilities; others are finite, and times in order."""
    results = getattr(strategies, name)(engine, PROMPTS, max_new_tokens=4, **CASES[name](other))
    assert [r.request for r in results] == sorted(r.request for r in results)
    assert {r.request for r in results} == {0, 1}
    for result in results:
        state = engine.prefill([result.prompt_token_ids])
        assert result.n_new == len(result.logprobs) == 4
        told = engine.score(state, [result.token_ids])[0].tolist()
        assert result.raw_logprobs == pytest.approx(told, abs=1e-4)
        assert all(math.isfinite(each) for each in result.logprobs)
        times = result.timings
        assert 0 <= times.queued <= times.first_token <= times.total
        assert times.prefill > 0
    del state
    assert_nothing_leaked(engine)
    assert_nothing_leaked(other)


@pytest.mark.parametrize("name", [name for name in [*CASES, *sorted(MIXED)] if streams(name)])
def test_events_tell_every_token(engine, other, name):
    strategy, options = getattr(strategies, name), CASES.get(name, lambda o: {})(other)
    results = {
        (r.request, r.sample): r.token_ids for r in strategy(engine, PROMPTS, max_new_tokens=4, **options)
    }
    told: dict = {}
    for event in strategy(engine, PROMPTS, max_new_tokens=4, stream=True, **options):
        told.setdefault((event.request, event.sample), []).append(event.token_id)
    assert told == results


def test_own_options_are_what_stands_beside_prompts_and_parameters():
    assert own_options(strategies.contrastive_search) == ["k", "alpha"]
    assert "num_beams" in own_options(strategies.beam_search)
