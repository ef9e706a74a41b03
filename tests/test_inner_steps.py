"""Inner steps with momentum, decay, clipping, and rates per layer and step, some of them learned: in every engine those
of `torch.optim.SGD` and `clip_grad_norm_`, one task at a time, and differentiated by plain autograd."""

import copy
import pickle
import re

import pytest
import torch
from module_kinds import make, run, tasks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fastmeta.algorithms import ANIL, BOIL, CAVIA, MAML, ImplicitMAML, MAMLPlusPlus, MetaSGD, Reptile
from fastmeta.functional import adapt_mlp, meta_loss_mlp
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


def a_step(
    weights, gradients, moments, rate, *, momentum=0.0, weight_decay=0.0, clip_norm=None, clip_value=None,
    inner_optimizer="sgd", **adam,
):  # fmt: skip
    """`torch.optim.SGD`'s or Adam's, written so that it can be differentiated; by name."""
    if clip_value is not None:
        gradients = {n: g.clamp(-clip_value, clip_value) for n, g in gradients.items()}
    if clip_norm is not None:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        gradients = {n: g * (clip_norm / (norm + 1e-6)).clamp(max=1.0) for n, g in gradients.items()}
    for name, gradient in gradients.items():
        if inner_optimizer != "sgd":
            own, decoupled = moments.setdefault(name, {}), inner_optimizer == "adamw"
            weights = weights | {
                name: adam_step(weights[name], gradient, own, rate(name), weight_decay, decoupled, **adam)
            }
            continue
        direction = gradient + weight_decay * weights[name]
        if name in moments:
            direction = momentum * moments[name] + direction
        moments[name] = direction
        weights = weights | {name: weights[name] - rate(name) * direction}
    return weights


def adam_step(w, g, own, lr, weight_decay, decoupled, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    """One parameter; `own` is what it remembers."""
    g, start = (g, w - lr * weight_decay * w) if decoupled else (g + weight_decay * w, w)
    own["step"] = own.get("step", 0) + 1
    own["mean"] = betas[0] * own.get("mean", 0) + (1 - betas[0]) * g
    own["square"] = betas[1] * own.get("square", 0) + (1 - betas[1]) * g**2
    own["largest"] = torch.maximum(own["square"], own.get("largest", own["square"])) if amsgrad else own["square"]
    below = own["largest"] / (1 - betas[1] ** own["step"])
    root = torch.where(below > 0, torch.where(below > 0, below, 1).sqrt(), 0)  # its slope at 0 is infinite
    return start - lr * own["mean"] / (1 - betas[0] ** own["step"]) / (root + eps)


def adapted(net, x, y, *, rate, steps, first_order=False, adapts=lambda name: True, **options):
    """One task's weights. `rate(name, step)`."""
    weights, moments = dict(net.named_parameters()), {}
    moving = [n for n, p in weights.items() if p.requires_grad and adapts(n)]
    for step in range(steps):
        loss = F.cross_entropy(run(net, weights, x), y)
        at = [weights[n] for n in moving]
        found = torch.autograd.grad(loss, at, create_graph=not first_order, allow_unused=True)
        gradients = {n: g for n, g in zip(moving, found, strict=True) if g is not None}
        weights = a_step(weights, gradients, moments, lambda name, k=step: rate(name, k), **options)
    return weights


def plain(net, batch, wanted, **options):
    """Task losses, and the gradient of their mean with respect to the tensors `wanted`, by name."""
    losses = [
        F.cross_entropy(run(net, adapted(net, sx, sy, **options), qx), qy)
        for sx, sy, qx, qy in zip(*batch, strict=True)
    ]
    mean = torch.stack(losses).mean()
    found = torch.autograd.grad(mean, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return torch.stack(losses).detach(), dict(zip(wanted, found, strict=True))


def rate_of(learner):
    """The rate of a parameter of `learner.model` at a step, from what the learner keeps."""

    def rate(name, step):
        found = learner.inner_lr
        if isinstance(found, nn.ParameterDict):
            keys = {key.removeprefix("layer/").replace("/", "."): value for key, value in found.items()}
            found = keys[max((k for k in keys if k in ("", name) or name.startswith(f"{k}.")), key=len)]
        if not isinstance(found, torch.Tensor) or found.dim() == 0:
            return found
        return found[min(step, len(found) - 1)]

    return rate


# gradients of these nets have norms of 0.3 to 1: some tasks are clipped, some are not
RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.3},
    "norm": {"clip_norm": 0.4},
    "value": {"clip_value": 0.1},
    "all": {"momentum": 0.8, "weight_decay": 0.2, "clip_norm": 0.3, "clip_value": 0.15},
    "adam": {"inner_optimizer": "adam", "eps": 0.1, "weight_decay": 0.2},
    "adamw": {"inner_optimizer": "adamw", "betas": (0.5, 0.7), "eps": 0.05, "amsgrad": True, "weight_decay": 0.2},
}
RATES = {
    "one": lambda steps, layer: 0.3,
    "steps": lambda steps, layer: torch.linspace(0.5, 0.2, max(steps, 1), dtype=torch.float64),
    "layers": lambda steps, layer: {"": 0.2, layer: 0.4},
    "layers, steps": lambda steps, layer: {"": 0.2, layer: torch.linspace(0.5, 0.2, max(steps, 1))},
    "bias": lambda steps, layer: {"": 0.2, f"{layer}.bias": 0.5},
}
LAST = {"mlp": "2", "conv, batch norm": "5", "LSTM": "out"}
ENGINES = {"mlp": ("auto", "fused", "lowrank", "layerwise", "vmap", "loop")}


