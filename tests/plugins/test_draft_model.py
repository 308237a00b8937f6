"""``draft-model``: the output is as without, the drafts are the draft model's greedy tokens."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from text_model import write_text_model
from tiny_models import TINY

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.errors import ConfigError, PyllmliteError
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.testing import ProposerConformance
from pyllmlite.testing.decoder import EOS, VOCAB, next_token
from pyllmlite_plugins.decoder.draft_length import best_length
from pyllmlite_plugins.decoder.draft_model import DraftModelProposer


class Table:
    """The suite's model, wrong behind every fifth token."""

    weight_bytes = 1

    def greedy(self, wanted):
        found = []
        for _, ids, count in wanted:
            drafts, last = [], ids[-1]
            for _ in range(count):
                last = next_token(last) if last % 5 else 1
                drafts.append(last)
            found.append(drafts)
        return found

    def forget(self, key):
        pass


class TestDraftModel(ProposerConformance):
    strategy = DraftModelProposer

    def context(self):
        return DecoderContext(
            VOCAB, 256, (EOS,), extra={"draft_model": "table"}, weight_bytes=10,
            open_model=lambda name, options: Table(),
        )  # fmt: skip


def test_a_dear_draft_is_shorter():
    lengths = [best_length(80, 1, 0.1, 16, cost) for cost in (0.0, 0.1, 0.3, 0.9)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[2] and lengths[3] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("tiny")))


def load(model, options=None, **more):
    words = {"dtype": "f32", "max_model_len": 200, "max_num_seqs": 8, "threads": 1} | more
    extra = {
        "draft_model": words.pop("draft", model), "draft_options": options or {},
        "draft_step_cost": 0.01, "draft_token_cost": 0.01,
    }  # fmt: skip
    return LLM(model, proposer="draft-model", extra=extra, **words)


def asked(count, **more):
    rng = random.Random(3)
    prompts = [
        [rng.randrange(256) for _ in range(rng.choice([1, 2, 16, 17, 40]))] for _ in range(count)
    ]
    prompts[-1] = list(prompts[0])
    params = [
        SamplingParams(max_tokens=rng.randint(1, 50), seed=i, ignore_eos=True, **more)
        for i in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("ask", [{"temperature": 0}, {"temperature": 0.7, "n": 2}], ids=str)
@pytest.mark.parametrize(
    "draft",
    [{}, {"num_layers": 1}, {"quantizer": "rtn", "bits": 4, "group_size": 32},
     {"kv_cache_memory": "40KB", "max_model_len": 64}],
    ids=["same", "fewer layers", "fewer bits", "small cache, short context"],
)  # fmt: skip
def test_output_is_as_without(model, draft, ask):
    # Few rows, tokens and blocks: sequences wait, chunks are short, some are preempted.
    llm = load(model, draft, max_num_batched_tokens=24, kv_cache_memory="150KB")
    prompts, params = asked(12, **ask)
    drafted = llm.generate(prompts, params, use_tqdm=False)
    steps = llm.engine.num_steps
    plain = [SamplingParams(**{**vars(p), "proposer": "none"}) for p in params]
    for a, b in zip(drafted, llm.generate(prompts, plain, use_tqdm=False), strict=True):
        assert a.error is None and a.outputs == b.outputs
    if not draft and ask["temperature"] == 0:
        assert steps < 0.6 * (llm.engine.num_steps - steps)
    llm.engine.check_integrity()
    runner = llm.built.proposer._model
    runner._built.cache.check_integrity()
    assert not runner._held and len(runner._free_rows) == 8
    assert runner._built.cache.num_free_blocks == runner._built.cache.num_blocks


def test_drafts_are_greedy(model):
    """The runner by itself: sequences that grow, drafts taken or not, more keys than rows."""
    llm = load(model, max_num_seqs=3)
    runner = llm.built.proposer._model
    rng = random.Random(1)
    lines = {key: [rng.randrange(256) for _ in range(rng.randint(1, 40))] for key in range(5)}
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, proposer="none")
    for _ in range(12):
        keys = rng.sample(range(5), rng.randint(1, 3))
        wanted = [(key, lines[key], rng.randint(1, 6)) for key in keys]
        drafts = runner.greedy(wanted)
        outputs = llm.generate([lines[key] for key in keys], greedy, use_tqdm=False)
        for (key, _, count), draft, output in zip(wanted, drafts, outputs, strict=True):
            assert draft == output.outputs[0].token_ids[:count]
            taken = rng.randint(0, count)
            lines[key] += [*draft[:taken], rng.randrange(256)]
        runner._built.cache.check_integrity()


def test_windows(tmp_path):
    path = str(TINY["gemma3"](tmp_path))
    llm = load(path, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    plain = SamplingParams(**{**vars(params), "proposer": "none"})
    prompt = list(range(3, 60))
    outputs = [llm.generate([prompt], p, use_tqdm=False)[0] for p in (params, plain)]
    assert outputs[0].error is None and outputs[0].outputs == outputs[1].outputs
    assert llm.engine.num_steps < 100


def test_what_cannot_work_is_refused(model, tmp_path):
    other = str(TINY["llama"](tmp_path))
    for draft, options, message in (
        (other, {}, "has 331 tokens, the model 259"),
        (model, {"num_layers": 3}, "has 2 layers, num_layers is 3"),
        (model, {"quantiser": "rtn"}, "did you mean 'quantizer'"),
        (model, {"max_num_seqs": 0}, "max_num_seqs must be"),
        ("/nosuch", {}, "nosuch"),
    ):
        with pytest.raises(PyllmliteError, match=message):
            load(model, options, draft=draft)
    with pytest.raises(ConfigError, match="needs extra={'draft_model'"):
        LLM(model, proposer="draft-model")
    with pytest.raises(ConfigError, match="opens no second model"):
        DraftModelProposer(DecoderContext(10, 10, (0,), extra={"draft_model": "x"}))
