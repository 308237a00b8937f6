"""Making a model lighter by training: distillation, and the trainer under every such method.

torch and transformers are optional and are imported by the modules of this folder only.
"""

from __future__ import annotations

import importlib.util
import os

from pyllmlite.core.errors import ConfigError


def require_torch() -> None:
    """``ConfigError`` in one line where torch is missing; it is no dependency of the engine."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("training needs PyTorch: pip install torch")


def one_process(command: str) -> None:
    """``ConfigError`` where torchrun or accelerate started several for what one does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{command} trains in one process; start it without torchrun")
