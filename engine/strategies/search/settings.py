"""What a beam search is told beside the parameters of its requests, in arguments or in a GenerationConfig."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from ...errors import ParameterError

UNSAID = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1,
          "renormalize_logits": False}  # fmt: skip


@dataclass(frozen=True)
class BeamSettings:
    """See `beam_search`. None: not said."""

    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    renormalize_logits: bool | None = None

    def read(self, params: Any) -> tuple[BeamSettings, Any]:
        """With what GenerationConfigs and dicts say where these do not, and the params without it.

        Raises:
            ParameterError: a value that makes no sense, or two configurations that differ.
        """
        listed = params if isinstance(params, list | tuple) else [params]
        found, rest = zip(*(self._split(item) for item in listed), strict=True) if listed else ((), ())
        told = {}
        for field in fields(self):
            given = [own[field.name] for own in found if own.get(field.name) is not None]
            if any(value != given[0] for value in given):
                raise ParameterError(f"{field.name} differs between the prompts: {given}; search them apart")
            own = getattr(self, field.name)
            told[field.name] = own if own is not None else given[0] if given else UNSAID[field.name]
        return BeamSettings(**told)._checked(), list(rest) if isinstance(params, list | tuple) else rest[0]

    def _split(self, item: Any) -> tuple[dict[str, Any], Any]:
        names = [field.name for field in fields(self)]
        if isinstance(item, dict):
            return {n: item.get(n) for n in names}, {k: v for k, v in item.items() if k not in names}
        if not hasattr(item, "to_diff_dict"):
            return {}, item
        own, rest = {name: getattr(item, name, None) for name in names}, copy.copy(item)
        for name in names:
            setattr(rest, name, None)
        return own, rest

    def _checked(self) -> BeamSettings:
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ParameterError(
                f"num_return_sequences={self.num_return_sequences} is not from 1 to num_beams={self.num_beams}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ParameterError(f'early_stopping={self.early_stopping!r} is none of True, False, "never"')
        return self
