"""`K` steps of gradient descent on each task's support rows, for a multi-layer perceptron: what `adapt_mlp` and
`meta_loss_mlp` mean, in plain PyTorch.

Both ops take the net in one of two forms. *Dense*: all `L` layers. *Gram*: the first layer is given by what its slow
weights make of the rows, `Z = X W_1^T + b_1` in place of `X`, and by their inner products `X X_s^T` (plus 1 where it
has a bias). Its fast weights are then `W_1 - C^T X_s`, with the coefficients `C` `[S, O_1]` that the steps add up, and
its pre-activations `Z - (X X_s^T) C`: exact, and of the size of the rows instead of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.dispatch.backends import ACTIVATIONS, LOSSES
from fastmeta.dispatch.labels import IGNORING, label_range
from fastmeta.dispatch.spec import Make, Sample
from fastmeta.ops.functional_mlp import FUNCTIONS


def row_losses(name: str, prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Loss of each row `[..., B]`; of several outputs the mean."""
    if name == "cross_entropy":
        return -prediction.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if name == "mse":
        return (prediction - target).square().mean(-1)
    if name == "binary_cross_entropy":
        return (-F.logsigmoid(-prediction) - target * prediction).mean(-1)
    difference = prediction - target
    size = difference.abs()
    return torch.where(size <= delta, 0.5 * difference.square(), delta * (size - 0.5 * delta)).mean(-1)


def task_losses(name: str, prediction: Tensor, target: Tensor, weight: Tensor, delta: float) -> Tensor:
    """Loss of each task `[T]`: of rows the weighted sum, or one that couples them."""
    if name == "maximum_entropy":
        return maximum_entropy(prediction.squeeze(-1) * weight, target)
    return (row_losses(name, prediction, target, delta) * weight).sum(-1)


