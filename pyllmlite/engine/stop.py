"""Stop strings: found across token boundaries, and held back while they may be starting."""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, num_new: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins that ends in the last ``num_new`` characters.

    Returns:
        Its position and itself; of several the one that begins first, then the longest.
    """
    best: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(len(text) - num_new - len(stop) + 1, 0))
        if at < 0:
            continue
        if best is None or at < best[0] or (at == best[0] and len(stop) > len(best[1])):
            best = at, stop
    return best


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``text`` that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
