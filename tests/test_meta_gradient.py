"""The reverse sweep for any module, against plain autograd through the unrolled inner loop."""

import gc
import re
import weakref

import module_kinds
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fastmeta import functional
from fastmeta.functional import meta_gradient, meta_loss
from fastmeta.functional.reverse_sweep import InnerLoop
from fastmeta.testing import relative_error, tolerance

STEPS = 4


def close(found, truth, dtype=torch.float64, reference=None):
    """All tensors of two pytrees of one structure; those of `reference` are what plain autograd gives in `dtype`."""
    found, structure = pytree.tree_flatten(found)
    truth, truth_structure = pytree.tree_flatten(truth)
    assert structure == truth_structure
    references = truth if reference is None else pytree.tree_leaves(reference)
    for value, right, same_dtype in zip(found, truth, references, strict=True):
        assert (value is None) == (right is None)
        if value is not None:
            assert value.dtype == dtype and not value.requires_grad
            assert relative_error(value, right) <= tolerance(dtype, 2, relative_error(same_dtype, right))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(count, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (count,), generator=g)


def randomly(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2).requires_grad_()


def loss_of(model):
    return lambda params, x, y: F.cross_entropy(functional_call(model, params, (x,)), y)


def unrolled(inner, outer, params, rate, steps, *, momentum=0.0, weight_decay=0.0, first_order=False):
    """Outer loss with the graph of all steps, and the weights. `inner(weights, step)`, `outer(weights)`; `params` is a
    dict, `rate(step, name)` what broadcasts against its parameter."""
    weights, momenta, losses = dict(params), {}, []
    for step in range(steps):
        losses.append(inner(weights, step))
        found = torch.autograd.grad(losses[-1], list(weights.values()), create_graph=not first_order, allow_unused=True)
        for (name, w), g in zip(list(weights.items()), found, strict=True):
            g = (torch.zeros_like(w) if g is None else g) + weight_decay * w
            momenta[name] = momentum * momenta[name] + g if name in momenta else g
            weights[name] = w - rate(step, name) * momenta[name]
    return outer(weights), weights, losses


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, materialize_grads=True)


# modules --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", module_kinds.KINDS)
def test_any_module(kind):
    model, batch = module_kinds.make(kind), module_kinds.tasks(kind)
    losses, predictions, right = module_kinds.plain(model, [t[:1] for t in batch], lr=0.3, steps=3)
    params = dict(model.named_parameters())

    def inner(weights, x, y):
        return F.cross_entropy(module_kinds.run(model, weights, x), y)

    def outer(weights, x, y):
        logits = module_kinds.run(model, weights, x)
        return F.cross_entropy(logits, y), logits

    sx, sy, qx, qy = (t[0] for t in batch)
    found = meta_gradient(
        inner, outer, params, lr=0.3, steps=3, inner_args=(sx, sy), outer_args=(qx, qy), every=2, has_aux=True
    )
    close(found.loss, losses[0])
    close(found.aux, predictions[0])
    close({name: g for name, g in found.gradient.items() if g is not None}, right)
    assert all(params[name].requires_grad == (g is not None) for name, g in found.gradient.items())
    assert all(p.grad is None for p in params.values())


def test_checkpointed_activations():
    """They run again with the weights of their step; where they would not, it is an error, in the outer loss too."""
    model, batch = module_kinds.make("checkpointed"), [t[:1] for t in module_kinds.tasks("checkpointed")]
    _, _, right = module_kinds.plain(model, batch, lr=0.3, steps=3)
    sx, sy, qx, qy = (t[0] for t in batch)
    call = {"lr": 0.3, "steps": 3, "inner_args": (sx, sy), "outer_args": (qx, qy)}
    params = dict(model.named_parameters())

    def safe(params, x, y):
        return F.cross_entropy(functional.functional_call(model, params, x), y)

    def by_hand(params, x, y):  # the weights are at hand whenever it runs
        names, weights = zip(*params.items(), strict=True)
        model.saving = False
        run = checkpoint(
            lambda *weights: functional_call(model, dict(zip(names, weights, strict=True)), (x,)), *weights,
            use_reentrant=False,
        )  # fmt: skip
        return F.cross_entropy(run, y)

    close(meta_gradient(safe, safe, params, **call).gradient, right)
    for losses in ((loss_of(model), safe), (safe, loss_of(model))):
        with pytest.raises(RuntimeError, match="take fastmeta.functional.functional_call"):
            meta_gradient(*losses, params, **call)
    close(meta_gradient(by_hand, by_hand, params, **call).gradient, right)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps, every", [(0, 1), (1, 1), (1, 5), (2, 1), (2, 2), (5, 2), (5, 3), (7, 1), (7, 7)])
