"""GPTQ's layout, as AutoGPTQ and GPTQModel write it, and as most engines read it.

Of a matrix ``[out, in]``: int32 ``qweight [in * bits / 32, out]``, codes packed along the inputs;
``qzeros [groups, out * bits / 32]``, zero points packed along the outputs; ``scales [groups, out]``
float16; ``g_idx [in]``, the group of every input.  The first version of the format stores zero
points less one, ``gptq_v2`` as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyllmlite._version import __version__
from pyllmlite.compress.layouts.base import Layout, Scheme
from pyllmlite.compress.layouts.packing import pack_words, take_apart
from pyllmlite.compress.shard import Entry, entry
from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight


class GPTQLayout(Layout):
    """4 or 8 bits, inputs as they are; the first version, which all readers take.

    A zero point of 0 would be stored as -1, from which some readers do not get back: it is refused
    here and belongs into :class:`GPTQv2Layout`.
    """

    name = "gptq"
    less_one = True

    def entries(self, module: str, weight: LinearWeight) -> tuple[list[Entry], Scheme]:
        codes = take_apart(module, weight, short_group=True)
        with np.errstate(over="ignore"):
            scales = np.ascontiguousarray(codes.scales.T).astype(np.float16)
        if not (scales.T.astype(np.float32) == codes.scales).all():
            raise ModelError(
                f"{module} has float32 scales, which GPTQ's float16 would round; use the layout "
                "compressed-tensors"
            )
        zeros = codes.zeros
        if self.less_one:
            if zeros.size and not zeros.min():
                raise ModelError(
                    f"{module} has a zero point of 0, which the first version of GPTQ's layout "
                    "cannot hold; use gptq_v2"
                )
            zeros = zeros - np.uint8(1)
        columns = codes.codes.shape[1]
        group_of = codes.group_of
        if group_of is None:
            group_of = np.arange(columns, dtype=np.int32) // np.int32(codes.group_size or columns)
        words = pack_words(codes.codes, codes.bits)  # along the inputs: [out, in / 8]
        made = [
            entry(f"{module}.qweight", np.ascontiguousarray(words.T)),
            entry(f"{module}.qzeros", pack_words(zeros.T, codes.bits)),
            entry(f"{module}.scales", scales),
            entry(f"{module}.g_idx", group_of),
        ]
        return made, Scheme.of(codes)

    def config(
        self, schemes: Mapping[str, Scheme], floats: list[str], head: str
    ) -> dict[str, Any]:
        """The settings of most modules stand for all; ``dynamic`` (GPTQModel's word) lists those
        that differ, and those that are no codes at all (``-:``)."""
        counted = Counter((s.bits, s.group_size) for s in schemes.values())
        bits, group = counted.most_common(1)[0][0] if counted else (4, 0)
        others: dict[str, dict[str, Any]] = {}
        for module, scheme in schemes.items():
            if (scheme.bits, scheme.group_size) != (bits, group):
                size = scheme.group_size or -1
                others[f"+:^{re.escape(module)}$"] = {"bits": scheme.bits, "group_size": size}
        others.update((f"-:^{re.escape(name)}$", {}) for name in sorted(floats))
        made: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group or -1,
            "sym": all(scheme.symmetric for scheme in schemes.values()),
            "desc_act": any(scheme.ordered for scheme in schemes.values()),
            "static_groups": False,
            "lm_head": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"pyllmlite:{__version__}"]},
        }
        if others:
            made["dynamic"] = others
        return made


class GPTQv2Layout(GPTQLayout):
    """The second version: zero points as they are."""

    name = "gptq_v2"
    less_one = False
