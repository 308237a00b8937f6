"""Layouts of other tools, written from plain codes: one file a layout, found by its name."""

from __future__ import annotations

from pyllmlite.compress.layouts.base import Layout, Scheme
from pyllmlite.compress.layouts.compressed_tensors import IntQuantized, PackQuantized
from pyllmlite.compress.layouts.gptq import GPTQLayout, GPTQv2Layout
from pyllmlite.core.errors import ConfigError

LAYOUTS: dict[str, type[Layout]] = {
    cls.name: cls for cls in (PackQuantized, IntQuantized, GPTQLayout, GPTQv2Layout)
}
ALIASES = {"compressed-tensors": "pack-quantized"}


def layout_named(name: str, int8_activations: bool = False) -> Layout:
    """A layout; ``ConfigError`` names the known ones."""
    known = ALIASES.get(name, name)
    if known not in LAYOUTS:
        raise ConfigError(
            f"layout {name!r} is not written; known are {', '.join([*LAYOUTS, *ALIASES])}"
        )
    return LAYOUTS[known](int8_activations)


__all__ = ["ALIASES", "LAYOUTS", "Layout", "Scheme", "layout_named"]
