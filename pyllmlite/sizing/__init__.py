"""What a model takes and how fast it can be: measured peaks, the roofline, and plans."""

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
