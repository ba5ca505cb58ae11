"""Loading a Hugging Face causal LM and its tokenizer by name or path."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .errors import ModelError

QUANTIZATIONS = ("nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


def load(
    name_or_path,
    *,
    dtype="auto",
    device=None,
    device_map=None,
    quantization: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **model_kwargs,
):
    """A causal LM in evaluation mode, and its tokenizer or None.

    Args:
        name_or_path: hub id or local folder.
        dtype: a torch dtype, its name, or `auto` for the checkpoint's own.
        device: where the model goes; None takes CUDA where there is one.
        device_map: passed on for models larger than one device; excludes `device`.
        quantization: None, `nf4`, `fp4` or `int8` (bitsandbytes).
        gguf_file: a GGUF file in the folder, dequantised on load.
        revision, trust_remote_code, model_kwargs: passed on to transformers.

    Raises:
        ModelError: nothing usable is found there, or an argument is not valid.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization={quantization!r} is not one of None, {', '.join(QUANTIZATIONS)}")
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and device_map={device_map!r} exclude each other")
    dtype = _dtype(dtype)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    arguments = {**common, "dtype": dtype, **model_kwargs}
    if gguf_file is not None:
        from transformers.utils.quantization_config import GgufConfig

        common["gguf_file"] = arguments["gguf_file"] = gguf_file
        arguments["quantization_config"] = GgufConfig(dequantize=True)
        arguments["dtype"] = torch.float32 if dtype == "auto" else dtype
    if quantization is not None:
        arguments["quantization_config"] = _bitsandbytes(quantization, dtype)
    if device_map is not None or quantization is not None:
        arguments["device_map"] = device_map if device_map is not None else {"": place}
    try:
        module = AutoModelForCausalLM.from_pretrained(name_or_path, **arguments)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot load a causal LM from {str(name_or_path)!r}: {error}") from error
    if "device_map" not in arguments:
        module = module.to(place)
    return module.eval(), _tokenizer(name_or_path, common)


def _dtype(dtype):
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not a torch dtype or one of {', '.join(DTYPES)}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _bitsandbytes(quantization: str, dtype):
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if dtype == "auto" and not torch.cuda.is_available() else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=torch.bfloat16 if compute == "auto" else compute,
    )


def _tokenizer(name_or_path, common):
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **common)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a model without a tokenizer still decodes ids
