"""Which replica holds which prefix, as far as can be known from where prompts were sent.

A replica keeps the keys and values of prompts it has computed, in blocks of tokens, and throws the
oldest out when it needs room.  This is the same bookkeeping without the values: per replica the
blocks of the prompts that went there, each named by a hash over everything up to its end, the
oldest thrown out beyond what the replica can hold.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence

# Tokens of a block: what prefixes are compared by.
BLOCK = 16


def block_names(token_ids: Sequence[int], block: int = BLOCK) -> list[bytes]:
    """A name of 8 bytes for each whole block: a hash over the tokens up to its end.

    The last token is left out, as an engine does: at least one has to be computed.
    """
    ids = array("I", token_ids)
    state = hashlib.blake2b(digest_size=8)
    names = []
    for end in range(block, len(ids), block):
        state.update(ids[end - block : end].tobytes())
        names.append(state.digest())
    return names


class Affinity:
    """Chooses a replica for a prompt.

    Args:
        capacity: Tokens that one replica can hold.
        imbalance: Requests by which a replica may be ahead of the idlest one and still get those
            whose prefix it holds.
        min_share: Part of a prompt that must be known somewhere to count.  Below it what is known
            is only what all prompts begin with (a chat template), and would draw everything to
            one replica.
    """

    def __init__(
        self, capacity: int = 1 << 20, imbalance: int = 16, min_share: float = 0.25
    ) -> None:
        self.set_capacity(capacity)
        self._imbalance = imbalance
        self._min_share = min_share
        self._held: dict[str, OrderedDict[bytes, None]] = {}

    def set_capacity(self, tokens: int) -> None:
        """What one replica can hold is known by now."""
        self._max_blocks = max(tokens // BLOCK, 1)

    def keep_only(self, replicas: set[str]) -> None:
        """The others are gone, and what they held with them."""
        for replica in self._held.keys() - replicas:
            del self._held[replica]

    def note(self, names: Sequence[bytes], replica: str) -> None:
        """A prompt was sent there."""
        held = self._held.setdefault(replica, OrderedDict())
        for name in reversed(names):  # the beginning is the youngest: it is of use to most
            held[name] = None
            held.move_to_end(name)
        while len(held) > self._max_blocks:
            held.popitem(last=False)

    def matched(self, names: Sequence[bytes], replica: str) -> int:
        """Leading blocks that the replica holds."""
        held = self._held.get(replica)
        if not held:
            return 0
        return next((i for i, name in enumerate(names) if name not in held), len(names))

    def rank(self, names: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """The replicas of ``loads`` (name to requests it has), best first.

        First the one that holds most of the prompt, if that is enough and it is not too far ahead
        of the others; behind it the idlest ones.  Of equals the one comes first that every router
        would choose for this beginning (rendezvous hashing; Thaler and Ravishankar 1998), so that
        several of them agree on a prefix that none of them has seen.
        """
        start = names[0] if names else b""

        def order(replica: str) -> tuple[int, bytes]:
            mixed = hashlib.blake2b(start + replica.encode(), digest_size=8)
            return loads[replica], mixed.digest()

        ranked = sorted(loads, key=order)
        if not ranked:
            return ranked
        least = loads[ranked[0]]
        enough = max(self._min_share * len(names), 1)
        best, most = None, 0
        for replica in ranked:
            count = self.matched(names, replica)
            if count > most and count >= enough and loads[replica] - least <= self._imbalance:
                best, most = replica, count
        if best is not None:
            ranked.remove(best)
            ranked.insert(0, best)
        return ranked
