"""The suite for quantizers: shapes, bounded errors, clear refusals, the same result twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.testing.base import Conformance

# An error is at most the row's largest magnitude over this (times a tolerance): half a step, or for
# a codebook half of the widest gap between its values.
LEVELS = {"int8": 127, "int4": 15, "codebook4": 6}


def dequantized(made: LinearWeight) -> np.ndarray:
    """float32 ``[out, in]`` of the formats that are built in, before permutation and scale."""
    return replace(made, input_permutation=None, input_scale=None).float32()


class QuantizerConformance(Conformance):
    """``strategy``: the quantizer's class.

    Attributes:
        settings: ``QuantizerNeeds`` fields to try; what ``supports`` refuses is left out, but
            something must be left.
        relative_error: Bound on the RMS error of Gaussian weights relative to their RMS, by
            format.
        half_steps: How many half steps of its code a single weight may be off; more for methods
            that let some weights make up for others.
    """

    contract = "quantizer"
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"dtype": "bf16"},
        {"bits": 8},
        {"bits": 4},
        {"bits": 4, "symmetric": True},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 0},
        {"bits": 8, "group_size": 128},
    )
    relative_error = {"f32": 0.0, "bf16": 0.003, "int8": 0.015, "int4": 0.16, "codebook4": 0.14}
    half_steps = 1.1
    shapes = ((1, 8), (16, 64), (33, 200), (5, 7), (64, 576))

    def made(self) -> list[Any]:
        """The quantizer in each setting that it supports."""
        shapes = tuple(LinearShape(f"m{i}", "qkv", n, k) for i, (n, k) in enumerate(self.shapes))
        found = []
        for setting in self.settings:
            arguments = {"device": "cpu", "dtype": "f32", "shapes": shapes} | setting
            needs = QuantizerNeeds(**arguments)
            if self.strategy.supports(needs) is None:
                found.append(self.strategy(needs))
        assert found, "supports() refuses every setting of the suite"
        return found

    def quantize(self, quantizer: Any, weight: np.ndarray, kind: str = "qkv") -> LinearWeight:
        shape = LinearShape("layers.0." + kind, kind, *weight.shape)
        kept = weight.copy()
        calibration = self.calibration(weight) if quantizer.needs_calibration else None
        made = quantizer.quantize(shape, weight, calibration)
        assert np.array_equal(kept, weight, equal_nan=True), "the weight was written to"
        return made

    def calibration(self, weight: np.ndarray) -> Any:
        """Statistics for a matrix, for quantizers that ask for them."""
        raise AssertionError("override calibration(): the quantizer needs some")

    def weights(self) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        return [rng.standard_normal(shape).astype(np.float32) * 0.02 for shape in self.shapes]

    def test_shapes_and_types(self) -> None:
        types = {
            "f32": np.float32,
            "bf16": np.uint16,
            "int8": np.int8,
            "int4": np.uint8,
            "codebook4": np.uint8,
        }
        for quantizer in self.made():
            for weight in self.weights():
                made = self.quantize(quantizer, weight)
                assert made.shape == weight.shape
                if made.format not in types:
                    continue
                assert made.values.dtype == types[made.format]
                if made.scales is None:
                    assert made.format in ("f32", "bf16")
                    continue
                groups = 1 if made.group_size == 0 else -(-weight.shape[1] // made.group_size)
                assert made.scales.shape == (weight.shape[0], groups)
                assert made.scales.dtype in (np.float16, np.float32)
                assert np.isfinite(made.scales).all()
                if made.mins is not None:
                    assert made.mins.shape == made.scales.shape
                    assert made.mins.dtype == made.scales.dtype and np.isfinite(made.mins).all()
                if made.format in ("int4", "codebook4"):
                    assert made.values.max() <= 15

    def test_error_is_bounded(self) -> None:
        for quantizer in self.made():
            for weight in self.weights():
                made = self.quantize(quantizer, weight)
                if made.format not in self.relative_error or made.input_scale is not None:
                    continue
                error = dequantized(made) - weight
                relative = float(np.sqrt((error**2).mean() / (weight**2).mean()))
                bound = self.relative_error[made.format]
                assert relative <= bound, (
                    f"{made.format}, group {made.group_size}, {weight.shape}: relative error "
                    f"{relative:.3g} > {bound}"
                )

    def test_same_twice(self) -> None:
        for quantizer in self.made():
            weight = self.weights()[2]
            one, two = self.quantize(quantizer, weight), self.quantize(quantizer, weight)
            assert (one.values == two.values).all()
            assert one.scales is None or (one.scales == two.scales).all()

    def test_rows_alone(self) -> None:
        """``rowwise``: a row becomes the same whatever rows it is quantized with."""
        for quantizer in self.made():
            if not quantizer.rowwise:
                continue
            weight = self.weights()[2]
            whole = self.quantize(quantizer, weight)
            assert whole.input_scale is None and whole.input_permutation is None
            part = self.quantize(quantizer, weight[7:12])
            assert (part.values == whole.values[7:12]).all()
            if part.scales is not None and whole.scales is not None:
                assert (part.scales == whole.scales[7:12]).all()

    def test_not_finite_is_refused(self) -> None:
        for quantizer in self.made():
            for bad in (np.nan, np.inf, -np.inf):
                weight = self.weights()[1]
                weight[3, 5] = bad
                try:
                    self.quantize(quantizer, weight)
                except ModelError as error:
                    assert "layers.0.qkv" in str(error) and "\n" not in str(error)
                else:
                    raise AssertionError(f"a weight that is {bad} was accepted")

    def test_odd_values(self) -> None:
        """Constant rows, zeros, tiny and large values come back close, or are refused."""
        rng = np.random.default_rng(2)
        noise = rng.standard_normal((8, 64)).astype(np.float32)
        rows = np.concatenate([np.zeros((1, 64)), np.full((1, 64), 0.5), np.full((1, 64), -3.0)])
        scaled = [noise * np.float32(factor) for factor in (1e-9, 1e-5, 1e4, 1e30)]
        for quantizer in self.made():
            for weight in (rows.astype(np.float32), *scaled):
                try:
                    made = self.quantize(quantizer, weight)
                except ModelError as error:
                    assert np.abs(weight).max() > 1e3, f"refused: {error}"
                    continue
                if made.format not in self.relative_error or made.input_scale is not None:
                    continue
                spread = np.abs(weight).max(axis=1, keepdims=True)
                # Half a step of the code, and what f16 cannot tell apart in scale and minimum.
                half_step = spread / LEVELS.get(made.format, 127)
                allowed = half_step * self.half_steps + 1e-3 * spread + 5e-7
                worst = np.abs(dequantized(made) - weight) - allowed
                assert worst.max() <= 0, f"{made.format}: off by {worst.max():.3g} too much"

    def test_embedding_and_head(self) -> None:
        for quantizer in self.made():
            for kind in ("embed", "head", "mlp_down"):
                assert self.quantize(quantizer, self.weights()[4], kind).shape == self.shapes[4]
