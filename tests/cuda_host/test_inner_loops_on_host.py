"""adapt_mlp and meta_loss_mlp: the CUDA kernels and bridges on the CPU's emulation, against gradient descent that plain
torch differentiates twice, in float64.

FASTMETA_HOST_SHARED sets the shared memory that the emulated device has: with little, all or the weights lie in the
scratch. FASTMETA_HOST_BLOCKS sets how many blocks it runs at once.

Every size where a block takes another path has a sample just above it:

threads             64 with more than 4 tasks, else 128; 256 for products of more than 160 tiles
blocks              3 here: of 5 tasks two blocks run two, of 7 one runs three; sums of all blocks 32 at a time
                    (33 blocks), 16 elements a block
results a product   up to 2 per thread: one at a time; up to 4, in shared memory: tiles of one row; else of two rows
                    (128 and 256 results for 64 threads); more tiles than threads go round; an odd last row
sums over rows      tiles of 4 by 4: more than 64 go round (72), and those of the layer behind begin with idle warps
rows                a thread a row in losses and their curvature (65); query rows 128 at once (129), fewer where they do
                    not fit (20 of 40); rows from far memory 2 or 4 fours of columns ahead per thread
steps               checkpoints of weights, moments and rows, of the last step none of rows (3 steps)
layers              sums of 8 parts each (9 layers are more than 64 threads); 16 are the most
the last layer      its logits' tangents lie with the deltas below, if those are as wide
trajectories        a thread a trajectory, a demonstration and a state (65 of each)
memory              all in half of the shared memory, in all of it; rows alone, likewise; nothing
Not reached: products of 2^22 tiles (division), scratch of more than 512 MiB (fewer blocks).
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import build  # noqa: E402

LOSSES = ("cross_entropy", "mse", "binary_cross_entropy", "huber", "maximum_entropy")
ACTIVATIONS = (lambda z: z, torch.relu, torch.tanh, torch.sigmoid, F.silu, F.gelu, torch.sin)
TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-10}
DELTA = 0.7


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    return build.ops(tmp_path_factory)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN, scratch included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


# what the ops mean --------------------------------------------------------------------------------------------------


def row_losses(loss, p, y):
    if loss == 0:
        return F.cross_entropy(p.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    if loss == 1:
        return ((p - y) ** 2).mean(-1)
    if loss == 2:
        return F.binary_cross_entropy_with_logits(p, y, reduction="none").mean(-1)
    return F.huber_loss(p, y, reduction="none", delta=DELTA).mean(-1)


def task_losses(loss, p, y, weight):
    if loss < 4:
        return (row_losses(loss, p, y) * weight).sum(1)
    rewards, (demonstrations, members) = p[..., 0] * weight, y.shape[-2:]
    if y.dim() == 4:
        returns = (rewards[:, :-1, None, None] * y[:, :-1]).sum(1) - y[:, -1]
    else:
        returns = rewards.reshape(len(p), demonstrations, members, -1).sum(3) - y
    return (returns[..., 1:].exp().mean(2).log() - returns[..., 0]).mean(1)


def net(h, weights, biases, activation, given):
    """`h` is the first layer's input, or (given) its pre-activations."""
    for i, w in enumerate(weights):
        h = ACTIVATIONS[activation](h) if given or i else h
        h = torch.bmm(h, w.transpose(1, 2))
        h = h + biases[i][:, None] if biases else h
    return h


def adapted(a):
    """Weights, biases and coefficients after the steps, all with a graph."""
    tasks, layers = a["support_x"].size(0), a["rates"].size(2)
    gram = len(a["weights"]) < layers
    state = [t.expand(tasks, *t.shape[1:]) for t in (*a["weights"], *a["biases"])]
    state.append(torch.zeros_like(a["support_x"]))
    kinds = len(a["weights"])
    layer = [*range(gram, layers)] * (2 if a["biases"] else 1) + [0]
    moments = [torch.zeros_like(t) for t in state]
    for k in range(a["rates"].size(1)):
        first = a["support_x"] - (a["gram_support"] @ state[-1] if gram else 0)
        leaves = [t.detach().requires_grad_() if a["first_order"] else t for t in (*state[:-1], first)]
        leaves = [t if t.requires_grad else t.requires_grad_() for t in leaves]
        prediction = net(leaves[-1], leaves[:kinds], leaves[kinds:-1], a["activation"], gram)
        value = task_losses(a["loss"], prediction, a["support_y"], a["support_weight"]).sum()
        gradients = torch.autograd.grad(value, leaves, create_graph=not a["first_order"], allow_unused=True)
        for i, g in enumerate(gradients):
            last = i + 1 == len(gradients)
            if last and not gram:
                continue
            g = torch.zeros_like(state[i]) if g is None else g
            moments[i] = a["momentum"] * moments[i] + g + (0 if last else a["weight_decay"] * state[i])
            rate = a["rates"][:, k, layer[i]].reshape(-1, *[1] * (state[i].dim() - 1))
            rate = rate * a["element_rates"][i] if a["element_rates"] and not last else rate
            state[i] = state[i] + rate * moments[i] * (1 if last else -1)
    return state[:kinds], state[kinds:-1], state[-1] if gram else torch.zeros(tasks, 0, 0, dtype=torch.float64)


