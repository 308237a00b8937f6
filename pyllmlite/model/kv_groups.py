"""Which layers keep the same tokens, and the window and sinks that a user lays on a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pyllmlite.hooks.cache import KVGroup

if TYPE_CHECKING:
    from pyllmlite.core.spec import ModelSpec


def kv_groups(spec: ModelSpec) -> tuple[KVGroup, ...]:
    """Layers with the same window and sinks, in order of first use."""
    return tuple(
        KVGroup(
            tuple(i for i, la in enumerate(spec.layers) if (la.window, la.sinks) == kept), *kept
        )
        for kept in spec.kept
    )


def with_sinks(spec: ModelSpec, window: int | None, sinks: int) -> ModelSpec:
    """The model with ``window`` laid on every layer that sees further, and ``sinks`` beside it
    (StreamingLLM, Xiao et al. 2023).  A layer whose own window is no longer was trained with it,
    and needs neither."""
    if window is None:
        return spec
    layers = tuple(
        la if la.window is not None and la.window <= window
        else replace(la, window=window, sinks=sinks)
        for la in spec.layers
    )  # fmt: skip
    return replace(spec, layers=layers)
