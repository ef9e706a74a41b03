"""Triton kernels just beyond their blocks: one row, column, class or element more than fits in one.

Samples of the battery are small, so that most of them lie in one block of the interpreter; here every loop over blocks
takes a second step, and a grid has a second program along every dimension.
"""

import importlib
from collections import namedtuple

import pytest
import torch
from conftest import DEVICE
from test_ops import require

from fastmeta import testing, use_backend
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.ops import _inner_loop, contrastive_loss, norm_act_pool, optimizer_steps

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot", "manhattan")
F32, F64 = (torch.float32,), (torch.float64,)
# patches: (module of fastmeta.kernels, name, value), where a constant is too large for the interpreter
Case = namedtuple("Case", "op make dtypes patches", defaults=(F32, ()))


def _distances(make, metric):
    return make.normal(1, 65, 65), make.normal(1, 65, 65), metric


def _prototypical(make, metric, tasks, width):
    support, query = ((make.normal(tasks, 65, width, scale=width**-0.5), make.labels(33, tasks, 65)) for _ in range(2))
    return *support, *query, 33, metric


def _net(make, tasks, rows, widths, shared_x=False, per_task=False):
    lead = tasks if per_task else 1
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = [make.normal(lead, o, i, scale=i**-0.5) for i, o in pairs]
    x = make.normal(1 if shared_x else tasks, rows, widths[0])
    return x, weights, [make.normal(lead, o) for _, o in pairs], "tanh"


def _update(make, rate):
    """A block of 1024 elements and one more; 17 tensors, where a launch takes 16."""
    sizes = (1025, 3, *(1,) * 15)
    lrs = {"float": [], "task": [make.normal(2, 1) for _ in sizes], "element": [make.normal(1, n) for n in sizes]}[rate]
    return [make.normal(1, n) for n in sizes], [make.normal(2, n) for n in sizes], lrs, 0.1


def _step_of(make, op, shared):
    """A block of 1024 elements and one more; 9 tensors, where a launch takes 8."""
    hyper = {0: "task", 1: "element", 2: "tensor"}
    return optimizer_steps._inputs(make, op.removesuffix("_step"), 2, (1025, 3, *(1,) * 7), shared, 1, hyper)


def _inner(make, op, *sizes, form="dense", **departures):
    args = _inner_loop.arguments(make, *sizes, form, **departures)
    return (*args[:3], args[6], *args[8:]) if op == "adapt_mlp" else args


def _convolution(make, tasks, rows, size, inputs, outputs, window, pad=0, shared=False):
    weight = make.normal(1 if shared else tasks, outputs, inputs, *window, scale=0.1)
    x, bias = make.normal(tasks, rows, *size, inputs), make.normal(tasks, outputs)
    return x, weight, [bias[:1] if shared else bias], 1, 1, pad, pad, 1, 1, 1


def _norm(make, tasks, *size, norm="batch", groups=1, activation="relu", pool="max"):
    return norm_act_pool._inputs(make, tasks, *size, norm, groups, activation, 0.0, pool, "wb")


def _norm_bwd(make, *size, **options):
    args = _norm(make, *size, **options)
    return make.normal(*norm_act_pool.fake(*args).shape), *args, 7


