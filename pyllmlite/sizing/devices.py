"""Published peaks of accelerators: what a plan is drawn with where there is nothing to measure."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pyllmlite.core.errors import ConfigError
from pyllmlite.sizing.machine import Machine


@dataclass(frozen=True)
class Device:
    """A data sheet.

    Attributes:
        memory_bytes: Of the device.
        bandwidth: Bytes per second to and from it.
        bf16_ops, int8_ops: Dense operations per second of the matrix units (two a
            multiply-accumulate), without the factor of structured sparsity.
        source: Where the figures are published.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    bf16_ops: float
    int8_ops: float
    source: str

    @property
    def machine(self) -> Machine:
        """Its peaks, as those of a measured machine; f32 at the rate of TF32, half of bf16."""
        return Machine(
            isa=self.name,
            threads=0,
            cache_bytes=0,
            dram_bandwidth=self.bandwidth,
            cache_bandwidth=None,
            macs={
                "int8": self.int8_ops / 2,
                "bf16": self.bf16_ops / 2,
                "f32": self.bf16_ops / 4,
            },
        )


_NVIDIA = "NVIDIA data sheet: "
# GB (10^9), GB/s, dense bf16 and int8 operations in 10^12/s.  Where a sheet gives rates with
# sparsity only, half of them stands here.
_TABLE = (
    ("t4", "NVIDIA T4", 16, 320, 65, 130, _NVIDIA + "T4, 2019 (fp16; it has no bf16)"),
    ("a10", "NVIDIA A10", 24, 600, 125, 250, _NVIDIA + "A10, 2021"),
    ("a100-40gb", "NVIDIA A100 40GB SXM", 40, 1555, 312, 624, _NVIDIA + "A100, 2020"),
    ("a100", "NVIDIA A100 80GB SXM", 80, 2039, 312, 624, _NVIDIA + "A100 80GB, 2021"),
    ("l4", "NVIDIA L4", 24, 300, 121, 242.5, _NVIDIA + "L4, 2023"),
    ("l40s", "NVIDIA L40S", 48, 864, 362, 733, _NVIDIA + "L40S, 2023"),
    ("h100", "NVIDIA H100 80GB SXM", 80, 3350, 989.5, 1979, _NVIDIA + "H100, 2023"),
    ("h100-pcie", "NVIDIA H100 80GB PCIe", 80, 2000, 756.5, 1513, _NVIDIA + "H100, 2023"),
    ("h200", "NVIDIA H200 SXM", 141, 4800, 989.5, 1979, _NVIDIA + "H200, 2024"),
    ("rtx3090", "NVIDIA RTX 3090", 24, 936, 71, 284, "NVIDIA GA102 white paper, appendix A"),
    ("rtx4090", "NVIDIA RTX 4090", 24, 1008, 165.2, 660.6, "NVIDIA Ada white paper, appendix A"),
    ("mi300x", "AMD Instinct MI300X", 192, 5300, 1307.4, 2614.9, "AMD data sheet: MI300X, 2023"),
)
DEVICES = {
    key: Device(name, memory * 1e9, rate * 1e9, bf16 * 1e12, int8 * 1e12, source)
    for key, name, memory, rate, bf16, int8, source in _TABLE
}


def find_device(name: str) -> Device:
    """By its key, however it is spelt (``H100``, ``rtx 4090``, ``a100-80gb``)."""
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = {known.replace("-", ""): known for known in DEVICES}
    tried = re.sub(r"-?(sxm\d?|nvidia|80gb$|141gb$)-?", "", key).replace("-", "")
    found = plain.get(key.replace("-", "")) or plain.get(tried)
    if found is None:
        near = difflib.get_close_matches(key, DEVICES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no peaks are known of {name!r}; {hint}known: {', '.join(DEVICES)}")
    return DEVICES[found]
