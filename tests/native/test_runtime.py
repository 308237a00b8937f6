import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from pyllmlite import _native


def make_batch(rows=8, groups=1):
    tables = [np.arange(rows * 8, dtype=np.int32).reshape(rows, 8) + g for g in range(groups)]
    batch = _native.Batch(rows, 128, 64, 16, 100, 0, [(16, table) for table in tables])
    batch.token_table[:] = np.arange(rows)[:, None] * 10 + np.arange(128) % 10
    return batch, tables


def rms(x):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)


def norm_op(width):
    return _native.norm(_native.NormArgs("rms", 1e-5, np.ones(width, np.float32)), width)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_and_python_ops_take_turns(threads):
    program = _native.Program(64, 16, _native.ThreadPool(threads))
    x = program.add_buffer("x", "tokens", 24)
    y = program.add_buffer("y", "tokens", 24)
    logits = program.add_buffer("logits", "logits", 4)
    weights = np.arange(24, dtype=np.float32)
    w = program.add_tensor("w", weights)
    seen = {}

    def fill(batch, x, w):
        assert x.shape == (5, 24) and w.shape == (24,)
        x[:] = batch.positions[:, None] + batch.token_ids[:, None] * w
        for name in ("positions", "token_ids", "seq_ids", "query_start_loc", "seq_lens", "rows"):
            seen[name] = getattr(batch, name).tolist()
        seen["logit_rows"] = batch.logit_rows.tolist()
        seen["table"] = batch.block_table(1)
        seen["slots"] = batch.slot_mapping(1).tolist()

    def check(batch, y, logits):
        np.testing.assert_allclose(y, expected, rtol=1e-5)
        assert logits.shape == (2, 4)
        assert not batch.positions.flags.writeable
        with pytest.raises(ValueError, match="KV group 2"):
            batch.slot_mapping(2)

    program.add_python_op(fill, [x, w], "fill")
    program.add_op(norm_op(24), [x, y], "norm")
    program.add_python_op(check, [y, logits], "check")
    program.finish()
    batch, tables = make_batch(groups=2)
    batch.set_step([3, 1], [0, 20], [4, 1], [1, 1])
    tokens = np.array([30, 31, 32, 33, 10])
    positions = np.array([0, 1, 2, 3, 20])
    expected = rms(positions[:, None] + tokens[:, None] * weights)
    for _ in range(20):
        program.run(batch)
    assert seen["token_ids"] == tokens.tolist() and seen["positions"] == positions.tolist()
    assert seen["seq_ids"] == [0, 0, 0, 0, 1] and seen["query_start_loc"] == [0, 4, 5]
    assert seen["seq_lens"] == [4, 21] and seen["rows"] == [3, 1] and seen["logit_rows"] == [3, 4]
    np.testing.assert_array_equal(seen["table"], tables[1][[3, 1]])
    row = tables[1]
    assert seen["slots"] == [row[3, 0] * 16 + i for i in range(4)] + [row[1, 1] * 16 + 4]
    np.testing.assert_allclose(program.buffer(y)[:5], expected, rtol=1e-5)
    assert program.op_names == ["fill", "norm", "check"]
    assert program.buffer_bytes >= 64 * 24 * 4 * 2


def test_an_exception_ends_the_step_and_the_program_runs_again():
    program = _native.Program(8, 8, _native.ThreadPool(2))
    x = program.add_buffer("x", "tokens", 4)
    state = {"fail": True, "after": 0}

    def maybe(batch, x):
        if state["fail"]:
            raise KeyError("the reason")

    def after(batch):
        state["after"] += 1

    program.add_python_op(maybe, [x], "maybe")
    program.add_python_op(after, [], "after")
    program.finish()
    batch, _ = make_batch()
    batch.set_step([0], [0], [2], [1])
    for _ in range(3):
        with pytest.raises(KeyError, match="the reason"):
            program.run(batch)
    assert state["after"] == 0
    state["fail"] = False
    program.run(batch)
    assert state["after"] == 1


def test_a_run_inside_a_run_is_refused():
    program = _native.Program(8, 8, _native.ThreadPool(2))
    batch, _ = make_batch()
    batch.set_step([0], [0], [1], [1])
    program.add_python_op(lambda b: program.run(batch), [], "again")
    program.finish()
    with pytest.raises(RuntimeError, match="already running"):
        program.run(batch)


def test_run_releases_the_gil():
    """A Python op that waits for another Python thread: it could not go on otherwise."""
    pool = _native.ThreadPool(2)
    program = _native.Program(8, 8, pool)
    started, go_on = threading.Event(), threading.Event()

    def wait(batch):
        started.set()
        assert go_on.wait(20)

    program.add_python_op(wait, [], "wait")
    program.finish()
    batch, _ = make_batch()
    batch.set_step([0], [0], [1], [1])
    runner = threading.Thread(target=program.run, args=(batch,))
    runner.start()
    assert started.wait(20)
    time.sleep(0.01)
    go_on.set()
    runner.join(20)
    assert not runner.is_alive()


