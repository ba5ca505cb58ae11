"""When a request ends and what it may show before; every token and text is written out by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import FIRST_BYTE, byte_fallback, byte_level, metaspace
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from handloom.errors import HandloomError, ParameterError
from handloom.loop.stopping import Emission, Progress, Stopper, StopSearch, is_huggingface_criterion
from handloom.params.sampling_params import SamplingParams

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id


def stopper(eos=(EOS,), prompt=(), max_total=None, tokenizer=TOKENIZER, clock=None, **fields) -> Stopper:
    params = SamplingParams(**fields)
    kwargs = {} if clock is None else {"clock": clock}
    return Stopper(params, tokenizer, eos, prompt, max_total, **kwargs)


def spell(text: str) -> list[int]:
    """One token per letter, so that token borders are everywhere."""
    return TOKENIZER.convert_tokens_to_ids(list(text))


def run(stopper: Stopper, ids) -> list[Emission]:
    """Push tokens until the request ends; what was emitted must be the text, and stay cut where it ended."""
    emissions = stopper.push_many(ids)
    if stopper.finish_reason is None:
        emissions.append(stopper.finish("cancelled"))
    assert "".join(e.text for e in emissions) == stopper.text == "".join(stopper.token_texts)
    assert len(stopper.token_texts) == len(stopper.token_ids)
    assert [e.finish for e in emissions[:-1]] == [None] * (len(emissions) - 1)
    return emissions


def ended(stopper: Stopper) -> tuple:
    return stopper.finish_reason, stopper.stop_reason, stopper.text, len(stopper.token_ids)


# Each reason alone


def test_eos_ends_without_text():
    s = stopper()
    assert run(s, [*spell("ab"), EOS, *spell("c")])[-1] == Emission("", "eos", EOS)
    assert s.token_ids == [*spell("ab"), EOS]
    assert s.text == "ab"


def test_any_of_several_eos_ids_and_the_reason_says_which():
    s = stopper(eos=(EOS, spell("x")[0]))
    run(s, spell("abx"))
    assert ended(s) == ("eos", spell("x")[0], "ab", 3)


def test_ignore_eos():
    s = stopper(ignore_eos=True, max_new_tokens=3)
    run(s, [*spell("a"), EOS, *spell("b")])
    assert ended(s) == ("length", "max_new_tokens", "ab", 3)


def test_eos_text_is_shown_on_request():
    for fields in ({"skip_special_tokens": False}, {"skip_special_tokens": False, "include_stop": True}):
        s = stopper(**fields)
        run(s, [*spell("a"), EOS])
        assert ended(s) == ("eos", EOS, "a</s>", 2)


def test_stop_tokens_end_without_text_unless_included():
    [b] = spell("b")
    s = stopper(stop_token_ids=(b,))
    run(s, spell("abc"))
    assert ended(s) == ("stop", b, "a", 2)
    s = stopper(stop_token_ids=(b,), include_stop=True)
    run(s, spell("abc"))
    assert ended(s) == ("stop", b, "ab", 2)


def test_max_new_tokens():
    s = stopper(max_new_tokens=2)
    emissions = run(s, spell("abc"))
    assert emissions == [("a", None, None), ("b", "length", "max_new_tokens")]


@pytest.mark.parametrize(("own", "engine", "new"), [(5, None, 2), (None, 5, 2), (9, 5, 2), (5, 9, 2)])
def test_the_lower_limit_on_prompt_and_output_holds(own, engine, new):
    s = stopper(prompt=spell("xyz"), max_length=own, max_total=engine)
    run(s, spell("abcdefgh"))
    assert ended(s) == ("length", "max_length", "abcdefgh"[:new], new)


def test_max_time_counts_from_admission():
    now = iter([100.0, 100.5, 101.9, 102.0])
    s = stopper(clock=lambda: next(now), max_time=2.0)
    assert [e.finish for e in run(s, spell("abcd"))] == [None, None, "time"]
    assert s.stop_reason == "max_time"


def test_criteria_see_the_request_and_name_themselves():
    seen = []

    def enough(progress: Progress) -> bool:
        seen.append((progress.token_ids, progress.text, progress.prompt_token_ids, progress.elapsed))
        return len(progress.token_ids) == 2

    s = stopper(prompt=[7, 8], clock=lambda: 3.0, criteria=(enough,))
    run(s, spell("abc"))
    a, b = spell("ab")
    assert seen == [((a,), "a", (7, 8), 0.0), ((a, b), "ab", (7, 8), 0.0)]
    assert ended(s) == ("stop", "enough", "ab", 2)


def test_a_criterion_may_return_its_reason():
    s = stopper(criteria=(lambda p: "", lambda p: "said so" if p.text.endswith("b") else False))
    run(s, spell("abc"))
    assert ended(s) == ("stop", "said so", "ab", 2)


def test_a_criterion_may_give_every_request_an_instance_of_its_own():
    class Third:
        def __init__(self):
            self.calls = 0

        def for_request(self):
            return Third()

        def __call__(self, progress):
            self.calls += 1
            return self.calls == 3

    rule = Third()
    first, second = stopper(criteria=(rule,)), stopper(criteria=(rule,))
    run(first, spell("abcd"))
    run(second, spell("efgh"))
    assert (ended(first), ended(second)) == (("stop", "Third", "abc", 3), ("stop", "Third", "efg", 3))
    assert rule.calls == 0


@pytest.mark.parametrize("verdict", [torch.tensor([True]), torch.tensor(True), True, 1])
def test_transformers_criteria_get_ids_and_may_return_any_truth(verdict):
    seen = []

    class Theirs(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append((input_ids.dtype, input_ids.tolist(), scores))
            return verdict if input_ids.shape[1] == 4 else torch.tensor([False])

    s = stopper(prompt=[-1, 7, 8], criteria=(Theirs(),))  # position 0 was an embedding
    run(s, [20, 21, 22])
    assert ended(s)[:2] == ("stop", "Theirs")
    assert seen == [(torch.int64, [[7, 8, 20]], None), (torch.int64, [[7, 8, 20, 21]], None)]


@pytest.mark.parametrize(
    ("criterion", "theirs"),
    [
        (MaxLengthCriteria(3), True),
        (StoppingCriteriaList([MaxLengthCriteria(3)]), True),
        (lambda input_ids, scores: False, True),
        (lambda input_ids, scores, **kwargs: False, True),
        (lambda progress: False, False),
        (lambda input_ids: False, False),
        (print, False),
    ],
)
def test_whose_criterion_it_is(criterion, theirs):
    assert is_huggingface_criterion(criterion) is theirs


def test_criteria_cannot_change_the_request():
    s = stopper()
    with pytest.raises(AttributeError):
        Progress(s).text = "x"


def test_ending_from_outside_releases_what_was_held():
    s = stopper(stop=("bcd",))
    assert [s.push(i).text for i in spell("abc")] == ["a", "", ""]
    assert s.text == "abc"
    assert s.finish("cancelled") == Emission("bc", "cancelled", None)
    assert s.finish("error") == Emission("", "cancelled", None)
    with pytest.raises(HandloomError, match=r"has finished \(cancelled\)"):
        s.push(1)
    with pytest.raises(ParameterError, match="unknown finish reason 'done'; valid are eos, stop"):
        stopper().finish("done")


# Several at once


def test_priority_on_one_token():
    """All five hold at the second token; each is reported once those before it are taken away."""
    fields = {
        "stop": ("ab",),
        "criteria": (lambda p: "criterion" if len(p.token_ids) == 2 else False,),
        "max_new_tokens": 2,
        "max_length": 2,
        "max_time": 1.0,
    }
    reasons = []
    while fields:
        clock = iter([0.0, 0.0, 5.0])  # admission, first token, second token
        s = stopper(eos=(), clock=clock.__next__, **fields)
        s.push_many(spell("ab"))
        reasons.append((s.finish_reason, s.stop_reason))
        del fields[next(iter(fields))]
    assert reasons == [
        ("stop", "ab"),
        ("stop", "criterion"),
        ("length", "max_new_tokens"),
        ("length", "max_length"),
        ("time", "max_time"),
    ]


def test_eos_before_stop_token_before_stop_string():
    [b] = spell("b")
    fields = {"stop": ("b",), "max_new_tokens": 2}
    s = stopper(eos=(b,), stop_token_ids=(b,), **fields)
    assert s.push_many(spell("ab"))[-1][1:] == ("eos", b)
    s = stopper(stop_token_ids=(b,), **fields)
    assert s.push_many(spell("ab"))[-1][1:] == ("stop", b)
    s = stopper(**fields)
    assert s.push_many(spell("ab"))[-1][1:] == ("stop", "b")


# Stop strings


def test_a_stop_string_across_token_borders_never_shows():
    s = stopper(stop=("STOP",))
    emissions = run(s, spell("aSTSTOPb"))
    assert [e.text for e in emissions] == ["a", "", "", "ST", "", "", ""]
    assert ended(s) == ("stop", "STOP", "aST", 7)


def test_a_token_that_overhangs_the_stop_string_is_cut():
    tokenizer = metaspace()
    the = tokenizer.convert_tokens_to_ids("▁the")
    s = stopper(tokenizer=tokenizer, stop=(" t",))
    run(s, [tokenizer.convert_tokens_to_ids("a"), the])
    assert ended(s) == ("stop", " t", "a", 2)
    s = stopper(tokenizer=tokenizer, stop=(" t",), include_stop=True)
    run(s, [tokenizer.convert_tokens_to_ids("a"), the])
    assert ended(s) == ("stop", " t", "a t", 2)


def test_the_prompt_is_never_searched():
    s = stopper(stop=("ab",), prompt=spell("a"), max_new_tokens=3)
    run(s, spell("bab"))
    assert ended(s) == ("stop", "ab", "b", 3)


@pytest.mark.parametrize("joined", [True, False])
def test_the_stop_string_completed_first_wins_whatever_the_borders(joined):
    for strings, text, found, left in [
        (("cd", "ab"), "xabcd", "ab", "x"),
        (("abcd", "bc"), "xabcd", "bc", "xa"),
        (("b", "ab"), "xab", "ab", "x"),
        (("ab", "abc"), "xabc", "ab", "x"),
    ]:
        search = StopSearch(strings)
        emitted, match = "", None
        for piece in [text] if joined else text:
            shown, match = search.feed(piece)
            emitted += shown
            if match:
                break
        assert (emitted, match) == (left, found)


def test_multi_byte_stop_strings_stop_at_their_last_byte():
    tokenizer = byte_fallback()
    s = stopper(tokenizer=tokenizer, stop=("。",))
    run(s, [tokenizer.convert_tokens_to_ids("a"), *(FIRST_BYTE + b for b in "。".encode()), 7])
    assert ended(s) == ("stop", "。", "a", 4)


def test_a_newline_stops_at_once_with_byte_fallback():
    tokenizer = byte_fallback()
    s = stopper(tokenizer=tokenizer, stop=("\n",))
    run(s, [tokenizer.convert_tokens_to_ids("a"), FIRST_BYTE + 10])
    assert ended(s) == ("stop", "\n", "a", 2)


PAD = TOKENIZER.pad_token_id


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_string_that_is_a_special_token_ends_though_it_adds_no_text(include_stop):
    s = stopper(stop=["<pad>", "xyz"], include_stop=include_stop)
    run(s, [*spell("abxy"), PAD, *spell("c")])
    assert ended(s) == ("stop", "<pad>", "abxy<pad>" if include_stop else "abxy", 5)
    plain = stopper(stop=["<pad>"], skip_special_tokens=False, include_stop=include_stop)
    run(plain, [*spell("ab"), PAD, *spell("c")])
    assert ended(plain) == ("stop", "<pad>", "ab<pad>" if include_stop else "ab", 3)


def test_a_special_stop_string_waits_for_min_new_tokens_and_comes_after_eos():
    s = stopper(stop=["<pad>"], min_new_tokens=3)
    run(s, [PAD, *spell("a"), PAD, *spell("c")])
    assert ended(s) == ("stop", "<pad>", "a", 3)
    s = stopper(stop=["</s>"])
    run(s, [*spell("a"), EOS])
    assert ended(s) == ("eos", EOS, "a", 2)


def test_stop_strings_before_min_new_tokens_are_text():
    s = stopper(stop=("ab",), min_new_tokens=4)
    emissions = run(s, spell("abcabab"))
    assert ended(s) == ("stop", "ab", "abc", 5)
    assert [e.text for e in emissions] == ["", "ab", "c", "", ""]
    # Completed exactly at the minimum counts; begun before it and completed after it, too.
    s = stopper(stop=("ab",), min_new_tokens=2)
    run(s, spell("ab"))
    assert ended(s) == ("stop", "ab", "", 2)


def test_a_stop_string_from_before_the_minimum_is_not_found_later():
    """ "ab" stays held as the beginning of "abx", and must not count when the minimum is reached."""
    s = stopper(stop=("ab", "abx"), min_new_tokens=3, max_new_tokens=3)
    run(s, spell("abc"))
    assert ended(s) == ("length", "max_new_tokens", "abc", 3)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ParameterError, match=r"stop=\['x'\] needs a tokenizer; .* pass stop_token_ids"):
        stopper(tokenizer=None, stop=("x",))
    s = stopper(tokenizer=None, eos=(4,))
    assert s.push_many([1, 2, 4]) == [("", None, None), ("", None, None), ("", "eos", 4)]
    assert s.text == ""


def test_incomplete_bytes_are_flushed_at_the_end():
    half = TOKENIZER.convert_tokens_to_ids("ð")
    for last, reason in ((EOS, "eos"), (half, "length")):
        s = stopper(max_new_tokens=3)
        run(s, [*spell("a"), half, last])
        assert s.finish_reason == reason
        assert s.text == TOKENIZER.decode([*spell("a"), half, last], skip_special_tokens=True)
        assert s.token_texts[2 if last == half else 1] != ""


def test_a_block_is_taken_up_to_the_token_that_ends_it():
    s = stopper(stop=("bc",))
    emissions = s.push_many(spell("abcde"))
    assert emissions == [("a", None, None), ("", None, None), ("", "stop", "bc")]
    assert s.token_ids == spell("abc")


def oracle(text: str, stops: list[str]) -> str:
    """The text before the stop string that a reader of one character after another meets first."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=12),
)
def test_hold_back_equals_a_search_of_the_whole_text(text, stops, cuts):
    """For every split: the right cut, nothing of a stop string shown, and nothing held without need."""
    search = StopSearch(stops)
    emitted, seen, match = "", "", None
    for start, end in pairwise(sorted({0, len(text), *(min(c, len(text)) for c in cuts)})):
        seen += text[start:end]
        shown, match = search.feed(text[start:end])
        emitted += shown
        if match:
            break
        assert emitted + search.held == seen
        assert search.held == "" or any(s.startswith(search.held) for s in stops)
    if not match:
        emitted += search.release()
    assert emitted == oracle(text, stops)
    assert (match is not None) == (oracle(text, stops) != text)


@given(data=st.data())
def test_emissions_join_to_the_text_for_any_tokens(data):
    """Random ids with invalid UTF-8, stop strings and every kind of ending."""
    tokenizer = data.draw(st.sampled_from([byte_level(), byte_fallback(), metaspace()]))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    stops = data.draw(st.lists(st.text("aetOP \ufffd", min_size=1, max_size=3), max_size=3))
    s = stopper(
        tokenizer=tokenizer,
        eos=(tokenizer.eos_token_id,) if data.draw(st.booleans()) else (),
        stop=tuple(stops),
        include_stop=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_new_tokens=data.draw(st.integers(0, 5)),
        max_new_tokens=data.draw(st.integers(5, 40)),
    )
    run(s, ids)
    assert s.token_ids == ids[: len(s.token_ids)]
