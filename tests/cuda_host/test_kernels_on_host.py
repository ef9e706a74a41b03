"""The CUDA kernels and their bridges, run on the CPU by an emulation, against float64 formulas in plain torch.

It checks indices, tails, empty sizes, sharing and missing barriers; it says nothing about speed or the GPU itself.

Every size where a kernel takes another path has a sample just above it. A grid has at most 3 x 2 x 2 blocks here
(FASTMETA_HOST_BLOCKS, cuda_host.h): the fourth tile of the first dimension, the third of the others, is a block's
second.

class_prototypes    8 classes, 32 features, 256 labels at once (17 classes, 65 features, 257 rows); going back 8 rows
                    a block, 32 lanes that count rows and copy features
distances           64 queries by 8 classes up to 16, else 64 by 64 (9, 17, 65, 129); 32 features at once; the
                    coefficients always by 8 classes (17); gradients 16 rows by 64 features, 32 of the other side at
                    once (33 rows, 129 features, 33 others)
prototypical_loss   64 queries a block, 16 classes at once (129, 33); means of 128 tasks a block (385); gradients of
                    2^22 pairs at once, then the next tasks
fast_weight_update  256 threads, 4 elements each; 32 tensors a launch; sums over rows by 32 columns and 8 rows (97),
                    over columns by 256 threads (257); 64 rows a sum (193), more from 16385 rows on; then 32 columns a
                    block, 8 sums at once
optimizer_steps     256 threads, 2 elements each (513); 13 tensors a launch (27: the third); sums as above, over both in
                    turn
functional_mlp      in one kernel up to 8 layers and 64 KiB: 32 rows a block, 64 outputs at once, lanes of 32 inputs;
                    else, and going back, products of 64 by 64 tiles (129), 16 terms at once; sums over tasks in pieces
                    of 512 where rows lie one behind the other (1537: the fourth piece), task by task where they do not;
                    at most 64 sums (65 tasks: two in each)
Not reached: 65535 blocks in a dimension, more than 32768 rows in a shared weight's gradient (two pieces in a sum, as
with 65 tasks), gradients of more than 2^16 elements (fewer sums).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import build  # noqa: E402
import special_values as special  # noqa: E402
from plain import TRUTH  # noqa: E402

from fastmeta.dispatch.spec import Make  # noqa: E402
from fastmeta.ops import optimizer_steps  # noqa: E402

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-11}
METRICS = range(5)
ACTIVATIONS = range(7)


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    return build.ops(tmp_path_factory)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote holds NaN, scratch included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def exact(t):
    return t.detach().double().requires_grad_()


def agree(ours, expected, dtype):
    assert ours.shape == expected.shape and ours.dtype == dtype
    scale = max(1.0, expected.abs().max().item() if expected.numel() and expected.isfinite().all() else 1.0)
    torch.testing.assert_close(
        ours.double(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True, check_dtype=False
    )


def both_orders(call):
    """The same bits in whichever order threads run between barriers."""
    results = []
    for order in ("", "reversed"):
        os.environ["FASTMETA_HOST_ORDER"] = order
        results.append(call())
    os.environ["FASTMETA_HOST_ORDER"] = ""

    def flat(result):
        if isinstance(result, torch.Tensor):
            return [result]
        return [t for part in result for t in flat(part)]

    for a, b in zip(*map(flat, results), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return results[0]


# the formulas -----------------------------------------------------------------------------------------------------


def prototypes(x, labels, classes):
    hot = torch.nn.functional.one_hot(labels, classes).to(x.dtype).transpose(1, 2)
    return hot @ x / hot.sum(2, keepdim=True).clamp(min=1)


def distance(q, p, metric):
    a, b = q[:, :, None, :], p[:, None, :, :]
    if metric in (0, 1):
        squared = ((a - b) ** 2).sum(-1)
        if metric == 0:
            return squared
        zero = squared == 0
        return torch.where(zero, squared, torch.where(zero, 1.0, squared).sqrt())
    if metric == 2:
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-8)
    return -(a * b).sum(-1) if metric == 3 else (a - b).abs().sum(-1)


def loss(support, support_labels, query, query_labels, classes, metric):
    d = distance(query, prototypes(support, support_labels, classes), metric)
    own = d.gather(2, query_labels[..., None])[..., 0]
    hits = (d.argmin(2) == query_labels) if d.numel() else query_labels == 0
    return (own + torch.logsumexp(-d, 2)).mean(1), hits.double().mean(1)


ACTIVATION = (
    lambda z: z, torch.relu, torch.tanh, torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu, torch.sin,
)  # fmt: skip


def mlp(x, weights, biases, activation):
    for i, w in enumerate(weights):
        x = x @ w.transpose(1, 2)
        if biases:
            x = x + biases[i][:, None]
        if i + 1 < len(weights):
            x = ACTIVATION[activation](x)
    return x


# the ops ----------------------------------------------------------------------------------------------------------


def name(value):
    """Of a test's parameter: sizes as 2x7x5x6, a dtype without its module."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def labels_of(tasks, rows, classes):
    return torch.randint(classes, (tasks, rows)) if classes else torch.zeros(tasks, rows, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    "shape",
    [(3, 7, 4, 5), (1, 300, 9, 33), (4, 257, 17, 65), (2, 0, 3, 2), (2, 5, 3, 0), (0, 4, 3, 2), (1, 1, 1, 1)],
    ids=name,
)
def test_class_prototypes(ops, shape, dtype):
    tasks, rows, classes, width = shape
    x, labels = rand(tasks, rows, width, dtype=dtype), labels_of(tasks, rows, classes)
    reference = exact(x)
    expected = prototypes(reference, labels, classes)
    agree(both_orders(lambda: ops.class_prototypes(x, labels, classes)), expected, dtype)
    grad = rand(tasks, classes, width, dtype=dtype)
    (d,) = torch.autograd.grad(expected, reference, grad.double())
    agree(both_orders(lambda: ops.class_prototypes_bwd(grad, labels)), d, dtype)


