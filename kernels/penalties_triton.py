"""Launcher and kernel of `penalised`: one program a row counts its text; importing this file needs triton."""

import torch
import triton
import triton.language as tl

from .launching import on_its_device
from .sampling.rules import Replaced

BLOCK = 1024
FIELD = tl.constexpr(20)  # bits of one count
MOST = tl.constexpr((1 << 20) - 1)
PARTS = tuple(
    f"{kind}_{part}" for kind in "rpf" for part in ("strength", "skip_prompt", "skip_output", "window")
)


@triton.jit
def scope(strengths, skip_prompt, skip_output, windows, row, length, prompt, on):
    """(strength, first place, place behind the last) of a penalty in a row; nothing counts where it is not on."""
    strength = tl.full((), 1.0, tl.float32)
    start, end = length, length
    if on:
        strength = tl.load(strengths + row)
        window = tl.load(windows + row)
        start = tl.where(tl.load(skip_prompt + row) != 0, prompt, 0)
        start = tl.where(window > 0, tl.maximum(start, length - window), start)
        end = tl.where(tl.load(skip_output + row) != 0, prompt, length)
    return strength, start, end


@triton.jit(
    do_not_specialize=("logit_stride", "vocab", "history_stride", "capacity", "words", "which"),
    do_not_specialize_on_alignment=(
        "logits", "history", "lengths", "prompts", *PARTS, "first", "counts", "ids_out", "values_out", "touched",
    ),
)  # fmt: skip
def penalties_kernel(
    logits, logit_stride, vocab, history, history_stride, capacity, lengths, prompts,
    r_strength, r_skip_prompt, r_skip_output, r_window, p_strength, p_skip_prompt, p_skip_output, p_window,
    f_strength, f_skip_prompt, f_skip_output, f_window, first, counts, ids_out, values_out, touched, words,
    which, BLOCK: tl.constexpr,
):  # fmt: skip
    """first: int32 [B, V] and counts: int64 [B, V] are scratch, of which the text's tokens alone are used. which: a bit
    for each penalty that is on.
    """
    row = tl.program_id(0).to(tl.int64)
    history += row * history_stride
    logits += row * logit_stride
    first += row * vocab
    counts += row * vocab
    touched += row * words
    length, prompt = tl.load(lengths + row), tl.load(prompts + row)
    r, r_start, r_end = scope(
        r_strength, r_skip_prompt, r_skip_output, r_window, row, length, prompt, which & 1
    )
    p, p_start, p_end = scope(
        p_strength, p_skip_prompt, p_skip_output, p_window, row, length, prompt, which & 2
    )
    f, f_start, f_end = scope(
        f_strength, f_skip_prompt, f_skip_output, f_window, row, length, prompt, which & 4
    )
    lane = tl.arange(0, BLOCK)
    for start in range(0, words, BLOCK):
        tl.store(touched + start + lane, lane * 0, mask=start + lane < words)
    for start in range(0, length, BLOCK):
        place = start + lane
        token = tl.load(history + place, mask=place < length, other=-1)
        text = (token >= 0) & (token < vocab)
        tl.store(first + token, lane * 0 + 2147483647, mask=text)
        tl.store(counts + token, lane.to(tl.int64) * 0, mask=text)
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        place = start + lane
        token = tl.load(history + place, mask=place < length, other=-1)
        text = (token >= 0) & (token < vocab)
        more = ((place >= r_start) & (place < r_end)).to(tl.int64)
        more += ((place >= p_start) & (place < p_end)).to(tl.int64) << FIELD
        more += ((place >= f_start) & (place < f_end)).to(tl.int64) << (2 * FIELD)
        tl.atomic_min(first + token, place.to(tl.int32), mask=text, sem="relaxed")
        tl.atomic_add(counts + token, more, mask=text, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, capacity, BLOCK):
        place = start + lane
        token = tl.load(history + place, mask=place < tl.minimum(length, capacity), other=-1)
        text = (token >= 0) & (token < vocab)
        own = text & (tl.load(first + token, mask=text, other=-1, cache_modifier=".cg") == place)
        count = tl.load(counts + token, mask=own, other=0, cache_modifier=".cg")
        x = tl.load(logits + token, mask=own, other=0.0)
        x = tl.where((count & MOST) > 0, tl.where(x < 0, x * r, tl.div_rn(x, r)), x)
        x = tl.where(((count >> FIELD) & MOST) > 0, x - p, x)
        often = count >> (2 * FIELD)
        x = tl.where(often > 0, x - f * often.to(tl.float32), x)
        inside = place < capacity
        tl.store(ids_out + row * capacity + place, tl.where(own, token, -1).to(tl.int32), mask=inside)
        tl.store(values_out + row * capacity + place, x, mask=inside)
        bit = tl.full((), 1, tl.int32) << (token & 31).to(tl.int32)
        tl.atomic_or(touched + (token >> 5), bit, mask=own, sem="relaxed")


@on_its_device
def launch(*asked):
    """`penalised` by the kernel."""
    made, arguments, named = prepared(*asked)
    if len(made.ids):
        penalties_kernel[(len(made.ids),)](*arguments, **named)
    return made


@on_its_device
def warm_up(logits):
    """Compile the one build that all texts and penalties share, for logits [1, V] of the device and vocabulary."""
    one = torch.zeros(1, 1, device=logits.device)
    flag, number = one.bool(), one.long()
    _, arguments, named = prepared(logits, number, number[0], number[0], *((one, flag, flag, number),) * 3)
    penalties_kernel.warmup(*arguments, grid=(1,), **named)


def prepared(logits, history, lengths, prompt_lengths, repetition, presence, frequency):
    """(the Replaced that is to be filled, arguments, constants and options) of a launch."""
    (rows, vocab), capacity, words = logits.shape, history.shape[1], -(-logits.shape[1] // 32)
    whole = {"dtype": torch.int32, "device": logits.device}
    scratch = (
        torch.empty(rows, vocab, **whole),
        torch.empty(rows, vocab, dtype=torch.int64, device=logits.device),
    )
    ids, values = torch.empty(rows, capacity, **whole), logits.new_empty(rows, capacity)
    made = Replaced(ids, values, torch.empty(rows, words, **whole))
    rules = repetition, presence, frequency
    some = next(rule for rule in rules if rule is not None)
    which = sum(1 << i for i, rule in enumerate(rules) if rule is not None)
    arguments = (
        logits, logits.stride(0), vocab, history, history.stride(0), capacity, lengths, prompt_lengths,
        *(part for rule in rules for part in rule or some), *scratch, *made, words, which,
    )  # fmt: skip
    return made, arguments, {"BLOCK": BLOCK, "num_warps": 8, "enable_fp_fusion": False}
