"""A solver whose solution is differentiated by the condition that it fulfils."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import linear_solve, pytree

Solution = Tensor | tuple[Tensor, ...]


class _Root(torch.autograd.Function):
    """The solution as it is, and the vector-Jacobian product of the implicit function theorem."""

    @staticmethod
    def forward(ctx, vjp: Callable[..., tuple], count: int, *tensors: Tensor):
        ctx.vjp = vjp
        ctx.save_for_backward(*tensors)
        ctx.count = count
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        solution, given = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, None, *(None for _ in solution), *ctx.vjp(solution, given, grads)


def implicit(
    optimality: Callable[..., Solution], solution: tuple[Tensor, ...], given: tuple[Tensor, ...], solve: Callable
) -> tuple[Tensor, ...]:
    """`solution`, where `optimality(solution, given)` is 0, as a function of `given`.

    With F the optimality at the solution x, `dx = -(dF/dx)^-1 dF/dgiven`: `solve` finds u with `(dF/dx)^T u = -grad`.
    """

    def vjp(x: tuple, values: tuple, grads: tuple) -> tuple:
        _, transposed = torch.func.vjp(lambda x: optimality(x, values), x)
        u = solve(lambda u: transposed(u)[0], tuple(-g for g in grads))
        _, to_given = torch.func.vjp(lambda values: optimality(x, values), values)
        return to_given(u)[0]

    return _Root.apply(vjp, len(solution), *(t.detach() for t in solution), *given)


def custom_root(
    optimality_fn: Callable[..., Solution],
    argnums: int | tuple[int, ...],
    has_aux: bool = False,
    solve: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Decorates a solver: its solution is differentiated with respect to its arguments `argnums`.

    The solver runs without gradients, so that one that needs some enables them.

    Args:
        optimality_fn: takes the solution in place of the solver's first argument, then the solver's others, and is 0
            there: the gradient of an objective.
        argnums: positions of the arguments, tensors or tuples or lists of them; not 0, where the solver starts.
        has_aux: the solver gives back `(solution, anything)`.
        solve: solves the linear system. Default: `torchopt.linear_solve.solve_normal_cg()`.

    Raises:
        AssertionError: `argnums` holds 0.
        RuntimeError: in a call, where what the solver gives back or is given is not as said here.
    """
    argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    assert 0 not in argnums, "argnums must not hold 0, where the solver starts"
    solve = linear_solve.solve_normal_cg() if solve is None else solve

    def decorate(solver_fn: Callable) -> Callable:
        return functools.wraps(solver_fn)(_rooted(solver_fn, optimality_fn, argnums, has_aux, solve))

    return decorate


def _rooted(solver_fn: Callable, optimality_fn: Callable, argnums: tuple, has_aux: bool, solve: Callable) -> Callable:
    who = "custom_root(optimality_fn)(solver_fn)(*args)"
    solver_signature, signature = inspect.signature(solver_fn), inspect.signature(optimality_fn)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = solver_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            output = solver_fn(*bound.args, **bound.kwargs)
        aux = None
        if has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise RuntimeError(f"{who}: output of function solver_fn should be a tuple: (output, aux)")
            output, aux = output
        alone = isinstance(output, Tensor)
        solution = (output,) if alone else output
        if not (isinstance(solution, tuple) and all(map(torch.is_tensor, solution))):
            raise RuntimeError(f"{who}: output of function solver_fn should be a tensor or a tuple of tensors")
        of_optimality = signature.bind(*bound.args, **bound.kwargs)
        if of_optimality.kwargs:
            raise TypeError(f"keyword arguments to solver_fn could not be resolved to positions of {signature}")
        places = [i for i in argnums if i < len(of_optimality.args)]
        chosen = [of_optimality.args[i] for i in places]
        for value in chosen:
            if not all(map(torch.is_tensor, value if isinstance(value, (tuple, list)) else [value])):
                raise RuntimeError(f"{who}: arguments specified with argnums should be tensors or tuples of tensors")
        given, structure = pytree.tree_flatten(chosen)
        fixed = [a.detach() if isinstance(a, Tensor) else a for a in of_optimality.args]

        def optimality(x: tuple, values: tuple) -> tuple:
            here = list(fixed)
            for i, value in zip(places, pytree.tree_unflatten(structure, values), strict=True):
                here[i] = value
            zero = optimality_fn(x[0] if alone else x, *here[1:])
            return (zero,) if alone else tuple(zero)

        outs = implicit(optimality, solution, tuple(given), solve)
        result = outs[0] if alone else outs
        return (result, aux) if has_aux else result

    return wrapped
