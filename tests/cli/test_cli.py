"""The command line: arguments to parameters, what goes where, exit codes, and results that survive kills."""

import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import pytest
from helpers import until
from rich.console import Console

import handloom
from handloom.cli import command as cli
from handloom.cli import options
from handloom.cli.work import Work
from handloom.errors import HandloomError, ParameterError, PromptError
from handloom.experiments.records import ResultFile, read_records
from handloom.params.sampling_params import SamplingParams

COMMAND = [sys.executable, str(Path(fake_engine.__file__)), "--model", "fake/model"]


@pytest.fixture
def handloom_command(monkeypatch, capsys):
    """Run the command in this process with the fake engine: (arguments, stdin) -> code, stdout, stderr."""

    def run(*arguments, stdin="", engine=fake_engine.FakeEngine):
        monkeypatch.setattr(handloom, "Engine", engine, raising=False)
        monkeypatch.setattr(sys, "argv", ["handloom", "--model", "fake/model", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


class Chatty(fake_engine.FakeEngine):
    tokenizer = fake_engine.TemplateTokenizer()


# Arguments


def test_every_sampling_parameter_is_an_option_with_help():
    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    parameters = options.signature_parameters()
    assert [parameter.name for parameter in parameters] == fields
    assert [
        p.name for p in parameters if not p.default.help or p.default.rich_help_panel.endswith("other")
    ] == []
    whole = inspect.signature(cli._with_parameters(cli.command)).parameters
    assert list(whole)[-len(fields) :] == fields


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--temperature", "0.7", "--top-k", "5"], {"temperature": 0.7, "top_k": 5}),
        (["--seed", "7", "--n", "2"], {"seed": 7, "n": 2}),
        (["--stop", "a,b", "--stop", "c"], {"stop": ("a,b", "c")}),
        (["--stop-token-ids", "1,2"], {"stop_token_ids": (1, 2)}),
        (["--stop-token-ids", "[1, 2]"], {"stop_token_ids": (1, 2)}),
        (["--banned-tokens", "5"], {"banned_tokens": (5,)}),
        (["--bad-words", '["no", [1, 2]]'], {"bad_words": ["no", (1, 2)]}),
        (["--bad-words", "no"], {"bad_words": ["no"]}),
        (["--logit-bias", '{"5": -1.5}'], {"logit_bias": {5: -1.5}}),
        (["--sequence-bias", "[[[1, 2], 3.0]]"], {"sequence_bias": {(1, 2): 3.0}}),
        (["--forced-tokens", '{"0": 9}'], {"forced_tokens": {0: 9}}),
        (["--exponential-decay", "10,1.5"], {"exponential_decay": (10, 1.5)}),
        (["--p-less", "norm"], {"p_less": "norm"}),
        (["--p-less", "true"], {"p_less": True}),
        (["--ignore-eos", "--no-skip-special-tokens"], {"ignore_eos": True, "skip_special_tokens": False}),
        (["--criteria", "os.path:isabs"], {"criteria": (os.path.isabs,)}),
        (["--prefix-fn", "os.path:join"], {"prefix_fn": os.path.join}),
        (["--max-time", "2.5", "--logprobs", "3"], {"max_time": 2.5, "logprobs": 3}),
        ([], {}),
    ],
)
def test_options_become_sampling_params(handloom_command, arguments, settings):
    seen = []

    class Spy(fake_engine.FakeEngine):
        def stream(self, prompts, params):
            seen.append(params)
            return super().stream(prompts, params)

    assert handloom_command("ab", *arguments, engine=Spy)[0] == 0
    assert seen == [SamplingParams(**settings)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hi", "--top-p", "7"], "top_p=7.0"),
        (["hi", "--logit-bias", "{5"], "logit_bias='{5'"),
        (["hi", "--prefix-fn", "nowhere:f"], "nowhere"),
        (["hi", "--chat"], "one of a prompt, --chat and --file"),
        (["hi", "--output", "x"], "--output needs --file"),
        (["--chat", "--n", "2"], "--n"),
        (["--chat", "--json"], "--json"),
        ([], "empty"),
        ([""], "empty"),
        (["hi", "--no-such-option"], "--no-such-option"),
        (["hi", "--top-k", "many"], "--top-k"),
    ],
)
def test_wrong_usage_ends_with_2_before_a_model_is_loaded(handloom_command, arguments, told):
    class Never(fake_engine.FakeEngine):
        @classmethod
        def from_pretrained(cls, name, **arguments):
            raise AssertionError("loaded")

    code, out, err = handloom_command(*arguments, engine=Never)
    assert (code, out) == (2, "")
    assert told in " ".join(err.split())


