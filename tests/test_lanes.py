"""The C++ kernels that run as many small tasks at once as a vector has lanes, where a thread has so many."""

import pytest
import torch
from conftest import DEVICE

from fastmeta.dispatch import native
from fastmeta.dispatch.backends import ACTIVATIONS, use_backend
from fastmeta.dispatch.spec import Make
from fastmeta.ops import _inner_loop, functional_mlp
from fastmeta.ops.adapt_mlp import SPEC as ADAPT
from fastmeta.ops.meta_loss_mlp import BACKWARD as META_LOSS_GRADIENT
from fastmeta.ops.meta_loss_mlp import SPEC as META_LOSS
from fastmeta.testing import check_op

pytestmark = pytest.mark.skipif(not native.has_kernel("meta_loss_mlp", DEVICE), reason="no compiled kernels for it")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("cuda" if DEVICE == "cuda" else "cpp"):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "binary_cross_entropy", "huber"])
def test_inner_loops(loss, activation, dtype):
    make = Make(dtype, DEVICE)
    for tasks, queries, widths, options in (
        (37, 7, (1, 12, 13, 3), {}),
        (26, 45, (4, 21, 2), {"per_task": True, "steps": 3}),
        (12, 1, (2, 3), {"bias": False, "first_order": True}),
        (29, 4, (3, 7, 2), {"elementwise": True}),
        (13, 4, (3, 7, 2), {"elementwise": True, "first_order": True, "bias": False}),
    ):
        args = _inner_loop.arguments(
            make, tasks, 11, queries, widths, "dense", loss=loss, activation=activation, **options
        )
        for needs in (0xFF, 0x30):
            outputs = META_LOSS.fake(*args)
            check_op(META_LOSS_GRADIENT, (*(make.normal(*o.shape) for o in outputs), *args, needs))
        check_op(META_LOSS, args)
        check_op(META_LOSS, args, order=1)
        support = [args[i] for i in (0, 1, 2, 6, *range(8, len(args)))]
        check_op(ADAPT, support)
        check_op(ADAPT, support, order=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_mlp(activation, dtype):
    make = Make(dtype, DEVICE)
    for tasks, rows, widths, shared, bias in (
        (37, 20, (1, 12, 13, 3), "", True),
        (16, 5, (3, 9, 2), "x", True),
        (50, 3, (7, 1), "b", True),
        (31, 50, (4, 21, 8, 2), "", False),
    ):
        args = functional_mlp._inputs(make, tasks, rows, widths, shared, bias)
        check_op(functional_mlp.SPEC, (*args, activation))
        x, weights, biases = args
        mixed = [weights[0][:1], *weights[1:]]  # the first layer is the same for all tasks
        check_op(functional_mlp.SPEC, (x, mixed, biases, activation))