DISTANCES = [(2, 7, 5, 6), (4, 129, 17, 33), (3, 33, 9, 65), (2, 65, 65, 3), (2, 5, 129, 3), (2, 33, 33, 129),
             (1, 1, 1, 1), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", DISTANCES, ids=name)
def test_pairwise_distance(ops, shape, metric, dtype):
    tasks, rows, classes, width = shape
    query, protos = rand(tasks, rows, width, dtype=dtype), rand(tasks, classes, width, dtype=dtype)
    if rows and classes:
        query[:, 0] = protos[:, 0]
    q, p = exact(query), exact(protos)
    expected = distance(q, p, metric)
    ours = both_orders(lambda: ops.pairwise_distance(query, protos, metric))
    agree(ours, expected, dtype)
    if metric in (0, 1, 4) and rows and classes:
        assert (ours[:, 0, 0] == 0).all()
    grad = rand(tasks, rows, classes, dtype=dtype)
    dq, dp = torch.autograd.grad(expected, (q, p), grad.double())
    for needs in (1, 2, 3):
        a, b = both_orders(lambda n=needs: ops.pairwise_distance_bwd(grad, query, protos, metric, n))
        agree(a, dq if needs & 1 else torch.empty(0, dtype=torch.float64), dtype)
        agree(b, dp if needs & 2 else torch.empty(0, dtype=torch.float64), dtype)


def test_zero_vectors_have_no_direction(ops):
    zero, some = torch.zeros(1, 1, 3), torch.ones(1, 2, 3)
    assert (ops.pairwise_distance(zero, some, 2) == 1).all()
    for g in ops.pairwise_distance_bwd(torch.ones(1, 1, 2), zero, some, 2, 3):
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape",
    [(3, 10, 7, 5, 6), (2, 40, 70, 20, 33), (4, 40, 129, 33, 3), (2, 3, 0, 3, 4), (1, 1, 1, 1, 1), (0, 3, 2, 2, 2)],
    ids=name,
)
def test_prototypical_loss(ops, shape, metric, dtype):
    tasks, rows, queries, classes, width = shape
    support, query = rand(tasks, rows, width, dtype=dtype), rand(tasks, queries, width, dtype=dtype)
    y, z = labels_of(tasks, rows, classes), labels_of(tasks, queries, classes)
    s, q = exact(support), exact(query)
    expected, hits = loss(s, y, q, z, classes, metric)
    value, accuracy = both_orders(lambda: ops.prototypical_loss(support, y, query, z, classes, metric))
    agree(value, expected, dtype)
    agree(accuracy, hits, dtype)
    if queries == 0:
        return
    grad = rand(tasks, dtype=dtype)
    ds, dq = torch.autograd.grad(expected, (s, q), grad.double())
    for needs in (1, 2, 3):
        a, b = both_orders(lambda n=needs: ops.prototypical_loss_bwd(grad, support, y, query, z, classes, metric, n))
        agree(a, ds if needs & 1 else torch.empty(0, dtype=torch.float64), dtype)
        agree(b, dq if needs & 2 else torch.empty(0, dtype=torch.float64), dtype)


