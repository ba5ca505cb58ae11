"""Memory of the block pool: what the cells of live sequences take, and that serving does not grow it."""

import gc
import random
from pathlib import Path

import psutil
import torch

from benchmarks.support.shapes import SHAPES, build, config_of
from handloom import Engine, SamplingParams

PAGE = 4096
VOCAB = SHAPES["tiny"][1]["vocab_size"]
COLUMNS = {
    "case": "case",
    "quantity": "quantity",
    "value": "value",
    "expected": "expected",
    "ratio": "ratio",
    "limit": "limit",
}


def measure(served: int, rows: int, length: int) -> list[dict]:
    """All rows of this section; see `cells` and `growth`."""
    return [{"benchmark": "decode/memory", **row} for row in (*cells(rows, length), *growth(served))]


def cells(rows: int, length: int) -> list[dict]:
    """Bytes of key/value storage that are in memory while `rows` sequences of `length` tokens live.

    Expected: blocks in use times bytes of a block. Untouched pages of a CPU tensor take no memory.
    """
    config = config_of("tiny")
    config.num_key_value_heads, config.head_dim = 4, 64
    model = build("tiny", torch.float32, config=config)
    engine = Engine(model, slots=rows)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for _ in range(rows)]
    state = engine.prefill(prompts)
    pool = engine.pool
    tensors = [t for store in pool.stores for t in (store.keys, store.values)]
    held, allocated = sum(map(resident_bytes, tensors)), sum(t.nbytes for t in tensors)
    expected = pool.in_use * pool.block_bytes
    case = f"{len(state)} sequences of {length} tokens"
    return [
        {"case": case, "quantity": "bytes in memory", "value": held, "expected": expected}
        | {"ratio": held / expected, "limit": 1.05},
        {"case": case, "quantity": "bytes allocated", "value": allocated, "expected": expected}
        | {"ratio": allocated / expected},
    ]


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a CPU tensor that are in physical memory; all of them where the system does not tell."""
    start, size = tensor.data_ptr(), tensor.nbytes
    table = Path("/proc/self/pagemap")
    if not size or tensor.device.type != "cpu" or not table.exists():
        return size
    first, last = start // PAGE, (start + size - 1) // PAGE
    with table.open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = torch.frombuffer(bytearray(file.read(8 * (last - first + 1))), dtype=torch.int64)
    # Bit 63 of an entry says that the page is present, so such an entry is negative as a signed number.
    return min(size, int((entries < 0).sum()) * PAGE)


def growth(served: int) -> list[dict]:
    """What is held after a fifth of the requests and after all of them."""
    engine = Engine(build("tiny", torch.float32), slots=8)
    rng = random.Random(0)
    early = None
    for done in range(0, served, 20):
        requests = [_request(rng) for _ in range(20)]
        engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
        if early is None and done + 20 >= served // 5:
            early = held(engine)
    late = held(engine)
    engine.pool.check()
    case = f"after {served} requests, expected: after {served // 5}"
    return [
        {"case": case, "quantity": name, "value": late[name], "expected": early[name]}
        | ({"ratio": late[name] / early[name]} if early[name] else {})
        for name in late
    ]


def _request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60))]
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 20),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.1]),
        logprobs=rng.choice([None, 2]),
        n=rng.choice([1, 1, 3]),
        seed=rng.randrange(2**31),
    )
    return prompt, params


def held(engine: Engine) -> dict[str, int]:
    """What the process and the pool hold at a moment when no request runs."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "process bytes": psutil.Process().memory_info().rss,
        "pool capacity, blocks": engine.pool.capacity,
        "blocks in use": engine.pool.in_use,
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
        "objects": len(objects),
    }
