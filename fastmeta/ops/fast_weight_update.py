"""One inner step for all parameters of all tasks: `fast = params - lr * grads`.

Every tensor is flattened to `[T, n]`, or `[1, n]` where the tasks share it (slow weights in the first inner step); a
learned rate is `[T, 1]` per task, `[1, 1]` per tensor, or `[1, n]` and `[T, n]` per element (Meta-SGD). The op is
bilinear, so its gradient needs no op but itself and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload, leading_size


def reference(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor], lr: float) -> list[Tensor]:
    tasks = leading_size([*params, *grads, *lrs])
    rates = lrs or [lr] * len(params)
    return [
        (p - rate * g).expand(tasks, -1).clone(memory_format=torch.contiguous_format)
        for p, g, rate in zip(params, grads, rates, strict=True)
    ]


def fake(params, grads, lrs, lr):
    tasks = leading_size([*params, *grads, *lrs])
    return [p.new_empty(tasks, p.shape[1]) for p in params]


def backward(args, grads, needs):
    params, inner_grads, lrs, lr = args
    d_params = [_sum_to(g, p) for g, p in zip(grads[0], params, strict=True)] if needs & 1 else None
    if not needs & 6:
        return d_params, None, None
    return d_params, *BACKWARD(grads[0], inner_grads, lrs, lr, needs >> 1)


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    """`value` summed over the tasks, and over the elements, where `like` has one for all."""
    if like.shape[0] != value.shape[0]:
        value = value.sum(0, keepdim=True)
    if like.shape[1] != value.shape[1]:
        value = value.sum(1, keepdim=True)
    return value


def backward_reference(grad_outs, grads, lrs, lr, needs):
    rates = lrs or [lr] * len(grads)
    d_grads = [
        _sum_to(-rate * out, g) if needs & 1 else g.new_empty(0)
        for out, g, rate in zip(grad_outs, grads, rates, strict=True)
    ]
    d_lrs = (
        [
            _sum_to(-out * g, rate) if needs & 2 else rate.new_empty(0)
            for out, g, rate in zip(grad_outs, grads, lrs, strict=True)
        ]
        if lrs
        else []
    )
    return d_grads, d_lrs


def backward_fake(grad_outs, grads, lrs, lr, needs):
    return (
        [g.new_empty(g.shape if needs & 1 else 0) for g in grads],
        [rate.new_empty(rate.shape if needs & 2 else 0) for rate in lrs],
    )


def backward_backward(args, grads, needs):
    # d_grads = -lr * out and d_lrs = -sum(out * g) are bilinear again; the terms of their gradient are torch ops
    outs, inner_grads, lrs, lr, first_needs = args
    gg_grads, gg_lrs = grads
    d_outs, d_grads, d_lrs = [], [], []
    for i, (out, g) in enumerate(zip(outs, inner_grads, strict=True)):
        rate = lrs[i] if lrs else lr
        gg = gg_grads[i] if first_needs & 1 else None
        gl = gg_lrs[i] if lrs and first_needs & 2 else None
        zero = torch.zeros_like(out)
        d_outs.append(zero + (0 if gg is None else -rate * gg) + (0 if gl is None else -gl * g))
        d_grads.append(None if gl is None else _sum_to(-gl * out, g))
        if lrs:
            d_lrs.append(None if gg is None else _sum_to(-gg * out, rate))
    return d_outs, d_grads, d_lrs


# (T, sizes, shared, learned rates): shared names which of params, grads, lrs have leading size 1
SIZES = (
    (2, (3, 5), "", None),
    (1, (1,), "", None),
    (3, (7, 129, 1), "p", None),
    (3, (7, 33), "", "task"),
    (3, (7, 33), "", "tensor"),
    (3, (7, 33), "p", "element"),
    (3, (7, 33), "", "task element"),
    (3, (7, 33), "g", "element"),
    (0, (3, 4), "p", "element"),
    (2, (0, 4), "", "element"),
)


def _inputs(make: Make, t, sizes, shared, rates):
    rows = {"task": t, "tensor": 1, "element": 1, "task element": t}
    lrs = []
    if rates:
        lrs = [make.uniform(0.01, 1, rows[rates], n if "element" in rates else 1) for n in sizes]
    return (
        [make.normal(1 if "p" in shared else t, n) for n in sizes],
        [make.normal(1 if "g" in shared else t, n) for n in sizes],
        lrs,
        0.1,
    )


def _label(t, sizes, shared, rates):
    return f"T{t}-{'+'.join(map(str, sizes))}-shared({shared})-lr({rates or 'float'})"


def samples(make: Make):
    for size in SIZES:
        yield Sample(_label(*size), _inputs(make, *size))


def backward_samples(make: Make):
    for size in SIZES:
        params, grads, lrs, lr = _inputs(make, *size)
        tasks = leading_size([*params, *grads, *lrs])
        outs = [make.normal(tasks, n) for n in size[1]]
        for needs in (3, 1) if lrs else (1,):
            yield Sample(f"{_label(*size)}-needs{needs}", (outs, grads, lrs, lr, needs))


def workloads(make: Make):
    t, widths = 1000, (1, 40, 40, 1)
    sizes = [n for i, o in zip(widths[:-1], widths[1:], strict=True) for n in (i * o, o)]
    args = _inputs(make, t, sizes, "", "element")
    total = sum(sizes)
    yield Workload(
        f"T{t}-{'x'.join(map(str, widths))}-per-element",
        args,
        flops=2 * t * total,
        bytes=args[0][0].element_size() * total * (3 * t + 1),
    )


SPEC = register(
    Op(
        name="fast_weight_update",
        arguments="Tensor[] params, Tensor[] grads, Tensor[] lrs, float lr",
        returns="Tensor[]",
        summary="one inner step for all parameters of all tasks",
        reference=reference,
        fake=fake,
        differentiable=("params", "grads", "lrs"),
        backward=backward,
        samples=samples,
        workloads=workloads,
        autocast="widest",
        source="Finn et al. 2017, equation 1; Li et al. 2017, equation 2",
    )
)
BACKWARD = register(
    Op(
        name="fast_weight_update_bwd",
        arguments="Tensor[] grad_outs, Tensor[] grads, Tensor[] lrs, float lr, int needs",
        returns="(Tensor[], Tensor[])",
        summary="gradient of `fast_weight_update`",
        reference=backward_reference,
        fake=backward_fake,
        differentiable=("grad_outs", "grads", "lrs"),
        backward=backward_backward,
        samples=backward_samples,
        gradient_of=("grads", "lrs"),
    )
)