# as on a GPU: tiles of 16, and of 1024 elements of a state, where the interpreter would have 64 and 4096
SMALL = (("inner_loop.call", "INTERPRETED", False),)
ONE_PROGRAM = (*SMALL, ("inner_loop.call", "programs_for", lambda *_: 1))  # which takes all tasks
CASES = {
    "class_prototypes": Case("class_prototypes", lambda m: (m.normal(2, 65, 65), m.labels(17, 2, 65), 17), F32 + F64),
    **{f"pairwise_distance-{m}": Case("pairwise_distance", lambda make, m=m: _distances(make, m)) for m in METRICS},
    **{
        f"prototypical_loss-{m}": Case("prototypical_loss", lambda make, m=m: _prototypical(make, m, 1, 65))
        for m in ("sqeuclidean", "cosine")
    },
    # fewer programs than blocks of queries: the last of a task's programs has blocks beyond the end
    "prototypical_loss-blocks": Case(
        "prototypical_loss",
        lambda make: _prototypical(make, "euclidean", 2, 3),
        patches=(("prototypical_loss", "ENOUGH_PROGRAMS", 4),),
    ),
    # room for the weights of two tasks at a time
    "prototypical_loss-scratch": Case(
        "prototypical_loss",
        lambda make: _prototypical(make, "dot", 3, 3),
        F64,
        (("prototypical_loss", "SCRATCH_BYTES", 2 * 65 * 33 * 8), ("prototypical_loss", "ENOUGH_PROGRAMS", 1)),
    ),
    "contrastive_loss": Case("contrastive_loss", lambda m: (contrastive_loss._embeddings(m, 2, 33, 129), 0.5)),
    "functional_mlp-net": Case("functional_mlp", lambda m: _net(m, 2, 33, (17, 20, 3), per_task=True)),
    "functional_mlp-wide-net": Case("functional_mlp", lambda m: _net(m, 2, 17, (33, 17, 64), per_task=True)),
    "functional_mlp-deep": Case("functional_mlp", lambda m: _net(m, 2, 3, (2,) * 10)),
    "functional_mlp-layers": Case("functional_mlp", lambda m: _net(m, 2, 65, (65, 65, 65), per_task=True)),
    "functional_mlp-shared": Case("functional_mlp", lambda m: _net(m, 3, 65, (3, 65, 2))),
    "functional_mlp-shared-input": Case("functional_mlp", lambda m: _net(m, 2, 65, (65, 3), True, True)),
    **{
        f"fast_weight_update-{rate}": Case("fast_weight_update", lambda m, rate=rate: _update(m, rate))
        for rate in ("float", "task", "element")
    },
    **{
        f"{op}-{shared}": Case(op, lambda m, op=op, shared=shared: _step_of(m, op, shared))
        for op, shared in (("sgd_step", "p-"), ("adam_step", "g"))
    },
    "meta_loss_mlp-cross_entropy": Case(
        "meta_loss_mlp",
        lambda m: _inner(m, "meta_loss_mlp", 1, 17, 17, (17, 17, 17), loss="cross_entropy", momentum=0.5),
        F64,
        SMALL,
    ),
    "meta_loss_mlp-gram": Case(
        "meta_loss_mlp",
        lambda m: _inner(
            m, "meta_loss_mlp", 2, 17, 17, (3, 17, 2), form="gram", loss="huber", activation="relu", steps=1
        ),
        F64,
        ONE_PROGRAM,
    ),
    "meta_loss_mlp-binary_cross_entropy": Case(
        "meta_loss_mlp",
        lambda m: _inner(m, "meta_loss_mlp", 1, 2, 35, (3, 35, 30), loss="binary_cross_entropy", steps=1),
        F64,
        SMALL,
    ),
    "adapt_mlp-rows": Case(
        "adapt_mlp",
        lambda m: _inner(m, "adapt_mlp", 2, 17, 0, (2, 17, 17), activation="silu"),
        F64,
        ONE_PROGRAM,
    ),
    "adapt_mlp-state": Case(
        "adapt_mlp",
        lambda m: _inner(m, "adapt_mlp", 1, 2, 0, (35, 30, 2), momentum=0.5, decay=0.1, elementwise=True),
        F64,
        SMALL,
    ),
    "task_conv2d": Case("task_conv2d", lambda m: _convolution(m, 2, 1, (9, 9), 8, 65, (3, 3), 1)),
    # sums of 256 pixels, and of the 68 that are left
    "task_conv2d-parts": Case("task_conv2d", lambda m: _convolution(m, 2, 2, (9, 9), 2, 3, (3, 3), 1, shared=True)),
    # as many channels as whole blocks of columns: each lies within one tap
    "task_conv2d-one-tap": Case(
        "task_conv2d",
        lambda m: _convolution(m, 2, 1, (4, 5), 64, 32, (1, 2)),
        patches=(("_common", "INTERPRETED", False),),
    ),
    "norm_moments-batch": Case("norm_moments", lambda m: (m.normal(2, 2, 9, 9, 65) + 9, "batch", 1)),
    "norm_moments-group": Case("norm_moments", lambda m: (m.normal(1, 2, 1, 2, 65 * 17), "group", 65)),
    "norm_act_pool": Case("norm_act_pool", lambda m: _norm(m, 1, 3, 7, 5, 65)),
    "norm_act_pool_bwd-batch": Case("norm_act_pool_bwd", lambda m: _norm_bwd(m, 1, 3, 7, 5, 65)),
    "norm_act_pool_bwd-bent": Case(
        "norm_act_pool_bwd",
        lambda m: _norm_bwd(m, 1, 1, 11, 11, 66, norm="group", groups=2, activation="silu", pool="average"),
    ),
}


