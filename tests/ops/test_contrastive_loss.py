"""`contrastive_loss` against NT-Xent in other words, and what it promises beside its value."""

import math
import threading
import time

import pytest
import torch
from conftest import DEVICE
from torch.nn import functional as F

from fastmeta.dispatch.backends import use_backend
from fastmeta.functional import contrastive_loss


def views(tasks=3, examples=7, width=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tasks, examples, width, generator=g, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2)]


def in_words(first, second, temperature):
    """One batch, one embedding at a time: cross entropy over the similarities with all others."""
    losses = []
    rows = [*first, *second]
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        scores = torch.stack([F.cosine_similarity(row, rows[j], dim=0) / temperature for j in others])
        partner = others.index((i + len(first)) % len(rows))
        losses.append(F.cross_entropy(scores[None], torch.tensor([partner], device=scores.device)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_is_nt_xent(temperature):
    first, second = views()
    loss = contrastive_loss(first, second, temperature)
    expected = torch.stack([in_words(a, b, temperature) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(contrastive_loss(second, first, temperature), loss)
    order = torch.randperm(7, device=first.device)
    torch.testing.assert_close(contrastive_loss(first[:, order], second[:, order], temperature), loss)


def test_lengths_do_not_count_unless_asked():
    first, second = views()
    torch.testing.assert_close(contrastive_loss(3 * first, second / 7), contrastive_loss(first, second))
    raw = contrastive_loss(3 * first, second, normalise=False)
    assert not torch.allclose(raw, contrastive_loss(first, second))
    both = torch.cat([3 * first, second], 1)
    scores = (both @ both.mT / 0.5).masked_fill(torch.eye(14, dtype=torch.bool, device=both.device), -math.inf)
    labels = (torch.arange(14, device=both.device) + 7) % 14
    expected = F.cross_entropy(scores.flatten(0, 1), labels.repeat(3), reduction="none").view(3, 14).mean(1)
    torch.testing.assert_close(raw, expected)


def test_one_example_none_and_the_zero_vector():
    first, second = views(examples=1)
    assert (contrastive_loss(first, second) == 0).all()
    assert contrastive_loss(first[:, :0], second[:, :0]).isnan().all()
    assert contrastive_loss(first[:0], second[:0]).shape == (0,)
    first, second = (v.requires_grad_() for v in views())
    loss = contrastive_loss(torch.cat([first[:, :3], 0 * first[:, 3:]], 1), second)
    gradients = torch.autograd.grad(loss.sum(), [first, second])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_temperature_stays_finite(dtype):
    first, second = (v.requires_grad_() for v in views(1, 40, 3, dtype))
    loss = contrastive_loss(first, second, 1e-3)
    gradients = torch.autograd.grad(loss.sum(), [first, second])
    assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
    with use_backend("reference"):
        torch.testing.assert_close(loss, contrastive_loss(first, second, 1e-3), rtol=1e-4, atol=1e-4)


def test_gradient_of_any_use_of_the_loss():
    """The kernel finds the gradient of the mean with the loss: another use must not take it."""
    first, second = (v.requires_grad_() for v in views())
    uneven = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device=first.device)
    for use in (torch.mean, torch.sum, lambda loss: loss[1], lambda loss: (uneven * loss).sum()):
        found = torch.autograd.grad(use(contrastive_loss(first, second)), [first, second])
        with use_backend("reference"):
            right = torch.autograd.grad(use(contrastive_loss(first, second)), [first, second])
        for f, r in zip(found, right, strict=True):
            torch.testing.assert_close(f, r)


@pytest.mark.skipif(DEVICE != "cpu", reason="reads the memory of this process")
def test_no_matrix_of_scores_in_memory():
    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    first, second = (v.requires_grad_() for v in views(1, 4096, 8, torch.float32))
    contrastive_loss(*views(1, 64, 8, torch.float32)).sum()
    before, most, done = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    torch.autograd.grad(contrastive_loss(first, second).sum(), [first, second])
    done.set()
    watcher.join()
    assert most - before < 8192 * 8192 * 4 / 8, "the matrix of scores would take 256 MB"


def test_arguments_are_checked():
    first, second = views()
    for change, error, text in (
        ((first, second, 0.0), ValueError, "temperature must be a finite number above 0, got 0.0"),
        ((first, second[:, :6], 0.5), ValueError, "second"),
        ((first[0], second[0], 0.5), ValueError, r"first must have shape \[T, B, D\]"),
        ((first, second.float(), 0.5), TypeError, "second"),
        ((first.long(), second.long(), 0.5), TypeError, "first"),
    ):
        with pytest.raises(error, match=text):
            contrastive_loss(*change)
