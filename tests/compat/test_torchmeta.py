"""torchmeta's functions: against plain autograd task by task, and cases worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastmeta
from fastmeta.compat.torchmeta import modules as meta
from fastmeta.compat.torchmeta.utils import (
    get_num_samples,
    get_prototypes,
    gradient_update_parameters,
    hardness_metric,
    matching_log_probas,
    matching_loss,
    matching_probas,
    pairwise_cosine_similarity,
    prototypical_loss,
    ridge_regression,
    task_parameters,
)

pytestmark = pytest.mark.usefixtures("double")
T, B = 3, 4
close = torch.testing.assert_close


# inner steps ----------------------------------------------------------------------------------------------------------
def linear(*weight):
    model = meta.MetaLinear(len(weight), 1, bias=False)
    model.weight.data = torch.tensor([weight], dtype=torch.float32)
    return model


def rows(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_small_integers_are_exact():
    """f = (w . [1, 2, 3])^2 / 2 at w = [2, 3, 5]: gradient 23 [1, 2, 3]; g the same of [4, 5, 6] at the new w."""
    model = linear(2.0, 3.0, 5.0)
    params = gradient_update_parameters(model, 0.5 * model(rows(1.0, 2.0, 3.0)) ** 2)
    assert torch.equal(params["weight"], rows(-9.5, -20.0, -29.5))
    (gradient,) = torch.autograd.grad(0.5 * model(rows(4.0, 5.0, 6.0), params=params) ** 2, model.parameters())
    assert torch.equal(gradient, rows(3780.0, 8505.0, 13230.0))
    # first order: the gradient at the new weights, -315 [4, 5, 6]
    params = gradient_update_parameters(model, 0.5 * model(rows(1.0, 2.0, 3.0)) ** 2, first_order=True)
    (gradient,) = torch.autograd.grad(0.5 * model(rows(4.0, 5.0, 6.0), params=params) ** 2, model.parameters())
    assert torch.equal(gradient, rows(-1260.0, -1575.0, -1890.0))


def test_steps_in_a_row_with_rates_by_name():
    layers = meta.MetaLinear(2, 3), nn.Linear(3, 3), nn.Tanh(), meta.MetaLinear(3, 4, bias=False)
    model = meta.MetaSequential(*layers)
    x, y = torch.randn(B, 2), torch.randn(B, 4)
    rates = {name: torch.rand((), requires_grad=True) for name, _ in model.meta_named_parameters()}
    params = None
    for _ in range(2):
        params = gradient_update_parameters(model, F.mse_loss(model(x, params=params), y), params, rates)
    fast = dict(model.meta_named_parameters())
    for _ in range(2):
        loss = F.mse_loss(torch.func.functional_call(model, fast, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - rates[name] * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    assert list(params) == list(fast)
    wanted = [*model.parameters(), *rates.values()]
    found, right = (
        torch.autograd.grad(F.mse_loss(torch.func.functional_call(model, dict(p), (x,)), 2 * y), wanted)
        for p in (params, fast)
    )
    close(found, right)


def test_what_a_step_refuses():
    with pytest.raises(ValueError, match="MetaModule"):
        gradient_update_parameters(nn.Linear(1, 1), torch.zeros(()))
    with pytest.raises(ValueError, match="MetaModule"):
        task_parameters(nn.Linear(1, 1), 2)
    model = linear(1.0)
    with pytest.raises(RuntimeError, match="not have been used"):
        gradient_update_parameters(model, torch.zeros((), requires_grad=True) * 1)


@pytest.mark.parametrize("first_order", [False, True])
def test_all_tasks_at_once_and_maml_are_the_loop(first_order):
    model = meta.MetaSequential(meta.MetaLinear(2, 5), nn.Tanh(), meta.MetaLayerNorm(5), meta.MetaLinear(5, 3))
    x, query_x = torch.randn(2, T, B, 2)
    y, query_y = torch.randint(3, (2, T, B))
    losses = []
    for task in range(T):
        params = None
        for _ in range(2):
            loss = F.cross_entropy(model(x[task], params=params), y[task])
            params = gradient_update_parameters(model, loss, params, step_size=0.4, first_order=first_order)
        losses.append(F.cross_entropy(model(query_x[task], params=params), query_y[task]))
    right = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))

    params = task_parameters(model, T)
    for _ in range(2):
        loss = F.cross_entropy(model(x, params=params).mT, y, reduction="none").mean(1).sum()
        params = gradient_update_parameters(model, loss, params, step_size=0.4, first_order=first_order)
    loss = F.cross_entropy(model(query_x, params=params).mT, query_y)
    close(torch.autograd.grad(loss, list(model.parameters())), right)

    maml = fastmeta.MAML(model, inner_lr=0.4, inner_steps=2, first_order=first_order)
    maml(fastmeta.TaskBatch(x, y, query_x, query_y)).loss.backward()
    close(tuple(p.grad for p in model.parameters()), right)


def test_maml_runs_meta_modules_in_its_kernels():
    """An argument that may be left out, as `params`, does not stand in the way; one that may not does."""
    model = meta.MetaSequential(meta.MetaLinear(2, 5), nn.ReLU(), meta.MetaLinear(5, 1))
    tasks = fastmeta.TaskBatch(*(torch.randn(T, B, size) for size in (2, 1, 2, 1)))
    maml = fastmeta.MAML(model, inner_lr=0.1, loss="mse")
    assert "fused: picked" in str(maml.explain(tasks))
    maml(tasks).loss.backward()
    losses = []
    for x, y, query_x, query_y in zip(*tasks, strict=True):
        params = gradient_update_parameters(model, F.mse_loss(model(x), y), step_size=0.1)
        losses.append(F.mse_loss(model(query_x, params=params), query_y))
    close(tuple(p.grad for p in model.parameters()), torch.autograd.grad(sum(losses) / T, list(model.parameters())))

    class Scaled(meta.MetaSequential):
        def forward(self, input, scale):
            return super().forward(input) * scale

    assert "takes 2 arguments" in str(fastmeta.MAML(Scaled(*model), inner_lr=0.1, loss="mse").explain(tasks))


# prototypes, matching, ridge regression -------------------------------------------------------------------------------
def test_prototypes_are_quotients_of_sums_in_order():
    """7 threes of class 0 have a mean of 3, which a product with 1/7 misses; a class without examples has zeros."""
    embeddings = torch.full((1, 9, 2), 3.0, dtype=torch.float32)
    embeddings[0, 7:] = torch.tensor([[1.0, 8.0], [2.0, 4.0]])
    targets = torch.tensor([[0] * 7 + [2, 2]])
    counts = get_num_samples(targets, 4)
    assert counts.dtype == torch.int64 and counts.tolist() == [[7, 0, 2, 0]]
    assert get_num_samples(targets, 4, torch.float32).dtype == torch.float32
    prototypes = get_prototypes(embeddings, targets, 4)
    assert prototypes.tolist() == [[[3.0, 3.0], [0.0, 0.0], [1.5, 6.0], [0.0, 0.0]]]


def test_prototypical_loss_by_hand():
    prototypes = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    queries = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]])  # squared distances 1 and 2; 0 and 4
    right = torch.tensor([[1 + np.log(np.exp(-1) + np.exp(-2))], [4 + np.log(1 + np.exp(-4))]])
    targets = torch.tensor([[0], [1]])
    close(prototypical_loss(prototypes, queries, targets, reduction="none"), right)
    close(prototypical_loss(prototypes, queries, targets), right.mean())
    close(prototypical_loss(prototypes, queries, torch.tensor([[0], [-100]])), right[0, 0])
    integers = torch.randint(-9, 9, (2, 3, 4)).float(), torch.randint(-9, 9, (2, 5, 4)).float()
    labels = torch.randint(3, (2, 5))
    squares = torch.tensor(
        [[[((p - q) ** 2).sum() for q in integers[1][t]] for p in integers[0][t]] for t in range(2)]
    ).float()
    assert torch.equal(prototypical_loss(*integers, labels), F.cross_entropy(-squares, labels))


def test_cosine_bounds_the_product_of_norms():
    a = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]]]).requires_grad_()
    b = torch.tensor([[[4.0, 3.0], [0.0, 1.0]]])
    close(pairwise_cosine_similarity(a, b), torch.tensor([[[0.96, 0.8], [0.0, 0.0], [0.8, 0.0]]]))
    # |a| |b| = 5e-3 and 1e-3 are below 1e-2, so the dot product 4e-3 is divided by that; each norm alone is not below
    close(pairwise_cosine_similarity(a, b, eps=1e-2)[0, 2], torch.tensor([0.4, 0.0]))
    (gradient,) = torch.autograd.grad(pairwise_cosine_similarity(a, b).sum(), a)
    assert gradient.isfinite().all()


def test_matching_by_hand():
    support = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]]).requires_grad_()
    queries = torch.tensor([[[5.0, 0.0], [0.0, 7.0]]])
    targets = torch.tensor([[2, 0, 0]])
    e = np.e
    right = torch.tensor([[[2 / (e + 2), 2 * e / (1 + 2 * e)], [0.0, 0.0], [e / (e + 2), 1 / (1 + 2 * e)]]])
    close(matching_probas(support, targets, queries, 3), right)  # [T, C, Q]
    log_probas = matching_log_probas(support, targets, queries, 3)
    close(log_probas, right.log())
    assert log_probas[0, 1].tolist() == [-torch.inf] * 2
    loss = matching_loss(support, targets, queries, torch.tensor([[2, 0]]), 3, reduction="sum")
    close(loss, -(right[0, 2, 0].log() + right[0, 0, 1].log()))

    def plain(support):
        cosines = F.cosine_similarity(support[0][:, None], queries[0], dim=-1)
        attention = cosines.softmax(0)
        return -(attention[0, 0].log() + attention[1:, 1].sum().log())

    close(torch.autograd.grad(loss, support), torch.autograd.grad(plain(support), support))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_regression_solves_its_equations(scale, bias):
    embeddings, targets = torch.randn(5, 7).requires_grad_(), torch.tensor([0, 2, 1, 0, 2])
    x = torch.cat([torch.ones(5, 1), embeddings], 1) if bias else embeddings
    hot = torch.eye(3)[targets]
    factor = 5.0 if scale else 1.0
    right = torch.linalg.inv(x.T @ x / factor + 0.1 * torch.eye(7 + bias)) @ x.T @ hot / factor
    slope = torch.autograd.grad(right.square().sum(), embeddings)
    for woodbury in (None, True, False):
        solution = ridge_regression(embeddings, targets, 0.1, 3, woodbury, scale, bias)
        assert solution.weight.shape == (3, 7)
        close(solution.weight, right[int(bias) :].T)
        assert solution.bias is None if not bias else torch.allclose(solution.bias, right[0])
        both = solution.weight.square().sum() + (solution.bias.square().sum() if bias else 0)
        close(torch.autograd.grad(both, embeddings), slope)
    # without a penalty only the system of as many rows as there are examples can be solved: it interpolates
    solution = ridge_regression(embeddings, targets, 0.0, 3, scale=scale, bias=bias)
    close(embeddings @ solution.weight.T + (solution.bias if bias else 0), hot)
    regression = ridge_regression(embeddings, hot, torch.tensor(0.1), scale=scale, bias=bias)
    close(regression.weight, right[int(bias) :].T)


def test_ridge_regression_without_the_number_of_classes():
    with pytest.warns(UserWarning, match="num_classes"):
        assert ridge_regression(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 1.0).weight.shape == (2, 3)
    with pytest.raises(ValueError, match=r"\[S, O\]"):
        ridge_regression(torch.randn(4, 3), torch.randn(4), 1.0)


def test_hardness():
    seen = []

    def backbone(images):
        seen.append(images.shape)
        return images.flatten(1)[:, [224 * 112 + 112, 224 * 112 + 113]]  # two pixels in the middle, logits

    images = torch.zeros(1, 2, 3, 4, 4)
    images[0, 0, 0, 2, 2], images[0, 1, 0, 2, 3] = 1.0, 1.0
    queries = 3 * images[:, :1]  # logits [3, 0]
    images[0, 0, 0, 2, 3] = -2.0  # of which the prototypes take nothing: [1, 0] and [0, 1]
    batch = {"support": (images, torch.tensor([[0, 1]])), "query": (queries, torch.tensor([[0]]))}
    p = np.e / (np.e + 1)  # logits 1 and 0
    close(hardness_metric(batch, 2, backbone), torch.tensor([np.log((1 - p) / p)]))
    assert seen == [(2, 3, 224, 224), (1, 3, 224, 224)]
    with pytest.raises(ValueError, match="'train' nor 'support'"):
        hardness_metric({"query": 0}, 2, backbone)
    with pytest.raises(ValueError, match="RGB"):
        hardness_metric({key: (x[:, :, :1], y) for key, (x, y) in batch.items()}, 2, backbone)
