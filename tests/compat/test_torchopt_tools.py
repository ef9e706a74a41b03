"""torchopt's trees, Adam of one tensor, calls on other workers and pictures: cases worked out by hand."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from fastmeta.compat import torchopt


def test_arithmetic_of_trees():
    x, y = [{"a": torch.tensor([1.0, 2.0]), "b": (torch.tensor(i), None)} for i in (3.0, 5.0)]
    tree = torchopt.pytree
    for made, a, b in (
        (tree.tree_add(x, y, y), [3.0, 6.0], 13.0),
        (tree.tree_sub(x, y), [0.0, 0.0], -2.0),
        (tree.tree_mul(x, y, x), [1.0, 8.0], 45.0),
        (tree.tree_truediv(x, y), [1.0, 1.0], 0.6),
        (tree.tree_pos(tree.tree_neg(x)), [-1.0, -2.0], -3.0),
        (tree.tree_scalar_mul(2, x), [2.0, 4.0], 6.0),
        (tree.tree_add_scalar_mul(x, y), [2.0, 4.0], 8.0),
        (tree.tree_add_scalar_mul(x, y, 0.5), [1.5, 3.0], 5.5),
        (tree.tree_sub_scalar_mul(x, y), [0.0, 0.0], -2.0),
        (tree.tree_sub_scalar_mul(x, y, 0.5), [0.5, 1.0], 0.5),
    ):
        assert made["a"].tolist() == a and made["b"][1] is None
        torch.testing.assert_close(made["b"][0].item(), b)
    row, column = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert tree.tree_matmul([row], [column])[0].tolist() == [[11.0]]
    assert tree.tree_vdot_real(x, y) == 20 and tree.tree_reduce(lambda n, t: n + t.sum(), x, 0) == 6
    complex_ = torch.tensor([1 + 2j]), torch.tensor([3 - 1j])
    assert tree.tree_vdot_real(*complex_) == 1 and tree.tree_vdot_real(complex_[0], torch.tensor([2.0])) == 2
    leaves, structure = tree.tree_flatten_as_tuple(x)
    assert leaves[1] == 3 and structure.flatten_up_to({"a": 1, "b": (2, None)}) == [1, 2]
    assert tree.tree_leaves(x, is_leaf=lambda t: isinstance(t, tuple))[1] is x["b"]
    futures = tree.tree_map(lambda t: torch.futures.Future(), x)
    tree.tree_map_(lambda future, t: future.set_result(2 * t), futures, x)
    assert tree.tree_wait(futures)["b"][0] == 6
    with pytest.raises(ImportError, match="optree"):
        _ = tree.tree_transpose


def test_masked_leaves_are_left_alone():
    decay = torchopt.transform.add_decayed_weights(0.5)
    params = {"weight": torch.ones(2), "bias": torch.ones(())}
    for mask in ({"weight": True, "bias": False}, lambda tree: {name: t.dim() > 0 for name, t in tree.items()}):
        masked = torchopt.transform.masked(torchopt.chain(decay, torchopt.transform.trace(0.9)), mask)
        state = masked.init(params)
        assert [t.shape for t in torchopt.pytree.tree_leaves(state)] == [(2,)]
        grads = {"weight": torch.zeros(2), "bias": torch.ones(())}
        updates, state = masked.update(grads, state, params=params)
        assert updates["bias"] is grads["bias"] and updates["weight"].tolist() == [0.5, 0.5]


def test_adam_of_one_tensor():
    """The second step of Adam, and its derivative, by finite differences."""
    mu, nu, g = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2, 0.7))
    op = torchopt.accelerated_op.AdamOp(0.9, 0.99, eps_root=1e-3, inplace=False)
    new_mu, new_nu, update = op(mu, nu, g, 2)
    torch.testing.assert_close(new_mu.item(), 0.27 + 0.07)
    torch.testing.assert_close(new_nu.item(), 0.198 + 0.0049)
    torch.testing.assert_close(update.item(), 0.34 / 0.19 / ((0.2029 / 0.0199 + 1e-3) ** 0.5 + 1e-8))
    assert torch.autograd.gradgradcheck(lambda *given: op(*given, 2)[2], (mu, nu, g))
    given = [t.detach().clone() for t in (mu, nu, g)]
    made = torchopt.accelerated_op.AdamOp(0.9, 0.99, eps_root=1e-3)(*given, 2)
    assert all(a is b for a, b in zip(made, given, strict=True)) and torch.equal(given[2], update.detach())
    assert op(mu, nu, None, 2) == (mu, nu, None)


def test_availability_and_names():
    assert torchopt.version.__version__ == torchopt.__version__ == "0.7.3"
    available = torchopt.accelerated_op_available
    assert available("cpu") and available(["cpu", torch.device("meta")])
    assert available() == available(0) == available("cuda:0") == torch.cuda.is_available()
    assert torchopt.nn.module.MetaGradientModule is torchopt.nn.MetaGradientModule
    with pytest.raises(AttributeError, match="nonsense"):
        _ = torchopt.nonsense


def test_arguments_are_divided_among_workers():
    api = torchopt.distributed.api
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    parts = api.dim_partitioner(workers=[4, 7])(x, scale=3, y=y)
    assert [(w, a[0].tolist(), k["y"].tolist(), k["scale"]) for w, a, k in parts] == [
        (4, x[:2].tolist(), [0, 1], 3),
        (7, x[2:].tolist(), [2, 3, 4], 3),
    ]
    parts = api.dim_partitioner(1, exclusive=True, keepdim=False, workers=[0, 3])(x)
    assert [(w, a[0].tolist()) for w, a, _ in parts] == [(0, x[:, 0].tolist()), (3, x[:, 1].tolist())]
    assert [a[0].shape for _, a, _ in api.exclusive_batch_partitioner(x)] == [(1, 2)] * 5
    assert api.batch_partitioner("no tensor") == [(0, ("no tensor",), {})]
    assert copy.deepcopy(api.batch_partitioner).keepdim
    with pytest.raises(ValueError, match="mismatch"):
        api.batch_partitioner(x, x.T)
    with pytest.raises(ValueError, match="exclusive"):
        api.TensorDimensionPartitioner(0)
    assert api.mean_reducer([x, 3 * x]).equal(2 * x) and api.sum_reducer([x, x]).equal(2 * x)
    world = torchopt.distributed
    assert world.get_world_info() == (0, 1, 0, 1) and world.get_world_info().worker_name == "worker0"
    assert world.on_rank(0)(int)("3") == world.rank_zero_only(int)("3") == 3
    assert world.not_on_rank(0)(int)("3") is world.rank_non_zero_only(int)("3") is None


def test_calls_on_workers(tmp_path):
    """One worker, this process, which calls itself; gradients go through."""
    rpc = pytest.importorskip("torch.distributed.rpc")
    world = torchopt.distributed
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{tmp_path / 'rpc'}")
    rpc.init_rpc("worker0", rank=0, world_size=1, rpc_backend_options=options)
    try:
        world.barrier()
        assert world.get_worker_id() == world.get_worker_id("worker0") == 0
        x = torch.arange(4.0)
        halves = world.dim_partitioner(workers=["worker0", 0])
        assert world.remote_sync_call(torch.sum, args=(x,), partitioner=halves, reducer=world.sum_reducer) == 6
        assert world.remote_async_call(torch.sum, args=(x,), partitioner="worker0").wait() == [6]
        assert squares(x).equal(torch.tensor([0.0, 1.0, 4.0, 9.0])) and squares.__name__ == "squares"
        weight = torch.ones(4, requires_grad=True)
        for use in ("grad", "backward"):
            with world.autograd.context() as context:
                loss = squares(weight).sum()
                if use == "grad":
                    (gradient,) = world.autograd.grad(context, loss, weight)
                else:
                    world.autograd.backward(context, loss)
                    gradient = weight.grad
                assert gradient.tolist() == [2.0] * 4
                with pytest.raises(RuntimeError, match="does not require grad"):
                    world.autograd.grad(context, loss, x)
    finally:
        rpc.shutdown()


@torchopt.distributed.parallelize()
def squares(x):
    return x * x


def test_pictures(monkeypatch):
    class Digraph:
        def __init__(self, node_attr, graph_attr):
            self.graph_attr, self.body, self.nodes, self.edges = graph_attr, [], {}, []

        def node(self, name, label, fillcolor=None):
            self.nodes[name] = (label, fillcolor)

        def edge(self, tail, head, **style):
            self.edges.append((self.nodes.get(tail), tail, head))

    graphviz = types.ModuleType("graphviz")
    graphviz.Digraph = Digraph
    monkeypatch.setitem(sys.modules, "graphviz", graphviz)
    model = nn.Linear(2, 1)
    optimizer = torchopt.MetaSGD(model, lr=0.1)
    first = torchopt.extract_state_dict(model, enable_visual=True, visual_prefix="first.")
    optimizer.step(model(torch.ones(1, 2)).sum())
    second = torchopt.extract_state_dict(model, enable_visual=True, visual_prefix="second.")
    loss = model(torch.ones(1, 2)).sum()
    dot = torchopt.visual.make_dot(loss, params=[first, second, {"loss": loss}], show_attrs=True, show_saved=True)
    labels = dict(dot.nodes.values())
    assert labels["loss\n()"] == "darkolivegreen1" and labels["first.weight\n(1, 2)"] == "lightblue"
    assert any("second.weight\n(1, 2)" in label and color == "lightblue" for label, color in dot.nodes.values())
    assert "orange" in labels.values() and any("sym_sizes" in label for label in labels)
    assert {tail for _, tail, _ in dot.edges} <= set(dot.nodes)
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match="graphviz"):
        torchopt.visual.make_dot(loss)
