"""The teacher's distributions over its own text: the k likeliest tokens, and the rest as one sum.

They are read through the engine, with float weights and float keys and values, and stored in a
safetensors shard for each ``SHARD`` records, complete or not there: a run that was cut off goes on
at the shard it was in.  A position takes 4 k + 4 bytes (6 k + 4 where the vocabulary needs more
than 16 bits), instead of twice the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.learn.records import Record
from pyllmlite.compress.shard import entry, sync_directory, write_shard, write_text
from pyllmlite.core.errors import CapacityError, ConfigError, ModelError
from pyllmlite.model.safetensors import SafetensorsCheckpoint

if TYPE_CHECKING:
    from pyllmlite.model.build import Built
    from pyllmlite.model.source import ModelSource

SHARD = 64  # records
STEP_TOKENS = 256  # of a step at most, in whole sequences
META = "meta.json"


@dataclass
class TopKStats:
    """What is left out.

    Attributes:
        positions: Distributions that are stored.
        k, temperature: Of each.
        tail: Mean mass outside the k tokens.
        tail_largest: Of one position.
        nbytes: Of all shards.
    """

    positions: int
    k: int
    temperature: float
    tail: float
    tail_largest: float
    nbytes: int

    def __str__(self) -> str:
        per = self.nbytes / max(self.positions, 1)
        bound = 2 * self.temperature * self.tail
        return (
            f"{self.positions} distributions, {self.k} tokens each, {per:.0f} bytes: they hold "
            f"{1 - self.tail:.2%} of the mass (at least {1 - self.tail_largest:.1%}); the rest is "
            f"one outcome, which moves a position's gradient by {bound:.4f} at most on average, in "
            f"the sum over the vocabulary, of {2 * self.temperature:g} that are possible"
        )


def open_scorer(source: ModelSource, longest: int, **options: Any) -> Built:
    """The model as float weights, for :func:`distributions`; ``options`` are ``LLM``'s.

    Args:
        longest: Tokens of the longest sequence.
    """
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.model.build import build

    words = {"quantizer": "none", "dtype": "f32", "kv_cache_dtype": "auto", **options}
    config = EngineConfig.from_kwargs(
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=STEP_TOKENS,  # as many rows of logits can be asked for
        enable_prefix_caching=False,
        **words,
    )
    return build(source, config)


def distributions(
    built: Built, sequences: list[tuple[list[int], int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Logits over whole sequences, several of them a step.

    Args:
        sequences: Token ids, and how many of the last of them are predicted (all but the first at
            most).
    Yields:
        Index into ``sequences`` in order, and float32 logits ``[predicted, vocab]``, row ``j`` the
        distribution of token ``len - predicted + j``.
    """
    for group in _steps(built, sequences):
        found: list[list[np.ndarray]] = [[] for _ in group]
        for row, index in enumerate(group):
            read = sequences[index][0][:-1]
            built.cache.acquire(row + 1, row, read)
            built.batch.token_table[row, : len(read)] = read
            built.batch.set_sampling(row, temperature=0.0)
        start = 0
        while True:  # once, but for a sequence that is longer than a step
            pieces = []
            for row, index in enumerate(group):
                length, predicted = len(sequences[index][0]) - 1, sequences[index][1]
                count = min(length - start, STEP_TOKENS)
                wanted = max(0, start + count - max(length - predicted, start))
                if not built.cache.reserve(row + 1, start + count):
                    raise CapacityError("the KV cache holds no sequence; use a smaller seq_len")
                pieces.append((row, start, count, wanted))
            rows, starts, counts, wanted_rows = (
                list(column) for column in zip(*pieces, strict=True)
            )
            built.batch.set_step(rows, starts, counts, wanted_rows)
            for at in range(sum(wanted_rows)):
                built.batch.want_logits(at)
            built.program.run(built.batch)
            at = 0
            for parts, wanted in zip(found, wanted_rows, strict=True):
                if wanted:
                    parts.append(np.stack([built.batch.logits(at + i) for i in range(wanted)]))
                at += wanted
            start += STEP_TOKENS
            if start >= len(sequences[group[0]][0]) - 1:
                break
            built.cache.commit(1, sequences[group[0]][0], start)
        for row, (index, parts) in enumerate(zip(group, found, strict=True)):
            built.cache.free(row + 1)
            yield index, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _steps(built: Built, sequences: list[tuple[list[int], int]]) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for index, (ids, _) in enumerate(sequences):
        length = len(ids) - 1
        if group and tokens + length > STEP_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield group


def predicted_tokens(record: Record, seq_len: int) -> tuple[list[int], int]:
    """A record as one sequence, and how many of its last tokens are the teacher's; 0 if
    the prompt alone fills ``seq_len`` (the last token is predicted and never read)."""
    ids = [*record.prompt_token_ids, *record.token_ids][: seq_len + 1]
    first = max(len(record.prompt_token_ids), 1)
    return ids, max(len(ids) - first, 0)


def top_k(logits: np.ndarray, k: int, temperature: float) -> dict[str, np.ndarray]:
    """``ids`` [rows, k], ``log_probs`` float16 [rows, k] and ``tail``, the log of the mass outside
    them, float32 [rows]; all of softmax(logits / temperature)."""
    import torch

    scaled = torch.from_numpy(logits).float() / temperature
    log_sum = torch.logsumexp(scaled, -1, keepdim=True)
    values, ids = scaled.topk(k, -1)
    # Summed over the tail itself: one minus the rest would be rounding where the tail is small.
    tail = torch.logsumexp(scaled.scatter(-1, ids, -torch.inf), -1) - log_sum[:, 0]
    small = torch.int32 if logits.shape[-1] > 1 << 16 else torch.uint16
    return {
        "ids": ids.to(small).numpy(),
        "log_probs": (values - log_sum).half().numpy(),
        "tail": tail.numpy(),
    }