def test_the_model_options_reach_the_engine(handloom_command):
    asked = [
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--quantization",
        "nf4",
        "--slots",
        "3",
        "--revision",
        "v1",
    ]
    assert handloom_command("ab", *asked)[0] == 0
    assert fake_engine.FakeEngine.loaded == (
        "fake/model",
        {"revision": "v1", "dtype": "bfloat16", "device": "cpu", "quantization": "nf4", "slots": 3},
    )
    handloom_command("ab")
    assert fake_engine.FakeEngine.loaded == ("fake/model", {})


# Single answers


def test_the_answer_goes_to_stdout_and_the_statistics_to_stderr(handloom_command):
    code, out, err = handloom_command("abc")
    assert (code, out) == (0, "cba\n")
    assert err == "3 tokens · 40.0 tokens/s · first token after 0.25 s · finished: eos\n"
    assert handloom_command("abc", "--max-new-tokens", "2")[2].endswith(
        "finished: length ('max_new_tokens')\n"
    )


def test_a_prompt_comes_from_stdin_where_none_is_given(handloom_command):
    assert handloom_command(stdin="ab\ncd\n")[1] == "dc\nba\n"
    assert handloom_command("-", stdin="ab")[1] == "ba\n"
    assert handloom_command("xy", stdin="ab")[1] == "yx\n"


def test_text_goes_through_the_chat_template_unless_raw(handloom_command):
    assert handloom_command("ab", engine=Chatty)[1] == "<u>ab<a>"[::-1] + "\n"
    assert handloom_command("ab", "--system", "S", engine=Chatty)[1] == "<s>S<u>ab<a>"[::-1] + "\n"
    assert handloom_command("ab", "--raw", engine=Chatty)[1] == "ba\n"


def test_json_prints_one_object_a_sample(handloom_command):
    code, out, err = handloom_command("abc", "--json", "--n", "2")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(record["sample"], record["text"]) for record in records] == [(0, "cba"), (1, "cba")]
    assert records[0]["token_ids"] == [99, 98, 97]


def test_several_samples_are_shown_one_after_the_other(handloom_command):
    assert handloom_command("abc", "--n", "2")[1] == "[0] cba\n[1] cba\n"


def test_logprobs_add_a_table(handloom_command):
    lines = handloom_command("ab", "--logprobs", "1")[1].splitlines()
    assert lines[0] == "ba"
    assert [line.split() for line in lines[2:]] == [
        ["'b'", "60.7%", "36.8%", "'b'", "60.7%"],
        ["'a'", "60.7%", "36.8%", "'a'", "60.7%"],
    ]


def test_a_failed_request_ends_with_1(handloom_command):
    code, _, err = handloom_command("boom")
    assert code == 1
    assert "error (the logits are NaN)" in err


def test_a_model_that_does_not_load_ends_with_1_and_one_line(handloom_command):
    class Broken(fake_engine.FakeEngine):
        @classmethod
        def from_pretrained(cls, name, **arguments):
            raise handloom.ModelError("no model [there]")

    assert handloom_command("hi", engine=Broken) == (1, "", "error: no model [there]\n")


# Conversations


def test_a_conversation_remembers_what_was_said(handloom_command):
    code, out, _ = handloom_command("--chat", stdin="ab\n\ncd\n/reset\nef\n/exit\nnever\n", engine=Chatty)
    first = "<u>ab<a>"[::-1]
    second = f"<u>ab<a>{first}<u>cd<a>"[::-1]
    assert code == 0
    assert out == f"{first}\n{second}\n{'<u>ef<a>'[::-1]}\n"


def test_a_turn_that_is_too_long_leaves_the_conversation_as_it_was(handloom_command):
    code, out, err = handloom_command("--chat", stdin=f"{'x' * 120}\nab\n", engine=Chatty)
    assert "the model takes 100" in err
    assert (code, out) == (0, "<u>ab<a>"[::-1] + "\n")


