"""Checked access to a ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllmlite.core.errors import ModelError


def integer(settings: Mapping[str, Any], name: str, default: int | None, low: int) -> int:
    """An integer of at least ``low``; ``default`` where it is missing or null."""
    value = settings.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ModelError(f"{name} must be an integer of at least {low}, got {str(value)[:40]}")
    return value


def one_of(what: str, value: Any, known: tuple[Any, ...]) -> Any:
    """The value, refused unless it is one of those that are known."""
    if value not in known:
        listed = ", ".join(map(str, known))
        raise ModelError(f"{what} {str(value)[:40]!r} is not read; known are {listed}")
    return value


def group_size_of(settings: Mapping[str, Any], name: str) -> int:
    """Columns per group; 0 (stored -1 or 0): the whole row."""
    return max(integer(settings, name, -1, -1), 0)
