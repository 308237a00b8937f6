"""Tiny Llama models in the layouts of other tools, packed by plain loops from the layouts'
descriptions, with the float weights that they stand for beside them.

``write(directory, layout, ...)`` draws codes and scales at random, writes the checkpoint, and
returns transformers' own model with the dequantized weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(
    sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)  # fmt: skip

Tensors = dict[str, np.ndarray]


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """``[n, k]`` codes into int32 ``[n, ceil(k * bits / 32)]``: code i at bit ``i * bits`` of the
    row, lowest first."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint32)
    for r in range(rows):
        value = 0
        for i in range(count):
            value |= int(codes[r, i]) << (bits * i)
        for w in range(words.shape[1]):
            words[r, w] = (value >> (32 * w)) & 0xFFFFFFFF
    return words.view(np.int32)


@dataclass
class Drawn:
    """One matrix: codes ``[out, in]``, scales and zeros ``[out, groups]``, the group of every
    input, and the float weight."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray
    weight: np.ndarray


def draw(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    symmetric: bool,
    order: np.ndarray | None = None,
    scale_type: Any = np.float16,
    least_zero: int = 1,
) -> Drawn:
    size = group or columns
    groups = -(-columns // size)
    top = 1 << bits
    codes = rng.integers(0, top, (rows, columns))
    scales = (rng.uniform(0.5, 1.5, (rows, groups)) * 0.5 / top).astype(scale_type)
    zeros = np.full((rows, groups), top // 2)
    if not symmetric:
        zeros = rng.integers(least_zero, top, (rows, groups))
    group_of = np.arange(columns) // size
    if order is not None:
        group_of = group_of[np.argsort(order)]
    weight = scales.astype(np.float32)[:, group_of] * (codes - zeros[:, group_of])
    return Drawn(codes, scales, zeros, group_of, weight.astype(np.float32))


def gptq(drawn: Drawn, bits: int, less: int = 1, borrow: bool = False) -> Tensors:
    """``borrow``: one less in whole words, as GPTQModel makes the first version of the second: a
    zero point of 0 takes one from its neighbour."""
    stored = (drawn.zeros - less) % (1 << bits)
    zeros = pack_rows(stored.T, bits)
    if borrow:
        ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        zeros = (pack_rows(drawn.zeros.T, bits).view(np.uint32) - ones).view(np.int32)
    return {
        "qweight": pack_rows(drawn.codes, bits).T,
        "qzeros": zeros,
        "scales": drawn.scales.T,
        "g_idx": drawn.group_of.astype(np.int32),
    }


def awq(drawn: Drawn) -> Tensors:
    def outputs(values: np.ndarray) -> np.ndarray:  # [n, out]
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for n in range(words.shape[0]):
            for word in range(words.shape[1]):
                for place, output in enumerate(AWQ_ORDER):
                    words[n, word] |= np.uint32(int(values[n, 8 * word + output]) << (4 * place))
        return words.view(np.int32)

    return {
        "qweight": outputs(drawn.codes.T),
        "qzeros": outputs(drawn.zeros.T),
        "scales": drawn.scales.T,
    }


def awq_gemv(drawn: Drawn, group: int) -> Tensors:
    """Scales and zero points are padded to words, and those to as many as 64 columns' kernel
    reads at once."""
    rows, groups = drawn.zeros.shape
    words, multiple = -(-groups // 8), {64: 2, 32: 4}.get(group, 1)
    width = -(-words // multiple) * multiple
    zeros, scales = np.zeros((rows, 8 * width), int), np.zeros((rows, 8 * width), np.float16)
    zeros[:, :groups], scales[:, :groups] = drawn.zeros, drawn.scales
    return {
        "qweight": pack_rows(drawn.codes, 4),
        "qzeros": pack_rows(zeros, 4),
        "scales": scales,
    }


def pack_quantized(drawn: Drawn, bits: int, symmetric: bool, ordered: bool) -> Tensors:
    tensors = {
        "weight_packed": pack_rows(drawn.codes, bits),
        "weight_scale": drawn.scales,
        "weight_shape": np.array(drawn.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(drawn.zeros.T, bits).T
    if ordered:
        tensors["weight_g_idx"] = drawn.group_of.astype(np.int32)
    return tensors


def int_quantized(drawn: Drawn, symmetric: bool) -> Tensors:
    tensors = {
        "weight": (drawn.codes - 128).astype(np.int8),
        "weight_scale": drawn.scales,
    }
    if not symmetric:
        tensors["weight_zero_point"] = (drawn.zeros - 128).astype(np.int8)
    return tensors


def four_bit(
    rng: np.random.Generator, rows: int, columns: int, kind: str, block: int, nested: bool
) -> tuple[Tensors, np.ndarray]:
    """bitsandbytes' tensors, and the weight."""
    count = rows * columns
    blocks = -(-count // block)
    values = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    codes = rng.integers(0, 16, count)
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [rows, columns],
    }  # fmt: skip
    tensors: Tensors = {"weight.quant_map": values}
    if nested:
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        index = rng.integers(0, 256, blocks).astype(np.uint8)
        outer = rng.uniform(0.02, 0.05, -(-blocks // 256)).astype(np.float32)
        offset = 0.13
        absmax = np.array(
            [table[index[b]] * outer[b // 256] + np.float32(offset) for b in range(blocks)],
            np.float32,
        )
        tensors |= {"weight.absmax": index, "weight.nested_absmax": outer}
        tensors["weight.nested_quant_map"] = table
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = rng.uniform(0.05, 0.2, blocks).astype(np.float32)
        tensors["weight.absmax"] = absmax
    weight = np.array([values[codes[i]] * absmax[i // block] for i in range(count)], np.float32)
    even = np.append(codes, 0)[: count + count % 2]
    packed = [int(even[i]) << 4 | int(even[i + 1]) for i in range(0, len(even), 2)]
    tensors["weight"] = np.array(packed, np.uint8)[:, None]
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8).copy()
    return tensors, weight.reshape(rows, columns)


@dataclass
class Layout:
    """A layout under test: ``make(rng, module, rows, columns)`` gives a matrix's tensors and float
    weight; None leaves the module as it is."""

    config: dict[str, Any]
    make: Callable[[np.random.Generator, str, int, int], tuple[Tensors, np.ndarray] | None]
    sizes: dict[str, int] = field(default_factory=dict)


def _gptq(
    bits=4, group=32, symmetric=False, version="gptq", ordered=False, alone="", keep=True,
    borrow=False, **sizes,
) -> Layout:  # fmt: skip
    less = 1 if version == "gptq" else 0

    def make(rng, module, rows, columns):
        # Modules that share their input share its order, but for those named by `alone`.
        seed = columns + (alone != "" and alone in module)
        order = np.random.default_rng(seed).permutation(columns) if ordered else None
        least = 0 if borrow or not less else 1
        drawn = draw(rng, rows, columns, bits, group, symmetric, order, least_zero=least)
        tensors = gptq(drawn, bits, less, borrow)
        if not keep:
            del tensors["g_idx"]
        return tensors, drawn.weight

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric,
        "desc_act": ordered, "checkpoint_format": version,
    }  # fmt: skip
    return Layout(config, make, sizes)


def _awq(group=32, version="gemm") -> Layout:
    def make(rng, module, rows, columns):
        drawn = draw(rng, rows, columns, 4, group, symmetric=False, least_zero=0)
        return awq_gemv(drawn, group) if version == "gemv" else awq(drawn), drawn.weight

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return Layout({**config, "version": version}, make)


def _compressed(
    packed=True, bits=4, group=32, symmetric=True, ordered=False, dtype=np.float16, inputs=None,
    ignore=(),
) -> Layout:  # fmt: skip
    def make(rng, module, rows, columns):
        if any(name in module for name in ignore):
            return None
        order = np.random.default_rng(columns).permutation(columns) if ordered else None
        drawn = draw(rng, rows, columns, bits, group, symmetric, order, dtype)
        if packed:
            return pack_quantized(drawn, bits, symmetric, ordered), drawn.weight
        return int_quantized(drawn, symmetric), drawn.weight

    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "group" if group else "channel", "group_size": group or None,
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": scheme},
        "format": "pack-quantized" if packed else "int-quantized", "ignore": ["lm_head"],
    }  # fmt: skip
    return Layout(config, make)


def _bnb(kind="nf4", block=64, nested=True, **sizes) -> Layout:
    def make(rng, module, rows, columns):
        return four_bit(rng, rows, columns, kind, block, nested)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Layout(config, make, sizes)


def _bnb8(threshold=6.0) -> Layout:
    def make(rng, module, rows, columns):
        codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        scb = rng.uniform(0.1, 0.3, rows).astype(np.float32)
        weight = codes * (scb / np.float32(127))[:, None]
        tensors = {"weight": codes, "SCB": scb, "weight_format": np.array(0, np.uint8)}
        return tensors, weight.astype(np.float32)

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Layout({**config, "llm_int8_threshold": threshold}, make)


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
W8A8 = _compressed(packed=False, bits=8, group=0, dtype=np.float32, inputs=TOKEN)
LAYOUTS: dict[str, Layout] = {
    "gptq": _gptq(),
    "gptq-symmetric": _gptq(symmetric=True),
    "gptq-v2": _gptq(version="gptq_v2"),
    "gptq-row": _gptq(group=0),
    "gptq-8bit": _gptq(bits=8),
    "gptq-borrow": _gptq(borrow=True),
    "gptq-borrow-2bit": _gptq(bits=2, borrow=True, intermediate_size=128),
    "gptq-borrow-8bit": _gptq(bits=8, borrow=True),
    "gptq-2bit": _gptq(bits=2, symmetric=True, intermediate_size=128),
    "gptq-3bit": _gptq(bits=3, intermediate_size=128),
    "gptq-desc-act": _gptq(ordered=True),
    "gptq-other-order": _gptq(ordered=True, alone="v_proj"),
    "gptq-other-up": _gptq(ordered=True, alone="up_proj"),
    "gptq-no-g-idx": _gptq(keep=False),
    "awq": _awq(),
    "awq-row": _awq(0),
    "awq-gemv": _awq(version="gemv"),
    "awq-gemv-row": _awq(0, version="gemv"),
    "pack-symmetric": _compressed(),
    "pack-asymmetric": _compressed(symmetric=False),
    "pack-channel": _compressed(group=0, dtype=np.float32),
    "pack-8bit": _compressed(bits=8, symmetric=False),
    "pack-g-idx": _compressed(ordered=True, symmetric=False),
    "pack-float-scales": _compressed(symmetric=False, dtype=np.float32),
    "pack-some-floats": _compressed(ignore=("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj")),
    "int-weights": _compressed(packed=False, bits=8, group=0, dtype=np.float32),
    "int-asymmetric": _compressed(packed=False, bits=8, group=32, symmetric=False),
    "nf4": _bnb(),
    "nf4-plain": _bnb(nested=False),
    "fp4": _bnb("fp4"),
    "nf4-odd": _bnb(nested=False, hidden_size=54, head_dim=18, num_attention_heads=3,
                    num_key_value_heads=1, intermediate_size=31),
    "nf4-long-block": _bnb(block=4096),
}  # fmt: skip
INT8_LAYOUTS: dict[str, Layout] = {"w8a8": W8A8, "llm-int8": _bnb8(2.0), "llm-int8-6": _bnb8()}


def write(directory: Path, layout: Layout) -> Any:
    """Write the checkpoint; transformers' model with the weights that it stands for, float32."""
    import torch
    from safetensors.numpy import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 96, "intermediate_size": 136, "num_attention_heads": 6,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 131,
        **layout.sizes,
    }  # fmt: skip
    config = LlamaConfig(
        **sizes, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    rng = np.random.default_rng(3)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    for name in list(state):
        module, _, last = name.rpartition(".")
        if last != "weight" or "_proj" not in name:
            continue
        made = layout.make(rng, module, *state[name].shape)
        if made is None:
            continue
        tensors, weight = made
        with torch.no_grad():
            model.get_submodule(module).weight.copy_(torch.from_numpy(weight))
        del state[name]
        state |= {f"{module}.{part}": np.ascontiguousarray(v) for part, v in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors")
    written = {**json.loads(config.to_json_string()), "quantization_config": layout.config}
    (directory / "config.json").write_text(json.dumps(written))
    return model
