"""What a layout is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllmlite.compress.layouts.packing import Codes
from pyllmlite.compress.shard import Entry
from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearWeight


@dataclass(frozen=True)
class Scheme:
    """How one module is quantized: what a config says of it."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool = False  # groups by the order of activations

    @classmethod
    def of(cls, codes: Codes) -> Scheme:
        return cls(codes.bits, codes.group_size, codes.symmetric, codes.group_of is not None)


class Layout(ABC):
    """Turns a module's codes into tensors, and all modules' schemes into a config.

    Args:
        int8_activations: The config asks whoever runs the model to round inputs to int8, a scale
            per token, as it runs (W8A8).
    """

    name: str
    activations: bool = False  # can say that inputs are rounded

    def __init__(self, int8_activations: bool = False) -> None:
        if int8_activations and not self.activations:
            raise ConfigError(
                f"layout {self.name!r} keeps inputs as floats; int8 inputs need int-quantized"
            )
        self.int8_activations = int8_activations

    def refusal(self, model_type: str, transposed: bool) -> str | None:
        """Why models of this kind cannot be loaded from this layout; None: they can."""
        return None

    @abstractmethod
    def entries(self, module: str, weight: LinearWeight) -> tuple[list[Entry], Scheme]:
        """The tensors of one module, and its scheme; ``ModelError``: it cannot be held."""

    @abstractmethod
    def config(
        self, schemes: Mapping[str, Scheme], floats: list[str], head: str
    ) -> dict[str, Any]:
        """``quantization_config``.

        Args:
            schemes: Of every quantized module.
            floats: Modules of decoder layers that stay floats.
            head: The output matrix's module, which stays floats too.
        """
