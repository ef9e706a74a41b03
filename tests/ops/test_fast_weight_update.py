"""The inner step: every form of rate and parameters against a plain loop, and MAML by hand through it."""

import pytest
import torch
from conftest import DEVICE
from test_ops import BACKENDS, require
from torch.utils import _pytree as pytree

from fastmeta import use_backend
from fastmeta.dispatch.spec import Make
from fastmeta.functional import fast_weight_update, functional_mlp

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
T = 3
# a pytree in a pytree; a vector of T elements, not to be taken for one number per task; a scalar
SHAPES = {"body": [{"weight": (4, 2), "bias": (T,)}], "scale": ()}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    require(request.param)
    with use_backend(request.param):
        yield request.param


def is_shape(value):
    return isinstance(value, tuple)


def tree(draw, *lead):
    """The structure of SHAPES, filled by `draw(*shape)`."""
    return pytree.tree_map(lambda shape: draw(*lead, *shape), SHAPES, is_leaf=is_shape)


def normal(seed):
    return Make(torch.float64, DEVICE, seed).normal


def rates(*shape):
    return Make(torch.float64, DEVICE, len(shape)).uniform(0.01, 1, *shape)


def floats():
    values = iter((0.1, 0.2, 0.3))
    return tree(lambda *shape: next(values))


LR = {
    "float": lambda: 0.1,
    "int": lambda: 1,
    "0-dim": lambda: rates(),
    "one element": lambda: rates(1),
    "one element of two dimensions": lambda: rates(1, 1),
    "per task": lambda: rates(T),
    "tree of equal floats": lambda: tree(lambda *shape: 0.1),
    "tree of floats": floats,
    "tree of 0-dim": lambda: tree(lambda *shape: rates()),
    "per element": lambda: tree(rates),
    "per element and task": lambda: tree(rates, T),
    "mixed": lambda: {"body": [{"weight": rates(4, 2), "bias": 0.3}], "scale": rates(T)},
}


def by_loop(params, grads, lr):
    """p - lr * g, one parameter of one task at a time."""
    flat, structure = pytree.tree_flatten(params)
    shapes = pytree.tree_leaves(SHAPES, is_leaf=is_shape)
    lrs = pytree.tree_leaves(lr)
    lrs = lrs * len(flat) if len(lrs) == 1 else lrs

    def of_task(value, shape, t):
        return value[t] if value.dim() > len(shape) else value

    def rate_of_task(rate, shape, t):
        if not isinstance(rate, torch.Tensor) or rate.numel() == 1:
            return rate if not isinstance(rate, torch.Tensor) else rate.reshape(())
        if isinstance(lr, torch.Tensor):
            return rate[t]
        return of_task(rate, shape, t)

    fast = [
        torch.stack([of_task(p, s, t) - rate_of_task(r, s, t) * of_task(g, s, t) for t in range(T)])
        for p, g, r, s in zip(flat, pytree.tree_leaves(grads), lrs, shapes, strict=True)
    ]
    return pytree.tree_unflatten(fast, structure)


