"""4-bit linear layers that are compared: weights at a Llama's shapes, and a builder a side."""

import functools
import re
from dataclasses import dataclass

import torch
import typer

from benchmarks.kernels import timing as kernels_timing
from benchmarks.kernels.timing import CACHES, Call, Run
from handloom.kernels.linear.blocked import BlockedLinear, unblockable
from handloom.kernels.linear.nf4 import FourBitWeight, four_bit_linear
from handloom.kernels.linear.packed import PackedLinear, unpackable
from handloom.loading.eightbit import eight_bit_linear

BLOCKSIZE = 64  # weights that share a scale
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LAYERS = {  # outputs, inputs
    "1B q_proj": (2048, 2048),
    "1B k_proj": (512, 2048),
    "1B gate_proj": (8192, 2048),
    "1B down_proj": (2048, 8192),
    "8B q_proj": (4096, 4096),
    "8B k_proj": (1024, 4096),
    "8B gate_proj": (14336, 4096),
    "8B down_proj": (4096, 14336),
}
BYTES_A_WEIGHT = (
    40  # most that the sides need in memory at once: our reference on a CPU widens codes to int64
)
COLUMNS = {
    "layer": "layer", "batch": "B", "dtype": "dtype", "cache": "cache", "side": "side", "p50": "p50 us",
    "ratio": "/ ours", "bandwidth_share": "of bandwidth", "launches": "launches", "operations": "operations",
    "bytes_read": "read", "skipped": "",
}  # fmt: skip


def parse_layer(text: str) -> tuple[int, int]:
    """A name of `LAYERS`, or "512x2048", as (outputs, inputs).

    Raises:
        typer.BadParameter: it is neither, or rows do not hold whole blocks of 64 weights.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    shape = LAYERS.get(text) or (tuple(map(int, match.groups())) if match else (0, 0))
    if not all(shape) or shape[1] % BLOCKSIZE:
        known = ", ".join(LAYERS)
        raise typer.BadParameter(
            f"--layer {text}: expected OUTPUTSxINPUTS, INPUTS a multiple of 64, or one of {known}"
        )
    return shape


@dataclass(frozen=True)
class Layer:
    """A linear layer's input and weight.

    Attributes:
        x: [B, K] activations. weight: [N, K], dense in x's dtype.
    """

    x: torch.Tensor
    weight: torch.Tensor

    def product_bytes(self, weight_bytes: int) -> dict:
        """What a product with a weight of so many bytes moves, each operand once."""
        rows, outputs = len(self.x), len(self.weight)
        read = self.x.numel() * self.x.element_size() + weight_bytes
        return {"bytes_read": read, "bytes_written": rows * outputs * self.x.element_size()}


@functools.lru_cache(maxsize=1)
def weight_of(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A random weight [N, K], the same at every call."""
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype) / shape[1] ** 0.5


def four_bit(weight: torch.Tensor) -> FourBitWeight:
    """A weight as bitsandbytes quantises it (nf4, plain scales); where it is missing, on an even grid."""
    try:
        from bitsandbytes import functional
    except ImportError:
        blocks, code = weight.float().view(-1, BLOCKSIZE), torch.linspace(-1, 1, 16, device=weight.device)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None] + 1) * 7.5).round().to(torch.uint8).view(-1, 2)
        return FourBitWeight(codes[:, :1] << 4 | codes[:, 1:], tuple(weight.shape), code, absmax, BLOCKSIZE)
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4")
    return FourBitWeight.from_bitsandbytes(packed, state)


def four_bit_bytes(shape: tuple[int, int]) -> int:
    """Bytes of a 4-bit weight with float32 scales."""
    return shape[0] * shape[1] // 2 + shape[0] * shape[1] // BLOCKSIZE * 4


def ours(layer: Layer) -> Run:
    """Our product with a weight that stays in 4 bits: Triton on CUDA; on a CPU the reference, which makes it dense."""
    weight = four_bit(layer.weight)
    if layer.x.device.type == "cuda":
        return triton(layer.x, weight, layer.product_bytes(four_bit_bytes(weight.shape)))
    return lambda: four_bit_linear(layer.x, weight, kernels="torch")


