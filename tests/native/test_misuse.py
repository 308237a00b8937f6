"""Ops, arrays and batches that do not fit are refused in one line; none ends the process."""

import threading

import numpy as np
import pytest

from pyllmlite import _native

KV = _native.KVLayout("f32", 4, 2, 16, 16)
CACHE = np.zeros((4, 2, 16, 16), np.float32)


def weight(n=32, k=64):
    return _native.PackedLinear("f32", np.ones((n, k), np.float32))


def rms(width):
    return _native.norm(_native.NormArgs("rms"), width)


def make_batch(vocab_size=100):
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    batch = _native.Batch(2, 64, 8, 4, vocab_size, 0, [(16, table)])
    batch.set_step([0], [0], [2], [1])
    return batch


def make_program(op, buffers):
    program = _native.Program(8, 4, _native.ThreadPool(2))
    ids = [
        program.add_tensor("tensor", b)
        if isinstance(b, np.ndarray)
        else program.add_buffer("buffer", *b)
        for b in buffers
    ]
    program.add_op(op, ids, "the op")
    program.finish()
    return program


@pytest.mark.parametrize(
    "op, buffers, words",
    [
        (lambda: _native.linear(weight()), [], "takes 2 buffers, got 0"),
        (lambda: _native.linear(weight()), [("tokens", 64)], "takes 2 buffers, got 1"),
        (lambda: _native.linear(weight()), [("tokens", 64), ("tokens", 31)], r"\(out\).*\[8, 32\]"),
        (lambda: _native.linear(weight()), [("tokens", 63), ("tokens", 32)], r"\(x\).*\[8, 64\]"),
        (lambda: _native.linear(weight()), [("tokens", 64, "bf16"), ("tokens", 32)], "must be f32"),
        (lambda: _native.linear(weight()), [("tokens", 64), ("logits", 32)], r"has \[4, 32\]"),
        (lambda: rms(64), [("tokens", 64)], "takes 2 buffers"),
        (lambda: rms(64), [("tokens", 64), (7, 64)], r"has \[7, 64\]"),
        (lambda: _native.embed(weight()), [("tokens", 63)], r"\(out\)"),
        (lambda: _native.sample(100), [("logits", 99)], r"\(logits\)"),
        (lambda: _native.sample(100), [(3, 100)], r"\(logits\)"),
        (lambda: _native.rotary_store(2, KV), [("tokens", 95), CACHE, CACHE], r"\(qkv\)"),
        (lambda: _native.rotary_store(2, KV), [("tokens", 96), CACHE, CACHE[:3]], r"\(v_cache\)"),
        (lambda: _native.rotary_store(2, KV), [("tokens", 96), CACHE], "takes 3 buffers"),
        (
            lambda: _native.attention(2, KV),
            [("tokens", 96), ("tokens", 32), CACHE.astype(np.float16), CACHE],
            "must be f32, not f16",
        ),
        (lambda: _native.attention(2, KV), [("tokens", 96), ("tokens", 31), CACHE, CACHE], "out"),
        (lambda: _native.copy_blocks(0), [np.zeros((), np.float32)], "scalar"),
    ],
)
def test_buffers_that_do_not_fit_an_op(op, buffers, words):
    with pytest.raises(ValueError, match=f"'the op'.*{words}"):
        make_program(op(), buffers)


def test_run_op_checks_its_arrays():
    x, out = np.ones((3, 64), np.float32), np.zeros((3, 32), np.float32)
    op = _native.linear(weight())
    for arrays in ([], [x], [x, out[:2]], [x, out[:, :31].copy()], [x[:, :8].copy(), out]):
        with pytest.raises(ValueError, match="linear"):
            _native.run_op(op, arrays, None)
    _native.run_op(op, [x[:0], out[:0]], None)


