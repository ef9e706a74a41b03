"""`memory="sweep"`: the meta-gradient of a plain loop in float64, with the memory of one inner step."""

import copy
import weakref

import pytest
import torch
from module_kinds import WAYS, make, plain, tasks
from test_inner_steps import LAST, RATES, RULES, rate_of
from test_inner_steps import plain as plain_steps
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.algorithms import ANIL, BOIL, MAML, MetaSGD
from fastmeta.engines import _graph_size
from fastmeta.tasks import TaskBatch

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
ONE_BY_ONE = {"checkpointed", "hooks", "depends on the data"}  # not mapped over tasks
pytestmark = pytest.mark.filterwarnings("ignore:tasks run one after the other:UserWarning")


def check(found, right):
    torch.testing.assert_close(found, right, **CLOSE)


def sweep(kind_or_net, cls=MAML, **options):
    net = make(kind_or_net) if isinstance(kind_or_net, str) else kind_or_net
    return cls(net, **{"inner_lr": 0.3, "inner_steps": 3, "memory": "sweep"} | options)


def trained(learner):
    return {name: p for name, p in learner.named_parameters() if p.requires_grad}


def both(learner, batch, weights=None, at=(), formulas=False):
    """Output and gradients of a learner, swept, and of the same with a graph; of `at`, too. `formulas`: whether it has
    some which keep no graph."""
    results = []
    for memory in ("sweep", "graph"):
        learner.memory = memory
        out = learner(batch, weights)
        wanted = [*trained(learner).values(), *at]
        results.append((out, torch.autograd.grad(out.loss, wanted, retain_graph=True, allow_unused=True)))
    learner.memory = "sweep"
    (swept, found), (out, right) = results
    assert swept.loss.requires_grad and swept.task_loss.requires_grad == formulas
    check(swept.loss.detach(), out.loss.detach())
    check(swept.task_loss.detach(), out.task_loss.detach())
    check(found, right)
    return swept, found


LOOPS = [(1, False, 1), (3, False, 2), (5, False, 2), (3, True, 1)]  # steps, first_order, every
MODULES = ["conv, batch norm", "LSTM", "transformer encoder", "text, embeddings", "several heads", "tied weights",
           "partly frozen", "checkpointed", "hooks", "depends on the data"]  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_is_the_gradient_of_a_plain_loop(kind):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    for steps, first_order, every in LOOPS:
        losses, logits, right = plain(net, batch, lr=0.3, steps=steps, first_order=first_order)
        for engine in ("loop",) if kind in ONE_BY_ONE else ("vmap", "loop"):
            maml = sweep(net, inner_steps=steps, first_order=first_order, every=every, engine=engine)
            out = maml(batch)
            check((out.task_loss, out.logits), (losses, logits))
            assert not out.logits.requires_grad
            (2 * out.loss).backward()  # a multiple of it, too
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad / 2 for n, p in net.named_parameters()}
            check({n: grads[n] for n in right}, right)
            unused = [n for n, p in net.named_parameters() if p.grad is None]
            assert bool(unused) == (kind in ("several heads", "partly frozen"))
            net.zero_grad()
    out, gradients = sweep(net, every=2).gradients(batch)  # "auto", and the same bits on a second run
    again = sweep(net, every=2).gradients(batch)
    assert torch.equal(out.loss, again[0].loss) and all(torch.equal(g, again[1][n]) for n, g in gradients.items())
    right = plain(net, batch, lr=0.3, steps=3)[2]
    check({n: gradients[f"model.{n}"] for n in right}, right)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("kind", ["LSTM", "conv, batch norm"])
@pytest.mark.parametrize("rule, rates", [("plain", "layers, steps"), ("momentum", "one"), ("decay", "steps"),
                                         ("norm", "layers"), ("value", "bias"), ("all", "layers, steps")])  # fmt: skip
def test_rules_and_learned_rates(kind, rule, rates):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    engine = "vmap" if kind == "LSTM" else "loop"
    for steps, first_order, every in LOOPS[1:]:
        options = RULES[rule] | {"first_order": first_order}
        maml = sweep(net, inner_lr=RATES[rates](min(steps, 4), LAST[kind]), learn_inner_lr=True, engine=engine,
                     inner_steps=min(steps, 4), every=every, **options)  # fmt: skip
        maml.inner_steps = steps  # steps beyond the last rate have the last one
        losses, right = plain_steps(net, batch, trained(maml), rate=rate_of(maml), steps=steps, **options)
        out, found = maml.gradients(batch)
        check(out.task_loss, losses)
        check(found, right)


