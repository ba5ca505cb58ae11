"""Loading a Hugging Face causal LM and its tokenizer by name or path."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..errors import ModelError
from ..kernels.linear.blocked import BlockedLinear, plain_alone, unblockable
from . import packing, parallel

log = logging.getLogger("handloom")
OWN = {"nf4-triton": "nf4", "fp4-triton": "fp4", "int8-triton": "int8"}  # bitsandbytes' weights, our product
QUANTIZATIONS = ("nf4", "fp4", "int8", *OWN, *packing.BITS)
DTYPES = ("auto", "fastest", "float32", "float16", "bfloat16", "float64")
SMALL = 1 << 18  # weights of a layer below which the dtype is not worth a measurement
GAIN = 1.2  # how much faster another dtype has to be before the checkpoint's own is left


def load(
    name_or_path,
    *,
    dtype="auto",
    device=None,
    device_map=None,
    tp_plan=None,
    quantization: str | None = None,
    layout: str = "auto",
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **model_kwargs,
):
    """A causal LM in evaluation mode, and its tokenizer or None.

    Args:
        name_or_path: hub id or local folder.
        dtype: a torch dtype, its name, `auto` for the checkpoint's own, or `fastest`: on a CPU the faster one of
            float32 and bfloat16, measured at the model's shapes now, so two loads may differ; elsewhere as `auto`.
        device: where the model goes; None takes CUDA where there is one.
        device_map: passed on for models larger than one device; excludes `device`.
        tp_plan: `auto` splits the model over the processes that torchrun started; excludes `device`, `device_map`
            and `quantization`.
        quantization: None, `nf4`, `fp4` or `int8` (bitsandbytes), `nf4-triton`, `fp4-triton` or `int8-triton` (the
            same weights, products of few rows in our kernel; of bytes without outliers), or on a CPU `int8-cpu` or
            `int4-cpu`: packed weights, the output layer included, with bfloat16 activations. The plain ones are given
            up for them, as by bitsandbytes: the model that comes back has no nn.Linear for adapters, edits and probes,
            and their `weight` is an error. `Engine(model, quantization=...)` keeps both.
        layout: what the engine will do with linear layers on a CPU, see `Engine`; here it counts for `fastest` alone.
        gguf_file: a GGUF file in the folder, dequantised on load.
        revision, trust_remote_code, model_kwargs: passed on to transformers.

    Raises:
        ModelError: nothing usable is found there, or an argument is not valid.
    """
    _check_path(name_or_path)
    place = _place(device, device_map, tp_plan, quantization)
    fastest, dtype = dtype == "fastest", _dtype(dtype)
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    arguments = {**common, "dtype": dtype, **model_kwargs}
    if gguf_file is not None:
        from transformers.utils.quantization_config import GgufConfig

        arguments["quantization_config"] = GgufConfig(dequantize=True)
        arguments["dtype"] = torch.float32 if dtype == "auto" else dtype
    if quantization in packing.BITS:
        arguments["dtype"] = torch.bfloat16 if dtype == "auto" else dtype
    elif quantization is not None:
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
        arguments["device_map"] = {"": place}
    elif fastest and place.type == "cpu":
        arguments["dtype"] = _dtype_for_cpu(name_or_path, common, layout)
    if device_map is not None:
        arguments["device_map"] = device_map
    if tp_plan is not None:
        arguments |= parallel.plan_arguments(tp_plan)
    try:
        module = AutoModelForCausalLM.from_pretrained(name_or_path, **arguments)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load a causal LM from {str(name_or_path)!r}: {error}") from error
    text = module.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) and "attn_implementation" not in model_kwargs:
        # transformers before 5.23 may choose sdpa, which drops the softcap
        module.set_attn_implementation("eager")
    if "device_map" not in arguments and tp_plan is None:
        module = module.to(place)
    if quantization in packing.BITS:
        packing.pack(module, quantization)
    return module.eval(), _tokenizer(name_or_path, common)


def _place(device, device_map, tp_plan, quantization) -> torch.device:
    """Where the model goes, once the arguments fit each other."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization={quantization!r} is not one of None, {', '.join(QUANTIZATIONS)}")
    given = {"device": device, "device_map": device_map, "tp_plan": tp_plan}
    given = {name: value for name, value in given.items() if value is not None}
    if tp_plan is not None and quantization is not None:
        given["quantization"] = quantization
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ModelError(f"{listed} exclude each other")
    packed = quantization in packing.BITS
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() and not packed else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"device={device!r} is not a torch device such as cpu or cuda:0") from error
    if packed and (place.type != "cpu" or device_map not in (None, "cpu", {"": "cpu"})):
        where = f"device_map={device_map!r}" if device_map is not None else f"device={str(place)!r}"
        raise ModelError(
            f'quantization={quantization!r} is for the CPU, not {where}; on CUDA use "int8", "nf4" or "fp4"'
        )
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device={str(place)!r} is not to be had here: {reason}; device='cpu' always is"
        ) from error
    return place


