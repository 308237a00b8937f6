"""What is written is loaded by transformers, and means there what it means here."""

import json

import numpy as np
import pytest
import torch
import transformers
from gguf_models import write_gguf
from loops import unpack_rows
from tiny_models import TINY, reference

from pyllmlite.compress.compare import read_chunk
from pyllmlite.compress.evaluate import Choice, _load
from pyllmlite.compress.quantize import quantize_model
from pyllmlite.compress.settings import Settings
from pyllmlite.model.safetensors import SafetensorsCheckpoint
from pyllmlite.model.source import open_model

TOKENS = np.random.default_rng(5).integers(3, 300, 48).tolist()


def quantize(model, out, **settings):
    return quantize_model(str(model), out, Settings(**settings), eval_windows=0).path


def ours(path, tokens=TOKENS):
    """Logits with floats for inputs and KV."""
    built = _load(open_model(path), Choice(str(path)), len(tokens), 1, True)
    built.cache.acquire(1, 0, tokens)
    built.batch.token_table[0, : len(tokens)] = tokens
    built.batch.set_sampling(0, temperature=0.0)
    return read_chunk(built, tokens, 0)


def theirs(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def close(one, two):
    np.testing.assert_allclose(one, two, atol=2e-3 * np.abs(two).max())
    assert (one.argmax(-1) == two.argmax(-1)).mean() >= 0.95


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=331, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        attention_bias=True, mlp_bias=True, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 32, "symmetric": True},
        {"group_size": 32},
        {"group_size": 48},  # 64 and 160 columns: written in groups of 16
        {"group_size": 0, "symmetric": True},
        {"bits": 8},
        {"bits": 8, "layout": "int-quantized"},
        {"bits": 8, "int8_activations": True},
        {"group_size": 32, "plan": {"layers.1.mlp_down": 8, "layers.0.qkv": 8}, "symmetric": True},
    ],
    ids=str,
)
def test_compressed_tensors(llama, tmp_path, settings):
    pytest.importorskip("compressed_tensors")
    out = quantize(llama, tmp_path / "out", method="rtn", **settings)
    more = {}
    if settings.get("symmetric") is None and settings.get("bits") != 8:
        # With packed zero points compressed-tensors 0.20 loads in transformers 5 only so.
        more["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **more)
    expected = theirs(model.eval())
    if settings.get("int8_activations"):
        np.testing.assert_allclose(ours(out), expected, atol=0.1 * np.abs(expected).max())
    else:
        close(ours(out), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_by_an_unpacking_of_its_own(llama, tmp_path, symmetric):
    """transformers' float model with weights unpacked from the layout's description."""
    settings = {"method": "rtn", "layout": "gptq", "group_size": 48, "symmetric": symmetric or None}
    out = quantize(llama, tmp_path / "out", **settings)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    less_one = {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
    assert less_one == int(symmetric) and config["group_size"] == 16
    stored = SafetensorsCheckpoint(out)
    model = reference(llama)
    state = model.state_dict()
    for name in stored.names():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        part = {
            word: stored.tensor(f"{module}.{word}").plain().reshape(
                stored.tensor(f"{module}.{word}").shape
            )
            for word in ("qweight", "qzeros", "g_idx", "scales")
        }
        rows, columns = state[module + ".weight"].shape
        codes = unpack_rows(part["qweight"].T, 4, columns)
        zeros = (unpack_rows(part["qzeros"], 4, rows) + less_one) & 15
        group = part["g_idx"]
        scales = part["scales"].view(np.float16).astype(np.float32)
        weight = scales[group].T * (codes - zeros[group].T)
        state[module + ".weight"] = torch.from_numpy(weight.astype(np.float32))
    model.load_state_dict(state)
    close(ours(out), theirs(model))


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "bloom", "mpt",
     "llama3", "llama-yarn", "phi3-longrope"],
)  # fmt: skip
def test_gguf_becomes_a_directory_of_its_family(tmp_path, name):
    """Names, configs and rows are turned around: transformers makes the same logits of it."""
    model = reference(TINY[name](tmp_path / "hf"))
    metadata = {
        "mistral": {"attention__sliding_window": 24},
        "gemma2": {"attention__scale": 24**-0.5},
        "gemma3": {"attention__scale": 20**-0.5, "attention__sliding_window_pattern": 2},
    }.get(name, {})
    gguf = write_gguf(model, tmp_path / "model.gguf", vocabulary=True, **metadata)
    out = quantize(gguf, tmp_path / "out", method="f32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(loaded) is type(model)
    expected = theirs(model)
    np.testing.assert_allclose(theirs(loaded), expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(ours(out), expected, atol=2e-3 * np.abs(expected).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "the thin  man, then.\n12 é"
    assert tokenizer(text, add_special_tokens=False).input_ids == open_model(
        gguf
    ).tokenizer().encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hi"


@pytest.mark.parametrize("name", ["phi3", "gpt2", "bloom", "mpt", "gemma3"])
def test_every_family_quantizes(tmp_path, name):
    """Fused and turned matrices: the codes stand for the checkpoint's own modules."""
    layout = "gptq" if name == "gpt2" else "compressed-tensors"
    model = TINY[name](tmp_path / "hf")
    out = quantize(model, tmp_path / "out", method="rtn", bits=8, layout=layout)
    before, after = open_model(model), open_model(out)
    for canonical in before.names():
        want, found = before.get(canonical), after.get(canonical)
        atol = np.abs(want).max() / 250 if after.raw(canonical).is_codes else 0
        np.testing.assert_allclose(found, want, atol=atol)
    assert after.quantized


def test_turned_matrices_need_gptq(tmp_path):
    from pyllmlite.core.errors import ConfigError

    model = TINY["gpt2"](tmp_path / "hf")
    with pytest.raises(ConfigError, match="Conv1D.*gptq"):
        quantize(model, tmp_path / "out", method="rtn")
