"""The CUDA kernels and their bridges, run on the CPU by an emulation, against float64 formulas in plain torch.

It checks indices, tails, empty sizes, sharing and missing barriers; it says nothing about speed or the GPU itself.
FASTMETA_HOST_LIBRARY names a library that is built already (for one with a sanitizer).
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import special_values as special  # noqa: E402

import build  # noqa: E402

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-11}
METRICS = range(5)
ACTIVATIONS = range(7)


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    if build.compiler() is None:
        pytest.skip("no g++ to compile the emulation with")
    library = os.environ.get("FASTMETA_HOST_LIBRARY") or build.build(tmp_path_factory.mktemp("cuda_host"))
    torch.ops.load_library(str(library))
    return torch.ops.fastmeta_cuda_host


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


def labels_of(tasks, rows, classes):
    return torch.randint(classes, (tasks, rows)) if classes else torch.zeros(tasks, rows, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 7, 4, 5), (1, 300, 9, 33), (2, 0, 3, 2), (2, 5, 3, 0), (0, 4, 3, 2), (1, 1, 1, 1)]
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


DISTANCES = [(2, 7, 5, 6), (1, 130, 17, 40), (3, 33, 9, 65), (2, 66, 70, 3), (1, 1, 1, 1), (2, 0, 3, 4), (2, 3, 0, 4),
             (2, 3, 4, 0), (0, 3, 4, 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", DISTANCES)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape", [(3, 10, 7, 5, 6), (2, 40, 70, 20, 33), (2, 3, 0, 3, 4), (1, 1, 1, 1, 1), (0, 3, 2, 2, 2)]
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


UPDATES = [  # (param, grad, lr) shapes
    ([(3, 5), (1, 5), (3, 1)], [(3, 5), (3, 5), (1, 1)], None),
    ([(3, 5), (1, 40)], [(3, 5), (3, 40)], [(1, 1), (3, 1)]),
    ([(150, 3), (1, 37)], [(1, 3), (150, 37)], [(1, 3), (150, 37)]),
    ([(1, 1500)], [(1, 1500)], [(1, 1)]),
    ([(1, 9)], [(1, 9)], [(70, 1)]),
    ([(1, 4)], [(0, 4)], [(1, 4)]),
    ([(0, 4)], [(1, 4)], [(1, 1)]),
    ([(2, 0)], [(2, 0)], [(2, 1)]),
    ([(2, 3)] * 70, [(2, 3)] * 70, [(1, 1)] * 70),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(UPDATES)))
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


# (tasks of x, of the weights of each layer, of the biases of each layer or None), rows, widths
MLPS = [
    (2, (2, 2), (2, 2), 5, (3, 4, 2)),
    (3, (1, 1, 1), (1, 1, 1), 9, (5, 7, 6, 3)),
    (1, (3, 1), (1, 3), 6, (4, 5, 3)),
    (3, (1, 3), None, 35, (2, 70, 1)),
    (2, (1, 1), (2, 1), 3, (4, 70, 66)),
    (1, (1,), (1,), 1030, (3, 2)),
    (1, (2, 2), (2, 2), 1, (180, 170, 2)),  # too wide for one kernel
    (2, (2,) * 10, (2,) * 10, 4, (3,) * 11),  # too deep for it
    (2, (1, 1), (1, 1), 0, (3, 4, 2)),
    (0, (1, 1), (1, 1), 3, (3, 4, 2)),
    (1, (0, 1), (1, 0), 3, (3, 4, 2)),
    (2, (2, 2), (1, 2), 3, (0, 4, 2)),
    (2, (1, 1), (1, 1), 3, (3, 0, 2)),
    (2, (2, 2), (2, 2), 3, (3, 4, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(MLPS)))
@pytest.mark.parametrize("activation", (1, 4))
def test_functional_mlp(ops, case, activation, dtype):
    check_mlp(ops, MLPS[case], activation, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(ops, activation):
    check_mlp(ops, MLPS[0], activation, torch.float64)


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
        else:
            found = special.flat(getattr(ops, f"{name}_bwd")(cotangent, *arguments, 7 if "mlp" in name else 3))
        for a, b in zip([*ours, *found], [*truth, *gradients], strict=True):
            special.agree(a, b, 2e-4, case.name)
