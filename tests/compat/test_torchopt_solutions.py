"""torchopt's derivatives of solutions and estimates of gradients: closed forms, and autograd by hand."""

import functools

import pytest
import torch
from torch import nn

from fastmeta.compat import torchopt

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def rows(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=g).double(), torch.randn(5, 1, generator=g).double()


# implicit gradients ---------------------------------------------------------------------------------------------------
A = torch.tensor([[2.0, 0.5], [0.3, 1.5]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "solve, symmetric",
    [
        (torchopt.linear_solve.solve_normal_cg(), False),
        (torchopt.linear_solve.solve_inv(), False),
        (torchopt.linear_solve.solve_cg(atol=1e-12, rtol=1e-12), True),
        (torchopt.linear_solve.solve_inv(ns=True, maxiter=200, alpha=0.4), False),
    ],
)
def test_solvers(solve, symmetric):
    matrix = A @ A.T if symmetric else A
    (x,) = solve(lambda v: (matrix @ v[0],), (B,))
    torch.testing.assert_close(matrix @ x, B, rtol=1e-4, atol=1e-5)
    (x,) = functools.partial(solve, ridge=0.5)(lambda v: (matrix @ v[0],), (B,))
    ridge = torch.eye(2, dtype=torch.float64) / 2
    normal = solve.func.__name__ == "_solve_normal_cg"
    left, right = (A.T @ A + ridge, A.T @ B) if normal else (matrix + ridge, B)
    torch.testing.assert_close(left @ x, right, rtol=1e-4, atol=1e-5)


def test_linear_algebra():
    spd = A @ A.T
    for x in (torchopt.linalg.cg(spd, B), torchopt.linalg.cg([spd], [B], M=[torch.linalg.inv(spd)], maxiter=1)[0]):
        torch.testing.assert_close(spd @ x, B, rtol=1e-4, atol=1e-5)
    inverse = torchopt.linalg.ns_inv(A, maxiter=100, alpha=0.4)
    torch.testing.assert_close(inverse @ A, torch.eye(2, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="matching shapes"):
        torchopt.linalg.cg(spd, B, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="square"):
        torchopt.linalg.cg(torch.ones(2, 3), torch.ones(2))


def ridge_loss(w, penalty, x, y):
    return (x @ w - y).square().sum() / 2 + penalty * w.square().sum() / 2


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("solve", [None, torchopt.linear_solve.solve_inv(), torchopt.linear_solve.solve_cg()])
def test_a_root_of_ones_own(has_aux, solve):
    """Ridge regression: the gradient to its penalty is that of the closed form."""
    x, y = rows(0)
    y = y[:, 0]
    penalty = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    target = y.clone().requires_grad_()

    @torchopt.diff.implicit.custom_root(torch.func.grad(ridge_loss), argnums=(1, 3), has_aux=has_aux, solve=solve)
    def solver(w, penalty, x, y):
        w = torch.linalg.solve(x.T @ x + penalty * torch.eye(3, dtype=torch.float64), x.T @ y)
        return (w, {"steps": 1}) if has_aux else w

    out = solver(torch.zeros(3, dtype=torch.float64), penalty, x, y=target)
    w, aux = out if has_aux else (out, {"steps": 1})
    assert aux == {"steps": 1} and solver.__name__ == "solver"
    ours = torch.autograd.grad((w * w).sum(), [penalty, target], retain_graph=True)
    closed = torch.linalg.solve(x.T @ x + penalty * torch.eye(3, dtype=torch.float64), x.T @ target)
    for a, b in zip(ours, torch.autograd.grad((closed * closed).sum(), [penalty, target]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    (first,) = torch.autograd.grad((w * w).sum(), penalty, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


def test_roots_that_are_refused():
    with pytest.raises(AssertionError, match="0"):
        torchopt.diff.implicit.custom_root(ridge_loss, argnums=0)

    def called(result, *args, **options):
        rooted = torchopt.diff.implicit.custom_root(lambda w, a: w - a, argnums=1, **options)
        return rooted(lambda w, a: result)(torch.ones(2), *args)

    for result, options, text in (([1], {}, "a tensor or a tuple"), (torch.ones(2), {"has_aux": True}, "aux")):
        with pytest.raises(RuntimeError, match=text):
            called(result, torch.ones(2), **options)
    with pytest.raises(RuntimeError, match="argnums"):
        called(torch.ones(2), "a")


class Inner(torchopt.nn.ImplicitMetaGradientModule):
    """Logits of a linear model, pulled to the meta-model's weights."""

    def __init__(self, meta_model, strength):
        super().__init__()
        self.meta_model, self.strength = meta_model, strength
        self.model = torchopt.module_clone(meta_model, by="deepcopy", detach_buffers=True)

    def forward(self, x):
        return self.model(x)

    def objective(self, x, y):
        pull = zip(self.parameters(), self.meta_model.parameters(), strict=True)
        return (self(x) - y).square().sum() / 2 + self.strength * sum((p - q).square().sum() for p, q in pull) / 2

    def solve(self, x, y):
        optimizer = torchopt.SGD(self.parameters(), lr=0.05)
        with torch.enable_grad():
            for _ in range(300):
                optimizer.zero_grad()
                self.objective(x, y).backward(inputs=list(self.parameters()))
                optimizer.step()
        return "solved"


class ByOptimality(Inner, linear_solve=torchopt.linear_solve.solve_cg(rtol=1e-10)):
    def optimality(self, x, y):
        residual = self(x) - y
        pull = [self.strength * (p - q) for p, q in zip(self.parameters(), self.meta_model.parameters(), strict=True)]
        return residual.T @ x + pull[0], residual.sum(0) + pull[1]

    def solve(self, x, y):
        return Inner.solve.__wrapped__(self, x, y)


@pytest.mark.parametrize("kind", [Inner, ByOptimality])
def test_a_module_that_is_a_solution(kind):
    x, y = rows(0)
    meta_model = nn.Linear(3, 1).double()
    strength = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inner = kind(meta_model, strength)
    assert [name for name, _ in inner.named_parameters()] == ["model.weight", "model.bias"]
    assert sorted(name.replace(".", "") for name, _ in inner.named_meta_parameters()) == sorted(
        ["strength", "meta_modelweight", "meta_modelbias"]
    )
    assert list(inner.meta_children()) == [meta_model] and inner.meta_model is meta_model
    assert inner.solve(x, y) == "solved"
    loss = inner(x).square().sum()
    leaves = [*meta_model.parameters(), strength]
    ours = torch.autograd.grad(loss, leaves)
    ones = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], 1)
    start = torch.cat([meta_model.weight, meta_model.bias[None]], 1).T
    matrix = ones.T @ ones + strength * torch.eye(4, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, ones.T @ y + strength * start)
    for a, b in zip(ours, torch.autograd.grad((ones @ solution).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_modules_that_are_refused():
    with pytest.raises(TypeError, match="either an optimality"):
        type("Bare", (torchopt.nn.ImplicitMetaGradientModule,), {"solve": lambda self: None})
    with pytest.raises(TypeError, match="staticmethod"):
        type("Static", (torchopt.nn.ImplicitMetaGradientModule,), {"objective": staticmethod(abs)})
    with pytest.raises(TypeError, match="already enabled"):
        type("Twice", (Inner,), {})
    module = torchopt.nn.MetaGradientModule(weight := torch.ones(2, requires_grad=True))
    module.own, module.given, module.plain = torch.ones(1, requires_grad=True), weight, torch.ones(3)
    assert [name for name, _ in module.named_parameters()] == ["own"] and list(module.meta_parameters()) == [weight]
    with pytest.raises(ValueError, match="requires_grad=False"):
        module.register_parameter("new", torch.ones(1))
    with pytest.raises(ValueError, match="register_meta_parameter"):
        module.register_parameter("new", weight)
    with pytest.raises(TypeError, match="meta-parameter"):
        module.given = 3
    del module.given
    assert not hasattr(module, "given") and torchopt.nn.swap_state(module, {"own": weight})["own"].numel() == 1


# estimates ------------------------------------------------------------------------------------------------------------
def quadratic(tree, extra):
    return (tree["w"] ** 2).sum() + 3 * tree["b"] + extra


DRAWS = (torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic"])
def test_estimates_by_hand(method):
    """Two equal draws (n, m) at w = [1, 2], b = 1, extra = 4: 12 here, 12 + s(2 w.n + 3 m) + s^2 n.n nearby."""
    shapes, sigma = iter([(2,), ()] * 2), 0.1

    def sample(shape):
        assert shape == next(shapes)
        return DRAWS[len(shape) == 0]

    w, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    tree = {"w": w.requires_grad_(), "b": b.requires_grad_()}
    estimated = torchopt.diff.zero_order(sample, method=method, num_samples=2, sigma=sigma)(quadratic)
    loss = estimated(tree, 4.0)
    assert loss.item() == 12 and estimated.__name__ == "quadratic"
    first, second = 2 * (1 - 4) + 3 * 0.5, 5
    weight = {
        "naive": 12 / sigma + first + sigma * second,
        "forward": first + sigma * second,
        "antithetic": first,
    }[method]
    for gradient, draw in zip(torch.autograd.grad(2 * loss, (w, b)), DRAWS, strict=True):
        torch.testing.assert_close(gradient, 2 * weight * draw, **CLOSE)


class Estimated(torchopt.nn.ZeroOrderGradientModule, method="antithetic", num_samples=300, sigma=0.01):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False).double()

    def forward(self, x):
        return self.layer(x).square().sum()

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.randn(sample_shape, dtype=torch.float64)


def test_a_module_without_gradients_of_its_own():
    torch.manual_seed(0)
    model, x = Estimated(), torch.ones(1, 2, dtype=torch.float64)
    weight = model.layer.weight
    model(x).backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach().sum().expand(1, 2), rtol=0.2, atol=0.2)
    assert model.layer.weight is weight


def test_estimates_that_are_refused():
    with pytest.raises(TypeError, match="callable or an instance"):
        torchopt.diff.zero_order(3)
    with pytest.raises(AssertionError, match="no such method"):
        torchopt.diff.zero_order(torch.randn, method="central")
    for result, error, text in ((1.0, TypeError, "tensor"), (torch.ones(2), RuntimeError, "scalar")):
        with pytest.raises(error, match=text):
            torchopt.diff.zero_order(torch.randn)(lambda x, r=result: r)(torch.ones(1))
    with pytest.raises(TypeError, match="already enabled"):
        torchopt.diff.zero_order.nn.module.enable_zero_order_gradients(Estimated)

    class Empty(torchopt.nn.ZeroOrderGradientModule):
        def forward(self):
            return torch.zeros(())

    with pytest.raises(TypeError, match="abstract"):
        Empty()
    Empty.sample, Empty.__abstractmethods__ = torch.randn, frozenset()
    with pytest.raises(RuntimeError, match="no parameters"):
        Empty()()
