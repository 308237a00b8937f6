"""The hooks a plugin may implement; each returns the strategy classes it brings."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from pyllmlite.hooks.attention import Attention
from pyllmlite.hooks.cache import KVCache
from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.quantizer import Quantizer
from pyllmlite.hooks.scheduler import Scheduler

PROJECT = "pyllmlite"
ENTRY_POINT_GROUP = "pyllmlite"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def pyllmlite_attentions() -> Sequence[type[Attention]]:
    """How queries read keys and values."""
    return ()


@hookspec
def pyllmlite_caches() -> Sequence[type[KVCache]]:
    """Where keys and values live."""
    return ()


@hookspec
def pyllmlite_quantizers() -> Sequence[type[Quantizer]]:
    """How a weight becomes a packed format."""
    return ()


@hookspec
def pyllmlite_schedulers() -> Sequence[type[Scheduler]]:
    """Who runs in a step."""
    return ()


@hookspec
def pyllmlite_decoders() -> Sequence[type[Decoder | Proposer | Constraint]]:
    """How tokens are proposed, restricted and chosen."""
    return ()
