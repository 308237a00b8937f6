"""What a strategy did wrong, in one line that names it."""

from __future__ import annotations

from typing import Any


def failure(part: Any, error: BaseException) -> str:
    """``part``: a strategy, or the name of what failed."""
    if not isinstance(part, str):
        role = getattr(part, "role", "selector")
        part = f"{part.contract if role == 'selector' else role} {part.name!r}"
    # The first line: pybind11's complaints about arguments go on with whole signatures.
    text = str(error).strip().split("\n", 1)[0]
    return f"{part} failed: {type(error).__name__}" + (f": {text}" if text else "")
