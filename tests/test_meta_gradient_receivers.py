"""What has a gradient in the reverse sweep beside the parameters: rates, whatever else the losses depend on, and what
all of it was computed from. Against plain autograd through the unrolled inner loop."""

import re

import pytest
import torch
from test_meta_gradient import STEPS, close, gradients, loss_of, net, randomly, rows, unrolled
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fastmeta.functional import meta_gradient, meta_loss

# rates ----------------------------------------------------------------------------------------------------------------
LRS = {
    "float": lambda: 0.3,
    "[]": lambda: randomly(),
    "[1]": lambda: randomly(1),
    "float32 []": lambda: torch.tensor(0.3, requires_grad=True),
    "per step": lambda: randomly(STEPS),
    "per step, no gradient": lambda: randomly(STEPS).detach(),
    "per element": lambda: {name: randomly(*p.shape) for name, p in net().named_parameters()},
    "per tensor, row and float": lambda: {
        "0.weight": randomly(6, 1),
        "0.bias": 0.2,
        "2.weight": randomly(),
        "2.bias": randomly(1, 1, 1),
    },
    "per tensor and step": lambda: {
        "0.weight": randomly(STEPS, 1, 1),
        "0.bias": randomly(STEPS, 6),
        "2.weight": randomly(1, 3, 6),
        "2.bias": randomly(3).detach(),
    },
}


def rate_at(lr, shape, step):
    """What an entry of `lr` means for a parameter of `shape` in a step."""
    if isinstance(lr, float) or lr.numel() == 1:
        return lr if isinstance(lr, float) else lr.double().reshape(())
    return lr[step % lr.shape[0]] if lr.dim() == len(shape) + 1 else lr


@pytest.mark.parametrize("first_order, momentum", [(False, 0.0), (False, 0.6), (True, 0.6)])
@pytest.mark.parametrize("kind", LRS)
def test_rates(kind, first_order, momentum):
    model, (sx, sy), (qx, qy) = net(), rows(5, 1), rows(8, 2)
    params, loss, lr = dict(model.named_parameters()), loss_of(model), LRS[kind]()

    def rate(step, name):
        if isinstance(lr, dict):
            return rate_at(lr[name], params[name].shape, step)
        return rate_at(lr, (), step)

    value, _, _ = unrolled(
        lambda w, k: loss(w, sx, sy), lambda w: loss(w, qx, qy), params, rate, STEPS,
        momentum=momentum, first_order=first_order,
    )  # fmt: skip
    learned = [t for t in pytree.tree_leaves(lr) if isinstance(t, torch.Tensor) and t.requires_grad]
    right = gradients(value, [*params.values(), *learned])
    found = meta_gradient(
        loss, loss, params, lr=lr, steps=STEPS, inner_args=(sx, sy), outer_args=(qx, qy),
        momentum=momentum, first_order=first_order, every=2,
    )  # fmt: skip
    close(list(found.gradient.values()), list(right[: len(params)]))
    of_lr = pytree.tree_leaves(found.lr_gradient)
    assert [g is not None for g in of_lr] == [t in map(id, learned) for t in map(id, pytree.tree_leaves(lr))]
    for g, t, r in zip([g for g in of_lr if g is not None], learned, right[len(params) :], strict=True):
        assert g.shape == t.shape
        close(g, r, t.dtype)


def test_rates_of_a_bare_tensor():
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def found(lr, params=w, steps=3):
        return meta_gradient(lambda p: energy(p), lambda p: energy(p), params, lr=lr, steps=steps)

    def energy(p):
        return (pytree.tree_leaves(p)[0] ** 4).sum()

    per_element = found([randomly(3)], [w])
    per_step = found(randomly(3), [w])
    assert not torch.equal(per_element.loss, per_step.loss)
    close(found(randomly(1, 3)).loss, per_element.loss)
    close(found(randomly(3).reshape(3, 1)).loss, per_step.loss)
    close(found(randomly(4), steps=4).gradient, found(randomly(4).reshape(4, 1), steps=4).gradient)
    with pytest.raises(ValueError, match=re.escape("lr of shape [3] may be a rate per step or per element")):
        found(randomly(3))


