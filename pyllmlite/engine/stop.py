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
    # Only where a stop string's first character stands one can be starting, so that the time is
    # linear but for text made for it.
    tail = text[-max(map(len, stops), default=0) :]
    longest = 0
    for stop in stops:
        at = tail.find(stop[0], max(len(tail) - len(stop) + 1, 0))
        while 0 <= at < len(tail) - longest:
            if stop.startswith(tail[at:]):
                longest = len(tail) - at
                break
            at = tail.find(stop[0], at + 1)
    return longest