def cases():
    for kind in LAST:
        for rule in RULES:
            yield kind, rule, "one"
        for rates in RATES:
            yield kind, "all", rates
        yield kind, "momentum", "layers, steps"  # in the kernels


@pytest.mark.parametrize("kind, rule, rates", sorted(set(cases())))
def test_maml(kind, rule, rates):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    for steps, first_order in ((0, False), (1, False), (3, False), (3, True)):
        options = RULES[rule] | {"first_order": first_order}
        truth = None
        for engine in ENGINES.get(kind, ("auto", "vmap", "loop")):
            maml = MAML(net, inner_lr=RATES[rates](steps, LAST[kind]), learn_inner_lr=True, inner_steps=steps,
                        engine=engine, **options)  # fmt: skip
            wanted = {n: p for n, p in maml.named_parameters() if p.requires_grad}
            assert len(wanted) > len(list(net.parameters()))
            if truth is None:
                truth = plain(net, batch, wanted, rate=rate_of(maml), steps=steps, **options)
            try:
                out = maml(batch)
            except ValueError as refused:
                assert engine in ("fused", "lowrank") and "cannot serve" in str(refused)
                assert engine == "lowrank" or "clip" in options or rates == "bias" or re.search(
                    "do not clip|steps of Adam were asked for", str(refused)
                )
                continue
            check(out.task_loss.detach(), truth[0])
            found = torch.autograd.grad(out.loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
            check(dict(zip(wanted, found, strict=True)), truth[1])
            if engine == "auto":
                check(maml.gradients(batch)[1], truth[1])
                state = maml.adapt(batch.support_x, batch.support_y)
                check(maml.predict(state, batch.query_x).detach(), out.logits.detach())


@pytest.mark.parametrize("kind", ["mlp", "several heads", "partly frozen"])
@pytest.mark.parametrize("rule", RULES)
def test_adaptation_is_that_of_torch_optim(rule, kind):
    """A head that is not used neither moves nor decays; what is frozen does not count for the norm."""
    net, batch, options = make(kind), TaskBatch(*tasks(kind)), RULES[rule]
    given = {name: value for name, value in options.items() if not name.startswith(("clip", "inner_"))}
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind_of_steps = kinds.get(options.get("inner_optimizer"), torch.optim.SGD)
    for engine in ("auto", "vmap", "loop"):
        maml = MAML(net, inner_lr=0.3, inner_steps=3, engine=engine, **options)
        state = maml.adapt(batch.support_x, batch.support_y)
        for t in range(len(state)):
            own = copy.deepcopy(net)
            optimizer = kind_of_steps(own.parameters(), lr=0.3, **given)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(own(batch.support_x[t]), batch.support_y[t]).backward()
                if "clip_value" in options:
                    clip_grad_value_(own.parameters(), options["clip_value"])
                if "clip_norm" in options:
                    clip_grad_norm_(own.parameters(), options["clip_norm"])
                optimizer.step()
            check({n: w.detach() for n, w in state[t].items()}, {n: p.detach() for n, p in own.named_parameters()})


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"inner_optimizer": "rmsprop"}, ValueError, "inner_optimizer must be one of sgd, adam, adamw; got 'rmsprop'"),
        ({"inner_optimizer": "adam", "betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        ({"inner_optimizer": "adam", "betas": (0.9, 1.0)}, ValueError, "betas[1] must be below 1.0, got 1.0"),
        ({"inner_optimizer": "adam", "momentum": 0.9}, ValueError, "momentum is SGD's: with inner_optimizer='adam'"),
        ({"inner_optimizer": "adam", "memory": "sweep"}, ValueError, "memory='sweep' goes back through steps of SGD"),
        ({"amsgrad": True}, ValueError, "betas, eps and amsgrad are Adam's: with inner_optimizer='sgd'"),
    ],
)
def test_wrong_optimizers(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        MAML(make("mlp"), **options)


def test_engines_say_that_they_take_no_steps_of_adam():
    text = MAML(make("mlp"), inner_optimizer="adam").explain(TaskBatch(*tasks("mlp")))
    assert "fused: cannot serve: the kernels take steps of SGD, and steps of Adam were asked for" in text
    assert "layerwise: picked" in text


@pytest.mark.parametrize("rule", ["plain", "momentum", "all"])
def test_fixed_rates_in_one_call_of_the_kernel(rule):
    """`gradients` without a graph, and after the options have changed."""
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    maml = MAML(net, inner_lr=0.3, inner_steps=2)
    wanted = {f"model.{n}": p for n, p in net.named_parameters()}
    check(maml.gradients(batch)[1], plain(net, batch, wanted, rate=rate_of(maml), steps=2)[1])
    maml.rule = MAML(net, **RULES[rule]).rule
    check(maml.gradients(batch)[1], plain(net, batch, wanted, rate=rate_of(maml), steps=2, **RULES[rule])[1])
    maml.inner_lr = 0.4
    right = plain(net, batch, wanted, rate=lambda name, step: 0.4, steps=2, **RULES[rule])[1]
    for _ in range(2):
        check(maml.gradients(batch)[1], right)
    if rule != "all":
        assert maml._direct is not None


@pytest.mark.parametrize("kind", ["mlp", "LSTM"])
def test_other_loops_take_the_same_options(kind):
    net, batch, head = make(kind), TaskBatch(*tasks(kind)), f"{LAST[kind]}."
    for rule in ("momentum", "all"):
        learners = {
            "anil": ANIL(net, inner_lr={"": 0.3}, learn_inner_lr=True, inner_steps=3, **RULES[rule]),
            "boil": BOIL(net, inner_lr=torch.tensor([0.5, 0.3, 0.1]), learn_inner_lr=True, inner_steps=3,
                         **RULES[rule]),  # fmt: skip
            "meta-sgd": MetaSGD(net, initial_rates=(0.1, 0.4), inner_steps=3, **RULES[rule]),
        }
        for name, learner in learners.items():
            wanted = {n: p for n, p in learner.named_parameters() if p.requires_grad}
            adapts = {"anil": lambda n: n.startswith(head), "boil": lambda n: not n.startswith(head)}
            rates = (lambda n, k, learner=learner: learner.rates[n.replace(".", "/")]) if name == "meta-sgd" else None
            losses, right = plain(net, batch, wanted, rate=rates or rate_of(learner), steps=3,
                                  adapts=adapts.get(name, lambda n: True), **RULES[rule])  # fmt: skip
            out = learner(batch)
            check(out.task_loss.detach(), losses)
            found = torch.autograd.grad(out.loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
            check(dict(zip(wanted, found, strict=True)), right)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_chunks_and_weights(engine):
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    options = {"inner_lr": {"": 0.2, "2": 0.4}, "learn_inner_lr": True, "inner_steps": 2, "engine": engine}
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    found = [MAML(net, task_chunk=chunk, clip_norm=0.4, momentum=0.5, **options).gradients(batch, weights)[1]
             for chunk in (None, 2)]  # fmt: skip
    check(*found)
    one = TaskBatch(*(part[:1] for part in batch)), TaskBatch(*(part[1:2] for part in batch))
    maml = MAML(net, clip_norm=0.4, momentum=0.5, **options)
    parts = [maml.gradients(task)[1] for task in one]
    check(found[0], {n: (0.5 * g + 2 * parts[1][n]) / 3 for n, g in parts[0].items()})


@pytest.mark.parametrize("engine", ["layerwise", "vmap", "loop"])
def test_a_zero_gradient_is_clipped_without_nan(engine):
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    maml = MAML(net, inner_lr=0.3, loss=lambda p, y: (p.detach() * p).sum() * 0, engine=engine, clip_norm=1.0)
    maml.inner_steps = 2
    state = maml.adapt(batch.support_x, batch.support_y)
    check(state[1]["0.weight"].detach(), net[0].weight.detach())
    value = F.cross_entropy(maml.predict(state, batch.query_x).flatten(0, 1), batch.query_y.flatten())
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, list(net.parameters())))


