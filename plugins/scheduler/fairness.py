"""Fairness between clients: virtual token counters (Sheng et al. 2024, "Fairness in Serving Large
Language Models")."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from pyllmlite.core.request import Sequence

# A generated token counts as two of a prompt, as in the paper: it costs a step, not a part of one.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


class TokenCounters:
    """What each client has been served; whoever has been served least goes first.

    A client that comes back after a time without requests is lifted to the least of those that are
    there: what it did not ask for is not kept for it.  With a single client nothing is counted.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: set[str] = set()
        self._seen: tuple[object, object] = (None, None)

    def look(self, running: Seq[Sequence], waiting: Seq[Sequence]) -> bool:
        """Note who is there; False: a single client, with whom nobody has to share."""
        if self._seen[0] is not running or self._seen[1] is not waiting:
            self._seen = (running, waiting)
            self._note({s.request.client for seqs in (running, waiting) for s in seqs})
        return len(self._active) > 1

    def _note(self, clients: set[str]) -> None:
        stayed = [self._served[c] for c in clients & self._active if c in self._served]
        if not stayed:  # nobody of before is left: everybody starts alike
            self._served.clear()
        least = min(stayed, default=0.0)
        for client in clients - self._active:
            self._served[client] = max(self._served.get(client, least), least)
        for client in [c for c in self._served if c not in clients]:
            if self._served[client] <= least:
                del self._served[client]  # it would be lifted anyway
        self._active = clients

    def charge(self, seq: Sequence, tokens: int) -> None:
        """``tokens`` of the sequence were put into a step.  What it computes again because it was
        preempted is not its client's doing."""
        if seq.preemptions and seq.num_uncomputed > 1:
            return
        weight = OUTPUT_WEIGHT if seq.num_uncomputed == 1 else PROMPT_WEIGHT
        client = seq.request.client
        self._served[client] = self._served.get(client, 0.0) + weight * tokens

    def order(self, waiting: list[Sequence]) -> Iterator[Sequence]:
        """By priority; within one those that were preempted or forked, whose turn it was already,
        then the client served least, in its own order of arrival.  Charges in between count."""
        levels = sorted({s.request.priority for s in waiting})
        for level in levels:
            queues: dict[str, deque[Sequence]] = {}
            for seq in waiting:
                if seq.request.priority != level:
                    continue
                if seq.preemptions or seq.child:
                    yield seq
                else:
                    queues.setdefault(seq.request.client, deque()).append(seq)
            while queues:
                client = min(queues, key=lambda c: self._served.get(c, 0.0))
                yield queues[client].popleft()
                if not queues[client]:
                    del queues[client]
