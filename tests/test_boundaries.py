"""The C++ kernels at sizes just above each of their internal boundaries, against the float64 reference.

A kernel that works in blocks is right on small inputs however it goes on to its second block. Boundaries, by file of
csrc/cpu (W: numbers of a vector; 2 to 16, by instruction set and dtype), and what crosses them below:

include/fastmeta/gemm.h       96 rows; 256 of the depth (first, middle and last block of a finish); panels of two and
                              three vectors, their tails; tiles of up to 8 rows
pairwise_distance_kernel.h    96 queries; chunks of prototypes, about 1000 of 64 features, 6 W where rows are wide;
                              distances formed anew in a later chunk; gradient: blocks of up to 96 queries, fewer where
                              rows are wide
prototypical_loss_kernel.h    blocks of up to 96 queries, more than one vector of them; more classes than 96
prototypical_loss.cpp,        few tasks on several threads: ranges of queries, each with its own sums and its own
pairwise_distance.cpp         gradient of the prototypes
class_prototypes.cpp          few tasks on several threads: ranges of columns, at least 256
contrastive_loss*             blocks of 48 rows; tiles of 240 columns, across which a maximum is carried
blocks.h (fast_weight_update, blocks of 32768 numbers, of 4096 columns and 8 rows where operands repeat; partial sums by
optimizer_steps)              block row and column, added up 1024 columns at a time
functional_mlp_kernel.h       blocks of rows, up to 96 and fewer where layers are wide; 256 inputs
functional_mlp.cpp            ranges of rows and groups of tasks by thread: one partial gradient by item or by group,
                              added up 1024 numbers at a time; tasks that share all weights merged into one
functional_mlp_lanes.h        packs of W tasks and a last one of fewer; 20 rows at once
lanes.h                       tiles of 6 or 10 rows and of two columns; fewer rows where a depth above 149 outgrows the
                              cache; 8 columns of a bias at once
conv/strips.h                 blocks of about 320 pixels, 1 MB: of some whole images, or of rows of one; phases
conv/addressed.h, weights.h   depth in blocks of 20 KB of a panel (160 to 640 numbers); panels, their tails; groups
conv/tiles.h                  in float32 blocks of 48 to 96 tiles of 2x2 outputs, over lines and images; odd borders
task_conv2d.cpp               ranges of lines of a task's images, each with its own gradient of the weights; tasks that
                              share weights and bias merged into one
norm_act_pool.cpp             blocks of about 512 pixels, whole lines of outputs; tasks or images side by side, or a
                              unit's blocks where threads would have unlike shares; groups of channels
conv/moments.h                64 pixels that are read twice, four vectors of channels
conv/window.h                 two or four vectors of channels, one, and a part of one; windows of 2x2 pixels and what an
                              odd size leaves over
inner_loop/worker.h, kernel.h 48 query rows; segments of about sqrt(steps) steps where 8 MB do not hold all of them;
                              a task after another on the same scratch memory; a group of tasks by thread
inner_loop/gemm.h, net.h      tiles by number of rows and of vectors; sums along vectors where rows are too few to pay
                              for a transposed copy of the weights, four columns at a time
inner_loop/rows.h, paths.h    more outputs than a vector; more trajectories, and more samples of one, than a vector
inner_loop/lanes*.h           packs of W tasks and a last one of fewer; 20 query rows; sums of rates' gradients in parts
                              of 32 numbers, of shared inputs' gradients four at a time
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import CUDA

from fastmeta import testing, use_backend
from fastmeta.dispatch import native
from fastmeta.dispatch.backends import METRICS
from fastmeta.dispatch.spec import REGISTRY, Make
from fastmeta.ops import (
    _inner_loop,
    contrastive_loss,
    fast_weight_update,
    functional_mlp,
    norm_act_pool,
    optimizer_steps,
    prototypical_loss,
    task_conv2d,
)

pytestmark = pytest.mark.skipif(CUDA or native.why_missing is not None, reason="needs the C++ kernels and a CPU")


class Case(NamedTuple):
    op: str
    arguments: Callable[[Make], tuple]
    threads: int = 1


def distance(metric: str, tasks: int, queries: int, classes: int, width: int, threads: int = 1) -> Case:
    def arguments(make):
        query, prototypes = make.normal(tasks, queries, width), make.normal(tasks, classes, width)
        if metric in ("sqeuclidean", "euclidean"):
            query[:, -1], query[:, 0] = prototypes[:, classes // 2], prototypes[:, -1]  # distances to be formed anew
        return query, prototypes, metric

    return Case("pairwise_distance", arguments, threads)


def loss(metric: str, *sizes: int, threads: int = 1) -> Case:
    return Case("prototypical_loss", lambda make: (*prototypical_loss._inputs(make, *sizes), metric), threads)


def prototypes(tasks: int, width: int) -> Case:
    return Case("class_prototypes", lambda make: (make.normal(tasks, 7, width), make.labels(3, tasks, 7), 3), 2)


def contrast(*sizes: int, threads: int = 1) -> Case:
    return Case("contrastive_loss", lambda make: (contrastive_loss._embeddings(make, *sizes), 0.05), threads)


def update(shared: str, rates: str | None, threads: int = 1) -> Case:
    return Case("fast_weight_update", lambda m: fast_weight_update._inputs(m, 9, (4100, 3), shared, rates), threads)


def optimizer(op: str, shared: str, hyper: dict, threads: int = 1) -> Case:
    kind = op.removesuffix("_step")
    return Case(op, lambda m: optimizer_steps._inputs(m, kind, 9, (4100, 3), shared, 1, hyper), threads)


def mlp(activation: str, *sizes, shared: str = "", threads: int = 1) -> Case:
    inputs = functional_mlp._inputs
    return Case("functional_mlp", lambda make: (*inputs(make, *sizes, shared, True), activation), threads)


def conv(*sizes, geometry=task_conv2d.SAME, shared: str = "", threads: int = 1) -> Case:
    """`sizes`: tasks, images, height, width, channels, filters, kernel height and width."""
    return Case("task_conv2d", lambda make: task_conv2d._inputs(make, *sizes, geometry, shared, True), threads)


def moments(norm: str, *sizes: int, groups: int = 1) -> Case:
    return Case("norm_moments", lambda make: (make.normal(*sizes), norm, groups))


def block(norm: str, activation: str, pool: str, *sizes: int, groups=1, affine="wb", threads=1) -> Case:
    """`sizes`: tasks, images, height, width, channels."""

    def arguments(make):
        return norm_act_pool._inputs(make, *sizes, norm, groups, activation, 0.0, pool, affine)

    return Case("norm_act_pool", arguments, threads)


def inner(*sizes, form: str = "dense", threads: int = 1, paths: tuple[int, int] | None = None, **options) -> Case:
    """`sizes`: tasks, support rows, query rows, widths; `paths`: demonstrations and members of visits."""

    def arguments(make):
        args = list(_inner_loop.arguments(make, *sizes, form, **options))
        if options.get("steps", 0) > 10:
            args[10] = args[10] / 2  # rates at which so many steps do not diverge
        if paths:
            args[1], args[4] = (make.uniform(0, 2, sizes[0], n, *paths) for n in sizes[1:3])
        return tuple(args)

    return Case("meta_loss_mlp", arguments, threads)


LONG = {"steps": 23}  # in 8 MB are states and rows of some ten steps of the samples that have them

CASES = {
    # ---- distances
    **{f"{metric}-97-queries": distance(metric, 2, 98, 5, 7) for metric in METRICS},
    **{f"{metric}-ranges-of-queries": distance(metric, 1, 197, 17, 33, 2) for metric in METRICS},
    **{f"{metric}-chunks-of-prototypes": distance(metric, 1, 5, 98, 1366) for metric in METRICS},
    "chunks-and-97-queries": distance("euclidean", 1, 98, 50, 1366),
    # ---- prototypical loss
    **{f"{metric}-loss-97-queries": loss(metric, 2, 41, 98, 20, 261) for metric in METRICS},
    **{f"{metric}-loss-ranges-of-queries": loss(metric, 3, 41, 197, 20, 9, threads=2) for metric in METRICS},
    "loss-97-classes": loss("sqeuclidean", 2, 101, 9, 98, 5),
    "loss-97-classes-dot": loss("dot", 2, 101, 9, 98, 5),
    # ---- class prototypes
    "prototypes-one-task-in-ranges": prototypes(1, 515),
    "prototypes-tasks-in-ranges": prototypes(3, 515),
    # ---- contrastive loss
    "contrast-241-columns": contrast(2, 121, 5),
    "contrast-481-columns-257-features": contrast(1, 241, 259, threads=2),
    # ---- inner step
    "update-one-long-row": update("", None),
    "update-rate-of-tasks": update("", "task", 2),
    "update-rate-of-tensors": update("", "tensor"),
    "update-rate-of-tensors-shared-gradients": update("g", "tensor"),
    "update-rate-of-elements": update("p", "element"),
    "update-rate-of-elements-shared-gradients": update("g", "element", 2),
    "update-rate-of-all-shared-gradients": update("g", "task element"),
    # ---- steps of optimisers
    "sgd-one-long-row": optimizer("sgd_step", "", {}, 2),
    "sgd-shared-parameters": optimizer("sgd_step", "p", {0: "element", 1: "tensor", 2: "task"}),
    "adam-one-long-row": optimizer("adam_step", "", {0: "tensor"}, 2),
    "adam-shared-parameters": optimizer("adam_step", "p-", {0: "element", 3: "task element", 4: "task"}),
    "adam-shared-states": optimizer("adam_step", "gs", {1: "element", 2: "task"}, 2),
    # ---- a net
    "mlp-97-rows": mlp("gelu", 2, 98, (3, 5, 2)),
    "mlp-513-inputs-257-hidden": mlp("relu", 2, 98, (515, 261, 3)),
    "mlp-one-task-in-ranges": mlp("tanh", 1, 130, (40, 33, 2), threads=2),
    "mlp-tasks-in-ranges": mlp("tanh", 3, 70, (40, 33, 2), threads=2),
    "mlp-tasks-in-ranges-sharing": mlp("relu", 3, 70, (5, 33, 2), shared="xb", threads=2),
    "mlp-tasks-merged": mlp("tanh", 3, 70, (5, 33, 2), shared="wb", threads=2),
    "mlp-groups-of-tasks": mlp("relu", 9, 5, (5, 33, 2), shared="b", threads=2),
    "mlp-packs": mlp("relu", 37, 9, (3, 9, 5), threads=2),
    "mlp-packs-21-rows": mlp("tanh", 37, 25, (3, 9, 2)),
    "mlp-packs-150-inputs": mlp("relu", 21, 9, (230, 9, 2)),
    # ---- convolutions
    "conv-strips": conv(1, 2, 21, 17, 3, 5, 3, 3),
    "conv-strips-without-borders": conv(1, 2, 22, 19, 3, 5, 3, 2, geometry=task_conv2d.PLAIN),
    "conv-strips-of-phases": conv(2, 1, 40, 37, 3, 5, 3, 3, geometry=(2, 2, 1, 1, 1, 1, 1)),
    "conv-strips-of-groups": conv(1, 1, 21, 21, 6, 9, 3, 3, geometry=(1, 1, 2, 2, 2, 2, 3)),
    "conv-blocks-of-images": conv(2, 8, 7, 7, 75, 21, 3, 3),
    "conv-wide-rows": conv(1, 2, 6, 20, 2400, 3, 1, 1, geometry=task_conv2d.PLAIN),
    "conv-tiles": conv(2, 3, 15, 17, 16, 24, 3, 3),
    "conv-tiles-without-borders": conv(1, 2, 22, 13, 21, 35, 3, 3, geometry=task_conv2d.PLAIN),
    "conv-tiles-deep": conv(1, 2, 8, 14, 261, 17, 3, 3, shared="b"),
    "conv-ranges-of-rows": conv(1, 5, 19, 19, 16, 24, 3, 3, threads=2),
    "conv-tasks-in-ranges": conv(3, 5, 19, 19, 16, 24, 3, 3, shared="x", threads=2),
    "conv-tasks-merged": conv(3, 2, 19, 19, 16, 24, 3, 3, shared="wb", threads=2),
    # ---- norm, activation and pool
    "moments-batch": moments("batch", 2, 3, 19, 13, 67),
    "moments-group": moments("group", 2, 2, 23, 25, 6, groups=2),
    "norm-batch": block("batch", "relu", "max", 3, 2, 31, 27, 19, threads=2),
    "norm-67-channels": block("batch", "relu", "max", 1, 2, 19, 15, 67),
    "norm-group": block("group", "relu", "average", 2, 2, 29, 25, 12, groups=3),
    "norm-given": block("given", "relu", "none", 2, 2, 13, 25, 9, affine="s"),
    "norm-curved": block("batch", "gelu", "max", 1, 2, 33, 19, 17),
    # ---- inner loops, a task at a time
    "inner-97-queries": inner(2, 4, 98, (3, 9, 7, 2)),
    "inner-97-queries-gram": inner(2, 4, 98, (3, 9, 7, 2), form="gram", activation="relu"),
    "inner-97-queries-labels": inner(2, 20, 98, (3, 9, 35), loss="cross_entropy", activation="relu"),
    "inner-17-targets": inner(2, 5, 7, (3, 9, 35), loss="binary_cross_entropy"),
    "inner-few-rows-wide": inner(2, 5, 4, (65, 130, 41, 5)),
    "inner-few-rows-wide-relu": inner(2, 3, 2, (130, 67, 41, 37), activation="relu", per_task=True),
    "inner-one-row-wide-gram": inner(2, 1, 7, (65, 130, 41, 5), form="gram"),
    "inner-tiles": inner(2, 17, 25, (70, 77, 9, 35)),
    "inner-groups": inner(5, 4, 5, (3, 9, 2), threads=2, elementwise=True),
    "inner-groups-gram": inner(5, 4, 5, (3, 9, 2), threads=2, form="gram", momentum=0.5),
    "inner-segments": inner(2, 700, 3, (3, 64, 2), **LONG),
    "inner-segments-momentum": inner(1, 700, 3, (3, 64, 2), momentum=0.5, decay=0.1, **LONG),
    "inner-segments-gram-momentum": inner(1, 250, 3, (3, 64, 64, 64, 2), form="gram", momentum=0.5, **LONG),
    "inner-17-samples": inner(2, 40, 98, (3, 9, 1), loss="maximum_entropy"),
    "inner-17-paths-visits": inner(2, 7, 5, (3, 9, 1), loss="maximum_entropy", paths=(3, 20)),
    # ---- inner loops, in packs of tasks
    "packs-150-inputs-21-queries": inner(13, 5, 45, (160, 23, 2), loss="cross_entropy"),
    "packs-150-rows": inner(9, 151, 21, (3, 11, 2), activation="relu", per_task=True),
    "packs-in-groups": inner(50, 5, 23, (3, 9, 7, 2), threads=2),
    "packs-in-groups-elementwise": inner(50, 5, 23, (3, 9, 2), threads=2, elementwise=True),
}


def check_gradient_with_values(spec, args) -> None:
    """The gradient of the sum of losses, which a kernel finds with the losses themselves."""

    def gradients(function, args):
        args, leaves = testing.differentiable_leaves(spec, args)
        total = testing.tensors_of(function(*args))[0].sum()
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    truth, own = gradients(spec.reference, testing.to_float64(args)), gradients(spec.reference, args)
    for found, right, reference in zip(gradients(spec, args), truth, own, strict=True):
        allowed = testing.tolerance(found.dtype, 1, testing.relative_error(reference, right))
        assert testing.relative_error(found, right) <= allowed


@pytest.fixture(params=CASES)
def case(request):
    case, before = CASES[request.param], torch.get_num_threads()
    torch.set_num_threads(case.threads)
    with use_backend("cpp"):
        yield case
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_values_and_gradients(case, dtype, poisoned_memory):
    spec, args = REGISTRY[case.op], case.arguments(Make(dtype))
    if spec.with_gradient:
        check_gradient_with_values(spec, args)
    # the others' second derivative is torch's
    closed = case.op in ("class_prototypes", "fast_weight_update", "norm_act_pool")
    for order in range(3 if closed else 2):
        testing.check_op(spec, args, order)