def test_many_tasks_in_one_mean(ops):
    support, query, y, z = rand(385, 2, 1), rand(385, 2, 1), labels_of(385, 2, 2), labels_of(385, 2, 2)
    value, accuracy = both_orders(lambda: ops.prototypical_loss(support, y, query, z, 2, 0))
    expected, hits = loss(support.double(), y, query.double(), z, 2, 0)
    agree(value, expected, torch.float32)
    agree(accuracy, hits, torch.float32)


def test_more_pairs_than_the_scratch_of_a_gradient(ops):
    tasks, rows, classes, metric = 3, 21846, 64, 2  # rows * classes fit twice into 2^22: two tasks, then the third
    support, query = rand(tasks, classes, 2), rand(tasks, rows, 2)
    y, z = torch.arange(classes).repeat(tasks, 1), labels_of(tasks, rows, classes)
    s, q, grad = exact(support), exact(query), rows * rand(tasks)
    d = 1 - torch.nn.functional.normalize(q, dim=2) @ torch.nn.functional.normalize(s, dim=2).transpose(1, 2)
    value = (d.gather(2, z[..., None])[..., 0] + torch.logsumexp(-d, 2)).mean(1)
    expected = torch.autograd.grad(value, (s, q), grad.double())
    ours = ops.prototypical_loss_bwd(grad, support, y, query, z, classes, metric, 3)
    for mine, reference in zip(ours, expected, strict=True):
        agree(mine, reference, torch.float32)


