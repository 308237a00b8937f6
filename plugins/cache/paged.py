"""``paged``: small blocks, shared between requests with the same prefix (Kwon et al. 2023)."""

from __future__ import annotations

from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite_plugins.cache.block_cache import BlockCache
from pyllmlite_plugins.layout import BLOCK_MULTIPLE


class Paged(BlockCache):
    """Blocks of ``block_size`` tokens (16 unless asked otherwise), handed out as sequences grow.

    A full block is shared with every later request that has the same tokens up to its end; a
    block that nobody holds stays cached until its memory is needed, the least recently used
    first.  A request whose prefix another one is computing waits for it.
    """

    name = "paged"
    priority = 50
    share_prefixes = True

    @classmethod
    def supports(cls, need: CacheNeeds) -> str | None:
        size = need.block_size
        if size is not None and (size <= 0 or size % BLOCK_MULTIPLE):
            return f"block_size must be a positive multiple of {BLOCK_MULTIPLE}, got {size}"
        return super().supports(need)

    def _choose_block_size(self, needs: CacheNeeds) -> int:
        return needs.block_size or BLOCK_MULTIPLE
