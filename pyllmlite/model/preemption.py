"""Swap out or compute again: what brings a preempted sequence back at the lower cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.runtime.program import OpEntry, Program

# A block is read and written on its way out, and on its way back.
PASSES = 4
# Of the peak, kernels reach about so much in a prefill (their shares are in sizing/steptime.py).
REACHED = 0.6
MEASURED_BYTES = 64 << 20  # more than most caches hold
MEASURE_SECONDS = 0.03


def worth_swapping(
    config: EngineConfig, program: Program, pool: Any
) -> Callable[[int, int], bool] | None:
    """Of computed tokens and the bytes of their blocks: is swapping cheaper?  None: never, or there
    is no swap space.

    With ``preemption_mode="auto"`` bandwidth and peaks are measured here, in a few tenths of a
    second.
    """
    if not config.swap_bytes or config.preemption_mode == "recompute":
        return None
    if config.preemption_mode == "swap":
        return lambda tokens, num_bytes: True
    measure = native().measure_peak
    bandwidth = measure("read", pool, MEASURE_SECONDS, MEASURED_BYTES)
    dtypes = {entry.cost.mac_dtype for entry in program.entries}
    peaks = {dtype: measure(dtype, pool, MEASURE_SECONDS) for dtype in dtypes}
    return cheaper_to_swap(program.entries, bandwidth, peaks)


def cheaper_to_swap(
    entries: Iterable[OpEntry], bandwidth: float, peaks: Mapping[str, float]
) -> Callable[[int, int], bool]:
    """The choice as a roofline has it: bytes over bandwidth, there and back, against the
    multiply-accumulates of a prefill over their peaks.  Blocks that another sequence or the prefix
    tree still holds when the sequence comes back make either way cheaper, and are not counted.

    Args:
        bandwidth: Bytes a second.
        peaks: Multiply-accumulates a second, by dtype.
    """
    linear = 0.0  # seconds a token
    attention: defaultdict[int, float] = defaultdict(float)  # by window: of a (token, key) pair
    for entry in entries:
        cost = entry.cost
        if cost.per_logit_row:
            continue  # the head runs for the last token only, either way
        reached = REACHED * peaks[cost.mac_dtype]
        linear += cost.token_macs / reached
        attention[cost.window] += cost.context_macs / reached

    def worth(tokens: int, num_bytes: int) -> bool:
        again = linear * tokens
        for window, seconds in attention.items():
            seen = min(tokens, window or tokens)
            pairs = seen * (seen + 1) / 2 + (tokens - seen) * seen
            again += seconds * pairs
        return PASSES * num_bytes / bandwidth < again

    return worth
