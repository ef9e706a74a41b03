"""`task_conv2d` and `task_conv1d` against torch, one task at a time."""

import pytest
import torch
from conftest import DEVICE
from torch.nn import functional as F

from fastmeta import functional
from fastmeta.dispatch import backends
from fastmeta.functional import task_conv1d, task_conv2d
from fastmeta.ops.task_conv2d import DATA, SPEC, WEIGHT

T = 3


def tensors(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def in_turn(conv, x, weight, bias, **options):
    def of(tensor, t):
        return None if tensor is None else tensor[t if len(tensor) > 1 else 0]

    return torch.stack([conv(of(x, t), of(weight, t), of(bias, t), **options) for t in range(T)])


def derivatives(y, inputs):
    """Gradients, and those of their squares."""
    g = torch.Generator().manual_seed(1)
    draw = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y)
    first = torch.autograd.grad((y.square() * draw).sum(), inputs, create_graph=True)
    return first, torch.autograd.grad(sum(f.square().sum() for f in first), inputs)


def check(ours, plain, inputs, **options):
    y, expected = ours(*inputs, **options), in_turn(plain, *inputs, **options)
    torch.testing.assert_close(y, expected)
    leaves = [t for t in inputs if t is not None]
    for found, right in zip(derivatives(y, leaves), derivatives(expected, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


IMAGES = [
    ({}, (T, T, T), 1, (3, 3)),
    ({"padding": 1}, (T, 1, T), 1, (3, 3)),
    ({"stride": 2, "padding": (1, 0), "dilation": (1, 2)}, (1, T, 1), 2, (3, 2)),
    ({"padding": "valid", "stride": (2, 1)}, (T, T, None), 1, (1, 1)),
    ({"padding": "same", "dilation": (1, 2)}, (T, T, 1), 1, (2, 4)),  # one more at the bottom, two even at the right
    ({"padding": "same", "dilation": (3, 1)}, (1, T, None), 4, (4, 2)),  # one more at the bottom and at the right
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of its zero-padded copy
@pytest.mark.parametrize("options, lead, groups, kernel", IMAGES)
def test_images(options, lead, groups, kernel):
    of_x, of_weight, of_bias = lead
    x, weight, bias = tensors((of_x, 2, 4, 7, 6), (of_weight, 8, 4 // groups, *kernel), (of_bias or 1, 8))
    check(task_conv2d, F.conv2d, [x, weight, bias if of_bias else None], groups=groups, **options)


@pytest.mark.parametrize(
    "options, groups, kernel",
    [({"padding": "same", "dilation": 3}, 1, 4), ({"stride": (2,), "padding": 1}, 2, 3)],
)
def test_sequences(options, groups, kernel):
    x, weight, bias = tensors((T, 2, 4, 11), (T, 6, 4 // groups, kernel), (1, 6))
    check(task_conv1d, F.conv1d, [x, weight, bias], groups=groups, **options)


def test_channels_last_images_are_not_copied():
    x, weight = tensors((T, 2, 4, 7, 6), (T, 8, 4, 3, 3), dtype=torch.float32)
    y = task_conv2d(x.detach(), weight.detach(), padding=1)
    assert y.movedim(2, -1).is_contiguous()
    again = task_conv2d(y, torch.ones(T, 8, 8, 1, 1, device=y.device), padding=0)
    assert again.movedim(2, -1).is_contiguous()
    wide = y.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        task_conv2d(wide, weight.detach().requires_grad_()[:, :, :1].expand(-1, -1, 8, -1, -1), padding=1)
    assert wide.data_ptr() in saved


def test_weights_expanded_over_the_tasks_are_not_copied():
    x, weight, grad = (t.detach() for t in tensors((T, 2, 7, 6, 4), (1, 8, 4, 3, 3), (T, 2, 5, 4, 8)))
    geometry = (1, 1, 0, 0, 1, 1, 1)
    wide = weight.expand(T, -1, -1, -1, -1)
    for op, args in ((SPEC, (x, wide, [], *geometry)), (DATA, (grad, wide, 7, 6, *geometry))):
        passed = backends.native_arguments(op, args)[1]
        assert passed.shape[0] == 1 and passed.data_ptr() == weight.data_ptr()
        torch.testing.assert_close(op(*args), op(args[0], wide.contiguous(), *args[2:]))
    alone = (x[:1].expand(T, -1, -1, -1, -1), wide, [], *geometry)
    assert SPEC(*alone).shape[0] == T


@pytest.mark.skipif(DEVICE != "cpu", reason="how the C++ kernels split their work")
@pytest.mark.parametrize("tasks", [1, 3])
def test_same_bits_on_any_number_of_threads(tasks):
    shapes = (tasks, 4, 20, 20, 16), (tasks, 32, 16, 3, 3), (tasks, 4, 20, 20, 32)
    x, weight, grad = (t.detach() for t in tensors(*shapes, dtype=torch.float32))
    geometry, before = (1, 1, 1, 1, 1, 1, 1), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gradients = DATA(grad, weight, 20, 20, *geometry), WEIGHT(grad, x, 3, 3, *geometry)
        found.append((SPEC(x, weight, [], *geometry), *gradients))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_under_torch_func_and_compile():
    x, weight, bias = (t.detach() for t in tensors((T, 2, 4, 6, 5), (T, 3, 4, 3, 3), (T, 3)))

    def loss(weight, x, run=task_conv2d):
        return run(x[None], weight[None], bias[:1], padding="same").square().sum()

    def plain(weight, x):
        return F.conv2d(x, weight, bias[0], padding="same").square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(weight, x)
    torch.testing.assert_close(found, torch.func.vmap(torch.func.grad(plain))(weight, x))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight[0], x[0]), plain(weight[0], x[0]))


def test_autocast_takes_the_lower_dtype():
    x, weight, bias = (t.detach() for t in tensors((T, 2, 4, 6, 5), (T, 3, 4, 3, 3), (T, 3), dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = task_conv2d(x, weight.bfloat16(), bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), task_conv2d(x, weight, bias), rtol=0.1, atol=0.2)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert task_conv2d(x.double(), weight.double()).dtype == torch.float64


def test_no_rows_and_no_tasks():
    x, weight = (t.detach() for t in tensors((T, 2, 4, 6, 5), (T, 3, 4, 3, 3)))
    assert task_conv2d(x[:, :0], weight).shape == (T, 0, 3, 4, 3)
    assert task_conv2d(x[:0], weight[:0]).shape == (0, 2, 3, 4, 3)
    assert functional.task_conv1d(x[:0, :, :, 0], weight[:1, :, :, 0]).shape == (0, 2, 3, 3)
