"""Options of the built-in schedulers, checked."""

from __future__ import annotations

from pyllmlite.core.errors import ConfigError
from pyllmlite.hooks.scheduler import SchedulerContext


def count(context: SchedulerContext, name: str, default: int | None) -> int | None:
    """A whole number of at least 1; None where ``default`` is None and nothing was asked."""
    value = context.extra.get(name, default)
    if value is None and default is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def seconds(context: SchedulerContext, name: str, default: float) -> float:
    """A finite number of at least 0."""
    value = context.extra.get(name, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise ConfigError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
    return float(value)


def factor(context: SchedulerContext, name: str) -> float | None:
    """A number above 1, or None where nothing was asked."""
    value = context.extra.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1 < value < float("inf"):
        raise ConfigError(f"{name} must be a number above 1, got {value!r}")
    return float(value)


def flag(context: SchedulerContext, name: str, default: bool) -> bool:
    value = context.extra.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value