def test_arrays_live_as_long_as_the_op_that_reads_them():
    weight = np.full(16, 2.0, np.float32)
    alive = weakref.ref(weight)
    op = _native.norm(_native.NormArgs("rms", 0.0, weight), 16)
    del weight
    gc.collect()
    assert alive() is not None
    program = _native.Program(4, 4, _native.ThreadPool(1))
    x = program.add_buffer("x", "tokens", 16)
    program.add_op(op, [x, x], "norm")
    program.finish()
    del op
    gc.collect()
    batch, _ = make_batch()
    batch.set_step([0], [0], [1], [1])
    program.buffer(x)[0] = 3.0
    program.run(batch)
    np.testing.assert_allclose(program.buffer(x)[0], 2.0)
    view = program.buffer(x)
    del program
    gc.collect()
    assert alive() is None or view is not None  # the view keeps the Program
    np.testing.assert_allclose(view[0], 2.0)
    del view
    gc.collect()
    assert alive() is None


def test_profile_counts_calls():
    program = _native.Program(4, 4, _native.ThreadPool(1))
    x = program.add_buffer("x", "tokens", 16)
    program.add_op(norm_op(16), [x, x], "a")
    program.add_op(norm_op(16), [x, x], "b")
    program.finish()
    batch, _ = make_batch()
    batch.set_step([0], [0], [1], [1])
    program.run(batch)
    assert [calls for _, calls, _ in program.profile()] == [0, 0]
    program.set_profiling(True)
    for _ in range(7):
        program.run(batch)
    assert [(name, calls) for name, calls, _ in program.profile()] == [("a", 7), ("b", 7)]
    assert all(0 <= seconds < 10 for _, _, seconds in program.profile())


def test_what_does_not_fit_is_one_clear_line():
    pool = _native.ThreadPool(1)
    program = _native.Program(4, 4, pool)
    x = program.add_buffer("x", "tokens", 16, dtype="bf16")
    with pytest.raises(ValueError, match="'tokens', 'logits' or a count"):
        program.add_buffer("y", "columns", 4)
    with pytest.raises(ValueError, match="unknown dtype 'f8'"):
        program.add_buffer("y", "tokens", 4, "f8")
    with pytest.raises(ValueError, match="not C-contiguous"):
        program.add_tensor("w", np.zeros((4, 4), np.float32).T[:, :2])
    with pytest.raises(ValueError, match="float64 cannot be used"):
        program.add_tensor("w", np.zeros(4))
    with pytest.raises(ValueError, match="holds no bf16"):
        program.add_tensor("w", np.zeros(4, np.float32), "bf16")
    with pytest.raises(ValueError, match="names buffer 9"):
        program.add_op(norm_op(16), [9], "norm")
    with pytest.raises(ValueError, match="not callable"):
        program.add_python_op(3, [], "three")
    batch, _ = make_batch()
    batch.set_step([0], [0], [5], [1])
    with pytest.raises(ValueError, match="finish"):
        program.run(batch)
    program.finish()
    assert program.buffer(x).dtype == np.uint16
    with pytest.raises(ValueError, match="5 tokens, the Program was made for 4"):
        program.run(batch)
    with pytest.raises(ValueError, match="num_threads"):
        _native.ThreadPool(0)
    with pytest.raises(ValueError, match="expected a capsule"):
        _native.Op.from_capsule(object())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_can_run():
    """In a process of its own: pytest's may hold threads that must not be forked."""
    code = """
import os
import numpy as np
from pyllmlite import _native
pool = _native.ThreadPool(3)
program = _native.Program(8, 8, pool)
x = program.add_buffer("x", "tokens", 16)
norm = _native.NormArgs("rms", 1e-5, np.ones(16, np.float32))
program.add_op(_native.norm(norm, 16), [x, x], "n")
program.finish()
batch = _native.Batch(1, 16, 8, 8, 10, 0, [(16, np.zeros((1, 1), np.int32))])
batch.set_step([0], [0], [4], [1])
program.run(batch)
pid = os.fork()
program.buffer(x)[:] = 5
for _ in range(10):
    program.run(batch)
assert abs(program.buffer(x)[0, 0] - 1) < 1e-3
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_instruction_sets():
    info = _native.info()
    assert info["isa"] in info["available"] and set(info["available"]) <= set(info["compiled"])
    assert info["available"][0] == "scalar" and info["num_cpus"] >= 1
    with pytest.raises(ValueError, match="unknown instruction set 'neon9'.*scalar"):
        _native.set_isa("neon9")
    read = "from pyllmlite import _native; print(_native.info()['isa'])"
    for name, expected in (("scalar", "scalar"), ("", info["available"][-1])):
        env = {**os.environ, "PYLLMLITE_ISA": name}
        done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == expected
    env = {**os.environ, "PYLLMLITE_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True)
    assert "PYLLMLITE_ISA: unknown instruction set 'mmx'" in done.stderr


def test_cuda_is_there_or_one_line_says_why_not():
    info = _native.cuda_info()
    if info["devices"]:
        assert info["built"] and info["reason"] is None
        for device in info["devices"]:
            assert device["name"] and device["total_bytes"] > 0
            assert len(device["compute_capability"]) == 2
    else:
        assert isinstance(info["reason"], str) and "\n" not in info["reason"]