def maximum_entropy(rewards: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood `[T]` of demonstrated trajectories under `p(tau) = q0(tau) exp(return) / Z` (Ziebart et
    al. 2008, equation 4), `Z` estimated from samples of a proposal (Finn, Levine and Abbeel 2016, equation 2).

    `rewards` `[T, S]`; `target` `[T, S, d, 1 + M]` or `[T, d, 1 + M]`, each demonstration before its samples, as
    `fastmeta.functional.adapt_mlp` has it.
    """
    demonstrations, members = target.shape[-2:]
    if target.dim() == 4:
        returns = torch.einsum("ts,tsdm->tdm", rewards[:, :-1], target[:, :-1]) - target[:, -1]
    else:
        horizon = rewards.shape[1] // (demonstrations * members)
        returns = rewards.reshape(-1, demonstrations, members, horizon).sum(-1) - target
    return (returns[..., 1:].logsumexp(-1) - math.log(members - 1) - returns[..., 0]).mean(-1)


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    *,
    given: bool,
    norm: Callable | None = None,
) -> Tensor:
    """The net on `x` `[T, B, I]`; `given`: `x` is the first layer's pre-activation already."""
    h, layers = x, len(weights) + given
    for layer in range(layers):
        index = layer - given
        if index >= 0:
            h = h @ weights[index].transpose(1, 2)
            if biases:
                h = h + biases[index].unsqueeze(1)
        if layer < layers - 1:
            h = FUNCTIONS[activation](h if norm is None else norm(h))
    return h


def _gradient(function: Callable, first: Tensor, weights, biases, create_graph: bool) -> list[Tensor]:
    """Gradient of a scalar function with respect to all its tensors, itself differentiable if `create_graph`."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        gradients = torch.func.grad(function, argnums=(0, 1, 2))(first, weights, biases)
        flat = [gradients[0], *gradients[1], *gradients[2]]
        return flat if create_graph else [g.detach() for g in flat]
    tracked = torch.is_grad_enabled()
    create_graph = create_graph and tracked
    with torch.enable_grad():
        # a view taken without gradients of a tensor that requires them would not be what the loss depends on
        flat = [t if tracked and t.requires_grad else t.detach().requires_grad_() for t in (first, *weights, *biases)]
        value = function(flat[0], flat[1 : 1 + len(weights)], flat[1 + len(weights) :])
        if not value.requires_grad:  # no row and no weight took part
            return [torch.zeros_like(t) for t in flat]
        found = torch.autograd.grad(value, flat, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, flat, strict=True)]


def adapt(
    support_x,
    support_y,
    support_weight,
    gram,
    weights,
    biases,
    rates,
    element_rates,
    loss,
    activation,
    delta,
    momentum,
    weight_decay,
    first_order,
    norm=None,
):
    """Fast weights, fast biases, coefficients of the first layer `[T, S, O_1]` (`[T, 0, 0]` in the dense form)."""
    tasks, (steps, layers) = support_x.shape[0], rates.shape[1:]
    given = bool(len(weights) < layers)  # the Gram form
    weights = [w.expand(tasks, -1, -1) for w in weights]
    biases = [b.expand(tasks, -1) for b in biases]
    coefficients = torch.zeros_like(support_x) if given else support_x.new_zeros(tasks, 0, 0)

    def support_loss(first, weights, biases):
        # the gradient with respect to `first`, added to the pre-activations, is the rows' part of the first layer's
        x = support_x + first if given else support_x
        prediction = forward(x, weights, biases, activation, given=given, norm=norm)
        return task_losses(loss, prediction, support_y, support_weight, delta).sum()

    moments = None
    for step in range(steps):
        first = -(gram @ coefficients) if given else coefficients
        flat = _gradient(support_loss, first, weights, biases, create_graph=not first_order)
        old = [coefficients, *weights, *biases]
        # coefficients count what is taken away from the weights: their sign is the other way round
        signs = [-1.0] + [1.0] * (len(old) - 1)
        if weight_decay:
            flat = [g if i == 0 else g + weight_decay * w for i, (g, w) in enumerate(zip(flat, old, strict=True))]
        if momentum:
            moments = flat if moments is None else [momentum * m + g for m, g in zip(moments, flat, strict=True)]
            flat = moments
        which = [0, *range(given, layers), *(range(given, layers) if biases else ())]
        new = []
        for i, (value, gradient, sign, layer) in enumerate(zip(old, flat, signs, which, strict=True)):
            rate = rates[:, step, layer].reshape(-1, *[1] * (value.dim() - 1))
            if element_rates and i:
                rate = rate * element_rates[i - 1]
            new.append(value - sign * rate * gradient if i or given else value)
        coefficients, weights, biases = new[0], new[1 : 1 + len(weights)], new[1 + len(weights) :]
    return weights, biases, coefficients


def meta_loss(
    support_x,
    support_y,
    support_weight,
    query_x,
    query_y,
    query_weight,
    gram_support,
    gram_query,
    weights,
    biases,
    rates,
    element_rates,
    loss,
    activation,
    delta,
    momentum,
    weight_decay,
    first_order,
    norm=None,
):
    """Query loss `[T]` at the fast weights, and logits `[T, Q, C]`."""
    rest = (rates, element_rates, loss, activation, delta, momentum, weight_decay, first_order, norm)
    fast_weights, fast_biases, coefficients = adapt(
        support_x, support_y, support_weight, gram_support, weights, biases, *rest
    )
    given = bool(len(weights) < rates.shape[2])
    x = query_x - gram_query @ coefficients if given else query_x
    logits = forward(x, fast_weights, fast_biases, activation, given=given, norm=norm)
    return task_losses(loss, logits, query_y, query_weight, delta), logits


def check_labels(name: str, loss: str, labels: Tensor, last_weights: list[Tensor], given: Tensor) -> None:
    """Refuse labels that are no output of the net."""
    if loss == "cross_entropy":
        num_classes = last_weights[-1].shape[1] if last_weights else given.shape[2]
        label_range(name, labels, num_classes, advice=IGNORING)


# inputs for tests ---------------------------------------------------------------------------------------------------

# label, T, S, Q, widths, form, and what departs from: shared weights with biases, one rate per step and layer
_CASES = (
    ("T2-S3-Q4-3x5x2", 2, 3, 4, (3, 5, 2), "dense", {}),
    ("T2-S3-Q4-3x5x2-gram", 2, 3, 4, (3, 5, 2), "gram", {}),
    ("T3-S10-Q7-1x17x9x3", 3, 10, 7, (1, 17, 9, 3), "dense", {"steps": 3}),
    ("T3-S5-Q7-33x17x9x5-gram", 3, 5, 7, (33, 17, 9, 5), "gram", {"steps": 3}),
    ("T3-S4-Q5-3x9x7x2-pertask", 3, 4, 5, (3, 9, 7, 2), "dense", {"per_task": True}),
    ("T3-S4-Q5-3x9x2-nobias", 3, 4, 5, (3, 9, 2), "dense", {"bias": False}),
    ("T3-S4-Q5-3x9x4x2-gram-nobias", 3, 4, 5, (3, 9, 4, 2), "gram", {"bias": False}),
    ("T3-S4-Q5-3x9x2-momentum-decay", 3, 4, 5, (3, 9, 2), "dense", {"momentum": 0.9, "decay": 0.1, "steps": 3}),
    ("T3-S4-Q5-3x9x2-gram-momentum", 3, 4, 5, (3, 9, 2), "gram", {"momentum": 0.9, "steps": 3}),
    ("T3-S4-Q5-3x9x2-elementwise", 3, 4, 5, (3, 9, 2), "dense", {"elementwise": True}),
    ("T3-S4-Q5-3x9x2-firstorder", 3, 4, 5, (3, 9, 2), "dense", {"first_order": True}),
    ("T3-S4-Q5-3x9x2-gram-firstorder", 3, 4, 5, (3, 9, 2), "gram", {"first_order": True, "momentum": 0.5}),
    ("T1-S1-Q1-1x1x1", 1, 1, 1, (1, 1, 1), "dense", {"steps": 1}),
    ("T2-S3-Q4-3x2", 2, 3, 4, (3, 2), "dense", {}),
    ("T2-S3-Q4-3x2-gram", 2, 3, 4, (3, 2), "gram", {}),
    ("T2-S3-Q4-3x5x2-K0", 2, 3, 4, (3, 5, 2), "dense", {"steps": 0}),
    ("T2-S3-Q4-3x5x2-gram-K0", 2, 3, 4, (3, 5, 2), "gram", {"steps": 0}),
    ("T2-S0-Q4-3x5x2", 2, 0, 4, (3, 5, 2), "dense", {}),
    ("T2-S3-Q0-3x5x2", 2, 3, 0, (3, 5, 2), "dense", {}),
    ("T0-S3-Q4-3x5x2", 0, 3, 4, (3, 5, 2), "dense", {}),
    ("T25-S4-Q23-3x9x7x2", 25, 4, 23, (3, 9, 7, 2), "dense", {}),
    ("T25-S12-Q5-1x11x2-pertask", 25, 12, 5, (1, 11, 2), "dense", {"per_task": True}),
    ("T2-S20-Q17-65x130x41x5", 2, 20, 17, (65, 130, 41, 5), "dense", {}),
    ("T2-S20-Q17-65x130x41x5-gram", 2, 20, 17, (65, 130, 41, 5), "gram", {}),
)
_BRIEF = 2  # so many of the cases for every loss and activation


def arguments(make: Make, tasks, rows, queries, widths, form, *, loss="mse", activation="tanh", steps=2, per_task=False,
              bias=True, momentum=0.0, decay=0.0, elementwise=False, first_order=False) -> tuple:  # fmt: skip
    """Arguments of `meta_loss_mlp` at op level."""

    def targets(n):
        if loss == "maximum_entropy":  # trajectories of two states each, or visits of n states
            return make.normal(tasks, 1, n // 2) if n % 2 == 0 else make.uniform(0, 2, tasks, n, 2, 3)
        if loss == "cross_entropy":
            return make.labels(widths[-1], tasks, n)
        if loss == "binary_cross_entropy":
            return make.uniform(0, 1, tasks, n, widths[-1])
        return make.normal(tasks, n, widths[-1])

    lead = tasks if per_task else 1
    if loss == "maximum_entropy":
        widths = (*widths[:-1], 1)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    support_x, query_x = make.normal(tasks, rows, widths[0]), make.normal(tasks, queries, widths[0])
    weights = [make.normal(lead, o, i, scale=max(i, 1) ** -0.5) for i, o in pairs]
    biases = [make.normal(lead, o) for _, o in pairs] if bias else []
    gram_support, gram_query = make.normal(1, 0, 0), make.normal(1, 0, 0)
    if form == "gram":
        gram_support = support_x @ support_x.transpose(1, 2) / widths[0] + bias
        gram_query = query_x @ support_x.transpose(1, 2) / widths[0] + bias
        first, weights = weights[0], weights[1:]
        offset = biases[0] if bias else 0
        biases = biases[1:]
        support_x, query_x = (x @ first.transpose(1, 2) + offset for x in (support_x, query_x))
    element_rates = [make.uniform(0.2, 1.8, *t.shape) for t in (*weights, *biases)] if elementwise else []
    return (
        support_x,
        targets(rows),
        make.uniform(0.1, 1, tasks, rows) / max(rows, 1),
        query_x,
        targets(queries),
        make.uniform(0.1, 1, tasks, queries) / max(queries, 1),
        gram_support,
        gram_query,
        weights,
        biases,
        make.uniform(0.05, 0.4, 1, steps, len(pairs)),
        element_rates,
        loss,
        activation,
        0.7,
        momentum,
        decay,
        first_order,
    )


def samples(make: Make):
    kinds = [("mse", "tanh")] + [(loss, "relu") for loss in LOSSES] + [("mse", a) for a in ACTIVATIONS if a != "tanh"]
    for index, (loss, activation) in enumerate(kinds):
        for label, *sizes, departures in _CASES if index == 0 else _CASES[:_BRIEF]:
            yield Sample(
                f"{loss}-{activation}-{label}",
                arguments(make, *sizes, loss=loss, activation=activation, **departures),
            )
    # trajectories in the support set too, and in the query set more than one sample beside a demonstration
    args = arguments(make, 2, 4, 6, (3, 5, 2), "dense", loss="maximum_entropy", activation="relu")
    yield Sample("maximum_entropy-relu-T2-S4-Q6-3x5x2", args)
