"""`functional.norm_act_pool` against torch's layers, one task at a time."""

import pytest
import torch
from conftest import DEVICE
from test_ops import KERNELS as BACKENDS
from test_ops import require
from torch.nn import functional as F

from fastmeta import use_backend
from fastmeta.dispatch.spec import REGISTRY
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


# ---- what kernels could lose

X = {"same": 0, "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def op(name):
    return REGISTRY[name]


def of_backend(name, backend):
    if backend not in op(name).backends:
        pytest.skip(f"{backend} has no {name}")
    require(backend)
    return use_backend(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_takes_no_digits_from_the_variance(backend):
    (x,) = tensors((2, 3, 20, 21, 5), dtype=torch.float32)
    x = x + 1e4
    with of_backend("norm_moments", backend):
        mean, var = op("norm_moments")(x, "batch", 1)
    flat = x.double().reshape(2, 1, -1, 5)
    torch.testing.assert_close(mean.double(), flat.mean(2), rtol=2e-7, atol=0)  # of 1e4
    torch.testing.assert_close(var.double(), flat.var(2, correction=0), rtol=5e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_of_equal_pixels_the_first_takes_the_gradient(norm, backend):
    (x,) = tensors((T, B, C, 6, 8))
    x = (1.5 * x).round().requires_grad_()
    with of_backend("norm_act_pool_bwd", backend):
        y = norm_act_pool(x, norm=norm, pool="max")
        (found,) = derivatives(y, [x])[0]
    expected = torch.stack([plain(t, None, t.new_zeros(C), norm, 1, None, 1e-5, "relu", 0.0, "max") for t in x])
    (right,) = derivatives(expected, [x])[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", X)
@pytest.mark.parametrize("norm, running, pool", [("batch", False, "max"), ("group", False, "none"),
                                                 ("none", False, "max"), ("batch", True, "average")])  # fmt: skip
def test_special_values_as_in_torch(norm, running, pool, value, backend):
    """In one pixel, or a whole channel of one number: none becomes a number, none reaches others' tasks."""
    x, weight, bias, mean = tensors((T, B, C, 5, 6), (T, C), (T, C), (T, C))
    if value == "same":
        x[1, :, 2] = 3.0
    else:
        x[1, 2, 2, 1, 3] = X[value]
    running = (mean, mean.exp()) if running else None
    groups = 3 if norm == "group" else 1
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    options = dict(norm=norm, groups=groups, eps=1e-5, activation="relu", slope=0.0, pool=pool)
    with of_backend("norm_act_pool_bwd", backend):
        y = norm_act_pool(x, weight, bias, running=running, **options)
        found = derivatives(y, leaves)[0]
    expected = torch.stack(
        [plain(x[t], weight[t], bias[t], running=running and (mean[t], mean[t].exp()), **options) for t in range(T)]
    )
    torch.testing.assert_close(y, expected, equal_nan=True)
    right = derivatives(expected, leaves)[0]
    # 0 times an infinity in a product that is not formed
    pairs = list(zip(found, right, strict=True))[: 3 if value in ("same", "nan") else 1]
    for a, b in pairs:
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("norm, tasks", [("batch", 3), ("group", 1)])
def test_the_bits_do_not_depend_on_the_number_of_threads(norm, tasks):
    with of_backend("norm_act_pool_bwd_bwd", "cpp"):
        found, before = [], torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.requires_grad_() for t in tensors((tasks, 3, 21, 40, 41), (tasks, 21), (1, 21))]
            y = norm_act_pool(*leaves, norm=norm, groups=3 if norm == "group" else 1, pool="max")
            found.append([y, *(t for order in derivatives(y, leaves) for t in order)])
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
