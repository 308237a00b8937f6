"""Stored distributions, batches, chunks of the output matrix, objectives, sampling."""

import numpy as np
import pytest
import torch
from tiny_models import TINY

from pyllmlite.compress.learn import losses
from pyllmlite.compress.learn.batches import TextBatches
from pyllmlite.compress.learn.head import Head, chunked_sum
from pyllmlite.compress.learn.losses import IGNORE
from pyllmlite.compress.learn.objectives import (
    LogitDistillation,
    OnPolicy,
    SequenceLevel,
    check_head,
)
from pyllmlite.compress.learn.records import Record
from pyllmlite.compress.learn.sampling import sample
from pyllmlite.compress.learn.student import load_module
from pyllmlite.compress.learn.teacher_logits import (
    TopKLogits,
    distributions,
    open_scorer,
    predicted_tokens,
    top_k,
)
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import open_model

SEQ = 24


def records(count=70, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = rng.integers(0, 250, rng.integers(1, 6)).tolist()
        answer = rng.integers(0, 250, rng.integers(3, 30)).tolist()
        made.append(Record(i, "", prompt, "", answer, "stop", 0.5, 0.0))
    made[5].dropped = "length"
    made[9].prompt_token_ids = list(range(SEQ + 9))  # fills seq_len alone
    return made


@pytest.fixture(scope="module")
def source(teacher):
    return open_model(str(teacher))


@pytest.fixture(scope="module")
def module(source):
    return load_module(source)


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    topk = TopKLogits(tmp_path_factory.mktemp("logits"), records(), 8, 2.0, SEQ, {"a": 1})
    topk.write(lambda: open_scorer(source, SEQ))
    return topk


def expected_logits(module, record):
    ids, predicted = predicted_tokens(record, SEQ)
    with torch.no_grad():
        return module(input_ids=torch.tensor([ids[:-1]])).logits[0, -predicted:]


def test_the_engines_distributions_are_transformers(source, module):
    made = records(12)
    long = Record(12, "", [3, 4], "", [5] * 600, "length", 0.5, 0.0)  # longer than a step
    long.token_ids[300:] = list(range(250)) + [7] * 50
    sequences = [([*r.prompt_token_ids, *r.token_ids], len(r.token_ids)) for r in made]
    sequences.append(([*long.prompt_token_ids, *long.token_ids][:500], 400))
    found = dict(distributions(open_scorer(source, 512), sequences))
    assert list(found) == list(range(13))
    for index, (ids, predicted) in enumerate(sequences):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids[:-1]])).logits[0, -predicted:]
        assert found[index].shape == logits.shape
        np.testing.assert_allclose(found[index], logits.numpy(), atol=2e-4)