def _patch(monkeypatch, case):
    for module, name, value in case.patches:
        monkeypatch.setattr(importlib.import_module(f"fastmeta.kernels.{module}"), name, value)


@pytest.mark.parametrize(
    "name, dtype",
    [pytest.param(name, d, id=f"{name}-{str(d)[6:]}") for name, case in CASES.items() for d in case.dtypes],
)
def test_beyond_a_block(name, dtype, monkeypatch, poisoned_memory):
    require("triton")
    case = CASES[name]
    _patch(monkeypatch, case)
    args = case.make(Make(dtype, DEVICE))
    with use_backend("triton"):
        for order in (0, 1):
            testing.check_op(REGISTRY[case.op], args, order)


@pytest.mark.parametrize("length", [17, 256 + 17, 16 * 16 + 1])
def test_sums_of_many_rows(length, monkeypatch):
    """Blocks of rows and columns; parts of 256 rows; parts of parts."""
    require("triton")
    from fastmeta.kernels import _sums

    if length == 16 * 16 + 1:
        monkeypatch.setattr(_sums, "ROWS", 16)
    x = Make(torch.float64, DEVICE).normal(2, length, 129)
    torch.testing.assert_close(_sums.sum_rows(x, torch.float64), x.sum(1), rtol=1e-12, atol=1e-12)


# constants of a launch, and which of its sizes they are blocks of: the first that it has
SIZE_OF = {
    "BLOCK_Q": "Q V", "BLOCK_N": "N V", "BLOCK_S": "S", "BLOCK_D": "D", "BLOCK_E": "D entries",
    "BLOCK_C": "C columns channels",
    "BLOCK_B": "rows_per_part B rows", "BLOCK_I": "inputs", "BLOCK_O": "outputs", "BLOCK_R": "R length support",
    "BLOCK_K": "columns", "BLOCK_G": "groups", "BLOCK_W": "width",
    "BLOCK_P": "state pixels_per_part windows_per_part windows pixels", "BLOCK": "lengths columns", "ROWS": "length",
}  # fmt: skip
COVERED = {("mean_kernel", "BLOCK")}  # always as large as what it adds up


def _named(names, values):
    """Numbers by name, of named tuples by the names of their fields."""
    for name, value in zip(names, values, strict=False):
        if hasattr(value, "_fields"):
            yield from _named(value._fields, value)
        elif isinstance(value, int):
            yield name, value
        elif isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
            yield name, max(value)


def _blocks(launch):
    """((kernel, constant), size of the block, size of what it is a block of) of a launch."""
    sizes = dict(_named(launch.kernel.arg_names, launch.arguments))
    constants = launch.constants | getattr(launch.constants.get("HOW"), "_asdict", dict)()
    for constant, side in constants.items():
        if constant in SIZE_OF:
            whole = next((sizes[name] for name in SIZE_OF[constant].split() if name in sizes), None)
            yield (launch.kernel.__name__, constant), side, whole


def test_every_block_is_left(monkeypatch):
    """What is compiled ahead of time names all kernels: each of their blocks has a case above that is larger."""
    require("triton")
    from fastmeta.kernels import OPS, _common, _sums

    with _common.record_launches() as all_launches:
        for op in OPS:
            importlib.import_module(f"fastmeta.kernels.{op}").aot(
                lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
            )
    known = {block for launch in all_launches for block, _, _ in _blocks(launch)}
    left = set()
    with use_backend("triton"), _common.record_launches() as launches:
        _sums.sum_rows(torch.empty(2, 257, 129, device="meta"), torch.float32)
        for case in CASES.values():
            with monkeypatch.context() as patched:
                _patch(patched, case)
                testing.derivative(REGISTRY[case.op], REGISTRY[case.op], case.make(Make(case.dtypes[0], DEVICE)), 1)
    for launch in launches:
        left |= {block for block, side, whole in _blocks(launch) if whole is not None and whole > side}
    assert left == known - COVERED
