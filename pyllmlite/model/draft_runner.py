"""A second model that continues sequences greedily, for drafts."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.source import open_model

if TYPE_CHECKING:
    from pyllmlite.core.spec import ModelSpec
    from pyllmlite.hooks.registry import Registry
    from pyllmlite.model.build import Built

_GREEDY: dict[str, Any] = {
    "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "num_logprobs": -1, "seed": 0,
    "prompt_len": 0, "min_len": 0, "bias_ids": [], "bias_values": [], "banned_ids": [],
}  # fmt: skip


class _Held:
    """A sequence in the runner's cache.

    Attributes:
        ids: Tokens whose keys and values are there.
        sure: So many of them were given, the others are drafts.
    """

    __slots__ = ("id", "ids", "row", "sure")

    def __init__(self, id: int, row: int) -> None:
        self.id = id
        self.row = row
        self.ids: list[int] = []
        self.sure = 0


class DraftRunner:
    """The :class:`~pyllmlite.hooks.decoder.DraftModel` around a model that was built.

    What it has computed of a sequence stays in its cache; drafts that were not taken are
    forgotten when the sequence comes again.
    """

    def __init__(self, built: Built) -> None:
        self._built = built
        self._held: dict[int, _Held] = {}  # by key, the one used longest ago first
        self._free_rows = list(range(built.max_num_seqs - 1, -1, -1))
        self._count = 0
        self.weight_bytes = built.weight_bytes

    def greedy(self, wanted: Seq[tuple[int, Seq[int], int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        work: list[tuple[_Held, Seq[int], int, list[int]]] = []
        keys = {key for key, _, _ in wanted}
        for (key, ids, count), found in zip(wanted, drafts, strict=True):
            count = min(count, self._built.max_model_len - len(ids) + 1)
            held = self._resume(key, ids, keys) if count > 0 and ids else None
            if held is None:
                continue
            if not self._built.cache.reserve(held.id, len(ids) + count - 1):
                count = 1
                if not self._reserve(held.id, len(ids), keys):
                    self.forget(key)
                    continue
            work.append((held, ids, count, found))
        self._catch_up(work)
        work = [entry for entry in work if len(entry[3]) < entry[2]]
        while work:
            tokens = self._run([(held, len(held.ids), 1, 1) for held, _, _, _ in work])
            for (held, _, _, found), token in zip(work, tokens, strict=True):
                held.ids.append(found[-1])
                found.append(token)
            work = [entry for entry in work if len(entry[3]) < entry[2]]
        return drafts

    def _reserve(self, held_id: int, tokens: int, keys: set[int]) -> bool:
        """Room for ``tokens``; sequences that ask for nothing now give theirs."""
        while not self._built.cache.reserve(held_id, tokens):
            idle = next((key for key in self._held if key not in keys), None)
            if idle is None:
                return False
            self.forget(idle)
        return True

    def forget(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._built.cache.free(held.id)
            self._free_rows.append(held.row)

    # -- inside ----------------------------------------------------------------------------------
    def _resume(self, key: int, ids: Seq[int], busy: set[int]) -> _Held | None:
        """The sequence with all that is right of what was computed; None: no room, or its prefix
        is computed in this call for another one."""
        cache, table = self._built.cache, self._built.batch.token_table
        held = self._held.pop(key, None)
        if held is not None:
            self._held[key] = held
            same = min(held.sure, len(ids) - 1)
            while same < min(len(held.ids), len(ids) - 1) and held.ids[same] == ids[same]:
                same += 1
            if same < len(held.ids):
                cache.truncate(held.id, same)
                del held.ids[same:]
        else:
            if not self._free_rows:
                idle = next((other for other in self._held if other not in busy), None)
                if idle is None:
                    return None
                self.forget(idle)
            self._count += 1
            held = _Held(self._count, self._free_rows[-1])
            cached = cache.acquire(held.id, held.row, ids)
            if cached is None:
                return None
            self._free_rows.pop()
            self._held[key] = held
            held.ids = list(ids[:cached])
            self._built.batch.set_sampling(held.row, **_GREEDY)
        start = len(held.ids) if held.sure else 0
        table[held.row, start : len(ids)] = ids[start:]
        held.sure = len(ids)
        return held

    def _catch_up(self, work: list[tuple[_Held, Seq[int], int, list[int]]]) -> None:
        """Run what is not yet computed, and draw the first draft of each behind it."""
        left = list(work)
        while left:
            budget = self._built.max_num_batched_tokens
            entries, last = [], []
            for held, ids, _, found in left:
                start = len(held.ids)
                count = min(len(ids) - start, budget)
                if count <= 0:
                    break
                budget -= count
                ends = start + count == len(ids)
                entries.append((held, start, count, int(ends)))
                last.append((held, ids, start + count, found if ends else None))
            tokens = iter(self._run(entries))
            for held, ids, end, ended in last:
                held.ids += ids[len(held.ids) : end]
                self._built.cache.commit(held.id, ids, end)
                if ended is not None:
                    ended.append(next(tokens))
            left = [entry for entry in left if not entry[3]]

    def _run(self, entries: list[tuple[_Held, int, int, int]]) -> list[int]:
        """One step of (sequence, first position, tokens, rows of logits); the tokens drawn."""
        batch, cache = self._built.batch, self._built.cache
        held, starts, counts, logits = zip(*entries, strict=True)
        batch.set_step([h.row for h in held], list(starts), list(counts), list(logits))
        for group in range(len(cache.block_tables)):
            copies = cache.take_copies(group)
            if copies:
                batch.set_copies(group, copies)
        self._built.program.run(batch)
        batch.append_sampled()
        return batch.token_list


def open_draft_model(
    name: str,
    options: Mapping[str, Any],
    target: ModelSpec,
    tokenizer: Any,
    registry: Registry,
    pool: Any,
    config: EngineConfig,
) -> DraftRunner:
    """A second model, set up as the first one is (``config``) where ``options`` says nothing.

    Args:
        target, tokenizer: Of the first model, whose vocabulary it must have.
        pool: The first model's threads.
    Raises:
        PyllmliteError: It cannot be loaded, or does not fit.
    """
    from pyllmlite.model.build import build

    source = open_model(name, revision=options.get("revision"))
    num_layers = options.get("num_layers", source.spec.num_layers)
    if type(num_layers) is not int or not 1 <= num_layers <= source.spec.num_layers:
        raise ConfigError(
            f"the draft model has {source.spec.num_layers} layers, num_layers is {num_layers!r}"
        )
    source.spec = spec = replace(
        source.spec, num_layers=num_layers, layers=source.spec.layers[:num_layers]
    )
    if spec.vocab_size != target.vocab_size:
        raise ConfigError(
            f"the draft model {name!r} has {spec.vocab_size} tokens, the model {target.vocab_size}"
        )
    words = {n: v for n, v in options.items() if n != "num_layers"}
    longest = min(config.max_model_len or 0, spec.max_position_embeddings)
    config = EngineConfig.from_kwargs(**{**vars(config), "max_model_len": longest, **words})
    built = build(source, config, registry, pool=pool)
    own = built.tokenizer
    if tokenizer is not None and own is not None and _vocabulary(own) != _vocabulary(tokenizer):
        raise ConfigError(f"the draft model {name!r} has other tokens than the model")
    return DraftRunner(built)


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Token texts and their ids; empty if the tokenizer does not tell."""
    backend = getattr(tokenizer, "backend", None)
    return backend.get_vocab(with_added_tokens=True) if backend is not None else {}