class TopKLogits:
    """Stored distributions of the records of one file.

    Args:
        directory: Of the shards.
        identity: What decides them, as JSON.
    """

    def __init__(
        self, directory: Path, records: list[Record], k: int, temperature: float, seq_len: int,
        identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.directory = directory
        self.records = records
        self.k, self.temperature, self.seq_len = k, temperature, seq_len
        self._identity = {
            **identity, "k": k, "temperature": temperature, "seq_len": seq_len,
            "records": len(records),
        }  # fmt: skip
        self._open: dict[int, SafetensorsCheckpoint] = {}

    @property
    def shards(self) -> int:
        return -(-len(self.records) // SHARD)

    def write(
        self,
        open_teacher: Callable[[], Built],
        progress: Callable[[int, int], None] | None = None,
    ) -> TopKStats:
        """Read what is missing from the teacher.

        Args:
            open_teacher: Of :func:`open_scorer`; not called where nothing is missing.
            progress: Called with records read and records in all.
        Raises:
            ConfigError: The directory holds distributions of other text or settings.
            ModelError: The disk is full; logits that are not finite.
        """
        self._claim()
        built: Built | None = None
        for shard in range(self.shards):
            if progress is not None:
                progress(shard * SHARD, len(self.records))
            if self._path(shard).exists():
                continue
            built = built or open_teacher()
            part = self.records[shard * SHARD : (shard + 1) * SHARD]
            sequences = [predicted_tokens(record, self.seq_len) for record in part]
            chosen = [i for i, (_, count) in enumerate(sequences) if count and not part[i].dropped]
            found: dict[int, dict[str, np.ndarray]] = {}
            for at, logits in distributions(built, [sequences[i] for i in chosen]):
                if not np.isfinite(logits).all():
                    raise ModelError("the teacher gives logits that are not finite")
                found[chosen[at]] = top_k(logits, self.k, self.temperature)
            counts = [len(found[i]["tail"]) if i in found else 0 for i in range(len(part))]
            arrays = {"starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)}
            for name in ("ids", "log_probs", "tail"):
                rows = [found[i][name] for i in sorted(found)]
                arrays[name] = np.concatenate(rows) if rows else self._nothing(name)
            write_shard(self._path(shard), [
                entry(name, values, "u16" if values.dtype == np.uint16 else None)
                for name, values in arrays.items()
            ])  # fmt: skip
            sync_directory(self.directory)
        if progress is not None:
            progress(len(self.records), len(self.records))
        return self.stats()

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a record: ids int64 ``[positions, k]``, log-probabilities float32 of the same shape,
        log of the tail's mass float32 ``[positions]``; together they are 1 to float16's rounding.
        """
        shard, inside = divmod(index, SHARD)
        if shard not in self._open:
            self._open[shard] = SafetensorsCheckpoint(self._path(shard))
        stored = self._open[shard]
        starts = _array(stored, "starts")
        rows = slice(int(starts[inside]), int(starts[inside + 1]))
        return (
            _array(stored, "ids")[rows].astype(np.int64),
            _array(stored, "log_probs")[rows].astype(np.float32),
            _array(stored, "tail")[rows].astype(np.float32),
        )

    def stats(self) -> TopKStats:
        masses = [np.exp(self.rows(i)[2].astype(np.float64)) for i in range(len(self.records))]
        tails = np.concatenate(masses) if masses else np.zeros(0)
        nbytes = sum(self._path(i).stat().st_size for i in range(self.shards))
        return TopKStats(
            len(tails), self.k, self.temperature, float(tails.mean()) if len(tails) else 0.0,
            float(tails.max(initial=0.0)), nbytes,
        )  # fmt: skip

    # -- inside --------------------------------------------------------------------------------
    def _path(self, shard: int) -> Path:
        return self.directory / f"logits-{shard:05}.safetensors"

    def _nothing(self, name: str) -> np.ndarray:
        shape = (0,) if name == "tail" else (0, self.k)
        return np.zeros(shape, {"ids": np.int32, "log_probs": np.float16}.get(name, np.float32))

    def _claim(self) -> None:
        meta = self.directory / META
        wanted = json.loads(json.dumps(self._identity))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            found = json.loads(meta.read_text(encoding="utf-8")) if meta.exists() else None
        except (OSError, ValueError) as error:
            raise ModelError(f"{meta}: cannot be read ({error}); delete its directory") from None
        if found is None:
            write_text(meta, json.dumps(wanted) + "\n")
        elif found != wanted:
            name = next(n for n in {**found, **wanted} if found.get(n) != wanted.get(n))
            raise ConfigError(
                f"{self.directory}: holds distributions with {name} {found.get(name)!r}, now it is "
                f"{wanted.get(name)!r}; --restart begins anew"
            )


def _array(stored: SafetensorsCheckpoint, name: str) -> np.ndarray:
    tensor = stored.tensor(name)
    raw = tensor.raw()
    assert raw is not None
    words = {"u16": np.uint16, "f16": np.float16, "f32": np.float32, "i32": np.int32,
             "i64": np.int64}  # fmt: skip
    return np.asarray(raw).reshape(-1).view(words[tensor.dtype]).reshape(tensor.shape)