def test_steps_and_spacings(steps, every, first_order):
    """With rates per step and a momentum, so that an adjoint in the wrong step shows."""
    model, (sx, sy), (qx, qy) = net(), rows(5, 1), rows(8, 2)
    params, loss = dict(model.named_parameters()), loss_of(model)
    lr = torch.linspace(0.1, 0.6, steps, dtype=torch.float64, requires_grad=True)
    options = {"momentum": 0.7, "weight_decay": 0.1, "first_order": first_order}
    value, weights, losses = unrolled(
        lambda w, k: loss(w, sx, sy), lambda w: loss(w, qx, qy), params, lambda k, name: lr[k], steps, **options
    )
    *of_params, of_lr = gradients(value, [*params.values(), lr])
    found = meta_gradient(
        loss, loss, params, lr=lr, steps=steps, inner_args=(sx, sy), outer_args=(qx, qy), every=every, **options
    )
    close(found.loss, value)
    close(found.gradient, dict(zip(params, of_params, strict=True)))
    close(found.lr_gradient, of_lr)
    close(found.params, {name: w.detach() for name, w in weights.items()})
    close(list(found.inner_losses), losses)
    assert not first_order or steps == 0 or not torch.equal(found.gradient["0.weight"], 0 * of_params[0])


def test_tasks_at_once():
    """What an engine may do: weights `[T, ...]`, the sum of the tasks' losses, and a rate for each task."""
    g = torch.Generator().manual_seed(0)
    sx, sy, qx, qy = (torch.randn(3, rows, 2, generator=g, dtype=torch.float64) for rows in (5, 5, 8, 8))
    slow, rate = torch.randn(2, 2, generator=g, dtype=torch.float64), randomly(3, 1, 1)

    def loss(w, x, y):
        return (torch.tanh(x @ w.mT) - y).square().mean((-2, -1))

    loop = InnerLoop(lambda weights, step: loss(weights[0], sx, sy).sum(), [[rate]] * 3, every=2)
    adapted = loop.adapt([slow.expand(3, 2, 2)])
    value, adjoint, of_also = loop.outer_gradient(lambda weights: loss(weights[0], qx, qy).sum(), adapted, [])
    swept = loop.sweep(adjoint, [], of_also)
    for task in range(3):
        w, lr = slow.clone().requires_grad_(), rate[task, 0, 0].detach().requires_grad_()
        alone = meta_gradient(
            loss, loss, w, lr=lr, steps=3, inner_args=(sx[task], sy[task]), outer_args=(qx[task], qy[task])
        )
        close(swept.gradients[0][task], alone.gradient)
        close(swept.rate_gradients[0][1][task].reshape(()), alone.lr_gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_nothing_is_recorded(mode):
    model, data = net(), rows(5, 1)
    call = {"lr": 0.3, "steps": 2, "inner_args": data, "outer_args": data}
    params, loss = dict(model.named_parameters()), loss_of(model)
    right = meta_gradient(loss, loss, params, **call)
    with mode():
        found = meta_gradient(loss, loss, params, **call)
    assert all(torch.equal(found.gradient[name], g) for name, g in right.gradient.items())
    assert not found.loss.is_inference()


# data and parameters --------------------------------------------------------------------------------------------------
def test_data_of_each_step():
    model, batches, (qx, qy) = net(), [rows(4, k) for k in range(STEPS)], rows(8, 9)
    params, loss = dict(model.named_parameters()), loss_of(model)
    value, _, _ = unrolled(
        lambda w, k: 1.5 * loss(w, *batches[k]), lambda w: loss(w, qx, qy), params, lambda k, name: 0.3, STEPS
    )
    found = meta_gradient(
        lambda p, scale, x, y: scale * loss(p, x, y), loss, params, lr=0.3, steps=STEPS, inner_args=(1.5,),
        batches=batches, outer_args=(qx, qy), every=3,
    )  # fmt: skip
    close(list(found.gradient.values()), list(gradients(value, list(params.values()))))


def test_any_pytree():
    """What does not adapt is handed on as it is; a tensor in two places is one parameter."""
    torch.manual_seed(0)
    a, b = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fixed, index = torch.randn(3, dtype=torch.float64), torch.tensor([2, 0, 1])
    x = torch.randn(5, 3, dtype=torch.float64)

    def energy(p):
        first, (second, third) = p["first"], p["rest"]
        assert first is p["again"] and third["fixed"] is fixed and third["name"] == "n" and p["none"] is None
        h = torch.tanh(x @ first @ second + third["fixed"])[:, third["index"]]
        return (h @ p["again"] + h.sum() * third["unused"].sum() * 0).square().sum() / 10

    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    third = {"fixed": fixed, "index": index, "name": "n", "unused": unused}
    params = {"first": a, "again": a, "none": None, "rest": (b, third)}

    def plain(w, step=0):
        return energy({"first": w["a"], "again": w["a"], "none": None, "rest": (w["b"], third)})

    value, weights, _ = unrolled(plain, plain, {"a": a, "b": b}, lambda k, name: 0.1, 3)
    of_a, of_b = gradients(value, [a, b])
    found = meta_gradient(energy, energy, params, lr=0.1, steps=3)
    none = {"fixed": None, "index": None, "name": None, "unused": torch.zeros_like(unused)}
    close(found.gradient, {"first": of_a, "again": of_a, "none": None, "rest": (of_b, none)})
    close(found.params["rest"][0], weights["b"].detach())
    assert found.params["rest"][1]["index"] is index
    meta_loss(energy, energy, params, lr=0.1, steps=3).backward()
    close(a.grad, of_a)  # once


def test_a_list_and_a_tensor():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    value, _, _ = unrolled(
        lambda p, k: (p["w"] ** 4).sum(), lambda p: (p["w"] ** 3).sum(), {"w": w}, lambda k, name: 0.05, 3
    )
    right = gradients(value, [w])[0]
    close(meta_gradient(lambda p: (p**4).sum(), lambda p: (p**3).sum(), w, lr=0.05, steps=3).gradient, right)
    found = meta_gradient(lambda p: (p[0] ** 4).sum(), lambda p: (p[0] ** 3).sum(), [w], lr=0.05, steps=3)
    close(found.gradient, [right])


def test_a_linear_loss_has_no_second_derivative():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = meta_gradient(lambda p: p.sum(), lambda p: p.square().sum(), w, lr=0.25, steps=2)
    close(found.gradient, torch.ones(3, dtype=torch.float64))
    found = meta_gradient(lambda p: (p * theta).sum(), lambda p: p.square().sum(), w, lr=0.25, steps=2, also=theta)
    close(found.also_gradient, -0.5 * torch.ones(3, dtype=torch.float64))


def test_float32_and_the_same_bits_again():
    def run(dtype, function):
        model, (sx, sy), (qx, qy) = net(dtype), rows(5, 1, dtype), rows(8, 2, dtype)
        return function(dict(model.named_parameters()), loss_of(model), (sx, sy), (qx, qy))

    def plain(params, loss, support, query):
        value, _, _ = unrolled(
            lambda w, k: loss(w, *support), lambda w: loss(w, *query), params, lambda k, name: 0.3, STEPS
        )
        return list(gradients(value, list(params.values())))

    def swept(params, loss, support, query, every=1):
        found = meta_gradient(
            loss, loss, params, lr=0.3, steps=STEPS, inner_args=support, outer_args=query, every=every
        )
        return list(found.gradient.values())

    truth, reference = run(torch.float64, plain), run(torch.float32, plain)
    found = run(torch.float32, swept)
    close(found, truth, torch.float32, reference)
    for every in (1, 2, STEPS):
        again = run(torch.float32, lambda *args, every=every: swept(*args, every=every))
        assert all(map(torch.equal, found, again))


def test_autocast():
    """As plain autograd under it, and no copy of a step's weights stays behind."""
    model, data = net(torch.float32), rows(5, 1, torch.float32)
    params, loss, seen, alive = dict(model.named_parameters()), loss_of(model), [], []

    def inner(weights, x, y):
        alive.append(sum(w() is not None for w in seen))
        seen.append(weakref.ref(weights["0.weight"]))
        return loss(weights, x, y)

    with torch.autocast("cpu", torch.bfloat16):
        value, _, _ = unrolled(
            lambda w, k: loss(w, *data), lambda w: loss(w, *data), params, lambda k, name: 0.3, STEPS
        )
        right = gradients(value, list(params.values()))
        found = meta_gradient(inner, loss, params, lr=0.3, steps=STEPS, inner_args=data, outer_args=data)
    for g, r in zip(found.gradient.values(), right, strict=True):
        assert g.dtype == torch.float32
        assert relative_error(g, r) <= tolerance(torch.bfloat16, 1, 0)
    assert max(alive) <= 1


# random numbers and what must not change ------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 3])
def test_dropout(every):
    """The same numbers as the unrolled loop draws, in both passes, and the generator is left where it leaves it."""
    model, (sx, sy), (qx, qy) = net(), rows(5, 1), rows(8, 2)
    model.insert(2, nn.Dropout(0.4))
    params, loss = dict(model.named_parameters()), loss_of(model)
    torch.manual_seed(5)
    value, _, _ = unrolled(
        lambda w, k: loss(w, sx, sy), lambda w: loss(w, qx, qy), params, lambda k, name: 0.3, STEPS
    )
    right, after = gradients(value, list(params.values())), torch.get_rng_state()
    call = {"lr": 0.3, "steps": STEPS, "inner_args": (sx, sy), "outer_args": (qx, qy), "every": every}
    torch.manual_seed(5)
    found = meta_gradient(loss, loss, params, **call)
    close(list(found.gradient.values()), list(right))
    assert torch.equal(torch.get_rng_state(), after)
    with pytest.raises(RuntimeError, match="inner_loss must give the same again .* preserve_rng_state=True"):
        meta_gradient(loss, loss, params, preserve_rng_state=False, **call)


def test_a_loss_that_changes_is_refused():
    """Data drawn in the loss, and buffers that its value depends on."""
    model, data = module_kinds.make("spectral norm"), [t[0] for t in module_kinds.tasks("spectral norm")]
    drawn = torch.Generator().manual_seed(0)

    def augmented(params, x, y):
        noise = torch.randn(x.shape, generator=drawn, dtype=x.dtype)
        return loss_of(net())(params, x + noise, y)

    with pytest.raises(RuntimeError, match="inner_loss must give the same again .* in step 1 it was"):
        meta_gradient(
            augmented, loss_of(net()), dict(net().named_parameters()), lr=0.1, steps=2, inner_args=rows(5, 1),
            outer_args=rows(5, 1),
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="spectral norm in train mode"):
        meta_gradient(
            loss_of(model), loss_of(model), dict(model.named_parameters()), lr=0.1, steps=2, inner_args=data[:2],
            outer_args=data[2:],
        )  # fmt: skip


def test_not_a_number_passes():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    found = meta_gradient(lambda p: (p**3).sum() * 1e20, lambda p: p.sum(), w, lr=1.0, steps=3)
    assert found.inner_losses[0].isfinite() and not found.inner_losses[1:].isfinite().any()
    assert not found.gradient.isfinite().all()


# memory ---------------------------------------------------------------------------------------------------------------
class Saved:
    """The most elements that graphs held at once."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        holder = [tensor.detach()]
        return _Held(self, holder)

    def watch(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.holder[0])


class _Held:
    def __init__(self, counter, holder):
        self.counter, self.holder = counter, holder

    def __del__(self):
        self.counter.now -= self.holder[0].numel()


def test_graphs_do_not_grow_with_the_steps():
    model, data = net(), rows(50, 1)
    params, loss = dict(model.named_parameters()), loss_of(model)

    def plain(steps):
        value, _, _ = unrolled(
            lambda w, k: loss(w, *data), lambda w: loss(w, *data), params, lambda k, name: 0.1, steps
        )
        gradients(value, list(params.values()))

    def swept(steps):
        meta_gradient(loss, loss, params, lr=0.1, steps=steps, inner_args=data, outer_args=data)

    def most(run, steps):
        saved = Saved()
        with saved.watch():
            run(steps)
        return saved.most

    assert most(plain, 9) > 3 * most(plain, 2)
    assert most(swept, 9) == most(swept, 2) <= most(plain, 2)


@pytest.mark.parametrize("steps, every, most", [(16, 1, 16), (16, 4, 4 + 4), (3, 16, 1 + 3), (16, 16, 1 + 16)])
def test_weights_that_are_held(steps, every, most):
    """At most K / every + every sets of weights, a few of which are of the step at hand."""
    w = torch.ones(37, 11, requires_grad=True)
    counts = []

    def inner(p):
        of_size = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (37, 11)]
        counts.append(len({t.data_ptr() for t in of_size}))
        return (p**2).sum() / 2

    gc.collect()
    gc.freeze()  # what was there before is not looked at
    try:
        meta_gradient(inner, inner, w, lr=0.1, steps=steps, every=every)
    finally:
        gc.unfreeze()
    assert max(counts) <= most + 3
    assert steps <= every or max(counts) >= most - 1


# errors ---------------------------------------------------------------------------------------------------------------
W = torch.ones(2, 3, requires_grad=True)
SLOW = torch.ones(3, requires_grad=True)


def energy(p):
    return (pytree.tree_leaves(p)[0] ** 2).sum()


WRONG = [
    ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
    ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
    ({"every": 0}, ValueError, "every must be at least 1, got 0"),
    ({"momentum": -0.1}, ValueError, "momentum must be at least 0, got -0.1"),
    ({"weight_decay": None}, TypeError, "weight_decay must be a number, got NoneType"),
    ({"first_order": 1}, TypeError, "first_order must be True or False, got 1"),
    ({"inner_loss": None}, TypeError, "inner_loss must be a function, got None"),
    ({"lr": [float("nan")]}, ValueError, "lr must be finite, got nan"),
    ({"params": nn.Linear(1, 1)}, ValueError, "params must hold a floating tensor that requires a gradient, as dict("),
    ({"params": {"w": W.detach()}}, ValueError, "got dict of tensors that require none"),
    ({"lr": "0.1"}, ValueError, "lr must be a float, a tensor, or have the structure of params"),
    ({"lr": {"w": 0.1}}, ValueError, "lr must be a float, a tensor, or have the structure of params"),
    ({"lr": True}, TypeError, "lr must be or hold floats or tensors, got bool for params[0]"),
    ({"lr": [None]}, TypeError, "lr must be or hold floats or tensors, got NoneType for params[0]"),
    ({"lr": torch.tensor([1])}, TypeError, "lr must be float32, float64, float16 or bfloat16, got int64"),
    ({"lr": torch.ones(3)}, ValueError, "lr as one tensor must have one element or shape [K] = [2], got [3]"),
    ({"lr": [torch.ones(2)]}, ValueError, "lr for params[0] must have one element, broadcast against its shape [2, 3]"),
    ({"lr": [torch.ones(3, 1, 1)]}, ValueError, "the first for the K = 2 steps; got [3, 1, 1]"),
    ({"params": [W, W], "lr": [0.1, 0.2]}, ValueError, "lr must be the same wherever params hold the same tensor"),
    ({"inner_args": W}, TypeError, "inner_args must be a tuple of arguments, got Tensor"),
    ({"outer_args": 1}, TypeError, "outer_args must be a tuple of arguments, got int"),
    ({"batches": iter(())}, TypeError, "batches must be a list of tuples, one for each step, got tuple_iterator"),
    ({"batches": [()]}, ValueError, "batches must hold a tuple for each of the 2 steps, got 1"),
    ({"batches": [(), W]}, TypeError, "batches[1] must be a tuple of arguments, got Tensor"),
    ({"also": [SLOW, 1.0]}, TypeError, "also[1] must be a tensor, got float"),
    ({"also": {"a": W.detach()}}, ValueError, "also['a'] must require a gradient"),
    ({"also": [SLOW, SLOW.exp()]}, ValueError, "also[1] is computed from another tensor in it"),
    ({"inner_loss": lambda p: 1.0}, TypeError, "inner_loss must return a floating tensor with one element, got float"),
    ({"outer_loss": lambda p: (energy(p), 1)}, TypeError, "outer_loss must return a floating tensor with one element"),
    ({"outer_loss": energy, "has_aux": True}, TypeError, "outer_loss must return (loss, aux) with has_aux, got Tensor"),
    ({"inner_loss": lambda p: p[0]}, ValueError, "inner_loss must return a tensor with one element, got shape [2, 3]"),
    ({"inner_loss": lambda p: W.sum()}, ValueError, "inner_loss does not depend on the parameters that it is given"),
    ({"outer_loss": lambda p: energy(p).detach()}, ValueError, "outer_loss does not depend on the parameters"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, text", WRONG, ids=[f"{'-'.join(c[0])}-{i}" for i, c in enumerate(WRONG)])
def test_wrong_argument(changes, error, text):
    right = {"inner_loss": energy, "outer_loss": energy, "params": [W], "lr": 0.1, "steps": 2}
    with pytest.raises(error, match=re.escape(text)):
        meta_gradient(**right | changes)


def test_under_transforms():
    with pytest.raises(RuntimeError, match="cannot run under transforms of torch.func"):
        torch.func.vmap(lambda x: meta_gradient(energy, energy, [W], lr=0.1, steps=1).loss * x)(torch.ones(2))