def triton(x: torch.Tensor, weight: FourBitWeight, exact: dict) -> Run:
    """The Triton kernel, with its result's memory made before."""
    out = x.new_empty(len(x), weight.shape[0])
    return Call(lambda: four_bit_linear(x, weight, kernels="triton", out=out), exact)


def bitsandbytes_linear(layer: Layer) -> Run | None:
    """The layer that `quantization="nf4"` runs, where bitsandbytes is installed."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return None
    outputs, inputs = layer.weight.shape
    options = {
        "bias": False,
        "compute_dtype": layer.x.dtype,
        "quant_type": "nf4",
        "compress_statistics": False,
    }
    made = Linear4bit(inputs, outputs, **options)
    made.load_state_dict({"weight": layer.weight.cpu()})
    made = made.to(layer.x.device).eval()  # quantises
    return Call(lambda: made(layer.x), layer.product_bytes(four_bit_bytes(layer.weight.shape)))


def plain(weight: torch.Tensor) -> torch.nn.Linear:
    """A dense layer of this very weight."""
    made = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made


def blocked(layer: Layer) -> Run | None:
    """Our dense layer for a CPU, its weight in oneDNN's blocked layout."""
    source = plain(layer.weight)
    if layer.x.device.type != "cpu" or unblockable(source):
        return None
    made, size = BlockedLinear(source), layer.weight.numel() * layer.weight.element_size()
    return Call(lambda: made(layer.x), layer.product_bytes(size))


def packed(bits: int, layer: Layer) -> Run | None:
    """Our packed layer for a CPU, of so many bits."""
    source = plain(layer.weight)
    if layer.x.device.type != "cpu" or unpackable(source, bits, 32):
        return None
    made = PackedLinear(source, bits)
    size = sum(part.numel() * part.element_size() for part in made.buffers())
    return Call(lambda: made(layer.x), layer.product_bytes(size))


def eight_bit(layer: Layer) -> Run | None:
    """Our layer of bytes: bitsandbytes' layout through the product of few rows on CUDA, packed on a CPU."""
    if layer.x.device.type != "cuda":
        return packed(8, layer)
    scales = layer.weight.float().abs().amax(1) / 127
    weight = (layer.weight.float() / scales[:, None]).round().to(torch.int8)
    size = weight.numel() + 4 * len(scales)
    return Call(lambda: eight_bit_linear(layer.x, weight, scales, None, None), layer.product_bytes(size))


def dense(layer: Layer) -> Run:
    """The dense layer that the others stand for."""
    return lambda: torch.nn.functional.linear(layer.x, layer.weight)


SIDES = {
    "handloom": ours,
    "handloom int4": functools.partial(packed, 4),
    "handloom int8": eight_bit,
    "handloom blocked": blocked,
    "bitsandbytes": bitsandbytes_linear,
    "dense": dense,
}


def measure(name, shape, batch, dtype, device, sides, repeats, caches=CACHES, budget=0.0, **how):
    """Yield the rows of one layer and batch, one a side and cache; sides take turns.

    Args:
        name: of the layer. shape: (N, K). dtype, sides: of `DTYPES`, `SIDES`. repeats, budget: see
            `kernels_timing.rounds`. how: more of `kernels_timing.measure`.
    """
    about = {
        "benchmark": "kernels/nf4",
        "layer": name,
        "outputs": shape[0],
        "inputs": shape[1],
        "batch": batch,
    }
    about["dtype"] = dtype
    reason = kernels_timing.shortage(BYTES_A_WEIGHT * shape[0] * shape[1], device)
    if reason:
        yield from (
            {**about, "side": side, "device": device, "cache": caches[0], "skipped": reason} for side in sides
        )
        return
    g = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, shape[1], generator=g, device=device).to(DTYPES[dtype])
    layer = Layer(x, weight_of(shape, DTYPES[dtype], device))
    size = four_bit_bytes(shape) + x.numel() * x.element_size()
    yield from kernels_timing.measure(
        {side: SIDES[side] for side in sides}, layer, size,
        device=device, caches=caches, repeats=repeats, budget=budget, about=about, **how,
    )  # fmt: skip
