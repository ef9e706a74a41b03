"""What stands between two convolutions, in one pass: a norm, an activation, a 2x2 pool.

    n = (x - mean) / sqrt(var + eps),    z = n * weight + bias,    y = pool(activation(z))

Images are `[T, B, H, W, C]`, channels last. `norm` says over what mean and variance are taken: "batch", each task's own
rows and pixels, per channel; "group", the pixels of each row and group of channels (as many groups as channels:
instance norm; one: layer norm); "given", none, they are constants (running statistics); "none", there is no norm.

`moments` are mean and variance `[T, R, G]`, as `norm_moments` finds them: R rows have some of their own (1 for "batch"
and "given") and G channels or groups. They are handed in so that no backward takes them anew, and count as the
functions of `x` that they are: the gradients of "batch" and "group" hold what goes through them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.dispatch.derivation import derive_backward, vjp_of_reference
from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload

ACTIVATIONS = ("identity", "relu", "gelu", "silu")  # of those that the other ops know; relu has a slope

OPTIONS = "str norm, int groups, float eps, str activation, float slope, str pool"


# mean and variance -----------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def moments_reference(x: Tensor, norm: str, groups: int) -> tuple[Tensor, Tensor]:
    x, (tasks, rows, height, width, channels) = _wide(x), x.shape
    if norm == "batch":
        x, groups = x.reshape(tasks, 1, rows * height * width, channels, 1), channels
    else:
        x = x.reshape(tasks, rows, height * width, groups, channels // groups)
    mean = x.mean((2, 4), keepdim=True)
    return mean[:, :, 0, :, 0], (x - mean).square().mean((2, 4))


def moments_fake(x: Tensor, norm: str, groups: int) -> tuple[Tensor, Tensor]:
    tasks, rows, _, _, channels = x.shape
    size = (tasks, 1, channels) if norm == "batch" else (tasks, rows, groups)
    return _wide(x[:0]).new_empty(size), _wide(x[:0]).new_empty(size)


def moments_backward(args, grads, needs):
    return vjp_of_reference(MOMENTS)(args, grads, needs)


# the block -------------------------------------------------------------------------------------------------------


def reference(x, weight, bias, moments, norm, groups, eps, activation, slope, pool) -> Tensor:
    z, channels = _wide(x), x.shape[4]
    if norm != "none":
        # a function of x even where it was handed in
        mean, var = moments if norm == "given" else moments_reference(x, norm, groups)
        mean, var = (m.repeat_interleave(channels // max(m.shape[2], 1), 2)[:, :, None, None] for m in (mean, var))
        z = (z - mean) / (var + eps).sqrt()
    if weight:
        z = z * weight[0][:, None, None, None]
    if bias:
        z = z + bias[0][:, None, None, None]
    z = {
        "identity": lambda z: z,
        "relu": lambda z: F.leaky_relu(z, slope) if slope else torch.relu(z),
        "gelu": F.gelu,
        "silu": F.silu,
    }[activation](z)
    if pool != "none":
        z = _pooled(z, pool)
    return z.to(x.dtype)


def _pooled(z: Tensor, pool: str) -> Tensor:
    tasks, rows, height, width, channels = z.shape
    height, width = height // 2, width // 2
    windows = z[:, :, : 2 * height, : 2 * width].reshape(tasks, rows, height, 2, width, 2, channels)
    windows = windows.permute(0, 1, 2, 4, 6, 3, 5).reshape(tasks, rows, height, width, channels, 4)
    if pool == "average":
        return windows.mean(-1)
    # the first of equal ones, as torch's pool, whose second derivative torch.func cannot map
    return windows.gather(-1, windows.detach().argmax(-1, keepdim=True)).squeeze(-1)


def fake(x, weight, bias, moments, norm, groups, eps, activation, slope, pool) -> Tensor:
    tasks, rows, height, width, channels = x.shape
    if pool != "none":
        height, width = height // 2, width // 2
    return x.new_empty(tasks, rows, height, width, channels)


def consistent(x, weight, bias, moments, norm, groups, *options):
    if norm in ("batch", "group"):
        moments = list(moments_reference(x.detach(), norm, groups))
    return x, weight, bias, moments, norm, groups, *options


def backward(args, grads, needs):
    return BACKWARD(grads[0], *args, needs)


def backward_backward(args, grads, needs):
    return SECOND(*grads, *args, needs)


# inputs ----------------------------------------------------------------------------------------------------------

# (T, B, H, W, C, norm, groups, activation, slope, pool, affine: "" none, "wb" each task's, "s" shared)
SIZES = (
    (2, 3, 6, 4, 5, "batch", 1, "relu", 0.0, "max", "wb"),
    (1, 2, 1, 1, 1, "batch", 1, "relu", 0.0, "none", "wb"),
    (3, 2, 5, 7, 17, "batch", 1, "relu", 0.0, "max", "s"),
    (2, 2, 4, 5, 8, "batch", 1, "identity", 0.0, "none", ""),
    (2, 2, 4, 4, 9, "batch", 1, "relu", 0.1, "average", "wb"),
    (2, 2, 3, 3, 4, "batch", 1, "gelu", 0.0, "none", "wb"),
    (2, 2, 4, 5, 4, "batch", 1, "silu", 0.0, "max", "wb"),
    (2, 2, 4, 3, 6, "group", 2, "relu", 0.0, "max", "wb"),
    (2, 2, 3, 3, 5, "group", 5, "silu", 0.0, "none", ""),
    (2, 2, 2, 3, 6, "group", 1, "gelu", 0.0, "average", "s"),
    (2, 3, 4, 4, 17, "given", 1, "relu", 0.0, "max", "wb"),
    (2, 2, 3, 4, 5, "given", 1, "gelu", 0.0, "average", "s"),
    (2, 2, 4, 6, 5, "none", 1, "relu", 0.0, "max", ""),
    (2, 2, 4, 4, 3, "none", 1, "silu", 0.0, "average", ""),
    (0, 2, 4, 4, 3, "batch", 1, "relu", 0.0, "max", "s"),
    (2, 2, 1, 1, 3, "batch", 1, "relu", 0.0, "max", "wb"),
)


def _inputs(make: Make, t, b, h, w, c, norm, groups, activation, slope, pool, affine):
    x = make.normal(t, b, h, w, c)
    lead = 1 if affine == "s" else t
    weight, bias = ([make.normal(lead, c)] if affine else [] for _ in range(2))
    moments: list[Tensor] = []
    if norm == "given":
        moments = [_wide(make.normal(t, 1, c)), _wide(make.uniform(0.5, 2, t, 1, c))]
    elif norm != "none":
        moments = [m.detach() for m in moments_reference(x, norm, groups)]
    return x, weight, bias, moments, norm, groups, 1e-5, activation, slope, pool


def _label(t, b, h, w, c, norm, groups, activation, slope, pool, affine):
    kind = f"{norm}-{activation}{slope or ''}-{pool}"
    return f"{kind}-T{t}-B{b}-{h}x{w}x{c}-groups{groups}-affine({affine})"


def samples(make: Make):
    for size in SIZES:
        yield Sample(_label(*size), _inputs(make, *size))


def backward_samples(make: Make):
    for size in SIZES:
        args = _inputs(make, *size)
        needs = 1 if size[10] == "" else 7
        yield Sample(f"{_label(*size)}-needs{needs}", (make.normal(*fake(*args).shape), *args, needs))


def second_samples(make: Make):
    for sample in backward_samples(make):
        _, x, weight, bias, *_, needs = sample.args
        outer = (make.normal(*x.shape), *([make.normal(*t.shape) for t in part] for part in (weight, bias)))
        yield Sample(sample.label, (*outer, *sample.args, needs << 1 | 1))


def moments_samples(make: Make):
    for t, b, h, w, c, norm, groups in (
        (2, 3, 4, 5, 6, "batch", 1),
        (1, 1, 1, 1, 1, "batch", 1),
        (3, 2, 5, 7, 17, "batch", 1),
        (2, 3, 4, 5, 6, "group", 3),
        (2, 3, 3, 3, 5, "group", 5),
        (0, 2, 3, 3, 4, "batch", 1),
    ):
        yield Sample(f"{norm}-T{t}-B{b}-{h}x{w}x{c}-groups{groups}", (make.normal(t, b, h, w, c), norm, groups))


def _work(make: Make):
    """Of Conv4 with 64 channels: the first and second block on the 75 queries of 4 tasks."""
    for t, b, side, c in ((4, 75, 28, 64), (4, 75, 14, 64)):
        args = _inputs(make, t, b, side, side, c, "batch", 1, "relu", 0.0, "max", "wb")
        yield f"T{t}-B{b}-{side}x{side}x{c}-batch-relu-max", args


def workloads(make: Make):
    for label, args in _work(make):
        numbers = args[0].numel()
        yield Workload(label, args, flops=4 * numbers, bytes=args[0].element_size() * numbers * 5 // 4)


def backward_workloads(make: Make):
    for label, args in _work(make):
        numbers = args[0].numel()
        grad = make.normal(*fake(*args).shape)
        size = args[0].element_size() * numbers * 9 // 4
        yield Workload(label, (grad, *args, 7), flops=12 * numbers, bytes=size)


def moments_workloads(make: Make):
    for label, args in _work(make):
        x = args[0]
        yield Workload(label, (x, "batch", 1), flops=3 * x.numel(), bytes=x.element_size() * x.numel())


MOMENTS = register(
    Op(
        name="norm_moments",
        family="norm_act_pool",
        arguments="Tensor x, str norm, int groups",
        returns="(Tensor, Tensor)",
        summary="mean and variance for `norm_act_pool`",
        reference=moments_reference,
        fake=moments_fake,
        differentiable=("x",),
        backward=moments_backward,
        samples=moments_samples,
        workloads=moments_workloads,
        autocast="widest",
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
SPEC = register(
    Op(
        name="norm_act_pool",
        arguments=f"Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] moments, {OPTIONS}",
        returns="Tensor",
        summary="norm, activation and 2x2 pool in one pass",
        reference=reference,
        fake=fake,
        differentiable=("x", "weight", "bias"),
        backward=backward,
        consistent=consistent,
        samples=samples,
        workloads=workloads,
        second_order="explicit",
        autocast="widest",
        may_share=("weight", "bias"),
        source="Ioffe and Szegedy 2015, algorithm 1; Wu and He 2018",
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
_DERIVED = derive_backward(SPEC)
BACKWARD = register(
    Op(
        **_DERIVED,
        backward=backward_backward,
        samples=backward_samples,
        workloads=backward_workloads,
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
_DERIVED_TWICE = derive_backward(BACKWARD)
SECOND = register(
    Op(
        **_DERIVED_TWICE,
        backward=lambda *a: vjp_of_reference(SECOND)(*a),
        samples=second_samples,
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