# what else has gradients ----------------------------------------------------------------------------------------------
def test_also():
    """Slow weights by closure, a parameter of the loss as an argument, one in the outer loss only, an unused one."""
    model, (sx, sy), (qx, qy) = net(), rows(5, 1), rows(8, 2)
    body, head = model[0], dict(model[2].named_parameters())
    scale, shift, unused = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.2, 1.0))

    def inner(params, x, y, scale):
        return F.cross_entropy(functional_call(model[2], params, (torch.tanh(body(x)),)) * scale, y)

    def outer(params, x, y):
        return F.cross_entropy(functional_call(model[2], params, (torch.tanh(body(x)),)) + shift * x[:, :3], y)

    also = {"body": list(body.parameters()), "loss": (scale, shift), "unused": unused}
    value, _, _ = unrolled(
        lambda w, k: inner(w, sx, sy, scale), lambda w: outer(w, qx, qy), head, lambda k, name: 0.3, 3
    )
    found = meta_gradient(
        inner, outer, head, lr=0.3, steps=3, also=also, inner_args=(sx, sy, scale), outer_args=(qx, qy)
    )
    right = gradients(value, [*head.values(), *pytree.tree_leaves(also)])
    close(list(found.gradient.values()), list(right[: len(head)]))
    right = right[len(head) :]
    close(found.also_gradient, pytree.tree_unflatten(right, pytree.tree_structure(also)))
    assert found.also_gradient["unused"] == 0 and all(g.abs().max() > 1e-4 for g in right[:-1])
    first = meta_gradient(
        inner, outer, head, lr=0.3, steps=3, also=also, inner_args=(sx, sy, scale), outer_args=(qx, qy),
        first_order=True,
    )  # fmt: skip
    assert first.also_gradient["loss"][0] == 0  # it has its part in the inner gradients alone


def test_meta_loss_reaches_what_lies_behind():
    """An encoder's features, parameters and a rate that are computed; and a proximal term to the parameters before."""
    torch.manual_seed(0)
    encoder, hyper = nn.Linear(4, 5).double(), nn.Linear(2, 15).double()
    log_lr = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    leaves = [*encoder.parameters(), *hyper.parameters(), log_lr]
    (sx, sy), (qx, qy), code = rows(5, 1), rows(8, 2), torch.randn(2, dtype=torch.float64)

    def run(function):
        features, queries = torch.tanh(encoder(sx)), torch.tanh(encoder(qx))
        weight = hyper(code).reshape(3, 5)

        def inner(params):
            return F.cross_entropy(F.linear(features, params["w"]), sy) + 0.3 * (params["w"] - weight).square().sum()

        def outer(params):
            return F.cross_entropy(F.linear(queries, params["w"]), qy)

        return function(inner, outer, {"w": weight}, log_lr.exp(), [features, queries, weight])

    right = run(lambda inner, outer, params, lr, also: unrolled(
        lambda w, k: inner(w), outer, params, lambda k, name: lr, 3)[0])  # fmt: skip
    loss = run(lambda inner, outer, params, lr, also: meta_loss(inner, outer, params, lr=lr, steps=3, also=also))
    close(loss.detach(), right.detach())
    (2.5 * loss).backward()
    close([leaf.grad for leaf in leaves], [2.5 * g for g in gradients(right, leaves)])


def test_meta_loss():
    model, (sx, sy), (qx, qy) = net(), rows(5, 1), rows(8, 2)
    params, loss, calls = dict(model.named_parameters()), loss_of(model), []
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def inner(*args):
        calls.append(args)
        return loss(*args)

    def outer(*args):
        value = loss(*args)
        return value, {"twice": 2 * value, "name": "aux"}

    call = {"lr": lr, "steps": 3, "inner_args": (sx, sy), "outer_args": (qx, qy)}
    found = meta_gradient(loss, loss, params, **call)
    value, aux = meta_loss(inner, outer, params, has_aux=True, every=2, **call)
    assert len(calls) == 3 + 1 + 3
    assert aux["name"] == "aux" and torch.equal(aux["twice"], 2 * found.loss) and not aux["twice"].requires_grad
    value.backward()
    close({name: p.grad for name, p in params.items()}, found.gradient)
    close(lr.grad, found.lr_gradient)
    calls.clear()
    with torch.no_grad():
        alone = meta_loss(inner, loss, params, **call)
    assert torch.equal(alone, found.loss) and not alone.requires_grad and len(calls) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        meta_loss(loss, loss, params, step=1, **call)
    again = meta_loss(loss, loss, params, **call)
    once = torch.autograd.grad(again, params["0.weight"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(once.sum(), params["0.weight"])