def test_rates_are_trained():
    torch.manual_seed(0)
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    maml = MAML(net, inner_lr={"": 0.01, "2": torch.full((2,), 0.02)}, learn_inner_lr=True, inner_steps=2, momentum=0.5)
    before = {key: rate.detach().clone() for key, rate in maml.inner_lr.items()}
    optimizer, losses = torch.optim.Adam(maml.inner_lr.parameters(), lr=0.02), []
    for _ in range(10):
        optimizer.zero_grad()
        out = maml(batch)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert all((rate != before[key]).all() for key, rate in maml.inner_lr.items())
    # saved, copied and moved with the learner
    other = MAML(make("mlp"), inner_lr={"": 0.1, "2": torch.ones(2)}, learn_inner_lr=True, inner_steps=2, momentum=0.5)
    other.load_state_dict(maml.state_dict())
    for same in (other, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        check(same(batch).loss, maml(batch).loss)
    assert maml.float().inner_lr["layer/2"].dtype == torch.float32
    assert "momentum=0.5" in repr(maml) and "inner_lr={'', '2'}" in repr(maml)


def test_steps_beyond_the_last_rate_have_the_last_one():
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    maml = MAML(net, inner_lr=torch.tensor([0.4, 0.2]), inner_steps=2)
    assert not maml.inner_lr.requires_grad and maml.inner_lr in set(maml.parameters())
    for steps in (1, 4):
        maml.inner_steps = steps
        right = plain(net, batch, dict(net.named_parameters()), rate=rate_of(maml), steps=steps)[0]
        check(maml(batch).task_loss.detach(), right)


def test_explain_says_what_does_not_clip():
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    said = MAML(net, clip_value=0.1).explain(batch)
    assert "fused: cannot serve: the kernels do not clip" in said and "layerwise: picked" in said
    assert "fused: picked" in MAML(net, inner_lr={"": 0.1}, momentum=0.9, weight_decay=0.1).explain(batch)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"inner_lr": -0.1}, ValueError, "inner_lr must be at least 0, got -0.1"),
        ({"inner_lr": float("nan")}, ValueError, "inner_lr must be finite, got nan"),
        ({"inner_lr": torch.tensor([0.1, -0.1])}, ValueError, "inner_lr must be at least 0 and finite"),
        ({"inner_lr": torch.tensor([0.1, float("nan")])}, ValueError, "inner_lr must be at least 0 and finite"),
        ({"inner_lr": torch.ones(3)}, ValueError, r"inner_lr must have shape \[\] or \[K\] = \[2\], got \[3\]"),
        ({"inner_lr": torch.ones(2, dtype=torch.int64)}, TypeError, "inner_lr must be float32"),
        ({"inner_lr": {"": 0.1, "2": -1.0}}, ValueError, r"inner_lr\['2'\] must be at least 0"),
        ({"inner_lr": {"head": 0.1, "": 0.1}}, ValueError, "inner_lr: the model has no layer .*'head'"),
        ({"inner_lr": {"2": 0.1}}, ValueError, "inner_lr has no rate for 0.weight, 0.bias"),
        ({"inner_lr": {}}, ValueError, "inner_lr must hold at least one rate"),
        ({"inner_lr": "fast"}, TypeError, r"inner_lr must be a number, a tensor .*, or a dict of such, got .fast."),
        ({"momentum": -0.1}, ValueError, "momentum must be at least 0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be above 0"),
        ({"learn_inner_lr": 1}, TypeError, "learn_inner_lr must be True or False"),
        ({"clip_value": "1"}, TypeError, "clip_value must be a number"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        MAML(make("mlp"), inner_steps=2, **options)
    MAML(make("mlp"), inner_lr=0)
    with pytest.raises(error, match=message):
        ANIL(make("mlp"), adapts=lambda name: True, inner_steps=2, **options)(TaskBatch(*tasks("mlp")))


@pytest.mark.parametrize("function", [adapt_mlp, meta_loss_mlp])
def test_a_vector_of_rates_that_may_mean_layers_or_steps_is_refused(function):
    sx, sy, qx, qy = tasks("mlp")
    net, data = make("mlp"), (sx, sy) if function is adapt_mlp else (sx, sy, qx, qy)
    arguments = (*data, [net[0].weight, net[2].weight], [net[0].bias, net[2].bias])
    rates = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"per layer or per step.*\[L, 1\] or \[1, K\]"):
        function(*arguments, lr=rates, steps=2)
    for fits in (rates.view(2, 1), rates.view(1, 2), rates[:1]):
        function(*arguments, lr=fits, steps=2)
    function(*arguments, lr=rates, steps=3)


