"""Plans against what is allocated, figures worked out by hand, and the roofline itself."""

import json
import math

import pytest
from text_model import write_text_model
from tiny_models import TINY

from pyllmlite.cli.plot_file import check_plot
from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.build import build
from pyllmlite.model.source import open_model, spec_of_config
from pyllmlite.runtime.native import native
from pyllmlite.sizing import Machine, Step, decode, work
from pyllmlite.sizing.devices import DEVICES, find_device
from pyllmlite.sizing.footprint import (
    FORMATS,
    as_on_gpu,
    kv_of,
    longest_that_fits,
    planned_ops,
    sequences_that_fit,
    weights_in,
)
from pyllmlite.sizing.kernels import attention_seconds, linear_curves
from pyllmlite.sizing.plan import as_dict, cost_per_million, knee_in, make_plan
from pyllmlite.sizing.plot import draw, roofline_points
from pyllmlite.sizing.steptime import CPU, Efficiency, StepModel, interpolate

MACHINE = Machine("x", 1, 0, 1e9, None, {"int8": 4e9, "bf16": 2e9, "f32": 1e9})
IDEAL = Efficiency(1.0, {"int8": 1.0, "bf16": 1.0, "f32": 1.0}, 1.0, 1.0, math.inf, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return TINY["gemma3"](tmp_path_factory.mktemp("windowed"))


def built(path, **options):
    settings = {"max_model_len": 128, "max_num_seqs": 4, "threads": 1, "skip_tokenizer_init": True}
    return build(path, EngineConfig.from_kwargs(model=str(path), **settings, **options))


@pytest.mark.parametrize("name", ["stored", *FORMATS])
def test_weight_and_kv_bytes_are_those_allocated(model, name):
    source = open_model(model)
    options = FORMATS.get(name, {})
    planned = weights_in(source.spec, options, source if name == "stored" else None)
    made = built(model, **options)
    assert planned.nbytes == made.weight_bytes
    assert planned.dtype == made.dtype
    assert sum(planned.by_part().values()) == planned.nbytes
    assert planned.labels() == made.weight_formats
    kv = kv_of(source.spec, made.cache.kv_dtype)
    assert kv.bytes(128, 4) == pytest.approx(made.cache.nbytes, rel=0.01)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_kv_bytes_of_every_dtype(model, kv_dtype):
    spec = open_model(model).spec
    made = built(model, kv_cache_dtype=kv_dtype)
    assert kv_of(spec, kv_dtype).bytes(128, 4) == pytest.approx(made.cache.nbytes, rel=0.01)


def test_kv_by_hand(model):
    spec = open_model(model).spec
    kv = kv_of(spec, "bf16")
    assert kv.bytes_per_token == 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert kv.mha_factor == spec.num_heads / spec.num_kv_heads
    assert kv.sequence_bytes(17) == 32 * kv.bytes_per_token
    assert kv.sequence_bytes(0) == 0
    one = kv.sequence_bytes(100)
    assert sequences_that_fit(kv, 100, 3.5 * one) == 3
    assert sequences_that_fit(kv, 100, -1.0) == 0
    assert longest_that_fits(kv, 5 * kv.sequence_bytes(16), 1000) == 80
    assert longest_that_fits(kv, 1e12, 1000) == 1000
    assert longest_that_fits(kv, 0, 1000) == 0


def test_a_window_keeps_no_more_than_it(windowed):
    spec = open_model(windowed).spec
    kv = kv_of(spec, "bf16")
    window = min(w for w in spec.windows if w is not None)
    per_layer = kv.bytes_per_token / spec.num_layers
    everything = 10 * window
    grows = kv.sequence_bytes(2 * everything) - kv.sequence_bytes(everything)
    layers = sum(layer.window is None for layer in spec.layers)
    assert 0 < layers < spec.num_layers
    assert grows == pytest.approx(layers * per_layer * everything, rel=0.2)


@pytest.mark.parametrize("name", ["model", "windowed"])
def test_planned_work_is_the_programs(name, request):
    path = request.getfixturevalue(name)
    source, made = open_model(path), built(path)
    ops = planned_ops(source.spec, weights_in(source.spec, {}, source), made.cache.kv_dtype)
    for step in (decode(3, 50), Step(((40, 40), (1, 90)), 2)):
        planned, real = work(ops, step), work(made.program.entries, step)
        assert planned.weight_bytes == real.weight_bytes
        assert planned.kv_bytes == pytest.approx(real.kv_bytes)
        assert planned.macs == pytest.approx(real.macs)


def test_a_config_alone_will_do(model, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((model / "config.json").read_text())
    spec = spec_of_config(alone)
    there = open_model(model).spec
    for options in FORMATS.values():
        assert weights_in(spec, options).nbytes == weights_in(there, options).nbytes


def test_ideal_kernels_are_on_the_roofline(model):
    source = open_model(model)
    ops = planned_ops(source.spec, weights_in(source.spec, FORMATS["bf16"]), "bf16")
    steps = StepModel(ops, MACHINE, IDEAL)
    one = work(ops, decode(1, 64))
    timing = steps.step(decode(1, 64))
    # A step of one sequence waits for memory in every op.
    assert timing.compute == 0 and timing.host == 0
    assert timing.seconds == pytest.approx(one.bytes / 1e9)
    many = Step(((4096, 4096),), 4096)
    done = work(ops, many)
    assert steps.step(many).compute == pytest.approx(done.macs["bf16"] / 2e9, rel=1e-6)
    assert steps.step(Step((), 0)).seconds == 0


def test_time_grows_with_the_batch_and_the_context(model):
    source = open_model(model)
    steps = StepModel(planned_ops(source.spec, weights_in(source.spec, {}), "bf16"), MACHINE, CPU)
    times = [steps.step(decode(batch, 64)).seconds for batch in (1, 2, 8, 64, 512)]
    assert times == sorted(times)
    assert steps.step(decode(8, 640)).seconds > steps.step(decode(8, 64)).seconds


def test_knee_by_hand():
    # Flat at 3 ms, then 0.5 ms a sequence.
    assert knee_in([(1, 3e-3), (16, 8e-3), (64, 32e-3)]) == pytest.approx(6)
    assert knee_in([(1, 3e-3), (64, 32e-3)]) is None
    assert knee_in([(1, 3e-3), (2, 3e-3), (4, 3e-3)]) is None


def test_knee_is_where_arithmetic_takes_as_long_as_the_weights(model):
    source = open_model(model)
    weights = weights_in(source.spec, FORMATS["bf16"])
    made = make_plan(source.spec, weights, MACHINE, IDEAL, 1e9, context=16)
    # Two bytes a weight, one product each: 2 x 2e9 / 1e9 sequences (a panel's padding besides).
    assert made.knee.weights_only == pytest.approx(4, rel=0.02)
    assert made.knee.with_kv is None or made.knee.with_kv > made.knee.weights_only


def test_plan_says_what_fits_and_what_it_costs(model):
    source = open_model(model)
    weights = weights_in(source.spec, FORMATS["int8"], name="int8")
    kv = kv_of(source.spec, "bf16")
    memory = weights.nbytes + 5 * kv.sequence_bytes(64)
    asked = {"context": 64, "batches": (1, 4, 8), "price_per_hour": 3.6}
    made = make_plan(source.spec, weights, MACHINE, CPU, memory, **asked)
    assert made.fits and made.max_sequences == 5
    assert [row.fits for row in made.rows] == [True, True, False]
    assert made.best is made.rows[1]
    row = made.rows[1]
    assert row.cost_per_million == pytest.approx(1e-3 / row.tokens_per_second * 1e6)
    assert cost_per_million(1000, 3.6) == pytest.approx(1.0)
    told = json.loads(json.dumps(as_dict(made)))
    assert told["weights"]["int8"]["bytes"] == weights.nbytes
    assert told["batches"][2]["fits"] is False
    none = make_plan(source.spec, weights, MACHINE, CPU, 10, context=64)
    assert not none.fits and none.max_sequences == 0 and none.best is None


def test_devices():
    assert find_device("H100") is DEVICES["h100"]
    assert find_device("RTX 4090") is DEVICES["rtx4090"]
    assert find_device("a100-80gb") is DEVICES["a100"]
    with pytest.raises(ConfigError, match=r"did you mean 'h200'.*known: "):
        find_device("h20")
    for device in DEVICES.values():
        # No ridge that a rate with sparsity, or bits for bytes, would give.
        assert 60 < device.bf16_ops / device.bandwidth < 500
        assert device.source
        assert device.machine.macs["bf16"] == device.bf16_ops / 2


def test_four_bits_are_multiplied_as_bf16_on_a_gpu(model):
    spec = open_model(model).spec
    int4, int8 = (as_on_gpu(weights_in(spec, FORMATS[name])) for name in ("int4", "int8"))
    layers = [m for m in int4.matrices if m.shape.kind not in ("embed", "head")]
    assert {m.mac_dtype for m in layers} == {"bf16"}
    assert {m.mac_dtype for m in int8.matrices} == {"int8"}


def test_interpolation():
    curve = ((1, 1.0), (4, 1.0), (8, 3.0))
    assert [interpolate(curve, rows) for rows in (1, 2, 4, 6, 8, 16)] == [1, 1, 1, 2, 3, 6]


def test_kernels_are_timed_on_the_models_shapes(model, monkeypatch):
    from pyllmlite.sizing import kernels

    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "MIN_BYTES", 0)
    monkeypatch.setattr(kernels, "last_level_cache", lambda: 0)
    spec = open_model(model).spec
    pool = native().ThreadPool(1)
    for name in ("bf16", "int4", "nf4"):
        curves = linear_curves(weights_in(spec, FORMATS[name]), pool, rows=(1, 3))
        assert {"qkv", "attn_out", "gate_up", "mlp_down"} <= set(curves)
        assert all(s > 0 for curve in curves.values() for _, s in curve)
        assert all([rows for rows, _ in curve] == [1, 3] for curve in curves.values())
    for kv_dtype in ("f32", "bf16", "int8"):
        assert min(attention_seconds(spec, pool, kv_dtype, batch=2, context=32)) > 0


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    source = open_model(model)
    made = make_plan(source.spec, weights_in(source.spec, {}), MACHINE, CPU, 1e6, context=64)
    points = roofline_points(made)
    for intensity, rate in points:
        assert rate <= intensity * MACHINE.dram_bandwidth * 2.3  # a cache may serve activations
    draw(made, tmp_path / "plan.png", [(1, 0.5), (4, 0.9)])
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        check_plot(tmp_path / "plan.txt")
