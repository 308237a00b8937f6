"""The server on a Ray cluster: replicas of the engine behind one API, and batches over Ray Data.

``pyllmlite.serve.ray:app`` is for ``serve run``; :func:`generate` is for datasets.  ``affinity``
knows which replica holds which prefix, ``router`` asks it for each request, ``replica`` holds an
engine, ``client`` is how the HTTP side reaches all of them, ``front`` is that HTTP side.

Ray is an optional extra: nothing of it is imported before one of the two is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllmlite.serve.ray.data import generate
    from pyllmlite.serve.ray.deploy import app

__all__ = ["app", "generate"]

_PLACES = {"app": "pyllmlite.serve.ray.deploy", "generate": "pyllmlite.serve.ray.data"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import importlib.util

    from pyllmlite.core.errors import ConfigError

    if importlib.util.find_spec("ray") is None:
        raise ConfigError("this needs Ray: pip install 'pyllmlite[ray]'")
    return getattr(importlib.import_module(_PLACES[name]), name)
