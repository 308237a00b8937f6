"""What all strategies share: a name, a contract version, a priority, a say in what they support."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

# Version of each contract.  All stay at 0, free to change, until every built-in strategy
# and the CUDA side have passed through them; from 1 on, N runs plugins made for N-1.
CONTRACT_VERSIONS: dict[str, int] = {
    "attention": 0,
    "cache": 0,
    "quantizer": 0,
    "scheduler": 0,
    "decoder": 0,
}


class Strategy(ABC):
    """Base of the five contracts.

    Class attributes:
        contract: Set by the contract's base class.
        name: What users write (``scheduler="fair"``); lower case, digits, ``-``.
        contract_version: The version of the contract the class was written for.
        priority: For ``auto``: the highest that supports what is asked is taken; equal
            priorities by name.  Built-ins use 0 to 100; negative: never by ``auto``.
    """

    contract: ClassVar[str]
    name: ClassVar[str]
    contract_version: ClassVar[int] = 0
    priority: ClassVar[int] = 0

    @classmethod
    def undeclared(cls, need: Any) -> str | None:
        """Of ``need`` what the class's declarations leave out, in one line: a plugin that has never
        heard of it is refused, not run without it.  The contract's base has it, not a strategy."""
        return None

    @classmethod
    def supports(cls, need: Any) -> str | None:
        """None if this strategy can do what ``need`` describes, else the reason in one line."""
        return None