LEARNERS = {
    "maml": lambda net: MAML(net, inner_lr={"": 0.3}, learn_inner_lr=True, inner_steps=2, clip_norm=0.3),
    "maml, plain": lambda net: MAML(net, inner_lr=0.3, inner_steps=2),
    "anil": lambda net: ANIL(net, adapts=lambda name: True, inner_lr=0.3, inner_steps=2),
    "meta-sgd": lambda net: MetaSGD(net, initial_rates=(0.3, 0.3), inner_steps=2),
    "maml++": lambda net: MAMLPlusPlus(
        net, inner_lr=0.3, inner_steps=2, multi_step_iterations=0, batch_norm_per_step=False, adapt_norms=True
    ),
    "imaml": lambda net: ImplicitMAML(net, inner_lr=0.1, inner_steps=2),
    "reptile": lambda net: Reptile(net, inner_lr=0.3, inner_steps=2, optimizer="sgd", batch_size=None),
    "cavia": lambda net: CAVIA(net, 2, inner_lr=0.3, inner_steps=2),
}


@pytest.mark.parametrize("kind", ["mlp", "residual, layer norm"])
@pytest.mark.parametrize("name", LEARNERS)
def test_freezing_is_followed_from_call_to_call(name, kind):
    """A learner made while a layer was frozen, or not, does what one does that is made now."""
    net, batch = make(kind), TaskBatch(*tasks(kind))
    if name == "cavia":
        batch = TaskBatch(*(part[..., :2] if part.is_floating_point() else part for part in batch))
    layer = next(child for child in net.children() if any(True for _ in child.parameters()))
    of_layer = {f"model.{n}" for n, p in net.named_parameters() if any(p is own for own in layer.parameters())}
    layer.requires_grad_(False)
    learner = LEARNERS[name](net)
    for frozen in (True, False, True, False):
        layer.requires_grad_(not frozen)
        fresh, found = LEARNERS[name](net), []
        for each in (learner, fresh):
            each.zero_grad()
            out = each(batch)
            out.loss.backward()
            grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None and p.grad.any()}
            found.append((out.task_loss.detach(), {n: g.clone() for n, g in grads.items()}))
            assert of_layer.isdisjoint(grads) if frozen else of_layer <= grads.keys()
            assert not frozen or not any(n.startswith(("rates.0", "rates.first")) for n in grads)
            if name != "cavia":
                state = each.adapt(batch.support_x, batch.support_y)
                moved = {f"model.{n}" for n, w in state[0].items() if not torch.equal(w, net.get_parameter(n))}
                assert of_layer.isdisjoint(moved) if frozen else of_layer <= moved
        check(*found)


@pytest.mark.parametrize("name", ["meta-sgd", "maml++"])
def test_saved_rates_without_those_of_frozen_layers_load(name):
    """As they were saved before frozen layers had rates; where the layer is not frozen they are missing."""
    net = make("mlp")
    net[0].requires_grad_(False)
    learner, other = LEARNERS[name](net), LEARNERS[name](make("mlp"))
    other.model[0].requires_grad_(False)
    old = {key: value + 1 if "rates" in key else value for key, value in learner.state_dict().items()
           if not key.startswith(("rates.0/", "rates.layer/0"))}  # fmt: skip
    assert len(old) < len(learner.state_dict())
    other.load_state_dict(old)
    first, last = (next(rate for key, rate in other.rates.items() if f"{i}" in key) for i in (0, 2))
    assert first.mean() < 1.1 < last.mean()
    other.model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="Missing key.*rates"):
        other.load_state_dict(old)
