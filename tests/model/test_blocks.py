"""Stored GGUF blocks as codes: exactly the values that the gguf package reads, and kept at load."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from pyllmlite import _native
from pyllmlite.model.blocks import blocks_to_codes, fits

TYPES = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q8_0": GGMLQuantizationType.Q8_0,
}


def stored(dtype: str, rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(rows + columns).standard_normal((rows, columns), np.float32)
    return quants.quantize(values, TYPES[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows,columns", [(1, 32), (5, 96), (33, 64)])
def test_codes_are_the_stored_values(dtype, rows, columns):
    data = stored(dtype, rows, columns)
    made = blocks_to_codes(dtype, data)
    expected = quants.dequantize(data, TYPES[dtype])
    scales = made.scales.astype(np.float32).repeat(32, 1)
    if made.mins is not None:
        mins = made.mins.astype(np.float32).repeat(32, 1)
    else:
        mins = -8 * scales if made.format == "int4" else 0.0
    np.testing.assert_array_equal(made.values.astype(np.float32) * scales + mins, expected)
    packed = _native.PackedLinear(made.format, made.values, made.scales, made.mins, 32)
    # The kernels take a product and a sum in one rounding, the reader in two.
    np.testing.assert_allclose(packed.unpack(), expected, rtol=2e-6, atol=1e-6)


def test_what_fits():
    assert fits("q4_1", 576) and fits("q8_0", 32) and fits("q4_0", 64)
    assert not fits("q4_1", 40) and not fits("q6_k", 256) and not fits("f16", 64)


def test_no_rows():
    made = blocks_to_codes("q4_1", np.empty((0, 40), np.uint8))
    assert made.values.shape == (0, 64) and made.scales.shape == (0, 2)
