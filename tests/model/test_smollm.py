"""The default model's real weights: tensors and logits as transformers reads them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from model.numpy_forward import NumpyModel

from pyllmlite.model import hub
from pyllmlite.model.source import open_checkpoint

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def pair():
    import transformers

    path = hub.resolve(None, progress=False)
    more = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if more else path, dtype=torch.float32, attn_implementation="eager", **more
    )
    return open_checkpoint(path), model.eval()


def test_spec(pair):
    source, model = pair
    spec, config = source.spec, model.config
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert spec.head_dim == 64 and spec.intermediate_size == config.intermediate_size
    assert spec.vocab_size == config.vocab_size and spec.tie_embeddings
    assert spec.norm.eps == pytest.approx(config.rms_norm_eps)
    assert spec.layers[0].rope.theta == 100000.0
    assert spec.eos_token_ids == (2,) and spec.max_position_embeddings == 8192
    assert not source.unused


def test_tensors(pair):
    source, model = pair
    state = model.state_dict()
    names = {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(30):
        for ours, theirs in names.items():
            expected = state[f"model.layers.{layer}.{theirs}.weight"].numpy()
            np.testing.assert_array_equal(source.get(f"layers.{layer}.{ours}.weight"), expected)
    np.testing.assert_array_equal(source.get("embed"), state["model.embed_tokens.weight"].numpy())
    np.testing.assert_array_equal(source.get("final_norm.weight"), state["model.norm.weight"])


def test_logits(pair):
    source, model = pair
    ours = NumpyModel(source)
    tokens = source.tokenizer().encode("The capital of France is Paris. The capital of Italy is")
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    logits = ours.logits(tokens)
    assert np.abs(logits - theirs).max() < 2e-3
    assert source.tokenizer().decode(int(logits[-1].argmax())) == " Rome"


READ_ALL = """
import sys
from pyllmlite.model.source import open_checkpoint

def resident():
    with open("/proc/self/smaps_rollup", encoding="ascii") as smaps:
        return sum(int(line.split()[1]) for line in smaps if line.startswith("Rss:")) << 10

source = open_checkpoint(sys.argv[1])
before = resident()
for name in source.names():
    tensor = source.raw(name)
    for first in range(0, tensor.shape[0], 4096):
        tensor.float32(slice(first, first + 4096))
print((resident() - before) / source.weight_bytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_reading_keeps_no_pages():
    """A pass over all tensors, row block by row block, leaves next to nothing in memory."""
    path = hub.resolve(None, progress=False)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.25
