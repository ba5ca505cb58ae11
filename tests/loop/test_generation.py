"""Results: what they print, how they serialise, and their HTML."""

import html
import json
import math
import re
from dataclasses import fields

import pytest

from handloom.loop.generation import Event, Generation, Results, Timings

NAN = float("nan")


def paris(**changes) -> Generation:
    values = {
        "request": 3,
        "prompt_token_ids": [1, 2],
        "token_ids": [5, 6, 2],
        "text": "Par\nis",
        "finish_reason": "eos",
        "stop_reason": 2,
        "logprobs": [math.log(0.5), math.log(0.25), 0.0],
        "raw_logprobs": [math.log(0.4), math.log(0.2), math.log(0.9)],
        "token_texts": ["Par\n", "is", ""],
        "timings": Timings(tokens_per_second=12.34),
        "seed": 7,
    }
    return Generation(**(values | changes))


def test_repr_is_two_lines_that_say_what_happened():
    assert repr(paris()).splitlines() == [
        "Generation(request 3, 3 tokens, finish: eos (2), log p = -2.08, 12.3 tokens/s)",
        "  'Par\\nis'",
    ]


def test_repr_of_a_failed_sample_has_its_error_on_one_line():
    failed = Generation(request=0, sample=2, finish_reason="error", error="logits\nare NaN")
    assert repr(failed).splitlines() == [
        "Generation(request 0, sample 2, 0 tokens, finish: error)",
        "  ''",
        "  error: logits are NaN",
    ]


def test_repr_of_a_long_text_is_short():
    assert repr(paris(text="x" * 5000)).splitlines()[1] == "  '" + "x" * 199 + "…'"
    assert str(paris(text="x" * 5000)) == "x" * 5000


def test_derived_numbers():
    assert paris().n_new == 3
    assert paris().cumulative_logprob == pytest.approx(math.log(0.125))


def test_to_dict_survives_json():
    def criterion(progress):
        return False

    class Params:
        def to_dict(self):
            return {"temperature": 0.5, "criteria": (criterion,), "logit_bias": {4: -math.inf}}

    result = paris(
        raw_logprobs=[NAN, -1.0, -2.0],
        top_logprobs=[{5: -0.5, 9: -math.inf}, {}, {2: 0.0}],
        prompt_logprobs=[None, -1.5],
        params=Params(),
    )
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record == result.to_dict()
    assert record["raw_logprobs"] == [None, -1.0, -2.0]
    assert record["top_logprobs"] == [{"5": -0.5, "9": None}, {}, {"2": 0.0}]
    assert record["prompt_logprobs"] == [None, -1.5]
    assert record["params"]["criteria"][0].endswith("criterion")
    assert record["params"]["logit_bias"] == {"4": None}
    assert record["timings"]["tokens_per_second"] == 12.34
    assert record["n_new"] == 3
    assert record["cumulative_logprob"] == pytest.approx(math.log(0.125))
    assert {f.name for f in fields(Generation)} <= set(record)


def spans(page: str) -> list[tuple[str, str, str]]:
    """Title, style and inner HTML of each token."""
    found = re.findall(r'<span title="([^"]*)" style="([^"]*)">((?:<span[^>]*>↵</span>|[^<])*)</span>', page)
    return [(html.unescape(title), style, body) for title, style, body in found]


def test_html_shows_every_token_with_its_numbers():
    first, second, third = spans(paris(top_logprobs=[{5: math.log(0.4)}, {}, {}])._repr_html_())
    assert first[0] == "'Par\\n'  id 5\np = 40% (model)\np = 50% (as drawn)\ntop: 5: 40%"
    assert second[0] == "'is'  id 6\np = 20% (model)\np = 25% (as drawn)"
    assert first[2] == 'Par<span style="opacity:.5">↵</span>\n'
    assert second[2] == "is"
    # The hidden EOS token has no text, but a place to point at.
    assert third[2] == ""
    assert "padding-left" in third[1]
    assert "padding-left" not in second[1]


def test_html_colours_by_the_models_probability():
    result = paris(raw_logprobs=[0.0, -math.inf, NAN])
    sure, unsure, unknown = [style for _, style, _ in spans(result._repr_html_())]
    assert "hsla(120," in sure  # green
    assert "hsla(0," in unsure  # red
    assert "rgba(128,128,128" in unknown


def test_html_escapes_text_and_error():
    page = paris(text='<b>"&', token_texts=['<b>"&', "", ""], error="<script>")._repr_html_()
    assert "<b>" not in page
    assert "<script>" not in page
    assert spans(page)[0][2] == "&lt;b&gt;&quot;&amp;"
    assert spans(page)[0][0].startswith("'<b>\"&'")


def test_html_without_a_tokenizer_shows_ids():
    assert [body for _, _, body in spans(paris(text="", token_texts=[])._repr_html_())] == ["5 ", "6 ", "2 "]


def test_timings_between_moments():
    moments = {"submitted": 10.0, "admitted": 11.0, "prefilled": 13.0, "first": 14.0, "finished": 18.0}
    assert Timings.between(**moments, n_new=9) == Timings(1.0, 2.0, 4.0, 4.0, 8.0, 2.0)
    assert Timings.between(0.0, 0.0, 0.0, 1.0, 1.0, 1).tokens_per_second == 0.0


def test_events_cannot_be_changed():
    event = Event(request=0, sample=0, token_id=5, text="a")
    assert (event.finish, event.generation) == (None, None)
    with pytest.raises(AttributeError):
        event.text = "b"


def test_results_show_one_row_each():
    results = Results(
        [
            Generation(request=0, text="Paris & <b>", token_ids=[1, 2], finish_reason="eos"),
            Generation(request=10, text="x" * 100, token_ids=[1] * 12, finish_reason="length"),
            Generation(request=11, error="a processor failed", finish_reason="error"),
        ]
    )
    lines = str(results).split("\n")
    assert lines[0] == "prompt  finish  tokens  text"
    assert lines[1] == "     0  eos          2  'Paris & <b>'"
    assert lines[2].startswith("    10  length      12  'xxx")
    assert lines[2].endswith("…")
    assert lines[3] == "    11  error        0  'a processor failed'"
    assert results == list(results)
    assert type(results[1:]) is Results
    assert results[1].request == 10
    shown = results._repr_html_()
    assert shown.count("<tr>") == 4
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    several = Results([Generation(request=0), Generation(request=0, sample=1)])
    assert [line.split()[0] for line in str(several).split("\n")] == ["prompt", "0.0", "0.1"]
    assert str(Results()) == "prompt  finish  tokens  text"
