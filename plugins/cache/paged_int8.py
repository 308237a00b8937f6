"""``paged-int8``: the paged cache with keys and values in int8."""

from __future__ import annotations

from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.layout import DTYPES, PAGED_INT8


class PagedInt8(Paged):
    """Blocks as in ``paged``; keys (after rotation) and values are int8 codes with a float32 scale
    per token and head, so that a token takes ``2 * num_kv_heads * (head_dim + 4)`` bytes a layer:
    0.53 of bf16 with heads of 64.

    Chosen by name, or by ``kv_cache_dtype="int8"``, never by itself: a token's logits change by
    what the rounding costs.
    """

    name = "paged-int8"
    priority = 5  # behind the others, which refuse kv_dtype "int8"
    layout = PAGED_INT8
    kv_dtypes = DTYPES[PAGED_INT8]

    def _auto_dtype(self, needs: CacheNeeds) -> str:
        return "int8"