def test_stored_distributions(stored, module):
    made = records()
    for index in (0, 5, 9, 63, 64, 69):
        ids, log_probs, tail = stored.rows(index)
        if index in (5, 9):
            assert len(ids) == 0
            continue
        expected = torch.log_softmax(expected_logits(module, made[index]).double() / 2.0, -1)
        kept = expected.gather(-1, torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(log_probs, kept, atol=4e-3)  # float16
        assert (np.diff(kept, axis=-1) <= 1e-4).all()
        np.testing.assert_allclose(np.exp(tail), 1 - np.exp(kept).sum(-1), atol=1e-4)
    stats = stored.stats()
    lengths = [predicted_tokens(r, SEQ)[1] for r in made if not r.dropped]
    assert stats.positions == sum(lengths)
    assert 0 < stats.tail < stats.tail_largest < 1
    assert "8 tokens each" in str(stats)


def test_distributions_are_read_once(stored):
    def never():
        raise AssertionError("all shards are there")

    stored.write(never)
    other = TopKLogits(stored.directory, records(), 9, 2.0, SEQ, {"a": 1})
    with pytest.raises(ConfigError, match="with k 8, now it is 9"):
        other.write(never)


def test_top_k_of_a_sharp_distribution():
    logits = np.full((1, 50), -30.0, np.float32)
    logits[0, 7] = 10.0
    found = top_k(logits, 2, 1.0)
    assert found["ids"][0, 0] == 7 and found["log_probs"][0, 0] == 0
    assert found["tail"][0] == pytest.approx(np.log(48) - 40, abs=1e-3)  # no rounding of 1 - 1


def test_batches(stored):
    made = records()
    indices = [i for i in range(70) if i != 5]
    batches = TextBatches(made, indices, 4, SEQ, 3, stored)
    assert 9 not in batches.indices and batches.per_epoch == 17
    again = TextBatches(made, indices, 4, SEQ, 3, stored)
    for index in (20, 0, 16, 17):  # in any order
        a, b = batches.batch(index), again.batch(index)
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
        counted = a["targets"] != IGNORE
        assert len(a["tail"]) == len(a["topk_ids"]) == int(counted.sum())
    seen = [tuple(p) for i in range(17) for p in batches.batch(i)["prompts"]]
    assert len(seen) == 68 and set(seen) == {tuple(made[i].prompt_token_ids) for i in
                                             batches.indices}  # fmt: skip
    other = TextBatches(made, indices, 4, SEQ, 4, stored)
    assert [tuple(p) for i in range(17) for p in other.batch(i)["prompts"]] != seen


def test_a_batch_is_its_records():
    made = [Record(0, "", [1, 2], "", [3, 4, 5], "stop", 1, 0),
            Record(1, "", [6], "", [7], "stop", 1, 0)]  # fmt: skip
    batch = TextBatches(made, [0, 1], 2, 4, 0).collated([0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE, 3, 4, 5], [7, IGNORE, IGNORE, IGNORE]]
    with pytest.raises(ConfigError, match="no text to learn from"):
        TextBatches(made[:1], [0], 2, 1, 0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_give_the_whole_gradient(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))

    def loss(part, first, last):
        value = losses.cross_entropy(part @ matrix.T, targets[first:last]).sum()
        return value, {"n": float(last - first)}

    total, sums = chunked_sum(hidden, loss, [matrix], chunk)
    found = torch.autograd.grad(3 * total, [hidden, matrix])
    whole, _ = loss(hidden, 0, 7)
    expected = torch.autograd.grad(3 * whole, [hidden, matrix])
    torch.testing.assert_close(total, whole)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert sums == {"n": 7.0}
    with torch.no_grad():
        torch.testing.assert_close(chunked_sum(hidden, loss, [matrix], chunk)[0], whole)
    frozen = matrix.detach()
    total, _ = chunked_sum(hidden, lambda p, a, b: loss(p, a, b), [frozen], chunk)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], expected[0] / 3)


