"""The file that ``--plot`` names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pyllmlite.core.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """``ConfigError`` before any work is done: matplotlib is missing, or the file cannot be
    drawn."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot writes {', '.join(SUFFIXES)}, not {target.name!r}")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--plot: {target.absolute().parent} is no directory")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
