"""The references, which are the truth about every backend, against plain PyTorch: values and derivatives.

They are the same torch code on every device, so the CPU shows it.
"""

import pytest
import torch
import torch.nn.functional as F
from plain import TRUTH
from test_ops import LABELS, first_labels, loops

from fastmeta import testing, use_backend
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.ops import _inner_loop


def sample_of(name: str, label: str, dtype=torch.float64):
    return next(s.args for s in REGISTRY[name].samples(Make(dtype)) if s.label == label)


def orders(name: str) -> range:
    return range(2 if name.endswith("_bwd") else 3)


def cases(labels):
    pairs = [(name, label) for name in REGISTRY for label in labels(name)]
    return pytest.mark.parametrize("name, label", pairs, ids=["-".join(pair) for pair in pairs])


@cases(LABELS.get)
def test_is_plain_pytorch(name, label):
    spec, args = REGISTRY[name], sample_of(name, label)
    for order in orders(name):
        testing.check_op(spec, args, order, function=spec.reference, truth=TRUTH[name])


@cases(first_labels)
def test_through_the_dispatcher(name, label):
    with use_backend("reference"):
        for order in orders(name):
            testing.check_op(REGISTRY[name], sample_of(name, label), order, truth=TRUTH[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases(first_labels)
def test_in_lower_precision(name, label, dtype):
    if dtype == torch.bfloat16 and loops(name):
        pytest.skip("inner loops compute in float32 at least")
    spec, args = REGISTRY[name], sample_of(name, label, dtype)
    for order in (0, 1):
        testing.check_op(spec, args, order, function=spec.reference, truth=TRUTH[name])


def rows_in_gradients(support_x, options):
    """The factor of the first layer's inner gradients, which in first order are constants."""
    return support_x.detach() if options[-1] else support_x


def adapt_in_gram_form(support_x, support_y, support_weight, gram, weights, biases, *options):
    """From rows and the first layer's slow weights to what the Gram form takes; from what it gives to all layers."""
    z = F.linear(support_x, weights[0][0], biases[0][0] if biases else None)
    rows = rows_in_gradients(support_x, options)
    gram = support_x @ rows.mT + bool(biases)
    fast_weights, fast_biases, coefficients = REGISTRY["adapt_mlp"].reference(
        z, support_y, support_weight, gram, weights[1:], biases[1:], *options
    )
    first_weight, first_bias = weights[0] - coefficients.mT @ rows, []
    if biases:
        first_bias = [biases[0] - coefficients.sum(1)]
    return [first_weight, *fast_weights], first_bias + fast_biases, z.new_zeros(len(z), 0, 0)


def meta_loss_in_gram_form(support_x, y, weight, query_x, query_y, query_weight, gram, _, weights, biases, *options):
    z, query_z = (F.linear(x, weights[0][0], biases[0][0] if biases else None) for x in (support_x, query_x))
    rows = rows_in_gradients(support_x, options)
    grams = (x @ rows.mT + bool(biases) for x in (support_x, query_x))
    return REGISTRY["meta_loss_mlp"].reference(
        z, y, weight, query_z, query_y, query_weight, *grams, weights[1:], biases[1:], *options
    )


DEPARTURES = [{}, {"bias": False}, {"momentum": 0.9, "steps": 3}, {"first_order": True, "loss": "cross_entropy"}]


@pytest.mark.parametrize("departures", DEPARTURES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_gram_form_is_the_dense_form(order, departures):
    args = _inner_loop.arguments(Make(), 3, 5, 4, (6, 7, 4, 2), "dense", **departures)
    for name, function, inputs in (
        ("adapt_mlp", adapt_in_gram_form, (*args[:3], args[6], *args[8:])),
        ("meta_loss_mlp", meta_loss_in_gram_form, args),
    ):
        testing.check_op(REGISTRY[name], inputs, order, function=function, truth=TRUTH[name])