UPDATES = {  # (param, grad, lr) shapes
    "numbers": ([(3, 5), (1, 5), (3, 1)], [(3, 5), (3, 5), (1, 1)], None),
    "repeated": ([(3, 5), (1, 40)], [(3, 5), (3, 40)], [(1, 1), (3, 1)]),
    "150-rows": ([(150, 3), (1, 37)], [(1, 3), (150, 37)], [(1, 3), (150, 37)]),
    "two-blocks": ([(1, 1500)], [(1, 1500)], [(1, 1)]),
    "rates-of-70-tasks": ([(1, 9)], [(1, 9)], [(70, 1)]),
    "no-gradients": ([(1, 4)], [(0, 4)], [(1, 4)]),
    "no-parameters": ([(0, 4)], [(1, 4)], [(1, 1)]),
    "no-columns": ([(2, 0)], [(2, 0)], [(2, 1)]),
    "70-tensors": ([(2, 3)] * 70, [(2, 3)] * 70, [(1, 1)] * 70),
    "385-columns": ([(1, 385)], [(1, 385)], [(129, 385)]),
    "193-rows-of-257": ([(1, 257)] * 2, [(193, 257)] * 2, [(193, 1), (1, 1)]),
    "16385-rows": ([(1, 2)] * 2, [(16385, 2)] * 2, [(1, 2), (1, 1)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", UPDATES)
def test_fast_weight_update(ops, case, dtype):
    shapes = UPDATES[case]
    params, grads, lrs = ([rand(*s, dtype=dtype) for s in group or ()] for group in shapes)
    p, g, r = ([exact(t) for t in group] for group in (params, grads, lrs))
    sizes = {t.size(0) for t in params + grads + lrs} - {1}
    tasks = sizes.pop() if sizes else 1
    expected = [
        (a - (r[i] if r else 0.3) * b).expand(tasks, a.size(1)) for i, (a, b) in enumerate(zip(p, g, strict=True))
    ]
    outs = both_orders(lambda: ops.fast_weight_update(params, grads, lrs, 0.3))
    for ours, reference in zip(outs, expected, strict=True):
        agree(ours, reference, dtype)
    grad_outs = [rand(*e.shape, dtype=dtype) for e in expected]
    derivatives = torch.autograd.grad(expected, [*g, *r], [t.double() for t in grad_outs])
    for needs in (1, 2, 3):
        dg, dr = both_orders(lambda n=needs: ops.fast_weight_update_bwd(grad_outs, grads, lrs, 0.3, n))
        for i, (ours, reference) in enumerate(zip([*dg, *dr], derivatives, strict=True)):
            needed = needs & (1 if i < len(g) else 2)
            agree(ours, reference if needed else torch.empty(0, dtype=torch.float64), dtype)


ALL = {0: "task", 1: "tensor", 2: "element", 3: "task element", 4: "task"}
STEPS = {  # op, and what `optimizer_steps._inputs` takes: T, sizes, shared, flag, which hyper-parameters are tensors
    "sgd-first": ("sgd_step", 3, (7, 129, 1), "p-", 0, {}),
    "sgd-learned": ("sgd_step", 2, (5, 3), "g", 1, ALL),
    "adam-27-tensors": ("adam_step", 2, (3,) * 27, "", 1, {0: "task"}),
    "adam-four-blocks": ("adam_step", 3, (513, 1), "", 0, {}),
    "adam-learned": ("adam_step", 3, (257, 2), "p", 1, ALL),
    "adam-shared-states": ("adam_step", 9, (5, 1), "s", 1, {2: "tensor"}),
    "adam-one-task": ("adam_step", 1, (5, 1), "", 1, ALL),
    "adam-no-tasks": ("adam_step", 0, (5, 1), "p", 0, ALL),
    "adam-no-columns": ("adam_step", 2, (0, 3), "p", 0, ALL),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", STEPS)
def test_optimizer_steps(ops, case, dtype):
    op, *sizes = STEPS[case]
    args = optimizer_steps._inputs(Make(dtype), op.removesuffix("_step"), *sizes)
    right = [[exact(t) for t in arg] if isinstance(arg, list) else arg for arg in args]
    expected = TRUTH[op](*right)
    outs = both_orders(lambda: getattr(ops, op)(*args))
    for ours, reference in zip(special.flat(outs), special.flat(expected), strict=True):
        agree(ours, reference, dtype)
    grads = [[rand(*t.shape, dtype=dtype) for t in of] for of in expected]
    leaves = [t for arg in right if isinstance(arg, list) for t in arg]
    cotangents = [t.double() for t in special.flat(grads)]
    derivatives = [torch.zeros_like(t) for t in leaves]  # without tasks there is nothing to differentiate
    if any(t.requires_grad for t in special.flat(expected)):
        derivatives = torch.autograd.grad(
            special.flat(expected), leaves, cotangents, allow_unused=True, materialize_grads=True
        )
    bits = [bit for bit, arg in enumerate(a for a in args if isinstance(a, list)) for _ in arg]
    for needs in (2, 2 ** (max(bits) + 1) - 1):
        found = both_orders(lambda n=needs: getattr(ops, f"{op}_bwd")(*grads, *args, n))
        for bit, ours, reference in zip(bits, special.flat(found), derivatives, strict=True):
            agree(ours, reference if needs >> bit & 1 else torch.empty(0, dtype=torch.float64), dtype)


# (tasks of x, of the weights of each layer, of the biases of each layer or None), rows, widths
MLPS = {
    "own": (2, (2, 2), (2, 2), 5, (3, 4, 2)),
    "shared": (3, (1, 1, 1), (1, 1, 1), 9, (5, 7, 6, 3)),
    "shared-rows": (1, (3, 1), (1, 3), 6, (4, 5, 3)),
    "no-bias": (3, (1, 3), None, 35, (2, 70, 1)),
    "many-outputs": (2, (1, 1), (2, 1), 3, (4, 70, 66)),
    "1537-rows": (1, (1,), (1,), 1537, (3, 2)),
    "too-wide-for-one-kernel": (1, (2, 2), (2, 2), 1, (180, 170, 2)),
    "8-layers": (2, (2,) * 8, (2,) * 8, 4, (3,) * 9),
    "9-layers": (2, (2,) * 9, (2,) * 9, 4, (3,) * 10),  # too deep for one kernel
    "65-rows": (4, (4, 4), (4, 4), 65, (33, 65, 34)),
    "129-rows": (4, (4, 4), (4, 4), 129, (17, 129, 2)),  # in one kernel in float32 alone
    "65-tasks": (1, (1, 65), (1, 65), 2, (2, 3, 2)),
    "520-outputs": (1, (4, 4), (4, 4), 1, (2, 130, 2)),  # of all tasks
    "no-rows": (2, (1, 1), (1, 1), 0, (3, 4, 2)),
    "no-tasks": (0, (1, 1), (1, 1), 3, (3, 4, 2)),
    "no-tasks-of-weights": (1, (0, 1), (1, 0), 3, (3, 4, 2)),
    "no-inputs": (2, (2, 2), (1, 2), 3, (0, 4, 2)),
    "no-hidden": (2, (1, 1), (1, 1), 3, (3, 0, 2)),
    "no-outputs": (2, (2, 2), (2, 2), 3, (3, 4, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", MLPS)
@pytest.mark.parametrize("activation", (1, 4))
def test_functional_mlp(ops, case, activation, dtype):
    check_mlp(ops, MLPS[case], activation, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation):
    check_mlp(ops, MLPS["own"], activation, torch.float64)


def check_mlp(ops, case, activation, dtype):
    x_tasks, w_tasks, b_tasks, rows, widths = case
    x = rand(x_tasks, rows, widths[0], dtype=dtype)
    weights = [
        rand(t, o, i, dtype=dtype) / max(i, 1) ** 0.5 for t, i, o in zip(w_tasks, widths, widths[1:], strict=False)
    ]
    biases = [rand(t, o, dtype=dtype) for t, o in zip(b_tasks, widths[1:], strict=True)] if b_tasks else []
    inputs = [exact(t) for t in (x, *weights, *biases)]
    expected = mlp(inputs[0], inputs[1 : 1 + len(weights)], inputs[1 + len(weights) :], activation)
    agree(both_orders(lambda: ops.functional_mlp(x, weights, biases, activation)), expected, dtype)
    grad = rand(*expected.shape, dtype=dtype)
    derivatives = torch.autograd.grad(expected, inputs, grad.double())
    for needs in (1, 2, 4, 7):
        dx, dw, db = both_orders(lambda n=needs: ops.functional_mlp_bwd(grad, x, weights, biases, activation, n))
        bits = [1] + [2] * len(dw) + [4] * len(db)
        for ours, reference, bit in zip([dx, *dw, *db], derivatives, bits, strict=True):
            agree(ours, reference if needs & bit else torch.empty(0, dtype=torch.float64), dtype)


@pytest.mark.parametrize("value", special.VALUES)
def test_special_values(ops, value):
    for case in special.cases(value):
        name = case.name.split("-")[0]
        if not hasattr(ops, name) or name == "contrastive_loss":
            continue
        tensors = [t.float() for t in case.tensors]
        truth, gradients = special.with_gradients(case.plain, [t.double() for t in tensors], 1)
        arguments = [
            names.index(a) if isinstance(a, str) else a
            for names in [list(special.METRICS) if "distance" in name or "loss" in name else list(special.ACTIVATIONS)]
            for a in case.arguments(*tensors)
        ]
        ours = special.flat(getattr(ops, name)(*arguments))
        cotangent = torch.linspace(0.5, 1.5, truth[0].numel()).view(truth[0].shape)
        if name == "class_prototypes":
            found = [ops.class_prototypes_bwd(cotangent, arguments[1])]
        elif name == "fast_weight_update":  # nothing to compute for the first
            found = [cotangent, *special.flat(ops.fast_weight_update_bwd([cotangent], *arguments[1:], 3))]
        elif name == "adam_step":  # no gradient of the averages, and none is asked of the squares before
            found = special.flat(ops.adam_step_bwd([cotangent], [], [], [], *arguments, 7))[:3]
        elif name == "task_conv2d":
            x, weight, _, *geometry = arguments
            of_x = ops.task_conv2d_bwd_data(cotangent, weight, *x.shape[2:4], *geometry)
            of_weight = ops.task_conv2d_bwd_weight(cotangent, x, *weight.shape[3:], *geometry)
            found = [of_x.view_as(tensors[0]), of_weight, cotangent.sum((1, 2, 3))]
        else:
            found = special.flat(getattr(ops, f"{name}_bwd")(cotangent, *arguments, 7 if "mlp" in name else 3))
        for a, b in zip([*ours, *found], [*truth, *gradients], strict=True):
            special.agree(a, b, 2e-4, case.name)
