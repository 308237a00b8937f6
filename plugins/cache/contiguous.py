"""``contiguous``: one block of the full length a sequence, as before paging."""

from __future__ import annotations

from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite_plugins.cache.block_cache import BlockCache
from pyllmlite_plugins.layout import BLOCK_MULTIPLE


class Contiguous(BlockCache):
    """A block holds ``max_model_len`` tokens (rounded up to 16): nothing to share, nothing to
    look up, and memory for as many sequences as were asked for at most.  A fork is copied whole
    when one of the two goes on writing."""

    name = "contiguous"
    priority = 10

    @classmethod
    def supports(cls, need: CacheNeeds) -> str | None:
        if need.block_size is not None:
            return "its block is the whole sequence; block_size cannot be chosen"
        return super().supports(need)

    def _choose_block_size(self, needs: CacheNeeds) -> int:
        return -(-needs.max_model_len // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
