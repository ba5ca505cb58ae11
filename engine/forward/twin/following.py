"""Following: how an engine runs a model, through a twin that follows what becomes of it."""

from __future__ import annotations

import logging

from ...errors import ModelError
from ..fused.recognise import fuse as fuse_layers
from ..probe import adapt
from .copies import lay_out, renew
from .fingerprint import Changes, Fingerprint
from .twin import Twin

log = logging.getLogger("handloom")


class Following:
    """A model as an engine runs it: by a twin, which follows what becomes of the model.

    Args:
        model: the user's, which is never touched.
        pool_options: arguments of `BlockPool`.
        prefill_chunk, self_check, fuse, layout, quantization: see `Engine`.

    `runner`, `pool` and `vocab_size` are what `forward.probe.adapt` gives, and others once its modules have changed.

    Raises:
        ModelError: the model fails on a plain forward pass, or has an adapter that an engine cannot count.
    """

    def __init__(self, model, pool_options: dict, *, prefill_chunk, self_check, fuse, layout, quantization):
        self._copies = layout, quantization
        self._probe = pool_options, prefill_chunk, self_check, fuse
        self.take(model)

    def take(self, model) -> None:
        """Make a twin of a model as it is now, and find out how it runs."""
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                f"{type(model).__name__}: a prompt-learning adapter puts positions of its own before the prompt, which "
                "an engine does not count; adapters of weights (LoRA and the like) work"
            )
        self._seen, self._twin = Fingerprint(model), Twin(model)
        lay_out(self._twin.module, *self._copies)
        self.runner, self.pool, self.vocab_size = adapt(self._twin.module, *self._probe)
        self.runner.hooked = self._seen.hooked

    def look(self, model, *, told: bool = False) -> Changes:
        """What has become of the model since the last look; it is followed already.

        Args:
            model: the user's, another one for instance.
            told: its values have changed, be it seen or not.
        """
        other = model is not self._seen.model
        changes = Changes(modules=True) if other else self._seen.changes()
        changes.values, changes.moved = changes.values or told, changes.moved or told
        if changes:
            log.info("the model has changed (%s): what was kept of it is dropped", changes)
            self._follow(model, changes)
        elif self._seen.hooked:
            self.pool.forget_prefixes()  # what a hook does may differ from one run to the next
        return changes

    def _follow(self, model, changes: Changes) -> None:
        if changes.modules:
            self.pool.owner += ", before the modules of its model changed"
            self.take(model)
            return
        path = self.runner.capabilities().path
        for module, names in changes.attributes:
            if path != "solo":  # there a module's attributes may be the state of a sequence
                self._twin.follow(module, names)
        if changes.attributes and path == "attention" and self.runner.fused:
            self.runner.fused = fuse_layers(self.runner)
        self.pool.forget_prefixes()
        if changes.values:
            renew(self._twin.module)
        self.runner.hooked = self._seen.hooked
