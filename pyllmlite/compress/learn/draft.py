"""Whether a student pays as a draft for its teacher."""

from __future__ import annotations

TOKEN_COST = 0.15  # of a step of one token: one more token to verify (measured, docs/decoder.md)
LONGEST = 8


def speed_up(acceptance: float, draft_cost: float, token_cost: float = TOKEN_COST) -> float:
    """Expected tokens in the time of one plain step, at the best draft length (Leviathan et al.
    2023, equation 1 and theorem 3.8); 1 where not drafting is best.

    Args:
        acceptance: Probability that a drafted token holds if those before it did.
        draft_cost: A draft's step as a part of a step of the model.
        token_cost: One more token in a step, as a part of a step of one.
    """
    best, expected = 1.0, 1.0
    for length in range(1, LONGEST + 1):
        expected += acceptance**length
        best = max(best, expected / (1 + length * (draft_cost + token_cost)))
    return best


def needed_acceptance(draft_cost: float, token_cost: float = TOKEN_COST) -> float | None:
    """The least acceptance at which drafting is faster; None: it never is.

    One token is drafted first where anything pays: (1 + p) / (1 + c) > 1 asks for p > c, and longer
    drafts ask for more.
    """
    cost = draft_cost + token_cost
    return cost if cost < 1 else None
