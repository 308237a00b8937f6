"""How the memory of a cache is split between its KV groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyllmlite.core.errors import CapacityError

MAX_SLOTS = 2**31 - 1  # a slot (block * block_size + offset) is an int32


class Kept(NamedTuple):
    """What a group keeps of a sequence: the last ``window`` tokens (None: all), and the ``sinks``
    blocks that the first tokens are in."""

    window: int | None
    sinks: int = 0


def steady_blocks(num_tokens: int, kept: Kept, block_size: int) -> int:
    """Blocks that a sequence of ``num_tokens`` holds while it decodes: with a window, those that
    it touches and one more, so that the sequence can go back by a block."""
    blocks = -(-num_tokens // block_size)
    if kept.window is None:
        return blocks
    return min(blocks, kept.sinks + -(-(kept.window - 1) // block_size) + 2)


def peak_blocks(num_tokens: int, kept: Kept, block_size: int, chunk: int) -> int:
    """Blocks that it holds at most while its prompt runs in chunks of at most ``chunk``: the
    window's blocks are dropped only when the chunk is committed."""
    blocks = -(-num_tokens // block_size)
    if kept.window is None:
        return blocks
    return min(blocks, steady_blocks(num_tokens, kept, block_size) + -(-chunk // block_size))


def split(
    kept: Sequence[Kept],
    block_bytes: Sequence[int],
    block_size: int,
    max_bytes: int,
    max_model_len: int,
    max_rows: int,
    chunk: int,
    keep_unreferenced: bool,
) -> list[int]:
    """Blocks of each group, so that all groups run out at the same number of sequences.

    Args:
        kept: Of each group.
        block_bytes: Per group the bytes of one block, all its layers together.
        chunk: Tokens in a step at most.
        keep_unreferenced: More blocks than ``max_rows`` sequences can hold are of use.
    Raises:
        CapacityError: ``max_bytes`` do not hold one sequence of one block.
    """

    def need(length: int, sequences: float) -> list[float]:
        """One sequence at its peak, the others as they decode."""
        return [
            peak_blocks(length, one, block_size, chunk)
            + (sequences - 1) * steady_blocks(length, one, block_size)
            for one in kept
        ]

    def fits(length: int, sequences: float) -> bool:
        return cost(need(length, sequences)) <= max_bytes

    def cost(blocks: Sequence[float]) -> float:
        return sum(n * size for n, size in zip(blocks, block_bytes, strict=True))

    length = max_model_len
    if not fits(length, 1):
        low, high = 0, -(-length // block_size)  # in blocks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * block_size, 1) else (low, middle)
        if low == 0:
            raise CapacityError(
                f"{max_bytes} bytes of KV cache do not hold one block of {block_size} tokens, "
                f"which takes {sum(block_bytes)}; raise kv_cache_memory"
            )
        length = low * block_size
    base = cost(need(length, 1))
    step = cost(need(length, 2)) - base
    sequences = 1 + (max_bytes - base) / step
    if not keep_unreferenced:
        sequences = min(sequences, max_rows)
    limit = MAX_SLOTS // block_size
    return [min(int(n + 1e-9), limit) for n in need(length, sequences)]
