"""`sgd_step` and `adam_step`: against torch's optimisers, a loop over tasks, and differences."""

import re

import pytest
import torch
from conftest import DEVICE
from torch.utils import _pytree as pytree

from fastmeta.functional import adam_step, sgd_step
from fastmeta.functional.update_rules import root

T = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.2},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True},
}
ADAM = {
    "plain": {},
    "decay": {"weight_decay": 0.2, "eps": 1e-3},
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.6)},
    "AdamW": {"decoupled": True, "weight_decay": 0.3},
}
STEPS = [(sgd_step, name) for name in SGD] + [(adam_step, name) for name in ADAM]
each_step = pytest.mark.parametrize("step, name", STEPS, ids=lambda value: getattr(value, "__name__", value))


def settings(step, name):
    return {"lr": 0.1, **(SGD if step is sgd_step else ADAM)[name]}


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)


def tree(*lead, seed=0):
    return {"w": draw(*lead, 4, 2, seed=seed), "b": [draw(*lead, 4, seed=seed + 1), draw(*lead, seed=seed + 2)]}


def taken(step, params, grads, **given):
    """Some steps with gradients that depend on the weights, so that a derivative passes through all of them."""
    state = None
    for i in range(3):
        grads_here = pytree.tree_map(lambda p, g, i=i: g + (0.3 + 0.2 * i) * p.sin(), params, grads)
        params, state = step(params, grads_here, state, **given)
    return params, state


@each_step
def test_equals_torch(step, name):
    params, given = tree(), settings(step, name)
    weights = [p.clone() for p in pytree.tree_leaves(params)]
    kind = torch.optim.AdamW if given.pop("decoupled", False) else torch.optim.Adam
    kind = torch.optim.SGD if step is sgd_step else kind
    opt = kind(weights, **({"weight_decay": 0.0} | given))
    given = settings(step, name)
    state = None
    for i in range(4):
        grads = tree(seed=10 * i + 10)
        for p, g in zip(weights, pytree.tree_leaves(grads), strict=True):
            p.grad = g
        opt.step()
        params, state = step(params, grads, state, **given)
        for ours, p in zip(pytree.tree_leaves(params), weights, strict=True):
            torch.testing.assert_close(ours, p, **CLOSE)
    assert (state is None) == (step is sgd_step and "momentum" not in given)


HYPER = {
    sgd_step: {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.3},
    adam_step: {"lr": 0.1, "betas": (0.6, 0.8), "eps": 0.01, "weight_decay": 0.3},
}
DOUBLE = {"dtype": torch.float64, "device": DEVICE}
FORMS = {
    "one number": lambda value: value,
    "one element": lambda value: torch.tensor(value, **DOUBLE),
    "per task": lambda value: value + torch.arange(T, **DOUBLE) / 20,
    "per tensor": lambda value: {"w": value, "b": [torch.tensor([value + 0.05], **DOUBLE), value]},
    "per element": lambda value: pytree.tree_map(lambda s: value + 0.1 * torch.sigmoid(s), tree(seed=5)),
    "per task and element": lambda value: pytree.tree_map(lambda s: value + 0.1 * torch.sigmoid(s), tree(T, seed=6)),
}


def of_task(hyper, t):
    """A hyper-parameter as task `t` alone has it, in the structure of its parameters."""
    shapes = pytree.tree_map(lambda p: p.shape, tree())
    if not isinstance(hyper, dict):
        mine = hyper[t] if isinstance(hyper, torch.Tensor) and hyper.dim() else hyper
        return pytree.tree_map(lambda s: mine, shapes, is_leaf=lambda s: isinstance(s, torch.Size))
    return pytree.tree_map(
        lambda h, p: h[t] if isinstance(h, torch.Tensor) and h.dim() > p.dim() and h.numel() > 1 else h, hyper, tree()
    )


