"""Every architecture read back from a checkpoint that transformers wrote."""

from __future__ import annotations

import numpy as np
import pytest
from model.numpy_forward import NumpyModel
from tiny_models import TINY, reference

from pyllmlite.core.errors import ModelError
from pyllmlite.model.architectures import architectures, find_architecture
from pyllmlite.model.source import open_checkpoint, tensor_shapes

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request, tmp_path_factory):
    path = TINY[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, open_checkpoint(path), reference(path)


def test_logits_equal_transformers(tiny):
    name, source, model = tiny
    ours = NumpyModel(source)
    rng = np.random.default_rng(7)
    for length in (1, 7, 64, 300):
        tokens = rng.integers(3, source.spec.vocab_size, size=length).tolist()
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0].double().numpy()
        logits = ours.logits(tokens)
        assert np.abs(theirs).max() > 0.1  # the comparison means something
        assert np.abs(logits - theirs).max() < 2e-3, f"{name}, {length} tokens"


def test_spec_fields(tiny):
    name, source, model = tiny
    spec, config = source.spec, model.config
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    assert spec.num_layers == config.num_hidden_layers == len(spec.layers)
    assert spec.num_heads == config.num_attention_heads
    assert spec.num_kv_heads == getattr(config, "num_key_value_heads", spec.num_heads)
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.bos_token_id == 1
    assert spec.eos_token_ids == (2,)
    assert source.stored_dtype == "f32"
    assert source.weight_bytes == sum(
        p.numel() * 4 for p in model.state_dict().values()
    ) - (0 if not spec.tie_embeddings else spec.vocab_size * spec.hidden_size * 4)
    assert not source.unused


def test_tensors_equal_the_modules(tiny):
    """Every parameter of the module turns up in exactly the canonical tensors it belongs to."""
    name, source, model = tiny
    stored = {k: v.detach().numpy().astype(np.float64) for k, v in model.named_parameters()}
    total = sum(float(np.abs(v).sum()) for v in stored.values())
    gemma = 1.0 if "gemma" in name else 0.0
    ours = 0.0
    for canonical in source.names():
        tensor = source.get(canonical).astype(np.float64)
        assert tensor.shape == tensor_shapes(source.spec)[canonical][0]
        ours += float(np.abs(tensor - (gemma if "norm" in canonical else 0.0)).sum())
    assert ours == pytest.approx(total, rel=1e-6)


def test_named_tensors_of_llama(tmp_path):
    source = open_checkpoint(TINY["llama"](tmp_path))
    state = reference(tmp_path).state_dict()
    pairs = {
        "embed": "model.embed_tokens.weight",
        "layers.1.q.weight": "model.layers.1.self_attn.q_proj.weight",
        "layers.2.down.weight": "model.layers.2.mlp.down_proj.weight",
        "layers.0.mlp_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    for canonical, theirs in pairs.items():
        np.testing.assert_array_equal(source.get(canonical), state[theirs].numpy())
    assert source.get("layers.0.q.bias") is None
    assert not source.has("layers.0.q.bias")
    assert source.raw("nothing") is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "phi3", "gemma2", "mpt"])
def test_row_slices_are_rows_of_the_whole(name, tmp_path):
    source = open_checkpoint(TINY[name](tmp_path))
    for canonical in source.names():
        raw, whole = source.raw(canonical), source.get(canonical)
        rows = len(whole)
        for part in (slice(0, 1), slice(3, rows - 2), slice(rows - 1, rows + 9), slice(5, 5)):
            np.testing.assert_array_equal(raw.float32(part), whole[part])
        picked = np.array([0, rows - 1, rows // 2])
        np.testing.assert_array_equal(raw.float32(picked), whole[picked])


def test_bf16_and_f16_checkpoints(tmp_path):
    path = TINY["llama"](tmp_path / "f32")
    model = reference(path)
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        model.to(dtype).save_pretrained(tmp_path / word)
        source = open_checkpoint(tmp_path / word)
        assert source.stored_dtype == word
        expected = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
        np.testing.assert_array_equal(source.get("layers.1.up.weight"), expected)


def test_shards_read_as_one(tmp_path):
    path = TINY["qwen3"](tmp_path / "one")
    reference(path).save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = open_checkpoint(path), open_checkpoint(tmp_path / "many")
    assert set(one.names()) == set(many.names())
    for name in one.names():
        np.testing.assert_array_equal(one.get(name), many.get(name))


def test_unknown_architecture_names_the_known_and_the_nearest():
    with pytest.raises(ModelError, match=r"'lama' is not supported \(nearest: llama\).*qwen3"):
        find_architecture("lama")
    for word in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2",
                 "bloom", "mpt"):  # fmt: skip
        assert word in architectures()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer"),
        ({"hidden_size": 1 << 40}, "hidden_size must be an integer"),
        ({"hidden_size": "big"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3.input_layernorm.weight"),
        ({"intermediate_size": 128}, "the config needs \\[128, 72\\]"),
        ({"vocab_size": 332}, "embed_tokens.weight has shape"),
        ({"num_key_value_heads": 4}, "6 heads are no multiple of 4 KV heads"),
        ({"hidden_act": "mish"}, "activation 'mish' is not known"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": "x"}}, "rope_theta"),
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"model_type": None}, "architecture 'None' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "with .hqq.*known are gptq, awq"),
        ({"eos_token_id": "x"}, "eos_token_id is no token id"),
    ],
)
def test_bad_configs_give_one_clear_line(change, message, tmp_path):
    import json

    path = TINY["llama"](tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_what_is_no_model(tmp_path):
    for path, message in (
        (tmp_path / "absent", "no such file or directory"),
        (tmp_path, "no model"),
    ):
        with pytest.raises(ModelError, match=message):
            open_checkpoint(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not valid JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_checkpoint(tmp_path)
