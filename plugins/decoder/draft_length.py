"""How many tokens to draft: as many as pay, by the acceptance that was seen."""

from __future__ import annotations

from functools import lru_cache

# What a token verified beside others costs, as a part of a step of one token alone: measured at
# 0.13 to 0.17 on a CPU (135M parameters, int4), less where weights weigh more.
TOKEN_COST = 0.15
# The expected speed-up below which nothing is drafted.
LEAST_GAIN = 1.03
# Acceptance that is assumed before anything was seen, and for how many drafts that counts.
PRIOR, PRIOR_WEIGHT = 0.8, 2.0
# The weight of what was seen falls by this with each draft.
FORGET = 0.9
# Where drafting does not pay: tokens of a trial, and proposals until the next, doubling.
TRIAL, FIRST_WAIT, LONGEST_WAIT = 2, 8, 64


@lru_cache(maxsize=4096)
def best_length(
    percent: int, batch: int, token_cost: float, longest: int, draft_cost: float = 0.0
) -> int:
    """The draft length k of the greatest expected speed-up; 0 if no length has one.

    A draft of k tokens, each accepted with probability p if those before it were, gives
    (1 - p^(k+1)) / (1 - p) tokens (Leviathan et al. 2023, equation 1).  A step of N tokens
    takes a + b N; of a step shared by ``batch`` sequences, k more tokens for each cost
    k b batch / (a + b batch) of it, and k ``draft_cost`` if a model drafts them.

    Args:
        percent: p in percent.
        token_cost: b / (a + b).
    """
    p = min(percent, 99) / 100
    share = token_cost * batch / (1 - token_cost + token_cost * batch)
    cost = share + draft_cost
    best, gain, expected = 0, LEAST_GAIN, 1.0
    for k in range(1, longest + 1):
        expected += p**k
        if expected / (1 + cost * k) > gain:
            best, gain = k, expected / (1 + cost * k)
    return best


class DraftLength:
    """The length of one sequence's drafts.

    Acceptance is learned apart for each kind of draft, a number that the proposer gives (the
    length of the n-gram that matched).  A kind that does not pay is tried again now and then.
    """

    __slots__ = ("_accepted", "_kind", "_left", "_tried", "_wait")

    def __init__(self, num_kinds: int) -> None:
        self._accepted = [PRIOR * PRIOR_WEIGHT] * num_kinds
        self._tried = [PRIOR_WEIGHT] * num_kinds
        self._kind = 0
        self._wait = self._left = FIRST_WAIT

    def choose(
        self, kind: int, batch: int, token_cost: float, longest: int, draft_cost: float = 0.0
    ) -> int:
        """For the next draft, of this kind, in a step that ``batch`` sequences share."""
        self._kind = kind
        percent = round(100 * self._accepted[kind] / self._tried[kind])
        length = best_length(percent, batch, token_cost, longest, draft_cost)
        if length:
            return length
        self._left -= 1
        if self._left > 0 or not best_length(
            99, batch, token_cost, longest, draft_cost
        ):
            return 0
        self._wait = self._left = min(2 * self._wait, LONGEST_WAIT)
        return min(TRIAL, longest)

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """How the last draft fared.  Behind the first rejected token nothing was tried."""
        kind = self._kind
        tried = num_accepted + (num_accepted < num_proposed)
        self._tried[kind] = FORGET * self._tried[kind] + tried
        self._accepted[kind] = FORGET * self._accepted[kind] + num_accepted
        if num_accepted == num_proposed:
            self._wait = self._left = FIRST_WAIT
