import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllmlite import _native

ROWS, LENGTH, TOKENS, LOGITS, VOCAB, LOGPROBS = 6, 96, 48, 24, 70, 3


@pytest.fixture
def batch():
    table = np.arange(ROWS * 6, dtype=np.int32).reshape(ROWS, 6)
    made = _native.Batch(ROWS, LENGTH, TOKENS, LOGITS, VOCAB, LOGPROBS, [(16, table)])
    made.token_table[:] = np.arange(LENGTH) % VOCAB
    return made


def test_results_are_views_of_the_rows_in_use(batch):
    batch.set_step([0, 4], [0, 10], [3, 1], [2, 1])
    assert batch.num_tokens == 4 and batch.num_logit_rows == 3
    assert batch.token_list == [0, 0, 0] and not batch.any_failed
    for name in ("tokens", "logprobs", "ranks", "status"):
        result = getattr(batch, name)
        assert result.shape == (3,) and not result.flags.writeable
    assert batch.top_ids.shape == batch.top_logprobs.shape == (3, LOGPROBS)
    view = batch.token_table
    del batch
    assert view[0, 5] == 5  # the view keeps the memory


def test_sequences_of_any_kind_of_int(batch):
    batch.set_step((0,), np.array([1]), range(2, 3), [True])
    assert batch.num_tokens == 2 and batch.num_logit_rows == 1
    for bad in ([0.5], ["0"], [None], 3):
        with pytest.raises(TypeError):
            batch.set_step(bad, [0], [1], [1])
    with pytest.raises(ValueError, match="32 bits"):
        batch.set_step([2**40], [0], [1], [1])
    with pytest.raises(OverflowError):
        batch.set_step([2**70], [0], [1], [1])


def test_append_sampled_puts_the_last_token_behind_each_sequence(batch):
    # A prompt's end, a chunk that wants no logits, drafts, a known token, the last column.
    batch.set_step(
        [0, 1, 2, 3, 4],
        [0, 0, 10, 20, LENGTH - 1],
        [3, 4, 3, 2, 1],
        [1, 0, 3, 1, 1],
        targets=[-1, -1, -1, -1, 5, -1],
    )
    expected = batch.token_table.copy()
    expected[0, 3], expected[2, 13] = 60, 63
    logits = np.eye(VOCAB, dtype=np.float32)[60:66].copy()
    for row in range(5):
        batch.set_sampling(row, temperature=0.0)
    _native.run_op(_native.sample(VOCAB), [logits], batch)
    batch.append_sampled()
    assert batch.token_list == [60, 61, 62, 63, 5, 65]
    np.testing.assert_array_equal(batch.token_table, expected)


def test_append_in_one_call(batch):
    batch.append([0, 5, 3], [9, 8, 7], [0, 95, 40])
    assert batch.token_table[[0, 5, 3], [0, 95, 40]].tolist() == [9, 8, 7]
    before = batch.token_table.copy()
    for rows, tokens, positions in (
        ([0, 6], [1, 1], [0, 0]),
        ([0, 1], [1, VOCAB], [0, 0]),
        ([0, 1], [1, 1], [0, LENGTH]),
        ([0, 1], [1], [0, 0]),
    ):
        with pytest.raises(ValueError):
            batch.append(rows, tokens, positions)
    np.testing.assert_array_equal(batch.token_table, before)  # all or nothing


def test_a_refused_step_is_an_empty_step(batch):
    batch.set_step([0], [0], [4], [2])
    with pytest.raises(ValueError, match="row 1 is twice"):
        batch.set_step([1, 1], [0, 0], [1, 1], [1, 1])
    assert batch.num_tokens == 0 and batch.token_list == []


def test_masks_are_checked(batch):
    batch.set_step([0], [0], [1], [1])
    batch.set_mask(0, np.zeros(3, np.uint32))
    batch.set_mask(0, None)
    for bad in (np.zeros(2, np.uint32), np.zeros(3, np.int32), np.zeros((3, 2), np.uint32).T[0]):
        with pytest.raises(ValueError):
            batch.set_mask(0, bad)
    with pytest.raises(ValueError, match="logit row 1"):
        batch.set_mask(1, np.zeros(3, np.uint32))


def test_block_tables_are_checked():
    for table in (
        np.zeros((ROWS, 2), np.int64),
        np.zeros((ROWS - 1, 2), np.int32),
        np.zeros((2, ROWS), np.int32).T,
        np.zeros(ROWS, np.int32),
    ):
        with pytest.raises(ValueError, match="block table"):
            _native.Batch(ROWS, LENGTH, TOKENS, LOGITS, VOCAB, 0, [(16, table)])


def test_sampling_is_checked(batch):
    batch.set_sampling(0, temperature=0.5, seed=-1, bias_ids=[1], bias_values=[2.0])
    batch.set_sampling(0, seed=2**80 + 5)
    for bad in (
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"num_logprobs": LOGPROBS + 1},
        {"bias_ids": [VOCAB], "bias_values": [0.0]},
        {"bias_ids": [1], "bias_values": []},
        {"banned_ids": [-1]},
    ):
        with pytest.raises(ValueError):
            batch.set_sampling(0, **bad)
    with pytest.raises(ValueError, match="row 6"):
        batch.set_sampling(6)


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(tokens, tokens, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_hash_tells_blocks_apart(a, b, parent, salt):
    h = _native.hash_block(parent, a, salt)
    assert 0 <= h < 2**64
    assert h == _native.hash_block(parent, tuple(a), salt)
    assert h == _native.hash_block(parent, np.array(a, np.int64), salt)
    assert (h == _native.hash_block(parent, b, salt)) == (a == b)
    assert h != _native.hash_block(parent ^ 1, a, salt)
    assert h != _native.hash_block(parent, a, salt ^ 1)
    assert h != _native.hash_block(parent, [*a, 0], salt)


def test_hash_spreads_small_differences():
    seen = [_native.hash_block(0, [i, j], 0) for i in range(300) for j in range(300)]
    assert len(set(seen)) == 90_000
    bits = np.array([[h >> k & 1 for k in range(64)] for h in seen[:4000]]).mean(axis=0)
    assert (abs(bits - 0.5) < 0.05).all()
