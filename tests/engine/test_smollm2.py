"""The default model's real weights, against transformers in float32.

The file is looked for where ``pyllmlite run`` puts it, and fetched if it is not there.
"""

from __future__ import annotations

import pydoc_data.topics
import subprocess
import sys

import numpy as np
import pytest
from model.program_logits import build_tiny, program_logits

from pyllmlite import LLM, SamplingParams
from pyllmlite.model.hub import resolve

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def path():
    return resolve(None, progress=False)


@pytest.fixture(scope="module")
def model(path):
    import transformers

    place = {"gguf_file": path.name} if path.is_file() else {}
    directory = path.parent if path.is_file() else path
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **place
    ).eval()


@pytest.fixture(scope="module")
def llm(path):
    return LLM(str(path), dtype="f32", max_model_len=1024, kv_cache_memory="200MB")


def prose(llm, count: int, length: int) -> list[list[int]]:
    """Pieces of English prose that comes with Python, as token ids."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = llm.engine.built.tokenizer.encode(text[: 12 * count * length])
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def test_logits_equal_transformers(llm, model):
    (ids,) = prose(llm, 1, 300)
    for length in (1, 7, 64, 300):
        with torch.no_grad():
            theirs = model(torch.tensor([ids[:length]])).logits[0].numpy()
        ours = program_logits(llm.engine.built, ids[:length])
        assert np.abs(ours - theirs).max() < 2e-3


def test_greedy_continuations_are_the_same(llm, model):
    """Every token of ours is the best one given those before it, by transformers' logits; a
    difference counts where the two differ by more than 1e-3."""
    asked = prose(llm, 20, 40)
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    outputs = llm.generate(asked, params, use_tqdm=False)
    pairs = zip(asked, outputs, strict=True)
    whole = torch.tensor([ids + list(output.outputs[0].token_ids) for ids, output in pairs])
    with torch.no_grad():
        logits = model(whole[:, :-1], logits_to_keep=64).logits
    chosen = logits.gather(-1, whole[:, 40:, None])[..., 0]
    assert chosen.shape == (20, 64)
    assert (logits.max(-1).values - chosen).max().item() <= 1e-3


def test_default_precision_keeps_the_distribution(path, llm, model):
    """Blocks run as they were shipped, activations in int8: KL divergence on prose, in nats."""
    built = build_tiny(path, dtype="auto", max_model_len=512)
    divergence = []
    for ids in prose(llm, 2, 128):
        with torch.no_grad():
            theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        ours = torch.log_softmax(torch.from_numpy(program_logits(built, ids)), -1)
        divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
    assert 0 < torch.cat(divergence).mean().item() < 0.008


def test_int8_kv_keeps_the_distribution(path, llm):
    """Beside the same weights with KV in the model's dtype: greedy tokens mostly agree, KL
    divergence in nats; prefill, chunks and decode give the same bits."""
    int8 = build_tiny(path, max_model_len=512, kv_cache_memory="64MB", cache="paged-int8")
    exact = llm.engine.built
    assert int8.cache.kv_dtype == "int8" and exact.cache.kv_dtype == "f32"
    (ids,) = prose(llm, 1, 300)
    ours, theirs = program_logits(int8, ids), program_logits(exact, ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.97
    logs = [torch.log_softmax(torch.from_numpy(x), -1) for x in (ours, theirs)]
    assert 0 < (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean().item() < 1e-3
    for chunk in (1, 7):
        short = program_logits(int8, ids[:40], chunk)
        np.testing.assert_array_equal(short, ours[:40])


def test_loading_needs_little_more_than_the_weights(path):
    """Peak memory of a process that loads the model, beside one that only imports."""
    program = (
        "import resource, sys\n"
        "from pyllmlite.core.config import EngineConfig\n"
        "from pyllmlite.model.build import build\n"
        "from pyllmlite.model.source import open_checkpoint\n"
        "import pyllmlite._native, pyllmlite_plugins\n"
        "from pyllmlite.hooks.registry import Registry; Registry.load()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "config = EngineConfig(dtype='f32', quantizer='none', skip_tokenizer_init=True,\n"
        "    max_model_len=256, max_num_seqs=1, max_num_batched_tokens=16,\n"
        "    kv_cache_memory='16MB')\n"
        "built = build(open_checkpoint(sys.argv[1]), config)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(built.weight_bytes, (after - before) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    weights, used = map(int, done.stdout.split())
    assert used < 1.3 * weights + (32 << 20)  # KV, buffers and scratch are not weights