@pytest.mark.parametrize("kind", ["several heads", "partly frozen"])
def test_what_is_not_used_does_not_decay(kind):
    net, batch = make(kind), TaskBatch(*tasks(kind))
    right = plain_steps(net, batch, trained(sweep(net)), rate=lambda name, step: 0.3, steps=3, **RULES["all"])
    for engine in ("vmap", "loop"):
        out, found = sweep(net, engine=engine, **RULES["all"]).gradients(batch)
        check((out.task_loss, found), right)


@pytest.mark.parametrize("kind", ["mlp", "LSTM", "conv, batch norm"])
def test_other_inner_loops(kind):
    """Their shared layers train through the steps; leading ones run once, in front of the loop."""
    net, batch = make(kind), TaskBatch(*tasks(kind))
    inner = {"inner_lr": 0.3, "inner_steps": 3, "momentum": 0.5, "every": 2}
    # kernels, which sweep anyway, do not clip
    for learner in (ANIL(net, learn_inner_lr=True, clip_norm=0.4, **inner), BOIL(net, clip_value=0.1, **inner),
                    ANIL(net, adapts=lambda name: name.endswith("bias"), clip_norm=9.0, **inner),
                    MetaSGD(net, initial_rates=(0.1, 0.4), inner_steps=3, clip_norm=0.4)):  # fmt: skip
        for first_order in (False, True):
            learner.first_order = first_order
            mlp = kind == "mlp" or kind != "LSTM" and getattr(learner, "adapts", None) == "head"
            both(learner, batch, formulas=mlp and first_order)


def test_kernels_sweep_already():
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    right = {f"model.{n}": g for n, g in plain(net, batch, lr=0.3, steps=3)[2].items()}
    maml = sweep(net)
    check(maml.gradients(batch)[1], right)
    assert maml._direct is not None
    said = maml.explain(batch)
    assert "exact second order, no graph over the steps" in said and "fused: picked" in said
    for engine in ("lowrank",):
        assert f"{engine}: cannot serve: memory='sweep' was asked for, and it keeps" in said
        with pytest.raises(ValueError, match=f"engine '{engine}' cannot serve .* memory='sweep' was asked for"):
            sweep(net, engine=engine)(batch)
        with torch.no_grad():  # nothing to keep
            check(sweep(net, engine=engine)(batch).task_loss, maml(batch).task_loss.detach())
        sweep(net, engine=engine, inner_steps=0)(batch).loss.backward()
    clipped = sweep(net, clip_norm=0.3)
    assert "vmap: picked" in clipped.explain(batch)
    both(clipped, batch)
    formulas = sweep(net, clip_norm=0.3, first_order=True, engine="layerwise")(batch)
    check(formulas.loss.detach(), sweep(net, clip_norm=0.3, first_order=True, engine="vmap")(batch).loss.detach())


@pytest.mark.parametrize("engine, large", [("vmap", False), ("vmap", True), ("loop", False)])
def test_weights_chunks_and_what_requires_gradients(engine, large, monkeypatch):
    """`large`: query rows of one task after the other."""
    if large:
        monkeypatch.setattr(_graph_size, "LARGE", 1)
    net, (sx, sy, qx, qy) = make("LSTM"), tasks("LSTM")
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    for chunk in (None, 2):
        both(sweep(net, engine=engine, task_chunk=chunk), TaskBatch(sx, sy, qx, qy), weights)
    weights.requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # query rows computed from support rows
    support = sx * scale
    query = qx * scale + support.mean()
    both(sweep(net, engine=engine), TaskBatch(support, sy, query, qy), weights, at=[weights, scale])
    # targets, too
    soft = torch.softmax(torch.randn(3, 6, WAYS, dtype=torch.float64), -1).requires_grad_()
    mse = sweep(net, engine=engine, loss="mse")
    both(mse, TaskBatch(sx, soft, qx, F.one_hot(qy, WAYS).double()), at=[soft])


