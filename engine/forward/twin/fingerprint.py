"""The fingerprint of a model: whether it is still what an engine last saw, by looking and without a forward pass."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from .twin import INSTALLED, TABLES, listens

SAMPLED = 64  # elements of every tensor that are compared: an edit through `.data` leaves no other trace
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN equals NaN by its bits
NOT_COMPARED = TABLES | {"_compiled_call_impl", "_is_hf_initialized", INSTALLED}  # no forward pass reads them
PLAIN = (bool, int, float, str, type(None))


@dataclass
class Changes:
    """What differs from what was seen last.

    Args:
        modules: parts or configurations were replaced, or tensors have another dtype or device.
        hooks: forward hooks came or went.
        moved: a parameter or buffer lies elsewhere.
        values: a parameter or buffer was assigned or edited.
        attributes: modules and the names of their attributes that are others now.
    """

    modules: bool = False
    hooks: bool = False
    moved: bool = False
    values: bool = False
    attributes: list[tuple[nn.Module, list[str]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.modules or self.hooks or self.moved or self.values or bool(self.attributes)

    def __str__(self) -> str:
        kinds = ("modules", "hooks", "values", "attributes")
        return ", ".join(kind for kind in kinds if getattr(self, kind)) or "the place of its weights"


class Fingerprint:
    """Identities of modules, attributes, hooks and tensors of a model, versions and samples of its values.

    Edits in place are told by torch's version counters, those through `.data` by 64 elements of every tensor: one
    that leaves all of them alone is not seen, nor is what a hook does differently from one call to the next.

    Args:
        model: the user's model; nothing of it is changed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._look()

    @property
    def hooked(self) -> bool:
        """Whether any forward hook is registered."""
        return bool(self._hooks)

    def changes(self) -> Changes:
        """What has changed since the last call, which this one replaces."""
        found = Changes()
        found.modules = _values(self._part_views) != self._parts  # modules are equal where they are the same
        found.modules |= any(vars(config) != seen for config, seen in self._configs)
        found.hooks = self._hooks != self._listening()
        held = _values(self._held_views)
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            found.moved = self._places != _places(self._tensors)
            found.values = found.moved or self._versions != _versions(self._counted)
            found.values = found.values or not all(_hold(views, seen) for views, seen in self._samples)
        else:
            found.values = found.moved = True
        if found.moved:
            found.modules |= [_kind(t) for t in _tensors(held)] != self._kinds
        found.attributes = [*self._attribute_changes()]
        if found:
            self._look()
        return found

    def _look(self) -> None:
        modules = list(self.model.modules())
        self._part_views = [m._modules.values() for m in modules if m._modules]
        self._parts = _values(self._part_views)
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self._configs = [(c, dict(vars(c))) for c in configs.values() if hasattr(c, "__dict__")]
        self._attributes = [(m, dict(m.__dict__)) for m in modules]
        self._note_attributes()
        own = (v for m in modules for name, v in m.__dict__.items() if name not in TABLES)
        self._contents = [(v, v.copy()) for v in own if type(v) in (list, set, dict) and _plain(v)]
        self._hook_tables = [m._forward_hooks for m in modules] + [m._forward_pre_hooks for m in modules]
        self._hook_tables += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._hooks = self._listening()
        tables = [m._parameters for m in modules] + [m._buffers for m in modules]
        self._held_views = [table.values() for table in tables if table]
        self._held = _values(self._held_views)
        self._tensors = tensors = _tensors(self._held)
        self._counted = [t for t in tensors if not t.is_inference()]
        self._kinds = [_kind(t) for t in tensors]
        self._places, self._versions = _places(tensors), _versions(self._counted)
        self._samples = [(views, _joined(views)) for views in _sample_views(tensors)]

    def _listening(self) -> list[int]:
        """Numbers of all hooks that may act in any pass; no number is given twice."""
        return [key for table in filter(None, self._hook_tables) for key in table if listens(table[key])]

    def _note_attributes(self) -> None:
        """Every attribute that is compared, for one look at all of them."""
        self._attribute_tables = [module.__dict__ for module, _ in self._attributes]
        self._sizes = list(map(len, self._attribute_tables))
        entries = [(table, name) for table in self._attribute_tables for name in table.keys() - NOT_COMPARED]
        self._entries = list(zip(*entries, strict=True)) or [(), ()]
        self._entry_values = list(map(operator.getitem, *self._entries))

    def _attribute_changes(self) -> Iterator[tuple[nn.Module, list[str]]]:
        try:  # lists compare by identity first: a tenth of the time that a look at each module takes
            unchanged = list(map(len, self._attribute_tables)) == self._sizes
            unchanged = unchanged and list(map(operator.getitem, *self._entries)) == self._entry_values
        except Exception:  # noqa: BLE001 - one is gone, or whatever its == does, for instance a tensor's
            unchanged = False
        if not unchanged:
            for module, old in self._attributes:
                names = {**old, **module.__dict__}.keys() - NOT_COMPARED
                changed = sorted(name for name in names if _differs(name, old, module.__dict__))
                if changed:
                    yield module, changed
            self._note_attributes()
        for container, seen in self._contents:
            if container != seen:
                yield self.model, []
                return


def _values(views: list) -> list:
    return list(itertools.chain.from_iterable(views))


def _differs(name: str, old: dict, new: dict) -> bool:
    if name not in old or name not in new:
        return True
    a, b = old[name], new[name]
    return not (a is b or (isinstance(a, PLAIN) and isinstance(b, PLAIN) and a == b))


def _plain(container) -> bool:
    values = container.values() if isinstance(container, dict) else container
    return all(isinstance(value, PLAIN) for value in values)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that this process holds."""
    return (
        tensor if type(tensor) in (nn.Parameter, torch.Tensor) else getattr(tensor, "_local_tensor", tensor)
    )


def _tensors(held: list) -> list[torch.Tensor]:
    return [_local(t) for t in held if t is not None]


def _kind(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.device


def _places(tensors: list[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    return list(map(operator.attrgetter("_version"), tensors))


def _joined(views: list) -> np.ndarray | torch.Tensor:
    return np.concatenate(views) if isinstance(views[0], np.ndarray) else torch.cat(views)


def _hold(views: list, seen: np.ndarray | torch.Tensor) -> bool:
    """Whether views hold what was seen there."""
    now = _joined(views)
    return now.tobytes() == seen.tobytes() if isinstance(seen, np.ndarray) else torch.equal(now, seen)


def _sample_views(tensors: list[torch.Tensor]) -> list[list]:
    """Views of `SAMPLED` elements of every tensor as integers, those of one kind together.

    On a CPU they are arrays, which NumPy reads in a sixth of torch's time.
    """
    kinds: dict[tuple, list] = {}
    for tensor in tensors:
        size = tensor.element_size()
        if tensor.numel() == 0 or tensor.device.type == "meta" or size not in BITS or tensor.dtype.is_complex:
            continue
        if tensor.layout != torch.strided:
            continue
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        step = max(1, reach // SAMPLED) | 1  # odd, so that it does not stay in one column
        count = min(SAMPLED, (reach - 1) // step + 1)
        bits = tensor.detach().view(BITS[size])
        view = bits.as_strided((count,), (step,), bits.storage_offset())
        view = view.numpy() if view.device.type == "cpu" and type(view) is torch.Tensor else view
        kinds.setdefault((size, tensor.device, type(view)), []).append(view)
    return list(kinds.values())
