"""A convolution whose weights are each task's own: `y[t] = x[t] * weight[t] + bias[t]`, for all tasks in one call.

At op level images are `[T, B, H, W, C]`: channels last, as the kernels read them. Weights are `[T, O, C / groups, kh,
kw]`. Three ops are closed under differentiation, so that any order of derivative stays within them and no kernel is
called with its operands in other roles than its own:

    y  = conv(x, w)               d_x = bwd_data(d_y, w)           d_w = bwd_weight(d_y, x)

Each is bilinear, and the gradients of each are the other two. Where all tasks share the weights, their rows are one
batch of one convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from fastmeta.dispatch.library import Op, register
from fastmeta.dispatch.spec import Make, Sample, Workload, leading_size

GEOMETRY = "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int groups"


def out_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Height or width of the output."""
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _options(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups) -> dict:
    return dict(stride=(stride_h, stride_w), padding=(pad_h, pad_w), dilation=(dilation_h, dilation_w), groups=groups)


def _planes(x: Tensor) -> Tensor:
    """Channels first, as torch has them, and back by `_pixels`."""
    return x.movedim(-1, -3)


def _pixels(y: Tensor) -> Tensor:
    return y.movedim(-3, -1)


def _of_task(tensor: Tensor, task: int) -> Tensor:
    return tensor[task if tensor.shape[0] != 1 else 0]


def _folded(tensor: Tensor, tasks: int) -> Tensor:
    """The rows of all tasks as those of one."""
    return tensor.expand(tasks, *tensor.shape[1:]).reshape(1, -1, *tensor.shape[2:])


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    return value if like.shape[0] == value.shape[0] else value.sum(0, keepdim=True)


# the convolution -------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, bias: list[Tensor], *geometry: int) -> Tensor:
    tasks, options = leading_size([x, weight, *bias]), _options(*geometry)
    if tasks == 0:
        return x.new_empty(fake(x, weight, bias, *geometry).shape) + 0 * (x.sum() + weight.sum())
    return torch.stack(
        [
            _pixels(
                F.conv2d(
                    _planes(_of_task(x, t)), _of_task(weight, t), _of_task(bias[0], t) if bias else None, **options
                )
            )
            for t in range(tasks)
        ]
    )


def fake(x, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups):
    return x.new_empty(
        leading_size([x, weight, *bias]),
        x.shape[1],
        out_size(x.shape[2], weight.shape[3], stride_h, pad_h, dilation_h),
        out_size(x.shape[3], weight.shape[4], stride_w, pad_w, dilation_w),
        weight.shape[1],
    )


def backward(args, grads, needs):
    x, weight, bias, *geometry = args
    grad = grads[0]
    d_x = _sum_to(DATA(grad, weight, x.shape[2], x.shape[3], *geometry), x) if needs & 1 else None
    d_weight = _weight_gradient(grad, x, weight, geometry) if needs & 2 else None
    d_bias = [_sum_to(grad.sum((1, 2, 3)), bias[0])] if needs & 4 and bias else []
    return d_x, d_weight, d_bias


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry) -> Tensor:
    """The gradient of `weight`, which the tasks may share."""
    if weight.shape[0] == 1:
        tasks = leading_size([grad, x])
        grad, x = _folded(grad, tasks), _folded(x, tasks)
    return WEIGHT(grad, x, weight.shape[3], weight.shape[4], *geometry)


# its gradient for x ----------------------------------------------------------------------------------------------