# Files of prompts


def lines_of(path):
    """The records of a file, without its headers."""
    return records_in(path.read_text())


def records_in(text):
    return [entry for entry in map(json.loads, text.splitlines()) if "header" not in entry]


def prompts_file(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_a_file_of_prompts_in_every_form(handloom_command, tmp_path):
    source = prompts_file(
        tmp_path / "in.jsonl",
        [
            {"id": "a", "prompt": "abc"},
            {"token_ids": [104, 105], "params": {"n": 2}},
            {"id": 7, "messages": [{"role": "user", "content": "x"}], "params": {"max_new_tokens": 2}},
        ],
    )
    output = tmp_path / "out.jsonl"
    code, out, err = handloom_command("--file", source, "--output", str(output))
    assert (code, out) == (0, "")
    assert re.fullmatch(r"4 samples in \d+\.\d s · 9 tokens · [\d.]+ tokens/s\n", err)
    found = {(entry["id"], entry["sample"]): entry for entry in lines_of(output)}
    assert {key: entry["text"] for key, entry in found.items()} == {
        ("a", 0): "cba",
        (2, 0): "ih",
        (2, 1): "ih",
        (7, 0): ">a",
    }
    assert found[7, 0]["finish_reason"] == "length"
    assert found[2, 0]["params"]["n"] == 2


def test_without_an_output_the_records_go_to_stdout(handloom_command):
    code, out, _ = handloom_command("--file", "-", stdin='{"prompt": "ab"}\n\n{"prompt": "cd"}\n')
    assert code == 0
    assert [(entry["id"], entry["text"]) for entry in records_in(out)] == [(1, "ba"), (3, "dc")]
    assert handloom_command("--file", "-", "--output", "-", stdin='{"prompt": "ab"}\n')[1] == out.replace(
        out.splitlines(keepends=True)[2], ""
    )


def test_a_header_says_what_all_records_have_in_common_and_a_record_what_differs(handloom_command, tmp_path):
    entries = [
        {"prompt": "a"},
        {"prompt": "b", "params": {"top_k": 3}},
        {"prompt": "c", "params": {"seed": -1}},
    ]
    output = tmp_path / "out.jsonl"
    command = ("--file", prompts_file(tmp_path / "in.jsonl", entries), "--output", str(output))
    assert handloom_command(*command, "--seed", "7", "--temperature", "1")[0] == 0
    first, *rest = output.read_text().splitlines()
    header = json.loads(first)["header"]
    assert (header["model"], header["dtype"], header["device"]) == ("fake/model", "float32", "cpu")
    assert set(header["versions"]) == {"handloom", "torch", "transformers"}
    assert header["versions"]["handloom"] == handloom.__version__
    assert SamplingParams.from_dict(header["params"]) == SamplingParams(seed=7, temperature=1.0)
    assert [json.loads(line)["params"] for line in rest] == [{}, {"top_k": 3}, {"seed": None}]
    assert max(map(len, rest)) < 600
    # a run that goes on with another version says so from there on
    output.write_text(output.read_text().replace(f'"handloom": "{handloom.__version__}"', '"handloom": "0"'))
    output.write_text("".join(line + "\n" for line in output.read_text().splitlines()[:-1]))
    assert handloom_command(*command, "--seed", "7", "--temperature", "1")[0] == 0
    kinds = ["header" in json.loads(line) for line in output.read_text().splitlines()]
    assert kinds == [True, False, False, True, False]


def test_text_is_continued_as_it_is_and_a_prompt_is_a_users_turn(handloom_command):
    lines = '{"prompt": "ab"}\n{"text": "ab"}\n'
    _, out, _ = handloom_command("--file", "-", stdin=lines, engine=Chatty)
    assert {entry["id"]: entry["text"] for entry in records_in(out)} == {1: "<u>ab<a>"[::-1], 2: "ba"}


def test_progress_is_told_every_half_minute_where_stderr_is_no_terminal():
    told, now = io.StringIO(), [0.0]
    note = Console(file=told, width=200)

    class Sample:
        n_new, finish_reason = 20, "length"

    with Work(note, 9, bar=True, clock=lambda: now[0]) as work:
        for _ in range(9):
            now[0] += 10
            work.advance(Sample)
    lines = told.getvalue().splitlines()
    assert len(lines) == 3
    assert lines == [
        "3 of 9 samples, 2.0 tokens/s, about 60 s left",
        "6 of 9 samples, 2.0 tokens/s, about 30 s left",
        "9 samples in 90.0 s · 180 tokens · 2.0 tokens/s",
    ]


def test_help_in_a_conversation(handloom_command):
    code, out, err = handloom_command("--chat", stdin="/help\nab\n", engine=Chatty)
    assert (code, out) == (0, "<u>ab<a>"[::-1] + "\n")
    assert err.startswith(cli.CHAT_HELP)


def test_results_go_to_regular_files_alone_and_leave_nothing_beside_them(handloom_command, tmp_path):
    source = prompts_file(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        code, _, err = handloom_command("--file", source, "--output", str(tmp_path / name))
        assert code == 1
        assert "is no regular file" in " ".join(err.split())
    code, _, err = handloom_command("--file", source, "--output", str(tmp_path / "absent" / "out.jsonl"))
    assert code == 1
    assert "cannot be written: No such file or directory" in " ".join(err.split())
    assert handloom_command("--file", source, "--output", str(tmp_path / "out.jsonl"))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl", "out.jsonl", "pipe"]


def test_a_resumed_run_does_only_what_is_missing(handloom_command, tmp_path):
    source = prompts_file(tmp_path / "in.jsonl", [{"id": i, "prompt": f"p{i}"} for i in range(5)])
    output = tmp_path / "out.jsonl"
    command = ("--file", source, "--output", str(output), "--n", "2")
    assert handloom_command(*command)[0] == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed in the middle of a line
    assert handloom_command(*command)[0] == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    code, _, err = handloom_command(*command, engine=None)  # no engine is needed any more
    assert (code, err) == (0, "all 5 records are done\n")


@pytest.mark.parametrize("change", [["--temperature", "1"], ["--raw"], ["--dtype", "float16"]])
def test_results_of_other_settings_are_not_mixed(handloom_command, tmp_path, change):
    source = prompts_file(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}])
    output = tmp_path / "out.jsonl"
    command = ("--file", source, "--output", str(output))
    assert handloom_command(*command)[0] == 0
    before = output.read_bytes()
    code, _, err = handloom_command(*command, *change)
    assert code == 2
    assert "'a', sample 0" in err
    prompts_file(tmp_path / "in.jsonl", [{"id": "a", "prompt": "y"}])
    assert handloom_command(*command)[0] == 2
    assert output.read_bytes() == before


