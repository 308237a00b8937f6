"""ALiBi slopes against transformers' BLOOM and MPT."""

from __future__ import annotations

import numpy as np
import pytest

from pyllmlite.model.alibi import alibi_slopes

torch = pytest.importorskip("torch")
HEADS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 20, 24, 25, 32, 40, 71, 112, 128]


@pytest.mark.parametrize("heads", HEADS)
def test_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32).reshape(heads, 3)
    slopes = alibi_slopes(heads)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes, (theirs[:, 2] - theirs[:, 1]).numpy(), rtol=2e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("bias_max", [8, 16])
def test_mpt(heads, bias_max):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(heads, 2, bias_max).reshape(heads, 2)
    slopes = alibi_slopes(heads, bias_max, "mpt")
    np.testing.assert_allclose(slopes, -theirs[:, 0].numpy(), rtol=2e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="kind"):
        alibi_slopes(4, kind="other")
    with pytest.raises(ValueError, match="at least 1"):
        alibi_slopes(0)
