"""Steps in the graph."""

from .differentiable_sgd import DifferentiableSGD

__all__ = ["DifferentiableSGD"]
