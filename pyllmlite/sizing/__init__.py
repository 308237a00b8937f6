"""How fast a model can be on a machine: measured peaks, and the roofline drawn from them."""

from pyllmlite.sizing.machine import Machine, dram_bandwidth, last_level_cache, measure_machine
from pyllmlite.sizing.roofline import Limit, Step, Work, decode, limit, prefill, work

__all__ = [
    "Limit",
    "Machine",
    "Step",
    "Work",
    "decode",
    "dram_bandwidth",
    "last_level_cache",
    "limit",
    "measure_machine",
    "prefill",
    "work",
]
