"""`functional.norm_act_pool` against torch's layers, one task at a time."""

import pytest
import torch
from conftest import DEVICE
from test_ops import KERNELS as BACKENDS
from test_ops import require
from torch.nn import functional as F

from fastmeta import use_backend
from fastmeta.functional import norm_act_pool
from fastmeta.ops.norm_act_pool import MOMENTS, SPEC

T, B, C = 3, 4, 6
ACTIVATIONS = {
    "identity": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "gelu": lambda z, slope: F.gelu(z),
    "silu": lambda z, slope: F.silu(z),
}
POOLS = {"none": lambda z: z, "max": lambda z: F.max_pool2d(z, 2), "average": lambda z: F.avg_pool2d(z, 2)}


def tensors(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def plain(x, weight, bias, norm, groups, running, eps, activation, slope, pool):
    """One task."""
    weight = x.new_ones(C) if weight is None else weight  # torch has no second derivative without
    if norm == "batch":
        y = F.batch_norm(x, *(running or (None, None)), weight, bias, running is None, eps=eps)
    elif norm == "instance":
        y = F.instance_norm(x, *(running or (None, None)), weight, bias, running is None, eps=eps)
    elif norm == "none":
        shape = (-1, *[1] * (x.dim() - 2))
        y = x * weight.view(shape) + bias.view(shape)
    else:
        y = F.group_norm(x, groups if norm == "group" else 1, weight, bias, eps)
    return POOLS[pool](ACTIVATIONS[activation](y, slope))


def derivatives(y, inputs):
    g = torch.Generator().manual_seed(1)
    draw = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y)
    first = torch.autograd.grad((y.square() * draw).sum(), inputs, create_graph=True)
    return first, torch.autograd.grad(sum(f.square().sum() for f in first), inputs)


CASES = [
    ("batch", "relu", "max", T, T, False),
    ("batch", "leaky_relu", "average", T, 1, False),
    ("batch", "silu", "none", T, 1, True),
    ("batch", "relu", "max", 1, T, True),
    ("batch", "gelu", "max", 1, T, False),
    ("instance", "gelu", "max", T, None, False),
    ("instance", "identity", "none", T, T, True),
    ("group", "relu", "max", T, T, False),
    ("layer", "identity", "average", 1, T, False),
    ("none", "leaky_relu", "max", T, T, False),
]


@pytest.mark.parametrize("norm, activation, pool, of_x, of_weight, with_running", CASES)
@pytest.mark.parametrize("size", [(5, 7), (9,)])
def test_as_torch_one_task_at_a_time(norm, activation, pool, of_x, of_weight, with_running, size):
    if len(size) == 1:
        pool = "none"
    x, weight, bias, mean, var = tensors((of_x, B, C, *size), (of_weight or 1, C), (1, C), (T, C), (1, C))
    running = (mean, var.exp()) if with_running else None
    weight = None if of_weight is None else weight
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    groups = 3 if norm == "group" else 1
    options = dict(norm=norm, groups=groups, eps=1e-3, activation=activation, slope=0.2, pool=pool)
    y = norm_act_pool(x, weight, bias, running=running, **options)

    def of(tensor, t):
        return None if tensor is None else tensor[t if len(tensor) > 1 else 0]

    expected = torch.stack(
        [
            plain(
                of(x, t), of(weight, t), of(bias, t),
                running=None if running is None else [of(r, t).clone() for r in running], **options,
            )
            for t in range(len(y))
        ]
    )  # fmt: skip
    assert len(y) == max(of_x, of_weight or 1, T if with_running else 1)
    torch.testing.assert_close(y, expected)
    for found, right in zip(derivatives(y, leaves), derivatives(expected, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_update_running_statistics_as_torch_does(dtype):
    (x,) = tensors((T, B, C, 5, 7), dtype=dtype)
    y, (mean, var) = norm_act_pool(x.requires_grad_(), return_moments=True)
    assert mean.shape == var.shape == (T, C) and mean.dtype == var.dtype == torch.float32
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad
    n = B * 5 * 7
    for t in range(T):
        running = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
        F.batch_norm(x[t].detach().float(), *running, training=True, momentum=0.1)
        torch.testing.assert_close(0.1 * mean[t], running[0])
        torch.testing.assert_close(0.9 + 0.1 * var[t] * n / (n - 1), running[1])


def test_channels_last_comes_back():
    (x,) = tensors((T, B, C, 6, 4), dtype=torch.float32)
    assert norm_act_pool(x, pool="max").movedim(2, -1).is_contiguous()
    assert norm_act_pool(x[..., 0]).movedim(2, -1).is_contiguous()


def test_under_torch_func_and_compile():
    x, weight, bias = tensors((T, B, C, 5, 6), (T, C), (T, C))

    def ours(weight, bias, x):
        return norm_act_pool(x[None], weight[None], bias[None], pool="max").square().sum()

    def torchs(weight, bias, x):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True)), 2).square().sum()

    def per_task(loss):
        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(weight, bias, x)

    torch.testing.assert_close(per_task(ours), per_task(torchs))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight[0], bias[0], x[0]), torchs(weight[0], bias[0], x[0]))


def test_autocast_takes_the_widest_dtype():
    x, weight, bias = tensors((T, B, C, 5, 6), (T, C), (T, C), dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert norm_act_pool(x.bfloat16(), weight, bias).dtype == torch.float32
        assert norm_act_pool(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "wb"])
def test_what_is_wanted_alone(backend, wanted):
    """Gradients that nobody asks for are not formed, and nothing comes down for them from a second derivative."""
    if backend not in SPEC.backends:
        pytest.skip(f"{backend} has no {SPEC.name}")
    require(backend)
    x, weight, bias, grad = tensors((2, 2, 4, 5, 3), (2, 3), (1, 3), (2, 2, 2, 2, 3))
    moments = MOMENTS(x, "batch", 1)

    def found():
        leaves = {"x": x, "weight": weight, "bias": bias}
        leaves = {name: t.clone().requires_grad_(name[0] in wanted) for name, t in leaves.items()}
        g = grad.clone().requires_grad_()
        args = (leaves["x"], [leaves["weight"]], [leaves["bias"]], list(moments), "batch", 1, 1e-5, "silu", 0.0, "max")
        inputs = [t for t in leaves.values() if t.requires_grad]
        first = torch.autograd.grad(SPEC(*args), inputs, g, create_graph=True)
        second = torch.autograd.grad(sum(f.sin().sum() for f in first), [*inputs, g], allow_unused=True)
        return [*first, *(torch.zeros_like(t) if s is None else s for s, t in zip(second, [*inputs, g], strict=True))]

    with use_backend("reference"):
        truth = found()
    with use_backend(backend):
        torch.testing.assert_close(found(), truth, rtol=1e-10, atol=1e-10)
