"""Losses beside plain sums in float64."""

import numpy as np
import pytest
import torch

from pyllmlite.compress.learn import losses


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def logits(*shape, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_full_divergence(direction, temperature):
    student, teacher = logits(5, 7, seed=1), logits(5, 7, seed=2)
    found = losses.full_divergence(student, teacher, temperature, direction)
    for row in range(5):
        q = softmax(student[row].numpy() / temperature)
        p = softmax(teacher[row].numpy() / temperature)
        expected = kl(p, q) if direction == "forward" else kl(q, p)
        assert found[row].item() == pytest.approx(temperature**2 * expected, abs=1e-12)


def test_temperature_squared_keeps_the_gradients_size():
    """Hinton et al. 2015: at high temperature the gradient by a logit is (z - v) / vocab, whatever
    T is, for logits of mean zero."""
    vocab = 11
    student, teacher = logits(vocab, seed=3), logits(vocab, seed=4)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_(True)
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(
            losses.full_divergence(student, teacher, temperature), student
        )
        limit = (student - teacher).detach() / vocab
        assert torch.allclose(gradient, limit, atol=20 / temperature)


def test_gradient_is_t_times_the_difference_of_probabilities():
    student, teacher, temperature = logits(9, seed=5).requires_grad_(True), logits(9, seed=6), 2.5
    (gradient,) = torch.autograd.grad(
        losses.full_divergence(student, teacher, temperature), student
    )
    q = softmax(student.detach().numpy() / temperature)
    p = softmax(teacher.numpy() / temperature)
    np.testing.assert_allclose(gradient.numpy(), temperature * (q - p), atol=1e-14)


def topk(teacher, k, temperature):
    log_probs = torch.log_softmax(teacher / temperature, -1)
    values, ids = log_probs.topk(k, -1)
    return ids, values


@pytest.mark.parametrize("k", [1, 3, 12, 13])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_divergence(k, direction, temperature):
    student, teacher = logits(4, 13, seed=7), logits(4, 13, seed=8)
    ids, log_probs = topk(teacher, k, temperature)
    found = losses.topk_divergence(student, ids, log_probs, temperature, direction)
    full = losses.full_divergence(student, teacher, temperature, direction)
    for row in range(4):
        q = softmax(student[row].numpy() / temperature)
        p = softmax(teacher[row].numpy() / temperature)
        kept = ids[row].numpy()
        pk, qk = list(p[kept]), list(q[kept])
        if k < 13:
            pk.append(1 - p[kept].sum())
            qk.append(1 - q[kept].sum())
        expected = kl(pk, qk) if direction == "forward" else kl(qk, pk)
        assert found[row].item() == pytest.approx(temperature**2 * expected, abs=1e-9)
    assert (found <= full + 1e-9).all()
    if k == 13:
        torch.testing.assert_close(found, full, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_top_k_leave_out_moves_the_gradient_by_twice_its_mass_at_most(temperature):
    student, teacher = logits(6, 40, seed=9).requires_grad_(True), logits(6, 40, seed=10)
    for k in (2, 8, 20):
        ids, log_probs = topk(teacher, k, temperature)
        part = losses.topk_divergence(student, ids, log_probs, temperature).sum()
        full = losses.full_divergence(student, teacher, temperature).sum()
        (a,) = torch.autograd.grad(part, student)
        (b,) = torch.autograd.grad(full, student)
        mass = 1 - log_probs.exp().sum(-1)
        assert ((a - b).abs().sum(-1) <= 2 * temperature * mass + 1e-12).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 4, 6])
def test_topk_gradients(direction, k):
    student, teacher = logits(2, 6, seed=11).requires_grad_(True), logits(2, 6, seed=12)
    ids, log_probs = topk(teacher, k, 1.5)
    assert torch.autograd.gradcheck(
        lambda z: losses.topk_divergence(z, ids, log_probs, 1.5, direction), (student,)
    )


def test_a_token_that_cannot_be_is_no_nan():
    student = torch.tensor([1.0, -torch.inf, 2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.5, -torch.inf, 0.1], dtype=torch.float64)
    for direction in losses.DIRECTIONS:
        found = losses.full_divergence(student, teacher, 1.0, direction)
        (gradient,) = torch.autograd.grad(found, student)
        assert torch.isfinite(found) and torch.isfinite(gradient).all()


def test_mixed_loss():
    student, teacher = logits(3, 5, seed=13), logits(3, 5, seed=14)
    targets = torch.tensor([1, losses.IGNORE, 4])
    divergence = losses.full_divergence(student, teacher, 2.0)
    loss, metrics = losses.mixed_loss(student, targets, divergence, 0.25)
    entropy = -np.mean([np.log(softmax(student[i].numpy())[t]) for i, t in ((0, 1), (2, 4))])
    part = (divergence[0] + divergence[2]).item() / 2
    assert loss.item() == pytest.approx(0.75 * part + 0.25 * entropy, abs=1e-12)
    assert metrics == {
        "kl": pytest.approx(part), "cross_entropy": pytest.approx(entropy), "tokens": 2.0,
    }  # fmt: skip


def test_a_direction_that_is_not_known():
    with pytest.raises(ValueError, match="forward or reverse"):
        losses.full_divergence(logits(3), logits(3), 1.0, "sideways")
