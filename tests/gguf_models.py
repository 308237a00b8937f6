"""GGUF files of the tiny models, written with the gguf package as llama.cpp's converter does it.

The names come from gguf's own tensor maps, so that they check the reader's table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2", "bloom": "bloom", "mpt": "mpt",
}  # fmt: skip


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama: the two halves of every head interleaved."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _converted(arch: str, name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    heads = config.num_attention_heads
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        return _permuted(tensor, heads if "q_proj" in name else config.num_key_value_heads)
    if arch in ("gemma2", "gemma3") and "norm" in name:
        return tensor + 1
    if arch == "gpt2" and tensor.ndim == 2 and ".c_" in name:
        return tensor.T
    if arch == "bloom" and "query_key_value" in name:
        shape = (heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
        return tensor.reshape(shape).swapaxes(0, 1).reshape(tensor.shape)
    return tensor


def write_gguf(
    model: Any, path: Path, kinds: Any = None, vocabulary: bool = False, **metadata: Any
) -> Path:
    """A transformers model as GGUF.

    Args:
        kinds: ``f(gguf tensor name, array)`` gives the GGMLQuantizationType of a matrix; None: F32.
        vocabulary: With a small byte-level vocabulary, padded to the model's size.
        metadata: Further keys below the architecture's name, with ``__`` for dots.
    """
    import gguf

    config = model.config
    arch = ARCHITECTURES[config.model_type]
    layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(str(path), arch)
    get = lambda *names: next((getattr(config, n) for n in names if hasattr(config, n)), None)  # noqa: E731
    writer.add_context_length(get("max_position_embeddings", "n_positions", "max_seq_len") or 2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(get("intermediate_size", "n_inner") or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if get("num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if get("rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if get("head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = get("rope_parameters")
    if rope:
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        head_dim = get("head_dim") or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if arch in ("gemma2", "gemma3", "phi3") and get("sliding_window"):
        writer.add_sliding_window(config.sliding_window)
    if get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "mpt":
        writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    for key, value in metadata.items():
        key = f"{arch}.{key.replace('__', '.')}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if vocabulary:
        _add_vocabulary(writer, config.vocab_size)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), layers)
    tied = config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        known = name.removeprefix("transformer.") if arch == "bloom" else name
        ours = table.get_name(known, try_suffixes=(".weight", ".bias"))
        assert ours is not None, name
        tensor = _converted(arch, name, parameter.detach().float().numpy(), config)
        tensor = np.ascontiguousarray(tensor)
        kind = kinds(ours, tensor) if kinds is not None and tensor.ndim == 2 else None
        if kind is None:
            writer.add_tensor(ours, tensor)
        else:
            writer.add_tensor(ours, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    for name, factors in _rope_factors(config).items():
        writer.add_tensor(name, np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rope_factors(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope.get("rope_type") == "llama3":
        # The converter writes what the scaling divides every frequency by.
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
        count = len(scaled)
        plain = rope["rope_theta"] ** -(np.arange(count) / count)
        return {"rope_freqs.weight": plain / scaled.double().numpy()}
    return {}


def _add_vocabulary(writer: Any, size: int) -> None:
    import gguf

    from pyllmlite.model.gguf_tokenizer import byte_alphabet

    special = ["<pad>", "<s>", "</s>"]
    pairs = ["t h", "h e", "th e", "Ġ t", "Ġt h", "Ġth e", "i n", "a n"]
    tokens = special + byte_alphabet() + [pair.replace(" ", "") for pair in pairs]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    assert len(tokens) == size
    kinds = [gguf.TokenType.NORMAL] * size
    kinds[:3] = [gguf.TokenType.CONTROL] * 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(pairs)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
