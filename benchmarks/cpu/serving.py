"""What serving costs over the loop: processor time a token at 64 rows, and how late a streamed token is.

Run from the repository root: `python -m benchmarks.cpu.serving`. A random Llama, clients in their own process; rows
of `cpu/serving`. Times are microseconds of processor time a token, of the engine's thread and of the event loop's, so
that neighbours on the machine count little; lateness is from the loop's event to the client, in milliseconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

import torch
import uvicorn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.support.common import RESULTS, in_turn, median_ratio, record, show
from handloom import Engine
from handloom.loop.intake import Arrivals
from handloom.serve.app import Server

ROWS, PROMPT = 64, [5, 6, 7, 8]
ALONE = "served, one request that streams"
COLUMNS = {
    "case": "case", "engine_us": "engine's thread us/token", "ratio": "over the loop",
    "speaker_us": "event loop us/token",
    "late_ms": "late ms, median", "late_p99_ms": "99 %",
}  # fmt: skip


def tiny() -> LlamaForCausalLM:
    """A random model whose step is quick."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words() -> PreTrainedTokenizerFast:
    """A word for every token, so that each has a text to stream."""
    made = Tokenizer(WordLevel({f"word{i}": i for i in range(512)}, unk_token="word0"))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def loop(engine: Engine, tokens: int) -> dict[str, float]:
    """The loop alone, with nobody who listens."""
    arrivals = Arrivals(engine)
    arrivals.submit([PROMPT] * ROWS, temperature=1.0, seed=1, max_new_tokens=tokens)
    start = time.thread_time()
    for _ in engine.stream(arrivals):
        pass
    return {"engine_us": 1e6 * (time.thread_time() - start) / (ROWS * tokens)}


class Served:
    """A server in this process, and clients in others."""

    def __init__(self, engine: Engine):
        self.server = Server(engine, "tiny")
        self.told: list[float] = []
        tell = self.server.worker._tell

        def noted(channel, event):
            self.told.append(time.monotonic())
            tell(channel, event)

        self.server.worker._tell = noted
        config = uvicorn.Config(self.server.app, port=0, log_level="warning", lifespan="on")
        self.runner = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.runner.run)
        self.thread.start()
        while not self.runner.started:
            time.sleep(0.01)
        self.port = self.runner.servers[0].sockets[0].getsockname()[1]
        threads = {"engine_us": self.server.worker._thread, "speaker_us": self.thread}
        self.clocks = {name: time.pthread_getcpuclockid(thread.ident) for name, thread in threads.items()}

    def ask(self, tokens: int, connections: int, stream: bool, rows: int = ROWS) -> dict[str, float]:
        """So many rows, asked for over so many connections."""
        self.told.clear()
        body = {
            "prompt": [PROMPT] * (rows // connections),
            "max_tokens": tokens,
            "temperature": 1.0,
            "seed": 1,
        }
        body |= {"stream": True} if stream else {}
        command = [sys.executable, "-m", "benchmarks.cpu.client", str(self.port), str(connections)]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        client.stdout.readline()  # it is ready
        began = {name: time.clock_gettime(clock) for name, clock in self.clocks.items()}
        out, _ = client.communicate(json.dumps(body))
        found = {
            name: 1e6 * (time.clock_gettime(clock) - began[name]) / (tokens * rows)
            for name, clock in self.clocks.items()
        }
        seen = json.loads(out)
        if stream:
            late = sorted(1e3 * (b - a) for a, b in zip(sorted(self.told), sorted(seen), strict=False))
            found |= {"late_ms": statistics.median(late), "late_p99_ms": late[int(0.99 * len(late))]}
        return found

    def close(self) -> None:
        self.runner.should_exit = True
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(tiny(), words(), slots=ROWS)
    served = Served(Engine(engine.model, engine.tokenizer, slots=ROWS))
    sides = {
        "loop": lambda _: loop(engine, asked.tokens),
        "served, one request of 64 prompts": lambda _: served.ask(asked.tokens, 1, False),
        "served, 64 requests that stream": lambda _: served.ask(asked.tokens, ROWS, True),
        ALONE: lambda _: served.ask(asked.tokens, 1, True, rows=1),
    }
    try:
        found = in_turn(sides, asked.repeats)
    finally:
        served.close()
    rows = []
    for case, measured in found.items():
        row = {"benchmark": "cpu/serving", "case": case, "rows": 1 if case == ALONE else ROWS}
        for name in measured[0]:
            row[name] = statistics.median(each[name] for each in measured)
        if row["rows"] == ROWS:
            row["ratio"] = median_ratio(
                *([each["engine_us"] for each in side] for side in (measured, found["loop"]))
            )
        rows.append(row)
    show("serving", COLUMNS, record(rows, RESULTS / "cpu.jsonl"))


if __name__ == "__main__":
    main()