def test_a_read_only_array_is_never_written():
    frozen = np.ones((8, 64), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="'the op' writes buffer 1, which is a read-only array"):
        make_program(rms(64), [("tokens", 64), frozen])
    with pytest.raises(ValueError, match="read-only"):
        _native.run_op(rms(64), [np.ones((8, 64), np.float32), frozen], None)
    program = _native.Program(8, 4, _native.ThreadPool(1))
    read, out = program.add_tensor("read", frozen), program.add_buffer("out", "tokens", 64)
    seen = []
    program.add_op(rms(64), [read, out], "norm")
    program.add_python_op(
        lambda batch, *arrays: seen.extend(a.flags.writeable for a in arrays), [read, out], "look"
    )
    program.finish()
    program.run(make_batch())
    assert seen == [False, True]
    assert not program.buffer(read).flags.writeable and program.buffer(out).flags.writeable


def test_swapped_bytes_are_refused():
    swapped = np.ones((8, 8), np.dtype(np.float32).newbyteorder())
    with pytest.raises(ValueError, match="byte order"):
        _native.PackedLinear("f32", swapped)
    with pytest.raises(ValueError, match="byte order"):
        _native.Program(8, 4, _native.ThreadPool(1)).add_tensor("t", swapped)


def test_a_batch_of_another_vocabulary_is_refused():
    """Its masks, biases and copies of logits are made for its own."""
    for vocab_size in (10, 100_000):
        program = make_program(_native.sample(vocab_size), [("logits", vocab_size)])
        batch = make_batch()
        batch.want_logits(0)
        with pytest.raises(RuntimeError, match=f"made for {vocab_size} tokens.*vocabulary of 100"):
            program.run(batch)


def test_one_attention_op_in_two_programs():
    op = _native.attention(2, KV)
    buffers = [("tokens", 96), ("tokens", 32), CACHE, CACHE]
    first = make_program(op, buffers)
    second = _native.Program(8, 4, _native.ThreadPool(1))
    ids = [second.add_buffer("b", "tokens", 96), second.add_buffer("o", "tokens", 32)]
    second.add_op(op, [*ids, *(second.add_tensor("kv", CACHE) for _ in "kv")], "attention")
    second.finish()
    with pytest.raises(RuntimeError, match="another Program"):
        first.run(make_batch())
    second.run(make_batch())


def test_a_batch_that_runs_cannot_be_changed():
    program = _native.Program(8, 4, _native.ThreadPool(2))
    batch = make_batch()
    changes = [
        lambda: batch.set_sampling(0),
        lambda: batch.set_step_bias(0, [1], [1.0]),
        lambda: batch.set_mask(0, None),
        lambda: batch.set_copies(0, [(0, 1)]),
        lambda: batch.want_logits(0),
        lambda: batch.copy_row(0, 1, 1),
        lambda: batch.append([0], [1], [3]),
        lambda: batch.score_prompt(0),
        lambda: batch.set_step([], [], [], []),
    ]
    refused = []

    def change(view):
        for each in changes:
            with pytest.raises(RuntimeError, match="cannot be changed while a Program runs it"):
                each()
            refused.append(each)
        with pytest.raises(RuntimeError, match="already running this batch"):
            other.run(batch)

    other = _native.Program(8, 4, _native.ThreadPool(1))
    other.finish()
    program.add_python_op(change, [], "change")
    program.finish()
    program.run(batch)
    assert refused == changes
    for each in changes:
        each()


def test_a_second_thread_does_not_take_the_batch_away():
    """A view keeps the batch of its own run alive, whoever tries to run meanwhile."""
    program = _native.Program(8, 4, _native.ThreadPool(1))
    started, go_on = threading.Event(), threading.Event()
    views = []

    def wait(view):
        started.set()
        assert go_on.wait(20)

    program.add_python_op(wait, [], "wait")
    program.add_python_op(views.append, [], "keep")
    program.finish()
    batch, intruder = make_batch(), make_batch()
    batch.token_table[0, :2] = 7, 8
    batch.set_step([0], [0], [2], [1])
    thread = threading.Thread(target=program.run, args=(batch,))
    thread.start()
    assert started.wait(20)
    with pytest.raises(RuntimeError, match="already running"):
        program.run(intruder)
    go_on.set()
    thread.join(20)
    del batch
    assert views[0].token_ids.tolist() == [7, 8]
    assert views[0].token_ids.base is not None