def test_failed_records_are_stored_and_counted(handloom_command, tmp_path):
    source = prompts_file(tmp_path / "in.jsonl", [{"prompt": "boom"}, {"prompt": "ok"}])
    output = tmp_path / "out.jsonl"
    code, _, err = handloom_command("--file", source, "--output", str(output))
    assert code == 1
    assert "1 samples ended with an error" in err
    reasons = {entry["id"]: (entry["finish_reason"], entry["error"]) for entry in lines_of(output)}
    assert reasons == {1: ("error", "the logits are NaN"), 2: ("eos", None)}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        (
            '{"content": "a"}',
            "line 1: expected an object with exactly one of prompt, text, messages, token_ids",
        ),
        ('{"text": ["a"]}', "line 1: text must be a str"),
        ('["a"]', "line 1: expected an object"),
        ('{"prompt": "a", "token_ids": [1]}', "line 1: expected an object with exactly one"),
        ('{"prompt": 5}', "line 1: prompt must be a str, got 5"),
        ('{"prompt": "a", "params": 1}', "line 1: params must be an object"),
        ('{"prompt": "a", "id": null}', "line 1: id must be a text or an integer, got None"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: id 2 is also that of line 1"),
    ],
)
def test_a_bad_line_is_named(text, told):
    with pytest.raises(PromptError, match=told):
        read_records(text.splitlines())


def test_bad_parameters_of_one_record_stop_the_run_before_it_starts(handloom_command, tmp_path):
    source = prompts_file(
        tmp_path / "in.jsonl", [{"prompt": "a"}, {"id": "b", "prompt": "a", "params": {"n": 0}}]
    )
    code, _, err = handloom_command("--file", source, "--output", str(tmp_path / "out.jsonl"), engine=None)
    assert code == 2
    assert "record 'b': n=0" in err


