"""The report: hand-written rows become exactly these tables and plots, and bad rows are named."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib import image

from benchmarks.report.__main__ import chosen
from benchmarks.report.plots import COLOURS, draw, plots
from benchmarks.report.rows import RowError, newest, read
from benchmarks.report.tables import LONG, insert, plain, size, tables

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
CPU = {"cpu": "Abacus", "cores": 2, "threads": 1}
GPU = {"cpu": "Abacus", "cores": 16, "threads": 16, "gpu": "H200", "gpu_memory_gib": 139.8}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def row(commit="aaaaaaaaaaaa", day=1, hardware=CPU, **fields):
    about = {"time": f"2026-03-{day:02}T12:00:00+00:00", "commit": commit, "hardware": hardware}
    return {**fields, **about, "versions": VERSIONS}


def call(side, p50, **fields):
    """A row of the sampling benchmark."""
    case = {"benchmark": "kernels/sampling", "device": "cpu", "mode": "p", "rows": "flat", "batch": 1}
    return row(side=side, p50=p50, **{**case, "vocab": 32000, "dtype": "fp32", "cache": "warm", **fields})


def step(side, batch, rate, **fields):
    """A row of the decode benchmark."""
    case = {"model": "1B", "dtype": "bf16", "case": f"batch {batch}, greedy", "batch": batch, "context": 256}
    return row(
        side=side, tokens_per_s=rate, **{"tpot_p50_ms": 1000 * batch / rate, "mbu": 0.5, **case, **fields}
    )


def parsed(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read([path])[0]


def test_sampling_rows_become_one_line_a_case_and_one_column_a_side(tmp_path):
    rows = [
        call("transformers", 5979.44, ratio=2.1312, batch=8),
        call("handloom", 2728.4, batch=8, launches=2, bytes_read=1024000, bandwidth_share=0.253),
        call("handloom", 0.012345),
        call("transformers", 12.25, ratio=992.0),
    ]
    assert tables(newest(parsed(tmp_path, *rows))) == (
        "### Sampling: microseconds a call, median (times ours)\n"
        "\n"
        "Abacus, 2 cores, 1 thread; Python 3.11.7, torch 2.13.0; commit aaaaaaa, 2026-03-01.\n"
        "\n"
        "| device | mode | rows | B | V | dtype | cache | handloom | transformers "
        "| launches | bytes read | of bandwidth |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| cpu | p | flat | 1 | 32000 | fp32 | warm | 0.0123 | 12.2 (992x) |  |  |  |\n"
        "| cpu | p | flat | 8 | 32000 | fp32 | warm | 2,728 | 5,979 (2.13x) | 2 | 1,000 KiB | 25 % |\n"
    )


def test_decode_rows_show_what_they_have_and_no_empty_column(tmp_path):
    rows = [
        step("handloom", 1, 250.0, mode="greedy", ttft_ms=12.5, tpot_p99_ms=4.25, peak_bytes=3 * 2**30),
        step("generate | static", 1, 100.0, mode="greedy", launches_per_token=311.0, syncs_per_token=0.0),
    ]
    assert "\n".join(tables(newest(parsed(tmp_path, *rows))).splitlines()[4:]) == (
        "| model | dtype | mode | case | batch | context | side "
        "| tokens/s | first token, ms | ms/token | p99 | of bandwidth | peak memory | launches/token | syncs/token |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1B | bf16 | greedy | greedy | 1 | 256 | handloom "
        "| 250 | 12.5 | 4.00 | 4.25 | 50 % | 3.00 GiB |  |  |\n"
        "| 1B | bf16 | greedy | greedy | 1 | 256 | generate \\| static "
        "| 100 |  | 10.0 |  | 50 % |  | 311 | 0 |"
    )


def test_the_decode_benchmark_names_sizes_once_and_says_what_it_skipped(tmp_path):
    about = {
        "model": "tiny",
        "dtype": "float32",
        "mode": "greedy",
        "batch": 2,
        "context": 16,
        "new_tokens": 8,
    }
    speed = {**about, "benchmark": "decode/speed", "case": "batch 2, context 16+8"}
    ragged = {**about, "benchmark": "decode/ragged", "case": "8 ragged requests, 2 slots, up to 16+8"}
    none = dict.fromkeys(("mbu", "launches_per_token", "syncs_per_token"))
    rows = newest(
        parsed(
            tmp_path,
            row(
                side="handloom",
                tokens_per_s=150.0,
                tpot_p50_ms=10.5,
                operations_per_token=7.25,
                **speed,
                **none,
            ),
            row(side="loop", skipped="ValueError: no", **speed),
            row(side="handloom", tokens_per_s=99.0, tpot_p50_ms=9.5, ratio=None, **ragged, **none),
            row(side="generate", tokens_per_s=50.0, tpot_p50_ms=None, ratio=1.98, **ragged, **none),
        )
    )
    name = "8 ragged requests, 2 slots, up to 16+8"
    heading = "| model | dtype | mode | case | batch | context | new | side "
    heading += "| tokens/s | handloom over it | ms/token | operations/token | skipped |"
    assert tables(rows).splitlines()[4:] == [
        heading,
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| tiny | float32 | greedy |  | 2 | 16 | 8 | handloom | 150 |  | 10.5 | 7.25 |  |",
        "| tiny | float32 | greedy |  | 2 | 16 | 8 | loop |  |  |  |  | ValueError: no |",
        f"| tiny | float32 | greedy | {name} | 2 | 16 | 8 | handloom | 99.0 |  | 9.50 |  |  |",
        f"| tiny | float32 | greedy | {name} | 2 | 16 | 8 | generate | 50.0 | 1.98x |  |  |  |",
    ]
    names = [plot.name for plot in plots(rows)[0]]
    assert names == [
        "throughput-tiny-float32-greedy-8-new-tokens",
        "throughput-tiny-float32-greedy-ragged-requests-8-new-tokens",
        "time-per-token-tiny-float32-greedy-8-new-tokens",
        "time-per-token-tiny-float32-greedy-ragged-requests-8-new-tokens",
    ]


def test_rows_of_the_gpu_check_are_decode_rows_and_checks(tmp_path):
    rows = [
        row(hardware=GPU, shape="8B", batch=1, mode="greedy", side="handloom", ms_per_token=4.0, tokens_per_s=250.0,
            share_of_ceiling=0.9, driver="H200, 570.1"),
        row(hardware=GPU, check="graph_replay", failed=0, failures=[], seconds=1.5, driver="H200, 570.1"),
        row(hardware=GPU, figure="waits an admission", value=2.0, requests=4, driver="H200, 570.1"),
        row(hardware=GPU, target="8B, share", wanted=">= 0.85", measured=0.9, met="yes", driver="H200, 570.1"),
        row(hardware=GPU, target="8B, compiled", wanted=">= 0.9", measured=None, met="not measured",
            driver="H200, 570.1"),
    ]  # fmt: skip
    where = "H200 (140 GiB), Abacus, 16 cores, 16 threads, driver 570.1; Python 3.11.7, torch 2.13.0; "
    where += "commit aaaaaaa, 2026-03-01."
    assert tables(newest(parsed(tmp_path, *rows))) == (
        f"### Decoding\n\n{where}\n\n"
        "| model | mode | batch | side | tokens/s | ms/token | of bandwidth |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 8B | greedy | 1 | handloom | 250 | 4.00 | 90 % |\n"
        f"\n### Checks\n\n{where}\n\n"
        "| check | failed | seconds |\n"
        "| --- | --- | --- |\n"
        "| graph_replay | 0 | 1.50 |\n"
        f"\n### Figures\n\n{where}\n\n"
        "| figure | value |\n"
        "| --- | --- |\n"
        "| waits an admission | 2.00 |\n"
        f"\n### Aims\n\n{where}\n\n"
        "| aim | wanted | measured | met |\n"
        "| --- | --- | --- | --- |\n"
        "| 8B, share | >= 0.85 | 0.9 | yes |\n"
        "| 8B, compiled | >= 0.9 |  | not measured |\n"
    )


def test_throughput_has_the_spread_and_the_wanted_ratio(tmp_path):
    case = {"benchmark": "decode/throughput", "case": "one prompt", "unit": "tokens/s", "model": "demo"}
    rows = [
        row(side="handloom", median=14.08, min=13.92, max=14.24, ratio=1.0702, limit=1.0, **case),
        row(side="generate", median=13.18, min=12.62, max=13.73, **case),
    ]
    assert tables(newest(parsed(tmp_path, *rows))).splitlines()[-1] == (
        "| demo | one prompt | tokens/s | 14.1 (13.9 to 14.2) | 13.2 (12.6 to 13.7) | 1.07x | 1.00x |"
    )


def test_hardware_never_shares_a_table(tmp_path):
    rows = [call("handloom", 10.0), call("handloom", 20.0, hardware=GPU), call("transformers", 30.0)]
    text = tables(newest(parsed(tmp_path, *rows)))
    assert text.count("### ") == 1
    assert re.findall(r"^\| cpu .*warm \| (.*) \|$", text, flags=re.MULTILINE) == ["20.0", "10.0 | 30.0"]
    first, second = text.index("H200 (140 GiB)"), text.index("Abacus, 2 cores")
    assert first < text.index("| 20.0 |") < second < text.index("| 10.0 |")


def test_the_newest_commit_of_every_case_and_the_last_row_of_every_side(tmp_path):
    old, new = "aaaaaaaaaaaa", "bbbbbbbbbbbb+"
    rows = parsed(
        tmp_path,
        call("handloom", 3.0, commit=new, day=3),
        call("handloom", 4.0, commit=new, day=4),
        call("transformers", 5.0, commit=new, day=3, ratio=2.0),
        call("handloom", 1.0, commit=old, day=2),
        call("torch", 9.0, commit=old, day=2),  # a side that the newer commit did not measure: not mixed in
        call("handloom", 7.0, commit=old, day=1, batch=8),
    )
    assert [r.fields["p50"] for r in newest(rows)] == [4.0, 5.0, 7.0]
    assert sorted(r.fields["p50"] for r in newest(rows, "aaaa")) == [1.0, 7.0, 9.0]
    assert newest(rows, "cccc") == []
    text = tables(newest(rows))
    assert (
        "commits aaaaaaa, bbbbbbb+ (+: with changes that are in no commit), 2026-03-01 to 2026-03-04." in text
    )
    assert text.splitlines()[-2:] == [
        "| cpu | p | flat | 1 | 32000 | fp32 | warm | 4.00 | 5.00 (2.00x) | bbbbbbb+ |",
        "| cpu | p | flat | 8 | 32000 | fp32 | warm | 7.00 |  | aaaaaaa |",
    ]


def test_differing_versions_are_all_named(tmp_path):
    later = {**call("transformers", 2.0), "versions": {"python": "3.12.1", "torch": "2.13.0", "numpy": "2.4"}}
    text = tables(newest(parsed(tmp_path, call("handloom", 1.0), later)))
    assert "Python 3.11.7 / 3.12.1, torch 2.13.0, numpy 2.4;" in text


def test_a_skipped_cell_says_so(tmp_path):
    rows = parsed(tmp_path, call("handloom", None, skipped="needs about 9 GiB"), call("torch", 2.0))
    assert "| skipped | 2.00 |" in tables(newest(rows))


def test_long_tables_are_folded(tmp_path):
    rows = newest(parsed(tmp_path, *(call("handloom", 1.0, batch=n + 1) for n in range(LONG))))
    assert f"<details><summary>{LONG} lines</summary>\n\n| device" in tables(rows)
    assert "<details>" not in tables(rows[:-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (0.0012349, "0.00123"), (0.9996, "1.00"), (1.236, "1.24"), (9.996, "10.0"),
        (99.94, "99.9"), (99.96, "100"), (123.6, "124"), (12345.6, "12,346"), (-12.34, "-12.3"), (12, "12"),
        (float("nan"), "nan"), ("k+p", "k+p"), (True, "True"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert plain(value) == text


def test_sizes_have_units():
    assert [size(n) for n in (512, 2048, 3 * 2**20, 2.5 * 2**30)] == [
        "512 B",
        "2.00 KiB",
        "3.00 MiB",
        "2.50 GiB",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"mode": "p", "voc', "not a JSON object"),
        ("[1, 2]", "a list, expected a JSON object"),
        (json.dumps({"mode": "p", "vocab": 1, "p50": 1.0}), "commit is None, expected a non-empty str"),
        (json.dumps({**call("a", 1.0), "hardware": {}}), "hardware is {}, expected a non-empty dict"),
        (json.dumps({**call("a", 1.0), "time": "yesterday"}), "time is 'yesterday', expected ISO 8601"),
        (json.dumps(call("handloom", None)), "a row of kind 'sampling' without p50"),
        (json.dumps(call(None, 1.0)), "a row of kind 'sampling' without side"),
        (json.dumps(call(3, 1.0)), "side is 3, expected a name"),
        (json.dumps(call("handloom", "fast")), "p50 is 'fast', expected a number"),
        (json.dumps(call("handloom", 1.0, batch="8")), "batch is '8', expected a number"),
        (json.dumps(step("handloom", 1, 5.0, mbu="90 %")), "mbu is '90 %', expected a number"),
        (json.dumps(step("handloom", 1, 5.0, mbu=True)), "mbu is True, expected a number"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(call("handloom", 1.0)) + "\n\n" + line + "\n")
    with pytest.raises(RowError) as error:
        read([path])
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_rows_of_no_known_kind_are_counted_not_dropped_in_silence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (call("handloom", 1.0), row(shape="copy", bytes_per_s=4e12)))))
    rows, unknown = read([path])
    assert len(rows) == 1
    assert unknown == [f"{path}:2"]


def test_the_block_between_the_markers_is_replaced_and_only_that():
    text = "# a\n<!-- results -->\nold\n<!-- /results -->\nend\n"
    once = insert(text, "### new\n")
    assert once == "# a\n<!-- results -->\n\n### new\n\n<!-- /results -->\nend\n"
    assert insert(once, "### new\n") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "0 times <!-- results -->"),
        ("<!-- results --> <!-- results --> <!-- /results -->", "2 times <!-- results -->"),
        ("<!-- results -->", "0 times <!-- /results -->"),
        ("<!-- /results --> <!-- results -->", "stands before"),
    ],
)
def test_a_file_without_its_markers_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        insert(text, "x")


def svg_series(path):
    """label-like id -> number of its markers, of every line in an SVG."""
    groups = [g for g in ET.parse(path).iter(f"{SVG}g") if g.get("id", "").startswith("series-")]
    return {g.get("id"): sum(1 for _ in g.iter(f"{SVG}use")) for g in groups}


def svg_texts(path):
    return ["".join(t.itertext()) for t in ET.parse(path).iter(f"{SVG}text")]


def test_sampling_plot_has_a_line_a_vocabulary_and_side_in_a_panel_a_kind(tmp_path):
    rows = [
        call(side, base * batch, batch=batch, vocab=vocab, rows=kind)
        for side, base in (("handloom", 10.0), ("transformers", 100.0), ("torch", 50.0))
        for batch in (8, 1, 64)
        for vocab in (32000, 151936)
        for kind in ("typical", "flat")
    ]
    (plot,), missing = plots(newest(parsed(tmp_path, *rows)))
    assert len(missing) == 3
    assert [panel.title for panel in plot.panels] == ["typical rows", "flat rows"]
    assert [(s.label, s.points) for s in plot.panels[1].series] == [
        ("handloom, V=32000", ((1, 10.0), (8, 80.0), (64, 640.0))),
        ("transformers, V=32000", ((1, 100.0), (8, 800.0), (64, 6400.0))),
        ("handloom, V=151936", ((1, 10.0), (8, 80.0), (64, 640.0))),
        ("transformers, V=151936", ((1, 100.0), (8, 800.0), (64, 6400.0))),
    ]
    png, svg = draw(plot, tmp_path / "plots")
    assert [png.name, svg.name] == ["sampling-cpu-p-fp32-warm.png", "sampling-cpu-p-fp32-warm.svg"]
    assert svg_series(svg) == {
        f"series-{n}-{kind}-rows-{side}-v-{vocab}": 3
        for kind in ("typical", "flat")
        for n, (vocab, side) in enumerate(
            (v, s) for v in (32000, 151936) for s in ("handloom", "transformers")
        )
    }
    texts = svg_texts(svg)
    for wanted in ("Sampling: cpu, p, fp32, warm", "typical rows", "flat rows", "microseconds a call, median",
                   "handloom, V=32000", "transformers, V=151936", "1", "8", "64"):  # fmt: skip
        assert wanted in texts
    assert any("Abacus, 2 cores, 1 thread" in text for text in texts)


def decode_rows():
    for batch, rate in ((64, 6400.0), (1, 250.0), (8, 1600.0)):
        for context in (256, 4096):
            yield step("handloom", batch, rate, context=context, mbu=0.8 - batch / 1000)
            yield step("generate", batch, rate / 4, context=context, mbu=None)


def test_decode_plots(tmp_path):
    found, missing = plots(newest(parsed(tmp_path, *decode_rows())))
    assert [plot.name for plot in found] == [
        f"{name}-1b-bf16-greedy" for name in ("throughput", "time-per-token", "ceiling")
    ]
    assert missing == ["sampling time over batch: no sampling row of handloom or transformers"]
    throughput, time, ceiling = ({s.label: s.points for s in plot.panels[0].series} for plot in found)
    assert throughput["handloom, context 256"] == ((1, 250.0), (8, 1600.0), (64, 6400.0))
    assert throughput["generate, context 4096"] == ((1, 62.5), (8, 400.0), (64, 1600.0))
    assert set(time) == {f"{side}, batch {n}" for side in ("handloom", "generate") for n in (1, 8, 64)}
    assert time["generate, batch 1"] == ((256, 16.0), (4096, 16.0))
    assert set(ceiling) == {"handloom, context 256", "handloom, context 4096"}
    assert [y for _, y in ceiling["handloom, context 256"]] == pytest.approx([79.9, 79.2, 73.6])
    svg = draw(found[2], tmp_path)[1]
    assert set(svg_series(svg).values()) == {3}
    assert {"Share of the bandwidth ceiling: 1B, bf16, greedy", "share of measured bandwidth, %"} <= set(
        svg_texts(svg)
    )
    assert any(g.get("id") == "limit" for g in ET.parse(svg).iter(f"{SVG}g"))


def test_plots_of_other_hardware_get_files_of_their_own(tmp_path):
    rows = [call("handloom", 1.0), call("handloom", 2.0, hardware=GPU)]
    found, _ = plots(newest(parsed(tmp_path, *rows)))
    assert [plot.name for plot in found] == ["sampling-cpu-p-fp32-warm", "sampling-cpu-p-fp32-warm-2"]
    assert ["H200" in plot.note for plot in found] == [False, True]


def test_the_png_shows_every_line_and_the_files_are_the_same_every_time(tmp_path):
    rows = [call(side, p50 * batch, batch=batch, ratio=None) for batch in (1, 8, 64)
            for side, p50 in (("handloom", 1.0), ("transformers", 9.0))]  # fmt: skip
    rows += [{**r, "vocab": 128256, "p50": 3 * r["p50"]} for r in rows]
    (plot,), _ = plots(newest(parsed(tmp_path, *rows)))
    png, svg = draw(plot, tmp_path / "a")
    pixels = (255 * image.imread(png)[..., :3]).round().astype(int)
    assert (pixels == 255).all(-1).mean() < 0.99  # not blank
    for colour in COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) <= 1).sum() > 200, colour
    assert not (abs(pixels - [int(COLOURS[2][i : i + 2], 16) for i in (1, 3, 5)]).max(-1) <= 1).any()
    again = draw(plot, tmp_path / "b")
    assert (png.read_bytes(), svg.read_bytes()) == tuple(path.read_bytes() for path in again)


def report(*arguments):
    command = [sys.executable, "-m", "benchmarks.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [call("handloom", 1.0), call("transformers", 8.0, ratio=8.0), call("handloom", 2.0, mode="greedy")]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, row(anything=1)]))
    return path


def test_one_command_writes_tables_and_plots(results, tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "plots"
    readme.write_text("top\n<!-- results -->\n<!-- /results -->\nbottom\n")
    done = report(results, "--where", "mode=p", "--write", readme, "--folder", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    text = readme.read_text()
    assert text.startswith("top\n<!-- results -->\n\n### Sampling")
    assert text.endswith(
        "| cpu | p | flat | 1 | 32000 | fp32 | warm | 1.00 | 8.00 (8.00x) |\n\n<!-- /results -->\nbottom\n"
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        f"sampling-cpu-p-fp32-warm.{e}" for e in ("png", "svg")
    ]
    assert f"1 rows of no known kind left out, the first at {results}:4" in done.stderr
    assert "nothing to plot: throughput over batch" in done.stderr
    printed = report(results, "--where", "mode=p", "--no-plots")
    assert printed.stdout.strip() in text


def test_where_keeps_rows_that_lack_the_field(tmp_path):
    rows = parsed(
        tmp_path, call("handloom", 1.0), call("handloom", 2.0, mode="k"), row(check="values", failed=0)
    )
    assert [r.fields.get("mode") for r in chosen(rows, [], ["mode=k"])] == ["k", None]
    assert [r.fields.get("mode") for r in chosen(rows, [], ["mode=k", "mode=p", "failed=1"])] == ["p", "k"]
    assert [r.kind for r in chosen(rows, ["checks"], [])] == ["checks"]


def test_the_command_names_what_is_wrong(results, tmp_path):
    for arguments, message in (
        ((results, "--commit", "ffff"), "no result rows of commit ffff in 1 files"),
        ((results, "--where", "mode=none"), "no result rows with these --section and --where in 1 files"),
        ((tmp_path / "none.jsonl",), f"{tmp_path / 'none.jsonl'}: No such file"),
        ((results, "--section", "samplin"), "expected decode, throughput"),
        ((results, "--where", "mode"), "expected FIELD=VALUE"),
        ((results, "--write", results), "0 times <!-- results -->, expected once"),
    ):
        done = report(*arguments, "--no-plots")
        assert done.returncode != 0, arguments
        assert message in re.sub(r"\s*[│\n]\s*", " ", done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "noise.jsonl").write_bytes(b"\xff\xfe")
    assert "noise.jsonl: no text in UTF-8" in report(tmp_path / "noise.jsonl").stderr
    results.write_text(results.read_text() + '{"half')
    assert f"report: {results}:5: not a JSON object" in report(results).stderr


def test_the_results_of_this_project_can_be_reported(tmp_path):
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    rows, _ = read(paths)
    text = tables(newest(rows))
    assert {row.kind for row in rows} >= {"sampling", "throughput", "cpu", "counts", "memory"}
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(widths) > 3