@pytest.mark.parametrize("step", HYPER, ids=lambda step: step.__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_form_of_hyper_parameters_equals_a_loop(step, form, shared):
    params, grads = tree(*[T] * (not shared)), tree(T, seed=3)
    hyper = {key: pytree.tree_map(FORMS[form], value) for key, value in HYPER[step].items()}
    leaves = [leaf for leaf in pytree.tree_leaves((params, grads, hyper)) if isinstance(leaf, torch.Tensor)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ours = pytree.tree_leaves(taken(step, params, grads, **hyper)[0])
    alone = []
    for t in range(T):
        mine = {
            key: tuple(of_task(v, t) for v in value) if key == "betas" else of_task(value, t)
            for key, value in hyper.items()
        }
        start = params if shared else pytree.tree_map(lambda p, t=t: p[t], params)
        alone.append(pytree.tree_leaves(taken(step, start, pytree.tree_map(lambda g, t=t: g[t], grads), **mine)[0]))
    truth = [torch.stack(of) for of in zip(*alone, strict=True)]
    weights = [draw(*o.shape, seed=9) for o in ours]
    sums = [sum((o * w).sum() for o, w in zip(outs, weights, strict=True)) for outs in (ours, truth)]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(*(torch.autograd.grad(total, leaves) for total in sums), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("step", HYPER, ids=lambda step: step.__name__)
def test_as_many_tasks_as_elements(step):
    """One tensor `[T]` for all parameters is of each task; in the place of one parameter it is of each element."""
    p, g, rates = draw(T, T), draw(T, T, seed=1), torch.arange(1, T + 1, **DOUBLE) / 10
    plain = step([p], [g], lr=1.0)[0][0] - p
    torch.testing.assert_close(step([p], [g], lr=rates)[0][0], p + rates[:, None] * plain, **CLOSE)
    torch.testing.assert_close(step([p], [g], lr=[rates])[0][0], p + rates * plain, **CLOSE)


@each_step
def test_derivatives_are_those_of_differences(step, name):
    """Twice, with respect to weights, gradients and every hyper-parameter, at 0 too."""
    given = settings(step, name)
    betas = given.pop("betas", (0.7, 0.8))
    numbers = {k: v for k, v in given.items() if not isinstance(v, bool)}
    flags = {k: v for k, v in given.items() if isinstance(v, bool)}
    if step is adam_step:
        numbers |= {"beta1": betas[0], "beta2": betas[1], "eps": 0.1}
    if not flags:
        numbers.setdefault("weight_decay", 0.0)
    values = [torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in numbers.values()]

    def function(p, g, *values):
        hyper = dict(zip(numbers, values, strict=True))
        if step is adam_step:
            hyper["betas"] = hyper.pop("beta1"), hyper.pop("beta2")
        return taken(step, [p], [g], **hyper, **flags)[0][0]

    p, g = draw(2, 3, seed=1).requires_grad_(), draw(2, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(function, (p, g, *values))
    assert torch.autograd.gradgradcheck(function, (p, g, *values), atol=1e-4)


@pytest.mark.parametrize("name", ADAM)
def test_where_no_gradient_has_come(name):
    """At v = 0 the step has the derivative that it tends to, `lr (1 - beta1) / (c1 eps)` with respect to g."""
    given = {"eps": 1e-8, **settings(adam_step, name), "weight_decay": 0.0}
    p = torch.ones(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    g = torch.tensor([0.0, 0.5], dtype=torch.float64, device=DEVICE, requires_grad=True)
    moved, state = adam_step([p], [g], **given)
    (d,) = torch.autograd.grad(moved[0].sum(), g, create_graph=True)
    assert d[0].item() == pytest.approx(-0.1 / given["eps"])
    moved, _ = adam_step(moved, [g], state, **given)
    d = torch.autograd.grad(moved[0].sum(), [p, g], create_graph=True)
    beta1 = given.get("betas", (0.9,))[0]
    assert d[1][0].item() == pytest.approx(-0.1 / given["eps"] * 2)
    assert torch.equal(d[0], torch.ones_like(p)) and 0 < beta1 < 1
    (again,) = torch.autograd.grad(d[1].sum(), g)
    assert again[0] == 0 and again.isfinite().all()


@each_step
def test_masks(step, name):
    """What does not adapt stays, whatever its gradient, and lets derivatives pass."""
    params, given = [draw(T, 4), draw(T, 2), draw(T, 5)], settings(step, name)
    grads = [draw(T, 4, seed=1), draw(T, 2, seed=2), draw(T, 5, seed=3)]
    elements = torch.tensor([True, False, True, True], device=DEVICE)
    tasks = torch.tensor([True, False, True], device=DEVICE)
    bad = [torch.where(elements, grads[0], torch.nan), grads[1] * torch.nan]
    bad.append(torch.where(tasks[:, None], grads[2], torch.inf))
    leaves = [p.requires_grad_() for p in params]
    everywhere, state = params, None
    masked, masked_state = params, None
    for _ in range(2):
        everywhere, state = step(everywhere, grads, state, **given)
        masked, masked_state = step(masked, bad, masked_state, mask=[elements, False, tasks], **given)
    expected = [
        torch.where(elements, everywhere[0], params[0]), params[1],
        torch.where(tasks[:, None], everywhere[2], params[2]),
    ]  # fmt: skip
    for ours, truth in zip(masked, expected, strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)
    for ours, truth in zip(
        *(torch.autograd.grad(sum(t.square().sum() for t in of), leaves) for of in (masked, expected)), strict=True
    ):
        torch.testing.assert_close(ours, truth, **CLOSE)
    assert masked[1] is not params[1]
    assert all(t.isfinite().all() for t in pytree.tree_leaves(masked_state) if isinstance(t, torch.Tensor))
    one = step(params, grads, mask=tasks, **given)[0]
    assert all(torch.equal(a[1], p[1]) and not torch.equal(a[0], p[0]) for a, p in zip(one, params, strict=True))


@each_step
def test_transforms(step, name):
    """Mapped over tasks, and in forward mode."""
    params, grads, given = draw(T, 4, 2), draw(T, 4, 2, seed=1), settings(step, name)

    def function(p, g):
        return taken(step, p, g, **given)[0]

    torch.testing.assert_close(torch.func.vmap(function)(params, grads), function(params, grads), **CLOSE)
    _, tangent = torch.func.jvp(function, (params, grads), (grads, params))
    leaves = [params.requires_grad_(), grads.requires_grad_()]
    out = function(*leaves)
    back = torch.autograd.grad((out * out.detach()).sum(), leaves)
    along = (back[0] * grads).sum() + (back[1] * params).sum()
    torch.testing.assert_close((tangent * out).sum(), along, **CLOSE)


P, G = [torch.ones(2, 3, device=DEVICE)], [torch.ones(2, 3, device=DEVICE)]
SQUARE = torch.ones(2, 2, device=DEVICE)


@pytest.mark.parametrize(
    "step, changes, error, text",
    [
        (sgd_step, {"grads": P * 2}, ValueError, "grads must have the structure of params"),
        (sgd_step, {"grads": [None]}, TypeError, "grads[0] must be a tensor, got NoneType"),
        (sgd_step, {"grads": [P[0].T]}, ValueError, "grads[0] must have the shape of params[0]"),
        (sgd_step, {"grads": [G[0].double()]}, TypeError, "grads[0] is float64"),
        (sgd_step, {"lr": "0.1"}, TypeError, "lr must be a number, got str"),
        (sgd_step, {"lr": torch.ones(5, device=DEVICE)}, ValueError, "lr for params[0] must have one element"),
        (sgd_step, {"lr": torch.ones(2, 3, device=DEVICE)}, ValueError, "lr as one tensor must have one element or"),
        (sgd_step, {"lr": {"w": 0.1}}, ValueError, "lr must be for all parameters, or have their structure"),
        (sgd_step, {"momentum": -0.5}, ValueError, "momentum must be at least 0.0, got -0.5"),
        (sgd_step, {"nesterov": True}, ValueError, "nesterov needs a momentum and no dampening"),
        (sgd_step, {"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        (sgd_step, {"buffers": P * 2}, ValueError, "buffers must have the structure of params"),
        (sgd_step, {"buffers": [P[0].T], "momentum": 0.5}, ValueError, "buffers of params[0] must have shape [2, 3]"),
        (sgd_step, {"mask": [1]}, TypeError, "mask of params[0] must be True or False, got 1"),
        (sgd_step, {"mask": [P[0]]}, TypeError, "mask of params[0] must be bool, got float32"),
        (sgd_step, {"params": SQUARE, "grads": SQUARE, "lr": SQUARE[0]}, ValueError, "per task or per element"),
        (adam_step, {"betas": 0.9}, TypeError, "betas must be a pair, got 0.9"),
        (adam_step, {"betas": (0.9, 1.0)}, ValueError, "betas[1] must be below 1.0, got 1.0"),
        (adam_step, {"eps": -1.0}, ValueError, "eps must be at least 0.0, got -1.0"),
        (adam_step, {"state": P}, TypeError, "state must be what adam_step has returned, or None, got list"),
        (adam_step, {"amsgrad": None}, TypeError, "amsgrad must be True or False, got None"),
        (adam_step, {"decoupled": "yes"}, TypeError, "decoupled must be True or False, got 'yes'"),
    ],
)
def test_wrong_arguments(step, changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        step(**({"params": P, "grads": G, "lr": 0.1} | changes))


def test_nothing_to_step():
    assert sgd_step([], [], lr=0.1) == ([], None)
    assert adam_step({}, {})[0] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_root(dtype):
    v = torch.tensor([0.0, 0.25, 9.0], dtype=dtype, device=DEVICE, requires_grad=True)
    out = root(v)
    assert torch.equal(out + 1e-8, torch.tensor([0.0, 0.5, 3.0], dtype=dtype, device=DEVICE) + 1e-8)
    (first,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    assert first[:2].tolist() == [0.0, 1.0] and second[:2].tolist() == [0.0, -2.0]


def test_compiled_whole_for_any_number_of_tasks():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(p, g, rates):
        moved, state = adam_step([p], [g], lr=rates)
        moved, _ = adam_step(moved, [g], state, lr=rates)
        return sgd_step({"w": moved[0]}, {"w": g}, lr=0.1, momentum=0.9)[0]["w"]

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for tasks in (5, 7, 9):
        p, g, rates = draw(tasks, 4), draw(tasks, 4, seed=1), draw(tasks, seed=2).requires_grad_()
        results = [torch.autograd.grad(f(p, g, rates).sum(), rates)[0] for f in (compiled, function)]
        torch.testing.assert_close(*results, **CLOSE)
    assert len(graphs) <= 2  # the second is of any size