def test_a_foreign_file_is_never_written_to(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"mine": 1}\nunfinished')
    with pytest.raises(HandloomError, match=r"notes.jsonl, line 1 is not a result"):
        ResultFile(path)
    assert path.read_text() == '{"mine": 1}\nunfinished'


def test_a_result_file_has_one_writer(tmp_path):
    first = ResultFile(tmp_path / "out.jsonl")
    with pytest.raises(HandloomError, match="written by another process"):
        ResultFile(tmp_path / "out.jsonl")
    first.close()
    with ResultFile(tmp_path / "out.jsonl") as results:
        assert results.done == {}


def test_no_kill_loses_or_doubles_a_record(tmp_path):
    """Killed after the 1st, 2nd ... record of each run, until one run comes to its end."""
    entries = [{"id": i, "prompt": "slow" * (1 + i % 4) + str(i)} for i in range(12)]
    source = prompts_file(tmp_path / "in.jsonl", entries)
    output = tmp_path / "out.jsonl"
    command = [*COMMAND, "--file", source, "--output", str(output), "--n", "2"]
    kills = 0
    while True:
        seen = output.read_bytes().count(b"\n") if output.exists() else 0
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            while process.poll() is None and kills < 2:
                if output.exists() and output.read_bytes().count(b"\n") > seen + 2:
                    process.kill()
                    process.wait()
                time.sleep(0.005)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills > 0
    found = sorted((entry["id"], entry["sample"], entry["text"]) for entry in lines_of(output))
    assert found == sorted((e["id"], s, e["prompt"][::-1]) for e in entries for s in range(2))


def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tmp_path):
    source = prompts_file(tmp_path / "in.jsonl", [{"prompt": "ab"}, {"prompt": "slow" * 2000}])
    output = tmp_path / "out.jsonl"
    command = [*COMMAND, "--file", source, "--output", str(output), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: process.poll() is not None or (output.exists() and output.read_bytes()))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "stopped\n"
    assert [entry["text"] for entry in lines_of(output)] == ["ba"]


def test_ctrl_c_leaves_the_streamed_text(tmp_path):
    command = [*COMMAND, "slow" * 2000, "--max-new-tokens", "100000"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        first = process.stdout.read(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, first, err) == (130, b"wo", b"stopped\n")
    assert out.endswith(b"\n")


def test_a_reader_that_leaves_is_no_traceback():
    command = [*COMMAND, "slow" * 200, "--max-new-tokens", "100000"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.read(2)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, b"")


# For real


@pytest.mark.slow
def test_the_demo_model_answers(smollm2):
    """The README's first command, in a process of its own that finds the model in the cache."""
    command = [sys.executable, "-m", "handloom", "What is the capital of France?"]
    environment = {key: value for key, value in os.environ.items() if key != "HANDLOOM_MODEL"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    assert "8 tokens" in done.stderr
    assert "finished: eos" in done.stderr


@pytest.mark.slow
def test_the_demo_model_works_a_file_off(smollm2_engine, handloom_command, tmp_path):
    questions = [
        {"id": "france", "prompt": "What is the capital of France?"},
        {"id": "ids", "token_ids": smollm2_engine.encode("The sun rises in the")},
    ]
    source, output = prompts_file(tmp_path / "in.jsonl", questions), tmp_path / "out.jsonl"

    class Loaded:
        from_pretrained = staticmethod(lambda name, **arguments: smollm2_engine)

    asked = ("--file", source, "--output", str(output), "--max-new-tokens", "8", "--logprobs", "2")
    assert handloom_command(*asked, engine=Loaded)[0] == 0
    found = {entry["id"]: entry for entry in lines_of(output)}
    assert found["france"]["token_ids"] == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    alone = smollm2_engine.generate(questions[1]["token_ids"], max_new_tokens=8)
    assert (found["ids"]["token_ids"], found["ids"]["text"]) == (alone.token_ids, alone.text)
    assert found["ids"]["finish_reason"] == "length"
    assert [len(top) for top in found["ids"]["top_logprobs"]] == [2] * 8


def test_unreadable_named_objects_are_explained():
    with pytest.raises(ParameterError, match="expected module:attribute"):
        options.read_parameters({"prefix_fn": "json.dumps"})
