"""Contrastive learning against its formulas, and that it learns what tells classes apart without a label."""

import importlib
import math

import pytest
import torch
from embedding_cases import check_protocol, class_batch
from torch import nn
from torch.nn import functional as F

from fastmeta.algorithms import Contrastive, NearestNeighbour
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import Augmentation, AugmentedTasks, EpisodeSampler, TaskBatch, glyphs


def learner(**options):
    torch.manual_seed(0)
    projection = options.pop("projection", mlp([4, 6, 3], "tanh"))
    return Contrastive(mlp([5, 8, 4], "tanh"), projection, **({"ways": 3} | options))


def views(tasks=3, images=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tasks, images, 5, generator=generator)
    labels = torch.arange(images).repeat(tasks, 1)
    return TaskBatch(x[0], labels, x[1], labels)


@pytest.mark.parametrize("head", ["mean", "ridge"])
@pytest.mark.parametrize("centre", ["none", "support"])
@pytest.mark.parametrize("steps", [0, 3])
def test_protocol(head, centre, steps):
    check_protocol(learner(head=head, centre=centre, fine_tune_steps=steps).eval(), class_batch())


@pytest.mark.parametrize("projected", [True, False])
def test_training_loss_is_the_formula(projected):
    algorithm, batch = learner(temperature=0.3, **({} if projected else {"projection": None})), views()
    output = algorithm(batch)
    assert output.accuracy is None and output.logits is None
    for task in range(3):
        z = [algorithm.projection(algorithm.encoder(x[task])) for x in (batch.support_x, batch.query_x)]
        z, losses = torch.cat(z), []
        for i in range(14):
            scores = torch.stack([F.cosine_similarity(z[i], z[k], dim=0) / 0.3 for k in range(14) if k != i])
            partner = F.cosine_similarity(z[i], z[(i + 7) % 14], dim=0) / 0.3
            losses.append(scores.exp().sum().log() - partner)
        torch.testing.assert_close(output.task_loss[task], torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, output.task_loss.mean())
    for name, parameter in algorithm.named_parameters():
        (gradient,) = torch.autograd.grad(output.loss, parameter, retain_graph=True)
        assert gradient.abs().max() > 0, name


def test_training_does_not_look_at_labels():
    algorithm, batch = learner(ways=None), views()
    wrong = batch._replace(support_y=torch.full_like(batch.support_y, -7), query_y=batch.query_y.flip(1))
    assert torch.equal(algorithm(batch).task_loss, algorithm(wrong).task_loss)


def test_heads_are_the_formulas():
    batch = class_batch(shots=3)
    for head, centre in (("mean", "none"), ("mean", "support"), ("ridge", "none"), ("ridge", "support")):
        algorithm = learner(head=head, centre=centre, temperature=0.4, ridge=0.7).eval()
        logits = algorithm(batch).logits
        assert not logits.requires_grad
        for task in range(4):
            with torch.no_grad():
                support, query = algorithm.encoder(batch.support_x[task]), algorithm.encoder(batch.query_x[task])
            middle = support.mean(0) if centre == "support" else 0
            support, query = F.normalize(support - middle, dim=1), F.normalize(query - middle, dim=1)
            if head == "mean":
                means = torch.stack([support[batch.support_y[task] == n].mean(0) for n in range(3)])
                expected = (1 - torch.cdist(query, means).square()) / 0.8
            else:
                system = support.T @ support + 0.7 * torch.eye(4)
                solved = torch.linalg.solve(system, support.T @ F.one_hot(batch.support_y[task], 3).float())
                expected = query @ solved / 0.4
            torch.testing.assert_close(logits[task], expected, rtol=1e-4, atol=1e-4)


def test_head_on_projections():
    """The same as an encoder with the projection behind it."""
    algorithm, batch = learner(features="projection").eval(), class_batch()
    whole = Contrastive(nn.Sequential(algorithm.encoder, algorithm.projection), ways=3).eval()
    torch.testing.assert_close(algorithm(batch).logits, whole(batch).logits)
    check_protocol(algorithm, batch)


