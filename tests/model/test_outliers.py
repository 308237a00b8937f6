"""LLM.int8() on a model with planted outlier features: what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from model.program_logits import build_tiny, program_logits

torch = pytest.importorskip("torch")


def planted(directory):
    """A random Llama in which two inputs of every norm's matrices are 60 times the rest, and are
    read with a sixteenth of the weight; transformers' model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=331, max_position_embeddings=256,
        initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    channels = [7, 101]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[channels] *= 60
                for reader in readers:
                    reader.weight[:, channels] /= 16
    model.save_pretrained(directory)
    return model


def divergence(reference, other):
    """Mean KL divergence in nats a token."""
    p, q = (torch.log_softmax(torch.as_tensor(x).double(), -1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_outliers_cost_plain_int8_twenty_times_more(tmp_path):
    model = planted(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 331, 200).tolist()
    with torch.no_grad():
        reference = model(torch.tensor([tokens])).logits[0].numpy()
    loss = {}
    # The paper's LLM.int8(); int8 per token with no input taken out; what stands by default.
    for name, extra in {
        "paper": {"activation_group": 0},
        "plain": {"activation_group": 0, "outlier_threshold": 1e30},
        "default": {},
    }.items():
        built = build_tiny(tmp_path, quantizer="int8", extra=extra)
        logits = program_logits(built, tokens)
        np.testing.assert_array_equal(program_logits(built, tokens, chunk=7), logits)
        loss[name] = divergence(reference, logits)
    assert 0 < loss["default"] < loss["paper"] < 0.005
    assert loss["plain"] > 20 * loss["paper"]
