"""What this machine reads and multiplies at most, measured with the pool's own threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllmlite.core.config import parse_bytes
from pyllmlite.runtime.native import native

CPUS = Path("/sys/devices/system/cpu")
MAC_DTYPES = ("int8", "bf16", "f32")
LEAST_ARRAY = 256 << 20


@dataclass(frozen=True)
class Machine:
    """Measured peaks of one instruction set and thread count, per second.

    Attributes:
        isa: Instruction set that was in use.
        cache_bytes: Of the last-level caches that the threads share; 0: not known.
        dram_bandwidth: Bytes read from an array that no cache holds.
        cache_bandwidth: Bytes read from half of the last-level cache; None: not measured.
        macs: Multiply-accumulates by dtype (``int8``, ``bf16``, ``f32``) in registers.
    """

    isa: str
    threads: int
    cache_bytes: int
    dram_bandwidth: float
    cache_bandwidth: float | None
    macs: dict[str, float]

    def __str__(self) -> str:
        cache = ""
        if self.cache_bandwidth is not None:
            cache = (
                f", last-level cache ({self.cache_bytes / 2**20:.0f} MiB) "
                f"{self.cache_bandwidth / 1e9:.1f} GB/s"
            )
        macs = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.macs.items())
        return (
            f"{self.isa}, {self.threads} thread{'s' * (self.threads != 1)}: "
            f"DRAM {self.dram_bandwidth / 1e9:.1f} GB/s{cache}; GMAC/s: {macs}"
        )


def last_level_cache(cpus: set[int] | None = None, root: Path = CPUS) -> int:
    """Bytes of the last-level caches that ``cpus`` (those of this process) share; 0 where the
    system does not say."""
    cpus = os.sched_getaffinity(0) if cpus is None else cpus
    caches: dict[str, int] = {}  # by the CPUs that share one
    for cpu in cpus:
        found: list[tuple[int, str, int]] = []
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                if (index / "type").read_text().strip() == "Instruction":
                    continue
                level = int((index / "level").read_text())
                size = parse_bytes((index / "size").read_text().strip() + "iB")
                found.append((level, (index / "shared_cpu_list").read_text().strip(), size))
            except (OSError, ValueError):
                continue
        if found:
            _, shared, size = max(found)
            caches[shared] = size
    return sum(caches.values())


def dram_bandwidth(pool: Any, seconds: float = 0.15) -> float:
    """Bytes per second that a ``_native.ThreadPool`` reads from an array that no cache holds.

    On a shared machine it changes from minute to minute, by half and more: measure it beside
    what it is to be compared with.
    """
    size = max(LEAST_ARRAY, 4 * last_level_cache())
    return native().measure_peak("read", pool, seconds, size)


def measure_machine(threads: int | None = None, seconds: float = 0.5, pool: Any = None) -> Machine:
    """Measure the peaks of the instruction set in use; takes about 4 to 5 times ``seconds``.

    Args:
        threads: None: the CPUs that this process may use.
        seconds: For DRAM, and for all dtypes together; the cache takes half of it.
        pool: A ``_native.ThreadPool`` to measure with; ``threads`` is then not looked at.
    """
    if pool is None:
        pool = native().ThreadPool(threads or len(os.sched_getaffinity(0)))
    measure = native().measure_peak
    cache = last_level_cache()
    dram = dram_bandwidth(pool, seconds)
    return Machine(
        isa=native().info()["isa"],
        threads=pool.num_threads,
        cache_bytes=cache,
        dram_bandwidth=dram,
        cache_bandwidth=measure("read", pool, seconds / 2, cache // 2) if cache else None,
        macs={dtype: measure(dtype, pool, seconds / 3) for dtype in MAC_DTYPES},
    )
