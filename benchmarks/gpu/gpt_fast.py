"""gpt-fast's model and its compiled loop over the same weights, from a checkout of its own (meta-pytorch/gpt-fast)."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedModel

from benchmarks.decode.sides import Clock, Request, Sampling, Timeline, counted

ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load(folder: Path | None) -> ModuleType:
    """gpt-fast's module `model`.

    Raises:
        ImportError: there is no such file.
    """
    path = folder and folder / "gpt-fast" / "model.py"
    if path is None or not path.is_file():
        raise ImportError(f"no {path or 'gpt-fast/model.py'}: its checkout is given in a folder of peers")
    spec = importlib.util.spec_from_file_location("gpt_fast_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection, for rotation of neighbours instead of halves: [heads * D, inputs] -> the same."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def transformer(module: ModuleType, model: PreTrainedModel, longest: int) -> torch.nn.Module:
    """gpt-fast's Transformer with the weights of a Llama; all but q, k and v where they lie.

    Raises:
        ValueError: a model that it cannot describe.
    """
    config, rope = model.config, model.config.rope_parameters
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.model_type != "llama" or config.hidden_size != heads * config.head_dim:
        raise ValueError(
            f"gpt-fast: {config.model_type} with heads of {config.head_dim}: expected a plain Llama"
        )
    scaling = {name: rope[name] for name in ROPE} if rope["rope_type"] == "llama3" else None
    args = module.ModelArgs(
        block_size=longest, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers, n_head=heads,
        dim=config.hidden_size, intermediate_size=config.intermediate_size, n_local_heads=kv_heads,
        rope_base=rope["rope_theta"], norm_eps=config.rms_norm_eps, rope_scaling=scaling,
    )  # fmt: skip
    weights = {"tok_embeddings": model.model.embed_tokens, "norm": model.model.norm, "output": model.lm_head}
    state = {f"{name}.weight": part.weight for name, part in weights.items()}
    for number, layer in enumerate(model.model.layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"layers.{number}."
        q, k = interleaved(attention.q_proj.weight, heads), interleaved(attention.k_proj.weight, kv_heads)
        state |= {
            at + "attention.wqkv.weight": torch.cat([q, k, attention.v_proj.weight]),
            at + "attention.wo.weight": attention.o_proj.weight,
            at + "feed_forward.w1.weight": mlp.gate_proj.weight,
            at + "feed_forward.w3.weight": mlp.up_proj.weight,
            at + "feed_forward.w2.weight": mlp.down_proj.weight,
            at + "attention_norm.weight": layer.input_layernorm.weight,
            at + "ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    with torch.device("meta"):
        made = module.Transformer(args)
    made.load_state_dict(state, assign=True)
    return made.eval()


class GptFast:
    """gpt-fast: its model, a step compiled with mode "reduce-overhead", greedy; one prompt at a time.

    Args:
        module: its module `model`. longest: most tokens of a prompt with its answer.
        compile: None compiles on CUDA. clock: seconds, of a device without events.
    """

    name = "gpt-fast"
    counts_operations = False

    def __init__(
        self,
        module: ModuleType,
        model: PreTrainedModel,
        longest: int,
        compile: bool | None = None,
        clock: Clock = time.perf_counter,
    ):
        self.model, self.device, self.clock = model, model.device, clock
        self.transformer = transformer(module, model, longest)
        with torch.device(self.device):
            self.transformer.setup_caches(max_batch_size=1, max_seq_length=longest)
        length = self.transformer.max_seq_length
        self.mask = create_block_mask(_causal, 1, 1, length, length, device=self.device)
        self._step = _decode
        if self.device.type == "cuda" if compile is None else compile:
            self._step = torch.compile(_decode, mode="reduce-overhead", fullgraph=True)

    @classmethod
    def of(cls, peers: Path | None, name: str, model: PreTrainedModel, slots: int, longest: int) -> "GptFast":
        """Made of what `rivals.side` takes."""
        return cls(load(peers), model, longest)

    @torch.no_grad()
    def tokens(self, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """A greedy answer and when its tokens were there; nothing waits between two steps."""
        start, marks, found = self._mark(), [], []
        place = torch.arange(len(prompt), device=self.device)
        shape = 1, 1, len(prompt), self.transformer.max_seq_length
        mask = create_block_mask(_causal, *shape, device=self.device)
        ids = torch.tensor([prompt], device=self.device)
        ids = self.transformer(mask, ids, place)[:, -1].argmax(-1, keepdim=True)
        position = place[-1:] + 1
        for left in reversed(range(new_tokens)):
            found.append(ids.clone())
            marks.append(self._mark())
            if left:
                ids = self._step(self.transformer, found[-1], position, self.mask).clone()
                position = position + 1
        answer = torch.cat(found, 1)[0].tolist()  # waits for the device, so that its events are over
        since = start.elapsed_time if self.device.type == "cuda" else lambda mark: 1e3 * (mark - start)
        return answer, [since(mark) / 1e3 for mark in marks]

    def _mark(self):
        """This moment: of the device where it has events."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """See `Side`."""
        if sampling is not None:
            raise ValueError("gpt-fast is measured greedily alone")
        lines, start = Timeline.of(requests), 0.0
        for moments, request in zip(lines.tokens, requests, strict=True):
            _, found = self.tokens(request.prompt, request.new_tokens)
            moments += [start + moment for moment in found]
            start = moments[-1]
        lines.total = start
        return lines

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        return counted(requests, [len(moments) for moments in self.timeline(requests, sampling).tokens])

    def close(self) -> None:
        """See `Side`."""


def _decode(transformer, ids, position, whole):
    """The token after `ids` [1, 1] at `position` [1]; `whole` is the mask of all positions."""
    mask = whole[:, :, position // whole.BLOCK_SIZE[0]]
    mask.mask_mod, mask.seq_lengths = whole.mask_mod, (1, transformer.max_seq_length)
    return transformer(mask, ids, position)[:, -1].argmax(-1, keepdim=True)


def _causal(batch, head, query, cell):
    """What a token sees."""
    return query >= cell