def student_of(source):
    torch.manual_seed(4)
    student = load_module(source).requires_grad_(True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return student


def test_objectives_are_their_formulas(source, module, stored):
    student = student_of(source)
    batches = TextBatches(records(), [0, 1, 2, 3], 4, SEQ, 0, stored)
    batch = batches.batch(0)
    counted = batch["targets"] != IGNORE
    ours = student(input_ids=batch["input_ids"]).logits[counted]
    theirs = module(input_ids=batch["input_ids"]).logits[counted].detach()
    entropy = losses.cross_entropy(ours, batch["targets"][counted]).mean()
    loss, metrics = SequenceLevel()(student, batch)
    torch.testing.assert_close(loss, entropy, atol=1e-5, rtol=1e-5)
    assert metrics == {"tokens": float(counted.sum())}
    for direction in ("forward", "reverse", 0.25):
        loss, metrics = LogitDistillation(2.0, direction, 0.3)(student, batch)
        parts = {"forward": [1, 0], "reverse": [0, 1]}.get(direction, [0.75, 0.25])
        log_probs = torch.log_softmax(theirs / 2.0, -1)
        values, ids = log_probs.topk(8, -1)
        kl = sum(
            share * losses.topk_divergence(ours, ids, values, 2.0, name).mean()
            for share, name in zip(parts, losses.DIRECTIONS, strict=True)
        )
        torch.testing.assert_close(loss, 0.7 * kl + 0.3 * entropy, atol=2e-3, rtol=2e-3)
        assert metrics["cross_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    policy = OnPolicy(module, 2.0, "reverse", 0.3, share=0.0)  # the teacher's words
    loss, metrics = policy(student, batch)
    kl = losses.full_divergence(ours, theirs, 2.0, "reverse").mean()
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * entropy, atol=1e-4, rtol=1e-4)
    assert metrics["own"] == 0 and metrics["cross_entropy_tokens"] == metrics["tokens"]
    _, written = OnPolicy(module, 2.0, "reverse", 0.3, max_tokens=2)(student, batch)
    assert written.keys() == metrics.keys()  # ranks add them up by their place
    assert written["own"] == 1 and written["cross_entropy_tokens"] == 0


def test_bf16_products_give_nearly_the_same_gradient(source, stored, monkeypatch):
    """Several chunks share one cast of a matrix that is trained."""
    batch = TextBatches(records(), [0, 1, 2], 3, SEQ, 0, stored).batch(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        student = student_of(source)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            monkeypatch.setattr(chunked_sum, "__defaults__", (5,))
            loss, _ = LogitDistillation(2.0)(student, batch)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def test_what_was_sampled_under_autocast_leaves_the_gradient(source, module):
    """Weights are cast for the writing first, without a graph."""
    batch = {"prompts": [[5, 6, 7], [8]], "index": 0}
    found = []
    for enabled in (False, True):
        student = student_of(source)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = OnPolicy(module, max_tokens=3, sampling_temperature=0.0)(student, batch)
        loss.backward()
        found.append({n: p.grad for n, p in student.named_parameters()})
    for name, gradient in found[1].items():
        assert gradient is not None and bool(gradient.any()), name
    flat = [torch.cat([g.flatten() for g in one.values()]) for one in found]
    assert (flat[0] - flat[1]).norm() < 0.2 * flat[0].norm()


def test_gradients_of_a_tied_matrix(source, stored):
    """The output matrix is the embedding too: both ways must reach it."""
    student = student_of(source)
    batch = TextBatches(records(), [0, 1, 2], 3, SEQ, 0, stored).batch(0)
    SequenceLevel()(student, batch)[0].backward()
    found = student.get_input_embeddings().weight.grad.clone()
    student.zero_grad()
    counted = batch["targets"] != IGNORE
    logits = student(input_ids=batch["input_ids"]).logits[counted]
    losses.cross_entropy(logits, batch["targets"][counted]).mean().backward()
    torch.testing.assert_close(
        found, student.get_input_embeddings().weight.grad, atol=1e-6, rtol=1e-4
    )


def test_sampling_is_transformers_own(module):
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    written = sample(module, prompts, 6, temperature=0.0)
    tokens = torch.cat([written.batch["input_ids"], torch.zeros(3, 1, dtype=torch.long)], 1)
    for row, prompt in enumerate(prompts):
        expected = module.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        answer = written.batch["targets"][row]
        assert torch.equal(answer[answer != IGNORE], expected)
        assert tokens[row, 4 - len(prompt) : 4].tolist() == prompt


def test_sampled_answers_end(module):
    greedy = sample(module, [[5, 6], [7]], 5, temperature=0.0).batch["targets"]
    first = int(greedy[0][greedy[0] != IGNORE][0])
    ended = sample(module, [[5, 6], [7]], 5, temperature=0.0, eos=(first,)).batch["targets"]
    assert ended[0][ended[0] != IGNORE].tolist() == [first]  # and it belongs to the answer


def test_the_student_writes_the_teacher_scores(source, module):
    student = student_of(source)
    batch = {"prompts": [[5, 6, 7], [8]], "index": 3}
    policy = OnPolicy(module, direction="forward", max_tokens=4)
    torch.manual_seed(11)
    loss, metrics = policy(student, batch)
    assert metrics["own"] == 1.0 and metrics["tokens"] == 8
    torch.manual_seed(11)
    written = sample(student, batch["prompts"], 4)
    counted = written.batch["targets"] != IGNORE
    ids = written.batch["input_ids"]
    ours = student(input_ids=ids, **written.arguments).logits[counted]
    theirs = module(input_ids=ids, **written.arguments).logits[counted]
    expected = losses.full_divergence(ours, theirs).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_on_policy_is_decided_by_seed_and_index(module):
    def who(seed):
        policy = OnPolicy(module, share=0.5, max_tokens=1, seed=seed)
        batch = TextBatches(records(10), [0, 1], 2, SEQ, 0).batch(0)
        return [policy(module, {**batch, "index": i})[1]["own"] for i in range(12)]

    assert who(1) == who(1) != who(2) and 0 < sum(who(1)) < 12


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "bloom", "mpt", "phi3", "qwen3"])
def test_the_head_of_every_kind(family, tmp_path):
    check_head(load_module(open_model(str(TINY[family](tmp_path / "m")))).train())


def test_a_model_that_does_more_behind_its_norm(source, monkeypatch):
    module = load_module(source)
    check_head(module)
    monkeypatch.setattr(Head, "__call__", lambda self, hidden: 2 * self.linear(hidden))
    with pytest.raises(ModelError, match="computes more than its output matrix"):
        check_head(module)
