"""Head: a model's final norm and output layer, applied to hidden states of any layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import CapabilityError
from .twin.twin import twin

PROBE = 3  # a token that every vocabulary has
SAME = 1e-3  # relative error of logits that is rounding


class Head:
    """Logits from hidden states, by the model's own modules: output layer, scaling and soft caps included.

    What lies below is found by one pass: the outermost module whose output the output layer reads is left out, in
    shallow copies of the modules around it; the module without parts that made that output is the final norm.

    Args:
        module: the transformers model; it is not touched.

    Raises:
        CapabilityError: the model's last hidden state does not give its logits that way.
    """

    @torch.no_grad()
    def __init__(self, module):
        ids = torch.full((1, 2), PROBE, device=module.get_input_embeddings().weight.device)
        outputs, out = _traced(twin(module, hooks=False), ids)
        last = out.hidden_states[-1]
        made = [path for path, output in outputs if path and _same(_first(output), last)]
        if not made or last.dim() != 3:
            raise CapabilityError(
                f"{type(module).__name__}: no module gives the one vector a token that its output layer reads"
            )
        norm, body = made[0], min(reversed(made), key=lambda path: path.count("."))
        final = not any(part.isdigit() for part in norm.split("."))  # and not a part of the last layer
        leaf = not [*module.get_submodule(norm).children()]
        self.norm = module.get_submodule(norm) if final and leaf else nn.Identity()
        self.given = Given(dict(outputs)[body], module.get_submodule(body))
        self.module = _replaced(module, body.split("."), self.given)
        error, largest = (
            (self(last[0], norm=False) - out.logits[0].float()).abs().max(),
            out.logits.abs().max(),
        )
        if not error <= SAME * largest.float():
            raise CapabilityError(
                f"{type(module).__name__}: its logits are not a function of its last hidden state"
            )

    @torch.no_grad()
    def __call__(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """Logits `[N, V]` float32 of hidden states `[N, D]`; `norm`: through the final norm first."""
        self.given.hidden = (self.norm(hidden) if norm else hidden)[:, None]
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return self.module(input_ids=ids, use_cache=False).logits[:, 0].float()


class Given(nn.Module):
    """Stands for a model's body: gives the hidden states it was told, in the form in which the body gave its own."""

    def __init__(self, output, body):
        super().__init__()
        self.output, self.hidden = output, None
        self.__dict__["body"] = body  # not a part

    def __getattr__(self, name):
        return getattr(self.__dict__["body"], name)  # constants that the model reads from its body

    def forward(self, *args, **kwargs):
        """What the body would return."""
        if torch.is_tensor(self.output):
            return self.hidden
        if isinstance(self.output, tuple):
            return self.hidden, *self.output[1:]
        output = copy.copy(self.output)
        output.last_hidden_state = output[next(iter(output))] = self.hidden
        return output


def _traced(module, ids) -> tuple[list, object]:
    """(path, output) of every module in the order in which they end, and the model's output with hidden states."""
    outputs = []
    handles = [
        part.register_forward_hook(lambda _, inputs, output, path=path: outputs.append((path, output)))
        for path, part in module.named_modules()
    ]
    try:
        return outputs, module(input_ids=ids, use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()


def _replaced(module, path: list[str], part):
    """A shallow copy of a module in which the part at `path` is another one."""
    twin = copy.copy(module)
    first, *rest = path
    inner = part if not rest else _replaced(module._modules[first], rest, part)
    twin.__dict__["_modules"] = {**module._modules, first: inner}
    return twin


def _first(output):
    """The first tensor of a module's output."""
    return (
        output
        if torch.is_tensor(output)
        else next(iter(output.values() if hasattr(output, "values") else output), None)
    )


def _same(one, other) -> bool:
    return torch.is_tensor(one) and one.shape == other.shape and torch.equal(one, other)
