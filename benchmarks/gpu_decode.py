"""The engine's part of the GPU check: captured steps against eager ones, syncs, and decode speed at real shapes."""

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from handloom import Engine, SamplingParams

ARCHITECTURES = ("llama", "gemma2", "gpt_oss", "mixtral", "bloom", "deepseek_v3", "jamba")
PROMPTS = [[3, 5, 7, 9, 11], [1] * 17, [4], [2, 3] * 20, [9, 8, 7, 6, 5, 4, 3, 2, 1], [5] * 23]
EVERYTHING = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 1,
}  # fmt: skip
MIXED = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=7, seed=2, n=2),
    SamplingParams(repetition_penalty=1.3, max_new_tokens=15, logprobs=2),
    SamplingParams(max_new_tokens=9, **EVERYTHING),
    SamplingParams(temperature=1.2, mirostat=2, max_new_tokens=11, seed=5),
    SamplingParams(stop_token_ids=tuple(range(40)), temperature=1.0, seed=6, max_new_tokens=40),
]
COLUMNS = ("shape", "batch", "mode", "side", "ms_per_token", "tokens_per_s", "share_of_ceiling")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; weights are random."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int = 128256
    tied: bool = False

    def build(self, device, dtype=torch.bfloat16):
        """The model, in evaluation mode, made on the device."""
        config = AutoConfig.for_model(
            "llama", hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, intermediate_size=self.inner, vocab_size=self.vocab,
            tie_word_embeddings=self.tied, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


SHAPES = [
    Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, tied=True),
    Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14336),
]


def captured_steps(device):
    """Tokens of captured steps equal those of eager steps on the same device, over architectures and processors."""
    from architectures import ARCHITECTURES as BUILDERS

    for name in ARCHITECTURES:
        model = BUILDERS[name]().to(device)
        eager = Engine(model, slots=3, graph=False).generate(PROMPTS, MIXED)
        engine = Engine(model, slots=3, graph=True)
        for turn in range(2):
            for want, got in zip(eager, engine.generate(PROMPTS, MIXED), strict=True):
                if (want.token_ids, want.finish_reason) != (got.token_ids, got.finish_reason):
                    yield f"{name}, turn {turn}, request {got.request}: {want.token_ids} != {got.token_ids}"
        for batch in engine._batches.values():
            if batch.refused:
                yield f"{name}: {len(batch.refused)} of the steps could not be captured"
        engine.pool.check()


def silent_steps(device):
    """No host sync in the decode loop: the steps between two admissions run with syncs made errors."""
    model = SHAPES[0].build(device) if device == "cuda" else None
    engine = Engine(model, slots=4, graph=True)
    events = engine.stream(PROMPTS[:4], max_new_tokens=64, ignore_eos=True, **EVERYTHING)
    for _ in range(40):  # admission, warm-up and capture
        next(events)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4 * 20):
            next(events)
    except RuntimeError as error:
        yield f"the decode loop waits for the device: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        events.close()


def bandwidth(device) -> float:
    """Bytes a second of a large copy, reads and writes counted: the ceiling that shares are taken of."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / min(times)


def weight_bytes(model) -> int:
    """Bytes that one token reads of the weights: everything but an input embedding that is only looked up."""
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total if words is head else total - words.numel() * words.element_size()


def per_token(run, short: int = 16, long: int = 80) -> float:
    """Seconds a token takes, prompt and set-up taken out: the difference of two answer lengths."""
    run(short)
    run(long)
    times = []
    for length in (short, long):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(length)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (long - short)


def sides(model, batch: int, mode: str):
    """(name, function of an answer length) of everything that is compared."""
    vocab = model.config.vocab_size
    prompts = [[(7 * i + 13 * b) % vocab for i in range(128)] for b in range(batch)]
    ids = torch.tensor(prompts, device=model.device)
    params = {} if mode == "greedy" else EVERYTHING
    hf = {"do_sample": False} if mode == "greedy" else {
        "do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    }  # fmt: skip
    engine = Engine(model, slots=batch, graph=True)

    def generate(length, **options):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            min_new_tokens=length,
            **hf,
            **options,
        )

    yield "handloom", lambda n: engine.generate(prompts, max_new_tokens=n, ignore_eos=True, **params)
    yield "generate", generate
    if mode == "greedy":
        yield "generate, static cache + compile", lambda n: generate(n, cache_implementation="static")


def decode_timings(device):
    """Time per token and share of the bandwidth ceiling, ours and transformers', one model in one run."""
    ceiling = bandwidth(device)
    yield {"shape": "copy", "side": "device", "bytes_per_s": ceiling}
    for shape in SHAPES:
        model = shape.build(device)
        read = weight_bytes(model)
        for batch, mode in ((1, "greedy"), (1, "everything"), (64, "everything")):
            for side, run in sides(model, batch, mode):
                seconds = per_token(run)
                yield {
                    "shape": shape.name, "batch": batch, "mode": mode, "side": side,
                    "ms_per_token": 1e3 * seconds, "tokens_per_s": batch / seconds,
                    "share_of_ceiling": read / ceiling / seconds, "weight_bytes": read,
                }  # fmt: skip
        del model
        torch.cuda.empty_cache()
