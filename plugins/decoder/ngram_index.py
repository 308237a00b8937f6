"""Where in a sequence its last tokens have stood before, kept up with as it grows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

# Earlier places that are compared, the latest first; what lies further back is not looked at.
MAX_CANDIDATES = 32


class NgramIndex:
    """The longest n-gram at the end of a sequence that also stands further ahead in it.

    Chains of places with the same last ``smallest`` tokens, as in LZ77 compressors (RFC 1951,
    section 4): a new token costs one dictionary entry, a search compares backwards along one
    chain.

    Args:
        smallest, largest: Least and greatest n.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest = smallest
        self.largest = largest
        self._last: dict[int, int] = {}  # hash of an n-gram: the end of its latest occurrence
        self._earlier = array("q", [0] * smallest)  # by end: that of the occurrence before; 0: none

    def find(self, ids: Seq[int]) -> tuple[int, int]:
        """``(n, end)``: the n tokens before ``end`` are the last n of ``ids``, and ``ids[end]`` is
        what followed them there.  The greatest n, and of its places the latest; ``(0, 0)``: none.

        Args:
            ids: The tokens of last time, and those behind them that are new.
        """
        smallest, largest = self.smallest, self.largest
        length = len(ids)
        self._extend(ids, length)
        if length <= smallest:
            return 0, 0
        best, place = 0, 0
        end = self._last.get(hash(tuple(ids[length - smallest :])), 0)
        for _ in range(MAX_CANDIDATES):
            if end == 0:
                break
            n, most = 0, min(largest, end)
            while n < most and ids[end - 1 - n] == ids[length - 1 - n]:
                n += 1
            if n > best and n >= smallest:  # less: another n-gram with the same hash
                best, place = n, end
                if n == largest:
                    break
            end = self._earlier[end]
        return best, place

    def _extend(self, ids: Seq[int], length: int) -> None:
        """Enter the n-grams that have a token behind them."""
        smallest, last, earlier = self.smallest, self._last, self._earlier
        for end in range(len(earlier), length):
            key = hash(tuple(ids[end - smallest : end]))
            earlier.append(last.get(key, 0))
            last[key] = end
