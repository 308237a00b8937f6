"""docs/contracts.md for real: its walks, with strategies as a plugin brings them."""

import dataclasses
import types

import numpy as np
import pytest
from text_model import write_text_model

from pyllmlite.core.errors import PluginError
from pyllmlite.core.request import Status
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.core.weights import LinearWeight
from pyllmlite.engine.llm import LLM
from pyllmlite.hooks import registry as registry_module
from pyllmlite.hooks.attention import Attention
from pyllmlite.hooks.cache import KVView
from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.quantizer import Quantizer
from pyllmlite.hooks.registry import Registry
from pyllmlite.hooks.specs import hookimpl
from pyllmlite_plugins.cache.paged import Paged

VOCAB = 259
PROMPT = list(range(40, 75))  # two full blocks and a bit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def plugin():
    """Registers strategies as an installed plugin would, until the test is over."""
    registry_module._load.cache_clear()

    def register(**hooks):
        module = types.ModuleType("rehearsal")
        for name, classes in hooks.items():

            def bring(classes=classes):
                return classes

            setattr(module, f"pyllmlite_{name}", hookimpl(bring))
        registry = Registry.load()
        registry.register(module, distribution="rehearsal", version="1")
        assert not registry.problems, registry.problems

    yield register
    registry_module._load.cache_clear()


# -- 1. beam search, a grammar, a prefix hit -----------------------------------------------------
class Beam(Decoder):
    """``extra_args["width"]`` hypotheses of greatest probability."""

    name = "rehearsal-beam"
    needs_sync = True

    def open(self, seq):
        seq.state = {"found": {}, "score": {seq.id: 0.0}}

    def fork(self, parent, child):
        child.state = parent.state

    def sampling(self, seq):
        return {"num_logprobs": VOCAB}

    def advance(self, seq, result, actions):
        found, score = seq.state["found"], seq.state["score"]
        allowed = seq.request.params.extra_args.get("allowed", range(VOCAB))
        found[seq.id] = [
            (score[seq.id] + logprob, token) for token, logprob in result.top(0) if token in allowed
        ]
        live = [s for s in seq.request.sequences if s.status is not Status.FINISHED]
        if any(s.id not in found for s in live):
            return
        ranked = sorted(
            ((value, -token, s) for s in live for value, token in found[s.id]),
            key=lambda entry: entry[:2],
            reverse=True,
        )[: seq.request.params.extra_args["width"]]
        found.clear()
        chosen = {s.id: [(v, -t) for v, t, other in ranked if other is s] for s in live}
        for s in live:
            if not chosen[s.id]:
                actions.end(s, "dropped")
        pairs = []
        for s in live:
            for index, (value, token) in enumerate(chosen[s.id]):
                target = s if index == 0 else actions.fork(s)
                pairs.append((target, value, token))
        for target, value, token in pairs:
            score[target.id] = value
            actions.append(target, [token])


class OnlySome(Constraint):
    """``extra_args["allowed"]``; remembers what it accepted, so that rollback can be checked."""

    name = "rehearsal-allowed"

    @classmethod
    def applies(cls, params):
        return "allowed" in params.extra_args

    def open(self, seq):
        bits = np.zeros((VOCAB + 31) // 32, np.uint32)
        for token in seq.request.params.extra_args["allowed"]:
            bits[token >> 5] |= np.uint32(1 << (token & 31))
        return {"bits": bits, "accepted": []}

    def mask(self, state):
        return state["bits"]

    def accept(self, state, token_id):
        assert state["bits"][token_id >> 5] >> np.uint32(token_id & 31) & 1
        state["accepted"].append(token_id)

    def rollback(self, state, num_tokens):
        assert 0 < num_tokens <= len(state["accepted"])
        del state["accepted"][-num_tokens:]

    def fork(self, state):
        return {"bits": state["bits"], "accepted": list(state["accepted"])}


def beams_by_hand(llm, prompt, width, steps, allowed):
    """The same search, every hypothesis a request of its own."""
    beams = [(0.0, [])]
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB, decoder="sample")
    for _ in range(steps):
        outputs = llm.generate([prompt + tokens for _, tokens in beams], one, use_tqdm=False)
        ranked = []
        for (value, tokens), output in zip(beams, outputs, strict=True):
            for token, entry in output.outputs[0].logprobs[0].items():
                if token in allowed:
                    ranked.append((value + entry.logprob, -token, [*tokens, token]))
        ranked.sort(key=lambda entry: entry[:2], reverse=True)
        beams = [(value, tokens) for value, _, tokens in ranked[:width]]
    return [tokens for _, tokens in beams]