def meta_loss(a):
    weights, biases, coefficients = adapted(a)
    gram = len(weights) < a["rates"].size(2)
    first = a["query_x"] - (a["gram_query"] @ coefficients if gram else 0)
    logits = net(first, weights, biases, a["activation"], gram)
    return task_losses(a["loss"], logits, a["query_y"], a["query_weight"]), logits


# inputs -------------------------------------------------------------------------------------------------------------

META = ("support_x", "support_y", "support_weight", "query_x", "query_y", "query_weight", "gram_support", "gram_query",
        "weights", "biases", "rates", "element_rates", "loss", "activation", "delta", "momentum", "weight_decay",
        "first_order")  # fmt: skip
ADAPT = tuple(n for n in META if not n.startswith("query") and n != "gram_query")
META_GRADIENTS = ("support_x", "query_x", "gram_support", "gram_query", "weights", "biases", "rates", "element_rates")
ADAPT_GRADIENTS = ("support_x", "gram_support", "weights", "biases", "rates", "element_rates")


def problem(dtype=torch.float64, *, tasks=5, support=5, query=6, widths=(3, 9, 6, 2), steps=2, loss=1, activation=2,
            gram=False, bias=True, per_task=(), own_rates=False, elementwise=False, momentum=0.0, weight_decay=0.0,
            first_order=False):  # fmt: skip
    def rand(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def targets(rows):
        if loss == 0:
            return torch.randint(widths[-1], (tasks, rows))
        if loss == 4:
            return rand(tasks, 1, rows // 2) if rows % 2 == 0 else rand(tasks, rows, 3, 4).abs()
        y = rand(tasks, rows, widths[-1])
        return y.sigmoid() if loss == 2 else y

    if loss == 4:
        widths = (*widths[:-1], 1)
    pairs = list(zip(widths, widths[1:], strict=False))[gram:]
    lead = [tasks if i in per_task else 1 for i in range(2 * len(widths))]
    weights = [rand(lead[i], o, n) / max(n, 1) ** 0.5 for i, (n, o) in enumerate(pairs)]
    biases = [rand(lead[len(pairs) + i], o) for i, (_, o) in enumerate(pairs)] if bias else []
    own = [
        rand(tasks if i % 2 and own_rates else 1, *t.shape[1:]).abs() + 0.2 for i, t in enumerate((*weights, *biases))
    ]
    inputs, empty = widths[1 if gram else 0], torch.zeros(0, dtype=dtype)
    return {
        "support_x": rand(tasks, support, inputs),
        "support_y": targets(support),
        "support_weight": rand(tasks, support).abs() / max(support, 1),
        "query_x": rand(tasks, query, inputs),
        "query_y": targets(query),
        "query_weight": rand(tasks, query).abs() / max(query, 1),
        # no symmetric matrix: the kernel must not count on it
        "gram_support": rand(tasks, support, support) if gram else empty,
        "gram_query": rand(tasks, query, support) if gram else empty,
        "weights": weights,
        "biases": biases,
        "rates": 0.05 + 0.2 * rand(tasks if own_rates else 1, steps, len(widths) - 1).sigmoid(),
        "element_rates": own if elementwise else [],
        "loss": loss,
        "activation": activation,
        "delta": DELTA,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "first_order": first_order,
    }


def exact(value):
    if isinstance(value, list):
        return [exact(v) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_()
    return value


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def agree(ours, expected, dtype):
    ours, expected = flat(ours), flat(expected)
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.shape == reference.shape and mine.dtype == dtype
        finite = reference[reference.isfinite()]
        scale = max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
        torch.testing.assert_close(
            mine.double(), reference.detach(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True, check_dtype=False
        )


def both_orders(call):
    """The same bits in whichever order threads run between barriers."""
    results = []
    for order in ("", "reversed"):
        os.environ["FASTMETA_HOST_ORDER"] = order
        results.append(flat(call()))
    os.environ["FASTMETA_HOST_ORDER"] = ""
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return results[0]


def check(ops, a, needs=None, run=both_orders):
    """Both ops and their gradients against the formulas."""
    dtype, e = a["support_x"].dtype, {k: exact(v) for k, v in a.items()}
    for name, formula, names, gradients in (
        ("meta_loss_mlp", meta_loss, META, META_GRADIENTS),
        ("adapt_mlp", adapted, ADAPT, ADAPT_GRADIENTS),
    ):
        arguments = [a[n] for n in names]
        expected = formula(e)
        agree(run(lambda: getattr(ops, name)(*arguments)), expected, dtype)  # noqa: B023
        outputs = flat(expected)
        incoming = [torch.randn_like(t) for t in outputs]
        inputs = [t for n in gradients for t in flat(e[n])]
        total = sum((o * g).sum() for o, g in zip(outputs, incoming, strict=True))
        wanted = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
        wanted = [torch.zeros_like(t) if g is None else g for g, t in zip(wanted, inputs, strict=True)]
        given = iter([g.to(dtype) for g in incoming])
        grads = [[next(given) for _ in o] if isinstance(o, list) else next(given) for o in expected]
        everything = (1 << len(gradients)) - 1
        for bits in (everything,) if needs is None else needs:
            bits &= everything
            ours = run(lambda: getattr(ops, f"{name}_bwd")(*grads, *arguments, bits))  # noqa: B023
            kinds = [bits >> i & 1 for i, n in enumerate(gradients) for _ in flat(e[n])]
            none = torch.empty(0, dtype=torch.float64)
            agree(ours, [w if k else none for w, k in zip(wanted, kinds, strict=True)], dtype)
        if name == "meta_loss_mlp":
            check_one_pass(ops, a, arguments, expected, inputs, everything, run)


def check_one_pass(ops, a, arguments, expected, inputs, everything, run):
    """Outputs and the gradient of the losses' weighted sum in one launch: one weight for all, or each task's own."""
    dtype, tasks = a["support_x"].dtype, len(a["support_x"])
    own = torch.randn(tasks, dtype=torch.float64) * (torch.arange(tasks) != 1)
    for scale in (torch.tensor([0.3], dtype=torch.float64), own):
        scale = scale.to(dtype)
        wanted = torch.autograd.grad((scale * expected[0]).sum(), inputs, allow_unused=True, retain_graph=True)
        wanted = [torch.zeros_like(t) if g is None else g for g, t in zip(wanted, inputs, strict=True)]
        ours = run(lambda: ops.meta_loss_mlp_with_gradient(*arguments, scale, everything))  # noqa: B023
        agree(ours, [*expected, *wanted], dtype)


# the checks ---------------------------------------------------------------------------------------------------------

ALL = range(12)
CASES = {
    "dense": {},
    "gram": {"gram": True},
    "no-bias": {"bias": False, "steps": 3},
    "gram-no-bias": {"gram": True, "bias": False, "per_task": ALL},
    "per-task": {"per_task": ALL, "own_rates": True},
    "some-per-task": {"per_task": (1, 3), "tasks": 7},
    "gram-some-per-task": {"gram": True, "per_task": (0, 3), "own_rates": True, "tasks": 7},
    "one-task": {"tasks": 1},
    "no-task": {"tasks": 0},
    "momentum": {"momentum": 0.9, "steps": 3},
    "gram-momentum": {"gram": True, "momentum": 0.9, "steps": 3},
    "decay": {"weight_decay": 0.1, "steps": 3},
    "momentum-decay": {"momentum": 0.7, "weight_decay": 0.1, "steps": 3, "own_rates": True},
    "element-rates": {"elementwise": True},
    "own-element-rates": {"elementwise": True, "own_rates": True, "bias": False, "tasks": 5},
    "everything": {"elementwise": True, "own_rates": True, "momentum": 0.6, "weight_decay": 0.2, "steps": 3},
    "first-order": {"first_order": True},
    "first-order-everything": {"first_order": True, "elementwise": True, "momentum": 0.6, "weight_decay": 0.2},
    "gram-first-order": {"gram": True, "first_order": True, "momentum": 0.5, "steps": 3},
    "no-steps": {"steps": 0},
    "gram-no-steps": {"gram": True, "steps": 0},
    "no-steps-everything": {"steps": 0, "elementwise": True, "momentum": 0.6, "weight_decay": 0.2},
    "one-layer": {"widths": (3, 2)},
    "gram-one-layer": {"gram": True, "widths": (3, 2)},
    "gram-one-layer-momentum": {"gram": True, "widths": (3, 2), "momentum": 0.5},
    "narrow": {"widths": (1, 1, 1), "support": 1, "query": 1},
    "whole-fours": {"widths": (4, 8, 4, 4), "support": 4, "query": 8},
    "gram-whole-fours": {"gram": True, "widths": (4, 8, 4, 4), "support": 4, "query": 8},
    "deep": {"widths": (2, 5, 3, 4, 5, 3, 2)},
    "nine-layers": {"widths": (2, *[3, 2] * 4, 1), "own_rates": True},
    "sixteen-layers": {"widths": (2, *[3, 2] * 7, 3, 1), "elementwise": True},
    # four rows are read of weights that have fewer, and the layers behind those are small
    "small-below-one": {"widths": (1, 4, 1), "activation": 1},
    "small-below-three": {"widths": (2, 8, 3), "activation": 1},
    "small-below-two": {"widths": (1, 12, 2), "bias": False, "momentum": 0.5},
    "no-hidden-many-rows": {"widths": (3, 0, 2), "support": 300},
    # blocks have more threads where tasks are few
    "few-tasks": {"tasks": 3},
    "few-tasks-everything": {"tasks": 3, "elementwise": True, "momentum": 0.6, "weight_decay": 0.2, "steps": 3},
    "gram-few-tasks": {"gram": True, "tasks": 3},
    "few-tasks-sixteen-layers": {"tasks": 2, "widths": (2, *[3, 2] * 7, 3, 1)},
    "no-support": {"support": 0},
    "gram-no-support": {"gram": True, "support": 0},
    "no-query": {"query": 0},
    "no-input": {"widths": (0, 4, 2)},
    "no-hidden": {"widths": (3, 0, 2)},
    "no-output": {"widths": (3, 4, 0)},
    "wide": {"tasks": 2, "widths": (5, 33, 70, 3), "support": 7, "query": 37},
    "tiles-of-one-row": {"widths": (5, 9, 9, 2), "support": 25, "query": 25},
    "tiles-of-two-rows": {"widths": (5, 9, 9, 2), "support": 43, "query": 43},
    "gram-tiles-of-one-row": {"gram": True, "widths": (5, 11, 2), "support": 13, "query": 13},
    "gram-tiles-of-two-rows": {"gram": True, "widths": (5, 41, 2), "support": 23, "query": 23},
    "many-tiles-of-sums": {"widths": (28, 33, 2), "elementwise": True, "momentum": 0.5},
    "more-rows-than-threads": {"widths": (16, 3, 2), "support": 65, "query": 129, "loss": 0},
    "gram-more-rows-than-threads": {"gram": True, "widths": (2, 3, 2), "support": 65, "query": 129},
    "last-layer-widest": {"widths": (3, 4, 5), "loss": 0},
    "gram-wide": {"gram": True, "tasks": 2, "widths": (5, 66, 34, 3), "support": 19, "query": 75},
}


def once(call):
    return flat(call())


@pytest.mark.parametrize("case", CASES)
def test_cases(ops, case):
    check(ops, problem(**{"activation": 4 if case.startswith("gram") else 2, **CASES[case]}))


IN_SCRATCH = ("dense", "gram", "some-per-task", "gram-momentum", "everything", "gram-one-layer", "no-support")


@pytest.mark.parametrize("case", IN_SCRATCH)
def test_without_shared_memory(ops, monkeypatch, case):
    monkeypatch.setenv("FASTMETA_HOST_SHARED", "0")
    check(ops, problem(activation=1, **CASES[case]))


@pytest.mark.parametrize("kind", ({}, {"gram": True}, {"elementwise": True, "momentum": 0.5}))
def test_weights_too_large_for_shared_memory(ops, monkeypatch, kind):
    monkeypatch.setenv("FASTMETA_HOST_SHARED", "40000")  # the rows' part takes about 30000 bytes, one state 37000
    check(ops, problem(tasks=2, widths=(3, 70, 60, 2), activation=1, **kind), run=once)


@pytest.mark.parametrize("gram", (False, True))
@pytest.mark.parametrize("loss", range(len(LOSSES)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_losses(ops, loss, gram, dtype):
    check(ops, problem(dtype, loss=loss, gram=gram, activation=1, steps=3))


@pytest.mark.parametrize("gram", (False, True))
@pytest.mark.parametrize("activation", range(7))
def test_activations(ops, activation, gram):
    check(ops, problem(activation=activation, gram=gram, loss=0))
    check(ops, problem(torch.float32, activation=activation, gram=gram, loss=0, steps=1))


@pytest.mark.parametrize("kind", ({}, {"gram": True}, {"elementwise": True, "momentum": 0.5}, {"first_order": True}))
def test_what_is_not_needed_is_empty(ops, kind):
    check(ops, problem(tasks=2, **kind), needs=[*(1 << i for i in range(8)), 0, 0x30, 0x0C], run=once)


@pytest.mark.parametrize("gram", (False, True))
def test_query_rows_in_parts(ops, monkeypatch, gram):
    """Shared memory that holds not all query rows at once."""
    monkeypatch.setenv("FASTMETA_HOST_SHARED", "17000")
    for activation in (1, 4):
        check(ops, problem(tasks=2, query=70, widths=(3, 8, 6, 2), gram=gram, activation=activation), run=once)


# going forward: rows by 20 alone, likewise, all, all; going back: nothing, rows by 20, rows, all with rows by 20
@pytest.mark.parametrize("shared", ("12000", "16000", "28000", "32000"))
def test_layouts(ops, monkeypatch, shared):
    monkeypatch.setenv("FASTMETA_HOST_SHARED", shared)
    check(ops, problem(tasks=2, query=40, widths=(3, 26, 24, 2), activation=1), run=once)


@pytest.mark.parametrize("shared", ("0", "17000", "163840"))
@pytest.mark.parametrize("support, query", ((140, 7), (7, 140)))
def test_rows_that_belong_together(ops, monkeypatch, shared, support, query):
    """More query rows than are taken at once when each stands for itself."""
    monkeypatch.setenv("FASTMETA_HOST_SHARED", shared)
    for kind in ({}, {"gram": True, "momentum": 0.5}):
        a = problem(tasks=3, support=support, query=query, widths=(3, 6, 5, 1), loss=4, **kind)
        a["support_weight"] = torch.rand_like(a["support_weight"]) / 10
        check(ops, a, run=once)


@pytest.mark.parametrize("shared", ("0", "163840"))
def test_more_trajectories_than_threads(ops, monkeypatch, shared):
    """Steps in turn on one side, visits of states on the other."""
    monkeypatch.setenv("FASTMETA_HOST_SHARED", shared)
    a = problem(support=130, query=67, widths=(3, 6, 1), loss=4)
    a["support_y"] = torch.randn(5, 65, 2, dtype=torch.float64)
    a["query_y"] = torch.rand(5, 67, 65, 2, dtype=torch.float64)
    a["support_weight"], a["query_weight"] = torch.rand_like(a["support_weight"]), a["query_weight"] / 10
    check(ops, a, run=once)


def test_sums_of_many_blocks(ops, monkeypatch):
    monkeypatch.setenv("FASTMETA_HOST_BLOCKS", "33")
    check(ops, problem(tasks=34, support=3, query=3, widths=(2, 5, 2), elementwise=True), run=once)


def test_a_failed_task_leaves_the_others_alone(ops):
    """Blocks run several tasks one after the other, in the same memory."""
    a = problem(tasks=9, per_task=ALL, own_rates=True, activation=1)
    good = ops.meta_loss_mlp(*[a[n] for n in META])
    a["support_x"][1], a["weights"][0][2] = float("nan"), float("inf")
    ours = ops.meta_loss_mlp(*[a[n] for n in META])
    keep = [0, *range(3, 9)]
    for x, y in zip(good, ours, strict=True):
        assert torch.equal(x[keep], y[keep])
    grads = [torch.ones_like(t) for t in ours]
    for t in flat(ops.meta_loss_mlp_bwd(*grads, *[a[n] for n in META], 0xFF)):
        assert not t.numel() or t[keep].isfinite().all()


def test_labels_out_of_range_touch_nothing_else(ops):
    a = problem(loss=0)
    a["support_y"][0, 0], a["query_y"][1, 1] = -1, 99
    outputs = ops.meta_loss_mlp(*[a[n] for n in META])
    assert all(t.isfinite().all() for t in outputs)
    grads = [torch.ones_like(t) for t in outputs]
    assert all(t.isfinite().all() for t in flat(ops.meta_loss_mlp_bwd(*grads, *[a[n] for n in META], 0xFF)))


def test_half_types_are_refused(ops):
    a = problem(torch.float32)
    half = {k: [t.bfloat16() for t in v] if isinstance(v, list) else v.bfloat16() if isinstance(v, torch.Tensor) else v
            for k, v in a.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match="float32 and float64"):
        ops.meta_loss_mlp(*[half[n] for n in META])
