"""compressed-tensors, which llm-compressor writes and vLLM and transformers read.

pack-quantized: of a matrix ``[out, in]`` int32 ``weight_packed [out, in * bits / 32]``, codes plus
``2^(bits - 1)`` with the lowest bits first; ``weight_shape``; ``weight_scale [out, groups]``; where
a zero point is not in the middle ``weight_zero_point [out * bits / 32, groups]``, packed likewise
along the outputs.  int-quantized: ``weight`` int8 and ``weight_zero_point`` int8 ``[out, groups]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyllmlite.compress.layouts.base import Layout, Scheme
from pyllmlite.compress.layouts.packing import Codes, pack_words, take_apart
from pyllmlite.compress.shard import Entry, entry
from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight


class _CompressedTensors(Layout):
    def refusal(self, model_type: str, transposed: bool) -> str | None:
        if not transposed:
            return None
        return (
            f"{model_type} keeps its matrices turned (Conv1D), which compressed-tensors does not "
            "quantize; use the layout gptq"
        )

    def entries(self, module: str, weight: LinearWeight) -> tuple[list[Entry], Scheme]:
        codes = take_apart(module, weight)
        if codes.group_of is not None:
            raise ModelError(
                f"{module}: its groups follow the order of activations, which compressed-tensors "
                "no longer holds; quantize with static groups, or use the layout gptq"
            )
        return self._entries(module, codes), Scheme.of(codes)

    def _entries(self, module: str, codes: Codes) -> list[Entry]:
        raise NotImplementedError

    def config(
        self, schemes: Mapping[str, Scheme], floats: list[str], head: str
    ) -> dict[str, Any]:
        found: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            found.setdefault(scheme, []).append(module)
        groups = {
            f"group_{i}": self._group(scheme, modules if len(found) > 1 else ["Linear"])
            for i, (scheme, modules) in enumerate(found.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [head, *sorted(floats)],
            "kv_cache_scheme": None,
        }

    def _group(self, scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        inputs = None
        if self.int8_activations:
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        weights: dict[str, Any] = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "dynamic": False,
        }
        if scheme.group_size:
            weights["group_size"] = scheme.group_size
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.name,
        }


class PackQuantized(_CompressedTensors):
    """4 or 8 bits, inputs as they are."""

    name = "pack-quantized"

    def _entries(self, module: str, codes: Codes) -> list[Entry]:
        made = [
            entry(f"{module}.weight_packed", pack_words(codes.codes, codes.bits)),
            entry(f"{module}.weight_scale", codes.scales),
            entry(f"{module}.weight_shape", np.array(codes.codes.shape, np.int64)),
        ]
        if not codes.symmetric:
            zeros = np.ascontiguousarray(pack_words(codes.zeros.T, codes.bits).T)
            made.append(entry(f"{module}.weight_zero_point", zeros))
        return made


class IntQuantized(_CompressedTensors):
    """8 bits; inputs as they are, or rounded to int8 per token as the model runs."""

    name = "int-quantized"
    activations = True

    def _entries(self, module: str, codes: Codes) -> list[Entry]:
        if codes.bits != 8:
            raise ModelError(
                f"{module} has {codes.bits} bits; int-quantized holds 8: use bits 8, or the layout "
                "pack-quantized"
            )
        if self.int8_activations and (codes.group_size or not codes.symmetric):
            raise ModelError(
                f"{module}: int8 inputs need symmetric weights with one scale a row "
                "(group size 0)"
            )
        made = [
            entry(f"{module}.weight", (codes.codes ^ np.uint8(0x80)).view(np.int8)),
            entry(f"{module}.weight_scale", codes.scales),
        ]
        if not codes.symmetric:
            zeros = (codes.zeros ^ np.uint8(0x80)).view(np.int8)
            made.append(entry(f"{module}.weight_zero_point", zeros))
        return made