@pytest.mark.parametrize("engine", ["vmap", "loop"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_masks(engine, chunk):
    """Tasks with the same numbers of rows are swept together."""
    net, (sx, sy, qx, qy) = make("LSTM"), tasks("LSTM")
    support, query = torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    support[0, 1] = query[1, 3] = False
    batch = TaskBatch(sx.masked_fill(~support[..., None, None], torch.nan), sy, qx, qy, support, query)
    maml = sweep(net, engine=engine, task_chunk=chunk)
    out, found = both(maml, batch, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    losses = plain(net, [[p[0][m[0]]] for p, m in zip(batch, (support, support, query, query), strict=False)],
                   lr=0.3, steps=3)[0]  # fmt: skip
    check(out.task_loss[:1], losses)
    assert len(found) == len(list(net.parameters()))


class Weighed(nn.Module):
    """A loss with parameters of its own, one of which the query loss alone depends on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WAYS, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, prediction, target):
        loss = F.cross_entropy(prediction * self.scale, target)
        return loss + self.shift * prediction.square().mean() if len(target) == 4 else loss


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, WAYS).double()

    def forward(self, x, scale):
        return self.b(torch.tanh(self.a(x) * scale))


@pytest.mark.parametrize("engine, large", [("vmap", False), ("vmap", True), ("loop", False)])
def test_losses_with_parameters_and_inputs_of_several_tensors(engine, large, monkeypatch):
    if large:
        monkeypatch.setattr(_graph_size, "LARGE", 1)
    torch.manual_seed(0)
    sx, sy, qx, qy = tasks("mlp")
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    batch = TaskBatch({"x": sx, "scale": torch.rand(3, 6, 1).double() * scale}, sy,
                      {"x": qx, "scale": torch.rand(3, 4, 1).double()}, qy)  # fmt: skip
    maml = sweep(Pair(), engine=engine, loss=Weighed())
    assert len(trained(maml)) == 6
    found = both(maml, batch, at=[scale])[1]
    assert all(g.abs().max() > 1e-6 for g in found)
    support, query = ([{k: v[t].detach() for k, v in x.items()} for t in range(3)] for x in (batch[0], batch[2]))
    right = plain(maml.model, (support, sy, query, qy), lr=0.3, steps=3, loss=maml.loss_module)[2]
    of_model = dict(zip(trained(maml), found, strict=False))
    check({n: of_model[f"model.{n}"] for n in right}, right)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_random_layers_draw_the_same_again(engine):
    net, batch = make("mlp"), TaskBatch(*tasks("mlp"))
    net.insert(2, nn.Dropout(0.4))
    maml, after = sweep(net, engine=engine, every=2, inner_steps=5), []
    results = []
    for memory in ("sweep", "graph"):
        maml.memory = memory
        torch.manual_seed(3)
        results.append(maml.gradients(batch))
        after.append(torch.get_rng_state())
    check(results[0][1], results[1][1])
    assert torch.equal(*after)


def test_norms_with_statistics():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)).double()
    batch, before = TaskBatch(*tasks("mlp")), copy.deepcopy(net.state_dict())
    for engine in ("vmap", "loop"):
        both(sweep(net, engine=engine), batch)
    assert all(torch.equal(b, before[name]) for name, b in net.state_dict().items())


class Counting(nn.Module):
    """What it gives depends on how often it has run with these buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.b(torch.tanh(self.a(x))) / self.calls


def spectral():
    """A step of power iteration in each call, from where the last one came to."""
    layers = (nn.Linear(4, 6), nn.Linear(6, WAYS))
    return nn.Sequential(*(nn.utils.parametrizations.spectral_norm(layer) for layer in layers))


@pytest.mark.parametrize("make_net, engine", [(Counting, "vmap"), (Counting, "loop"), (spectral, "loop")])
def test_buffers_on_which_values_depend_are_new_in_each_step(make_net, engine):
    torch.manual_seed(0)
    net, batch = make_net().double(), TaskBatch(*tasks("mlp"))
    before = copy.deepcopy(net.state_dict())
    losses, logits, right = plain(net, batch, lr=0.3, steps=3)
    out, found = sweep(net, engine=engine, every=2).gradients(batch)
    check((out.task_loss, out.logits), (losses, logits))
    check(found, {f"model.{name}": gradient for name, gradient in right.items()})
    assert all(torch.equal(b, before[name]) for name, b in net.state_dict().items())


def test_without_gradients_nothing_changes():
    net, batch = make("LSTM"), TaskBatch(*tasks("LSTM"))
    maml, graph = sweep(net), MAML(net, inner_lr=0.3, inner_steps=3)
    with torch.no_grad():
        out = maml(batch)
    assert torch.equal(out.logits, graph(batch).logits) and not out.loss.requires_grad
    state = maml.adapt(batch.support_x, batch.support_y)  # hands weights out, with their graph
    value = F.cross_entropy(maml.predict(state, batch.query_x).flatten(0, 1), batch.query_y.flatten())
    assert torch.autograd.grad(value, net.out.weight)[0].abs().max() > 0
    empty = TaskBatch(*(part[:0] for part in batch))
    assert maml(empty).task_loss.shape == (0,)
    net.requires_grad_(False)
    assert not maml(batch).loss.requires_grad


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_support_loss_that_depends_on_nothing_that_adapts(engine):
    class Constant(nn.Module):
        def forward(self, prediction, target):
            return prediction.sum().detach() if len(target) == 6 else F.cross_entropy(prediction, target)

    both(sweep("LSTM", engine=engine, loss=Constant(), momentum=0.5), TaskBatch(*tasks("LSTM")))


def test_errors():
    batch = TaskBatch(*tasks("LSTM"))
    maml = sweep("LSTM")
    first = torch.autograd.grad(maml(batch).loss, maml.model.out.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*memory='sweep'"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="memory='sweep' cannot run under transforms of torch.func"):
        torch.func.grad(lambda x: maml(batch._replace(support_x=x)).loss)(batch.support_x)
    drawn = torch.Generator().manual_seed(0)

    def noisy(prediction, target):
        return F.cross_entropy(prediction + torch.randn(prediction.shape, generator=drawn), target)

    with pytest.raises(RuntimeError, match="the support loss must give the same again .* in step 2 it was"):
        sweep("LSTM", loss=noisy, engine="loop")(batch)
    for options, message in (({"memory": "little"}, "memory must be one of auto, graph, sweep; got 'little'"),
                             ({"every": 0}, "every must be at least 1")):  # fmt: skip
        for cls in (MAML, ANIL):
            with pytest.raises(ValueError, match=message):
                sweep("LSTM", cls, **options)
    assert "memory='sweep', every=2" in repr(sweep("LSTM", every=2)) and "memory" not in repr(MAML(make("LSTM")))


class Peak(TorchDispatchMode):
    """Bytes of what has been made while this is active, and is still there: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage):
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, size)

    def gone(self, size):
        self.now -= size


@pytest.mark.parametrize("kind, engine", [("conv, batch norm", "loop"), ("residual, layer norm", "vmap")])
def test_memory_does_not_grow_with_the_steps(kind, engine):
    """But for the weights, or with `every` a part of them."""
    net = make(kind)
    batch = TaskBatch(*(part.repeat_interleave(20, 1) for part in tasks(kind)))
    tasks_at_once = 1 if engine == "loop" else 3
    weights = tasks_at_once * sum(p.numel() * p.element_size() for p in net.parameters())

    def peak(**options):
        with Peak() as bytes_of:
            MAML(net, inner_lr=0.1, engine=engine, **options)(batch).loss.backward()
        return bytes_of.most

    few, many, spaced = (peak(memory="sweep", inner_steps=k, every=every) for k, every in ((2, 1), (10, 1), (10, 3)))
    assert many - few < 1.1 * 8 * weights
    assert spaced - few < 0.7 * (many - few)
    assert peak(memory="graph", inner_steps=10) > 2 * many


def test_query_rows_of_one_task_after_the_other(monkeypatch):
    """Where a graph of those of all tasks is large."""
    net = make("residual, layer norm")
    sx, sy, qx, qy = tasks("residual, layer norm")
    batch = TaskBatch(sx, sy, qx.repeat_interleave(40, 1), qy.repeat_interleave(40, 1))
    found = []
    for large in (2**30, 1):
        monkeypatch.setattr(_graph_size, "LARGE", large)
        maml = MAML(net, inner_lr=0.1, inner_steps=2, engine="vmap", memory="sweep")
        with Peak() as bytes_of:
            maml(batch).loss.backward()
        found.append((bytes_of.most, maml.gradients(batch)))
    (at_once, right), (in_turn, ours) = found
    assert in_turn < 0.5 * at_once
    check((ours[0].task_loss, ours[0].logits, ours[1]), (right[0].task_loss, right[0].logits, right[1]))
