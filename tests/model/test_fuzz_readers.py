"""2,000 mutated checkpoints: a clear error or a model, never a crash, a hang or a gigabyte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_models import write_gguf
from model.test_tokenizer import _train

pytest.importorskip("torch")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small model as GGUF, of several block types, and as a directory."""
    import gguf
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("fuzz")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    kinds = [gguf.GGMLQuantizationType[k] for k in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")]
    write_gguf(
        model, folder / "base.gguf", kinds=lambda name, _: kinds[len(name) % len(kinds)],
        vocabulary=True,
    )  # fmt: skip
    model.save_pretrained(folder / "hf")
    _train(folder / "hf")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_files(bases, seed):
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = str(HERE.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_readers.py"), str(seed), "1000", str(bases)],
        capture_output=True, text=True, env=environment, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["read"] + result["refused"] == 1000
    # A mutation in the weights or of an unread value leaves a readable model.
    assert result["refused"] > 500
    assert result["read"] > 20
    assert result["peak_bytes"] < 1 << 30