def test_fine_tuning_is_gradient_descent():
    batch = class_batch(shots=2)
    start, tuned = learner().eval(), learner(fine_tune_steps=3, fine_tune_lr=0.5).eval()
    before, after = (algorithm.adapt(batch.support_x, batch.support_y) for algorithm in (start, tuned))
    for task in range(4):
        with torch.no_grad():
            x = F.normalize(start.encoder(batch.support_x[task]), dim=1)
        weights, bias = before.weights[task].clone().requires_grad_(), before.bias[task].clone().requires_grad_()
        for _ in range(3):
            gradients = torch.autograd.grad(F.cross_entropy(x @ weights + bias, batch.support_y[task]), (weights, bias))
            weights, bias = weights - 0.5 * gradients[0], bias - 0.5 * gradients[1]
        torch.testing.assert_close(after.weights[task], weights.detach())
        torch.testing.assert_close(after.bias[task], bias.detach())


def test_batch_norm_sees_both_views_and_is_left_alone_in_eval_mode():
    encoder = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=1.0))
    algorithm, batch = Contrastive(encoder), views()
    algorithm(batch)
    rows = encoder[0](torch.cat([batch.support_x, batch.query_x]).flatten(0, 1))
    torch.testing.assert_close(encoder[1].running_mean, rows.mean(0))
    before = encoder[1].running_mean.clone()
    algorithm.eval()(class_batch())
    assert torch.equal(encoder[1].running_mean, before)


def test_other_ways_at_test_and_absent_classes():
    algorithm = learner(ways=None).eval()
    assert algorithm(class_batch(ways=6)).logits.shape == (4, 18, 6)
    algorithm.ways = 4
    logits = algorithm(class_batch(ways=3)).logits
    assert logits[..., :3].isfinite().all() and (logits[..., 3] == -math.inf).all()


def test_arguments_are_checked():
    for name, value in (
        ("head", "svm"), ("centre", "query"), ("features", "pixels"), ("temperature", 0), ("ridge", -1.0),
        ("fine_tune_lr", math.inf), ("fine_tune_steps", -1), ("fine_tune_steps", True), ("ways", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            learner(**{name: value})
    with pytest.raises(ValueError, match="two views"):
        learner()(class_batch())
    with pytest.raises(ValueError, match="encoder"):
        Contrastive(nn.Unflatten(1, (5, 1)))(views())
    with pytest.raises(ValueError, match="projection"):
        learner(projection=nn.Unflatten(1, (4, 1)))(views())
    with pytest.raises(ValueError, match="support_y.*2"):
        learner(ways=2).eval()(class_batch())
    with pytest.raises(TypeError, match="int64"):
        batch = class_batch()
        learner().eval()(batch._replace(support_y=batch.support_y.int()))
    with pytest.raises(ValueError, match="tasks"):
        algorithm, batch = learner().eval(), class_batch()
        algorithm.predict(algorithm.adapt(batch.support_x, batch.support_y), batch.query_x[:2])


@pytest.mark.learning
def test_learns_characters_without_a_label(monkeypatch):
    """On held-out classes far better than its own start, and better than the best that pixels can do."""
    module = importlib.import_module("fastmeta.tasks.glyphs")
    monkeypatch.setattr(module, "CLASSES", {"train": 80, "val": 5, "test": 40})
    torch.manual_seed(0)
    source = AugmentedTasks(
        glyphs("train"), ways=48, augmentation=Augmentation(rotate=15, scale=0.2, shift=0.1, shear=0.25, elastic=0.03),
        augment_support=True, rotations=True,
    )  # fmt: skip
    algorithm = Contrastive(conv4(hidden=16), mlp([16, 32, 32]), temperature=0.2, ways=5)
    tasks = EpisodeSampler(glyphs("test"), ways=5, shots=1, query_shots=10)
    held_out = tasks.sample(150, generator=torch.Generator().manual_seed(1))

    def accuracy(judged):
        return judged.eval()(held_out).accuracy.mean().item()

    pixels = max(
        accuracy(NearestNeighbour(nn.Flatten(), centre=centre, normalise=normalise))
        for centre in ("none", "support")
        for normalise in (False, True)
    )
    before = accuracy(algorithm)
    algorithm.train()
    optimizer, generator = torch.optim.Adam(algorithm.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        algorithm(source.sample(1, generator=generator)).loss.backward()
        optimizer.step()
    after = accuracy(algorithm)
    assert after > before + 0.15 and after > pixels + 0.1, (before, pixels, after)
