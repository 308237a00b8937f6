"""The default model's real weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from model.numpy_forward import NumpyModel

from pyllmlite.model import hub
from pyllmlite.model.source import open_checkpoint

NAMES = {
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "v": "attn_v", "attn_out": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return open_checkpoint(hub.resolve(None, progress=False))


def test_spec(source):
    spec = source.spec
    assert spec.architecture == "llama" and spec.activation == "silu" and spec.gated
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert spec.head_dim == 64 and spec.intermediate_size == 1536
    assert spec.vocab_size == 49152 and spec.tie_embeddings
    assert spec.norm.kind == "rms" and spec.norm.eps == pytest.approx(1e-5)
    assert spec.layers[0].rope.theta == 100000.0 and spec.layers[0].window is None
    assert spec.eos_token_ids == (2,) and spec.max_position_embeddings == 8192
    assert not source.unused


def test_tensors_as_the_gguf_package_reads_them(source):
    if source.path.suffix != ".gguf":
        pytest.skip("the default model was fetched as safetensors")
    gguf = pytest.importorskip("gguf")
    stored = {t.name: t for t in gguf.GGUFReader(source.path).tensors}

    def theirs(name: str) -> np.ndarray:
        return gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)

    for layer in (0, 13, 29):
        for ours, name in NAMES.items():
            expected = theirs(f"blk.{layer}.{name}.weight")
            np.testing.assert_array_equal(source.get(f"layers.{layer}.{ours}.weight"), expected)
        for part, heads in (("q", 9), ("k", 3)):
            found = source.get(f"layers.{layer}.{part}.weight").reshape(heads, 2, 32, 576)
            expected = theirs(f"blk.{layer}.attn_{part}.weight").reshape(heads, 32, 2, 576)
            np.testing.assert_array_equal(found, expected.swapaxes(1, 2))
    np.testing.assert_array_equal(source.get("embed"), theirs("token_embd.weight"))
    np.testing.assert_array_equal(source.get("final_norm.weight"), theirs("output_norm.weight"))


def test_next_token(source):
    tokenizer = source.tokenizer()
    tokens = tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    logits = NumpyModel(source, np.float32).logits(tokens)
    assert tokenizer.decode(int(logits[-1].argmax())) == " Rome"


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
