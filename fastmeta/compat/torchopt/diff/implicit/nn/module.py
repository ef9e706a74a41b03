"""A module whose parameters are the solution of a problem of its own, differentiated with respect to others."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .... import linear_solve
from ...._meta_module import MetaGradientModule
from ...._stateless import reparametrize, swap_state
from ..decorator import implicit


class ImplicitMetaGradientModule(MetaGradientModule, metaclass=abc.ABCMeta):
    """After `solve(...)` the parameters are functions of the meta-parameters, by the implicit function theorem.

    A subclass defines `solve(*input)`, which trains the parameters (it runs without gradients, and enables them for
    itself), and either `objective(*input)`, a scalar that is least there, or `optimality(*input)`, a tuple in the
    order of the parameters that is 0 there. What the constructor is given, tensors that require gradients and modules,
    is meta: it does not count among the parameters. `class Net(ImplicitMetaGradientModule, linear_solve=...)` names
    the solver, `torchopt.linear_solve.solve_normal_cg()` by default.
    """

    linear_solve: Callable | None

    def __init_subclass__(cls, linear_solve: Callable | None = None) -> None:
        super().__init_subclass__()
        cls.linear_solve = linear_solve
        if not _defines(cls, "optimality"):
            if not _defines(cls, "objective"):
                raise TypeError(
                    "ImplicitMetaGradientModule requires either an optimality() method or an objective() method"
                )
            make_optimality_from_objective(cls)
        enable_implicit_gradients(cls)

    @abc.abstractmethod
    def solve(self, *input: Any, **kwargs: Any) -> Any:
        """Trains the parameters."""
        raise NotImplementedError

    def optimality(self, *input: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What is 0 at the solution. Default: the gradient of the objective."""
        raise NotImplementedError

    def objective(self, *input: Any, **kwargs: Any) -> Tensor:
        """What is least at the solution."""
        raise NotImplementedError


def make_optimality_from_objective(cls: type[ImplicitMetaGradientModule]) -> type[ImplicitMetaGradientModule]:
    """Gives a class the gradient of its objective as the optimality."""
    if not _defines(cls, "objective"):
        raise TypeError("The objective function is not defined.")

    def optimality(self: ImplicitMetaGradientModule, *input: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        names, params = _named("parameters", self.named_parameters())
        _named("meta-parameters", self.named_meta_parameters())

        def objective(params: tuple) -> Tensor:
            with reparametrize(self, zip(names, params, strict=True)):
                return self.objective(*input, **kwargs)

        return torch.func.grad(objective)(params)

    cls.optimality = optimality
    return cls


def enable_implicit_gradients(cls: type[ImplicitMetaGradientModule]) -> type[ImplicitMetaGradientModule]:
    """Makes what the `solve` of a class leaves in the parameters a function of the meta-parameters."""
    solve = cls.solve
    if getattr(solve, "__implicit_gradients_enabled__", False):
        raise TypeError("Implicit gradients are already enabled for the `solve` method.")

    @functools.wraps(solve)
    def wrapped(self: ImplicitMetaGradientModule, *input: Any, **kwargs: Any) -> Any:
        names, _ = _named("parameters", self.named_parameters())
        meta_names, meta = _named("meta-parameters", self.named_meta_parameters())
        with torch.no_grad():
            output = solve(self, *input, **kwargs)
        solution = tuple(p.detach_() for p in self.parameters())

        def optimality(params: tuple, values: tuple) -> tuple:
            state = [*zip(names, params, strict=True), *zip(meta_names, values, strict=True)]
            with reparametrize(self, state):
                return tuple(self.optimality(*input, **kwargs))

        solver = type(self).linear_solve or linear_solve.solve_normal_cg()
        swap_state(self, zip(names, implicit(optimality, solution, meta, solver), strict=True))
        return output

    wrapped.__implicit_gradients_enabled__ = True
    cls.solve = wrapped
    return cls


def _defines(cls: type, name: str) -> bool:
    """Whether a subclass has a method of its own."""
    method = inspect.getattr_static(cls, name)
    if method is inspect.getattr_static(ImplicitMetaGradientModule, name):
        return False
    if isinstance(method, (staticmethod, classmethod)):
        raise TypeError(f"method {name}() must not be a {type(method).__name__}.")
    if not callable(method):
        raise TypeError(f"method {name}() must be callable.")
    return True


def _named(what: str, named: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    pairs = tuple(named)
    if not pairs:
        raise RuntimeError(f"The module has no {what}.")
    names, tensors = zip(*pairs, strict=True)
    return names, tensors
