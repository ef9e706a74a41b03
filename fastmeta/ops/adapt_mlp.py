"""Fast weights of every task after `K` inner steps, for a multi-layer perceptron; its first backward goes through all
steps, second derivatives included (`inner_loop/steps.py` says what it computes)."""

from __future__ import annotations

from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample
from fastmeta.ops import _inner_loop


def fake(support_x, support_y, support_weight, gram_support, weights, biases, rates, *rest):
    tasks, given = support_x.shape[0], bool(len(weights) < rates.shape[2])
    return (
        [w.new_empty(tasks, *w.shape[1:]) for w in weights],
        [b.new_empty(tasks, *b.shape[1:]) for b in biases],
        support_x.new_empty(support_x.shape if given else (tasks, 0, 0)),
    )


def check(support_x, support_y, support_weight, gram, weights, biases, rates, element_rates, loss, *rest):
    _inner_loop.check_labels("support_y", loss, support_y, weights, support_x)


def backward(args, grads, needs):
    flat = [g for group in grads for g in (group if isinstance(group, (list, tuple)) else [group])]
    if all(g is not None for g in flat):
        return BACKWARD(*grads, *args, needs)
    filled = []
    for given, outputs in zip(grads, fake(*args), strict=True):
        if isinstance(outputs, list):
            given = given or [None] * len(outputs)
            filled.append([o.zero_() if g is None else g for g, o in zip(given, outputs, strict=True)])
        else:
            filled.append(outputs.zero_() if given is None else given)
    return BACKWARD(*filled, *args, needs)


def samples(make: Make):
    for sample in _inner_loop.samples(make):
        args = sample.args
        yield Sample(sample.label, (*args[:3], args[6], *args[8:]))


def backward_samples(make: Make):
    for index, sample in enumerate(samples(make)):
        weights, biases, coefficients = fake(*sample.args)
        needs = (0x3F, 0x0C, 0x3D)[index % 3]
        grads = (
            [make.normal(*w.shape) for w in weights],
            [make.normal(*b.shape) for b in biases],
            make.normal(*coefficients.shape),
        )
        yield Sample(f"{sample.label}-needs{needs}", (*grads, *sample.args, needs))


SPEC = register(
    Op(
        name="adapt_mlp",
        arguments="Tensor support_x, Tensor support_y, Tensor support_weight, Tensor gram_support, Tensor[] weights, "
        "Tensor[] biases, Tensor rates, Tensor[] element_rates, str loss, str activation, float delta, float momentum, "
        "float weight_decay, bool first_order",
        returns="(Tensor[], Tensor[], Tensor)",
        summary="fast weights after K inner steps of every task",
        reference=_inner_loop.adapt,
        fake=fake,
        differentiable=("support_x", "gram_support", "weights", "biases", "rates", "element_rates"),
        backward=backward,
        check=check,
        samples=samples,
        ranks=(("weights", 3), ("biases", 2)),
        second_order="loop",
        backends=("cuda", "cpp", "triton", "reference"),
        source="Finn et al. 2017, algorithm 1; Pearlmutter 1994",
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(
    Op(
        **_DERIVED,
        backward=lambda *a: vjp_of_reference(BACKWARD)(*a),
        samples=backward_samples,
        backends=SPEC.backends,
        second_order="loop",
    )
)
