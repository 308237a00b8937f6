"""Stored GGUF blocks as codes: exactly the values that the gguf package reads, and kept at load."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from pyllmlite import _native
from pyllmlite.model.blocks import blocks_to_codes, fits

TYPES = {
    name: getattr(GGMLQuantizationType, name.upper())
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
}
EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Where the f16 numbers of a block stand; every other byte may be anything.
FLOATS = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0]}
FLOATS |= {"q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}


def stored(dtype: str, rows: int, blocks: int) -> np.ndarray:
    """Rows of blocks with random codes and scales."""
    rng = np.random.default_rng(rows + blocks)
    size = GGML_QUANT_SIZES[TYPES[dtype]][1]
    data = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    for at in FLOATS[dtype]:
        numbers = rng.uniform(-0.02, 0.02, (rows, blocks, 1)).astype(np.float16)
        data[:, :, at : at + 2] = numbers.view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows,blocks", [(1, 1), (5, 3), (33, 2)])
def test_codes_are_the_stored_values(dtype, rows, blocks):
    data = stored(dtype, rows, blocks)
    made = blocks_to_codes(dtype, data)
    expected = quants.dequantize(data, TYPES[dtype])
    group = made.group_size
    scales = made.scales.astype(np.float32).repeat(group, 1)
    if made.mins is not None:
        mins = made.mins.astype(np.float32).repeat(group, 1)
    else:
        mins = -8 * scales if made.format == "int4" else 0.0
    values = made.values.astype(np.float32) * scales + mins
    if dtype in EXACT:
        np.testing.assert_array_equal(values, expected)
    else:
        # Scale and minimum were rounded to f16 (2^-11, or half a subnormal step) each.
        codes = np.abs(made.values.astype(np.float32))
        bound = codes * (np.abs(scales) * 2**-11 + 2**-25) + np.abs(mins) * 2**-11 + 2**-25
        assert (np.abs(values - expected) <= bound * 1.01).all()
    packed = _native.PackedLinear(made.format, made.values, made.scales, made.mins, group)
    # The kernels take a product and a sum in one rounding, the reader in two.
    np.testing.assert_allclose(packed.unpack(), values, rtol=2e-6, atol=1e-6)


def test_what_fits():
    assert fits("q4_1", 576) and fits("q8_0", 32) and fits("q4_0", 64) and fits("q6_k", 512)
    assert not fits("q4_1", 40) and not fits("q6_k", 576) and not fits("f16", 64)
    assert fits("q5_1", 64, exact=True) and not fits("q4_k", 256, exact=True)


def test_no_rows():
    made = blocks_to_codes("q4_1", np.empty((0, 40), np.uint8))
    assert made.values.shape == (0, 64) and made.scales.shape == (0, 2)