def leaves_of(*trees):
    return [leaf.requires_grad_() for leaf in pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("per_task", ["grads", "params", "both"])
@pytest.mark.parametrize("form", LR)
def test_every_form_of_the_rate_equals_a_loop(form, per_task):
    params = tree(normal(1), *[T] * (per_task != "grads"))
    grads = tree(normal(2), *[T] * (per_task != "params"))
    lr = LR[form]()
    leaves = leaves_of(params, grads, lr)
    results = []
    for function in (fast_weight_update, by_loop):
        fast = function(params, grads, lr)
        cotangents = pytree.tree_leaves(tree(normal(3), T))
        total = sum((f * c).sum() for f, c in zip(pytree.tree_leaves(fast), cotangents, strict=True))
        results.append((fast, torch.autograd.grad(total, leaves)))
    (ours, our_gradients), (truth, gradients) = results
    assert pytree.tree_structure(ours) == pytree.tree_structure(truth)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(truth), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for leaf, a, b in zip(leaves, our_gradients, gradients, strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, b, **CLOSE)


def test_without_a_task_dimension_shapes_stay():
    params, grads = tree(normal(1)), tree(normal(2))
    for lr in (0.1, rates(), tree(rates)):
        fast = fast_weight_update(params, grads, lr)
        lrs = pytree.tree_leaves(lr) * (1 if isinstance(lr, dict) else 3)
        flat = zip(*(pytree.tree_leaves(part) for part in (fast, params, grads)), lrs, strict=True)
        for ours, p, g, r in flat:
            torch.testing.assert_close(ours, p - r * g, **CLOSE)


def test_rates_per_element_and_task_of_what_the_tasks_share():
    param, grad, lr = normal(1)(4, 2), normal(2)(4, 2), rates(T, 4, 2)
    fast = fast_weight_update([param], [grad], [lr])[0]
    torch.testing.assert_close(fast, param - lr * grad, **CLOSE)


@pytest.mark.parametrize("shape", [(), (1,), (T,), (4, 2), (2, 1, 3)])
def test_one_tensor_in_place_of_a_tree(shape):
    param, grad = normal(1)(*shape), normal(2)(T, *shape)
    for lr in (0.1, rates()):
        torch.testing.assert_close(fast_weight_update(param, grad, lr), param - lr * grad, **CLOSE)
    if shape != (T,):  # there [T] may mean either, and is refused
        per_task = rates(T).reshape(T, *[1] * len(shape))
        torch.testing.assert_close(fast_weight_update(param, grad, rates(T)), param - per_task * grad, **CLOSE)
    lr = rates(T, *shape)
    torch.testing.assert_close(fast_weight_update(param, grad, lr), param - lr * grad, **CLOSE)


def test_containers_come_back_as_they_came():
    pair = (normal(1)(T, 2), [normal(2)(T, 3)], {"a": normal(3)(T)})
    fast = fast_weight_update(pair, pair, 0.5)
    assert pytree.tree_structure(fast) == pytree.tree_structure(pair)
    for a, b in zip(pytree.tree_leaves(fast), pytree.tree_leaves(pair), strict=True):
        torch.testing.assert_close(a, b / 2, **CLOSE)
    assert fast_weight_update({}, {}, 0.1) == {}


def test_rate_0_gives_a_copy():
    """An output that aliases a parameter would follow the optimiser's step in place."""
    param, grad = normal(1)(T, 4), normal(2)(T, 4)
    before, fast = param.clone(), fast_weight_update(param, grad, 0.0)
    param.add_(1)
    assert torch.equal(fast, before)


def test_rates_of_a_tree_keep_the_precision_of_the_parameters():
    one = torch.ones(T, 1, dtype=torch.float64, device=DEVICE)
    fast = fast_weight_update([one, one], [one, one], [0.1, 0.2])
    assert fast[0][0].item() == 0.9 and fast[1][0].item() == 0.8


@pytest.mark.parametrize("learned", ["0-dim", "per element"])
def test_maml_by_hand_has_the_meta_gradient_of_plain_autograd(learned):
    """Two inner steps from shared weights, with a learned rate: gradient to the weights and to the rate."""
    draw = normal(0)
    weights = [draw(4, 3), draw(2, 4)]
    lr = [rates() / 4 if learned == "0-dim" else rates(*w.shape) / 4 for w in weights]
    support, target, query, query_target = draw(T, 5, 3), draw(T, 5, 2), draw(T, 6, 3), draw(T, 6, 2)
    leaves = leaves_of(weights, lr)

    def loss(fast, x, y):
        return (functional_mlp(x, fast, None, "tanh") - y).square().mean((1, 2)).sum()

    slow, fast = weights, [w.expand(T, *w.shape) for w in weights]
    for _ in range(2):
        grads = torch.autograd.grad(loss(fast, support, target), fast, create_graph=True)
        slow = fast = fast_weight_update(slow, list(grads), lr)  # the first step starts from what the tasks share
    ours = torch.autograd.grad(loss(fast, query, query_target), leaves)

    def plain_loss(fast, x, y):
        return (torch.tanh(x @ fast[0].T) @ fast[1].T - y).square().mean()

    total = 0
    for t in range(T):
        fast = weights
        for _ in range(2):
            grads = torch.autograd.grad(plain_loss(fast, support[t], target[t]), fast, create_graph=True)
            fast = [w - r * g for w, g, r in zip(fast, grads, lr, strict=True)]
        total = total + plain_loss(fast, query[t], query_target[t])
    for a, b in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
