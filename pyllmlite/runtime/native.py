"""Loads the compiled extension, and says in one line what is wrong when it cannot."""

from __future__ import annotations

from types import ModuleType

from pyllmlite.core.errors import PyllmliteError


def native() -> ModuleType:
    """``pyllmlite._native``.

    Raises:
        PyllmliteError: The extension is missing (a source tree that was not built) or was
            built for another Python.
    """
    try:
        from pyllmlite import _native
    except ImportError as error:
        raise PyllmliteError(
            f"the compiled extension cannot be loaded ({error}); "
            "install with `pip install .`, or in a source tree `pip install -e .`"
        ) from None
    return _native
