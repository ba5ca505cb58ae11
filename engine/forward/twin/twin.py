"""The twin of a model: what an engine runs, so that nothing of the user's model is borrowed, patched or switched."""

from __future__ import annotations

import copy
import functools
import operator
import types

from torch import nn
from transformers import PretrainedConfig

try:  # transformers records hidden states by hooks that it installs when they are first asked for
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:
    maybe_install_capturing_hooks = None
CAPTURING, INSTALLED = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"
TABLES = frozenset(
    vars(nn.Module())
)  # what every module has: shared, but for the parts and the training flag


class Twin:
    """A module tree that computes what a model computes, in evaluation mode, and can be changed without changing it.

    Every module is a shallow copy. The tables of parameters, of buffers and of hooks are the same objects, so weights
    that are assigned or edited, and hooks that are registered on the model, act in the twin at once. Modules,
    configurations and the training flag are its own. No weight is copied: a twin takes about 2 kB a module.

    Args:
        model: any module; a compiled one stands for what was compiled.
        hooks: share the forward hooks; otherwise the twin has none.

    `module` is the twin of the model itself.
    """

    def __init__(self, model: nn.Module, *, hooks: bool = True):
        self.hooks = hooks
        self._made: dict[int, nn.Module] = {}
        self._configs: dict = {}  # a configuration that is reached in two ways has one copy
        self._capturing: list[tuple[nn.Module, nn.Module]] = []
        self.module = self.of(model)
        self.module.__dict__["_capturing"] = self._capturing[::-1]  # the outermost installs for those inside

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of a module; one that is reached in two ways has one twin."""
        if type(module).__name__ == "OptimizedModule":
            return self.of(module._orig_mod)
        if id(module) in self._made:
            return self._made[id(module)]
        mine = self._made[id(module)] = object.__new__(type(module))
        own = mine.__dict__
        own.update(module.__dict__)
        own["_modules"] = {name: part and self.of(part) for name, part in module._modules.items()}
        self.follow(module, own.keys() - TABLES)
        own["training"], own["_compiled_call_impl"] = False, None
        if not self.hooks:
            for table in ("_forward_hooks", "_forward_pre_hooks"):
                own[table] = type(own[table])(
                    (k, hook) for k, hook in own[table].items() if not listens(hook)
                )
        elif _captures(type(module)):
            self._capturing.append((module, mine))
        return mine

    def follow(self, module: nn.Module, names) -> None:
        """Take over attributes of a module of the model as they are now."""
        own = self._made[id(module)].__dict__
        for name in names:
            if name in module.__dict__:
                own[name] = self._value(module.__dict__[name])
            else:
                own.pop(name, None)

    def _value(self, value):
        """An attribute as the twin has it: what leads to a module leads to its twin."""
        if isinstance(value, nn.Module):
            return self.of(value)
        if isinstance(value, PretrainedConfig):
            return copy.deepcopy(value, self._configs)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):  # accelerate's forward holds its module
            bound = functools.partial(value.func, *map(self._value, value.args), **value.keywords)
            bound.__dict__.update(value.__dict__)
            return bound
        if type(value) in (list, tuple):
            mine = [self._value(item) for item in value]
            return value if all(map(operator.is_, mine, value)) else type(value)(mine)
        if type(value) is dict:
            mine = {name: self._value(item) for name, item in value.items()}
            return value if all(map(operator.is_, mine.values(), value.values())) else mine
        return value


def twin(model: nn.Module, *, hooks: bool = True) -> nn.Module:
    """The twin of a model alone; see `Twin`."""
    return Twin(model, hooks=hooks).module


def capture_hidden_states(twin: nn.Module) -> None:
    """Let the user's modules, whose tables of hooks are the twin's, record hidden states: once for both of them."""
    for module, mine in twin.__dict__.get("_capturing", ()):
        if not mine.__dict__.get(INSTALLED):
            maybe_install_capturing_hooks(module)
            mine.__dict__[INSTALLED] = True


def _captures(kind: type) -> bool:
    """Whether a class's forward is one that installs transformers' recording of hidden states."""
    forward = kind.forward
    while forward is not None and maybe_install_capturing_hooks is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == CAPTURING:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def listens(hook) -> bool:
    """Whether a hook may act in any pass; those by which transformers records hidden states wait to be asked."""
    return getattr(hook, "__module__", None) != CAPTURING


def watched(*modules: nn.Module) -> bool:
    """Whether a forward hook sits on one of these modules, so that each has to be called for itself."""
    tables = (table for module in modules for table in (module._forward_hooks, module._forward_pre_hooks))
    return any(listens(hook) for table in tables if table for hook in table.values())


def replace(tree: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is a part in a tree; `new` may hold `old`."""
    for module in list(tree.modules()):
        for name, part in module._modules.items():
            if part is old and module is not new:
                module._modules[name] = new