@pytest.mark.parametrize("allowed", [None, range(0, VOCAB, 3)], ids=["free", "grammar"])
@pytest.mark.parametrize("rows", [8, 2], ids=["rows", "too few rows"])
def test_beams_grammar_prefix(model, plugin, allowed, rows):
    plugin(decoders=[Beam, OnlySome])
    llm = LLM(model, decoder="rehearsal-beam", max_logprobs=VOCAB, max_num_seqs=rows, dtype="f32")
    width, steps = 4, 20
    extra = {"width": width} | ({} if allowed is None else {"allowed": allowed})
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, extra_args=extra)
    want = beams_by_hand(llm, PROMPT, width, steps, allowed or range(VOCAB))
    for _ in range(2):
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        got = [o.token_ids for o in output.outputs]
        assert output.num_cached_tokens == 32  # both full blocks of the prompt
        assert sorted(got) == sorted(want)
        llm.engine.check_integrity()
    assert llm.built.cache.stats()["copies"] > 0
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


# -- 2. speculation with a rollback across a block's edge ----------------------------------------
class Guess(Proposer):
    """Knows the answer, but errs at every fifth place."""

    name = "rehearsal-guess"
    answer: list[int] = []
    fared: list[tuple[int, int]] = []

    def propose(self, seq, max_tokens):
        done = seq.num_output_tokens
        tokens = self.answer[done : done + min(6, max_tokens)]
        return [
            (t + (done + i) // 5 % 2 * ((done + i) % 5 == 0)) % VOCAB for i, t in enumerate(tokens)
        ]

    def verified(self, seq, num_proposed, num_accepted):
        self.fared.append((num_proposed, num_accepted))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("constrained", [False, True])
def test_speculation_changes_nothing(model, plugin, temperature, constrained):
    plugin(decoders=[Guess, OnlySome])
    extra = {"allowed": range(1, VOCAB, 2)} if constrained else {}
    params = SamplingParams(
        temperature=temperature, seed=5, max_tokens=70, ignore_eos=True, extra_args=extra,
        repetition_penalty=1.2, frequency_penalty=0.3,
    )  # fmt: skip
    plain = LLM(model, dtype="f32").generate([PROMPT[:15]], params, use_tqdm=False)
    Guess.answer, Guess.fared = plain[0].outputs[0].token_ids, []
    llm = LLM(model, dtype="f32", proposer="rehearsal-guess", max_num_seqs=4)
    output = llm.generate([PROMPT[:15]] * 3, params, use_tqdm=False)
    for one in output:
        assert one.outputs[0].token_ids == Guess.answer
    assert any(accepted < proposed for proposed, accepted in Guess.fared)
    assert any(accepted > 2 for _, accepted in Guess.fared)
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


# -- 4. act_order and AWQ's scales ---------------------------------------------------------------
class Reordered(Quantizer):
    """The weights as they are, but with columns in another order and scaled, as GPTQ and AWQ
    leave them."""

    name = "rehearsal-reordered"

    def quantize(self, shape, weight, calibration=None):
        if shape.kind == "embed":  # rows are gathered too: no input to change
            return LinearWeight("f32", weight.copy())
        rng = np.random.default_rng(len(shape.name))
        order = rng.permutation(shape.in_features).astype(np.int32)
        scale = np.exp2(rng.integers(-2, 3, shape.in_features)).astype(np.float32)
        values = np.ascontiguousarray((weight / scale)[:, order])
        return LinearWeight("f32", values, input_scale=scale, input_permutation=order)


def test_permuted_and_scaled_inputs(model, plugin):
    plugin(quantizers=[Reordered])
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
    plain = LLM(model, dtype="f32").generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    llm = LLM(model, dtype="f32", quantizer="rehearsal-reordered")
    other = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    assert other.token_ids == plain.token_ids
    for a, b in zip(plain.logprobs, other.logprobs, strict=True):
        assert {t: e.logprob for t, e in a.items()} == pytest.approx(
            {t: e.logprob for t, e in b.items()}, abs=1e-4
        )


# -- 5. a KV dtype from a plugin -----------------------------------------------------------------
class PagedF16(Paged):
    """float16, one token after the other, keys as they are before rotation."""

    name = "rehearsal-f16"
    layout = "rehearsal-rows"

    @classmethod
    def supports(cls, need):
        if need.kv_dtype != "rehearsal-half":
            return f"stores rehearsal-half, not {need.kv_dtype}"
        return None

    def __init__(self, needs):
        super().__init__(dataclasses.replace(needs, kv_dtype="f32"))
        self.kv_dtype = "rehearsal-half"

    def add_tensors(self, sink):
        needs = self.needs
        views = []
        for layer in range(needs.num_layers):
            shape = (self.num_blocks, self.block_size, needs.num_kv_heads, needs.head_dim)
            k, v = (sink.tensor(f"{name}{layer}", np.zeros(shape, np.float16)) for name in "kv")
            views.append(
                KVView(
                    self.layout,
                    self.kv_dtype,
                    0,
                    self.block_size,
                    self.num_blocks,
                    k,
                    v,
                    rotated_keys=False,
                )  # fmt: skip
            )
        return views

    def add_store_op(self, sink, layer, qkv, kv):
        heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_dim

        def store(batch, qkv, k, v):
            k, v = k.view(np.float16), v.view(np.float16)  # they travel as uint16
            x = qkv.reshape(len(qkv), heads + 2 * kv_heads, size)
            slots = batch.slot_mapping(kv.group)
            written = slots >= 0
            k.reshape(-1, kv_heads, size)[slots[written]] = x[written, heads : heads + kv_heads]
            v.reshape(-1, kv_heads, size)[slots[written]] = x[written, heads + kv_heads :]
            x[:, :heads] = rotated(x[:, :heads], layer.cos, layer.sin, batch.positions)

        sink.op(store, [qkv, kv.k, kv.v], f"layers.{layer.index}.store")


class AttentionF16(Attention):
    """Reads it, and rotates the keys."""

    name = "rehearsal-rows"

    @classmethod
    def supports(cls, need):
        return None if need.kv_layout == "rehearsal-rows" else f"does not read {need.kv_layout}"

    def add_ops(self, sink, layer, qkv, out, kv):
        if kv.rotated_keys:
            raise PluginError("keys must be stored before rotation")
        groups = layer.num_heads // layer.num_kv_heads

        def attend(batch, qkv, out, k, v):
            k, v = k.view(np.float16), v.view(np.float16)
            table, starts = batch.block_table(kv.group), batch.query_start_loc
            for i, length in enumerate(batch.seq_lens):
                mine = slice(starts[i], starts[i + 1])
                blocks = table[i, : -(-length // kv.block_size)]
                shape = (-1, layer.num_kv_heads, layer.head_dim)
                keys = k[blocks].reshape(shape)[:length].astype(np.float32)
                keys = rotated(keys, layer.cos, layer.sin, np.arange(length))
                values = v[blocks].reshape(shape)[:length].astype(np.float32)
                q = qkv[mine, : layer.num_heads * layer.head_dim]
                q = q.reshape(-1, layer.num_kv_heads, groups, layer.head_dim)
                scores = np.einsum("tkgd,skd->kgts", q, keys) * layer.scale
                scores[..., np.arange(length) > batch.positions[mine, None]] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[mine] = np.einsum("kgts,skd->tkgd", weights, values).reshape(len(q), -1)

        sink.op(attend, [qkv, out, kv.k, kv.v], f"layers.{layer.index}.attention")


def rotated(x, cos, sin, positions):
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def test_kv_dtype_from_a_plugin(model, plugin):
    plugin(caches=[PagedF16], attentions=[AttentionF16])
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
    plain = LLM(model, dtype="f32").generate([PROMPT, PROMPT[:9]], params, use_tqdm=False)
    # Nobody is named: only one cache knows the word, and only one attention reads its layout.
    llm = LLM(model, dtype="f32", kv_cache_dtype="rehearsal-half")
    assert llm.built.selections["cache"].name == "rehearsal-f16"
    assert llm.built.selections["attention"].name == "rehearsal-rows"
    for a, b in zip(plain, llm.generate([PROMPT, PROMPT[:9]], params, use_tqdm=False), strict=True):
        for one, other, token in zip(
            a.prompt_logprobs[1:], b.prompt_logprobs[1:], a.prompt_token_ids[1:], strict=True
        ):
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=0.01)
    with pytest.raises(PluginError, match="rehearsal-rows"):
        LLM(model, dtype="f32", kv_cache_dtype="rehearsal-half", attention="flash")
    with pytest.raises(PluginError, match="does not read paged-kt"):
        LLM(model, dtype="f32", attention="rehearsal-rows")
    with pytest.raises(PluginError, match="nosuch"):
        LLM(model, dtype="f32", kv_cache_dtype="nosuch")
