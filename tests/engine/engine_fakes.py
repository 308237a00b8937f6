"""A model made of arithmetic: the next token follows from what the cache holds of the history.

Keys and values are replaced by the token ids themselves, written to the slots of the block
table and read back through it.  A sequence that runs on another one's blocks, skips a token,
or runs one twice draws another token.  Batch and Program are plain Python; cache, scheduler
and decoder are the real ones.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.spec import LayerSpec, ModelSpec, NormSpec
from pyllmlite.hooks.cache import CacheNeeds, KVGroup
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite_plugins.cache.contiguous import Contiguous
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.decoder.sample import Sample
from pyllmlite_plugins.scheduler.continuous import Continuous
from pyllmlite_plugins.scheduler.static import Static

VOCAB = 97
EOS = 96


def digest(values) -> int:
    data = np.asarray(values, np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fake_logits(history) -> np.ndarray:
    """float32 [VOCAB], a function of the tokens alone."""
    return (np.random.default_rng(digest(history)).standard_normal(VOCAB) * 2).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


class FakeBatch:
    """The parts of ``_native.Batch`` that the engine uses, slow and plain."""

    def __init__(self, max_rows, max_len, max_tokens, max_logit_rows, vocab, max_logprobs, groups):
        self.limits = (max_tokens, max_logit_rows)
        self.max_len, self.vocab, self.max_logprobs = max_len, vocab, max_logprobs
        self.token_table = np.zeros((max_rows, max_len), np.int32)
        self.groups = groups
        self.params = [{} for _ in range(max_rows)]
        self.copies = {}
        self.set_step([], [], [], [])

    def set_sampling(self, row, **params):
        assert 0 <= params["seed"] < 2**64
        self.params[row] = params

    def copy_row(self, source, target, length):
        self.token_table[target, :length] = self.token_table[source, :length]
        self.params[target] = dict(self.params[source])

    def append(self, rows, tokens, positions):
        self.token_table[rows, positions] = tokens

    def append_sampled(self):
        behind = 0
        for row, start, count, wanted in zip(
            self.rows, self.starts, self.counts, self.wanted, strict=True
        ):
            behind += wanted
            end = start + count
            if wanted and self.targets[behind - 1] < 0 and end < self.max_len:
                self.token_table[row, end] = self.tokens[behind - 1]

    def set_step(self, rows, starts, counts, logits, targets=()):
        if len(set(rows)) != len(rows):
            raise ValueError("a row stands twice in the step")
        if sum(counts) > self.limits[0] or sum(logits) > self.limits[1]:
            raise ValueError("the step is too large")
        for row, start, count, wanted in zip(rows, starts, counts, logits, strict=True):
            if count < 1 or not 0 <= wanted <= count or start + count > self.max_len:
                raise ValueError("counts do not fit")
            ids = self.token_table[row, start : start + count]
            if ids.min() < 0 or ids.max() >= self.vocab:
                raise ValueError("token id out of range")
            for size, table in self.groups:
                first = max(start - 1, 0) // size
                if (table[row, first : (start + count - 1) // size + 1] < 0).any():
                    raise ValueError(f"row {row} holds no block")
        self.rows, self.starts, self.counts, self.wanted = rows, starts, counts, logits
        self.num_rows = sum(logits)
        self.targets = [-1] * self.num_rows
        self.masks, self.step_bias, self.kept = {}, {}, {}
        self.tokens = np.zeros(self.num_rows, np.int32)
        self.status = np.zeros(self.num_rows, np.int32)
        self.ranks = np.zeros(self.num_rows, np.int32)
        self.logprobs = np.full(self.num_rows, np.nan, np.float32)
        self.top_ids = np.zeros((self.num_rows, self.max_logprobs), np.int32)
        self.top_logprobs = np.zeros((self.num_rows, self.max_logprobs), np.float32)

    def score_prompt(self, index):
        row, at = self.rows[index], sum(self.wanted[:index])
        end = self.starts[index] + self.counts[index]
        for j in range(self.wanted[index]):
            following = end - self.wanted[index] + j + 1
            if following < max(end, self.params[row]["prompt_len"]):
                self.targets[at + j] = int(self.token_table[row, following])

    def set_mask(self, logit_row, mask):
        assert 0 <= logit_row < self.num_rows
        self.masks[logit_row] = mask

    def set_step_bias(self, row, ids, values):
        self.step_bias[row] = (ids, values)

    def want_logits(self, logit_row):
        assert 0 <= logit_row < self.num_rows
        self.kept[logit_row] = None

    def logits(self, logit_row):
        return self.kept[logit_row]

    def set_copies(self, group, pairs):
        self.copies[group] = list(pairs)

    @property
    def token_list(self):
        return self.tokens.tolist()

    @property
    def any_failed(self):
        return bool(self.status.any())

    def draw(self, at, row, position, logits):
        """One logit row: ``position`` is that of the token to be drawn."""
        p = self.params[row]
        if at in self.kept:
            self.kept[at] = logits.copy()
        raw = log_softmax(logits)
        if not np.isfinite(logits).all():
            self.status[at] = 1
            return
        x = logits.astype(np.float64)
        if at in self.masks:
            bits = np.unpackbits(self.masks[at].view(np.uint8), bitorder="little")[: self.vocab]
            x[bits == 0] = -np.inf
        for ids, values in (
            (p["bias_ids"], p["bias_values"]),
            self.step_bias.get(row, ((), ())),
        ):
            for token, value in zip(ids, values, strict=True):
                x[token] += value
        if position < p["min_len"]:
            x[list(p["banned_ids"])] = -np.inf
        if self.targets[at] >= 0:
            token = self.targets[at]
        elif not np.isfinite(x).any():
            self.status[at] = 2
            return
        elif p["temperature"] == 0:
            token = int(x.argmax())
        else:
            weights = np.exp((x - x.max()) / p["temperature"])
            u = digest([p["seed"] & (2**63 - 1), position]) / 2**64
            token = int(np.searchsorted(np.cumsum(weights) / weights.sum(), u, side="right"))
            token = min(token, self.vocab - 1)
        self.tokens[at] = token
        if p["num_logprobs"] >= 0:
            order = np.argsort(-raw, kind="stable")
            self.logprobs[at] = raw[token]
            self.ranks[at] = 1 + int(np.flatnonzero(order == token)[0])
            n = p["num_logprobs"]
            best = raw
            if p.get("top_of_processed"):
                best = raw + (x - logits)
                order = np.argsort(-best, kind="stable")
            self.top_ids[at, :n], self.top_logprobs[at, :n] = order[:n], best[order[:n]]


class FakeProgram:
    """``slots[g][slot]``: the token whose keys and values would stand there."""

    def __init__(self, batch: FakeBatch, num_blocks: list[int]):
        self.slots = [
            np.full(n * size, -1, np.int64)
            for n, (size, _) in zip(num_blocks, batch.groups, strict=True)
        ]
        self.before = lambda batch: None  # a test's hook: raises, or changes something
        self.logits = lambda history: fake_logits(history)
        self.tokens_run = 0

    def run(self, batch: FakeBatch) -> None:
        for group, pairs in batch.copies.items():
            size = batch.groups[group][0]
            blocks = self.slots[group].reshape(-1, size)
            for source, target in pairs:
                blocks[target] = blocks[source]
        batch.copies = {}
        self.before(batch)
        at = 0
        entries = list(zip(batch.rows, batch.starts, batch.counts, batch.wanted, strict=True))
        for row, start, count, _ in entries:
            for group in range(len(self.slots)):
                slots = self.slot(batch, group, row, np.arange(start, start + count))
                self.slots[group][slots] = batch.token_table[row, start : start + count]
            self.tokens_run += count
        for row, start, count, wanted in entries:
            for position in range(start + count - wanted, start + count):
                slots = self.slot(batch, 0, row, np.arange(position + 1))
                batch.draw(at, row, position + 1, self.logits(self.slots[0][slots]))
                at += 1

    @staticmethod
    def slot(batch, group, row, positions):
        size, table = batch.groups[group]
        return table[row, positions // size].astype(np.int64) * size + positions % size


class FakeTokenizer:
    """Bytes as tokens 0..255 would be, cut to the vocabulary: printable ASCII."""

    eos_token_ids = (EOS,)

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - 32 for c in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(t + 32) for t in token_ids if t < 95 or not skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=True, **_):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages)


def fake_built(
    max_num_seqs=8,
    max_model_len=64,
    max_num_batched_tokens=32,
    block_size=16,
    num_blocks=64,
    cache="paged",
    scheduler="continuous",
    prefix_caching=True,
    max_logit_rows=None,
    proposer=None,
    constraints=(),
    eos=(EOS,),
    tokenizer=True,
    decoders=None,
    decoder=None,
    seed=0,
    swap_blocks=0,
    worth_swapping=None,
):
    """What ``build()`` returns, around the fakes."""
    spec = ModelSpec(
        architecture="fake", hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        intermediate_size=8, vocab_size=VOCAB, max_position_embeddings=max_model_len,
        norm=NormSpec("rms", 1e-5), activation="silu", gated=True, layers=(LayerSpec(),),
        eos_token_ids=tuple(eos),
    )  # fmt: skip
    needs = CacheNeeds(
        device="cpu", dtype="f32", groups=(KVGroup((0,), None),), num_layers=1, num_kv_heads=1,
        head_dim=8, max_model_len=max_model_len, max_rows=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_bytes=num_blocks * block_size * 64,
        block_size=None if cache == "contiguous" else block_size, prefix_caching=prefix_caching,
        swap_bytes=swap_blocks * block_size * 64,
    )  # fmt: skip
    the_cache = {"paged": Paged, "contiguous": Contiguous}[cache](needs)
    max_logit_rows = max_logit_rows or max(16, max_num_seqs)
    batch = FakeBatch(
        max_num_seqs, max_model_len, max_num_batched_tokens, max_logit_rows, VOCAB, 5,
        [(the_cache.block_size, table) for table in the_cache.block_tables],
    )  # fmt: skip
    the_tokenizer = FakeTokenizer() if tokenizer else None
    context = DecoderContext(VOCAB, max_model_len, tuple(eos), the_tokenizer)
    made = {"sample": Sample(context)}
    for cls in decoders or ():
        made[cls.name] = cls(context)
    return SimpleNamespace(
        config=EngineConfig(max_logprobs=5, seed=seed),
        spec=spec,
        program=FakeProgram(batch, [the_cache.num_blocks + sum(the_cache.swap_counts)]),
        worth_swapping=worth_swapping,
        batch=batch,
        cache=the_cache,
        scheduler={"continuous": Continuous, "static": Static}[scheduler]()
        if isinstance(scheduler, str)
        else scheduler,
        decoder=made[decoder or "sample"],
        decoders=lambda name: made[name],
        proposers=lambda name: made[name],
        proposer=proposer(context) if proposer else None,
        constraints=[c(context) for c in constraints],
        tokenizer=the_tokenizer,
        selections={},
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_logit_rows=max_logit_rows,
        explain=lambda: "fake",
    )


def greedy(prompt, num, eos=EOS):
    """The reference: what the fake model says, one token after the other."""
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(fake_logits(ids).argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def drain(engine, check=True):
    """Steps until all is done; outputs by request id."""
    from pyllmlite.engine.outputs import request_output

    done = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            break
        for state in engine.step():
            done[state.request.id] = request_output(state)
        if check:
            engine.check_integrity()
    assert not engine.has_unfinished
    return done
