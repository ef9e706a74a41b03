"""`torchopt.optim.func`: an optimiser whose state is kept, and whose parameters come and go."""

from .base import FuncOptimizer

__all__ = ["FuncOptimizer"]
