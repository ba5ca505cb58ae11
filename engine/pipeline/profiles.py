"""Profiles: pipelines with the order, scopes and edge rules of other engines; see `chains` for what each does."""

from __future__ import annotations

from typing import Any

from .chains import CHAINS as PROFILES
from .pipeline import Pipeline

__all__ = ["PROFILES", "profile"]


def profile(name: str, params: Any = None) -> Pipeline:
    """A new pipeline of the profile `name`, "default" or one of `PROFILES`; see `Pipeline.profile`."""
    return Pipeline.profile(name, params)
