"""pyllmlite makes language models light and serves them fast; every strategy is a plugin."""

from __future__ import annotations

import importlib
from typing import Any

from pyllmlite._version import __version__

# Public name -> module that holds it.  Loaded on first use, so that `import pyllmlite` costs
# next to nothing and a plugin that only needs `hookimpl` never loads the engine.
_EXPORTS: dict[str, str] = {
    "LLM": "pyllmlite.engine.llm",
    "AsyncEngine": "pyllmlite.engine.async_engine",
    "SamplingParams": "pyllmlite.core.sampling",
    "RequestOutput": "pyllmlite.core.request",
    "CompletionOutput": "pyllmlite.core.request",
    "ModelSpec": "pyllmlite.core.spec",
    "PyllmliteError": "pyllmlite.core.errors",
    "ModelError": "pyllmlite.core.errors",
    "PluginError": "pyllmlite.core.errors",
    "RequestError": "pyllmlite.core.errors",
    "CapacityError": "pyllmlite.core.errors",
    "StepError": "pyllmlite.core.errors",
    "hookimpl": "pyllmlite.hooks.specs",
    "Registry": "pyllmlite.hooks.registry",
    "Attention": "pyllmlite.hooks.attention",
    "KVCache": "pyllmlite.hooks.cache",
    "Quantizer": "pyllmlite.hooks.quantizer",
    "Scheduler": "pyllmlite.hooks.scheduler",
    "BeamSearchParams": "pyllmlite.core.beam",
    "StructuredOutputsParams": "pyllmlite.core.structured",
    "Decoder": "pyllmlite.hooks.decoder",
    "Proposer": "pyllmlite.hooks.decoder",
    "Constraint": "pyllmlite.hooks.decoder",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value: Any = getattr(importlib.import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module 'pyllmlite' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
