"""The query loss of every task after `K` inner steps, for a multi-layer perceptron: MAML's objective in one op, whose
first backward is the exact second-order meta-gradient (`inner_loop/steps.py` says what it computes)."""

from __future__ import annotations

from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload
from fastmeta.ops import _inner_loop


def fake(support_x, support_y, support_weight, query_x, *rest):
    weights = rest[4]
    outputs = weights[-1].shape[1] if weights else query_x.shape[2]
    return query_x.new_empty(query_x.shape[0]), query_x.new_empty(*query_x.shape[:2], outputs)


def check(support_x, support_y, support_weight, query_x, query_y, query_weight, gs, gq, weights, b, r, er, loss, *rest):
    _inner_loop.check_labels("support_y", loss, support_y, weights, support_x)
    _inner_loop.check_labels("query_y", loss, query_y, weights, query_x)


def backward(args, grads, needs):
    if any(g is None for g in grads):
        grads = [g if g is not None else out.zero_() for g, out in zip(grads, fake(*args), strict=True)]
    return BACKWARD(*grads, *args, needs)


def backward_samples(make: Make):
    for index, sample in enumerate(_inner_loop.samples(make)):
        outputs = fake(*sample.args)
        needs = (0xFF, 0x30, 0xF1)[index % 3]
        yield Sample(f"{sample.label}-needs{needs}", (*(make.normal(*o.shape) for o in outputs), *sample.args, needs))


def workloads(make: Make):
    for tasks, rows, queries, widths, form, loss, steps in (
        (1000, 10, 10, (1, 40, 40, 1), "dense", "mse", 1),
        (32, 5, 75, (784, 64, 64, 5), "gram", "cross_entropy", 5),
    ):
        args = _inner_loop.arguments(
            make, tasks, rows, queries, widths, form, loss=loss, activation="relu", steps=steps
        )
        products = sum(w.shape[1] * w.shape[2] for w in args[8])
        gram = (steps * rows * rows + queries * rows) * widths[1] if form == "gram" else 0
        yield Workload(
            f"T{tasks}-S{rows}-Q{queries}-K{steps}-{'x'.join(map(str, widths))}-{form}",
            args,
            # forward, gradient and update of each step; one pass over the query rows
            flops=2 * tasks * ((3 * steps * rows + queries) * products + gram),
            bytes=args[0].element_size() * sum(t.numel() for t in (args[0], args[3], args[6], args[7], *args[8])),
        )


SPEC = register(
    Op(
        name="meta_loss_mlp",
        arguments="Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y, "
        "Tensor query_weight, Tensor gram_support, Tensor gram_query, Tensor[] weights, Tensor[] biases, Tensor rates, "
        "Tensor[] element_rates, str loss, str activation, float delta, float momentum, float weight_decay, "
        "bool first_order",
        returns="(Tensor, Tensor)",
        summary="MAML's objective: K inner steps and the query loss of every task",
        reference=_inner_loop.meta_loss,
        fake=fake,
        differentiable=(
            "support_x",
            "query_x",
            "gram_support",
            "gram_query",
            "weights",
            "biases",
            "rates",
            "element_rates",
        ),
        backward=backward,
        check=check,
        samples=_inner_loop.samples,
        workloads=workloads,
        ranks=(("weights", 3), ("biases", 2)),
        second_order="loop",
        with_gradient=True,
        backends=("cuda", "cpp", "triton", "reference"),
        source="Finn et al. 2017, equation 1; Pearlmutter 1994",
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