def data_reference(grad: Tensor, weight: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    tasks, options = leading_size([grad, weight]), _options(*geometry)
    channels = weight.shape[2] * options["groups"]
    if tasks == 0:
        return grad.new_empty(0, grad.shape[1], height, width, channels) + 0 * (grad.sum() + weight.sum())
    size = (grad.shape[1], channels, height, width)
    return torch.stack(
        [
            _pixels(conv2d_input(size, _of_task(weight, t), _planes(_of_task(grad, t)), **options))
            for t in range(tasks)
        ]
    )


def data_fake(grad, weight, height, width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups):
    return grad.new_empty(leading_size([grad, weight]), grad.shape[1], height, width, weight.shape[2] * groups)


def data_backward(args, grads, needs):
    grad, weight, _, _, *geometry = args
    (outer,) = grads
    d_grad = _sum_to(SPEC(outer, weight, [], *geometry), grad) if needs & 1 else None
    return d_grad, _weight_gradient(grad, outer, weight, geometry) if needs & 2 else None


# its gradient for the weight -------------------------------------------------------------------------------------


def weight_reference(grad: Tensor, x: Tensor, kernel_h: int, kernel_w: int, *geometry: int) -> Tensor:
    tasks, options = leading_size([grad, x]), _options(*geometry)
    size = (grad.shape[4], x.shape[4] // options["groups"], kernel_h, kernel_w)
    if tasks == 0:
        return grad.new_empty(0, *size) + 0 * (grad.sum() + x.sum())
    return torch.stack(
        [
            conv2d_weight(_planes(_of_task(x, t)), size, _planes(_of_task(grad, t)), **options)
            for t in range(tasks)
        ]
    )


def weight_fake(grad, x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups):
    return grad.new_empty(leading_size([grad, x]), grad.shape[4], x.shape[4] // groups, kernel_h, kernel_w)


def weight_backward(args, grads, needs):
    grad, x, _, _, *geometry = args
    (outer,) = grads
    d_grad = _sum_to(SPEC(x, outer, [], *geometry), grad) if needs & 1 else None
    d_x = _sum_to(DATA(grad, outer, x.shape[2], x.shape[3], *geometry), x) if needs & 2 else None
    return d_grad, d_x


# inputs ----------------------------------------------------------------------------------------------------------

PLAIN = (1, 1, 0, 0, 1, 1, 1)
SAME = (1, 1, 1, 1, 1, 1, 1)
# (T, B, H, W, C, O, kh, kw, geometry, which of x, weight, bias the tasks share, bias)
SIZES = (
    (2, 3, 6, 5, 3, 4, 3, 3, SAME, "", True),
    (1, 1, 1, 1, 1, 1, 1, 1, PLAIN, "", True),
    (3, 2, 7, 7, 1, 17, 3, 3, SAME, "wb", True),
    (3, 2, 5, 9, 17, 9, 3, 3, PLAIN, "b", False),
    (3, 2, 8, 7, 4, 6, 3, 2, (2, 1, 1, 0, 1, 2, 2), "x", True),
    (2, 1, 9, 8, 5, 33, 1, 1, (2, 2, 0, 0, 1, 1, 1), "b", True),
    (2, 2, 1, 21, 6, 6, 1, 5, (1, 1, 0, 2, 1, 1, 6), "", True),
    (2, 2, 10, 10, 3, 2, 5, 4, (3, 3, 2, 1, 2, 2, 1), "w", True),
    (0, 2, 4, 4, 3, 2, 3, 3, SAME, "wb", True),
    (2, 0, 4, 4, 3, 2, 3, 3, SAME, "", True),
)


def _label(t, b, h, w, c, o, kh, kw, geometry, shared, bias):
    numbers = "".join(map(str, geometry))
    return f"T{t}-B{b}-{h}x{w}x{c}-O{o}-k{kh}x{kw}-g{numbers}-shared({shared})" + ("" if bias else "-nobias")


def _inputs(make: Make, t, b, h, w, c, o, kh, kw, geometry, shared, bias):
    def lead(kind):
        return 1 if kind in shared else t

    per_group = c // geometry[6]
    return (
        make.normal(lead("x"), b, h, w, c),
        make.normal(lead("w"), o, per_group, kh, kw, scale=(per_group * kh * kw) ** -0.5),
        [make.normal(lead("b"), o)] if bias else [],
        *geometry,
    )


def samples(make: Make):
    for size in SIZES:
        yield Sample(_label(*size), _inputs(make, *size))


def _grad(make: Make, x: Tensor, weight: Tensor, geometry) -> Tensor:
    return make.normal(*fake(x, weight, [], *geometry).shape)


def data_samples(make: Make):
    for size in SIZES:
        x, weight, _, *geometry = _inputs(make, *size)
        grad = _grad(make, x, weight, geometry)
        yield Sample(_label(*size), (grad, weight, x.shape[2], x.shape[3], *geometry))


def weight_samples(make: Make):
    for size in SIZES:
        x, weight, _, *geometry = _inputs(make, *size)
        grad = _grad(make, x, weight, geometry)
        yield Sample(_label(*size), (grad, x, *weight.shape[3:], *geometry))


def _work(make: Make):
    """Conv4 on 28x28 images, its first and second layer, and a layer on 84x84 ones: 5-way, 15 queries of a class."""
    for t, b, side, c, o in ((4, 75, 28, 1, 64), (4, 75, 14, 64, 64), (4, 75, 7, 64, 64), (4, 75, 42, 32, 32)):
        x, weight, bias, *geometry = _inputs(make, t, b, side, side, c, o, 3, 3, SAME, "", True)
        label = f"T{t}-B{b}-{side}x{side}x{c}-O{o}"
        size = x.element_size() * (x.numel() + weight.numel() + t * b * side * side * o)
        yield label, x, weight, bias, geometry, 2 * t * b * side * side * o * c * 9, size


def workloads(make: Make):
    for label, x, weight, bias, geometry, flops, size in _work(make):
        yield Workload(label, (x, weight, bias, *geometry), flops, size)


def data_workloads(make: Make):
    for label, x, weight, _, geometry, flops, size in _work(make):
        yield Workload(label, (_grad(make, x, weight, geometry), weight, *x.shape[2:4], *geometry), flops, size)


def weight_workloads(make: Make):
    for label, x, weight, _, geometry, flops, size in _work(make):
        yield Workload(label, (_grad(make, x, weight, geometry), x, 3, 3, *geometry), flops, size)


SPEC = register(
    Op(
        name="task_conv2d",
        arguments=f"Tensor x, Tensor weight, Tensor[] bias, {GEOMETRY}",
        returns="Tensor",
        summary="a convolution with weights of each task's own",
        reference=reference,
        fake=fake,
        differentiable=("x", "weight", "bias"),
        backward=backward,
        samples=samples,
        workloads=workloads,
        autocast="lower",
        may_share=("x", "weight", "bias"),
        shares=True,
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
DATA = register(
    Op(
        name="task_conv2d_bwd_data",
        arguments=f"Tensor grad, Tensor weight, int height, int width, {GEOMETRY}",
        returns="Tensor",
        summary="gradient of `task_conv2d` for its images",
        reference=data_reference,
        fake=data_fake,
        differentiable=("grad", "weight"),
        backward=data_backward,
        samples=data_samples,
        workloads=data_workloads,
        may_share=("grad", "weight"),
        shares=True,
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
WEIGHT = register(
    Op(
        name="task_conv2d_bwd_weight",
        arguments=f"Tensor grad, Tensor x, int kernel_h, int kernel_w, {GEOMETRY}",
        returns="Tensor",
        summary="gradient of `task_conv2d` for its weights",
        reference=weight_reference,
        fake=weight_fake,
        differentiable=("grad", "x"),
        backward=weight_backward,
        samples=weight_samples,
        workloads=weight_workloads,
        may_share=("grad", "x"),
        shares=True,
        backends=("cuda", "cpp", "triton", "reference"),
    )
)
