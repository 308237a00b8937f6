"""Logits straight from a built Program, in chunks of any size: what model tests compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyllmlite.core.config import EngineConfig
from pyllmlite.model.build import Built, build
from pyllmlite.model.source import open_checkpoint


def build_tiny(path: Path, **options) -> Built:
    settings = {
        "dtype": "f32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "skip_tokenizer_init": True,
        "kv_cache_memory": "64MB",
        **options,
    }
    return build(open_checkpoint(path), EngineConfig(**settings))


def program_logits(built: Built, tokens: Sequence[int], chunk: int = 64) -> np.ndarray:
    """float32 ``[len(tokens), vocab]``, computed ``chunk`` tokens a step."""
    cache, batch, seq_id = built.cache, built.batch, 12345
    tokens = list(tokens)
    cache.acquire(seq_id, 0, tokens)
    batch.token_table[0, : len(tokens)] = tokens
    batch.set_sampling(0, temperature=0.0)
    rows = []
    for start in range(0, len(tokens), chunk):
        count = min(chunk, len(tokens) - start)
        assert cache.reserve(seq_id, start + count)
        batch.set_step([0], [start], [count], [count])
        for row in range(count):
            batch.want_logits(row)
        built.program.run(batch)
        rows += [batch.logits(row).copy() for row in range(count)]
        cache.commit(seq_id, tokens, start + count)
    cache.free(seq_id)
    cache.reset_prefix_cache()
    cache.check_integrity()
    return np.stack(rows)
