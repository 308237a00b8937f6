"""Architectures as data: one small file a family, found by its ``model_type``."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from pyllmlite.core.errors import ModelError
from pyllmlite.model.architectures.base import Architecture, Config, Take


@functools.cache
def architectures() -> dict[str, Architecture]:
    """Every known ``model_type`` (a config's, or a GGUF's ``general.architecture``)."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for architecture in getattr(loaded, "ARCHITECTURES", ()):
            found.update(dict.fromkeys(architecture.model_types, architecture))
    return found


def find_architecture(model_type: str) -> Architecture:
    """The architecture of a ``model_type``; ``ModelError`` names the known ones."""
    known = architectures()
    if model_type in known:
        return known[model_type]
    near = difflib.get_close_matches(model_type, known, 1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ModelError(
        f"architecture {model_type!r} is not supported{hint}; known are {', '.join(sorted(known))}"
    )


__all__ = ["Architecture", "Config", "Take", "architectures", "find_architecture"]