def _check_path(name_or_path) -> None:
    """Raise ModelError for what can only be a path and is no folder; anything else may be a hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise ModelError(
            f"{str(name_or_path)!r} is a file: pass its folder, and gguf_file={path.name!r} if it is a GGUF file"
        )
    looks_like_one = isinstance(name_or_path, Path) or str(name_or_path).startswith((".", "/", "~"))
    if looks_like_one and not path.is_dir():
        raise ModelError(f"cannot load a causal LM from {str(name_or_path)!r}: there is no such folder")


def _dtype(dtype):
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not a torch dtype or one of {', '.join(DTYPES)}")
    return "auto" if dtype in ("auto", "fastest") else getattr(torch, dtype)


# -- the dtype on a CPU


def _dtype_for_cpu(name_or_path, common, layout):
    """The checkpoint's dtype, or the one of float32 and bfloat16 that is clearly faster on this machine."""
    try:
        config = AutoConfig.from_pretrained(name_or_path, **common).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError):
        return "auto"  # from_pretrained will say what is wrong
    own = getattr(config, "dtype", None)
    hidden, vocab = getattr(config, "hidden_size", None), getattr(config, "vocab_size", None)
    inner = getattr(config, "intermediate_size", None) or (hidden and 4 * hidden)
    if own not in (torch.float32, torch.bfloat16, torch.float16) or getattr(
        config, "quantization_config", None
    ):
        return "auto"
    if not isinstance(hidden, int) or not isinstance(inner, int) or hidden * inner < SMALL:
        return "auto"
    times = linear_times(hidden, inner, min(vocab, 1 << 14), layout)
    best = min(times, key=times.get)
    chosen = own if own in times and times[own] <= GAIN * times[best] else best
    listed = ", ".join(f"{str(d).removeprefix('torch.')} {1e6 * t:.0f} us" for d, t in times.items())
    log.info("dtype on this CPU: %s (a layer and part of the output layer: %s)", chosen, listed)
    return chosen


@functools.lru_cache(maxsize=16)  # one answer a process: engines of one model agree
def linear_times(
    hidden: int, inner: int, outputs: int, layout: str = "auto", rounds: int = 5
) -> dict[torch.dtype, float]:
    """Shortest time of the products of one decode step at batch 1, for each dtype worth a thought.

    Args:
        hidden, inner, outputs: widths of the residual stream, the feed-forward layer and (part of) the output layer.
        layout: of the weights, see `load`.
        rounds: measurements of each, in turn.

    Returns:
        dtype -> seconds for `inner x hidden`, `hidden x inner` and `outputs x hidden`.
    """
    shapes = ((inner, hidden), (hidden, inner), (outputs, hidden))
    sides = {}
    for dtype in (torch.float32, torch.bfloat16):
        sides[dtype] = [
            (torch.full((1, shape[1]), 0.5, dtype=dtype), _linear(shape, dtype, layout)) for shape in shapes
        ]
    best = dict.fromkeys(sides, float("inf"))
    with torch.no_grad():
        for turn in range(rounds + 1):
            for dtype, products in sides.items():
                start = time.perf_counter()
                for x, product in products:
                    product(x)
                if turn:  # the first round pays for what is set up once
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def _linear(shape, dtype, layout):
    """A linear layer of this shape as `load` would leave it."""
    with torch.device("meta"):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.full(shape, 0.01, dtype=dtype), requires_grad=False)
    plain = layout == "plain" or (layout == "auto" and plain_alone(dtype))  # one row
    return layer if plain or unblockable(layer) else BlockedLinear(layer)


def _bitsandbytes(quantization: str, dtype):
    kind = OWN.get(quantization, quantization)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0 if quantization in OWN else 6.0)
    compute = torch.float32 if dtype == "auto" and not torch.cuda.is_available() else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=torch.bfloat16 if compute == "auto" else compute,
    )


def _tokenizer(name_or_path, common):
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **common)
    except Exception as error:  # noqa: BLE001 - the Rust tokenizers raise bare Exception; ids decode without one
        log.warning("no tokenizer from %r: %s", str(name_or_path), str(error).split("\n")[0][:200])
        return None
