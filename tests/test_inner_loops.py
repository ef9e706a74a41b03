"""`adapt_mlp` and `meta_loss_mlp`: against `torch.func` on one task at a time, in float64, for combinations of options.

`test_references.py` says what the ops mean; here the functions are tested, and what they promise beside it.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import ACTIVATIONS, maximum_entropy
from torch.autograd import gradcheck

from fastmeta.dispatch.backends import use_backend
from fastmeta.functional import adapt_mlp, functional_mlp, meta_loss_mlp
from fastmeta.functional.inner_loops import mean_meta_loss_mlp

ROW_LOSSES = ("cross_entropy", "mse", "binary_cross_entropy", "huber")
LOSSES = (*ROW_LOSSES, "maximum_entropy")


def problem(loss="mse", tasks=3, rows=4, queries=5, widths=(6, 8, 5, 2), bias=True, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(DEVICE, dtype)

    def targets(n):
        if loss == "cross_entropy":
            return torch.randint(widths[-1], (tasks, n), generator=g).to(DEVICE)
        if loss == "binary_cross_entropy":
            return torch.rand(tasks, n, widths[-1], generator=g, dtype=torch.float64).to(DEVICE, dtype)
        if loss == "maximum_entropy":  # log q of two demonstrations with two samples each; or visits
            return (
                normal(tasks, 2, 3)
                if n % 6 == 0
                else torch.randint(0, 3, (tasks, n, 2, 4), generator=g).to(DEVICE, dtype)
            )
        return normal(tasks, n, widths[-1])

    if loss == "maximum_entropy":
        widths = (*widths[:-1], 1)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = [normal(o, i, scale=i**-0.5).requires_grad_() for i, o in pairs]
    biases = [normal(o, scale=0.3).requires_grad_() for _, o in pairs] if bias else None
    support_x, query_x = normal(tasks, rows, widths[0]), normal(tasks, queries, widths[0])
    return (support_x, targets(rows), query_x, targets(queries)), weights, biases


def one_task_loss(loss, prediction, target, delta=1.0):
    if loss == "cross_entropy":
        return F.cross_entropy(prediction, target)
    if loss == "mse":
        return F.mse_loss(prediction, target)
    if loss == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(prediction, target)
    if loss == "maximum_entropy":
        return maximum_entropy(prediction[:, 0], target)
    return F.huber_loss(prediction, target, delta=delta)


def by_hand(data, weights, biases, rate, steps, loss, activation, *, momentum=0.0, decay=0.0, first_order=False):
    """Query losses `[T]`: each task by itself, its inner gradients by `torch.func.grad`. `rate(k, l, kind)`."""
    layers = len(weights)

    def net(parameters, x):
        for i in range(layers):
            x = x @ parameters[i].t() + (parameters[layers + i] if biases else 0)
            x = ACTIVATIONS[activation](x) if i < layers - 1 else x
        return x

    def task(sx, sy, qx, qy):
        parameters = [*weights, *(biases or ())]
        moments = [torch.zeros_like(p) for p in parameters]
        for k in range(steps):
            gradients = torch.func.grad(lambda p: one_task_loss(loss, net(p, sx), sy))(parameters)
            if first_order:
                gradients = [g.detach() for g in gradients]
            moments = [momentum * m + g + decay * p for m, g, p in zip(moments, gradients, parameters, strict=True)]
            parameters = [
                p - rate(k, i % layers, "weight" if i < layers else "bias") * m
                for i, (p, m) in enumerate(zip(parameters, moments, strict=True))
            ]
        return one_task_loss(loss, net(parameters, qx), qy)

    return torch.stack([task(*rows) for rows in zip(*data, strict=True)])


def assert_same(ours, truth, leaves, rtol=1e-10):
    torch.testing.assert_close(ours, truth, rtol=rtol, atol=1e-12)
    cotangent = torch.linspace(0.5, 1.5, len(ours), dtype=ours.dtype, device=ours.device)
    both = (torch.autograd.grad((x * cotangent).sum(), leaves, retain_graph=True) for x in (ours, truth))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(LOSSES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    form=st.sampled_from(["onchip", "lowrank"]),
    steps=st.integers(0, 4),
    rates=st.sampled_from(["float", "L", "K", "LK", "element"]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.05]),
    bias=st.booleans(),
    first_order=st.booleans(),
    hidden=st.lists(st.sampled_from([1, 3, 8, 17]), max_size=3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loop_over_tasks(
    loss, activation, form, steps, rates, momentum, decay, bias, first_order, hidden, sizes, seed
):
    if form == "lowrank" and (decay or rates == "element"):
        form = "auto"
    widths = (5, *hidden, 3)
    data, weights, biases = problem(loss, *sizes, widths, bias, seed)
    layers, g = len(weights), torch.Generator().manual_seed(seed)
    leaves = [*weights, *(biases or ())]
    if rates == "element":
        lr = [[(0.3 * torch.rand(p.shape, generator=g)).to(p).requires_grad_() for p in group or ()]
              for group in (weights, biases)]  # fmt: skip
        leaves += [*lr[0], *lr[1]]
        rate = lambda k, i, kind: lr[kind == "bias"][i]  # noqa: E731
        if steps == 0:
            leaves = leaves[: layers * (2 if bias else 1)]
    elif rates == "float":
        lr = 0.2
        rate = lambda k, i, kind: 0.2  # noqa: E731
    else:
        shape = {"L": (layers, 1), "K": (1, steps), "LK": (layers, steps)}[rates]
        lr = (0.3 * torch.rand(shape, generator=g)).to(weights[0]).requires_grad_()
        table = lr.expand(layers, steps)
        rate = lambda k, i, kind: table[i, k]  # noqa: E731
        leaves += [lr] if steps else []
    ours = meta_loss_mlp(*data, weights, biases, lr=lr, steps=steps, loss=loss, activation=activation, form=form,
                         momentum=momentum, weight_decay=decay, first_order=first_order)  # fmt: skip
    truth = by_hand(data, weights, biases, rate, steps, loss, activation, momentum=momentum, decay=decay,
                    first_order=first_order)  # fmt: skip
    assert_same(ours.loss, truth, leaves, rtol=1e-9)


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_first_order_of_inputs_and_rates(form):
    """Inner gradients count as constants: support rows get no gradient, in whatever form the first layer is held."""
    data, weights, biases = problem("cross_entropy", 3, 4, 5, (6, 8, 2))
    lr = torch.full((2, 3), 0.3).to(weights[0]).requires_grad_()
    options = {"lr": lr, "steps": 3, "loss": "cross_entropy", "activation": "tanh", "momentum": 0.5}
    leaves = [data[0].requires_grad_(), data[2].requires_grad_(), lr, *weights, *biases]
    truth = by_hand(data, weights, biases, lambda k, i, kind: lr[i, k], 3, "cross_entropy", "tanh", momentum=0.5,
                    first_order=True)  # fmt: skip
    truth = torch.autograd.grad(truth.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert not truth[0].any()
    loss = meta_loss_mlp(*data, weights, biases, form=form, first_order=True, **options).loss
    fast = adapt_mlp(*data[:2], weights, biases, form=form, first_order=True, **options)
    of_fast = torch.nn.functional.cross_entropy(fast(data[2]).flatten(0, 1), data[3].flatten(), reduction="none")
    for total in (loss.sum(), of_fast.sum() / data[3].shape[1]):
        ours = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_gradcheck_of_weights_rates_and_inputs(form):
    data, weights, biases = problem("cross_entropy", 2, 3, 3, (4, 3, 2))
    support_x, support_y, query_x, query_y = data
    lr = torch.full((2, 2), 0.2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run(sx, qx, lr, w0, w1, b0, b1):
        return meta_loss_mlp(
            sx, support_y, qx, query_y, [w0, w1], [b0, b1], lr=lr, steps=2, activation="tanh", form=form
        )

    inputs = (support_x.requires_grad_(), query_x.requires_grad_(), lr, *weights, *biases)
    assert gradcheck(run, inputs)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_an_encoder_in_front_learns_through_the_head(form, first_order):
    data, weights, biases = problem("cross_entropy", 3, 4, 5, (6, 8, 3))
    encoder = torch.randn(6, 9, dtype=torch.float64, device=DEVICE).requires_grad_()
    raw = [torch.randn(3, n, 9, dtype=torch.float64, device=DEVICE) for n in (4, 5)]
    features = [torch.tanh(x @ encoder.t()) for x in raw]
    data = features[0], data[1], features[1], data[3]
    options = {"lr": 0.3, "steps": 3, "form": form, "first_order": first_order}
    ours = meta_loss_mlp(*data, weights, biases, **options)
    truth = by_hand(data, weights, biases, lambda *_: 0.3, 3, "cross_entropy", "relu", first_order=first_order)
    assert_same(ours.loss, truth, [encoder, *weights, *biases])
    predictions = functional_mlp(features[1], adapt_mlp(*data[:2], weights, biases, **options))
    loss = F.cross_entropy(predictions.flatten(0, 1), data[3].flatten(), reduction="none").view(3, -1).mean(1)
    assert_same(loss, truth, [encoder, *weights, *biases])


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_fast_weights_are_those_the_meta_loss_uses(form):
    data, weights, biases = problem("mse")
    options = {"lr": 0.1, "steps": 3, "loss": "mse", "activation": "tanh", "form": form}
    fast = adapt_mlp(*data[:2], weights, biases, **options)
    logits = meta_loss_mlp(*data, weights, biases, **options).logits
    torch.testing.assert_close(functional_mlp(data[2], fast), logits)
    torch.testing.assert_close(functional_mlp(data[2], *fast.materialize(), "tanh"), logits)
    torch.testing.assert_close(functional_mlp(data[2][1:2], fast[1]), logits[1:2])
    torch.testing.assert_close(functional_mlp(data[2][1:], fast[1:]), logits[1:])
    assert len(fast) == 3 and len(fast[1:]) == 2
    leaves = [*weights, *biases]
    both = [torch.autograd.grad(x.square().sum(), leaves, retain_graph=True)
            for x in (functional_mlp(data[2], fast), logits)]  # fmt: skip
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_no_steps_is_plain_training():
    data, weights, biases = problem("cross_entropy")
    ours = meta_loss_mlp(*data, weights, biases, lr=0.5, steps=0)
    plain = functional_mlp(data[2], weights, biases)
    truth = F.cross_entropy(plain.flatten(0, 1), data[3].flatten(), reduction="none").view(3, -1).mean(1)
    assert_same(ours.loss, truth, [*weights, *biases])


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_do_not_meet_and_runs_repeat(form, dtype):
    data, weights, biases = problem("cross_entropy", 7, 5, 6, dtype=dtype)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4], device=DEVICE)

    def run(data):
        out = meta_loss_mlp(*data, weights, biases, lr=0.2, steps=3, form=form)
        return [*out, *torch.autograd.grad(out.loss.sum(), [*weights, *biases])]

    first, again, permuted = run(data), run(data), run([t[order] for t in data])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[:2], permuted[:2], strict=True):
        torch.testing.assert_close(a[order], b)
    for a, b in zip(first[2:], permuted[2:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_masked_rows_are_not_there(form, loss):
    data, weights, biases = problem(loss, 3, 6, 7)
    rows, queries = (6, 3, 1), (7, 2, 5)
    masks = [torch.arange(n, device=DEVICE) < torch.tensor(counts, device=DEVICE).unsqueeze(1)
             for n, counts in ((6, rows), (7, queries))]  # fmt: skip
    options = {"lr": 0.2, "steps": 2, "loss": loss, "form": form}
    ours = meta_loss_mlp(*data, weights, biases, support_mask=masks[0], query_mask=masks[1], **options)
    parts = []
    for t, (s, q) in enumerate(zip(rows, queries, strict=True)):
        one = [x[t : t + 1, :n] for x, n in zip(data, (s, s, q, q), strict=True)]
        parts.append(meta_loss_mlp(*one, weights, biases, **options).loss)
    assert_same(ours.loss, torch.cat(parts), [*weights, *biases])


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
@pytest.mark.parametrize("rows", [6, 7])
def test_a_masked_state_has_no_reward(form, rows):
    (*data, query_y), weights, biases = problem("maximum_entropy", 3, rows, rows)
    counted = (torch.arange(rows, device=DEVICE) != 2).expand(3, rows)

    def loss(rewards, y):
        return torch.stack([maximum_entropy(r, t) for r, t in zip(rewards.squeeze(-1), y, strict=True)])

    options = {"steps": 0, "lr": 0.1, "loss": "maximum_entropy", "form": form}
    ours = meta_loss_mlp(*data, query_y, weights, biases, query_mask=counted, **options)
    assert_same(ours.loss, loss(ours.logits * counted.unsqueeze(-1), query_y), [*weights, *biases])
    fast = adapt_mlp(*data[:2], weights, biases, support_mask=counted, **{**options, "steps": 1})
    rewards = functional_mlp(data[0], weights, biases)
    found = torch.autograd.grad(loss(rewards * counted.unsqueeze(-1), data[1]).sum(), biases[-1])[0]
    torch.testing.assert_close((biases[-1] - fast.materialize()[1][-1]).sum(0), 0.1 * found)


@pytest.mark.parametrize(
    "shape, text",
    [
        ((3, 2, 4), r"d \(1 \+ M\) trajectories; got \[3, 2, 4\] for 6 rows"),
        ((3, 6, 1), r"d and M at least 1"),
        ((3, 5, 2, 2), r"support_y must have shape \[T, d, 1 \+ M\] or \[T, S, d, 1 \+ M\]"),
        ((2, 2, 3), "support_y must have shape"),
    ],
)
def test_trajectories_are_checked(shape, text):
    data, weights, biases = problem("maximum_entropy", 3, 6, 6)
    with pytest.raises(ValueError, match=text):
        adapt_mlp(data[0], data[0].new_zeros(shape), weights, biases, lr=0.1, steps=1, loss="maximum_entropy")
    two = [*weights[:-1], weights[-1].repeat(2, 1)], [*biases[:-1], biases[-1].repeat(2)]
    with pytest.raises(ValueError, match="weights must end in one output, a reward, for maximum_entropy, got 2"):
        adapt_mlp(*data[:2], *two, lr=0.1, steps=1, loss="maximum_entropy")


def test_a_task_without_rows_stays_as_it_is():
    data, weights, biases = problem("mse")
    mask = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
    fast = adapt_mlp(*data[:2], weights, biases, lr=0.2, steps=3, loss="mse", support_mask=mask)
    torch.testing.assert_close(functional_mlp(data[2], fast), functional_mlp(data[2], weights, biases))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norms(norm):
    data, weights, biases = problem("cross_entropy")

    def net(w, b, x):
        for i, (weight, bias) in enumerate(zip(w, b, strict=True)):
            x = x @ weight.t() + bias
            if i < len(w) - 1:
                x = F.layer_norm(x, x.shape[-1:]) if norm == "layer" else F.batch_norm(x, None, None, training=True)
                x = torch.relu(x)
        return x

    def task(sx, sy, qx, qy):
        w, b = weights, biases
        for _ in range(2):
            loss = F.cross_entropy(net(w, b, sx), sy)
            gradients = torch.autograd.grad(loss, [*w, *b], create_graph=True)
            new = [p - 0.1 * g for p, g in zip([*w, *b], gradients, strict=True)]
            w, b = new[: len(w)], new[len(w) :]
        return F.cross_entropy(net(w, b, qx), qy)

    ours = meta_loss_mlp(*data, weights, biases, lr=0.1, steps=2, norm=norm)
    truth = torch.stack([task(*rows) for rows in zip(*data, strict=True)])
    assert_same(ours.loss, truth, [*weights, *biases], rtol=1e-8)
    fast = adapt_mlp(*data[:2], weights, biases, lr=0.1, steps=2, norm=norm)
    torch.testing.assert_close(functional_mlp(data[2], fast), ours.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_half_precision_computes_in_single(form, dtype):
    data, weights, biases = problem("mse", dtype=torch.float32)
    half = (
        [t.to(dtype) for t in data],
        [w.detach().to(dtype).requires_grad_() for w in weights],
        [b.detach().to(dtype).requires_grad_() for b in biases],
    )
    single = [[t.detach().float().requires_grad_(t.requires_grad) for t in group] for group in half]
    options = {"lr": 0.1, "steps": 3, "loss": "mse", "form": form}
    ours, truth = (meta_loss_mlp(*data, w, b, **options) for data, w, b in (half, single))
    assert ours.loss.dtype == torch.float32 and ours.logits.dtype == dtype
    assert torch.equal(ours.loss, truth.loss) and torch.equal(ours.logits, truth.logits.to(dtype))
    for leaves in (1, 2):
        found, wanted = (torch.autograd.grad(o.loss.sum(), group[leaves], retain_graph=True)
                         for o, group in ((ours, half), (truth, single)))  # fmt: skip
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b.to(dtype))
    fast, exact = (adapt_mlp(*data[:2], w, b, **options) for data, w, b in (half, single))
    assert functional_mlp(half[0][2], fast).dtype == dtype
    for a, b in zip(sum(fast.materialize(), []), sum(exact.materialize(), []), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", ["onchip", "lowrank"])
def test_a_hundred_steps(form):
    data, weights, biases = problem("mse", 2, 3, 4, (5, 6, 2))
    ours = meta_loss_mlp(*data, weights, biases, lr=0.05, steps=100, loss="mse", activation="tanh", form=form)
    truth = by_hand(data, weights, biases, lambda *_: 0.05, 100, "mse", "tanh")
    assert_same(ours.loss, truth, [*weights, *biases], rtol=1e-8)


def test_second_derivatives_are_right_or_refused():
    data, weights, biases = problem("mse", 2, 3, 4, (3, 4, 1))

    def second(loss):
        first = torch.autograd.grad(loss.sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    ours = meta_loss_mlp(*data, weights, biases, lr=0.1, steps=2, loss="mse", activation="tanh")
    truth = by_hand(data, weights, biases, lambda *_: 0.1, 2, "mse", "tanh")
    for a, b in zip(second(ours.loss), second(truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.0}, TypeError, "steps must be an int, got float"),
        ({"loss": "hinge"}, ValueError, "loss must be one of .*, huber, maximum_entropy; got 'hinge'"),
        ({"form": "sparse"}, ValueError, "form must be one of auto, lowrank, onchip; got 'sparse'"),
        ({"norm": "group"}, ValueError, "norm must be one of None, layer, batch; got 'group'"),
        ({"lr": "0.1"}, TypeError, "lr must be a float, a tensor, or a pair"),
        ({"lr": torch.ones(7)}, ValueError, r"lr must have shape .* or \[L, K\] with L = 3 layers and K = 2"),
        ({"lr": ([torch.ones(2)], None)}, ValueError, r"lr for weights\[0\] must have shape"),
        ({"momentum": -0.1}, ValueError, "momentum must be at least 0, got -0.1"),
        ({"form": "lowrank", "weight_decay": 0.1}, ValueError, "form 'lowrank' cannot serve this call: weight_decay"),
        ({"support_mask": torch.ones(3, 4)}, TypeError, "support_mask must be a bool tensor, got float32"),
        ({"query_mask": torch.ones(3, 4) > 0}, ValueError, r"query_mask must have shape \[3, 5\], got \[3, 4\]"),
    ],
)  # fmt: skip
def test_wrong_options(change, error, text):
    data, weights, biases = problem("cross_entropy")
    options = {"lr": 0.1, "steps": 2, **change}
    with pytest.raises(error, match=text):
        meta_loss_mlp(*data, weights, biases, **options)


def test_wrong_tensors():
    data, weights, biases = problem("cross_entropy")
    support_x, support_y, query_x, query_y = data
    run = {"lr": 0.1, "steps": 1}
    with pytest.raises(ValueError, match=r"weights\[1\] has I = 7"):
        meta_loss_mlp(*data, [weights[0], weights[1].new_ones(5, 7), weights[2]], biases, **run)
    with pytest.raises(ValueError, match="biases must hold one per layer = 3, got 2"):
        meta_loss_mlp(*data, weights, biases[:2], **run)
    with pytest.raises(ValueError, match=r"query_x has T = 2"):
        meta_loss_mlp(support_x, support_y, query_x[:2], query_y[:2], weights, biases, **run)
    with pytest.raises(TypeError, match="support_y must be int64"):
        meta_loss_mlp(support_x, support_y.float(), query_x, query_y, weights, biases, **run)
    with pytest.raises(ValueError, match=r"query_y must have shape \[T, Q, C\] = \[3, 5, 2\] for mse"):
        targets = query_x.new_ones(3, 4, 2), query_x.new_ones(3, 5, 1)
        meta_loss_mlp(support_x, targets[0], query_x, targets[1], weights, biases, loss="mse", **run)
    with pytest.raises(ValueError, match=r"query_y must lie in \[0, num_classes\) = \[0, 2\), got 2"):
        meta_loss_mlp(support_x, support_y, query_x, query_y * 0 + 2, weights, biases, **run)
    with pytest.raises(TypeError, match="weights\\[0\\] is float32, but support_x is float64"):
        meta_loss_mlp(*data, [w.float() for w in weights], biases, **run)


@pytest.mark.parametrize("form", ["lowrank", "onchip"])
def test_gradients_known_from_the_forward_pass(form):
    """The C++ kernel finds the gradient of the mean with the loss: any other use of the loss must not take it."""
    data, weights, biases = problem("cross_entropy", dtype=torch.float64)
    rate = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=DEVICE).requires_grad_()
    leaves = [*weights, *biases, rate]
    uneven = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device=DEVICE)
    uses = {
        "mean": lambda loss, logits: loss.mean(),
        "sum": lambda loss, logits: loss.sum(),
        "a multiple": lambda loss, logits: -3 * loss.mean(),
        "a task": lambda loss, logits: loss[1],
        "a weighted sum": lambda loss, logits: (uneven * loss).sum(),
        "logits": lambda loss, logits: logits.square().sum(),
        "both": lambda loss, logits: loss.mean() + logits.square().sum(),
    }

    def gradients(use, **options):
        found = meta_loss_mlp(*data, weights, biases, lr=rate, steps=2, form=form)
        return torch.autograd.grad(use(*found), leaves, **options)

    for name, use in uses.items():
        with use_backend("reference"):
            expected = gradients(use)
        for options in ({}, {"create_graph": True}):
            for found, right in zip(gradients(use, **options), expected, strict=True):
                torch.testing.assert_close(found, right, msg=name)
    loss = meta_loss_mlp(*data, weights, biases, lr=rate, steps=2, form=form).loss.mean()
    first = [g.clone().mul_(1) for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    again = torch.autograd.grad(loss, leaves)
    for left, right in zip(first, again, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_given_with_the_losses(weighted):
    """Its gradient may come out of the forward pass, on the GPU too; nothing else asked of the same graph may."""
    data, weights, biases = problem("cross_entropy", dtype=torch.float64)
    rate = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=DEVICE).requires_grad_()
    leaves = [*weights, *biases, rate]
    uneven = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device=DEVICE)
    uses = {
        "mean": lambda loss, logits, mean: mean,
        "a multiple": lambda loss, logits, mean: -3 * mean,
        "mean and losses": lambda loss, logits, mean: mean + (uneven * loss).sum(),
        "mean and logits": lambda loss, logits, mean: 2 * mean + logits.square().sum(),
        "losses alone": lambda loss, logits, mean: (uneven * loss).sum(),
    }
    inner = {"lr": rate, "steps": 2, "loss": "cross_entropy", "activation": "relu", "first_order": False}
    own = torch.tensor([2.0, -0.7, 0.0], dtype=torch.float64, device=DEVICE) if weighted else None

    def found(own=own):
        (loss, logits), mean = mean_meta_loss_mlp(*data, weights, biases, **inner, task_weights=own)
        return loss, logits, mean

    def mean_of(loss):
        return (own * loss).mean() if weighted else loss.mean()

    for name, use in uses.items():
        with use_backend("reference"):
            loss, logits = meta_loss_mlp(*data, weights, biases, **inner)
            expected = torch.autograd.grad(use(loss, logits, mean_of(loss)), leaves)
        for options in ({}, {"create_graph": True}):
            for ours, right in zip(torch.autograd.grad(use(*found()), leaves, **options), expected, strict=True):
                torch.testing.assert_close(ours, right, msg=name)
    if weighted:  # they may have gradients too
        loss, _, mean = found(own.requires_grad_())
        torch.testing.assert_close(torch.autograd.grad(mean, own)[0], loss.detach() / 3)
        own.requires_grad_(False)
    mean = found()[2]
    first = [g.clone() for g in torch.autograd.grad(mean, leaves, retain_graph=True)]
    for left, right in zip(first, torch.autograd.grad(mean, leaves), strict=True):
        torch.testing.assert_close(left, right)
    with torch.no_grad():
        loss, _, mean = found()
        torch.testing.assert_close(mean, mean_of(loss))
