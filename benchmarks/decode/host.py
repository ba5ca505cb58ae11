"""What the host does for a step, an admission and ragged requests, where replaying what was recorded costs nothing.

    python -m benchmarks.decode.host                        # this checkout
    python -m benchmarks.decode.host --tree OTHER           # beside another one, in turns; repeatable

Steps and passes are recorded as on CUDA, by a recorder whose replays do nothing: what is left is the host's own work,
which no device hides. The model's forward, where one runs, is left out. Times are those of the thread, the least of
many runs; calls of Python functions are exact. An admission is a call with one token, less a step. Of 192 ragged
requests on 64 slots, "asked" is what it takes to read and check them, "prepare" to make room for their tokens, step
by step. A step of a State with tokens on its device is told in two parts: what comes before its pass is launched, for
which the device waits, and what comes after, beside which it runs.
"""

import argparse
import functools
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODES = {"greedy": {}, "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}}
ROWS = (1, 16)
REQUESTS, SLOTS, PROMPTS, ANSWERS = (
    192,
    64,
    (32, 512),
    (12, 96),
)  # ragged ones, as the check on a GPU has them
SHORT, LONG, LAYERS = 17, 273, 16  # answers between which a step is taken; layers as a model of 1B has them
WARM, STEPS = 16, 128  # steps of a State in which passes may be recorded, and those that are measured


class Nothing:
    """A recording whose replay costs nothing."""

    def replay(self) -> None:
        """Nothing."""


class Recorder:
    """Takes the place of what records CUDA graphs."""

    def __init__(self, several: bool):
        self.several = several

    def warm_up(self, program) -> None:
        """Run it."""
        program()

    def record(self, *programs):
        """A recording for each program; checkouts before there were several a step take one."""
        return [Nothing() for _ in programs] if self.several else Nothing()

    def settle(self) -> None:
        """Nothing runs."""


@contextmanager
def recorders():
    """Let whatever engine is made inside the block record by `Recorder`."""
    import handloom  # noqa: F401

    several = "handloom.forward.programs.capture" in sys.modules
    places = [
        m for name, m in sys.modules.items() if name.startswith("handloom") and hasattr(m, "recorder_for")
    ]
    kept = [place.recorder_for for place in places]
    try:
        for place in places:
            place.recorder_for = lambda device: Recorder(several)
        yield
    finally:
        for place, before in zip(places, kept, strict=True):
            place.recorder_for = before


class Host:
    """A tiny model of many layers in an engine of `rows` slots, and what the host takes for a run of it."""

    def __init__(self, rows: int, mode: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from handloom import Engine

        class Timed(LlamaForCausalLM):
            @functools.wraps(LlamaForCausalLM.forward)
            def forward(this, *args, **kwargs):
                if self.note is not None:
                    self.note()
                start, self.within = time.thread_time(), True
                try:
                    return super().forward(*args, **kwargs)
                finally:
                    self.inside, self.within = self.inside + time.thread_time() - start, False

        Timed.__module__ = LlamaForCausalLM.__module__  # whose file tells that its attention may be another
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=2,
        )  # fmt: skip
        self.rows, self.mode, self.turn = rows, mode, 0
        self.inside, self.within = 0.0, False  # seconds in the model's forward, and whether it runs
        self.note: Callable[[], None] | None = None  # called when a pass of a State begins
        with recorders():
            self.engine = Engine(
                Timed(config).eval(), slots=rows, graph=True, self_check=False, max_length=2048
            )
            for new in (1, SHORT, LONG) * 2:
                self.run(new)

    def prompts(self) -> list[list[int]]:
        """As many as there are slots, never seen before."""
        turns = range(self.turn + 1, self.turn + 1 + self.rows)
        self.turn += self.rows
        return [[3 + (turn * 7 + i * i * turn) % 500 for i in range(24)] for turn in turns]

    def run(self, new: int) -> float:
        """Seconds of this thread for as many requests as there are slots, with prompts never seen."""
        prompts = self.prompts()
        self.inside, start = 0.0, time.thread_time()
        self.engine.generate(prompts, max_new_tokens=new, ignore_eos=True, progress=False, **MODES[self.mode])
        return time.thread_time() - start - self.inside

    def times(self, repeats: int) -> dict[str, float]:
        """Microseconds of a step and of an admission of all rows."""
        gc.collect()
        gc.disable()
        one, few, many = (min(self.run(new) for _ in range(repeats)) for new in (1, SHORT, LONG))
        gc.enable()
        step = (many - few) / (LONG - SHORT)
        return {"us_per_step": 1e6 * step, "us_per_admission": 1e6 * (one - step)}

    def ragged(self, repeats: int) -> dict[str, float]:
        """Milliseconds of ragged requests, never seen before: to read and check them, and to make room step by step."""
        from handloom import SamplingParams

        batches = [
            m.Batch for n, m in [*sys.modules.items()] if n.startswith("handloom") and hasattr(m, "Batch")
        ]
        found: list[dict[str, float]] = []
        for turn in range(repeats):
            rng, spent = random.Random(turn), []
            prompts = [[rng.randrange(3, 500) for _ in range(rng.randint(*PROMPTS))] for _ in range(REQUESTS)]
            params = [
                SamplingParams(max_new_tokens=rng.randint(*ANSWERS), ignore_eos=True, **MODES[self.mode])
                for _ in prompts
            ]
            start = time.thread_time()
            self.engine.requests(prompts, params)
            asked = time.thread_time() - start
            with timed(batches[0], "prepare", spent):
                self.engine.generate(prompts, params, progress=False)
            found.append({"ms_asked": 1e3 * asked, "ms_prepare": 1e3 * sum(spent)})
        return {name: min(each[name] for each in found) for name in found[0]}

    def calls(self) -> dict[str, float]:
        """Calls of Python functions in a step and in an admission of all rows."""
        one, few, many = (self._calls(new) for new in (1, SHORT, LONG))
        step = (many - few) / (LONG - SHORT)
        return {"calls_per_step": step, "calls_per_admission": one - step}

    def _calls(self, new: int) -> int:
        self._counting(self.run, new)
        return self.count

    def _counting(self, call: Callable, *given):
        """What a call gives; `count` tells how many Python functions it has called so far."""
        self.count = 0

        def profile(frame, event, argument):
            self.count += event == "call" and not self.within

        sys.setprofile(profile)
        try:
            return call(*given)
        finally:
            sys.setprofile(None)

    def state_times(self, repeats: int) -> dict[str, float]:
        """Microseconds of a step of a State, before and after its pass is launched."""
        gc.collect()
        gc.disable()
        walks = [self._walk(lambda: time.thread_time() - self.inside) for _ in range(repeats)]
        gc.enable()
        before, after = map(min, zip(*walks, strict=True))
        return {"us_before": 1e6 * before, "us_after": 1e6 * after}

    def state_calls(self) -> dict[str, float]:
        """Calls of Python functions in a step of a State, before and after its pass is launched."""
        before, after = self._counting(self._walk, lambda: self.count)
        return {"calls_before": before, "calls_after": after}

    def _walk(self, clock: Callable[[], float]) -> tuple[float, float]:
        """What a clock shows before and after the launch of a State's pass, a mean over `STEPS`."""
        import torch

        state, tokens, marks = self.engine.prefill(self.prompts()), torch.full((self.rows,), 5), []

        def launch(*_):
            marks.append(clock())

        self.note, kept, Nothing.replay = launch, Nothing.replay, launch
        try:
            for _ in range(WARM + STEPS):
                marks.append(clock())
                state = self.engine.step(state, tokens)
                marks.append(clock())
        finally:
            self.note, Nothing.replay = None, kept
        starts, launches, ends = (sum(marks[3 * WARM + part :: 3]) for part in range(3))
        return (launches - starts) / STEPS, (ends - launches) / STEPS


@contextmanager
def timed(kind: type, name: str, spent: list[float]):
    """Note the seconds of this thread that each call of a method takes."""
    original = getattr(kind, name)

    def call(*given):
        start = time.thread_time()
        try:
            return original(*given)
        finally:
            spent.append(time.thread_time() - start)

    setattr(kind, name, call)
    try:
        yield
    finally:
        setattr(kind, name, original)


def worker() -> None:
    """Answer one case a line: figures of the checkout whose `handloom` is on the path."""
    import torch

    torch.set_num_threads(1)
    made: dict[tuple, Host] = {}
    for line in sys.stdin:
        case = json.loads(line)
        key = case["rows"], case["mode"]
        host = made[key] if key in made else made.setdefault(key, Host(*key))
        found = getattr(host, case["what"])(**case["how"])
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def started(tree: Path, folder: Path) -> subprocess.Popen:
    """A worker of a checkout, which need not be installed."""
    package = folder / "handloom"
    package.mkdir(parents=True)
    for part in (tree / "engine").iterdir():
        if part.name != "kernels":
            (package / part.name).symlink_to(part.resolve())
    (package / "kernels").symlink_to((tree / "kernels").resolve())
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--worker"],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def ask(process: subprocess.Popen, what: str, how: dict, about: dict) -> dict:
    """A worker's answer."""
    process.stdin.write(json.dumps(about | {"what": what, "how": how}) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def measure(trees: list[Path], rounds: int, repeats: int):
    """Rows: every checkout in turn, the least of all rounds."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {tree: started(tree, Path(folder, str(i))) for i, tree in enumerate(trees)}
        for mode in MODES:
            for rows in ROWS:
                about = {"mode": mode, "rows": rows}
                counts = {tree: ask(each, "calls", {}, about) for tree, each in workers.items()}
                yield from least(workers, "times", about, rounds, repeats, counts)
            yield from least(workers, "ragged", {"mode": mode, "rows": SLOTS}, 1, repeats)
        for rows in ROWS:
            about = {"mode": next(iter(MODES)), "rows": rows}
            counts = {tree: ask(each, "state_calls", {}, about) for tree, each in workers.items()}
            for row in least(workers, "state_times", about, rounds, repeats, counts):
                yield row | {"mode": "State"}
        for process in workers.values():
            process.stdin.close()
            process.wait()


def least(workers: dict, what: str, about: dict, rounds: int, repeats: int, counts: dict | None = None):
    """Rows of one case: every checkout in turn, the least of all rounds."""
    found: dict[Path, dict] = counts or {tree: {} for tree in workers}
    for _ in range(rounds):
        for tree, process in workers.items():
            for name, time_ in ask(process, what, {"repeats": repeats}, about).items():
                found[tree][name] = min(time_, found[tree].get(name, time_))
    for tree, figures in found.items():
        row = {"benchmark": "decode/host", **about, "tree": commit(tree)}
        yield row | {name: round(value, 1) for name, value in figures.items()}


def commit(tree: Path) -> str:
    """The commit of a checkout, and a "+" if it differs from it."""
    asked = ["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or str(tree)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout; repeatable")
    parser.add_argument("--rounds", type=int, default=7, help="in which all checkouts run in turn")
    parser.add_argument("--repeats", type=int, default=5, help="runs of a round, of which the least counts")
    parser.add_argument("--output", type=Path, help="rows are appended here, if given")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    from benchmarks.support.common import record, show

    rows = list(measure([*options.tree, ROOT], options.rounds, options.repeats))
    if options.output:
        record(rows, options.output)
    names = (
        "us_per_step",
        "calls_per_step",
        "us_per_admission",
        "calls_per_admission",
        "ms_asked",
        "ms_prepare",
        "us_before",
        "calls_before",
        "us_after",
        "calls_after",
    )
    show("the host's share", {n: n for n in ("mode", "rows", "tree", *names)}, rows)


if __name__ == "__main__":
    main()
